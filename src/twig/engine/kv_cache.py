"""Keys and values of earlier tokens: a buffer that is written in place, and a fixed prefix.

Knows nothing of models but that their layers call `update`. Legend: B rows.
"""

from collections.abc import Iterator
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
        """Writes a layer's new keys and values; returns all that are filled, these included."""
        stop = self.filled + keys.shape[2]
        k, v = self.keys[layer], self.values[layer]
        if k is None or v is None:
            shape = (keys.shape[0], keys.shape[1], self.capacity)
            k = self.keys[layer] = keys.new_empty(*shape, keys.shape[3])
            v = self.values[layer] = values.new_empty(*shape, values.shape[3])
        k[:, :, self.filled : stop] = keys
        v[:, :, self.filled : stop] = values
        return k[:, :, :stop], v[:, :, :stop]

    def select(self, rows: Int[Tensor, " B2"], capacity: int | None = None) -> "KeyValueCache":
        """Returns a cache of the given rows (repeats allowed), with room for `capacity` tokens."""
        chosen = KeyValueCache(len(self.keys), capacity or self.capacity)
        chosen.filled = self.filled
        chosen.keys = [
            copy_rows(buffer, rows, self.filled, chosen.capacity) for buffer in self._written(self.keys)
        ]
        chosen.values = [
            copy_rows(buffer, rows, self.filled, chosen.capacity) for buffer in self._written(self.values)
        ]
        return chosen

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Returns the keys and values of every layer."""
        return list(zip(self._written(self.keys), self._written(self.values), strict=True))

    def keep(self, rows: Int[Tensor, " B2"]) -> None:
        """Keeps only the given rows. One layer at a time, so that there are never two caches."""
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(self._written(buffers)):
                buffers[layer] = copy_rows(buffer, rows, self.filled, self.capacity)

    def _written(self, buffers: list[Tensor | None]) -> Iterator[Tensor]:
        """Yields the buffers, one per layer; all layers have run."""
        for buffer in buffers:
            assert buffer is not None, "a layer wrote no keys and values"
            yield buffer


class StopForward(Exception):
    """Raised once a layer's keys and values are computed: the rest of the layer need not run."""


@dataclass
class PrefixKV:
    """A cache whose earlier tokens are fixed: `pairs` has their keys and values by layer, for one row.

    The layers get these in front of their own. Nothing is written, so layers can run again, and gradients
    flow to both. `computed` collects what the layers computed themselves; after that of layer `stop_at`,
    `update` raises `StopForward`. `own` False gives the layers their `pairs` alone, for every row as it is.
    """

    pairs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    computed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    stop_at: int | None = None
    own: bool = True

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Collects a layer's own keys and values; returns the prefix's and these."""
        self.computed[layer] = keys, values
        if layer == self.stop_at:
            raise StopForward
        if layer not in self.pairs:
            return keys, values
        if not self.own:
            return self.pairs[layer]
        first_keys, first_values = (prefix.expand(len(keys), -1, -1, -1) for prefix in self.pairs[layer])
        return torch.cat((first_keys, keys), 2), torch.cat((first_values, values), 2)


def copy_rows(buffer: Tensor, rows: Tensor, filled: int, capacity: int) -> Tensor:
    """Copies rows of a buffer into one with room for `capacity` tokens, of which `filled` are there."""
    copy = buffer.new_empty(len(rows), buffer.shape[1], capacity, buffer.shape[3])
    copy[:, :, :filled] = buffer[rows, :, :filled]
    return copy
