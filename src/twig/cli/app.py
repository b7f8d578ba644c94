"""The command line: its commands, and how their ends become an exit status.

What a person can fix is one line on stderr and exit status 2; a stopped run is 130, a fault of Twig 1. Torch
and transformers are imported by the commands that need them, when they run.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from twig import __version__
from twig.cli.compare import compare_command
from twig.cli.console import Silent, Stopped
from twig.cli.env import env_command
from twig.cli.eval import eval_command
from twig.cli.export import export_command
from twig.cli.plan import plan_command
from twig.cli.recipes import recipes_command
from twig.cli.report import report_command
from twig.cli.tasks import tasks_command
from twig.cli.train import train_command
from twig.common.errors import UserError
from twig.common.redact import hidden
from twig.common.text import one_line
from twig.runtime.lifeline import FAULT, STOPPED, USAGE_ERROR, Ended
from twig.runtime.processes import launched

_UsageError = typer.BadParameter.__mro__[1]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train language models to reason with reinforcement learning, on small hardware.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.command("train")(train_command)
app.command("eval")(eval_command)
app.command("compare")(compare_command)
app.command("export")(export_command)
app.command("plan")(plan_command)
app.command("report")(report_command)
app.command("recipes")(recipes_command)
app.command("tasks")(tasks_command)
app.command("env")(env_command)


# ---- from words to an exit status -----------------------------------------------------------------------


def _version(wanted: bool) -> bool:
    if wanted:
        sys.stdout.write(f"twig {__version__}\n")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit status: 0, 1 (a fault of Twig), 2 (one line says what), 130."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        _refuse_several(words)
        status = app(words or ["--help"], prog_name="twig", standalone_mode=False)
        sys.stdout.flush()
        if status == STOPPED:  # some versions of typer turn Ctrl-C into this, and say nothing
            return _end("stopped", STOPPED)
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _end("stopped", STOPPED)
    except Silent as ended:
        return ended.status
    except (Stopped, Ended) as ended:
        return _end(ended, ended.status)
    except BrokenPipeError:
        # Whoever read the output has enough of it; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        line = _fixable(error)
        if line is not None:
            return _end(line, USAGE_ERROR)
        traceback.print_exc()
        return _end(
            "this is a fault in Twig, not in what you wrote; please report it with the lines above", FAULT
        )


def _refuse_several(words: Sequence[str]) -> None:
    command = next((word for word in words if not word.startswith("-")), "train")
    if command != "train" and launched() is not None:
        raise UserError(f"twig {command}: runs as one process; write it without accelerate or torchrun")


def _end(words: object, status: int) -> int:
    sys.stderr.write(f"twig: {one_line(hidden(str(words)))}\n")
    return status


def _fixable(error: Exception) -> str | None:
    """The line for a fault that a person can fix, or None."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, _UsageError):
        return _usage(error)
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}; free the space, or choose a place that can be read and written"
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "the GPU's memory is full; write a smaller rollout.wave_size, train.pack_size or train.head_chunk"
        )
    return None


def _usage(error: Any) -> str:
    message = error.format_message().strip().rstrip(".")
    help_for = error.ctx.command_path if error.ctx is not None else "twig"
    wrong = getattr(error, "option_name", None)
    if wrong and "." in wrong:
        return f"{message}; settings have no dashes: write {wrong.lstrip('-')}=VALUE"
    return f"{message}; see {help_for} --help"
