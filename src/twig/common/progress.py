"""Callbacks for progress: what training, evaluating and exporting tell whoever watches.

This base class says only what must be said; `cli/display.py` has those that say more.
"""

import logging
from typing import Any

from twig.common.text import one_line

logger = logging.getLogger(__name__)


class Progress:
    """The calls that training makes while it runs. Override what is of interest."""

    def phase(self, name: str, total: int | None = None) -> None:
        """A stretch of work begins ("loading", "evaluating", "sampling", "updating"), of `total` units if
        known."""

    def advance(self, count: int = 1) -> None:
        """`count` more units of the phase are done."""

    def step(self, step: int, total: int, metrics: dict[str, Any]) -> None:
        """Training step `step` of `total` is done; `metrics` is its row in metrics.jsonl."""

    def evaluation(self, when: str, result: dict[str, Any]) -> None:
        """An evaluation is done: `when` is "before", "after" or "step N"; `result` has value, low, high, n
        and more."""

    def message(self, text: str) -> None:
        """Something worth a line: where the run goes on, what was saved, a warning."""

    def notice(self, text: str) -> None:
        """Something that nobody may miss, such as whose code is about to run: shown, or else logged."""
        logger.warning("%s", one_line(text))

    def done(self, summary: dict[str, Any]) -> None:
        """The run is over; `summary` is summary.json."""
