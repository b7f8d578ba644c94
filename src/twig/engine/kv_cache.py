"""Keys and values of earlier tokens: a buffer that is written in place, and a fixed prefix.

Knows nothing of models but that their layers call `update`. Legend: M rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


class KeyValueCache:
    """Keys and values of up to `rows` rows of `capacity` tokens, in one buffer per layer, written in place.

    The layers call `update`, which writes behind what `filled` says is there, in as many of the first rows as
    it is given; the caller moves `filled` on once all layers have run. With `before`, tables of keys and
    values by layer that rows share, `update` returns a sequence of these and the rows' own, which only
    `shared_attention.attend_parts` can read.
    """

    def __init__(
        self,
        num_layers: int,
        capacity: int,
        rows: int,
        before: Sequence[Sequence[tuple[Tensor, Tensor]]] = (),
    ) -> None:
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.capacity, self.rows, self.before = capacity, rows, before
        self.filled = 0

    @classmethod
    def begun(cls, pairs: Sequence[tuple[Tensor, Tensor]], rows: int, capacity: int) -> "KeyValueCache":
        """Returns a cache whose first rows begin with the keys and values `pairs`, by layer."""
        cache = cls(len(pairs), capacity, rows)
        for layer, (keys, values) in enumerate(pairs):
            cache.update(keys, values, layer)
        cache.filled = pairs[0][0].shape[2]
        return cache

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[Any, Any]:
        """Writes a layer's new keys and values; returns all that are filled, these included."""
        own = self._write(self.keys, keys, layer), self._write(self.values, values, layer)
        if not self.before:
            return own
        shared_keys, shared_values = zip(*(part[layer] for part in self.before), strict=True)
        return (*shared_keys, own[0]), (*shared_values, own[1])

    def _write(self, buffers: list[Tensor | None], new: Tensor, layer: int) -> Tensor:
        count, heads, tokens, size = new.shape
        buffer, stop = buffers[layer], self.filled + tokens
        if buffer is None:
            buffer = buffers[layer] = new.new_empty(self.rows, heads, self.capacity, size)
        buffer[:count, :, self.filled : stop] = new
        return buffer[:count, :, :stop]

    def copy_rows(self, sources: Int[Tensor, " M"], targets: Int[Tensor, " M"]) -> None:
        """Copies rows to others, one buffer after another."""
        if len(sources) and self.filled:
            for buffer in (*self.keys, *self.values):
                assert buffer is not None, "a layer wrote no keys and values"
                buffer[targets, :, : self.filled] = buffer[sources, :, : self.filled]


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
