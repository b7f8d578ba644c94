"""Runs a user's code beside Twig's own: what it raises as text, and what it may change in the process.

Whatever it raises, `str` and tracebacks of it included, becomes text. `ProcessState` puts back what the whole
process shares.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from twig.common.text import shortened

_LONGEST_MESSAGE = 800
_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # those that Twig handles
# Functions of torch that return a switch of the whole process, or of this thread, and those that set it.
_TORCH = {
    "get_default_dtype": "set_default_dtype",
    "get_default_device": "set_default_device",
    "is_grad_enabled": "set_grad_enabled",
    "get_num_threads": "set_num_threads",
    "get_float32_matmul_precision": "set_float32_matmul_precision",
    "get_deterministic_debug_mode": "set_deterministic_debug_mode",
}


def is_ours(error: BaseException) -> bool:
    """Returns whether an exception out of a user's code is the person's at the keyboard, not the code's."""
    return isinstance(error, KeyboardInterrupt)


def message_from(error: BaseException) -> str:
    """Returns the message of an exception that a user's code raised, on one line; never raises."""
    return shortened(" ".join(_text(lambda: str(error)).split()), _LONGEST_MESSAGE)


def traceback_from(error: BaseException) -> str:
    """Returns the traceback of an exception that a user's code raised; never raises."""
    return _text(lambda: "".join(traceback.format_exception(error)))


def repr_of(value: object) -> str:
    """Returns the `repr` of a user's value on one line; never raises.

    >>> repr_of([1, 2]), repr_of("a" * 100) == "'" + "a" * 76 + "..."
    ('[1, 2]', True)
    """
    text = " ".join(_text(lambda: repr(value)).split()) or f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def _text(make: Callable[[], str]) -> str:
    try:
        return str(make())
    except BaseException as error:
        if is_ours(error):
            raise
        return "(it has no text)"


@dataclass(frozen=True)
class ProcessState:
    """What a user's code shares with Twig's: the working folder, signals, switches of torch and numpy."""

    folder: str | None
    handlers: dict[int, Any]
    has_alarm: bool
    numpy: dict[str, Any] | None
    torch: dict[str, Any]

    @classmethod
    def now(cls) -> "ProcessState":
        """Returns the present state."""
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        return cls(
            _folder(),
            {number: signal.getsignal(number) for number in _SIGNALS},
            _has_alarm(),
            None if numpy is None else numpy.geterr(),
            {} if torch is None else {name: _switch(torch, name) for name in _TORCH},
        )

    def restore(self) -> None:
        """Puts back what has changed since; an alarm that was set since is cleared."""
        now = ProcessState.now()
        if now.folder != self.folder and self.folder is not None and os.path.isdir(self.folder):
            os.chdir(self.folder)
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.handlers.items():
                if now.handlers[number] is not handler and handler is not None:
                    signal.signal(number, handler)
            if now.has_alarm and not self.has_alarm:
                signal.setitimer(signal.ITIMER_REAL, 0)
        if self.numpy is not None and now.numpy != self.numpy:
            sys.modules["numpy"].seterr(**self.numpy)
        for name, value in self.torch.items():
            if value is not None and now.torch.get(name) != value:
                getattr(sys.modules["torch"], _TORCH[name])(value)


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _has_alarm() -> bool:
    return hasattr(signal, "getitimer") and signal.getitimer(signal.ITIMER_REAL)[0] > 0


def _switch(torch: Any, name: str) -> Any:
    try:
        return getattr(torch, name)()
    except (
        AttributeError,
        RuntimeError,
    ):  # torch has several ways to set the precision, and refuses a mixture
        return None
