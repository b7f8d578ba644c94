"""What a report draws of runs: arms (runs that differ only by seed), curves of bounded length.

To draw another metric, add a row to `CHARTS`. Knows the names of metrics and settings; no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from twig.config.load import Settings
from twig.config.schema import ALGORITHMS_WITH
from twig.evaluation.statistics import wilson
from twig.report.history import RunData

_POINTS = 240  # of a curve, at most
_NUMBERS = 250_000  # of all curves, about
# Settings in which the runs of an arm may differ: they name a run or say what is written.
_NOT_COMPARED = ("train.seed", "log.", "train.save_", "model.num_threads", "model.device")


@dataclass
class Arm:
    """Runs whose settings are equal but for the seed; `label` says how they differ from the other arms."""

    runs: list[RunData]
    label: str = ""

    @property
    def settings(self) -> Settings:
        return self.runs[0].settings


@dataclass(frozen=True)
class Chart:
    """A curve that a report shows. `unit` is share, tokens, bytes, seconds, nats or empty; a curve that is
    `noisy` is also drawn smoothed."""

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
    """The runs by arm, labelled, in the order in which they were given."""
    arms: dict[str, Arm] = {}
    for run in runs:
        compared = {k: v for k, v in run.settings.flat().items() if not k.startswith(_NOT_COMPARED)}
        arms.setdefault(repr(compared), Arm([])).runs.append(run)
    found = list(arms.values())
    for arm in found:
        arm.label = _label(arm, found)
    return found


def differing(arms: Sequence[Arm]) -> dict[str, list[Any]]:
    """Dotted key to its value in each arm, for the settings that differ between arms.

    A setting that an arm's algorithm is without is None there.
    """
    flat = [_applicable(arm) for arm in arms]
    found = {}
    for key in arms[0].settings.flat():
        values = [each.get(key) for each in flat]
        if not key.startswith(_NOT_COMPARED) and len(set(map(repr, values))) > 1:
            found[key] = values
    return found


def _applicable(arm: Arm) -> dict[str, Any]:
    name, flat = arm.settings.algorithm.name, arm.settings.flat()
    others = {f"algorithm.{key}" for key, users in ALGORITHMS_WITH.items() if name not in users}
    return {k: v for k, v in flat.items() if k not in others and ".".join(k.split(".")[:2]) not in others}


def _label(arm: Arm, arms: list[Arm]) -> str:
    if len(arms) == 1:
        return arm.settings.algorithm.name
    words = []
    if len({each.settings.algorithm.name for each in arms}) > 1:
        words.append(arm.settings.algorithm.name)
    alike = [each for each in arms if each.settings.algorithm.name == arm.settings.algorithm.name]
    if len(alike) > 1:
        flat = arm.settings.flat()
        words += [f"{key.partition('.')[2]}={_label_value(flat[key])}" for key in differing(alike)]
    return ", ".join(words) or arm.settings.algorithm.name


def _label_value(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 24 else text[:11] + "…" + text[-12:]


# ---- curves -----------------------------------------------------------------------------------------------


def arm_series(arm: Arm, num_runs: int = 1) -> dict[str, Any]:
    """An arm's curves as plain values.

    `x` has, by axis (step, tokens, seconds), where each point lies; `series`, by metric, `mean`, `low` and
    `high` over the arm's runs. A point stands for as many steps as keep the curves of `num_runs` runs short:
    its value is their mean. `evals` has [step, tokens, seconds, mean, low, high] per evaluation: low and high
    are the 95 % interval of one run, or the lowest and highest of several.
    """
    length = max(1, *(len(run.history) for run in arm.runs))
    points = min(_POINTS, max(40, _NUMBERS // (3 * len(CHARTS) * max(1, num_runs))))
    width = -(-length // points)
    edges = np.arange(0, length, width)
    xs = {"step": [np.arange(1.0, length + 1)]}
    for axis, metric in (("tokens", "tokens/sampled"), ("seconds", "time/step")):
        xs[axis] = [np.nancumsum(run.history.column(metric)) for run in arm.runs]
    series = {}
    for chart in CHARTS:
        rows = [_binned(run.history.column(chart.metric), edges, length) for run in arm.runs]
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
        "x": {axis: _numbers(_at(columns, ends), 6) for axis, columns in xs.items()},
        "series": series,
        "evals": _evals(arm),
        "predicted": _predicted(arm),
        "phases": {name: _mean_time(arm, f"time/{name}") for name in PHASES},
        "time": _mean_time(arm, "time/step"),
    }


def _binned(column: np.ndarray, edges: np.ndarray, length: int) -> np.ndarray:
    full = np.full(length, np.nan)
    full[: len(column)] = column
    known = ~np.isnan(full)
    number = np.add.reduceat(known.astype(float), edges)
    total = np.add.reduceat(np.where(known, full, 0.0), edges)
    return np.divide(total, number, out=np.full(len(edges), np.nan), where=number > 0)


def _ignoring_nan(how: Any, table: np.ndarray) -> np.ndarray:
    found = np.full(table.shape[1], np.nan)
    some = ~np.isnan(table).all(0)
    found[some] = how(table[:, some], 0)
    return found


def _at(columns: list[np.ndarray], ends: np.ndarray) -> np.ndarray:
    rows = np.array([np.append(c, [c[-1] if len(c) else 0.0])[np.minimum(ends, len(c))] for c in columns])
    return rows.mean(0)


def _numbers(values: np.ndarray, digits: int = 4) -> list[float | int | None]:
    found: list[float | int | None] = []
    for value in values.tolist():
        short = None if np.isnan(value) else float(f"{value:.{digits}g}")
        found.append(int(short) if short is not None and short.is_integer() else short)
    return found


def _evals(arm: Arm) -> list[list[float]]:
    points: dict[int, list[tuple[float, int]]] = {}
    for run in arm.runs:
        before, after = run.summary.get("accuracy_before"), run.summary.get("accuracy_after")
        n = (after or before or {}).get("n", 0)
        found = {row["step"]: row["eval/accuracy"] for row in run.evals}
        found |= {0: before["value"]} if before else {}
        found |= {run.summary["steps"]: after["value"]} if after else {}
        for step, value in found.items():
            if value is not None:
                points.setdefault(step, []).append((value, n))
    rows = []
    for step, each in sorted(points.items()):
        values = [value for value, _ in each]
        n = each[0][1]
        interval = wilson(round(values[0] * n), n) if len(each) == 1 and n else (min(values), max(values))
        at = [_until(arm, metric, step) for metric in ("tokens/sampled", "time/step")]
        rows.append([step, *at, *_numbers(np.array([np.mean(values), *interval]))])
    return rows


def _predicted(arm: Arm) -> float | None:
    known = [run.history.last("memory/predicted_peak_bytes") for run in arm.runs]
    return max([value for value in known if not np.isnan(value)], default=None)


def _until(arm: Arm, metric: str, step: int) -> float:
    return float(np.mean([np.nansum(run.history.column(metric)[:step]) for run in arm.runs]))


def _mean_time(arm: Arm, metric: str) -> float:
    columns = np.concatenate([run.history.column(metric) for run in arm.runs])
    columns = columns[~np.isnan(columns)]
    return float(f"{columns.mean():.4g}") if len(columns) else 0.0
