"""lambda-GRPO: GRPO in which what completions share counts once."""

from typing import ClassVar, Literal

import numpy as np

from twig.core.algorithms.base import Credit, KlTerm, ScaledRewards, TopEntropy, arxiv_entry, on_tokens
from twig.core.trie import PrefixTrie


class LambdaGrpo(TopEntropy, ScaledRewards, KlTerm):
    """GRPO with each token's share divided by count(n): A_i / (G |o_i| count(n)). arXiv 2509.21154.

    GRPO counts what is common to many completions many times; here a node counts once, with their mean.
    """

    title: ClassVar = "lambda-GRPO"
    summary: ClassVar = (
        "a completion's reward, relative to those of its prompt, goes to all of its tokens; what several "
        "completions have in common counts once"
    )
    citation: ClassVar = arxiv_entry(
        "sullivan2025grpo",
        "GRPO is Secretly a Process Reward Model",
        "Sullivan, Michael and Koller, Alexander",
        "2509.21154",
    )

    name: Literal["lambda-grpo"] = "lambda-grpo"

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Returns A_i / (|o_i| count(n)) summed over completions, / G."""
        share = [1 / (max(len(path), 1) * trie.count[path]) for path in trie.paths]
        return on_tokens(trie, self.advantages(trie), share, kl=self.beta != 0)
