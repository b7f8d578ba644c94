"""What flows through Twig: an example becomes a group of completions with rewards.

Plain data, numpy only. Nothing here knows of models, tasks or algorithms.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Example:
    """One problem: a prompt (text or chat messages) and the other columns of its row.

    Rewards get the columns by keyword.
    """

    prompt: str | list[dict[str, Any]]
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """How one answer reads: was there an answer at all, and is it right."""

    answered: bool
    right: bool


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    `ids`, `logps` and `entropies` have one entry per sampled token. The end token that finished the
    completion is one of them: it is sampled, so it is trained. `finished` is False if the length limit cut
    it off. `cells[t]` is the row of the rollout's boundary table that holds token t (empty if nothing was
    recorded).
    """

    ids: np.ndarray
    logps: np.ndarray
    entropies: np.ndarray
    finished: bool
    text: str
    cells: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.logps) == len(self.entropies), "one log-prob and entropy per token"
        assert len(self.cells) in (0, len(self.ids)), "one boundary row per token, or none"

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Group:
    """The completions sampled for one prompt, and their rewards.

    `prompt_ids` is what the model saw; after a replay it ends with the kept part of an earlier completion,
    whose length is `prefix_length` (rewards see prefix + continuation). `prompt_index` names the prompt in
    the data. `prompt_cells` are the boundary rows of the prompt's tokens (empty if nothing was recorded).

    >>> c = Completion(np.array([5, 2]), np.zeros(2), np.zeros(2), True, "5")
    >>> Group(Example("2+3="), 0, np.array([1, 1]), [c, c], np.array([1.0, 0.0])).num_tokens
    4
    """

    example: Example
    prompt_index: int
    prompt_ids: np.ndarray
    completions: list[Completion]
    rewards: np.ndarray
    prefix_length: int = 0
    prompt_cells: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        assert len(self.prompt_ids) > 0, "a prompt has at least one token"
        assert len(self.completions) == len(self.rewards), "one reward per completion"

    def where(self, keep: np.ndarray) -> "Group":
        """Returns the group with only the completions for which `keep` is True."""
        if keep.all():
            return self
        completions = [c for c, kept in zip(self.completions, keep, strict=True) if kept]
        return replace(self, completions=completions, rewards=self.rewards[keep])

    @property
    def num_tokens(self) -> int:
        """Tokens sampled in this group."""
        return sum(len(c) for c in self.completions)
