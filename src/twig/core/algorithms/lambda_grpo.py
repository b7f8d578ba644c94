"""lambda-GRPO: GRPO in which what completions share counts once."""

import numpy as np

from twig.config.schema import Algorithm
from twig.core.algorithms.base import Credit, advantages, on_tokens
from twig.core.trie import PrefixTrie


def lambda_grpo(
    trie: PrefixTrie, options: Algorithm, rng: np.random.Generator, trained: np.ndarray
) -> Credit:
    """GRPO with each token's share divided by count(n), the completions through its node: A_i / (G |o_i|
    count(n)). lambda-GRPO, arXiv 2509.21154.

    GRPO counts what is common to many completions many times; here a node counts once, with their mean.
    """
    advantage = advantages(trie.rewards, options.scale_rewards)
    scale = [1 / (max(len(path), 1) * trie.count[path]) for path in trie.paths]
    return on_tokens(trie, options, trained, advantage, scale)
