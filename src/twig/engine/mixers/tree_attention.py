"""Attention in a long pack without a mask: one run of tokens at a time, by the flash kernel.

A row of a pack is a trie in depth-first order. A chain is a part of it without forks: its tokens see all
chains above it, and of their own chain what comes before. Each of the two is a call of the kernel, and the
results are merged by their sums. Backwards the kernel gets the merged result and sums, of which alone the
gradient of a softmax over all keys depends (as in https://arxiv.org/abs/2310.01889). A mask would take L S
numbers, and the kernel would compute what it hides.

CPU only: on a GPU packs keep their masks. Knows nothing of models. Legend: L queries, S keys, P tokens of a
stem, H heads, D head size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "twig_tree"  # in transformers' interface
_CELLS = 2**20  # of a mask from which on chains are worth while
_LENGTH = 64  # tokens that a chain must have on average
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def is_long(ends: Int[np.ndarray, "B L"], stem: int) -> bool:
    """Tells whether chains are worth while: one row, so long that its mask is large, that forks seldom."""
    rows, length = ends.shape
    if rows > 1 or length * (stem + length) < _CELLS:
        return False
    return len(_starts(ends[0])) * _LENGTH <= length


@dataclass(frozen=True)
class Chains:
    """Who sees whom in one row: `parts` has (first query, behind the last, the keys above).

    `ends` [L] is that of the pack, `stem` the number P of keys that all queries see, `dtype` that of a mask.
    """

    ends: Int[Tensor, " L"]
    stem: int
    dtype: torch.dtype
    parts: tuple[tuple[int, int, Int[Tensor, " _"]], ...]

    @classmethod
    def of(cls, ends: Int[np.ndarray, " L"], stem: int, dtype: torch.dtype) -> "Chains":
        """Returns the chains of a row of a pack."""
        return cls(torch.from_numpy(ends), stem, dtype, tuple(_parts(ends, stem)))

    def at(self, columns: Int[Tensor, "1 R"]) -> Float[Tensor, "1 1 R S"]:
        """Returns the additive mask of some queries."""
        keys, query = torch.arange(len(self.ends)), columns[0][:, None]
        seen = (keys <= query) & (query < self.ends)
        seen = torch.cat([seen.new_ones(len(query), self.stem), seen], 1)
        mask = torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, float("-inf"))
        return mask[None, None]


def _starts(ends: Int[np.ndarray, " L"]) -> Int[np.ndarray, " C"]:
    """Returns where chains begin: where the token before is no parent, or has other children."""
    at = np.arange(1, len(ends))
    return np.concatenate([[0], 1 + np.flatnonzero((ends[:-1] <= at) | (ends[1:] < ends[:-1]))])


def _parts(ends: np.ndarray, stem: int) -> Iterator[tuple[int, int, Tensor]]:
    starts = _starts(ends)
    stops = np.append(starts[1:], len(ends))
    for number, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        above = [
            np.arange(first, last)
            for first, last in zip(starts[:number], stops[:number], strict=True)
            if ends[last - 1] > start
        ]
        keys = np.concatenate([np.arange(stem), *(stem + part for part in above)])
        yield start, stop, torch.from_numpy(keys)


def attend_tree(
    module: nn.Module,
    query: Float[Tensor, "B H L D"],
    key: Float[Tensor, "B K S D"],
    value: Float[Tensor, "B K S D"],
    attention_mask: Chains | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B L H D"], None]:
    """Attention of a row's queries as its `Chains` say, or by transformers' own function with a mask.

    Raises TypeError for terms that the kernel does not know.
    """
    if not isinstance(attention_mask, Chains):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if any(kwargs.get(term) is not None for term in ("softcap", "s_aux", "position_bias")):
        raise TypeError("attention with other terms than scores")
    shared = query.shape[1] // key.shape[1]
    key, value = (x if shared == 1 else x.repeat_interleave(shared, 1) for x in (key, value))
    attended = _TreeAttention.apply(query, key, value, attention_mask, scaling)
    return attended.transpose(1, 2), None


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, chains: Chains, scale: float | None
    ) -> Tensor:
        attended, totals = torch.empty_like(query), []
        for start, stop, above in chains.parts:
            queries = query[:, :, start:stop]
            own = slice(chains.stem + start, chains.stem + stop)
            result, total = _forward(queries, key[:, :, own], value[:, :, own], 0.0, True, scale=scale)
            if len(above):
                keys, values = _taken(key, above), _taken(value, above)
                more, more_total = _forward(queries, keys, values, 0.0, False, scale=scale)
                both = torch.logaddexp(total, more_total)
                result = result * _share(total, both) + more * _share(more_total, both)
                total = both
            attended[:, :, start:stop] = result
            totals.append(total)
        ctx.chains, ctx.scale = chains, scale
        ctx.save_for_backward(query, key, value, attended, *totals)
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        query, key, value, attended, *totals = ctx.saved_tensors
        chains, scale = ctx.chains, ctx.scale
        of_query, of_key, of_value = (torch.zeros_like(x) for x in (query, key, value))
        for (start, stop, above), total in zip(chains.parts, totals, strict=True):
            here, own = slice(start, stop), slice(chains.stem + start, chains.stem + stop)
            given = grad[:, :, here], query[:, :, here]
            result = attended[:, :, here], total, 0.0
            pulls = _backward(*given, key[:, :, own], value[:, :, own], *result, True, scale=scale)
            of_query[:, :, here] += pulls[0]
            of_key[:, :, own] += pulls[1]
            of_value[:, :, own] += pulls[2]
            if len(above):
                keys, values = _taken(key, above), _taken(value, above)
                pulls = _backward(*given, keys, values, *result, False, scale=scale)
                of_query[:, :, here] += pulls[0]
                of_key.index_add_(2, above, pulls[1])
                of_value.index_add_(2, above, pulls[2])
        return of_query, of_key, of_value, None, None


def _taken(table: Tensor, places: Tensor) -> Tensor:
    """Returns some tokens of a table: a view if they are its first ones."""
    count = len(places)
    if int(places[-1]) == count - 1:
        return table[:, :, :count]
    return table[:, :, places]


def _share(total: Tensor, both: Tensor) -> Tensor:
    return torch.exp(total - both)[..., None]
