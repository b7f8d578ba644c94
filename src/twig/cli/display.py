"""Shows training while it runs, as a live display or plain lines, and its result.

Progress goes to stderr, results to stdout. Text from outside (names, paths, completions) is always shown
through `clean` or `one_line`, so it can neither style nor control the terminal. Knows the names of metrics
and the fields of summary.json, nothing about training.
"""

import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from twig.common.progress import Progress
from twig.common.text import one_line, percent, printable, shortened
from twig.report.diagnosis import Finding
from twig.report.page import NAME
from twig.runs.reader import KINDS, missing_kinds

_LONGEST_TEXT = 20_000
_SECONDS_BETWEEN_LINES = 5.0
_SMOOTHING = 0.1
_FINDINGS = 3
_LONGEST_PROMPT, _LONGEST_ANSWER = 300, 600  # characters, of answers that are compared


def clean(value: Any) -> str:
    """Escapes everything that a terminal could act on, and cuts the middle out of a very long text.

    Line ends and tabs stay.
    """
    return printable(shortened(str(value), _LONGEST_TEXT))


@contextmanager
def showing(kind: str, console: Console | None = None) -> Iterator[Progress]:
    """Opens the display for `log.progress`: live, plain, quiet, or auto (live if `console` is a terminal)."""
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


class _Figures:
    """Figures of the last steps as texts, the same for both displays."""

    def __init__(self) -> None:
        self.sampled = self.selected = 0
        self.seconds: float | None = None
        self.tokens_per_second: float | None = None
        self.evaluation = ""

    def resume(self, totals: Mapping[str, Any]) -> None:
        """Takes over the tokens of a run that resumes."""
        self.sampled, self.selected = totals["tokens_sampled"], totals["tokens_selected"]

    def add(self, metrics: dict[str, Any]) -> None:
        """Adds the metrics of a step."""
        sampled, seconds = metrics.get("tokens/sampled", 0), metrics.get("time/step")
        self.sampled += sampled
        self.selected += metrics.get("tokens/selected", 0)
        if seconds:
            self.seconds = _smooth(self.seconds, seconds)
            self.tokens_per_second = _smooth(self.tokens_per_second, sampled / seconds)

    def rewards(self, metrics: dict[str, Any]) -> list[str]:
        """Returns the step's reward and share of right answers."""
        parts = [f"reward {metrics['reward']:.3f}"] if metrics.get("reward") is not None else []
        if metrics.get("answers/right") is not None:
            parts.append(f"right {percent(metrics['answers/right'])}")
        return parts

    def tokens(self) -> list[str]:
        """Returns the tokens sampled and trained, and the speed."""
        share = f" ({percent(self.selected / self.sampled)})" if self.sampled else ""
        parts = [f"{_count(self.sampled)} tokens sampled, {_count(self.selected)} trained{share}"]
        return parts + ([f"{_count(self.tokens_per_second)} tokens/s"] if self.tokens_per_second else [])

    def left(self, step: int, total: int) -> str:
        """Returns the training time that is left, from the speed of the last steps."""
        return "" if self.seconds is None else f"{clock(self.seconds * (total - step))} left"


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
        self.figures = _Figures()
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
        self.figures = _Figures()
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
        self.figures.evaluation = f"last evaluation {percent(result['value'])}"
        self.message(f"{when}: {accuracy_words(result)}")

    def message(self, text: str) -> None:
        self.console.print(Text(one_line(text)))

    def notice(self, text: str) -> None:
        self.message(text)

    def done(self, summary: dict[str, Any]) -> None:
        self.close()

    def close(self) -> None:
        """Removes the display from the screen; may be called twice."""
        self.live.stop()


def accuracy_words(result: dict[str, Any]) -> str:
    """Returns a line about an evaluation.

    >>> accuracy_words({"value": 0.5, "low": 0.404, "high": 0.596, "n": 100})
    '50.0 % right of 100 (95 % interval 40.4 to 59.6 %)'
    """
    interval = f"95 % interval {100 * result['low']:.1f} to {percent(result['high'])}"
    return f"{percent(result['value'])} right of {result['n']} ({interval})"


