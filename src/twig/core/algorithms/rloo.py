"""RLOO: a completion is one action, measured against the others of its group."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from twig.core.algorithms.base import Credit, TopEntropy, advantages, arxiv_entry, on_tokens
from twig.core.trie import PrefixTrie


class Rloo(TopEntropy):
    """Every token of completion i gets (R_i - the mean of the other rewards) / G. RLOO, arXiv 2402.14740.

    A completion is one action: its log-prob is the sum over its tokens, so no length divides, and its ratio
    is that of the whole completion, so a batch serves one optimizer step.
    """

    title: ClassVar = "RLOO"
    summary: ClassVar = (
        "a completion's reward less the mean of the other completions of its prompt goes to the whole of it"
    )
    citation: ClassVar = arxiv_entry(
        "ahmadian2024back",
        "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
        "Ahmadian, Arash and others",
        "2402.14740",
    )

    name: Literal["rloo"] = "rloo"
    num_iterations: Literal[1] = Field(
        default=1, description="One: the ratio is that of the whole completion."
    )

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Returns R_i less the mean of the other rewards, summed over completions, / G."""
        others = max(trie.num_completions - 1, 1)
        advantage = advantages(trie.rewards, "none") * trie.num_completions / others
        return on_tokens(trie, advantage, [1.0] * trie.num_completions)
