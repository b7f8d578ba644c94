"""Shows the results of commands.

Results go to stdout. Text from outside (names, paths, completions) is always shown
through `clean` or `one_line`, so it can neither style nor control the terminal. Knows the names of metrics
and the fields of summary.json, nothing about training.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from twig.common.text import one_line, percent, printable, shortened
from twig.report.diagnosis import Finding
from twig.report.figures import accuracy_rows, change_between
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


def accuracy_table(rows: dict[str, dict[str, Any] | None]) -> Table:
    """Returns a table of evaluations by name; one that was not done has dashes."""
    titles, *lines = accuracy_rows(rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left")
    for name, *texts in lines:
        table.add_row(Text(name), *texts)
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
        console.print(f"\nchange   {change_between(before, after)}")
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
