"""GRPO, the baseline: every token of a completion gets the completion's advantage."""

import numpy as np

from twig.config.schema import Algorithm
from twig.core.algorithms.base import Credit, advantages, on_tokens
from twig.core.trie import PrefixTrie


def grpo(trie: PrefixTrie, options: Algorithm, rng: np.random.Generator, trained: np.ndarray) -> Credit:
    """Every token of completion i gets A_i / (G |o_i|). GRPO, arXiv 2402.03300, eq. 3 and 4."""
    advantage = advantages(trie.rewards, options.scale_rewards)
    return on_tokens(trie, options, trained, advantage, [1 / max(len(path), 1) for path in trie.paths])
