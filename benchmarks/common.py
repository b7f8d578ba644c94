"""What the benchmarks share: alternating fresh processes, medians, and a record of where they ran."""

import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Columns of a comparison: TRL with the products that Twig takes, and TRL unchanged.
SAME_KERNEL, AS_IT_COMES = "same kernel", "as it comes"
PACKAGES = ("torch", "transformers", "peft", "trl", "numpy")


def alternate(script: str, sides: dict[str, list[str]], rounds: int) -> dict[str, list[dict]]:
    """Runs `script --side SIDE ARGUMENTS` in a fresh process, `rounds` times a side, the sides in turn.

    `sides` has the arguments of each side; where they name a --side themselves, the key is only a name. Each
    process prints one JSON object on its last line. Raises RuntimeError with its stderr where one fails.
    """
    found: dict[str, list[dict]] = {side: [] for side in sides}
    for number in range(rounds):
        # every other round backwards, so that neither side is always the one after a pause
        for side in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            words = sides[side] if "--side" in sides[side] else ["--side", side, *sides[side]]
            command = [sys.executable, os.path.abspath(script), *words]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | OFFLINE)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
            found[side].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"round {number + 1}/{rounds}  {side:8}  {found[side][-1]}", file=sys.stderr, flush=True)
    return found


OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Gives a function for the growth of resident memory at its peak since the beginning, in MiB (Linux)."""
    gc.collect()
    # what the allocator has free would hide what is taken next
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    start = _status("VmRSS")
    yield lambda: (_status("VmHWM") - start) / 1024


def _status(key: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def trl_settings(output: str, batch: int, micro: int, **settings: Any) -> Any:
    """Returns a GRPOConfig for `batch` completions in micro-batches, without KL term, logs or checkpoints."""
    from trl import GRPOConfig

    chosen = {
        "output_dir": output,
        "loss_type": "grpo",
        "beta": 0.0,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch // micro,
        "lr_scheduler_type": "constant",
        "activation_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return GRPOConfig(**chosen | settings)


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over the processes."""
    return {key: median(row[key] for row in rows) for key in rows[0]}


def ratio(rows: list[dict], others: list[dict], key: str) -> dict[str, float]:
    """`others` / `rows` in figure `key`, paired by round: the median and the range."""
    pairs = sorted(b[key] / a[key] for a, b in zip(rows, others, strict=True))
    return {"median": median(pairs), "low": pairs[0], "high": pairs[-1]}


def write(name: str, result: dict[str, Any]) -> Path:
    """Writes `result` with device, versions and commit to benchmarks/results/NAME.json."""
    record = {
        "command": "python " + " ".join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "commit": _commit(),
        "device": _device(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        **result,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device() -> str:
    """The GPU that this process has used, else the processor."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return f"{_processor()}, {len(os.sched_getaffinity(0))} cores"


def _commit() -> str:
    """The commit of the checkout, or TWIG_COMMIT where the files were copied without it."""
    if os.environ.get("TWIG_COMMIT"):
        return os.environ["TWIG_COMMIT"]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    changed = "+changes" if git("status", "--porcelain", "src", "benchmarks/*.py").strip() else ""
    return git("rev-parse", "--short=12", "HEAD").strip() + changed


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
