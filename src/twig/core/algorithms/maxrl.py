"""MaxRL: RLOO's cousin that divides by the mean reward, so that hard prompts count more."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from twig.core.algorithms.base import Credit, TopEntropy, advantages, arxiv_entry, on_tokens
from twig.core.trie import PrefixTrie, rounding


class MaxRl(TopEntropy):
    """Every token of completion i gets (R_i - mean) / (G mean), 0 if the mean is 0. MaxRL, arXiv 2602.02710.

    The paper's estimator with its control variate and algorithm 1, for rewards of 0 and 1: the average score
    of the right completions, less that of all. In expectation it is the gradient of a truncated
    log-likelihood of being right. As in RLOO, a completion is one action: no length divides, and a batch
    serves one optimizer step.
    """

    title: ClassVar = "MaxRL"
    summary: ClassVar = (
        "a completion's reward less the mean of its prompt, divided by that mean, goes to the whole of it"
    )
    citation: ClassVar = arxiv_entry(
        "tajwar2026maximum",
        "Maximum Likelihood Reinforcement Learning",
        "Tajwar, Fahim and Zeng, Guanning and others",
        "2602.02710",
    )

    name: Literal["maxrl"] = "maxrl"
    num_iterations: Literal[1] = Field(default=1, description="One: the estimator is for fresh samples.")

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Returns (R_i - mean) / mean summed over completions, / G."""
        mean = float(trie.rewards.mean())
        # A mean below 0 would turn every sign: the method is for rewards of 0 and 1.
        scale = 1 / mean if mean > rounding(trie.rewards) else 0.0
        return on_tokens(trie, advantages(trie.rewards, "none") * scale, [1.0] * trie.num_completions)
