"""Turns a step's metrics and an evaluation into the texts that every display of progress shows.

Knows the names of metrics, nothing of terminals and notebooks.
"""

from collections.abc import Mapping
from typing import Any

from twig.common.text import percent
from twig.runs.reader import any_graded

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
        """Returns the step's reward and, if rewards are no more than right or wrong, the share of right."""
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
    if any_graded([result]):
        return f"{figure_of(result, True)}, the mean of {result['n']}"
    interval = f"95 % interval {100 * result['low']:.1f} to {percent(result['high'])}"
    return f"{percent(result['value'])} right of {result['n']} ({interval})"


def figure_of(result: Mapping[str, Any], graded: bool) -> str:
    """Returns an evaluation's result: the share of right answers, or the mean reward if it is `graded`.

    >>> figure_of({"value": 0.5, "reward": 0.5}, False), figure_of({"value": 0.0, "reward": 0.31}, True)
    ('50.0 %', 'reward 0.310')
    """
    if not graded:
        return percent(result["value"])
    return "no reward" if result["reward"] is None else f"reward {result['reward']:.3f}"


def change_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Returns the difference of two results."""
    if not any_graded([before, after]):
        return f"{100 * (after['value'] - before['value']):+.1f} points"
    return f"reward {(after['reward'] or 0.0) - (before['reward'] or 0.0):+.3f}"


def accuracy_rows(results: Mapping[str, Mapping[str, Any] | None]) -> list[list[str]]:
    """Returns a table of evaluations by name, its titles first; one that was not done has dashes."""
    graded = any_graded([*results.values()])
    rows = [["", "reward", "problems"] if graded else ["", "right", "95 % interval", "problems"]]
    for name, result in results.items():
        if result is None:
            rows.append([name, *["-"] * (len(rows[0]) - 1)])
        elif graded:
            rows.append([name, figure_of(result, True).removeprefix("reward "), str(result["n"])])
        else:
            interval = f"{100 * result['low']:.1f} to {percent(result['high'])}"
            rows.append([name, percent(result["value"]), interval, str(result["n"])])
    return rows


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
