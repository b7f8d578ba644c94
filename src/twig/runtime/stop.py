"""Asks a run to stop after the step: Ctrl-C, SIGTERM, a time limit. Knows nothing of runs."""

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
    """Says whether a signal `asked` to stop.

    If `at_once` is set, a signal stops immediately: there is no progress to save.
    """

    asked: bool = False
    at_once: bool = False


class Clock:
    """Measures a time limit from now on, written as `train.max_time` is; None is no limit."""

    def __init__(self, limit: str | float | None) -> None:
        self.end = None if limit is None else time.monotonic() + (parse_duration(limit) or 0)
        self.longest = 0.0

    def ends_before_another(self, seconds: float) -> bool:
        """Returns whether a step like the longest so far would pass the limit; the last took `seconds`."""
        self.longest = max(self.longest, seconds)
        return self.end is not None and time.monotonic() + self.longest > self.end


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Inside, the first SIGINT or SIGTERM sets `asked`; the second raises KeyboardInterrupt.

    If `at_once` is set, the first one raises it too. Does nothing in a thread other than the main one.
    """
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
