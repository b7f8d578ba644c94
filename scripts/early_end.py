"""Says where `train.stop_when` would have ended finished runs that were evaluated as they went.

    python scripts/early_end.py RUN [RUN ...] --patience 3
    python scripts/early_end.py study/runs/* --accuracy 0.9

A run that ends early is the beginning of the one that does not, so nothing has to be trained again.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from twig.common.errors import UserError
from twig.common.text import percent
from twig.config.schema import StopWhen
from twig.runs.reader import read_metrics, read_summary
from twig.training.state import RunState


def main(argv: list[str] | None = None) -> int:
    """Prints a row for each run; the exit status is 2 if one cannot be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--patience", type=int, metavar="K", help="train.stop_when.patience")
    parser.add_argument("--accuracy", type=float, metavar="A", help="train.stop_when.accuracy")
    options = parser.parse_args(argv)
    when = StopWhen(patience=options.patience, accuracy=options.accuracy)
    print("| run | steps | ends after | tokens saved | accuracy there | at the end | best |")
    print("|---|---|---|---|---|---|---|")
    try:
        for run in options.runs:
            print(row(run, when))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def row(run: Path, when: StopWhen) -> str:
    """Returns a run's row: where it would have ended, and what that saves and costs."""
    summary = read_summary(run)
    if not summary or not summary.get("accuracy_before") or not summary.get("accuracy_after"):
        raise UserError(str(run), "it has no result before and after training", "Name finished runs")
    rows = read_metrics(run)
    end = first_end(summary, rows, when)
    spent = sum(each.get("tokens/sampled", 0) for each in rows if each["step"] <= end["step"])
    saved = 1 - spent / summary["tokens_sampled"]
    best = max(each["value"] for each in (summary["accuracy_best"], summary["accuracy_after"]))
    figures = [percent(value) for value in (saved, end["value"], summary["accuracy_after"]["value"], best)]
    return f"| {run.name} | {summary['steps']} | {end['step']} | {' | '.join(figures)} |"


def first_end(summary: dict[str, Any], rows: list[dict[str, Any]], when: StopWhen) -> dict[str, Any]:
    """Returns the evaluation that ends the run, which is the last one if none does before."""
    state, problems = RunState(), summary["accuracy_before"]["n"]
    state.evaluations = [{**summary["accuracy_before"], "step": 0}]
    during = [(each["step"], each["eval/accuracy"]) for each in rows if "eval/accuracy" in each]
    for step, value in [*during, (summary["steps"], summary["accuracy_after"]["value"])]:
        state.evaluations.append({"step": step, "value": value, "n": problems})
        if state.ended_by(when) is not None:
            break
    return state.evaluations[-1]


if __name__ == "__main__":
    sys.exit(main())
