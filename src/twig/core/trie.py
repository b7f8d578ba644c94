"""The prefix trie of a group: credit, compute and sight all rest on it.

A node is one (prefix, next token) pair. Node 0 is the root, the end of the prompt, through which every
completion passes. Nodes are numbered in depth-first order, children by token id, so the trie does not depend
on the order of the completions, a subtree is a range of numbers, and a parent comes before its children.

Numpy only; knows nothing of models or algorithms.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

ROOT = 0
ROUNDING = 1e-9  # differences of rewards up to this share of the largest are rounding


def rounding(rewards: np.ndarray) -> float:
    """Returns the largest difference of two of `rewards`, or of their means, that is no signal."""
    return ROUNDING * float(np.abs(rewards).max(initial=0.0))


def without_rounding(values: np.ndarray) -> np.ndarray:
    """Returns `values` with those that differ by rounding only made equal, to the first of them.

    A sum of 0.1 or 1/3 divided by its count can differ from it in the last bit, and 0.1 + 0.2 differs from
    0.3: the difference of two such values would be spurious credit.

    >>> without_rounding(np.array([0.3, 0.1 + 0.2, 0.5])).tolist()
    [0.3, 0.3, 0.5]
    """
    if not len(values):
        return values
    order = np.argsort(values, kind="stable")
    new = np.diff(values[order], prepend=-np.inf) > rounding(values)
    first = np.minimum.reduceat(order, np.flatnonzero(new))
    snapped = np.empty_like(values)
    snapped[order] = values[first[np.cumsum(new) - 1]]
    return snapped


@dataclass(frozen=True)
class PrefixTrie:
    """A group of completions merged by common prefix. N is the number of nodes, the root included.

    Per node: `token` (root: -1), `parent` (root: -1), `depth` (root: 0; the first sampled token: 1), `count`
    (completions that pass through), `reward_sum` (sum of their rewards), `end` (the subtree of n is n ..
    end[n] - 1) and `owner` (a completion that passes through n and, if any does, continues after it). Per
    completion: `paths[i]` (its nodes, without the root), `rewards[i]` and `trained[i]` (False: it counts in
    means and values, and gets no weight of its own). `entropy`, if it was recorded, is per node that of the
    distribution from which its token was drawn (nats; root: NaN).

    >>> trie = PrefixTrie.build([[7, 8], [7, 9], [7]], [1.0, 0.0, 0.0])
    >>> trie.token.tolist(), trie.parent.tolist(), trie.count.tolist()
    ([-1, 7, 8, 9], [-1, 0, 1, 1], [3, 3, 1, 1])
    >>> trie.value.tolist()
    [0.3333333333333333, 0.3333333333333333, 1.0, 0.0]
    """

    token: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    count: np.ndarray
    reward_sum: np.ndarray
    end: np.ndarray
    owner: np.ndarray
    paths: list[np.ndarray]
    rewards: np.ndarray
    trained: np.ndarray
    entropy: np.ndarray | None = None

    @classmethod
    def build(
        cls,
        completions: Sequence[Sequence[int] | np.ndarray],
        rewards: Sequence[float] | np.ndarray,
        entropies: Sequence[np.ndarray] | None = None,
        trained: np.ndarray | None = None,
    ) -> "PrefixTrie":
        """Builds the trie of `completions` (token ids of any lengths, empty ones too) with one reward each.

        `entropies` are those of their tokens, if recorded; `trained` (None: all) as in the class.

        Sorted completions share each prefix with a neighbour, so row i adds exactly the nodes behind its
        longest common prefix with row i - 1: linear in the number of tokens after one sort.
        """
        rewards = without_rounding(np.asarray(rewards, np.float64))
        lengths = np.array([len(c) for c in completions], np.int64)
        assert len(lengths) == len(rewards) > 0, "one reward per completion, at least one completion"
        table, order = _sorted_rows(completions, int(lengths.max()))
        sizes = lengths[order]
        shared = np.zeros(len(table), np.int64)  # tokens in common with the row before
        differs = table[1:] != table[:-1]
        shared[1:] = np.where(differs.any(1), differs.argmax(1), sizes[1:])

        column = np.arange(table.shape[1] - 1)
        new = (column >= shared[:, None]) & (column < sizes[:, None])
        num_nodes = 1 + int(new.sum())
        ids = np.where(new, np.cumsum(new.ravel()).reshape(new.shape), 0)
        ids = _inherit(ids, shared)  # ids[i, t]: node of token t of sorted row i, 0 behind its end

        rows, columns = np.nonzero(new)
        token, parent, depth = (np.full(num_nodes, -1, np.int64) for _ in range(3))
        token[1:], depth[0], depth[1:] = table[rows, columns], 0, columns + 1
        parent[1:] = np.where(columns > 0, ids[rows, columns - 1], ROOT)

        paths = [ids[r, : sizes[r]] for r in np.argsort(order, kind="stable")]
        visited = np.concatenate(
            [np.zeros(len(paths), np.int64), *paths]
        )  # the root first, once per completion
        visitor = np.concatenate([np.arange(len(paths)), np.repeat(np.arange(len(paths)), lengths)])
        count = np.bincount(visited, minlength=num_nodes)
        # NOTE: bincount adds in the order given, so nodes visited by the same completions get the same bits.
        reward_sum = np.bincount(visited, weights=rewards[visitor], minlength=num_nodes)

        first_row = np.concatenate([[0], rows])  # a node is made by the first sorted row that has it
        made_before = np.concatenate([[1], 1 + np.cumsum(new.sum(1))])  # nodes made before each sorted row
        last_row = first_row + count - 1
        trie = cls(
            token,
            parent,
            depth,
            count,
            reward_sum,
            made_before[last_row + 1],
            order[last_row],
            paths,
            rewards,
            np.ones(len(paths), bool) if trained is None else trained,
        )
        if entropies is None:
            return trie
        recorded = np.concatenate(entropies)[trie.position(np.arange(1, num_nodes))]
        return replace(trie, entropy=np.concatenate([[np.nan], recorded]))

    def __len__(self) -> int:
        """Number of nodes, the root included."""
        return len(self.token)

    @property
    def num_completions(self) -> int:
        return len(self.paths)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each completion."""
        return np.array([len(p) for p in self.paths], np.int64)

    @property
    def recorded_entropy(self) -> np.ndarray:
        """The entropy of each node. Raises ValueError if none was recorded."""
        if self.entropy is None:
            raise ValueError("this trie has no entropies; pass entropies to PrefixTrie.build")
        return self.entropy

    @cached_property
    def value(self) -> np.ndarray:
        """V(n), the mean reward of the completions through n, `without_rounding`.

        So V is a reward itself if all completions through n have that reward, and the difference of two
        values, or of a value and a reward, is 0 or signal.
        """
        both = np.concatenate([self.rewards, self.reward_sum / self.count])
        return without_rounding(both)[len(self.rewards) :]

    def position(self, nodes: np.ndarray) -> np.ndarray:
        """Returns the places of the tokens of `nodes` (not the root) in the completions end to end."""
        first = np.cumsum(self.lengths) - self.lengths
        return first[self.owner[nodes]] + self.depth[nodes] - 1


def _sorted_rows(
    completions: Sequence[Sequence[int] | np.ndarray], longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the completions as sorted rows of a table, -1 behind their ends, and the order of the rows.

    The last column ends every row. Equal completions stay in their given order.
    """
    table = np.full((len(completions), longest + 1), -1, np.int64)
    for row, completion in zip(table, completions, strict=True):
        row[: len(completion)] = completion
    order = np.lexsort(table.T[::-1])
    return table[order], order


def _inherit(ids: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Returns `ids` with each row's first `shared` columns taken from the row before (already filled in)."""
    filled = ids.copy()
    for row in range(1, len(ids)):
        filled[row, : shared[row]] = filled[row - 1, : shared[row]]
    return filled
