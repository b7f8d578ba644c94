"""GTPO (Group-relative Trajectory-based Policy Optimization): what good and bad share is not pushed down."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from twig.core.algorithms.base import (
    Algorithm,
    Credit,
    advantages,
    arxiv_entry,
    on_tokens,
    per_length,
)
from twig.core.trie import PrefixTrie


class GtpoTrajectory(Algorithm):
    """GRPO in which a conflict counts double in good completions and not at all in bad ones.

    arXiv 2508.03772. A completion is good if its advantage is above 0 and bad if below. A conflict is a token
    of the first or last run of tokens each of which a completion of the other sign has too, at the same place
    from the beginning or from the end. A completion adds (A_i - entropy_weight H_i) / (G |o_i| n_i) times
    2, 0 or 1, H_i being the mean entropy of its tokens and n_i the number of its conflicts (at least 1);
    nothing if H_i is above `max_entropy`, by default ln 2. A conflict in both runs counts 4 times. The rules
    are those of the authors' code.
    """

    title: ClassVar = "GTPO (trajectory)"
    summary: ClassVar = (
        "a completion's reward, relative to those of its prompt, goes to all of its tokens; where good and "
        "bad ones begin or end alike, only the good ones count"
    )
    citation: ClassVar = arxiv_entry(
        "simoni2025gtpo",
        "GTPO: Stabilizing Group Relative Policy Optimization via Gradient and Entropy Control",
        "Simoni, Marco and Fontana, Aleksandar and Rossolini, Giulio and Saracino, Andrea and Mori, Paolo",
        "2508.03772",
    )

    name: Literal["gtpo-trajectory"] = "gtpo-trajectory"
    conflict_weight: float = Field(
        default=2.0, ge=0, description="What a conflict counts in a completion with a good reward."
    )
    entropy_weight: float = Field(
        default=0.1, ge=0, description="How much of its mean entropy is taken off a completion's advantage."
    )
    max_entropy: float = Field(
        default=float(np.log(2)),
        ge=0,
        description="Completions with a higher mean entropy (nats) are left out.",
    )

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Returns the advantage less the entropy over |o_i|, with conflicts weighted, summed, / G."""
        advantage = advantages(trie.rewards, "group")
        tokens = [trie.token[path] for path in trie.paths]
        first = shared_runs(tokens, np.sign(advantage))
        last = [run[::-1] for run in shared_runs([each[::-1] for each in tokens], np.sign(advantage))]
        signal = []
        for i, path in enumerate(trie.paths):
            entropy = float(trie.recorded_entropy[path].mean()) if len(path) else 0.0
            value = advantage[i] - self.entropy_weight * entropy if entropy <= self.max_entropy else 0.0
            in_conflict = self.conflict_weight if advantage[i] > 0 else 0.0
            weight = np.where(first[i], in_conflict, 1.0) * np.where(last[i], in_conflict, 1.0)
            signal.append(value * weight / max(int((first[i] | last[i]).sum()), 1))
        return on_tokens(trie, signal, per_length(trie))


def shared_runs(rows: Sequence[np.ndarray], signs: np.ndarray) -> list[np.ndarray]:
    """Returns, per row, which tokens of its beginning a row of the other sign has at the same position.

    >>> [run.tolist() for run in shared_runs([np.array([1, 2, 3]), np.array([1, 4, 3])], np.array([1, -1]))]
    [[True, False, False], [True, False, False]]
    """
    held: dict[int, set[tuple[int, int]]] = {sign: set() for sign in (-1, 0, 1)}
    for row, sign in zip(rows, signs, strict=True):
        held[int(sign)] |= set(enumerate(row.tolist()))
    runs = []
    for row, sign in zip(rows, signs, strict=True):
        others = held[-int(sign)] if sign else set()
        shared = np.array([each in others for each in enumerate(row.tolist())], bool)
        runs.append(np.logical_and.accumulate(shared))
    return runs
