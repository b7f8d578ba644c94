"""GSPO: GRPO whose ratio is that of the whole completion."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from twig.core.algorithms.base import Credit, ScaledRewards, arxiv_entry, on_tokens, per_length
from twig.core.trie import PrefixTrie


class Gspo(ScaledRewards):
    """Completion i is weighted by min(s_i A_i, clip(s_i, 1 - epsilon, 1 + epsilon_high) A_i) / G.

    s_i = (pi(o_i) / pi_old(o_i))^(1 / |o_i|) is the ratio of the whole completion. GSPO, arXiv 2507.18071,
    eq. 5 to 7; TRL's `importance_sampling_level="sequence"`. With one optimizer step per batch it is GRPO.
    """

    title: ClassVar = "GSPO"
    summary: ClassVar = (
        "a completion's reward, relative to those of its prompt, goes to all of its tokens, and the "
        "completion is clipped as a whole"
    )
    citation: ClassVar = arxiv_entry(
        "zheng2025group", "Group Sequence Policy Optimization", "Zheng, Chujie and others", "2507.18071"
    )
    objective_kind: ClassVar = "sequence ratio"
    trl_losses: ClassVar = (("grpo", "sequence"),)

    name: Literal["gspo"] = "gspo"
    epsilon: float = Field(
        default=3e-4, ge=0, le=1, description="The completion's ratio is clipped below at 1 - epsilon."
    )
    epsilon_high: float | None = Field(
        default=4e-4,
        ge=0,
        description="The completion's ratio is clipped above at 1 + epsilon_high. null: epsilon.",
    )

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Returns A_i / |o_i| summed over completions, / G."""
        return on_tokens(trie, self.advantages(trie), per_length(trie))
