"""Keys and values of earlier tokens: a buffer that is written in place, and a prefix that is given.

Knows nothing of models but that their layers call `update`. Legend: B rows.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor


class KeyValueCache:
    """Keys and values of B rows for up to `capacity` tokens, in one buffer per layer, written in place.

    The layers call `update`, which writes behind what `filled` says is there; the caller moves `filled` on
    once all layers have run.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.capacity = capacity
        self.filled = 0

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        stop = self.filled + keys.shape[2]
        if self.keys[layer] is None:
            shape = (keys.shape[0], keys.shape[1], self.capacity)
            self.keys[layer] = keys.new_empty(*shape, keys.shape[3])
            self.values[layer] = values.new_empty(*shape, values.shape[3])
        k, v = self.keys[layer], self.values[layer]
        k[:, :, self.filled : stop] = keys
        v[:, :, self.filled : stop] = values
        return k[:, :, :stop], v[:, :, :stop]

    def select(self, rows: Int[Tensor, " B2"], capacity: int | None = None) -> "KeyValueCache":
        """A cache of the given rows (repeats allowed), with room for `capacity` tokens."""
        chosen = KeyValueCache(len(self.keys), capacity or self.capacity)
        chosen.filled = self.filled
        for source, target in ((self.keys, chosen.keys), (self.values, chosen.values)):
            target[:] = [copy_rows(buffer, rows, self.filled, chosen.capacity) for buffer in source]
        return chosen

    def keep(self, rows: Int[Tensor, " B2"]) -> None:
        """Leaves out all rows but the given ones. One layer at a time, so that there are never two caches."""
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                buffers[layer] = copy_rows(buffer, rows, self.filled, self.capacity)


class StopForward(Exception):
    """A layer's keys and values are known: the rest of the layer is not wanted."""


@dataclass
class PrefixKV:
    """What stands in for a cache where earlier tokens are given: `pairs` has their keys and values by layer,
    for one row, and the layers get them in front of their own. Nothing is written, so layers can run again,
    and gradients flow to both.

    `found` collects what the layers computed themselves; after that of layer `leave_at` it raises
    `StopForward`. `own` False gives the layers their `pairs` alone, for every row as it is.
    """

    pairs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    found: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    leave_at: int | None = None
    own: bool = True

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.found[layer] = keys, values
        if layer == self.leave_at:
            raise StopForward
        if layer not in self.pairs:
            return keys, values
        if not self.own:
            return self.pairs[layer]
        first = (given.expand(len(keys), -1, -1, -1) for given in self.pairs[layer])
        return tuple(torch.cat(pair, 2) for pair in zip(first, (keys, values), strict=True))


def copy_rows(buffer: Tensor, rows: Tensor, filled: int, capacity: int) -> Tensor:
    copy = buffer.new_empty(len(rows), buffer.shape[1], capacity, buffer.shape[3])
    copy[:, :, :filled] = buffer[rows, :, :filled]
    return copy
