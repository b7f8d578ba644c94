"""Describes what a result may depend on: versions, platform, device; and whether torch can use the GPU.

Never reads environment variables, host names or users. Needs no torch to import.
"""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from twig.common.errors import UserError

PACKAGES = ("twig-rl", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")
# What decides how fast a processor multiplies matrices, as Linux names it.
PRODUCTS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
TORCH_PAGE = "https://pytorch.org/get-started/locally/"


def environment() -> dict[str, Any]:
    """Returns versions, platform, processor and how many, and the commit of Twig's own source."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": processor(),
        "cpu_count": os.cpu_count(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def processor(place: Path = Path("/proc/cpuinfo")) -> str | None:
    """Returns the processor's name, on Linux with those of PRODUCTS that it has; None if it has no name."""
    try:
        lines = [line.partition(":") for line in place.read_text("utf-8", "replace").splitlines()]
    except OSError:
        brand = _run("sysctl", "-n", "machdep.cpu.brand_string") if sys.platform == "darwin" else None
        return brand or platform.processor() or None
    facts = {key.strip(): value.strip() for key, _, value in lines}
    has = [name for name in PRODUCTS if name in facts.get("flags", "").split()]
    name = facts.get("model name")
    return f"{name} ({', '.join(has)})" if name and has else name


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    # Only in its own checkout: an installed copy inside somebody's repository has no commit.
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    return _run("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def device_words(torch: Any) -> str:
    """Returns a text with the device that a run takes, and its memory; `torch` is the module."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        major, minor = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_name()
        return f"cuda, {name} ({major}.{minor}), {total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_kind(device: str, torch: Any = None) -> str:
    """Returns what `model.device` means here: cpu, cuda or mps.

    `torch` is the module. Without it nothing is imported, and `auto` is a guess from the driver and the torch
    that is installed.
    """
    if device != "auto":
        return device.partition(":")[0]
    if torch is not None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if sys.platform == "darwin":
        return "mps" if platform.machine() == "arm64" else "cpu"
    built_for_gpu = not (_version("torch") or "").endswith("+cpu")
    return "cuda" if built_for_gpu and has_nvidia_gpu() else "cpu"


def free_memory(device: str, torch: Any = None) -> int:
    """Returns the bytes that a process may still take on a device, such as cpu or cuda:1.

    On a CPU they are what the machine has available or, if less, what the container may still take. What
    torch's allocator keeps of a GPU without need is free. `torch` is the module if it is loaded. Raises
    UserError if a GPU does not say what is free.
    """
    kind, _, number = device.partition(":")
    if kind == "cuda":
        if torch is not None:
            kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return int(torch.cuda.mem_get_info(device)[0] + kept)
        output = _run("nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits")
        free = (output or "").split()
        if int(number or 0) >= len(free):
            raise UserError("memory.budget", "the GPU does not say what is free", "Set memory.budget=6GiB")
        return int(free[int(number or 0)]) * 2**20
    import psutil

    return min(psutil.virtual_memory().available, _left_in_container())


def waited_for_a_core(place: Path = Path("/proc/thread-self/schedstat")) -> float | None:
    """Returns the seconds that this thread was ready but other work had its core; None if unknown."""
    try:
        return int(place.read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None  # not Linux, or a kernel without these figures


def _left_in_container(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the bytes that a container's control group leaves; a huge number without a limit."""
    for folder, limit, used in (
        (root, "memory.max", "memory.current"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most.isdigit():  # cached pages of files are given back when they are needed
            return max(int(most) - now + int(counts.get("inactive_file", 0)), 0)
    return 2**63


def _run(*command: str) -> str | None:
    """Returns what a command prints, None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def has_nvidia_gpu(driver: Path = Path("/proc/driver/nvidia")) -> bool:
    """Returns whether the NVIDIA driver, or its tool, is there."""
    return shutil.which("nvidia-smi") is not None or driver.exists()


def gpu_warning(cuda: str | None, hip: str | None, usable: bool, nvidia: bool) -> str | None:
    """Returns what keeps torch from an NVIDIA GPU, and the cure; None if nothing does."""
    if not nvidia or usable:
        return None
    if cuda is None and hip is None:
        return f"an NVIDIA GPU is here, but this torch is a CPU build; install a CUDA build: {TORCH_PAGE}"
    why = f"its driver may be older than CUDA {cuda} needs; see {TORCH_PAGE}"
    return f"an NVIDIA GPU is here, but torch cannot use it: {why}"
