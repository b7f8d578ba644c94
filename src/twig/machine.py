"""What a result may depend on: versions, platform, device; and whether torch can use the machine's GPU.

Never reads environment variables, host names or users. Needs no torch to import.
"""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("twig-rl", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")
TORCH_PAGE = "https://pytorch.org/get-started/locally/"


def environment() -> dict[str, Any]:
    """What a result may depend on: versions, platform, processor count, the commit of Twig's own source."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    # Only in its own checkout: an installed copy inside somebody's repository has no commit.
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def device_words(torch: Any) -> str:
    """The device that a run takes, and its memory, in words; `torch` is the module."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        major, minor = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_name()
        return f"cuda, {name} ({major}.{minor}), {total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def has_nvidia_gpu(driver: Path = Path("/proc/driver/nvidia")) -> bool:
    """Whether the machine seems to have an NVIDIA GPU: its driver, or the driver's tool, is there."""
    return shutil.which("nvidia-smi") is not None or driver.exists()


def gpu_warning(cuda: str | None, hip: str | None, usable: bool, nvidia: bool) -> str | None:
    """What keeps torch from an NVIDIA GPU and the cure, or None where nothing does."""
    if not nvidia or usable:
        return None
    if cuda is None and hip is None:
        return f"an NVIDIA GPU is here, but this torch is a CPU build; install a CUDA build: {TORCH_PAGE}"
    why = f"its driver may be older than CUDA {cuda} needs; see {TORCH_PAGE}"
    return f"an NVIDIA GPU is here, but torch cannot use it: {why}"