def accuracy_table(rows: dict[str, dict[str, Any] | None]) -> Table:
    """Returns a table of evaluations by name; one that was not done has dashes."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in ("right", "95 % interval", "problems"):
        table.add_column(name, justify="right")
    for name, result in rows.items():
        if result is None:
            table.add_row(Text(name), "-", "-", "-")
        else:
            interval = f"{100 * result['low']:.1f} to {percent(result['high'])}"
            table.add_row(Text(name), percent(result["value"]), interval, str(result["n"]))
    return table


def sampled_table(result: dict[str, Any]) -> Table:
    """Returns a table of the results of several sampled answers to each problem."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"{result['samples']} samples")
    table.add_column("right", justify="right")
    table.add_column("95 % interval", justify="right")
    rows = {"mean": result["mean"], **{f"pass@{k}": v for k, v in result["pass_at"].items()}}
    for name, figure in (rows | {"majority vote": result["vote"]}).items():
        if figure is not None:
            value, low, high = figure
            table.add_row(name, percent(value), f"{100 * low:.1f} to {percent(high)}")
    return table


def comparison_words(result: dict[str, Any]) -> str:
    """Returns a line about two evaluations of the same problems."""
    return (
        f"difference {100 * result['difference']:+.1f} points (95 % interval {100 * result['low']:+.1f} to "
        f"{100 * result['high']:+.1f}); only this one right: {result['only_first']}, only the other: "
        f"{result['only_second']}; McNemar's exact test p = {result['p_value']:.2g}"
    )


def show_run(console: Console, folder: Path, summary: dict[str, Any]) -> None:
    """Prints a run's result: accuracy before and after, tokens, time, the folder, and the next command."""
    before, after = summary.get("accuracy_before"), summary.get("accuracy_after")
    sampled, selected = summary["tokens_sampled"], summary["tokens_selected"]
    if before or after:
        console.print(accuracy_table({"before": before, "after": after}))
    else:
        console.print("accuracy not measured")
    if before and after:
        console.print(f"\nchange   {100 * (after['value'] - before['value']):+.1f} points")
    share = f" ({percent(selected / sampled)})" if sampled else ""
    facts = {
        "run": f"{summary['algorithm']} on {summary['task']}, {summary['steps']} steps, {summary['status']}",
        "tokens": f"{sampled:,} sampled, {selected:,} trained{share}",
        "seconds": f"{summary['seconds']:.1f} of training",
        "folder": str(folder),
    }
    if (folder / NAME).is_file():
        facts["report"] = str(folder / NAME)
    if summary.get("ended_by"):
        facts["run"] += f" by {summary['ended_by']}"
    for name, text in facts.items():
        console.print(Text(f"{name:<8} {one_line(text)}"), soft_wrap=True)
    if summary["status"] == "finished" and after:
        console.print(Text(f"next     twig eval {quoted(folder)} --limit 100"), soft_wrap=True)


def show_answers(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints problems with the answers before and after training, side by side (`reader.answers_of`)."""
    for row in rows:
        title = f"\n{KINDS[row['kind']]:<14} {one_line(row['prompt'], _LONGEST_PROMPT)}"
        console.print(Text(title), soft_wrap=True)
        if row["answer"] is not None:
            right = one_line(row["answer"], _LONGEST_PROMPT)
            console.print(Text(f"{'right answer':<14} {right}"), soft_wrap=True)
        table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
        texts = []
        for when in ("before", "after"):
            answer = row[when]
            table.add_column(f"{when}: {'right' if answer['right'] else 'wrong'}", ratio=1, overflow="fold")
            texts.append(Text(clean(shortened(answer["text"].strip(), _LONGEST_ANSWER))))
        table.add_row(*texts)
        console.print(table)
    for line in missing_kinds(rows) if rows else ():
        console.print(f"\n{line}")


def show_findings(console: Console, findings: Sequence[Finding]) -> None:
    """Prints what a run's numbers say is wrong: the first few findings, two lines each."""
    for finding in findings[:_FINDINGS]:
        kind = "problem" if finding.is_problem else "note"
        console.print(Text(f"\n{kind:<8} {one_line(finding.name)}: {one_line(finding.seen)}"), soft_wrap=True)
        console.print(Text(f"{'':<8} change {one_line(finding.change)}"), soft_wrap=True)
    if len(findings) > _FINDINGS:
        console.print(Text(f"\n{'':<8} and {len(findings) - _FINDINGS} more, in the report"), soft_wrap=True)


def quoted(path: Path) -> str:
    """Quotes a path for a command line."""
    return f'"{clean(path)}"' if os.name == "nt" else shlex.quote(clean(path))


def _print_line(console: Console, text: str) -> None:
    console.print(Text(one_line(text)), soft_wrap=True)


def _smooth(before: float | None, now: float) -> float:
    return now if before is None else (1 - _SMOOTHING) * before + _SMOOTHING * now


def _count(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """Returns a time as a clock shows it.

    >>> clock(100), clock(3725)
    ('1:40', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
