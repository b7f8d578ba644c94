"""Says where `train.stop_when` would have ended finished runs that were evaluated as they went.

    python scripts/early_end.py RUN [RUN ...] --patience 3
    python scripts/early_end.py study/runs/* --accuracy 0.9

A run that ends early is the beginning of the one that does not, so nothing has to be trained again. The last
row has means over the runs, with 95 % intervals by resampling runs.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twig.common.errors import UserError
from twig.common.text import percent
from twig.config.schema import StopWhen
from twig.evaluation.statistics import bootstrap
from twig.runs.reader import read_evaluations, read_metrics, read_summary
from twig.training.state import RunState


@dataclass(frozen=True)
class Ending:
    """Where a run ended and would have ended: the steps, the share of tokens saved, and accuracies."""

    name: str
    steps: int
    step: int
    saved: float
    there: float
    end: float
    best: float


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
    try:
        endings = [ending(run, when) for run in options.runs]
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print("| run | steps | ends after | tokens saved | accuracy there | at the end | best |")
    print("|---|---|---|---|---|---|---|")
    for each in endings:
        figures = " | ".join(map(percent, (each.saved, each.there, each.end, each.best)))
        print(f"| {each.name} | {each.steps} | {each.step} | {figures} |")
    saved = [100 * each.saved for each in endings]
    gain = [100 * (each.there - each.end) for each in endings]
    print(f"\ntokens saved: {mean(saved)} %; accuracy there less that at the end: {mean(gain)} points")
    return 0


def mean(values: list[float]) -> str:
    """Returns the mean with its interval."""
    low, high = bootstrap(np.array(values))
    return f"{np.mean(values):.1f} ({low:.1f} to {high:.1f})"


def ending(run: Path, when: StopWhen) -> Ending:
    """Returns where a run would have ended, and what that saves and costs."""
    summary, evaluations = read_summary(run), read_evaluations(run)
    if not summary or len(evaluations) < 2:
        raise UserError(str(run), "it has no evaluations before and after training", "Name finished runs")
    values = {each["step"]: np.mean([right == "1" for right in each["right"]]) for each in evaluations}
    there, last = first_end(values, when), max(values)
    rows = [each for each in read_metrics(run) if "tokens/sampled" in each]
    spent, every = (sum(each["tokens/sampled"] for each in rows if each["step"] <= n) for n in (there, last))
    best = max(value for step, value in values.items() if step)
    return Ending(run.name, last, there, 1 - spent / every, values[there], values[last], best)


def first_end(values: dict[int, Any], when: StopWhen) -> int:
    """Returns the step whose evaluation ends the run, which is the last one if none does before."""
    state = RunState()
    for step, value in values.items():
        state.evaluations.append({"step": step, "value": float(value), "n": 1})
        if state.ended_by(when) is not None:
            return step
    return max(values)


if __name__ == "__main__":
    sys.exit(main())
