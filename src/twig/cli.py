"""The command line: each command reads its words, makes one library call and shows the result.

What a person can fix is one line on stderr and exit status 2; a stopped run is 130, a fault of Twig 1. Torch
and transformers are imported by the commands that need them, when they run.
"""

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from twig import __version__
from twig.cli_compare import compare_command
from twig.cli_eval import eval_command
from twig.cli_export import export_command
from twig.cli_plan import plan_as_comment, plan_command
from twig.cli_report import report_command
from twig.cli_shared import Overrides, Stopped, quiet_libraries, result_console, show_row
from twig.config import Settings, load, recipe_names, recipe_text
from twig.diagnose import findings
from twig.display import clean, quoted, show_findings, show_run, showing
from twig.escape import file_name, one_line
from twig.lifeline import FAULT, STOPPED, USAGE_ERROR, Ended
from twig.machine import device_words, environment, gpu_warning, has_nvidia_gpu
from twig.memory import with_sizes
from twig.processes import ALONE, Processes, exit_status, launched, together
from twig.records import UserError
from twig.redact import hidden
from twig.runlog import RunLog, is_run, new_folder, newest_folder, read_summary
from twig.series import read_run
from twig.tasks import TASKS, load_task, render_prompt
from twig.wording import either

# Any model does where only the problems are asked for.
_ANY_MODEL = "tiny-arithmetic"
_UsageError = typer.BadParameter.__mro__[1]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train language models to reason with reinforcement learning, on small hardware.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _Silent(Exception):
    """The end of a process of several that leaves the words to the first one."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


# ---- train ----------------------------------------------------------------------------------------------


@app.command()
def train(
    source: Annotated[
        str, typer.Argument(metavar="RECIPE_OR_FILE", help="A recipe, a YAML file or a run folder.")
    ],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run folder. Without it: runs/RECIPE-N.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the settings and the plan of memory, and stop.")
    ] = False,
) -> None:
    """Train a model, and show its accuracy before and after."""
    if launched() is not None:
        _train_together(source, overrides or (), output, resume, dry_run)
        return
    settings = load(_recipe(source), overrides or ())
    if dry_run:
        sys.stdout.write(f"{settings.to_yaml()}\n{plan_as_comment(settings)}")
        return
    folder = _folder_to_resume(source, output) if resume else output
    if resume and _is_finished(folder, settings):
        _show(folder, read_summary(folder))
        return
    folder = folder or new_folder(_run_name(source))
    with _stoppable(folder):
        summary = _train(settings, folder, resume)
    _show(folder, summary)
    if summary["status"] == "stopped":
        raise Stopped(_how_to_go_on(folder))


def _show(folder: Path, summary: dict[str, Any]) -> None:
    show_run(result_console(), folder, summary)
    show_findings(result_console(), findings(read_run(folder).history))


def _train_together(
    source: str, overrides: Sequence[str], output: Path | None, resume: bool, dry_run: bool
) -> None:
    """The same as one of several processes. The first alone reads settings, opens the folder and speaks."""
    settings, folder, main = None, Path(), launched().rank == 0
    try:
        with together() as processes:
            if main:
                settings = load(_recipe(source), overrides)
                if dry_run:
                    sys.stdout.write(f"{settings.to_yaml()}\n{plan_as_comment(settings)}")
                else:
                    folder = _folder_to_resume(source, output) if resume else output
                    folder = folder or new_folder(_run_name(source))
            if dry_run:
                return
            with _stoppable(folder):
                summary = _train(settings, folder, resume, processes)
        if main:
            _show(folder, summary)
        if summary["status"] == "stopped":
            raise Stopped(_how_to_go_on(folder))
    except (UserError, Ended, KeyboardInterrupt, Stopped) as error:
        if main:
            raise
        raise _Silent(exit_status(error)) from error


def _train(
    settings: Settings | None, folder: Path, resume: bool, processes: Processes = ALONE
) -> dict[str, Any]:
    if settings is None:
        from twig.loop import train as run

        quiet_libraries()
        return run({}, processes=processes).summary
    # The folder is taken, or refused, before the slow imports; a run that fails before its start leaves none.
    log = RunLog.open(folder) if resume else RunLog.create(folder, settings)
    log.close()  # the run takes it itself
    try:
        from twig.loop import train as run

        quiet_libraries()
        with showing(settings.log.progress) as progress:
            return run(settings, output=folder, resume=resume, progress=progress, processes=processes).summary
    except BaseException:
        if not resume:
            log.discard()
        raise


def _recipe(source: str) -> str:
    if "=" in source and not Path(source).exists():
        raise UserError(f"{source}: a setting where the recipe belongs; write twig train quickstart {source}")
    return source


def _run_name(source: str) -> str:
    path = Path(source)
    return file_name(path.stem if path.suffix in (".yaml", ".yml") else path.resolve().name)


def _folder_to_resume(source: str, output: Path | None) -> Path:
    found = output or (Path(source) if is_run(Path(source)) else newest_folder(_run_name(source)))
    if found is None:
        name = _run_name(source)
        raise UserError(
            f"--resume: there is no run runs/{name}-N; write --output DIR, or leave --resume out to start"
        )
    return found


def _is_finished(folder: Path, settings: Settings) -> bool:
    log = RunLog.open(folder)
    log.close()
    as_it_began = with_sizes(settings, log.settings.flat())  # with the sizes that the run chose
    return log.settings == as_it_began and (log.summary() or {}).get("status") == "finished"


def _how_to_go_on(folder: Path) -> str:
    return f"stopped and saved; to go on: twig train {quoted(folder)} --resume"


@contextmanager
def _stoppable(folder: Path) -> Iterator[None]:
    """Inside, SIGTERM is as Ctrl-C, and either says how to go on."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(_how_to_go_on(folder) if is_run(folder) else "stopped before the first step") from None
    finally:
        signal.signal(signal.SIGTERM, before)


