"""Measures memory: the peak of this process or of its GPU; recognises out-of-memory errors.

Imports no torch: a GPU is asked only if torch is loaded already. After an out-of-memory error, leave the
`except` block before you retry: the error's frames hold the tensors that are in the way.
"""

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_AT_THE_END = 2**26  # bytes that are free at the heap's upper end, where small tensors come and go


class PeakMemory:
    """Measures the peak memory between `__enter__` and `__exit__` on a device such as cpu or cuda:1.

    On CUDA it is what torch allocated there, elsewhere the process's resident memory. `__exit__` removes the
    limit that `limit` set.
    """

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
        """Returns the bytes in use now."""
        if self.on_cuda:
            return int(self._cuda.memory_allocated(self.device))
        return _resident()

    def peak(self) -> int:
        """Returns the peak so far, in bytes; that of resident memory is since the process started."""
        if self.on_cuda:
            return int(self._cuda.max_memory_allocated(self.device))
        return _resident_peak()

    def context(self) -> int:
        """Returns the bytes that this process takes of a CUDA device outside torch's allocator, else 0.

        At most what the plan counts: other processes' memory looks the same from here.
        """
        if not self.on_cuda:
            return 0
        free, total = self._cuda.mem_get_info(self.device)
        outside = total - free - self._cuda.memory_reserved(self.device)
        return int(min(max(outside, 0), CUDA_CONTEXT))

    def limit(self, most: int) -> None:
        """Limits torch to `most` bytes of a CUDA device until `__exit__`.

        Beyond them it raises OutOfMemoryError. Blocks that torch keeps without need are given back first.
        Does nothing on other devices.
        """
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
        """Returns the device's number, which torch needs where `cuda` alone is not enough."""
        number = self.device.partition(":")[2]
        return int(number) if number else int(self._cuda.current_device())


class _Returned:
    """The bytes above which freed blocks are always returned: see `return_freed_memory`."""

    above = 2**25  # glibc's own upper bound


def return_freed_memory(above: int = 2**21, for_good: bool = False) -> None:
    """Makes the C library return freed blocks of more than `above` bytes to the system at once, from now on.

    glibc raises that size by itself, from 128 KiB to 32 MiB. Tensors are then cut out of a heap of which less
    and less can be used again. But a block that was returned costs 0.2 ms a MiB when it is next taken, and
    those of up to a MiB come and go with every layer. With `for_good`, later calls set no larger size. Does
    nothing with other C libraries.
    """
    if for_good:
        _Returned.above = above
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, min(above, _Returned.above))
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_AT_THE_END)


def trim_freed_memory() -> None:
    """Returns what is free in the C library's heap to the system; does nothing with others than glibc.

    glibc does that only at the heap's upper end. Takes milliseconds.
    """
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> Any:
    """Returns glibc, None if the C library is another."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None


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

        # psutil has it on Windows only
        return int(psutil.Process().memory_info().peak_wset)  # pyright: ignore[reportAttributeAccessIssue]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# What torch's errors say if they have no class of their own (CPU, Apple GPUs, cuBLAS).
_PHRASES = ("can't allocate memory", "out of memory", "not enough memory", "cublas_status_alloc_failed")


def out_of_memory(error: BaseException) -> bool:
    """Returns whether a device or the machine is out of memory, or the error was raised because of that.

    If the capture of a CUDA graph ends early, it raises another error, whose context is the cause.
    """
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if any(phrase in str(error).lower() for phrase in _PHRASES):
        return True
    return error.__context__ is not None and out_of_memory(error.__context__)


def give_back() -> None:
    """Returns unused memory to the device."""
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
