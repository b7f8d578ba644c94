"""TEMPO: GRPO with the step in value of each token added to the advantage."""

import numpy as np

from twig.config.schema import Algorithm
from twig.core.algorithms.base import Credit, advantages, on_tokens, reward_deviation
from twig.core.trie import PrefixTrie


def tempo(trie: PrefixTrie, options: Algorithm, rng: np.random.Generator, trained: np.ndarray) -> Credit:
    """GRPO with the step in value that the token makes added to the advantage: (R_i - mean + V(n) -
    V(parent(n))) / (std + 1e-4), over G |o_i|. TEMPO, arXiv 2509.18314.

    The step is 0 where completions do not part.
    """
    deviation = reward_deviation(trie.rewards, options.scale_rewards)
    step = np.append(0.0, trie.value[1:] - trie.value[trie.parent[1:]]) / deviation
    advantage = advantages(trie.rewards, options.scale_rewards)
    both = [a + step[path] for a, path in zip(advantage, trie.paths, strict=True)]
    return on_tokens(trie, options, trained, both, [1 / max(len(path), 1) for path in trie.paths])
