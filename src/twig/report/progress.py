"""Shows a run's progress while it runs: live, as plain lines, or in a notebook.

Everything goes to stderr or into the notebook's cell. Text from outside is always shown through `one_line`,
so it can neither style nor control the terminal. Knows the names of metrics, nothing about training.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from twig.common.progress import Progress
from twig.common.text import one_line
from twig.report.figures import Figures, accuracy_words, figure_of
from twig.report.notebook import NotebookProgress, in_notebook
from twig.runs.reader import any_graded

_SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def showing(kind: str, console: Console | None = None) -> Iterator[Progress]:
    """Opens the display for `log.progress`: live, plain, quiet, or auto (live if it can be redrawn).

    A live display is that of the notebook in one, else that of `console`.
    """
    if console is None and kind in ("auto", "live") and in_notebook():
        notebook = NotebookProgress()
        try:
            yield notebook
        finally:
            notebook.close()
        return
    console = console or Console(stderr=True, highlight=False)
    if kind == "quiet":
        yield QuietProgress(console)
    elif kind == "plain" or kind == "auto" and (not console.is_terminal or console.is_dumb_terminal):
        yield PlainProgress(console)
    else:
        progress = LiveProgress(console)
        try:
            yield progress
        finally:
            progress.close()


class QuietProgress(Progress):
    """Shows only notices."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def notice(self, text: str) -> None:
        _print_line(self.console, text)


class PlainProgress(Progress):
    """Shows lines without colour: the first and last step, and one every few seconds between."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.figures = Figures()
        self.last_line = float("-inf")

    def phase(self, name: str, total: int | None = None) -> None:
        """Prints a line for a long phase; the phases of every step get none."""
        if name not in ("sampling", "updating"):
            self._line(f"{name} ..." if total is None else f"{name} {total} problems ...")

    def resumed(self, totals: Mapping[str, Any]) -> None:
        self.figures.resume(totals)

    def step(self, step: int, total: int, metrics: dict[str, Any]) -> None:
        self.figures.add(metrics)
        now = time.monotonic()
        if step in (1, total) or now - self.last_line >= _SECONDS_BETWEEN_LINES:
            self.last_line = now
            figures = self.figures
            parts = [f"step {step}/{total}", *figures.rewards(metrics), *figures.tokens()]
            parts.append(figures.left(step, total))
            self._line(", ".join(part for part in parts if part))

    def evaluation(self, when: str, result: dict[str, Any]) -> None:
        self._line(f"{when}: {accuracy_words(result)}")

    def message(self, text: str) -> None:
        self._line(text)

    def notice(self, text: str) -> None:
        self._line(text)

    def _line(self, text: str) -> None:
        _print_line(self.console, text)


class LiveProgress(Progress):
    """Shows two bars (the steps, and the present phase) and lines of figures, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.figures = Figures()
        self.line = Text("")
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(30),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self.bars = Bars(*columns, console=console)
        self.steps: TaskID | None = None
        self.work = self.bars.add_task("", total=None, note="")
        self.live = Live(Group(self.bars, self.line), console=console, refresh_per_second=5, transient=True)

    def phase(self, name: str, total: int | None = None) -> None:
        self.live.start()
        note = f"{total} problems" if name == "evaluating" and total else ""
        self.bars.reset(self.work, total=total, description=f"{one_line(name):<11}", note=note)

    def advance(self, count: int = 1) -> None:
        self.bars.advance(self.work, count)

    def resumed(self, totals: Mapping[str, Any]) -> None:
        self.figures.resume(totals)

    def step(self, step: int, total: int, metrics: dict[str, Any]) -> None:
        self.figures.add(metrics)
        if self.steps is None:
            self.steps = self.bars.add_task(f"{'training':<11}", total=total, note="")
        note = f"step {step}/{total}  {self.figures.left(step, total)}"
        self.bars.update(self.steps, completed=step, total=total, note=note)
        parts = [*self.figures.rewards(metrics), self.figures.evaluation]
        lines = [", ".join(part for part in parts if part), ", ".join(self.figures.tokens())]
        self.line.plain = "\n".join(lines)

    def evaluation(self, when: str, result: dict[str, Any]) -> None:
        self.figures.evaluation = f"last evaluation {figure_of(result, any_graded([result]))}"
        self.message(f"{when}: {accuracy_words(result)}")

    def message(self, text: str) -> None:
        self.console.print(Text(one_line(text)), soft_wrap=True)

    def notice(self, text: str) -> None:
        self.message(text)

    def done(self, summary: dict[str, Any]) -> None:
        self.close()

    def close(self) -> None:
        """Removes the display from the screen; may be called twice."""
        self.live.stop()


def _print_line(console: Console, text: str) -> None:
    console.print(Text(one_line(text)), soft_wrap=True)
