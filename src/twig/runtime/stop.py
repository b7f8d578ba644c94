"""What asks a run to stop where it can be saved: Ctrl-C, SIGTERM, a time limit. Knows of no runs."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from twig.common.text import parse_duration


@dataclass
class Stop:
    """Whether a signal has `asked` to stop; `at_once`: a signal need not wait, for nothing is lost."""

    asked: bool = False
    at_once: bool = False


class Clock:
    """A time limit (as `train.max_time` has it; None: none), counted from here on."""

    def __init__(self, limit: str | float | None) -> None:
        self.end = None if limit is None else time.monotonic() + (parse_duration(limit) or 0)
        self.longest = 0.0

    def ends_before_another(self, seconds: float) -> bool:
        """Whether there is no time for a step like the longest so far; the last one took `seconds`."""
        self.longest = max(self.longest, seconds)
        return self.end is not None and time.monotonic() + self.longest > self.end


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Inside, the first SIGINT or SIGTERM sets `asked`; it raises KeyboardInterrupt where `at_once` is set,
    and so does the second one anywhere. In a thread other than the main one nothing changes."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        if stop.asked or stop.at_once:
            raise KeyboardInterrupt
        stop.asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
