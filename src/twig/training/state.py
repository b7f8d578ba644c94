"""The training state: step, totals and evaluations so far. A checkpoint keeps it.

What the next step depends on (`trainer.Trainer.state`) is kept beside it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from twig.config.schema import StopWhen

TOTALS = {
    "tokens_sampled": "tokens/sampled",
    "tokens_selected": "tokens/selected",
    "nodes_run": "tokens/nodes_run",
    "update_flops": "flops/update",
}


@dataclass
class RunState:
    """Steps done, totals over them, and every evaluation with its step (0: before training).

    `answers` are those before training that the result may show (`answers.answers_before`). `ended` is the
    callback that ended the run.

    Two evaluations are compared only if they asked the same problems. Those to evaluate on never change in a
    run, and an evaluation asks the first ones: as many are the same.
    """

    step: int = 0
    totals: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(TOTALS, 0) | {"seconds": 0.0})
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    ended: str | None = None

    def add_step(self, metrics: Mapping[str, Any], seconds: float) -> None:
        """One more step is done."""
        self.step += 1
        self.totals["seconds"] += seconds
        for total, metric in TOTALS.items():
            self.totals[total] += metrics.get(metric, 0)

    def add_evaluation(self, result: Mapping[str, Any]) -> bool:
        """Keeps an evaluation of this step; whether it is the best since training began."""
        self.evaluations.append({**result, "step": self.step})
        return self.best is self.evaluations[-1]

    @property
    def before(self) -> dict[str, Any] | None:
        """The evaluation before training of the newest one's problems, without its step; None without one."""
        first = next((each for each in self._comparable() if each["step"] == 0), None)
        return first and {key: value for key, value in first.items() if key != "step"}

    @property
    def best(self) -> dict[str, Any] | None:
        """The best evaluation since training began of the newest one's problems; None if there was none.

        Of equal ones it is the first.
        """
        trained = [each for each in self._comparable() if each["step"] > 0]
        return max(trained, key=lambda each: each[self._measure], default=None)

    def ended_by(self, when: StopWhen) -> str | None:
        """Returns the setting or callback that ends the run here; None if it goes on."""
        if self.ended is not None:
            return self.ended
        # A run that is resumed at an evaluation may have it twice.
        values = {each["step"]: each["value"] for each in self._comparable()} if self.evaluations else {}
        last = max(values, default=0)
        if last == 0:
            return None
        if when.accuracy is not None and values[last] >= when.accuracy:
            return "train.stop_when.accuracy"
        values = {each["step"]: each[self._measure] for each in self._comparable()}
        best = max(values, key=lambda step: (values[step], -step))
        since = sum(step > best for step in values)
        if when.patience is not None and since >= when.patience:
            return "train.stop_when.patience"
        return None

    @property
    def _measure(self) -> str:
        """What evaluations are compared by: `reward` if rewards are more than right or wrong."""
        asked = self._comparable()
        graded = any(each.get("graded") for each in asked) and all(
            each["reward"] is not None for each in asked
        )
        return "reward" if graded else "value"

    def _comparable(self) -> list[dict[str, Any]]:
        return [each for each in self.evaluations if each["n"] == self.evaluations[-1]["n"]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
