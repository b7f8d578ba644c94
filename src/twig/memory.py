"""How much memory this process has used at its peak, on whatever device it trains.

Needs no torch to import: the device is asked only if torch is there already.
"""

import sys
from typing import Any


class PeakMemory:
    """Measures the peak from `__enter__` on: allocated bytes on a CUDA device, else the process's resident
    memory."""

    def __enter__(self) -> "PeakMemory":
        if (cuda := _cuda()) is not None:
            cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def peak(self) -> int:
        """The peak so far, in bytes. Resident memory counts from the start of the process."""
        if (cuda := _cuda()) is not None:
            return int(cuda.max_memory_allocated())
        return _resident_peak()


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _resident_peak() -> int:
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
