"""Computes what a report draws of runs: arms (runs that differ only by seed), curves of bounded length.

To draw another metric, add a row to `CHARTS`. Knows the names of metrics and settings; no torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from twig.config.load import Settings, affects
from twig.evaluation.statistics import wilson
from twig.report.history import RunData

_POINTS = 2000  # of a curve, at most: of longer runs a point is the mean of several steps
_NUMBERS = 250_000  # of all curves, about
_MOST_IN_LABEL = 2  # settings; with more, an arm has the name of its first run
# The runs of an arm may differ in these, and in settings that affect speed or display only.
_NOT_COMPARED = ("train.seed", "model.device")


@dataclass
class Arm:
    """Runs whose settings are equal except for the seed; `label` says how they differ from the other arms."""

    runs: list[RunData]
    label: str = ""

    @property
    def settings(self) -> Settings:
        return self.runs[0].settings


@dataclass(frozen=True)
class Chart:
    """A curve that a report shows.

    `unit` is share, tokens, bytes, seconds, nats or empty; a curve that is `noisy` is also drawn smoothed.
    """

    metric: str
    title: str
    unit: str
    says: str
    noisy: bool = True


CHARTS = (
    Chart("reward", "Reward", "", "mean over the step's completions"),
    Chart("answers/right", "Right answers in training", "share", "sampled completions that are right"),
    Chart(
        "eval/accuracy", "Accuracy", "share", "greedy answers to problems that are never trained on", False
    ),
    Chart("eval/reward", "Reward of evaluations", "", "mean over problems that are never trained on", False),
    Chart("entropy", "Entropy", "nats", "per token: how open the choice of a token was"),
    Chart("kl", "KL divergence from the base", "nats", "per token with credit"),
    Chart("completions/mean_length", "Length", "tokens", "mean tokens of a completion"),
    Chart("completions/clipped_ratio", "Cut off", "share", "completions that reached the length limit"),
    Chart("frac_reward_zero_std", "Groups without signal", "share", "all completions got the same reward"),
    Chart("tokens/sampled", "Tokens sampled", "tokens", "in a step"),
    Chart("tokens/selected", "Tokens trained", "tokens", "in a step: those with credit"),
    Chart("memory/peak_bytes", "Memory", "bytes", "most used so far; dashed: predicted", False),
    Chart("time/sample", "Time to sample", "seconds", "in a step"),
    Chart("time/update", "Time to update", "seconds", "in a step"),
    Chart("time/step", "Time, all phases", "seconds", "in a step"),
    Chart("grad_norm", "Gradient norm", "", "before clipping; 0: no step was taken"),
    Chart("learning_rate", "Learning rate", "", "of the step", False),
    Chart("sampling/logp_gap", "Sampling against update", "nats", "largest gap of a token's log-probability"),
)
PHASES = ("sample", "reward", "credit", "update")


# ---- arms -------------------------------------------------------------------------------------------------


def arms_of(runs: Sequence[RunData]) -> list[Arm]:
    """Returns the runs by arm, labelled, in the order in which they were given."""
    by_settings: dict[str, Arm] = {}
    for run in runs:
        compared = {key: value for key, value in run.settings.flat().items() if _is_compared(key)}
        by_settings.setdefault(repr(compared), Arm([])).runs.append(run)
    arms = list(by_settings.values())
    for arm in arms:
        arm.label = _label(arm, arms)
    return arms


def differing(arms: Sequence[Arm]) -> dict[str, list[Any]]:
    """Returns dotted key to its value in each arm, for the settings that differ between arms.

    A setting that an arm's algorithm does not have is None there.
    """
    flats = [arm.settings.flat() for arm in arms]
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    groups = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    table = {}
    for key in sorted(keys, key=lambda key: groups.index(key.partition(".")[0])):
        values = [flat.get(key) for flat in flats]
        if _is_compared(key) and len(set(map(repr, values))) > 1:
            table[key] = values
    return table


def _is_compared(key: str) -> bool:
    return key not in _NOT_COMPARED and affects(key) not in ("speed", "display")


def _label(arm: Arm, arms: list[Arm]) -> str:
    name = arm.settings.algorithm.name
    if len(arms) == 1:
        return name
    parts = [name] if len({each.settings.algorithm.name for each in arms}) > 1 else []
    alike = [each for each in arms if each.settings.algorithm.name == name]
    keys = list(differing(alike))
    if len(keys) > _MOST_IN_LABEL:
        parts.append(arm.runs[0].name)
    else:
        flat = arm.settings.flat()
        parts += [_label_part(key, flat.get(key)) for key in keys]
    return ", ".join(parts) or name


def _label_part(key: str, value: Any) -> str:
    text = _label_value(value)
    return text if key == "model.name" else f"{key.partition('.')[2]}={text}"


def _label_value(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = text.rstrip("/").rpartition("/")[2] or text  # of a path, what it names
    return text if len(text) <= 24 else text[:11] + "…" + text[-12:]


# ---- curves -----------------------------------------------------------------------------------------------


def arm_series(arm: Arm, num_arms: int = 1) -> dict[str, Any]:
    """Returns an arm's curves as plain values.

    `x` has, by axis (step, tokens, seconds), where each point lies; `series`, by metric, `mean`, `low` and
    `high` over the arm's runs. A point stands for `width` steps, the last of which it names: one, or if
    `num_arms` curves would be too long, several, and its value is their mean. `evals` has [step, tokens,
    seconds, mean, low, high] per evaluation: low and high are the 95 % interval of one run, or the lowest and
    highest of several.
    """
    length = max(1, *(run.history.last_step for run in arm.runs))
    points = min(_POINTS, max(40, _NUMBERS // (3 * len(CHARTS) * max(1, num_arms))))
    width = -(-length // points)
    edges = np.arange(0, length, width)
    xs = {"step": [np.arange(1.0, length + 1)]}
    for axis, metric in (("tokens", "tokens/sampled"), ("seconds", "time/step")):
        xs[axis] = [np.nancumsum(run.history.by_step(metric, run.history.last_step)) for run in arm.runs]
    series = {}
    for chart in CHARTS:
        rows = [_binned(run.history.by_step(chart.metric, length), edges) for run in arm.runs]
        table = np.array(rows)
        if not np.isnan(table).all():
            series[chart.metric] = {
                name: _numbers(_ignoring_nan(how, table))
                for name, how in (("mean", np.nanmean), ("low", np.nanmin), ("high", np.nanmax))
            }
    ends = np.minimum(edges + width, length) - 1
    return {
        "label": arm.label,
        "runs": len(arm.runs),
        "algorithm": arm.settings.algorithm.name,
        "width": width,
        "x": {axis: _numbers(_at(columns, ends), 6) for axis, columns in xs.items()},
        "series": series,
        "evals": _evals(arm),
        "evaluated": "eval/reward" if is_graded_arm(arm) else "eval/accuracy",
        "predicted": _predicted(arm),
        "phases": {name: _mean_time(arm, f"time/{name}") for name in PHASES},
        "time": _mean_time(arm, "time/step"),
    }


def is_graded_arm(arm: Arm) -> bool:
    """Tells whether an arm's results are mean rewards, as its rewards are more than right or wrong."""
    return any(run.graded for run in arm.runs)


