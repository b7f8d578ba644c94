"""Cuts trees into parts without forks, level by level, for layers that keep a state.

A part starts from the state in which its parent ended; those that start from states of one level are run
together. The path of layers for a single token writes states in place, where autograd cannot follow: a part
that starts from a state has two tokens at least.

Knows nothing of models. Legend: B rows, L columns, S parts, T tokens of a part.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PartBatch:
    """Parts of a tree that start from states of one level and are run together.

    `cells` [S, T] are flat indices of the table's cells, with any cell behind a part's end. `kept` [N] are
    the flat places in it whose outputs count, `places` [N] their cells. `starts` [S] index the states of the
    level above (None at the top). The ends of the parts are states of this level if it `saves`.
    """

    cells: Tensor
    kept: Tensor
    places: Tensor
    starts: Tensor | None
    saves: bool


@dataclass(frozen=True)
class Runs:
    """How a table of trees is run in parts, level by level; `last` [B] are the rows' ends, if kept."""

    levels: list[list[PartBatch]]
    last: Tensor | None = None

    @classmethod
    def of(
        cls,
        ends: np.ndarray,
        used: np.ndarray,
        device: torch.device,
        begun: bool = False,
        ends_kept: bool = False,
    ) -> "Runs":
        """Returns the runs of a table [B, L] whose first `used` [B] cells of each row are trees.

        The subtree of cell k of a row is k .. end(k) - 1. With `begun`, something precedes each row. With
        `ends_kept` each row is one path, and its last state is kept.
        """
        parts = _parts(ends, used, begun, ends_kept)
        levels = []
        for level in range(1 + max((part.level for part in parts), default=0)):
            groups: dict[tuple[bool, int], list[_Part]] = defaultdict(list)
            for part in parts:
                if part.level == level and part.runs:
                    size = len(part.cells)
                    # the end of a part is a state only if nothing is behind it
                    groups[part.saves, size if part.saves else (size - 1).bit_length()].append(part)
            batches, slot = [], 0
            for (saves, _), group in sorted(groups.items()):
                for part in group if saves else []:
                    part.slot, slot = slot, slot + 1
                batches.append(_batch(group, begun or level > 0, level > 0, device))
            levels.append(batches)
        last = torch.tensor([part.slot for part in parts], device=device) if ends_kept else None
        return cls(levels, last)


@dataclass
class _Part:
    """Cells of a tree without a fork; the first is its parent's if that was too short for a state."""

    cells: list[int]
    own: int  # where the cells begin whose outputs this part gives
    level: int
    parent: "_Part | None"  # whose end it starts from
    saves: bool
    runs: bool = True
    given: bool = False  # a child has given its outputs
    slot: int = 0  # of its state, if it saves one


def _parts(ends: np.ndarray, used: np.ndarray, begun: bool, ends_kept: bool) -> list[_Part]:
    parts: list[_Part] = []
    for row, count in enumerate(used.tolist()):
        end = ends[row].tolist()
        parents, path = [], []
        for cell in range(count):
            while path and end[path[-1]] <= cell:
                path.pop()
            parents.append(path[-1] if path else -1)
            path.append(cell)
        children = np.bincount(np.array(parents, np.int64) + 1, minlength=count + 1)[1:]
        of_cell: dict[int, _Part] = {}
        first = 0
        while first < count:
            last = first
            while children[last] == 1 and parents[last + 1 : last + 2] == [last]:
                last += 1
            above = of_cell.get(parents[first])
            own = [row * ends.shape[1] + cell for cell in range(first, last + 1)]
            part = of_cell[last] = _part(own, above, bool(children[last]), begun, ends_kept)
            parts.append(part)
            first = last + 1
    return parts


def _part(own: list[int], above: _Part | None, has_children: bool, begun: bool, ends_kept: bool) -> _Part:
    if above is None or above.saves:
        lead, parent = [], above
        level = 0 if above is None else above.level + 1
        gives = 0
    else:  # a single token: it is run again at the head of each child, by the first one for its output
        lead, parent, level = above.cells, above.parent, above.level
        gives, above.given = len(lead) if above.given else 0, True
    cells = lead + own
    starts_fresh = parent is None and not begun
    saves = ends_kept or (has_children and (len(cells) > 1 or starts_fresh))
    return _Part(cells, gives, level, parent, saves, runs=saves or not has_children)


def _batch(parts: Sequence[_Part], begun: bool, below: bool, device: torch.device) -> PartBatch:
    # the path of a single token writes in place
    width = max(max(len(part.cells) for part in parts), 1 if parts[0].saves else 1 + begun)
    cells = np.zeros((len(parts), width), np.int64)
    kept, places = [], []
    for i, part in enumerate(parts):
        size = len(part.cells)
        cells[i] = part.cells + part.cells[-1:] * (width - size)
        kept += range(i * width + part.own, i * width + size)
        places += part.cells[part.own :]
    starts = None
    if below:
        starts = torch.tensor([part.parent.slot for part in parts if part.parent], device=device)
    outputs, cells_of = torch.tensor(kept, device=device), torch.tensor(places, device=device)
    return PartBatch(torch.from_numpy(cells).to(device), outputs, cells_of, starts, parts[0].saves)
