"""Draws the reward of runs step by step, and prints their accuracy before and after as a Markdown table.

    python scripts/learning_curve.py RUN [RUN ...] --output docs/images/learning-curve.svg

Reads `metrics.jsonl`, `config.yaml` and, if the run has finished, `summary.json`. The thin line is the reward
of each step, the thick one the mean of the last `--smooth` steps. Needs matplotlib, from the extra `dev`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from twig.common.errors import UserError
from twig.config.load import load
from twig.runs.reader import is_run, read_metrics, read_summary

# Distinct for most kinds of colour blindness, and dark enough on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9")
HEADER = (
    "| run | before | after | tokens sampled | with credit | training | peak memory |\n"
    "|---|---|---|---|---|---|---|"
)


def main(argv: list[str] | None = None) -> int:
    """Draws and prints; the exit status is 2 if a folder cannot be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="the picture (.svg or .png)"
    )
    parser.add_argument(
        "--smooth", type=int, default=10, metavar="N", help="steps in the thick line's mean (10)"
    )
    options = parser.parse_args(argv)
    try:
        curves = {label: curve(folder) for label, folder in labels(options.runs).items()}
    except UserError as error:
        print(f"learning_curve: {error}", file=sys.stderr)
        return 2
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(curves, options.smooth, options.output)
    rows = [table_row(label, read_summary(folder)) for label, folder in labels(options.runs).items()]
    print("\n".join([HEADER, *rows]))
    return 0


def labels(folders: list[Path]) -> dict[str, Path]:
    """Returns the folders by label: the algorithm, with the folder if several runs have the same one."""
    for folder in folders:
        if not is_run(folder) or not (folder / "metrics.jsonl").is_file():
            raise UserError(
                str(folder), "not a run with metrics", "Pass a run folder such as runs/quickstart"
            )
    names = [load(str(folder)).algorithm.name for folder in folders]
    return {
        name if names.count(name) == 1 else f"{name} ({folder.as_posix()})": folder
        for name, folder in zip(names, folders, strict=True)
    }


def curve(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps of a run and their mean rewards, without rows that have none (evaluations)."""
    rows = [row for row in read_metrics(folder) if row.get("reward") is not None]
    if not rows:
        raise UserError(str(folder), "metrics.jsonl has no reward", "Train the run for a step first")
    return np.array([row["step"] for row in rows]), np.array([row["reward"] for row in rows], float)


def trailing_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Returns the mean of each value and up to `width` - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - width, 0)
    return (sums[stop] - sums[start]) / (stop - start)


def draw(curves: dict[str, tuple[np.ndarray, np.ndarray]], smooth: int, path: Path) -> None:
    """Writes the picture, dark on white. The same numbers give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 11, "svg.hashsalt": "twig", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 4), facecolor="white", layout="constrained")
        axes = figure.add_subplot(facecolor="white")
        for i, (label, (steps, rewards)) in enumerate(curves.items()):
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(steps, rewards, color=colour, alpha=0.3, linewidth=0.8)
            axes.plot(steps, trailing_mean(rewards, max(smooth, 1)), color=colour, linewidth=2, label=label)
        axes.set(xlabel="step", ylabel="mean reward of the step")
        axes.set_xlim(left=0)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="best", frameon=False)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def table_row(label: str, summary: dict | None) -> str:
    """Returns a run's row of the table, with a dash for what was not measured."""
    summary = summary or {}
    sampled, seconds, peak = (summary.get(key) for key in ("tokens_sampled", "seconds", "peak_memory_bytes"))
    cells = [
        label,
        accuracy(summary.get("accuracy_before")),
        accuracy(summary.get("accuracy_after")),
        f"{sampled:,}" if sampled else "-",
        f"{100 * summary['tokens_selected'] / sampled:.1f} %" if sampled else "-",
        f"{seconds:.0f} s" if seconds else "-",
        f"{peak / 2**30:.2f} GiB" if peak else "-",
    ]
    return "| " + " | ".join(cells) + " |"


def accuracy(measured: dict | None) -> str:
    """Returns an accuracy in percent with its 95 % interval and the number of problems."""
    if measured is None:
        return "-"
    value, low, high = (100 * measured[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f} to {high:.1f}, n = {measured['n']})"


if __name__ == "__main__":
    sys.exit(main())
