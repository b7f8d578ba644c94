"""MC-GRPO: GRPO that measures a completion against the median of its group."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from twig.core.algorithms.base import Credit, TopEntropy, arxiv_entry, on_tokens
from twig.core.trie import PrefixTrie


class McGrpo(TopEntropy):
    """Every token of completion i gets (R_i - median) / (MAD + 1e-3) / ((G - 1) |o_i|). arXiv 2601.22582.

    MAD is the median of |R_j - median|. G is to be odd, one more than GRPO would have: one completion is the
    median, has no advantage and does not count, so G - 1 divides. Of an even number of values the median is
    the lower of the two in the middle. With rewards of two values the MAD is 0 in every group: then each
    completion of the minority gets 1000 times its difference, and the learning rate has to be lower.
    """

    title: ClassVar = "MC-GRPO"
    summary: ClassVar = (
        "a completion's reward, relative to the median of those of its prompt, goes to all of its tokens"
    )
    citation: ClassVar = arxiv_entry(
        "kim2026mcgrpo",
        "MC-GRPO: Median-Centered Group Relative Policy Optimization for Small-Rollout Reinforcement "
        "Learning",
        "Kim, Youngeun",
        "2601.22582",
    )

    name: Literal["mc-grpo"] = "mc-grpo"
    scale_rewards: Literal["mad", "none"] = Field(
        default="mad",
        description="Divide an advantage by the median absolute deviation of the rewards of its group, or by "
        "nothing.",
    )

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Returns the advantage over |o_i|, summed over completions, / (G - 1)."""
        from_median = trie.rewards - median(trie.rewards)
        if self.scale_rewards == "mad":
            from_median = from_median / (median(np.abs(from_median)) + 1e-3)
        others = max(trie.num_completions - 1, 1)
        share = [trie.num_completions / (others * max(len(path), 1)) for path in trie.paths]
        return on_tokens(trie, from_median, share)


def median(values: np.ndarray) -> float:
    """Returns the middle of the sorted values, the lower one if two are in the middle.

    >>> median(np.array([3.0, 1.0, 2.0, 9.0]))
    2.0
    """
    return float(np.sort(values)[(len(values) - 1) // 2])