def _binned(full: np.ndarray, edges: np.ndarray) -> np.ndarray:
    measured = ~np.isnan(full)
    number = np.add.reduceat(measured.astype(float), edges)
    total = np.add.reduceat(np.where(measured, full, 0.0), edges)
    return np.divide(total, number, out=np.full(len(edges), np.nan), where=number > 0)


def _ignoring_nan(reduce: Callable[..., np.ndarray], table: np.ndarray) -> np.ndarray:
    values = np.full(table.shape[1], np.nan)
    some = ~np.isnan(table).all(0)
    values[some] = reduce(table[:, some], 0)
    return values


def _at(columns: list[np.ndarray], ends: np.ndarray) -> np.ndarray:
    rows = np.array([np.append(c, [c[-1] if len(c) else 0.0])[np.minimum(ends, len(c))] for c in columns])
    return rows.mean(0)


def _numbers(values: np.ndarray, digits: int = 4) -> list[float | int | None]:
    numbers: list[float | int | None] = []
    for value in values.tolist():
        short = None if np.isnan(value) else float(f"{value:.{digits}g}")
        numbers.append(int(short) if short is not None and short.is_integer() else short)
    return numbers


def _evals(arm: Arm) -> list[list[float | int | None]]:
    points: dict[int, list[tuple[float, int]]] = {}
    for run in arm.runs:
        before, after = run.summary.get("accuracy_before"), run.summary.get("accuracy_after")
        n = (after or before or {}).get("n", 0)
        for step, value in _accuracy_by_step(run).items():
            points.setdefault(step, []).append((value, n))
    rows = []
    for step, each in sorted(points.items()):
        values = [value for value, _ in each]
        n = each[0][1]
        share = len(each) == 1 and n and not is_graded_arm(arm)
        interval = wilson(round(values[0] * n), n) if share else (min(values), max(values))
        at = [_until(arm, metric, step) for metric in ("tokens/sampled", "time/step")]
        rows.append([step, *at, *_numbers(np.array([np.mean(values), *interval]))])
    return rows


def _predicted(arm: Arm) -> float | None:
    peaks = [run.history.last("memory/predicted_peak_bytes") for run in arm.runs]
    return max([peak for peak in peaks if not np.isnan(peak)], default=None)


def _until(arm: Arm, metric: str, step: int) -> float:
    return float(np.mean([_sum_until(run, metric, step) for run in arm.runs]))


def _sum_until(run: RunData, metric: str, step: int) -> float:
    return float(np.nansum(run.history.by_step(metric, step)))


def tokens_of(run: RunData) -> float:
    """Returns the tokens that a run sampled."""
    return _sum_until(run, "tokens/sampled", run.history.last_step)


def accuracy_at(run: RunData, tokens: float) -> float | None:
    """Returns a run's accuracy after so many sampled tokens, on a straight line between its evaluations.

    None if it has no evaluation before or after that.
    """
    values = _accuracy_by_step(run)
    at = np.array([_sum_until(run, "tokens/sampled", step) for step in values])
    if not len(at) or not at[0] <= tokens <= at[-1]:
        return None
    return float(np.interp(tokens, at, list(values.values())))


def _accuracy_by_step(run: RunData) -> dict[int, float]:
    """Returns the accuracy, or mean reward, of each evaluation by its step, in order."""
    before, after = run.summary.get("accuracy_before"), run.summary.get("accuracy_after")
    metric, key = ("eval/reward", "reward") if run.graded else ("eval/accuracy", "value")
    by_step = {row["step"]: row.get(metric) for row in run.evals}
    by_step |= {0: before[key]} if before else {}
    by_step |= {run.summary["steps"]: after[key]} if after else {}
    return {step: value for step, value in sorted(by_step.items()) if value is not None}


def _mean_time(arm: Arm, metric: str) -> float:
    columns = np.concatenate([run.history.column(metric) for run in arm.runs])
    columns = columns[~np.isnan(columns)]
    return float(f"{columns.mean():.4g}") if len(columns) else 0.0
