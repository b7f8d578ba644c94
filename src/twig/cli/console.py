"""What the commands share: their options, the errors that end them, and where results go."""

import os
import warnings
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from twig.cli.display import clean
from twig.runtime.lifeline import STOPPED


class Silent(Exception):
    """The end of a process of several that leaves the words to the first one."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="GROUP.KEY=VALUE", help="Settings; see docs/settings.md.")
]


class Stopped(Exception):
    """What was asked for was stopped and is saved; the words say how to go on."""

    status = STOPPED


def result_console() -> Console:
    """Where a command's result goes: stdout, as it is now."""
    return Console(highlight=False)


def show_row(name: str, words: Any) -> None:
    """Prints a name and what there is to say of it."""
    result_console().print(Text(f"{name:<18} {clean(words)}"), soft_wrap=True)


def quiet_libraries() -> None:
    """Silences the bars and warnings of libraries, which would tear the display; errors still come
    through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
