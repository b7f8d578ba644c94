"""REINFORCE++: advantages that are normalised over the whole step, in place of a group."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from twig.core.algorithms.base import (
    Algorithm,
    Credit,
    Scale,
    Step,
    advantages,
    arxiv_entry,
    on_tokens,
)
from twig.core.trie import PrefixTrie, rounding


class ReinforcePlusPlus(Algorithm):
    """Every token gets (A_i - mean of A) / (std of A) / (trained tokens of the step). arXiv 2501.03262.

    Mean and std are over the tokens of the step, as in the paper's normalisation over the batch. A_i is
    R_i - the mean of its group ("REINFORCE++ with baseline", for several completions of a prompt), or R_i
    itself ("REINFORCE++"). The paper's penalty of the KL divergence is left out.
    """

    title: ClassVar = "REINFORCE++"
    summary: ClassVar = (
        "a completion's reward, relative to those of its prompt and then to the whole step, goes to all of "
        "its tokens"
    )
    citation: ClassVar = arxiv_entry(
        "hu2025reinforce",
        "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization",
        "Hu, Jian and Liu, Jason Klein and Xu, Haotian and Shen, Wei",
        "2501.03262",
    )

    name: Literal["reinforce-plus-plus"] = "reinforce-plus-plus"
    baseline: Literal["group", "none"] = Field(
        default="group",
        description="What is taken off a reward before the normalisation over the step: the mean of its "
        "group or nothing.",
    )

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Returns R_i - mean at each token, summed over completions: a group that is a step by itself."""
        return self._credit(trie, advantages(trie.rewards, "none"))

    def scale(self, step: Step) -> Scale:
        """Returns the credits of all groups with the mean of the step taken off, and its std as divisor."""
        values = [self._values(trie) for trie in step.tries]
        tokens = [trie.lengths * trie.trained for trie in step.tries]
        total = sum(int(each.sum()) for each in tokens)
        if total == 0:
            return Scale(1.0)
        pairs = list(zip(values, tokens, strict=True))
        mean = sum(float(value @ count) for value, count in pairs) / total
        noise = max(rounding(trie.rewards) for trie in step.tries)
        centred = [np.where(np.abs(value - mean) > noise, value - mean, 0.0) for value in values]
        variance = sum(float(value**2 @ count) for value, count in zip(centred, tokens, strict=True)) / total
        credits = [self._credit(trie, value) for trie, value in zip(step.tries, centred, strict=True)]
        return Scale(total * (variance**0.5 + 1e-8), credits=credits)

    def _values(self, trie: PrefixTrie) -> np.ndarray:
        return advantages(trie.rewards, "none") if self.baseline == "group" else trie.rewards

    def _credit(self, trie: PrefixTrie, values: np.ndarray) -> Credit:
        return on_tokens(trie, values, [float(trie.num_completions)] * trie.num_completions)
