"""Reads a run's numbers from its folder: settings, metrics by step, results. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twig.common.errors import UserError
from twig.config.load import RUN_CONFIG, Settings, load
from twig.runs.listing import state_of
from twig.runs.reader import (
    ENVIRONMENT,
    METRICS,
    is_graded_run,
    is_run,
    read_evaluations,
    read_json,
    read_metrics,
    read_summary,
)


@dataclass(frozen=True)
class Rise:
    """A difference of two means and its standard error; NaN if there are too few values."""

    difference: float
    error: float


class History:
    """A run's numbers: the rows of metrics.jsonl, its settings and, if there are, summary and dtype."""

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        settings: Settings,
        summary: dict[str, Any] | None = None,
        dtype: str | None = None,
    ) -> None:
        self.rows = [row for row in rows if "tokens/sampled" in row]
        self.settings, self.summary, self.dtype = settings, summary or {}, dtype

    def __len__(self) -> int:
        """Returns the number of training steps."""
        return len(self.rows)

    @property
    def last_step(self) -> int:
        """The last step that has metrics, 0 without one."""
        return max((row["step"] for row in self.rows), default=0)

    def by_step(self, name: str, length: int) -> np.ndarray:
        """Returns a metric of steps 1 to `length`; NaN for a step that lacks it, or whose row was lost."""
        values = np.full(length, np.nan)
        for row in self.rows:
            if row.get(name) is not None and row["step"] <= length:
                values[row["step"] - 1] = row[name]
        return values

    def column(self, name: str) -> np.ndarray:
        """Returns a metric [steps]; NaN where a step is without it."""
        values = [row.get(name) for row in self.rows]
        return np.array([np.nan if value is None else value for value in values], np.float64)

    def first(self, name: str) -> float:
        """Returns the metric's mean over the first third of the steps; NaN if they are without it."""
        return _mean(self.column(name)[: self._third])

    def last(self, name: str) -> float:
        """Returns the metric's mean over the last third of the steps; NaN if they are without it."""
        return _mean(self.column(name)[-self._third :])

    def rise(self, name: str) -> Rise:
        """Returns how much higher the metric's last third is than its first."""
        column = self.column(name)
        parts = [part[~np.isnan(part)] for part in (column[: self._third], column[-self._third :])]
        if min(map(len, parts)) < 2:
            return Rise(np.nan, np.nan)
        error = np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts))
        return Rise(float(parts[1].mean() - parts[0].mean()), float(error))

    def still_rises(self, name: str) -> bool:
        """Returns whether the metric's last quarter is above the one before it by more than its noise."""
        column = self.column(name)
        quarter = len(column) // 4
        parts = [column[-2 * quarter : -quarter], column[-quarter:]] if quarter else []
        parts = [part[~np.isnan(part)] for part in parts]
        if not parts or min(map(len, parts)) < 5:
            return False
        error = np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts))
        return bool(parts[1].mean() - parts[0].mean() > 2 * error)

    @property
    def _third(self) -> int:
        return max(1, len(self.rows) // 3)


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else np.nan


@dataclass(frozen=True)
class RunData:
    """What a run folder holds, read."""

    folder: Path
    settings: Settings
    history: History
    evals: list[dict[str, Any]]  # rows of evaluations between steps, of the problems of the last one
    summary: dict[str, Any]
    environment: dict[str, Any]
    problems: str | None = None  # the checksum of the problems of the last evaluation
    short_name: str | None = None  # among other runs
    state: str = "finished"  # one of `runs.listing.STATES`
    reason: str | None = None  # why it failed

    @property
    def name(self) -> str:
        return self.short_name or self.folder.resolve().name

    @property
    def graded(self) -> bool:
        """Whether rewards are more than right or wrong: results are then mean rewards, not accuracies."""
        return is_graded_run(self.summary, self.evals)

    @property
    def steps(self) -> int | None:
        """The steps that it was to take; None if its settings do not say."""
        train = self.settings.train
        return None if train.max_tokens is not None else train.max_steps


def read_run(folder: Path) -> RunData:
    """Reads a run folder's settings, metrics and results; raises UserError if it holds no run."""
    if not is_run(folder):
        raise UserError(str(folder), "it holds no run", "Pass the folder of one, such as runs/quickstart")
    settings = load(str(folder))
    rows = read_metrics(folder) if (folder / METRICS).exists() else []
    summary, environment = read_summary(folder) or {}, read_json(folder / ENVIRONMENT) or {}
    history = History(rows, settings, summary, environment.get("dtype"))
    asked = read_evaluations(folder)
    problems = asked[-1]["problems"] if asked else None
    others = {row["step"] for row in asked if row["problems"] != problems}
    evals = [row for row in rows if "eval/accuracy" in row and row["step"] not in others]
    state, reason = state_of(folder, summary or None, history.last_step)
    return RunData(
        folder, settings, history, evals, summary, environment, problems, state=state, reason=reason
    )


def settings_text(run: RunData) -> str:
    """Returns the text of a run's config.yaml."""
    return (run.folder / RUN_CONFIG).read_text(encoding="utf-8", errors="replace")
