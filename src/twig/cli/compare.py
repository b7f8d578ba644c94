"""Defines the command `twig compare`: runs a study and writes its tables and its report."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from twig.cli.console import Stopped, result_console
from twig.cli.display import clean, quoted
from twig.common.errors import UserError
from twig.common.text import one_line
from twig.report.page import write_report
from twig.runs.reader import is_finished, read_summary
from twig.study.plan import Planned, Study, load_study, runs_of
from twig.study.runner import Outcome, StudyProgress, folder_of, run_all
from twig.study.tables import Result, compare_runs, markdown

_SECONDS_BETWEEN_LINES = 30.0


def compare_command(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study's file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of the study, or settings of all its runs."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The study's folder. Without it: studies/STUDY.")
    ] = None,
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Runs at a time.")] = 1,
    tables_only: Annotated[
        bool, typer.Option("--tables", help="Run nothing: the tables of what has finished.")
    ] = False,
) -> None:
    """Run variants with several seeds on equal numbers of sampled tokens, and compare them."""
    plan = load_study(study, overrides)
    runs = runs_of(plan, study.parent)
    folder = output or Path("studies") / study.stem
    outcome = Outcome()
    if not tables_only:
        with _Lines(Console(stderr=True, highlight=False), plan.max_tokens, len(runs)) as watch:
            outcome = run_all(runs, folder, jobs, watch)
    console = result_console()
    text = _write(folder, runs, plan)
    if text is not None:
        console.print(Text(clean(text)), soft_wrap=True)
        console.print(Text(f"written to {clean(folder)}"), soft_wrap=True)
    if outcome.stopped:
        raise Stopped("stopped; what runs is saved; to resume:", f"twig compare {quoted(study)}")
    if outcome.failed:
        lines = [f"{name}: {reason}" for name, reason in outcome.failed.items()]
        for line in lines[1:]:
            console.print(Text(one_line(f"failed: {line}")), soft_wrap=True)
        raise UserError(str(study), f"{len(lines)} of {len(runs)} runs failed; the first: {lines[0]}")
    if text is None:
        raise UserError(str(folder), "no run has finished", "Leave out --tables")


def _write(folder: Path, runs: list[Planned], plan: Study) -> str | None:
    """Writes comparison.json, comparison.md and report.html of the finished runs; returns the Markdown."""
    results = [Result(run.variant, run.seed, folder_of(folder, run)) for run in runs]
    results = [result for result in results if is_finished(read_summary(result.folder))]
    if not results:
        return None
    comparison = compare_runs(results, plan.max_tokens, plan.target)
    text = markdown(comparison, seeds=len(plan.seeds))
    (folder / "comparison.json").write_text(json.dumps(comparison, indent=1) + "\n", encoding="utf-8")
    (folder / "comparison.md").write_text(text, encoding="utf-8")
    write_report([result.folder for result in results], folder / "report.html")
    return text


class _Lines(StudyProgress):
    """Prints progress as lines; between them, on a terminal, a line that is redrawn."""

    def __init__(self, console: Console, max_tokens: int, total: int) -> None:
        self.console, self.max_tokens, self.total = console, max_tokens, total
        self.status = console.status("") if console.is_terminal else None
        self.last, self.done = time.monotonic(), 0

    def __enter__(self) -> "_Lines":
        if self.status is not None:
            self.status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.status is not None:
            self.status.stop()

    def begun(self, name: str) -> None:
        self._line(f"{name}: begun")

    def ended(self, name: str, result: str) -> None:
        self._line(f"{name}: {result}")

    def going(self, tokens: dict[str, int], done: int) -> None:
        shares = [f"{name} {100 * n / self.max_tokens:.0f} %" for name, n in tokens.items()]
        line = one_line(", ".join([f"{done} of {self.total} runs done", *shares]))
        if self.status is not None:
            self.status.update(Text(line))
        elif time.monotonic() - self.last >= _SECONDS_BETWEEN_LINES:
            self._line(line)

    def _line(self, text: str) -> None:
        self.last = time.monotonic()
        self.console.print(Text(one_line(text)), soft_wrap=True)
