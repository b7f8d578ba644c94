"""Which completions of a wave read the same so far: a prefix that they share is run through the model once.

A branch is a prefix that at least one unfinished completion has, and one row in every layer's cache. When its
completions draw different tokens it splits; rows whose branches ended are taken by others, so that the
branches always have the first rows.

Knows nothing of models. Legend: A unfinished completions, N branches.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Split:
    """Branches after their newest tokens: `tokens` [N], and the branch `parents` [N] that each continues.

    `branch` [A] has the branch of each completion. Rows `sources` of the cache are to be copied to `targets`,
    all at once: no row is both.
    """

    branch: Int[np.ndarray, " A"]
    tokens: Int[np.ndarray, " N"]
    parents: Int[np.ndarray, " N"]
    sources: Int[np.ndarray, " M"]
    targets: Int[np.ndarray, " M"]


def split(branch: Int[np.ndarray, " A"], tokens: Int[np.ndarray, " A"]) -> Split:
    """Returns the branches of completions that were in `branch` and drew `tokens`.

    >>> split(np.array([0, 0, 2]), np.array([7, 8, 7]))  # branch 1 has ended, and 2 moves to its row
    Split(branch=array([0, 1, 2]), ...
    """
    width = int(tokens.max(initial=0)) + 1
    # Pairs as numbers, which sort as the pairs do.
    pairs, which = np.unique(branch * width + tokens, return_inverse=True)
    (parents, newest), count = np.divmod(pairs, width), len(pairs)
    # The first continuation of a branch stays in its row, if that is one of the first.
    stays = np.diff(parents, prepend=-1) > 0
    stays &= parents < count
    taken = np.zeros(count, bool)
    taken[parents[stays]] = True
    rows = np.empty(count, np.int64)
    rows[stays] = parents[stays]
    rows[~stays] = np.flatnonzero(~taken)
    order = np.argsort(rows)
    return Split(rows[which], newest[order], parents[order], parents[~stays], rows[~stays])
