"""The command line: its commands, and the exit status of each end.

A mistake that a person can fix is one line on stderr and exit status 2; a stopped run is 130, a fault of Twig
1. Torch and transformers are imported by the commands that need them, when they run.
"""

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from twig import __version__
from twig.cli.chat import chat_command
from twig.cli.compare import compare_command
from twig.cli.console import Silent, Stopped, unfailing_streams
from twig.cli.env import env_command
from twig.cli.eval import eval_command
from twig.cli.export import export_command
from twig.cli.plan import plan_command
from twig.cli.recipes import recipes_command
from twig.cli.report import report_command
from twig.cli.runs import runs_command
from twig.cli.schema import schema_command
from twig.cli.settings import settings_command
from twig.cli.show import show_command
from twig.cli.tasks import tasks_command
from twig.cli.train import train_command
from twig.common.errors import UserError
from twig.common.redact import hidden
from twig.common.text import one_line
from twig.config.trl_names import hint
from twig.runtime.failures import FAULT, STOPPED, USAGE_ERROR, Ended
from twig.runtime.processes import launched

_UsageError = typer.BadParameter.__mro__[1]
_RUNS = ("train", "compare")  # what they do is in a folder, and stdout only shows it

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train language models to reason with reinforcement learning, on small hardware.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.command("train")(train_command)
app.command("eval")(eval_command)
app.command("chat")(chat_command)
app.command("compare")(compare_command)
app.command("export")(export_command)
app.command("plan")(plan_command)
app.command("runs")(runs_command)
app.command("show")(show_command)
app.command("report")(report_command)
app.command("recipes")(recipes_command)
app.command("tasks")(tasks_command)
app.command("settings")(settings_command)
app.command("schema")(schema_command)
app.command("env")(env_command)


# ---- the exit status ------------------------------------------------------------------------------------


def _version(asked: bool) -> bool:
    if asked:
        sys.stdout.write(f"twig {__version__}\n")
        raise typer.Exit
    return asked


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status.

    0: done; 1: a fault of Twig; 2: one line says what to change; 130: stopped. A display or result that
    cannot be written changes nothing about a run; for any other command, a full disk is an error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with unfailing_streams() as output:
        status = _status(arguments)
        output.flush()
        trouble = output.trouble
        if status == 0 and trouble is not None and _command(arguments) not in _RUNS:
            return _end(f"stdout: {trouble.strerror or trouble}. Write the output elsewhere.", USAGE_ERROR)
        return status


def _status(arguments: Sequence[str]) -> int:
    try:
        _refuse_several(arguments)
        status = app(list(arguments) or ["--help"], prog_name="twig", standalone_mode=False)
        if status == STOPPED:  # some versions of typer turn Ctrl-C into this, and say nothing
            return _end("stopped", STOPPED)
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _end("stopped", STOPPED)
    except Silent as ended:
        return ended.status
    except Stopped as stopped:
        _end(stopped, STOPPED)
        if stopped.command:  # on a line of its own, which a terminal does not break in a word
            sys.stderr.write(f"  {one_line(hidden(stopped.command))}\n")
        return STOPPED
    except Ended as ended:
        return _end(ended, ended.status)
    except Exception as error:
        line = _fixable(error)
        if line is not None:
            return _end(line, USAGE_ERROR)
        traceback.print_exc()
        return _end("this is a fault in Twig. Please report it with the lines above.", FAULT)


def _command(arguments: Sequence[str]) -> str:
    return next((each for each in arguments if not each.startswith("-")), "")


def _refuse_several(arguments: Sequence[str]) -> None:
    command = _command(arguments)
    if command not in ("", "train") and launched() is not None:
        raise UserError(f"twig {command}", "it runs as one process", "Run it without accelerate or torchrun")


def _end(line: object, status: int) -> int:
    sys.stderr.write(f"twig: {one_line(hidden(str(line)))}\n")
    return status


def _fixable(error: Exception) -> str | None:
    """Returns the line for a mistake that a person can fix, None for any other error."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, _UsageError):
        return _usage(error)
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}. Free the space, or use a path that can be read and written."
    if type(error).__name__ == "OutOfMemoryError":
        return "out of GPU memory. Set a smaller rollout.wave_size, train.pack_size or train.head_chunk."
    return None


def _usage(error: Any) -> str:
    message = error.format_message().strip().rstrip(".")
    help_for = error.ctx.command_path if error.ctx is not None else "twig"
    option = getattr(error, "option_name", None)
    elsewhere = hint(option) if option else None
    if elsewhere is not None:
        return f"{message}. {elsewhere}."
    if option and "." in option:
        return f"{message}. Settings have no dashes: write {option.lstrip('-')}=VALUE."
    return f"{message}. See {help_for} --help."
