"""GRPO, the baseline: every token of a completion gets the completion's advantage."""

from typing import ClassVar, Literal

import numpy as np

from twig.core.algorithms.base import (
    Credit,
    KlTerm,
    ScaledRewards,
    TopEntropy,
    arxiv_entry,
    on_tokens,
    per_length,
)
from twig.core.trie import PrefixTrie


class Grpo(TopEntropy, ScaledRewards, KlTerm):
    """Every token of completion i gets A_i / (G |o_i|). GRPO, arXiv 2402.03300, eq. 3 and 4."""

    title: ClassVar = "GRPO"
    summary: ClassVar = "a completion's reward, relative to those of its prompt, goes to all of its tokens"
    in_credit_map: ClassVar = True
    trl_losses: ClassVar = (("grpo", "token"),)
    citation: ClassVar = arxiv_entry(
        "shao2024deepseekmath",
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "Shao, Zhihong and others",
        "2402.03300",
    )

    name: Literal["grpo"] = "grpo"

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Returns A_i / |o_i| summed over completions, / G."""
        return on_tokens(trie, self.advantages(trie), per_length(trie), kl=self.beta != 0)
