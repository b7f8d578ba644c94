"""Estimates how long a run takes, from its first steps on this machine.

A measurement is the run itself, in a temporary folder, cut short: the same model, sizes and steps.
"""

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twig.common.progress import Progress
from twig.config.load import Settings
from twig.config.sizes import with_values
from twig.runtime.machine import waited_for_a_core
from twig.tasks.load import load_task
from twig.training.train import train

SECONDS = 20.0  # of steps that are measured
_FEWEST = 4  # steps, if the run has as many; the first one is slower and does not count
_PROBLEMS = 128  # of the evaluations that are measured


@dataclass(frozen=True)
class Estimate:
    """How long a run takes: seconds and tokens a step are means over the whole run.

    The `measured` steps count as they were, the others as the later half of these: completions grow while a
    model learns. `mean_length` is that of the later half's completions. `steps` are all of the run's,
    `evaluations` its evaluations of `problems` each, `seconds_per_problem` long a problem (0 without one).
    `waiting` is the share of the measured time in which other work had the core (0 if that is unknown): the
    whole run takes so much less if the machine does nothing else.
    """

    measured: int
    seconds_per_step: float
    tokens_per_step: float
    mean_length: float
    steps: int
    evaluations: int
    problems: int
    seconds_per_problem: float
    waiting: float = 0.0

    @property
    def training(self) -> float:
        """Seconds of all steps."""
        return self.steps * self.seconds_per_step

    @property
    def evaluating(self) -> float:
        """Seconds of all evaluations."""
        return self.evaluations * self.problems * self.seconds_per_problem

    @property
    def tokens(self) -> float:
        """Tokens that all steps sample."""
        return self.steps * self.tokens_per_step


class _Watch(Progress):
    """Times evaluations and keeps the metrics of steps; passes phases and messages on."""

    def __init__(self, shown: Progress) -> None:
        self.shown, self.total, self.rows = shown, 0, list[dict[str, Any]]()
        self.evaluated: list[tuple[float, int]] = []  # seconds and problems of each
        self.began = time.perf_counter()
        self.over = False  # enough is measured
        self.first: tuple[float, float] | None = None  # the clock, and the waiting for a core until then
        self.waiting = 0.0

    def phase(self, name: str, total: int | None = None) -> None:
        self.began = time.perf_counter()
        if self.first is None and name in ("evaluating", "sampling"):
            self.first = self.began, waited_for_a_core() or 0.0
        self.shown.phase(name, total)

    def ready(self, model: Any, tokenizer: Any, total: int) -> None:
        self.total = total

    def step(self, step: int, total: int, metrics: dict[str, Any]) -> None:
        self.rows.append(metrics)
        if self.first is not None:
            began, before = self.first
            waited = (waited_for_a_core() or 0.0) - before
            self.waiting = max(0.0, waited / max(time.perf_counter() - began, 1e-9))
        self.shown.step(step, total, metrics)

    def evaluation(self, when: str, result: dict[str, Any]) -> None:
        self.evaluated.append((time.perf_counter() - self.began, result["n"]))

    def message(self, text: str) -> None:
        if not self.over:
            self.shown.message(text)

    def notice(self, text: str) -> None:
        self.shown.notice(text)


def measure_run(settings: Settings, progress: Progress, seconds: float = SECONDS) -> Estimate:
    """Trains for about so many seconds, in a folder that is removed, and returns what the run would take.

    Raises UserError as `train` does.
    """
    problems = settings.eval.limit or len(load_task(settings).eval)
    watch, end = _Watch(progress), math.inf

    def enough(step: int, metrics: dict[str, Any]) -> bool:
        nonlocal end
        end = min(end, time.perf_counter() + seconds)
        watch.over = step >= _FEWEST and time.perf_counter() >= end
        return watch.over

    values = {"eval.limit": min(problems, _PROBLEMS) or None, "eval.steps": 0, "log.report_to": []}
    with tempfile.TemporaryDirectory(prefix="twig-") as folder:
        short = with_values(settings, values)
        train(short, output=Path(folder) / "measured", progress=watch, on_step=enough)
    return _estimate(settings, watch, problems)


def _estimate(settings: Settings, watch: _Watch, problems: int) -> Estimate:
    rows, later = watch.rows, watch.rows[len(watch.rows) // 2 :]  # not the first step, which is slower

    def mean(name: str, steps: int) -> float:
        expected = sum(row[name] for row in later) / len(later)
        return (sum(row[name] for row in rows) + max(steps - len(rows), 0) * expected) / max(steps, len(rows))

    steps = watch.total
    if settings.train.max_tokens is not None:
        tokens = mean("tokens/sampled", len(rows))
        steps = min(steps, math.ceil(settings.train.max_tokens / max(tokens, 1)))
    asked = sum(number for _, number in watch.evaluated)
    every = settings.eval.steps
    between = (steps - 1) // every if every else 0
    return Estimate(
        measured=len(rows),
        seconds_per_step=mean("time/step", steps),
        tokens_per_step=mean("tokens/sampled", steps),
        mean_length=sum(row["completions/mean_length"] for row in later) / len(later),
        steps=steps,
        evaluations=(between + 1 + settings.eval.before) if problems else 0,
        problems=problems,
        seconds_per_problem=sum(spent for spent, _ in watch.evaluated) / asked if asked else 0.0,
        waiting=watch.waiting,
    )
