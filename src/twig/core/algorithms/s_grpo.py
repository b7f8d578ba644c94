"""S-GRPO: a sample of a completion's tokens gets the completion's advantage."""

import numpy as np

from twig.config.schema import Algorithm
from twig.core.algorithms.base import Credit, advantages, on_tokens
from twig.core.trie import PrefixTrie


def s_grpo(trie: PrefixTrie, options: Algorithm, rng: np.random.Generator, trained: np.ndarray) -> Credit:
    """The tokens T_i of completion i get A_i / (G |T_i|), the others nothing. S-GRPO, arXiv 2504.20834.

    T_i holds every position t < alpha and, after those, each position with probability p, left to right,
    until it holds k. With `unbiased` (the form of arXiv 2603.06619), m of the later positions are drawn
    without replacement and their weight A_i / (G |o_i|) is multiplied by (|o_i| - alpha) / m, so that the
    expected weights are those of `grpo`.
    """
    if options.unbiased:
        return _unbiased_s_grpo(trie, options, rng, trained)
    draws = rng.random((trie.num_completions, int(trie.lengths.max(initial=0))))
    chosen = []
    for path, draw in zip(trie.paths, draws, strict=True):
        keep = draw[: len(path)] < options.p
        keep[: options.alpha] = True
        chosen.append(keep & (np.cumsum(keep) <= max(options.k, options.alpha)))
    scale = [1 / max(int(keep.sum()), 1) for keep in chosen]
    return on_tokens(trie, options, trained, advantages(trie.rewards, options.scale_rewards), scale, chosen)


def _unbiased_s_grpo(
    trie: PrefixTrie, options: Algorithm, rng: np.random.Generator, trained: np.ndarray
) -> Credit:
    draws = rng.random((trie.num_completions, int(trie.lengths.max(initial=0))))
    chosen, scale = [], []
    for path, draw in zip(trie.paths, draws, strict=True):
        later = len(path) - options.alpha
        keep, factor = np.ones(len(path), bool), np.ones(len(path))
        if later > 0:
            wanted = max(1, int(np.floor(options.p * later + 0.5)))
            m = min(options.k - options.alpha, wanted)
            keep[options.alpha :] = False
            keep[options.alpha + np.argsort(draw[options.alpha : len(path)], kind="stable")[:m]] = True
            factor[options.alpha :] = later / m
        chosen.append(keep)
        scale.append(factor / max(len(path), 1))
    return on_tokens(trie, options, trained, advantages(trie.rewards, options.scale_rewards), scale, chosen)
