"""The command `twig train`: one run, alone or as one of several processes."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from twig.cli.completion import complete_source
from twig.cli.console import Overrides, Silent, Stopped, quiet_libraries, result_console
from twig.cli.display import clean, quoted, show_answers, show_findings, show_run
from twig.cli.models import saying_what_was_passed
from twig.cli.plan import plan_as_comment
from twig.common.errors import UserError
from twig.common.text import file_name
from twig.common.user_code import ProcessState
from twig.config.load import Settings, load
from twig.config.sizes import as_begun
from twig.report.diagnosis import findings
from twig.report.history import read_run
from twig.report.page import report_if_missing
from twig.report.progress import showing
from twig.runs.contents import config_damage, load_to_resume
from twig.runs.folder import RunLog, new_folder, newest_folder
from twig.runs.reader import ADAPTER, BEST, answers_of, damage, is_finished, is_run, read_summary
from twig.runtime.failures import Ended, exit_status
from twig.runtime.processes import ALONE, Processes, launched, together


def train_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_FILE",
            help="A recipe, a YAML file or a run folder.",
            autocompletion=complete_source,
        ),
    ],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run folder. Without it: runs/RECIPE-N.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in the folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the settings and the memory plan, and stop.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="With --dry-run: also train for some seconds, to say how long.")
    ] = False,
) -> None:
    """Train a model, and show its accuracy before and after."""
    if measure and not dry_run:
        raise UserError("--measure", "nothing is planned", "Add --dry-run, or use twig plan --measure")
    if launched() is not None:
        _train_together(source, overrides or (), output, resume, dry_run)
        return
    settings = (load_to_resume if resume else load)(_recipe(source), overrides or ())
    if dry_run:
        sys.stdout.write(f"{settings.to_yaml()}\n{plan_as_comment(settings, measure)}")
        return
    folder = _folder(source, output, resume)
    if not resume and is_run(Path(source)):
        again = f"to resume that one: twig train {quoted(Path(source))} --resume"
        sys.stderr.write(f"note: a new run, {clean(folder)}, with the settings of {clean(source)}; {again}\n")
    summary = _summary_if_done(folder, settings) if resume else None
    if summary is not None:
        _complete(folder, summary)
        _show(folder, summary)
        return
    with _stoppable(folder), saying_what_was_passed(folder):
        summary = _train(settings, folder, resume)
    _show(folder, summary)
    if summary["status"] == "stopped":
        raise Stopped(*_how_to_resume(folder))


def _show(folder: Path, summary: dict[str, Any]) -> None:
    show_run(result_console(), folder, summary)
    show_answers(result_console(), answers_of(summary) or [])
    show_findings(result_console(), findings(read_run(folder).history))


def _train_together(
    source: str, overrides: Sequence[str], output: Path | None, resume: bool, dry_run: bool
) -> None:
    """Trains as one of several processes; the first alone reads settings, opens the folder and prints."""
    settings, folder, processes = None, Path(), ALONE
    try:
        with together() as processes:
            if processes.main:
                settings = (load_to_resume if resume else load)(_recipe(source), overrides)
                if dry_run:
                    sys.stdout.write(f"{settings.to_yaml()}\n{plan_as_comment(settings)}")
                else:
                    folder = _folder(source, output, resume)
            if dry_run:
                return
            with _stoppable(folder):
                summary = _train(settings, folder, resume, processes)
        if processes.main:
            _show(folder, summary)
        if summary["status"] == "stopped":
            raise Stopped(*_how_to_resume(folder))
    except (UserError, Ended, KeyboardInterrupt, Stopped) as error:
        if not processes.reported:
            raise
        raise Silent(exit_status(error)) from error


def _train(
    settings: Settings | None, folder: Path, resume: bool, processes: Processes = ALONE
) -> dict[str, Any]:
    if settings is None:
        from twig.training.train import train as run

        quiet_libraries()
        return run({}, processes=processes).summary
    # The folder is created or refused before the slow imports; a run that fails before its start leaves none.
    log = RunLog.open(folder) if resume else RunLog.create(folder, settings)
    log.close()  # the run opens it again
    state = ProcessState.now()
    try:
        from twig.training.train import train as run

        quiet_libraries()
        with showing(settings.log.progress) as progress:
            return run(settings, output=folder, resume=resume, progress=progress, processes=processes).summary
    except BaseException:
        if not resume:
            log.discard()
        raise
    finally:
        state.restore()  # the working folder: paths here are as they were written


def _recipe(source: str) -> str:
    if "=" in source and not Path(source).exists():
        raise UserError(source, "a setting in place of the recipe", f"Run twig train quickstart {source}")
    return source


def _run_name(source: str) -> str:
    path = Path(source)
    return file_name(path.stem if path.suffix in (".yaml", ".yml") else path.resolve().name)


def _folder(source: str, output: Path | None, resume: bool) -> Path:
    return _folder_to_resume(source, output) if resume else output or new_folder(_run_name(source))


def _folder_to_resume(source: str, output: Path | None) -> Path:
    folder = output or (Path(source) if is_run(Path(source)) else newest_folder(_run_name(source)))
    if folder is None:
        problem = f"there is no run runs/{_run_name(source)}-N"
        raise UserError("--resume", problem, "Add --output DIR, or leave --resume out to start")
    return folder


def _summary_if_done(folder: Path, settings: Settings) -> dict[str, Any] | None:
    """Returns the summary of a run that is finished with these settings, else None."""
    log = RunLog.open(folder)
    try:
        as_it_began = as_begun(settings, log.settings)  # with the sizes that the run chose
        done = log.settings == as_it_began and is_finished(log.summary())
        if done and config_damage(folder) is not None:
            log.save_settings(
                log.settings
            )  # those of the newest checkpoint; a run that goes on writes them too
        return read_summary(folder) if done else None
    finally:
        log.close()


def _complete(folder: Path, summary: dict[str, Any]) -> None:
    """Says what the folder of a finished run has lost, and writes the report if that is missing."""
    adapters = [ADAPTER, BEST] if summary.get("accuracy_best") else [ADAPTER]
    with showing("plain") as progress:
        for text in damage(folder, summary["steps"], adapters):
            progress.message(f"warning: {text}")
        report_if_missing(folder, progress.message)


def _how_to_resume(folder: Path) -> tuple[str, str]:
    return "stopped and saved; to resume:", f"twig train {quoted(folder)} --resume"


@contextmanager
def _stoppable(folder: Path) -> Iterator[None]:
    """Treats SIGTERM as Ctrl-C inside; either prints how to resume."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        text = _how_to_resume(folder) if is_run(folder) else ("stopped before the first step",)
        raise Stopped(*text) from None
    finally:
        signal.signal(signal.SIGTERM, before)