app.command("eval")(eval_command)
app.command("compare")(compare_command)
app.command("export")(export_command)
app.command("plan")(plan_command)
app.command("report")(report_command)


# ---- what there is --------------------------------------------------------------------------------------


@app.command()
def recipes() -> None:
    """List the recipes."""
    width = max(map(len, recipe_names()))
    for name in recipe_names():
        show_row(name.ljust(width), recipe_text(name).partition("\n")[0].lstrip("# "))


@app.command()
def tasks(
    action: Annotated[str | None, typer.Argument(metavar="show", help="Show one task.")] = None,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The task to show.")] = None,
    overrides: Overrides = None,
) -> None:
    """List the tasks; `show NAME`: a prompt as the model sees it, a right answer, and its score."""
    if action is None:
        for known, module in TASKS.items():
            show_row(known, (import_module(module).__doc__ or "").partition("\n")[0])
    elif action != "show" or name is None:
        raise UserError(
            f"tasks {action}: write twig tasks, or twig tasks show NAME with {either(list(TASKS))}"
        )
    else:
        _show_task(name, overrides or ())


def _show_task(name: str, overrides: Sequence[str]) -> None:
    values = {"model": {"name": _ANY_MODEL}, "task": {"name": name}}
    settings = Settings.from_dict(values, overrides)
    task = load_task(settings, notice=_notice)
    examples = task.eval or task.train
    if not examples:
        raise UserError(f"task {name}: there are no problems to show; write task.path= another file")
    tokenizer = None
    if settings.model.name != _ANY_MODEL:
        from twig.models import load_tokenizer

        quiet_libraries()
        tokenizer = load_tokenizer(settings.model)
    example = examples[0]
    console = result_console()
    console.print(
        Text(f"{len(task.train)} problems to train on, {len(task.eval)} to evaluate on. A prompt:\n"),
        soft_wrap=True,
    )
    console.print(Text(clean(render_prompt(task, example, tokenizer, settings.task))), soft_wrap=True)
    if task.score is None or "answer" not in example.columns:
        console.print(Text("\nThe task's reward functions say what is right."), soft_wrap=True)
        return
    # The form that the task reads: most read the line after ####, multiplication what follows the last #.
    forms = [f"#### {example.columns['answer']}", f"#{example.columns['answer']}"]
    gold = next((form for form in forms if task.score(form, example).right), forms[0])
    score = task.score(gold, example)
    words = f"answer {'found' if score.found else 'not found'}, {'right' if score.right else 'wrong'}"
    console.print(
        Text(f"\nA right answer ends with:\n\n{clean(gold)}\n\nIts score: {float(score.right):g} ({words})"),
        soft_wrap=True,
    )


@app.command()
def env() -> None:
    """Show versions, device and memory, and what to change about them."""
    import psutil
    import torch

    found = environment()
    memory = psutil.virtual_memory()
    device = device_words(torch)
    rows = {
        "twig": __version__,
        "python": found["python"],
        **{name: value or "not installed" for name, value in found["versions"].items() if name != "twig-rl"},
        "platform": found["platform"],
        "processors": found["cpu_count"],
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free",
        "device": device,
    }
    for name, value in rows.items():
        show_row(name, value)
    warning = gpu_warning(torch.version.cuda, torch.version.hip, torch.cuda.is_available(), has_nvidia_gpu())
    if warning:
        result_console().print(Text(f"\nwarning: {warning}"), soft_wrap=True)


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
    except _Silent as ended:
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


def _notice(text: str) -> None:
    sys.stderr.write(f"{one_line(text)}\n")


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
