"""Turns tries with credit into packs: what one forward and backward pass of the model reads.

Only the ancestors of nodes with credit are run, each once, however many completions share them. A pack is a
table of B rows and L columns; a row holds one or more segments, a segment is a prompt followed by part of its
trie in depth-first order. Token q sees token k of its row when k <= q < end(k), where `end` closes k's
subtree.

A pack may have a stem: tokens that come before each of its rows, whose keys and values are computed once for
all packs behind them. A trie that is cut into several packs has its prompt, but for the last token, as their
stem. Groups whose prompts begin alike share that beginning.

Numpy only: knows nothing of models. Legend: B rows, L columns, R head rows, N targets (weighted nodes).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from twig.core.algorithms.base import Credit
from twig.core.credit import Scored
from twig.core.trie import ROOT, PrefixTrie
from twig.core.types import Group

# Cells that a shared stem has to save, by kind of device. It is run by itself, twice: on a CPU that costs a
# tiny model as much as some hundred cells and larger ones less, on a GPU it takes launches.
LEAST_SAVED = {"cpu": 256, "mps": 256, "cuda": 8192}


@dataclass(frozen=True)
class Targets:
    """The weighted nodes that a pack computes, N entries each.

    `row` is the entry of `Pack.rows` whose next-token distribution the node belongs to, `token` the node's
    token; `group` and `node` say where it came from; `plus`, `minus`, `kl` are its weights.
    """

    row: np.ndarray
    token: np.ndarray
    group: np.ndarray
    node: np.ndarray
    plus: np.ndarray
    minus: np.ndarray
    kl: np.ndarray

    def __len__(self) -> int:
        return len(self.token)


@dataclass(frozen=True)
class Stem:
    """The first S tokens of a group's prompt, seen by all packs behind it; `cells` [S] as in `Pack`.

    If it is `shared`, the prompts of several groups begin with it, and `group` is one of them.
    """

    group: int
    ids: np.ndarray
    cells: np.ndarray | None
    shared: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def name(self) -> tuple[int, int]:
        """What tells the stems of a batch apart."""
        return self.group, len(self)


@dataclass(frozen=True)
class Pack:
    """One pass through the model. `ids`, `positions`, `ends` are [B, L]; unused cells see only themselves.

    `cells` [B, L] are rows of the boundary table (None if sampling recorded none). `rows` [R] are the flat
    indices b * L + l of the tokens whose next-token distribution is needed. The first `used` [B] cells of
    each row are in use. If the pack has a `stem`, its tokens come before the first column of every row.
    """

    ids: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    cells: np.ndarray | None
    rows: np.ndarray
    targets: Targets
    used: np.ndarray
    stem: Stem | None = None

    @property
    def num_tokens(self) -> int:
        """Cells in use."""
        return int(self.used.sum())

    @property
    def size(self) -> int:
        """Cells, with those that a shared stem saves: a pack in which each row begins with it has so many."""
        saved = len(self.ids) * len(self.stem) if self.stem and self.stem.shared else 0
        return self.ids.size + saved


@dataclass(frozen=True)
class _Segment:
    """The last `prompt` tokens of a prompt and the trie nodes that follow.

    `nodes` are depth-first, the root first; `heads` are those among them whose weighted children this segment
    computes.
    """

    group: int
    prompt: int
    nodes: np.ndarray
    heads: np.ndarray

    @property
    def length(self) -> int:
        # the root is the prompt's last token
        return self.prompt + len(self.nodes) - 1


def build_packs(
    scored: Sequence[Scored], size: int, share: bool = True, least_saved: int = LEAST_SAVED["cpu"]
) -> list[Pack]:
    """Returns packs of at most `size` cells that compute each weighted node of each group exactly once.

    A pack is never smaller than its longest path, so it may exceed `size` if one path does. Prompts that
    begin alike share a stem if that saves `least_saved` cells; if a pack has several rows, it counts in each.
    The packs of one stem follow each other. With `share=False` every path is a row of its own, prompt
    included: the plain batch, for models that cannot run a trie. The cut changes the gradient by rounding
    only. Empty if nothing has credit.
    """
    shared = _share_stems(scored, size, least_saved) if share else []
    taken = {segment.group for _, segments in shared for segment in segments}
    whole: list[_Segment] = []
    cut: list[Pack] = []
    for index, each in enumerate(scored):
        if index in taken:
            continue
        prompt = len(each.group.prompt_ids)
        segments = _cut(index, prompt, each.trie, each.credit.weighted, size, share)
        if any(segment.prompt < prompt for segment in segments):
            stem = _stem([index], prompt - 1, scored)
            cut += [_table(rows, scored, stem) for rows in _fill(segments, size, share)]
        else:
            whole += segments
    packs = [_table(rows, scored) for rows in _fill(whole, size, share)]
    for stem, segments in shared:
        packs += [_table(rows, scored, stem) for rows in _fill(segments, size, share, len(stem))]
    return packs + cut


def halves(pack: Pack, scored: Sequence[Scored], share: bool = True) -> list[Pack]:
    """Returns the same targets in packs of at most half its size; one pack if it is a single path.

    Stems are shared whatever that saves: the memory counts. A row behind one is cut.
    """
    size = pack.size if len(pack.ids) > 1 else pack.ids.size
    parts = []
    for index, each in enumerate(scored):
        mine = np.zeros(len(each.trie), bool)
        mine[pack.targets.node[pack.targets.group == index]] = True
        of = each.credit
        plus, minus, kl = (np.where(mine, weight, 0.0) for weight in (of.plus, of.minus, of.kl))
        parts.append(replace(each, credit=Credit(plus, minus, kl)))
    return build_packs(parts, max(size // 2, 1), share, least_saved=1)


def head_columns(pack: Pack) -> tuple[np.ndarray, np.ndarray]:
    """Returns the columns of the pack's head rows as a table, and the place of each head row in it.

    The table is [B, at most R], row by row; places are in the flattened table [R]. Left-over cells repeat
    column 0.
    """
    row, column = np.divmod(pack.rows, pack.ids.shape[1])
    order = np.argsort(row, kind="stable")
    counts = np.bincount(row, minlength=len(pack.ids))
    place = np.empty(len(row), np.int64)
    place[order] = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.zeros((len(pack.ids), int(counts.max())), np.int64)
    table[row, place] = column
    return table, row * table.shape[1] + place


def _cut(
    index: int, prompt: int, trie: PrefixTrie, weighted: np.ndarray, size: int, share: bool
) -> list[_Segment]:
    """Returns the needed part of one trie as segments of at most `size` tokens, cut between paths.

    Shared ancestors behind the prompt repeat; without `share` the prompt does too.
    """
    marked = np.zeros(len(trie), bool)
    marked[trie.parent[weighted]] = True
    if not marked.any():
        return []
    below = np.concatenate([[0], np.cumsum(marked)])
    inside = below[trie.end] - below[:-1]  # marked nodes in each subtree
    needed = np.flatnonzero(inside)
    if share and prompt + len(needed) - 1 <= size:
        return [_Segment(index, prompt, needed, np.flatnonzero(marked))]
    if share:
        prompt = 1  # the rest is the stem
    else:
        size = 0

    leaves = np.flatnonzero(marked & (inside == 1))
    segments: list[_Segment] = []
    fresh, start = 0, 0  # the first node that no segment has, the first leaf of this segment
    ancestors = _ancestors(trie, int(leaves[0]))
    length = prompt + len(ancestors) - 1
    for i in range(1, len(leaves) + 1):
        if i < len(leaves):
            grown = length + int(np.count_nonzero((needed > leaves[i - 1]) & (needed <= leaves[i])))
            if grown <= size:
                length = grown
                continue
        last = leaves[i - 1]
        nodes = np.union1d(ancestors, needed[(needed > leaves[start]) & (needed <= last)])
        heads = nodes[marked[nodes] & (nodes >= fresh)]
        segments.append(_Segment(index, prompt, nodes, heads))
        if i < len(leaves):
            fresh, start = last + 1, i
            ancestors = _ancestors(trie, int(leaves[i]))
            length = prompt + len(ancestors) - 1
    return segments


def _ancestors(trie: PrefixTrie, node: int) -> np.ndarray:
    """Returns the path from the root to `node`, both included."""
    path = [node]
    while path[-1] != ROOT:
        path.append(int(trie.parent[path[-1]]))
    return np.array(path[::-1], np.int64)


def _share_stems(scored: Sequence[Scored], size: int, least_saved: int) -> list[tuple[Stem, list[_Segment]]]:
    """Returns stems that save `least_saved` cells, each with what of its groups comes behind it."""
    whole: list[_Segment] = []
    for index, each in enumerate(scored):
        whole += _cut(index, len(each.group.prompt_ids), each.trie, each.credit.weighted, sys.maxsize, True)
    shared = []
    for groups, length in _bundles({s.group: scored[s.group].group.prompt_ids for s in whole}, least_saved):
        behind = [replace(s, prompt=s.prompt - length) for s in whole if s.group in groups]
        behind = [segment for segment in behind if segment.length <= size]  # others are cut
        if (len(behind) - 1) * length >= least_saved:
            shared.append((_stem([segment.group for segment in behind], length, scored), behind))
    return shared


def _bundles(prompts: dict[int, np.ndarray], least_saved: int) -> list[tuple[list[int], int]]:
    """Returns groups that may share a stem, and its length: the tokens with which their prompts begin.

    Sorted prompts have the longest beginning in common with a neighbour. A bundle is divided where that is
    shortest if its parts save more cells. Each prompt keeps its last token, the root of its trie.
    """
    ordered = sorted(prompts, key=lambda group: prompts[group].tolist())
    alike = [_in_common(prompts[a], prompts[b]) for a, b in pairwise(ordered)]

    def best(first: int, last: int) -> tuple[int, list[tuple[list[int], int]]]:
        """Returns the cells that bundles of some neighbours save, and the bundles."""
        if first >= last:
            return 0, []
        common = min(alike[first:last])
        ends = [place for place in range(first, last) if alike[place] == common] + [last]
        parts = [best(start, end) for start, end in zip([first, *(e + 1 for e in ends)], ends, strict=False)]
        apart, together = sum(saved for saved, _ in parts), (last - first) * common
        if together >= max(apart, least_saved):
            return together, [(ordered[first : last + 1], common)]
        return apart, [bundle for _, bundles in parts for bundle in bundles]

    return best(0, len(ordered) - 1)[1]


def _in_common(one: np.ndarray, other: np.ndarray) -> int:
    """Returns how many tokens two prompts begin with, without the last token of either."""
    most = min(len(one), len(other)) - 1
    differs = np.flatnonzero(one[:most] != other[:most])
    return int(differs[0]) if len(differs) else most


def _fill(segments: list[_Segment], size: int, share: bool, stem: int = 0) -> list[list[list[_Segment]]]:
    """Fills packs of rows of segments by first-fit decreasing; rows are as long as the longest segment.

    A row counts as if it began with `stem` tokens: what a layer computes for a row's attention has them.
    """
    packs: list[list[list[_Segment]]] = []
    free: list[int] = []  # of each row of the last pack
    width = 0
    for segment in sorted(segments, key=lambda s: -s.length):
        room = next((i for i, left in enumerate(free) if left >= segment.length), None) if share else None
        if room is not None:
            packs[-1][room].append(segment)
            free[room] -= segment.length
        elif packs and (len(free) + 1) * (stem + width) <= size:
            packs[-1].append([segment])
            free.append(width - segment.length)
        else:
            width = segment.length
            packs.append([[segment]])
            free = [0]
    return packs


def _table(rows: list[list[_Segment]], scored: Sequence[Scored], stem: Stem | None = None) -> Pack:
    width = max(sum(s.length for s in row) for row in rows)
    shape = (len(rows), width)
    recorded = all(len(scored[s.group].group.prompt_cells) for row in rows for s in row)
    recorded = recorded and (stem is None or stem.cells is not None)
    ids, positions, cells = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    ends = np.broadcast_to(np.arange(1, width + 1), shape).copy()
    head_rows, targets = [], []
    for b, row in enumerate(rows):
        column = 0
        for segment in row:
            here = slice(column, column + segment.length)
            source = scored[segment.group]
            group, trie = source.group, source.trie
            prompt, whole = segment.prompt, len(group.prompt_ids)
            tail = slice(whole - prompt, whole)
            ids[b, here] = np.concatenate([group.prompt_ids[tail], trie.token[segment.nodes[1:]]])
            positions[b, here] = np.concatenate(
                [np.arange(whole)[tail], whole - 1 + trie.depth[segment.nodes[1:]]]
            )
            # the root is the prompt's last token: it and those before it see the whole segment below them
            close = np.searchsorted(segment.nodes, trie.end[segment.nodes]) + prompt - 1
            ends[b, here] = column + np.concatenate([np.full(prompt - 1, segment.length), close])
            if recorded:
                cells[b, here] = np.concatenate(
                    [group.prompt_cells[tail], _node_cells(group, trie, segment.nodes[1:])]
                )
            at = column + prompt - 1 + np.searchsorted(segment.nodes, segment.heads)
            targets.append(_targets(segment, trie, source.credit, sum(len(r) for r in head_rows)))
            head_rows.append(b * width + at)
            column += segment.length
    used = np.array([sum(s.length for s in row) for row in rows])
    joined = Targets(*(np.concatenate(columns) for columns in zip(*targets, strict=True)))
    return Pack(
        ids,
        positions,
        ends,
        cells if recorded else None,
        np.concatenate(head_rows),
        joined,
        used,
        stem,
    )


def _stem(groups: Sequence[int], length: int, scored: Sequence[Scored]) -> Stem:
    """Returns the first tokens of the groups' prompts, with the first group's cells if all have some."""
    group, recorded = scored[groups[0]].group, all(len(scored[n].group.prompt_cells) for n in groups)
    cells = group.prompt_cells[:length] if recorded else None
    return Stem(groups[0], group.prompt_ids[:length], cells, len(groups) > 1)


def _node_cells(group: Group, trie: PrefixTrie, nodes: np.ndarray) -> np.ndarray:
    """Returns the boundary rows of trie nodes: those of a completion that continues after the node."""
    return np.concatenate([c.cells for c in group.completions])[trie.position(nodes)]


def _targets(segment: _Segment, trie: PrefixTrie, credit: Credit, first_row: int) -> tuple[np.ndarray, ...]:
    """Returns the weighted children of the segment's heads, as the columns of `Targets`."""
    is_head = np.zeros(len(trie), bool)
    is_head[segment.heads] = True
    nodes = np.flatnonzero(credit.weighted)
    nodes = nodes[is_head[trie.parent[nodes]]]
    row = first_row + np.searchsorted(segment.heads, trie.parent[nodes])
    group = np.full(len(nodes), segment.group, np.int64)
    return row, trie.token[nodes], group, nodes, credit.plus[nodes], credit.minus[nodes], credit.kl[nodes]
