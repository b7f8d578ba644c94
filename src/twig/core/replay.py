"""Replay: groups that restart from inside an earlier completion, because forks deep in a text are rare.

The queue is part of the run's state: what waits here is sampled in the next step. Knows nothing of models.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from twig.common.frozen import Frozen
from twig.core.types import Completion, Group


class Replay(Frozen):
    """Groups restarted from inside a completion."""

    probability: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Chance that a prompt's next group restarts from inside one of its completions.",
    )
    prefer_correct: float = Field(
        default=0.5, ge=0, le=1, description="Chance that a right completion is chosen for it."
    )
    cut: Literal["entropy", "uniform"] = Field(
        default="entropy",
        description="Where the completion is cut: in proportion to the entropy recorded there, or anywhere.",
    )


@dataclass(frozen=True)
class Restart:
    """A prompt (its number in the data) whose next group continues after `prefix`.

    `prefix` holds tokens of one of its completions.
    """

    prompt_index: int
    prefix: list[int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose_restart(
    group: Group, right: Sequence[bool] | np.ndarray, options: Replay, rng: np.random.Generator
) -> Restart | None:
    """Returns the restart that follows this group, or None.

    With probability `options.probability` a group restarts from a finished completion of at least two tokens:
    a right one with probability `prefer_correct`, if there is one; cut before token t, 1 <= t < |o|, drawn in
    proportion to the entropy recorded at t, or uniformly.
    """
    chance, prefer, pick, where = rng.random(4)
    if chance >= options.probability:
        return None
    usable = [i for i, c in enumerate(group.completions) if c.finished and len(c) > 1]
    preferred = [i for i in usable if right[i]] if prefer < options.prefer_correct else []
    pool = preferred or usable
    if not pool:
        return None
    completion = group.completions[pool[int(pick * len(pool))]]
    cut = choose_cut(completion, options.cut, where)
    kept = group.prompt_ids[len(group.prompt_ids) - group.prefix_length :]
    return Restart(group.prompt_index, [int(t) for t in kept] + [int(t) for t in completion.ids[:cut]])


def choose_cut(completion: Completion, how: str, uniform: float) -> int:
    """Returns the token 1 <= t < |o| before which the completion is cut, from a uniform number in [0, 1).

    >>> quiet = np.zeros(4)
    >>> choose_cut(Completion(np.arange(4), quiet, np.array([9.0, 0.0, 2.0, 2.0]), True, ""), "entropy", 0.4)
    2
    """
    weight = completion.entropies[1:].astype(np.float64) if how == "entropy" else np.ones(len(completion) - 1)
    if not weight.sum() > 0:
        weight = np.ones(len(completion) - 1)
    cumulative = np.cumsum(weight)
    return 1 + min(int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right")), len(weight) - 1)
