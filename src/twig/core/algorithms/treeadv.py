"""TreeAdv: GRPO in which a token has the mean advantage of all completions that share it."""

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
    reward_deviation,
)
from twig.core.trie import PrefixTrie


class TreeAdv(TopEntropy, ScaledRewards, KlTerm):
    """Completion i adds the mean of A_j over the completions j through n, over G |o_i|. arXiv 2601.03703.

    The advantages are the paper's, the mean over the leaves below a token. Its trees are sampled on purpose,
    by branching where the entropy is high; these are what independent samples have in common.
    """

    title: ClassVar = "TreeAdv"
    summary: ClassVar = (
        "a token gets the mean reward of the completions that share it, relative to all of their prompt"
    )
    citation: ClassVar = arxiv_entry(
        "cao2026treeadv",
        "TreeAdv: Tree-Structured Advantage Redistribution for Group-Based RL",
        "Cao, Lang and Ruan, Hui and Li, Yongqian and others",
        "2601.03703",
    )

    name: Literal["treeadv"] = "treeadv"

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Returns (V(n) - mean) / (std + 1e-4) over |o_i|, summed over completions, / G."""
        deviation = reward_deviation(trie.rewards) if self.scale_rewards == "group" else 1.0
        advantage = (trie.value - trie.value[0]) / deviation
        return on_tokens(trie, [advantage[path] for path in trie.paths], per_length(trie), kl=self.beta != 0)
