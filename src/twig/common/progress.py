"""Defines the callbacks for progress that training, evaluating and exporting call.

This base class logs only notices; `report/progress.py` has those that show more.
"""

import logging
from collections.abc import Mapping
from typing import Any

from twig.common.text import one_line

logger = logging.getLogger(__name__)


class Progress:
    """Receives progress; override the methods of interest."""

    def phase(self, name: str, total: int | None = None) -> None:
        """Called when a phase begins: "loading", "evaluating", "sampling" or "updating".

        It has `total` units of work; None if that is unknown.
        """

    def advance(self, count: int = 1) -> None:
        """Called when `count` more units of the phase are done."""

    def resumed(self, totals: Mapping[str, Any]) -> None:
        """Called if a run resumes; `totals` are those of summary.json, over the steps before."""

    def ready(self, model: Any, tokenizer: Any, total: int) -> None:
        """Called before the first of `total` steps, with the PEFT model that they train."""

    def saved(self, step: int) -> None:
        """Called after a checkpoint of `step` was written."""

    def step(self, step: int, total: int, metrics: dict[str, Any]) -> None:
        """Called after training step `step` of `total`; `metrics` is its row in metrics.jsonl."""

    def evaluation(self, when: str, result: dict[str, Any]) -> None:
        """Called after an evaluation; `when` is "before", "after" or "step N".

        `result` has value, low, high, n and more.
        """

    def message(self, text: str) -> None:
        """Called with a line worth showing: where a run resumes, what was saved, a warning."""

    def notice(self, text: str) -> None:
        """Called with a line that nobody may miss, such as whose code is about to run; logs it by default."""
        logger.warning("%s", one_line(text))

    def done(self, summary: dict[str, Any]) -> None:
        """Called at the end of a run; `summary` is summary.json."""
