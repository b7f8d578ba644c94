"""Makes the tables of a study: results by variant and between variants, as JSON and as Markdown.

Everything is computed from the run folders, so the tables can be made again at any time. Needs no torch.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from twig.common.errors import UserError
from twig.common.text import percent
from twig.evaluation.statistics import bootstrap_gap, bootstrap_runs, mcnemar, permutation
from twig.runs.reader import ENVIRONMENT, is_graded_run, read_evaluations, read_metrics, read_summary

SCHEMA_VERSION = 1
_FEWEST = 3  # evaluations of a curve: before training, after it, and one between
_RESAMPLES = 2000
_LEAST_P = 0.1  # a table says so if runs exchanged cannot give a smaller p
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the budget, at which accuracy is shown
_MOST_PAIRS = 7  # variants of which all pairs are compared; of more, only those with the first

_ABOUT_SPEED = (
    "*Area*: the mean {measure} over the tokens of the budget, with straight lines between evaluations. "
    "*Tokens to {target}*: after how many this {measure} was first reached on these lines; the median over "
    "the seeds, an interval by resampling seeds, and how many of the seeds reached it."
)


@dataclass(frozen=True)
class Point:
    """An evaluation of a run.

    How `right` each answer was, float [problems], and the tokens sampled and seconds trained before it.
    """

    right: np.ndarray
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """One finished run, read from its folder.

    How right an answer is, is 0 or 1, or in a comparison of `graded` runs its reward (0 without one).
    """

    variant: str
    seed: int
    folder: Path
    graded: bool = False

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json."""
        return read_summary(self.folder) or {}

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl that are steps, not evaluations."""
        return [row for row in read_metrics(self.folder) if "tokens/sampled" in row]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of evaluations.jsonl; raises UserError if there is none."""
        rows = read_evaluations(self.folder)
        if not rows:
            fix = "Evaluate after training (eval.limit)"
            raise UserError(str(self.folder), "it has no evaluation to compare", fix)
        return rows

    @property
    def right(self) -> np.ndarray:
        """How right each answer was in the end, float [problems]."""
        return self._right(self.evaluations[-1])

    def at(self, tokens: float) -> Point | None:
        """Returns the last evaluation after at most `tokens` sampled tokens, None if there was none yet."""
        sampled = np.cumsum([0, *(row["tokens/sampled"] for row in self.steps)])
        seconds = np.cumsum([0, *(row["time/step"] for row in self.steps)])
        usable = [row for row in self.evaluations if sampled[row["step"]] <= tokens]
        if not usable:
            return None
        row = usable[-1]
        return Point(self._right(row), int(sampled[row["step"]]), float(seconds[row["step"]]))

    def curve(self, max_tokens: int) -> "Curve | None":
        """Returns the run's evaluations up to `max_tokens`; None without one before and one while training.

        The value at `max_tokens` lies on the line between the evaluations beside it; a run that ended earlier
        keeps its last one.
        """
        rows = self.evaluations
        if len(rows) < _FEWEST or rows[0]["step"] > 0:
            return None
        sampled = np.cumsum([0, *(row["tokens/sampled"] for row in self.steps)])
        tokens = sampled[[row["step"] for row in rows]].astype(float)
        right = np.stack([self._right(row) for row in rows])
        inside = int(np.searchsorted(tokens, max_tokens))
        last = right[-1]
        if inside < len(tokens):
            part = (max_tokens - tokens[inside - 1]) / (tokens[inside] - tokens[inside - 1])
            last = right[inside - 1] + part * (right[inside] - right[inside - 1])
        return Curve(np.append(tokens[:inside], max_tokens), np.vstack([right[:inside], last]))

    def _right(self, row: dict[str, Any]) -> np.ndarray:
        if not self.graded:
            return np.array([float(digit) for digit in row["right"]])
        if row.get("rewards") is None:
            problem = "its evaluations do not have the reward of each answer, as those of an older Twig"
            raise UserError(str(self.folder), problem, "Train it again")
        return np.array([reward or 0.0 for reward in row["rewards"]])


