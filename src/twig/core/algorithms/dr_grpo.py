"""Dr. GRPO: GRPO divided by one length for all, and by no standard deviation."""

import numpy as np

from twig.config.schema import Algorithm
from twig.core.algorithms.base import Credit, advantages, on_tokens
from twig.core.trie import PrefixTrie


def dr_grpo(trie: PrefixTrie, options: Algorithm, rng: np.random.Generator, trained: np.ndarray) -> Credit:
    """Every token of completion i gets (R_i - mean) / (G L), L the same for all. Dr. GRPO, arXiv 2503.20783.

    L is `divisor`, the longest length allowed: a long wrong completion is pushed down as much per token as a
    short one, and a group of nearly equal rewards as it is.
    """
    advantage = advantages(trie.rewards, "none")
    return on_tokens(trie, options, trained, advantage, [1 / options.divisor] * trie.num_completions)
