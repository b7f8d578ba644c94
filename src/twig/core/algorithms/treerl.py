"""TreeRL: a step between two forks is measured against the prompt and against the step before."""

from typing import ClassVar, Literal

import numpy as np

from twig.core.algorithms.base import (
    Credit,
    KlTerm,
    TopEntropy,
    arxiv_entry,
    on_tokens,
    per_length,
    segment_heads,
)
from twig.core.trie import PrefixTrie


class TreeRl(TopEntropy, KlTerm):
    """Completion i adds ((V(s) - V(root)) + (V(s) - V(parent of s))) / sqrt(count(s)) over G |o_i|.

    TreeRL, arXiv 2506.11902: global advantage plus local advantage of the step s that a token is in, less the
    more completions repeat it. A step is the part between two forks. The paper's trees are sampled on
    purpose, by branching where the entropy is high; these are what independent samples have in common.
    """

    title: ClassVar = "TreeRL"
    summary: ClassVar = (
        "the tokens between two forks get the mean reward of the completions that share them, relative to "
        "all of their prompt and to those that came as far as the fork before"
    )
    citation: ClassVar = arxiv_entry(
        "hou2025treerl",
        "TreeRL: LLM Reinforcement Learning with On-Policy Tree Search",
        "Hou, Zhenyu and Hu, Ziniu and Li, Yujiang and Lu, Rui and Tang, Jie and Dong, Yuxiao",
        "2506.11902",
    )

    name: Literal["treerl"] = "treerl"

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Returns both advantages over sqrt(count) and |o_i|, summed over completions, / G."""
        before = trie.value[trie.parent.clip(min=0)[segment_heads(trie)]]
        both = (trie.value - trie.value[0]) + (trie.value - before)
        advantage = both / np.sqrt(trie.count)
        return on_tokens(trie, [advantage[path] for path in trie.paths], per_length(trie), kl=self.beta != 0)
