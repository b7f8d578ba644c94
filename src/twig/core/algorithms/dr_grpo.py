"""Dr. GRPO: GRPO divided by one length for all completions, and by no standard deviation."""

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from twig.core.algorithms.base import (
    Credit,
    KlTerm,
    ScaledRewards,
    TopEntropy,
    arxiv_entry,
    on_tokens,
)
from twig.core.trie import PrefixTrie


class DrGrpo(TopEntropy, ScaledRewards, KlTerm):
    """Every token of completion i gets (R_i - mean) / (G L), L the same for all. Dr. GRPO, arXiv 2503.20783.

    L is `divisor`, by default the longest length allowed: a long wrong completion is pushed down as much per
    token as a short one, and a group of nearly equal rewards as it is.
    """

    title: ClassVar = "Dr. GRPO"
    summary: ClassVar = (
        "a completion's reward less the mean of its prompt goes to all of its tokens, divided by the same "
        "number whatever its length"
    )
    citation: ClassVar = arxiv_entry(
        "liu2025understanding",
        "Understanding R1-Zero-Like Training: A Critical Perspective",
        "Liu, Zichen and others",
        "2503.20783",
    )

    trl_losses: ClassVar = (("dr_grpo", "token"),)

    name: Literal["dr-grpo"] = "dr-grpo"
    scale_rewards: Literal["group", "batch", "none"] = Field(
        default="none",
        description="Divide an advantage by a standard deviation after all, as TRL does by default: of the "
        "rewards of its group, or of the whole step (`batch`).",
    )
    divisor: int | None = Field(
        default=None,
        ge=1,
        description="What a completion's sum over its tokens is divided by in place of its length. null: "
        "rollout.max_completion_length.",
        examples=[256],
    )

    def resolved(self, max_completion_length: int) -> Self:
        """Returns the algorithm with the longest length as the divisor, if none is set."""
        return self if self.divisor else self.model_copy(update={"divisor": max_completion_length})

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Returns A_i / L summed over completions, / G."""
        assert self.divisor is not None, "resolved with the settings"
        share = [1 / self.divisor] * trie.num_completions
        return on_tokens(trie, self.advantages(trie), share, kl=self.beta != 0)
