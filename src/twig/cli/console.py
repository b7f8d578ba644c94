"""Defines what the commands share: options, the errors that end them, and the console for results."""

import os
import warnings
from typing import Annotated, Any

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
    """The command was stopped, and its state is saved; the message says how to resume."""

    status = STOPPED


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
