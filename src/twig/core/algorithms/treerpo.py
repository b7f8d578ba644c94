"""TreeRPO: GRPO at every fork, among the steps that begin there."""

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
    segment_heads,
)
from twig.core.trie import PrefixTrie


class TreeRpo(TopEntropy, ScaledRewards, KlTerm):
    """Completion i adds (V(s) - mean) / (std + 1e-4) over G |o_i|, with mean and std among the siblings of s.

    TreeRPO, arXiv 2506.05183: the value of a step is the mean reward below it, and the steps that begin at
    one fork are a group. A step is the part between two forks; one that c completions share counts c times
    in mean and std. The paper samples full trees, N continuations of every step; these are what independent
    samples have in common. Its own normalisation of values between 0 and 1 could not be read: this is GRPO's.
    """

    title: ClassVar = "TreeRPO"
    summary: ClassVar = (
        "the tokens between two forks get the mean reward of the completions that share them, relative to "
        "those of the other branches of the fork"
    )
    citation: ClassVar = arxiv_entry(
        "yang2025treerpo",
        "TreeRPO: Tree Relative Policy Optimization",
        "Yang, Zhicheng and Guo, Zhijiang and Huang, Yinya and others",
        "2506.05183",
    )

    name: Literal["treerpo"] = "treerpo"

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Returns the advantage among siblings over |o_i|, summed over completions, / G."""
        advantage = np.zeros(len(trie))
        branches = np.flatnonzero(np.bincount(trie.parent[1:], minlength=len(trie)) > 1)
        for fork in branches:
            children = np.flatnonzero(trie.parent == fork)
            count = trie.count[children]
            values = np.repeat(trie.value[children], count)
            among = advantages(values, self.scale_rewards)
            advantage[children] = among[np.cumsum(count) - count]
        advantage = advantage[segment_heads(trie)]
        return on_tokens(trie, [advantage[path] for path in trie.paths], per_length(trie), kl=self.beta != 0)
