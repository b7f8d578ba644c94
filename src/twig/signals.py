"""Ctrl-C and SIGTERM as a request to stop, which a run answers where it can be saved. Knows of no runs."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Stop:
    """Whether a signal has `asked` to stop; `at_once`: a signal need not wait, for nothing is lost."""

    asked: bool = False
    at_once: bool = False


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
