"""Defines what the commands share: options, the errors that end them, streams, the console for results."""

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any, TextIO, cast

import typer
from rich.console import Console
from rich.text import Text

from twig.cli.display import clean
from twig.runtime.failures import STOPPED


class Silent(Exception):
    """Ends one of several processes without a message: the first process writes it."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="GROUP.KEY=VALUE", help="Settings; see docs/settings.md.")
]


class Stopped(Exception):
    """The command was stopped, and its state is saved; `command` resumes it."""

    status = STOPPED

    def __init__(self, message: str, command: str = "") -> None:
        super().__init__(message)
        self.command = command


class Stream:
    """A stream to write to that never fails: what cannot be written is lost, and nothing else happens.

    A character that its encoding lacks is escaped. It stays open, whoever closes it. `trouble` is the last
    error but for a pipe that its reader closed.
    """

    def __init__(self, stream: Any) -> None:  # whatever has `write` and `flush`
        self.stream = stream
        self.trouble: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except UnicodeEncodeError as error:
            with self._losing():
                self.stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except (OSError, ValueError) as error:  # a ValueError: it is closed
            self._lost(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._losing():
            self.stream.flush()

    def close(self) -> None:
        """Does nothing: reward functions share the stream with the command."""

    def settle(self) -> None:
        """Drops what cannot be written, so that the interpreter does not try again at its end."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)
                self.stream.flush()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            self.trouble = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def unfailing_streams() -> Iterator[Stream]:
    """Inside, nothing that is written to stdout or stderr fails, and both are there; yields stdout."""
    before = sys.stdout, sys.stderr
    opened = [open(os.devnull, "w", encoding="utf-8") for stream in before if stream is None]
    given = iter(opened)
    streams = [Stream(next(given) if stream is None else stream) for stream in before]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        yield streams[0]
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.settle()
        for stream in opened:
            stream.close()


def result_console() -> Console:
    """Returns the console for a command's result: the present stdout."""
    return Console(highlight=False)


def show_row(name: str, value: Any) -> None:
    """Prints a name and its value."""
    result_console().print(Text(f"{name:<18} {clean(value)}"), soft_wrap=True)


def quiet_libraries() -> None:
    """Silences the bars and warnings of libraries, which would break the display; errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