@dataclass(frozen=True)
class Curve:
    """How right each answer is over the tokens sampled, with straight lines between evaluations.

    `tokens` [E] go from 0 to the budget; `right` is float [E, problems].
    """

    tokens: np.ndarray
    right: np.ndarray

    def area(self) -> np.ndarray:
        """Returns the mean over the budget of how right each problem is, float [problems]."""
        middle = (self.right[1:] + self.right[:-1]) / 2
        return (middle * np.diff(self.tokens)[:, None]).sum(0) / self.tokens[-1]

    def reached(self, accuracy: float) -> float:
        """Returns after how many tokens the accuracy was first reached; infinity if it never was."""
        values = self.right.mean(1)
        above = np.flatnonzero(values >= accuracy)
        if not len(above):
            return float("inf")
        i = int(above[0])
        if i == 0:
            return 0.0
        part = (accuracy - values[i - 1]) / (values[i] - values[i - 1])
        return float(self.tokens[i - 1] + part * (self.tokens[i] - self.tokens[i - 1]))


def compare_runs(results: Sequence[Result], max_tokens: int, target: float = 0.9) -> dict[str, Any]:
    """Returns everything the tables say, as comparison.json has it; runs of one variant share its name.

    `target` is the accuracy of which the tables say after how many tokens it was reached. If the rewards of
    any run are more than right or wrong (`graded`), all accuracies are mean rewards.

    Raises UserError if runs answered different problems.
    """
    problems = {row["problems"] for result in results for row in result.evaluations}
    if len(problems) > 1:
        raise UserError(
            "task",
            "runs that answered different problems cannot be compared",
            "Give all the same task and eval",
        )
    graded = any(is_graded_run(result.summary, read_metrics(result.folder)) for result in results)
    by_variant: dict[str, list[Result]] = {}
    for result in results:
        by_variant.setdefault(result.variant, []).append(replace(result, graded=graded))
    names = list(by_variant)
    pairs = itertools.combinations(names, 2)
    if len(names) > _MOST_PAIRS:
        pairs = ((names[0], name) for name in names[1:])
    commits = {_commit(result.folder) for result in results}
    return {
        "schema_version": SCHEMA_VERSION,
        "max_tokens": max_tokens,
        "target": target,
        "graded": graded,
        "problems": len(results[0].right) if results else 0,
        "commits": sorted(commit or "unknown" for commit in commits),
        "seconds": sum(result.summary["seconds"] for result in results),
        "variants": {name: _variant(runs, max_tokens, target) for name, runs in by_variant.items()},
        "pairs": [
            _pair(by_variant[first], by_variant[second], max_tokens, target) for first, second in pairs
        ],
    }


def _commit(folder: Path) -> str | None:
    try:
        return json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))["commit"]
    except (OSError, ValueError, KeyError):
        return None


def _variant(runs: list[Result], max_tokens: int, target: float) -> dict[str, Any]:
    summaries = [run.summary for run in runs]
    after = [summary["accuracy_after"] for summary in summaries]
    before = [summary["accuracy_before"] for summary in summaries if summary["accuracy_before"]]
    started = [row["reward"] or 0.0 if runs[0].graded else row["value"] for row in before]
    sampled, selected = _sum(summaries, "tokens_sampled"), _sum(summaries, "tokens_selected")
    flops = [summary["update_flops"] for summary in summaries]
    return {
        "seeds": [run.seed for run in runs],
        "accuracy": _figure([run.right for run in runs]),
        "by_seed": [float(run.right.mean()) for run in runs],
        **_speed(runs, max_tokens, target),
        "before": float(np.mean(started)) if started else None,
        "answers": None if after[0]["found"] is None else _answers(before, after),
        "mean_length": _mean(after, "mean_length"),
        "entropy": float(np.mean([_last(run.steps, "entropy") for run in runs])),
        "steps": _mean(summaries, "steps"),
        "tokens_sampled": sampled / len(runs),
        "share_trained": selected / sampled,
        "nodes_run": _mean(summaries, "nodes_run"),
        "update_flops": float(np.mean(flops)) if all(flops) else None,
        "seconds": _mean(summaries, "seconds"),
        "under_budget": [run.folder.name for run in runs if run.summary["tokens_sampled"] < max_tokens],
        "curve": [_point(runs, share, max_tokens) for share in _SHARES],
    }


