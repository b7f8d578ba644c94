"""Turns a step's metrics and an evaluation into the texts that every display of progress shows.

Knows the names of metrics, nothing of terminals and notebooks.
"""

from collections.abc import Mapping
from typing import Any

from twig.common.text import percent

_SMOOTHING = 0.1


class Figures:
    """Figures of the last steps as texts, the same for every display."""

    def __init__(self) -> None:
        self.sampled = self.selected = 0
        self.seconds: float | None = None
        self.tokens_per_second: float | None = None
        self.evaluation = ""

    def resume(self, totals: Mapping[str, Any]) -> None:
        """Takes over the tokens of a run that resumes."""
        self.sampled, self.selected = totals["tokens_sampled"], totals["tokens_selected"]

    def add(self, metrics: dict[str, Any]) -> None:
        """Adds the metrics of a step."""
        sampled, seconds = metrics.get("tokens/sampled", 0), metrics.get("time/step")
        self.sampled += sampled
        self.selected += metrics.get("tokens/selected", 0)
        if seconds:
            self.seconds = _smooth(self.seconds, seconds)
            self.tokens_per_second = _smooth(self.tokens_per_second, sampled / seconds)

    def rewards(self, metrics: dict[str, Any]) -> list[str]:
        """Returns the step's reward and share of right answers."""
        parts = [f"reward {metrics['reward']:.3f}"] if metrics.get("reward") is not None else []
        if metrics.get("answers/right") is not None:
            parts.append(f"right {percent(metrics['answers/right'])}")
        return parts

    def tokens(self) -> list[str]:
        """Returns the tokens sampled and trained, and the speed."""
        share = f" ({percent(self.selected / self.sampled)})" if self.sampled else ""
        parts = [f"{_count(self.sampled)} tokens sampled, {_count(self.selected)} trained{share}"]
        return parts + ([f"{_count(self.tokens_per_second)} tokens/s"] if self.tokens_per_second else [])

    def left(self, step: int, total: int) -> str:
        """Returns the training time that is left, from the speed of the last steps."""
        return "" if self.seconds is None else f"{clock(self.seconds * (total - step))} left"


def accuracy_words(result: dict[str, Any]) -> str:
    """Returns a line about an evaluation.

    >>> accuracy_words({"value": 0.5, "low": 0.404, "high": 0.596, "n": 100})
    '50.0 % right of 100 (95 % interval 40.4 to 59.6 %)'
    """
    interval = f"95 % interval {100 * result['low']:.1f} to {percent(result['high'])}"
    return f"{percent(result['value'])} right of {result['n']} ({interval})"


def _smooth(before: float | None, now: float) -> float:
    return now if before is None else (1 - _SMOOTHING) * before + _SMOOTHING * now


def _count(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """Returns a time as a clock shows it.

    >>> clock(100), clock(3725)
    ('1:40', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
