"""Memory in use: the peak of this process or of its GPU, what the C library keeps, and running out of it.

Imports no torch: a GPU is asked only where torch is there already. Whoever catches running out of memory
leaves the `except` block before trying again: the error's frames hold the tensors that are in the way.
"""

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

_M_MMAP_THRESHOLD, _RETURNED_FROM = -3, 2**18  # malloc.h; bytes


class PeakMemory:
    """Measures the peak from `__enter__` on, on a device such as cpu or cuda:1: what torch allocated
    there, or without CUDA the process's resident memory. A limit set by `limit` ends with `__exit__`."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.on_cuda = device.startswith("cuda")
        self._before: float | None = None  # the share of the device that the process was allowed

    def __enter__(self) -> "PeakMemory":
        if self.on_cuda:
            self._cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            self._cuda.set_per_process_memory_fraction(self._before, self._number())
            self._before = None

    def now(self) -> int:
        """What is there at this moment, in bytes."""
        if self.on_cuda:
            return int(self._cuda.memory_allocated(self.device))
        return _resident()

    def peak(self) -> int:
        """The peak so far, in bytes. Resident memory counts from the start of the process."""
        if self.on_cuda:
            return int(self._cuda.max_memory_allocated(self.device))
        return _resident_peak()

    def context(self) -> int:
        """Bytes that this process takes of a CUDA device outside torch's allocator: at most what the plan
        counts, as other processes' memory cannot be told from it. 0 elsewhere."""
        if not self.on_cuda:
            return 0
        free, total = self._cuda.mem_get_info(self.device)
        outside = total - free - self._cuda.memory_reserved(self.device)
        return int(min(max(outside, 0), CUDA_CONTEXT))

    def limit(self, most: int) -> None:
        """Keeps torch from taking more than `most` bytes of a CUDA device until `__exit__`: it raises
        OutOfMemoryError. Blocks that it keeps without need are given back first. Nothing elsewhere."""
        if not self.on_cuda:
            return
        number, (_, total) = self._number(), self._cuda.mem_get_info(self.device)
        if self._before is None:
            self._before = float(self._cuda.get_per_process_memory_fraction(number))
        share = min(max(most, 0) / total, self._before)
        self._cuda.set_per_process_memory_fraction(share, number)

    @property
    def _cuda(self) -> Any:
        return sys.modules["torch"].cuda

    def _number(self) -> int:
        """The device's number: where torch asks for one, `cuda` alone is not enough."""
        number = self.device.partition(":")[2]
        return int(number) if number else int(self._cuda.current_device())


def return_freed_memory() -> None:
    """Has the C library give freed blocks of 256 KiB and more back to the system at once, from now on.

    glibc raises that size by itself, up to 32 MiB. Tensors are then cut out of a heap, which keeps up to half
    as much again as was ever alive. Giving back costs a tenth of the time or less. Nothing happens where the
    C library is another one.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(_M_MMAP_THRESHOLD, _RETURNED_FROM)


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _resident_peak() -> int:
    try:  # Linux: what getrusage says there includes the process that this one was started by
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# How torch words it where it has no error class of its own (CPU, Apple GPUs, cuBLAS).
_WORDS = ("can't allocate memory", "out of memory", "not enough memory", "cublas_status_alloc_failed")


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device or the machine is out of memory, or was raised because of that.

    A CUDA graph whose capture ends early raises an error of its own, in whose context is the cause.
    """
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if any(words in str(error).lower() for words in _WORDS):
        return True
    return error.__context__ is not None and out_of_memory(error.__context__)


def give_back() -> None:
    """Returns what is no longer used to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


MIB = 2**20

# A CUDA device: measured on an H100 (benchmarks/gpu_memory.py), whose context is larger than that of a GPU
# with fewer multiprocessors.
CUDA_CONTEXT = 800 * MIB  # outside torch: the driver's context and the code of all kernels that a run loads
