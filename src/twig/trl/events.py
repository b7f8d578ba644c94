"""Calls TRL's callbacks while Twig trains, and keeps `state.log_history` as TRL does.

Steps are counted as TRL counts them: optimizer steps. Knows nothing of TRL itself.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from twig.common.progress import Progress

logger = logging.getLogger("twig.trl")

# What Twig has no moment for: a callback that overrides one of these is named before training.
NEVER_CALLED = (
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_prediction_step",
    "on_predict",
    "on_push_begin",
)
_NOT_LOGGED = ("step",)


class Events(Progress):
    """Progress of a run that `callbacks` are told of as TRL tells them.

    `every` is after how many steps their `on_log` is called (0: never), with means over these steps; `epoch`
    the steps of a pass over the data (None: unknown); `iterations` the optimizer steps of a step.
    """

    def __init__(
        self, args: Any, callbacks: Sequence[Any], every: int, epoch: float | None, iterations: float
    ) -> None:
        self.args, self.callbacks = args, [each() if isinstance(each, type) else each for each in callbacks]
        self.every, self.epoch, self.iterations = every, epoch, iterations
        self.state, self.control = TrainerState(), TrainerControl()
        self.passed: dict[str, Any] = {"model": None, "processing_class": None}
        self.rows: list[Mapping[str, Any]] = []  # of the steps since the last log
        self.losses: list[float] = []
        self.began, self.in_step = time.perf_counter(), False
        self.rows_before: Callable[[], Sequence[Mapping[str, Any]]] = lambda: ()  # of a run that resumes
        self.call("on_init_end")

    def call(self, event: str, **more: Any) -> None:
        """Calls one method of every callback."""
        for callback in self.callbacks:
            given = {**self.passed, **more}
            answer = getattr(callback, event)(self.args, self.state, self.control, **given)
            self.control = answer if isinstance(answer, TrainerControl) else self.control

    # ---- what Twig tells

    def ready(self, model: Any, tokenizer: Any, total: int) -> None:
        """Begins training."""
        self.passed = {"model": model, "processing_class": tokenizer}
        self.began = time.perf_counter()
        state = self.state
        state.max_steps = round(total * self.iterations)
        state.num_train_epochs = math.ceil(total / self.epoch) if self.epoch else 1
        state.logging_steps, state.train_batch_size = self.every, self.args.per_device_train_batch_size
        self.control = TrainerControl()
        for row in self.rows_before():
            if "reward" in row and (logs := self._count(row)) is not None:
                self._keep(logs)
        self.call("on_train_begin")

    def phase(self, name: str, total: int | None = None) -> None:
        """Begins a step when its sampling begins."""
        if name != "sampling" or self.in_step or self.passed["model"] is None:
            return
        self.in_step = True
        if self.state.global_step == 0 or self._epoch_ended():
            self.call("on_epoch_begin")
        self.call("on_step_begin")

    def step(self, step: int, total: int, metrics: dict[str, Any]) -> None:
        """Ends a step, and logs if it is time to."""
        self.in_step = False
        logs = self._count({**metrics, "step": step})
        self.call("on_step_end")
        if logs is not None or self.control.should_log:
            self.control.should_log = False
            self.log(logs or self._means())
        if self._epoch_ended():
            self.call("on_epoch_end")

    def stops(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Returns whether a callback set `should_training_stop`: the `on_step` of a run."""
        return bool(self.control.should_training_stop)

    def saved(self, step: int) -> None:
        """Tells of a checkpoint."""
        self.call("on_save")

    def evaluation(self, when: str, result: dict[str, Any]) -> None:
        """Logs an evaluation, with TRL's prefix."""
        self.evaluated(metrics_of(result, "eval"))

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Logs an evaluation and tells of it."""
        self.log(metrics)
        self.call("on_evaluate", metrics=metrics)

    def message(self, text: str) -> None:
        """Logs the lines of a run; warnings as warnings."""
        logger.log(logging.WARNING if text.startswith("warning") else logging.INFO, "%s", text)

    def finish(self) -> dict[str, float]:
        """Logs the row that ends a training and returns it."""
        seconds = time.perf_counter() - self.began
        summary = {
            "train_runtime": round(seconds, 4),
            "train_steps_per_second": round(self.state.global_step / max(seconds, 1e-9), 3),
            "train_loss": sum(self.losses) / max(len(self.losses), 1),
        }
        self.log(dict(summary))
        self.call("on_train_end")
        return summary

    # ---- logs

    def log(self, logs: dict[str, float]) -> None:
        """Adds a row to the history and calls `on_log`."""
        self.call("on_log", logs=self._keep(logs))

    def _keep(self, logs: dict[str, float]) -> dict[str, float]:
        if self.epoch:
            logs = {**logs, "epoch": round(self.state.epoch or 0.0, 4)}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        return dict(logs)

    def _count(self, row: Mapping[str, Any]) -> dict[str, float] | None:
        """Counts a step; returns what to log if it is time to."""
        step = int(row["step"])
        self.state.global_step = round(step * self.iterations)
        self.state.epoch = step / self.epoch if self.epoch else 0.0
        if isinstance(loss := row.get("loss"), Real):
            self.losses.append(float(loss))
        self.rows.append(row)
        first = step == 1 and self.args.logging_first_step
        return self._means() if first or (self.every and step % self.every == 0) else None

    def _means(self) -> dict[str, float]:
        """Returns the means over the steps since the last log, and forgets these steps."""
        values: dict[str, list[float]] = {}
        for row in self.rows:
            for name, value in row.items():
                is_number = isinstance(value, Real) and not isinstance(value, bool)
                if is_number and name not in _NOT_LOGGED and math.isfinite(value):
                    values.setdefault(name, []).append(float(value))
        self.rows = []
        means = {name: sum(each) / len(each) for name, each in values.items()}
        return means | {name: values[name][-1] for name in ("learning_rate",) if name in values}

    def _epoch_ended(self) -> bool:
        step = self.state.global_step / self.iterations
        return bool(self.epoch) and math.floor(step / self.epoch) > math.floor((step - 1) / self.epoch)


def metrics_of(result: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Returns an evaluation as TRL names its metrics: the mean reward, and the greedy accuracy beside it."""
    names = {
        "reward": "reward",
        "value": "accuracy",
        "mean_length": "completions/mean_length",
        "truncated": "completions/clipped_ratio",
        "n": "num_examples",
    }
    return {
        f"{prefix}_{name}": float(result[key]) for key, name in names.items() if result.get(key) is not None
    }


def never_called(callbacks: Sequence[Any]) -> list[str]:
    """Returns a line for each method of a callback that Twig never calls."""
    return [
        f"{(each if isinstance(each, type) else type(each)).__name__}.{event} is never called"
        for each in callbacks
        for event in NEVER_CALLED
        if getattr(each if isinstance(each, type) else type(each), event)
        is not getattr(TrainerCallback, event)
    ]
