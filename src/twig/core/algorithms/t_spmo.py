"""T-SPMO: the tokens at which the completions of a group fork get credit."""

import numpy as np

from twig.config.schema import Algorithm
from twig.core.algorithms.base import Credit
from twig.core.trie import PrefixTrie


def t_spmo(trie: PrefixTrie, options: Algorithm, rng: np.random.Generator, trained: np.ndarray) -> Credit:
    """Each unique node n gets (V(n) - V(parent(n))) / |U|, once, however often it is visited. T-SPMO, arXiv
    2504.20834.

    U is the set of unique nodes of the group, or, with `normalise: branches` (ours), of those with non-zero
    credit. Nodes with the count of their parent get exactly 0: only forks have credit. The regulariser is the
    L2 norm of the adapter (`core.objective.shrink`), so there are no KL weights. A node that only untrained
    completions pass gets nothing.
    """
    weight = np.zeros(len(trie))
    weight[1:] = trie.value[1:] - trie.value[trie.parent[1:]]
    size = len(trie) - 1 if options.normalise == "unique" else np.count_nonzero(weight)
    weight /= max(size, 1)
    passed = np.zeros(len(trie), bool)
    for path, train in zip(trie.paths, trained, strict=True):
        passed[path] |= train
    weight[~passed] = 0
    return Credit(weight.clip(min=0), weight.clip(max=0), np.zeros(len(trie)))
