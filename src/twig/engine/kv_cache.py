"""Keys, values and states of earlier tokens: a buffer written in place, a fixed prefix, rows of a boundary.

Knows nothing of models but that their layers call `update`. Legend: M rows of a buffer, B x L a table of
tokens, D hidden, W boundary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twig.engine.mixers.mixer import Mixer, Own, State
from twig.engine.mixers.runs import Runs

_BLOCK = 2**26  # bytes: the C library cuts only what has less than 2**25 from its heap


class Buffers:
    """Memory for a table of keys, values or states of each of `count` layers.

    On a CPU, tables of one shape are cut from large blocks, which the C library returns to the system once
    they are free, and whose pages count once they are written to. One by one they would lie between what the
    layers take and give back, where more and more memory could then not be used again.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._free: dict[tuple[torch.dtype, torch.Size], list[Tensor]] = {}

    def table(self, rows: int, like: Tensor, *sizes: int) -> Tensor:
        """Returns an empty table of `rows`, each of `sizes`, of the dtype and on the device of `like`."""
        if like.device.type != "cpu":
            return like.new_empty(rows, *sizes)
        kind = like.dtype, torch.Size((rows, *sizes))
        if not self._free.get(kind):
            size = kind[1].numel() * like.element_size()
            together = min(-(-_BLOCK // max(size, 1)), 2 * self._count)
            self._free[kind] = list(like.new_empty(together, rows, *sizes).unbind())
        return self._free[kind].pop()


class KeyValueCache:
    """Keys and values of up to `rows` rows of `capacity` tokens, in one buffer per layer, written in place.

    The layers call `update`, which writes behind what `filled` says is there, in as many of the first rows as
    it is given; the caller moves `filled` on once all layers have run. With `before`, tables of keys and
    values by layer that rows share, `update` returns a sequence of these and the rows' own, which only
    `shared_attention.attend_parts` can read. `states` are those of the rows, of layers that keep any.
    """

    def __init__(
        self,
        num_layers: int,
        capacity: int,
        rows: int,
        before: Sequence[Sequence[tuple[Tensor, ...]]] = (),
    ) -> None:
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.capacity, self.rows, self.before = capacity, rows, before
        self.states: dict[int, State] = {}
        self.filled = 0
        self._buffers = Buffers(num_layers)

    @classmethod
    def begun(cls, pairs: Sequence[tuple[Tensor, ...]], rows: int, capacity: int) -> "KeyValueCache":
        """Returns a cache whose first rows begin with the keys and values `pairs` of the layers, if any."""
        cache = cls(len(pairs), capacity, rows)
        for layer, pair in enumerate(pairs):
            if pair:
                cache.update(pair[0], pair[1], layer)
        cache.filled = next((pair[0].shape[2] for pair in pairs if pair), 0)
        return cache

    def begin_states(self, states: dict[int, State]) -> None:
        """Begins the first rows with `states`, by layer."""
        for layer, state in states.items():
            self.states[layer] = tuple(each.new_zeros(self.rows, *each.shape[1:]) for each in state)
            for buffer, each in zip(self.states[layer], state, strict=True):
                buffer[: len(each)] = each

    def mix(self, mixer: Mixer, own: Own, layer: int, hidden: Tensor, runs: Runs | None) -> Tensor:
        """Runs a mixer on the next token of the first rows; their states move on."""
        before = tuple(buffer[: len(hidden)] for buffer in self.states[layer])
        output, ended = mixer.call(own, hidden, before)
        for buffer, state in zip(before, ended, strict=True):
            if state is not buffer:  # the path of a single token writes it
                buffer.copy_(state)
        return output

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[Any, Any]:
        """Writes a layer's new keys and values; returns all that are filled, these included."""
        own = self._write(self.keys, keys, layer), self._write(self.values, values, layer)
        if not self.before:
            return own
        shared_keys, shared_values = zip(*(part[layer][:2] for part in self.before), strict=True)
        return (*shared_keys, own[0]), (*shared_values, own[1])

    def _write(self, buffers: list[Tensor | None], new: Tensor, layer: int) -> Tensor:
        count, heads, tokens, size = new.shape
        buffer, stop = buffers[layer], self.filled + tokens
        if buffer is None:
            buffer = buffers[layer] = self._buffers.table(self.rows, new, heads, self.capacity, size)
        buffer[:count, :, self.filled : stop] = new
        return buffer[:count, :, :stop]

    def newest(self, layer: int, rows: int) -> tuple[Tensor, ...]:
        """Returns a layer's keys and values of the token that is being written, in the first `rows` rows."""
        pair = (self.keys[layer], self.values[layer])
        return tuple(each[:rows, :, self.filled : self.filled + 1] for each in pair if each is not None)

    def copy_rows(self, sources: Int[Tensor, " M"], targets: Int[Tensor, " M"]) -> None:
        """Copies rows to others, one buffer after another."""
        if not len(sources):
            return
        for buffer in (*self.keys, *self.values):
            if buffer is not None and self.filled:
                buffer[targets, :, : self.filled] = buffer[sources, :, : self.filled]
        for buffer in (each for state in self.states.values() for each in state):
            buffer[targets] = buffer[sources]


class StopForward(Exception):
    """Raised once a layer's keys and values are computed: the rest of the layer need not run."""


@dataclass
class PrefixKV:
    """A cache whose earlier tokens are fixed: `pairs` has what they left in each layer, for one row.

    These are keys and values, if the layer attends, and behind them its state, if it keeps one. The layers
    get these in front of their own. Nothing is written, so layers can run again, and gradients flow to both.
    `computed` collects the layers' own keys and values, `ended` their states, of the first time only: what a
    checkpointed layer gives when it runs again would keep its activations alive. After those of layer
    `stop_at`, `StopForward` is raised. `own` False gives the layers their `pairs` alone, for every row.
    """

    pairs: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    computed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    ended: dict[int, State] = field(default_factory=dict)
    stop_at: int | None = None
    own: bool = True

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Collects a layer's own keys and values; returns the prefix's and these."""
        self._collect(self.computed, layer, (keys, values))
        if layer == self.stop_at:
            raise StopForward
        if layer not in self.pairs:
            return keys, values
        if not self.own:
            return self.pairs[layer][0], self.pairs[layer][1]
        first_keys, first_values = (prefix.expand(len(keys), -1, -1, -1) for prefix in self.pairs[layer][:2])
        return torch.cat((first_keys, keys), 2), torch.cat((first_values, values), 2)

    def mix(self, mixer: Mixer, own: Own, layer: int, hidden: Tensor, runs: Runs | None) -> Tensor:
        """Runs a mixer over a table of trees behind the prefix; collects the states in which its rows end."""
        assert runs is not None, "a layer that keeps a state is run in parts"
        before = self.pairs.get(layer, ())[2 if mixer.attends else 0 :]
        output, ended = mixer.over_tree(own, runs, before, hidden)
        self._collect(self.ended, layer, ended)
        if layer == self.stop_at and not mixer.attends:
            raise StopForward
        return output

    def collected(self) -> dict[int, tuple[Tensor, ...]]:
        """Returns what the layers computed, as `pairs` takes it."""
        layers = self.computed.keys() | self.ended.keys()
        return {
            layer: (*self.computed.get(layer, ()), *self.ended.get(layer, ())) for layer in sorted(layers)
        }

    def _collect(self, collection: dict[int, Any], layer: int, tensors: tuple[Tensor, ...]) -> None:
        collection.setdefault(layer, tensors)


@dataclass(kw_only=True)
class PromptsKV(PrefixKV):
    """A cache of `rows` prompts that run some at a time, from row `first` on: it collects those of all.

    Each layer's are written where they stay, into tables of `buffers`.
    """

    rows: int
    buffers: Buffers
    first: int = 0

    def _collect(self, collection: dict[int, Any], layer: int, tensors: tuple[Tensor, ...]) -> None:
        if layer not in collection:
            collection[layer] = tuple(self.buffers.table(self.rows, x, *x.shape[1:]) for x in tensors)
        for table, new in zip(collection[layer], tensors, strict=True):
            table[self.first : self.first + len(new)] = new


@dataclass(frozen=True)
class Trunk:
    """The layers below `cut`, which have no adapter, and what a row of the boundary holds of a token.

    That is the trunk's output, `hidden` numbers. Behind it are keys and values of the trunk's layers in
    `taken`, if layers above take these for their own: by layer the heads, and the sizes of a key and a value.
    """

    cut: int
    hidden: int
    taken: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return sum(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        pairs = ((heads * key, heads * value) for heads, key, value in self.taken.values())
        return [self.hidden, *(size for pair in pairs for size in pair)]

    def joined(
        self, hidden: Float[Tensor, "B L D"], pairs: Mapping[int, tuple[Tensor, ...]]
    ) -> Float[Tensor, "B L W"]:
        """Returns the rows of a table of tokens, from the trunk's output and pairs [B, heads, L, size]."""
        if not self.taken:
            return hidden
        taken = (each for layer in self.taken for each in pairs[layer][:2])
        return torch.cat([hidden, *(each.transpose(1, 2).flatten(2) for each in taken)], -1)

    def split(
        self, rows: Float[Tensor, "B L W"]
    ) -> tuple[Float[Tensor, "B L D"], dict[int, tuple[Tensor, Tensor]]]:
        """Returns the trunk's output, and by layer the keys and values that `joined` put behind it."""
        if not self.taken:
            return rows, {}
        hidden, *parts = rows.split(self._sizes, -1)
        heads = (count for count, *_ in self.taken.values() for _ in range(2))
        each = [x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in zip(parts, heads, strict=True)]
        return hidden, dict(zip(self.taken, zip(each[::2], each[1::2], strict=True), strict=True))
