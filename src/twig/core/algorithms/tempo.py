"""TEMPO: GRPO with the step in value of each token added to the advantage."""

from typing import ClassVar, Literal

import numpy as np

from twig.core.algorithms.base import (
    Credit,
    KlTerm,
    ScaledRewards,
    TopEntropy,
    advantages,
    arxiv_entry,
    on_tokens,
    per_length,
    reward_deviation,
    value_steps,
)
from twig.core.trie import PrefixTrie, rounding


class Tempo(TopEntropy, ScaledRewards, KlTerm):
    """GRPO with the step in value added: (R_i - mean + V(n) - V(parent(n))) / (std + 1e-4), over G |o_i|.

    TEMPO, arXiv 2509.18314. The step is 0 at nodes that are no fork.
    """

    title: ClassVar = "TEMPO"
    summary: ClassVar = (
        "a completion's reward, relative to those of its prompt, goes to all of its tokens, and where the "
        "completions part also the step in the mean reward that the token makes"
    )
    citation: ClassVar = arxiv_entry(
        "tran2025exploiting",
        "Exploiting Tree Structure for Credit Assignment in RL Training of LLMs",
        "Tran, Hieu and Yao, Zonghai and Yu, Hong",
        "2509.18314",
    )

    name: Literal["tempo"] = "tempo"

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Returns the advantage plus the step in value, over |o_i|, summed over completions, / G."""
        step, centred = value_steps(trie), advantages(trie.rewards, "none")
        deviation = reward_deviation(trie.rewards) if self.scale_rewards == "group" else 1.0
        both = [a + step[path] for a, path in zip(centred, trie.paths, strict=True)]
        signal = [np.where(abs(each) > rounding(trie.rewards), each / deviation, 0.0) for each in both]
        return on_tokens(trie, signal, per_length(trie), kl=self.beta != 0)