def _speed(runs: list[Result], max_tokens: int, target: float) -> dict[str, Any]:
    """Returns the mean accuracy over the budget, and the tokens until `target`; None if a run has no curve.

    The tokens are the median over the runs, infinity where more than half of them never reached it.
    """
    curves = _curves(runs, max_tokens)
    if curves is None:
        return {"area": None, "tokens_to_target": None}
    reached = [curve.reached(target) for curve in curves]
    medians = _medians(reached, np.random.default_rng(0))
    low, high = np.quantile(medians, [0.025, 0.975], method="inverted_cdf")  # never between two: inf - inf
    return {
        "area": _figure([curve.area() for curve in curves]),
        "tokens_to_target": {
            "accuracy": target,
            "value": _finite(float(np.median(reached))),
            "low": _finite(float(low)),
            "high": _finite(float(high)),
            "by_seed": [_finite(tokens) for tokens in reached],
        },
    }


def _curves(runs: list[Result], max_tokens: int) -> list[Curve] | None:
    curves = [curve for run in runs if (curve := run.curve(max_tokens)) is not None]
    return curves if len(curves) == len(runs) else None


def _medians(values: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Returns the medians of resamples of the values."""
    return np.median(np.array(values)[rng.integers(len(values), size=(_RESAMPLES, len(values)))], axis=1)


def _finite(tokens: float) -> float | None:
    """Returns the number, None for infinity, which JSON does not have."""
    return tokens if np.isfinite(tokens) else None


def _answers(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, float | None]:
    """Returns how many completions had an answer, from the evaluations before and after training."""
    share = _mean(after, "found")
    return {
        "found": share,
        "right_when_found": _mean(after, "value") / share if share else None,
        "found_before": _mean(before, "found") if before else None,
    }


def _point(runs: list[Result], share: float, max_tokens: int) -> dict[str, Any]:
    # The last evaluation is that of the whole budget, which a run ends a little above.
    tokens = float("inf") if share == 1.0 else share * max_tokens
    points = [point for run in runs if (point := run.at(tokens)) is not None]
    if len(points) < len(runs):
        return {"share": share, "tokens": None, "seconds": None, "value": None, "low": None, "high": None}
    return {
        "share": share,
        "tokens": float(np.mean([point.tokens for point in points])),
        "seconds": float(np.mean([point.seconds for point in points])),
        **_figure([point.right for point in points]),
    }


def _figure(right: list[np.ndarray]) -> dict[str, float]:
    table = np.stack(right)
    low, high = bootstrap_runs(table)
    return {"value": float(table.mean()), "low": low, "high": high}


def _pair(ours: list[Result], theirs: list[Result], max_tokens: int, target: float) -> dict[str, Any]:
    """Compares two variants on the same problems: over runs and problems, and by McNemar's test per seed."""
    a, b = np.stack([run.right for run in ours]), np.stack([run.right for run in theirs])
    low, high = bootstrap_gap(a, b)
    of_seed = {run.seed: run for run in theirs}
    by_seed = {
        str(run.seed): mcnemar(run.right.astype(bool), of_seed[run.seed].right.astype(bool)).as_dict()
        for run in ours
        if run.seed in of_seed and not run.graded
    }
    return {
        "first": ours[0].variant,
        "second": theirs[0].variant,
        "difference": float(a.mean() - b.mean()),
        "low": low,
        "high": high,
        **_speed_pair(ours, theirs, max_tokens, target),
        "p_runs": permutation(a.mean(1).tolist(), b.mean(1).tolist()),
        "mcnemar": by_seed,
    }


def _speed_pair(ours: list[Result], theirs: list[Result], max_tokens: int, target: float) -> dict[str, Any]:
    """Returns the difference in area, and the ratio of the tokens until `target` if all runs reached it."""
    first, second = _curves(ours, max_tokens), _curves(theirs, max_tokens)
    if first is None or second is None:
        return {"area": None, "tokens_ratio": None}
    a, b = (np.stack([curve.area() for curve in curves]) for curves in (first, second))
    low, high = bootstrap_gap(a, b)
    area = {"difference": float(a.mean() - b.mean()), "low": low, "high": high}
    reached, other = ([curve.reached(target) for curve in curves] for curves in (first, second))
    if not np.isfinite([*reached, *other]).all() or min(other) == 0:
        return {"area": area, "tokens_ratio": None}
    rng = np.random.default_rng(0)
    low, high = np.quantile(_medians(reached, rng) / _medians(other, rng), [0.025, 0.975])
    ratio = {"value": float(np.median(reached) / np.median(other)), "low": float(low), "high": float(high)}
    return {"area": area, "tokens_ratio": ratio}


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def _sum(rows: Sequence[dict[str, Any]], key: str) -> float:
    return float(sum(row[key] for row in rows))


def _last(rows: Sequence[dict[str, Any]], key: str) -> float:
    """Returns the mean over the last tenth of the steps."""
    return float(np.mean([row[key] for row in rows[-max(len(rows) // 10, 1) :]]))


# ---- Markdown --------------------------------------------------------------------------------------------


def markdown(comparison: dict[str, Any], differences: bool = True, seeds: int = 0) -> str:
    """Returns what `compare_runs` returns as tables to read, with or without the one of `differences`.

    Of a variant with fewer than `seeds` seeds the table says how many of them are there.
    """
    graded = comparison["graded"]
    target = f"reward {comparison['target']:g}" if graded else f"{100 * comparison['target']:.0f} %"
    measure = "reward" if graded else "accuracy"
    lines = [
        f"Every run sampled {comparison['max_tokens']:,} tokens and answered the same "
        f"{comparison['problems']:,} problems greedily. An interval is 95 %, by resampling runs and "
        f"problems.{' Before and after are mean rewards.' if graded else ''}",
        "",
        f"| | seeds | before | after | area | tokens to {target} | answer found | "
        "right when found | tokens trained | update FLOPs | seconds | entropy at the end | answer, tokens |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    variants = comparison["variants"]
    lines += [
        _row(name, variant, comparison["max_tokens"], seeds, graded) for name, variant in variants.items()
    ]
    if any(variant["area"] for variant in variants.values()):
        lines += ["", _ABOUT_SPEED.format(target=target, measure=measure)]
    else:
        needed = "need evaluations before and while training: set eval.steps."
        lines += ["", f"Area and tokens to {target} {needed}"]
    curves = {name: [_point_text(p, graded) for p in variant["curve"]] for name, variant in variants.items()}
    if any(set(cells[:-1]) != {"-"} for cells in curves.values()):
        shares = [f"{100 * share:.0f} %" for share in _SHARES]
        lines += [
            "",
            f"{measure.capitalize()} after a share of the tokens (seconds of training until then):",
            "",
        ]
        lines += [f"| | {' | '.join(shares)} |", "|---|" + "---|" * len(shares)]
        lines += [f"| {_cell(name)} | {' | '.join(cells)} |" for name, cells in curves.items()]
    num_seeds = {name: len(variant["seeds"]) for name, variant in variants.items()}
    if differences and comparison["pairs"]:
        lines += ["", *_differences(comparison["pairs"], target, num_seeds, graded)]
    under = [run for variant in variants.values() for run in variant["under_budget"]]
    if under:
        lines += ["", f"Ended before the budget: {', '.join(under)}."]
    return "\n".join(lines) + "\n"


def _differences(
    pairs: list[dict[str, Any]], target: str, num_seeds: dict[str, int], graded: bool
) -> list[str]:
    return [
        f"Differences, in {'reward' if graded else 'points'}: first minus second.",
        "",
        f"| first | second | difference | in area | tokens to {target}, ratio | "
        "p, runs exchanged | McNemar p below 0.05 |",
        "|---|---|---|---|---|---|---|",
        *(_pair_row(pair, graded) for pair in pairs),
        "",
        "*Ratio*: of the medians, first divided by second, if all runs reached it. "
        "*p, runs exchanged*: the share of all ways to deal the runs to the two variants that give so large "
        "a difference. *McNemar*: in how many seeds the exact test on the same problems has p below 0.05; it "
        "compares two trained models, not two algorithms.",
        *_too_few_seeds(pairs, num_seeds),
    ]


def _too_few_seeds(pairs: list[dict[str, Any]], num_seeds: dict[str, int]) -> list[str]:
    """Returns a line if the runs of a pair are so few that no difference gives them a small p."""
    counts = [(num_seeds[pair["first"]], num_seeds[pair["second"]]) for pair in pairs]
    least = max((2 if a == b else 1) / math.comb(a + b, a) for a, b in counts)
    if least <= _LEAST_P:
        return []
    return ["", f"So few seeds can give no p, runs exchanged, below {least:.3f}: it says nothing here."]


def _row(name: str, variant: dict[str, Any], max_tokens: int, seeds: int, graded: bool) -> str:
    answers, flops, before = variant["answers"], variant["update_flops"], variant["before"]
    area, tokens = variant["area"], variant["tokens_to_target"]
    cells = [
        _cell(name),
        seeds_text(len(variant["seeds"]), seeds),
        "-" if before is None else f"{before:.3f}" if graded else percent(before),
        figure_text(variant["accuracy"], graded),
        "-" if area is None else figure_text(area, graded),
        "-" if tokens is None else _tokens_text(tokens, max_tokens),
        "-" if answers is None else percent(answers["found"]),
        "-"
        if answers is None or answers["right_when_found"] is None
        else percent(answers["right_when_found"]),
        percent(variant["share_trained"]),
        "-" if flops is None else f"{flops:.3g}",
        f"{variant['seconds']:.1f}",
        f"{variant['entropy']:.3f}",
        f"{variant['mean_length']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _pair_row(pair: dict[str, Any], graded: bool) -> str:
    area, ratio = pair["area"], pair["tokens_ratio"]
    below = sum(each["p_value"] < 0.05 for each in pair["mcnemar"].values())
    cells = [
        _cell(pair["first"]),
        _cell(pair["second"]),
        gap_text(pair, graded),
        "-" if area is None else gap_text(area, graded),
        "-" if ratio is None else f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
        f"{pair['p_runs']:.3f}",
        f"{below} of {len(pair['mcnemar'])} seeds" if pair["mcnemar"] else "-",
    ]
    return f"| {' | '.join(cells)} |"


def seeds_text(there: int, planned: int) -> str:
    """Returns how many seeds a variant has, and of how many if some are missing.

    >>> seeds_text(3, 3), seeds_text(1, 3)
    ('3', '1 of 3')
    """
    return str(there) if there >= planned else f"{there} of {planned}"


def gap_text(gap: dict[str, Any], graded: bool = False) -> str:
    """Returns a difference in points, or in reward, with its interval."""
    parts = [gap[key] for key in ("difference", "low", "high")]
    value, low, high = (f"{part:+.3f}" if graded else f"{100 * part:+.1f}" for part in parts)
    return f"{value} ({low} to {high})"


def _point_text(point: dict[str, Any], graded: bool) -> str:
    """Returns a point of the curve; a dash if there was no evaluation yet, or none since the beginning."""
    if point["value"] is None or (point["share"] > 0 and point["tokens"] == 0):
        return "-"
    return f"{figure_text(point, graded)} ({point['seconds']:.0f} s)"


def figure_text(figure: dict[str, Any], graded: bool = False) -> str:
    """Returns a share in percent, or a mean reward, with its interval."""
    if graded:
        return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"
    return f"{percent(figure['value'])} ({100 * figure['low']:.1f} to {100 * figure['high']:.1f})"


def _tokens_text(figure: dict[str, Any], max_tokens: int) -> str:
    """Returns after how many tokens the target was reached, with its interval, and in how many runs."""

    def text(tokens: float | None) -> str:
        return f"more than {max_tokens:,}" if tokens is None else f"{float(f'{tokens:.3g}'):,.0f}"

    runs = figure["by_seed"]
    reached = sum(tokens is not None for tokens in runs)
    told = len(runs) > 1 and figure["low"] is not None
    interval = f" ({text(figure['low'])} to {text(figure['high'])})" if told else ""
    return f"{text(figure['value'])}{interval}, {reached} of {len(runs)}"


def _cell(name: str) -> str:
    return name.replace("|", "\\|").replace("\n", " ")
