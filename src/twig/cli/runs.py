"""Defines the command `twig runs`: a line for each run of a folder."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.text import Text

from twig.cli.completion import complete_folder
from twig.cli.console import result_console
from twig.cli.display import clean
from twig.common.text import one_line
from twig.report.figures import clock
from twig.runs.folder import RUNS
from twig.runs.listing import Listed, list_runs

_HEADS: tuple[str, ...] = ("run", "task", "algorithm", "state", "step", "accuracy", "time")
_RIGHT = ("step", "accuracy", "time")
_GAP = "  "
_LONGEST_NAME = 32  # in a terminal


def runs_command(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="The folder that the runs are in.", autocompletion=complete_folder
        ),
    ] = RUNS,
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """List runs, newest first: their state, step, accuracy before and after, and time."""
    runs = [] if folder == RUNS and not folder.exists() else list_runs(folder)
    if as_json:
        sys.stdout.write(json.dumps([_plain(run) for run in runs], indent=1) + "\n")
        return
    console = result_console()
    longest = _LONGEST_NAME if console.is_terminal else 2000
    lines = _lines(runs, console.width if console.is_terminal else None, longest)
    for line in lines or [f"no runs in {clean(folder)}; twig train quickstart makes one"]:
        console.print(Text(line), soft_wrap=True)


def _plain(run: Listed) -> dict[str, Any]:
    changed = datetime.fromtimestamp(run.changed, UTC).isoformat(timespec="seconds")
    return asdict(run) | {"folder": str(run.folder), "changed": changed}


def _lines(runs: Sequence[Listed], width: int | None, longest_name: int) -> list[str]:
    """Returns a table of runs; two lines for each run if the table is wider than `width`."""
    cells = [dict(zip(_HEADS, _cells(run, longest_name), strict=True)) for run in runs]
    widths = {head: max([cell_len(head), *(cell_len(row[head]) for row in cells)]) for head in _HEADS}
    if not runs:
        return []
    lines = []
    if width is None or sum(widths.values()) + len(_GAP) * (len(_HEADS) - 1) <= width:
        lines += [_row({head: head for head in _HEADS}, widths, _HEADS)]
        for run, row in zip(runs, cells, strict=True):
            lines += [_row(row, widths, _HEADS), *_why(run)]
        return lines
    for run, row in zip(runs, cells, strict=True):
        lines.append(f"{row['run']}{_GAP}{row['algorithm']} on {row['task']}")
        lines += [_GAP + _row(row, widths, ("state", *_RIGHT)), *_why(run)]
    return lines


def _row(row: dict[str, str], widths: dict[str, int], heads: Sequence[str]) -> str:
    parts = []
    for head in heads:
        space = " " * (widths[head] - cell_len(row[head]))
        parts.append(space + row[head] if head in _RIGHT else row[head] + space)
    return _GAP.join(parts).rstrip()


def _why(run: Listed) -> list[str]:
    return [] if run.reason is None else [f"{_GAP}{one_line(run.reason)}"]


def _cells(run: Listed, longest_name: int) -> list[str]:
    named = [one_line(text or "-", longest_name) for text in (run.name, run.task, run.algorithm)]
    step = f"{run.step}/{run.steps}" if run.steps else f"{run.step}"
    time = "-" if run.seconds is None else clock(run.seconds)
    return [*named, run.state, step, _accuracy(run), time]


def _accuracy(run: Listed) -> str:
    if run.accuracy_before is None and run.accuracy_after is None:
        return "-"
    values = (run.accuracy_before, run.accuracy_after)
    if run.graded:
        before, after = ("-" if value is None else f"{value:.3f}" for value in values)
        return f"reward {before} -> {after}"
    before, after = ("-" if value is None else f"{100 * value:.1f}" for value in values)
    return f"{before} -> {after} %"
