"""Disks that fail and processes that die, at a chosen one of the writes, flushes and renames of a run."""

import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path

CALLS = ("write", "fsync", "replace")


class Failing:
    """Inside, the call number `at` (from 0) of os.write, os.fsync and os.replace raises OSError(`number`);
    a write that fails has written half. `calls` has (name, file) of all of them, `failed` whether one did.

    `match` names a part of the path: then only the calls on such files count.
    """

    def __init__(self, at: int, number: int, match: str = "", forever: bool = False) -> None:
        self.at, self.number, self.match, self.forever = at, number, match, forever
        self.calls: list[tuple[str, str]] = []

    @property
    def failed(self) -> bool:
        return len(self.calls) > self.at

    def __enter__(self) -> "Failing":
        self.real = {name: getattr(os, name) for name in CALLS}
        for name in CALLS:
            setattr(os, name, self._wrapped(name))
        return self

    def __exit__(self, *exception) -> None:
        for name, call in self.real.items():
            setattr(os, name, call)

    def now(self) -> None:
        """What happens at the call; raises OSError."""
        raise OSError(self.number, os.strerror(self.number))

    def _wrapped(self, name: str) -> Callable:
        real = self.real[name]

        def call(first, *rest):
            path = os.path.abspath(first) if name == "replace" else path_of(first)
            if self.match not in path or not path.startswith("/"):
                return real(first, *rest)
            self.calls.append((name, path))
            number = len(self.calls) - 1
            if number == self.at or self.forever and number > self.at:
                if name == "write":
                    real(first, rest[0][: len(rest[0]) // 2])
                self.now()
            return real(first, *rest)

        return call


class Dying(Failing):
    """Inside, the process kills itself at that call."""

    def __init__(self, at: int, match: str = "") -> None:
        super().__init__(at, 0, match)

    def now(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def one_of_each(calls: list[tuple[str, str]], rng: random.Random) -> list[int]:
    """The numbers of calls of a run (in a folder "run"), one at random of each kind: the same on the same
    file whatever the step."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for number, (name, path) in enumerate(calls):
        kind = name, re.sub(r"[0-9]+", "N", path.partition("/run/")[2])
        kinds.setdefault(kind, []).append(number)
    return [rng.choice(numbers) for numbers in kinds.values()]


def path_of(handle: int) -> str:
    """The path of an open file; "" for what is none."""
    try:
        return os.readlink(f"/proc/self/fd/{handle}")
    except OSError:
        return str(Path.cwd()) if handle > 2 else ""  # not on Linux: every file counts
