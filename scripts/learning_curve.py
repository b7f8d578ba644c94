"""Draws learning curves.

    python scripts/learning_curve.py RUN [RUN ...] --output docs/images/learning-curve.svg
    python scripts/learning_curve.py --study svamp --output docs/images/svamp.svg [--variants NAME ...]

Of runs it draws the reward step by step, the thin line, and its mean over the last `--smooth` steps, the
thick one, and prints accuracy before and after as a Markdown table. Of a study it draws, from docs/study/raw,
the accuracy of each variant over the sampled tokens: the mean over the seeds, and a band from the lowest to
the highest of them. Needs matplotlib, from the extra `dev`.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from twig.common.errors import UserError
from twig.config.load import load
from twig.runs.reader import is_run, read_metrics, read_summary

DOCS = Path(__file__).resolve().parent.parent / "docs"
PLACES = 201  # at which the curves of a study are averaged
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
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--study", metavar="NAME", help="the curves of this study, as it is in docs/study/raw"
    )
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="of the study's, these alone")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="where study/ is")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="the picture (.svg or .png)"
    )
    parser.add_argument(
        "--smooth", type=int, default=10, metavar="N", help="steps in the thick line's mean (10)"
    )
    options = parser.parse_args(argv)
    if bool(options.runs) == bool(options.study):
        parser.error("pass either runs or --study NAME")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        if options.study:
            draw_study(options.docs, options.study, options.variants, options.output)
            return 0
        folders = labels(options.runs)
        draw({label: curve(folder) for label, folder in folders.items()}, options.smooth, options.output)
    except UserError as error:
        print(f"learning_curve: {error}", file=sys.stderr)
        return 2
    rows = [table_row(label, read_summary(folder)) for label, folder in folders.items()]
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
    """Writes the picture of rewards."""
    with picture(path, "step", "mean reward of the step") as axes:
        for i, (label, (steps, rewards)) in enumerate(curves.items()):
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(steps, rewards, color=colour, alpha=0.3, linewidth=0.8)
            axes.plot(steps, trailing_mean(rewards, max(smooth, 1)), color=colour, linewidth=2, label=label)


def draw_study(docs: Path, name: str, variants: list[str] | None, path: Path) -> None:
    """Writes the picture of a study, or of some of its variants; raises UserError if nothing is kept."""
    from study import read_study

    kept = read_study(docs, name)
    if kept is None:
        raise UserError("--study", f"nothing is kept of {name}", f"Run scripts/study.py run --study {name}")
    there = list(dict.fromkeys(result.variant for result in kept.results))
    if unknown := [each for each in variants or [] if each not in there]:
        problem = f"nothing is kept of {unknown[0]!r}"
        raise UserError("--variants", problem, f"Name some of these: {', '.join(there)}")
    seeds: dict[str, list[np.ndarray]] = {name: [] for name in variants or there}
    places = np.linspace(0, kept.study.max_tokens, PLACES)
    for result in kept.results:
        if result.variant not in seeds:
            continue
        found = result.curve(kept.study.max_tokens)
        if found is None:
            raise UserError(str(result.folder), "it was not evaluated while training", "Set eval.steps")
        seeds[result.variant].append(np.interp(places, found.tokens, 100 * found.right.mean(1)))
    with picture(path, "sampled tokens, thousands", "accuracy, %") as axes:
        for i, (label, curves) in enumerate(seeds.items()):
            colour = COLOURS[i % len(COLOURS)]
            axes.fill_between(places / 1000, np.min(curves, 0), np.max(curves, 0), color=colour, alpha=0.12)
            axes.plot(places / 1000, np.mean(curves, 0), color=colour, linewidth=2, label=label)
        axes.set_ylim(bottom=0)


@contextmanager
def picture(path: Path, across: str, up: str) -> Iterator[Any]:
    """Gives axes, and writes them to a file, dark on white. The same numbers give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 11, "svg.hashsalt": "twig", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 4), facecolor="white", layout="constrained")
        axes = figure.add_subplot(facecolor="white")
        yield axes
        axes.set(xlabel=across, ylabel=up)
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
