"""How much memory was used: the peak of this process or of its GPU, and what the C library keeps of it.

Needs no torch: a GPU is asked only where torch is there already.
"""

import ctypes
import sys
from pathlib import Path

_M_MMAP_THRESHOLD, _RETURNED_FROM = -3, 2**18  # malloc.h; bytes


class PeakMemory:
    """Measures the peak from `__enter__` on, on a device such as cpu or cuda:1: what torch allocated
    there, or without CUDA the process's resident memory."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> "PeakMemory":
        if self.device.startswith("cuda"):
            sys.modules["torch"].cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def now(self) -> int:
        """What is there at this moment, in bytes."""
        if self.device.startswith("cuda"):
            return int(sys.modules["torch"].cuda.memory_allocated(self.device))
        return _resident()

    def peak(self) -> int:
        """The peak so far, in bytes. Resident memory counts from the start of the process."""
        if self.device.startswith("cuda"):
            return int(sys.modules["torch"].cuda.max_memory_allocated(self.device))
        return _resident_peak()


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
