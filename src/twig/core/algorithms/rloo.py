"""RLOO: a completion is one action, measured against the others of its group."""

import numpy as np

from twig.config.schema import Algorithm
from twig.core.algorithms.base import Credit, advantages, on_tokens
from twig.core.trie import PrefixTrie


def rloo(trie: PrefixTrie, options: Algorithm, rng: np.random.Generator, trained: np.ndarray) -> Credit:
    """Every token of completion i gets (R_i - the mean of the other rewards) / G. RLOO, arXiv 2402.14740.

    A completion is one action: its log-prob is the sum over its tokens, so no length divides.
    """
    others = max(trie.num_completions - 1, 1)
    advantage = advantages(trie.rewards, "none") * trie.num_completions / others
    return on_tokens(trie, options, trained, advantage, [1.0] * trie.num_completions)
