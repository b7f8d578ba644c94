"""Attention over keys and values that several rows share, each table of them read once for its group.

A row's keys lie in parts: what all prompts begin with, the rest of its prompt, and its own. Each part has a
softmax of its own; the results are merged by their sums, which gives the softmax over all of them
(https://arxiv.org/abs/2205.14135). Scores and sums are float32 or better.

The layers hand keys, values and masks on to `attend_parts` as they are, so any layer that calls transformers'
attention interface is served. Knows nothing of sampling. Legend: N rows, P groups, M rows of a group, S keys,
H heads, K heads of keys, D head size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "twig_shared"  # in transformers' interface


@dataclass(frozen=True)
class Groups:
    """Which rows share a table of keys: `of_row` [N] has the table of each row."""

    of_row: Int[Tensor, " N"]
    count: int

    @cached_property
    def rows(self) -> Int[Tensor, "P M"]:
        """The rows of each group; a group with fewer than the largest repeats row 0."""
        rows = self.of_row.new_zeros(self.count, int(self._sizes.max()))
        rows[self.of_row[self._order], self._number] = self._order
        return rows

    @cached_property
    def place(self) -> Int[Tensor, " N"]:
        """Where each row is in `rows`, flattened."""
        place = torch.empty_like(self.of_row)
        place[self._order] = self.of_row[self._order] * self.rows.shape[1] + self._number
        return place

    @cached_property
    def _sizes(self) -> Int[Tensor, " P"]:
        return self.of_row.bincount(minlength=self.count)

    @cached_property
    def _order(self) -> Int[Tensor, " N"]:
        return self.of_row.argsort(stable=True)

    @cached_property
    def _number(self) -> Int[Tensor, " N"]:
        """The number of each row, in `_order`, within its group."""
        before = self._sizes.cumsum(0) - self._sizes
        return torch.arange(len(self.of_row), device=self.of_row.device) - before[self.of_row[self._order]]


@dataclass(frozen=True)
class KeyPart:
    """A part of the keys: who shares it (None: each row has its own), and its additive mask [P or 1, S]."""

    groups: Groups | None
    mask: Float[Tensor, "P S"] | None


def attend_parts(
    module: nn.Module,
    query: Float[Tensor, "N H 1 D"],
    key: Sequence[Float[Tensor, "P K S D"]],
    value: Sequence[Float[Tensor, "P K S D"]],
    attention_mask: Sequence[KeyPart],
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " H"] | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "N 1 H D"], None]:
    """Attention of one query a row over all parts of its keys, as transformers calls it.

    softmax(q K^T * scaling + mask) V; the soft cap comes before the mask, and sinks `s_aux` are a term of the
    denominator. Raises TypeError for terms that it does not know.
    """
    if kwargs.get("position_bias") is not None:
        raise TypeError("attention with position biases")
    rows, heads, _, size = query.shape
    kinds = key[0].shape[1]
    scaled = query.view(rows, kinds, heads // kinds, size) * (size**-0.5 if scaling is None else scaling)
    results = [
        _attend_part(scaled, k, v, part, softcap)
        for k, v, part in zip(key, value, attention_mask, strict=True)
    ]
    highest = torch.stack([result[0] for result in results]).amax(0)
    sinks = None
    if s_aux is not None:
        sinks = s_aux.to(highest.dtype).view(1, kinds, -1)
        highest = torch.maximum(highest, sinks)
    shrink = [torch.exp(result[0] - highest) for result in results]
    total = torch.zeros_like(highest) if sinks is None else torch.exp(sinks - highest)
    attended = torch.zeros_like(results[-1][2])
    for by, (_, weights, values) in zip(shrink, results, strict=True):
        total.addcmul_(by, weights)
        attended.addcmul_(by[..., None], values)
    attended = (attended / total[..., None]).to(query.dtype)
    return attended.view(rows, 1, heads, -1), None


def _attend_part(
    query: Float[Tensor, "N K G D"], key: Tensor, value: Tensor, part: KeyPart, softcap: float | None
) -> tuple[Float[Tensor, "N K G"], Float[Tensor, "N K G"], Float[Tensor, "N K G D"]]:
    """Returns each row's largest score, the sum of its weights relative to that, and that of its values."""
    rows, kinds, shared, _ = query.shape
    if part.groups is not None:  # the queries of a group become one matrix
        query = query[part.groups.rows].transpose(1, 2).reshape(len(key), kinds, -1, query.shape[-1])
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.transpose(2, 3).to(wide)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if part.mask is not None:
        scores = scores + part.mask[:, None, None]
    # finite, also where nothing is seen
    highest = scores.amax(-1).clamp(min=torch.finfo(wide).min)
    weights = torch.exp(scores - highest[..., None])
    results = highest, weights.sum(-1), weights @ value.to(wide)
    if part.groups is None:
        return results
    per_group = part.groups.rows.shape[1]
    back = [x.unflatten(2, (per_group, shared)).transpose(1, 2).flatten(0, 1) for x in results]
    highest, total, summed = (x[part.groups.place] for x in back)
    return highest, total, summed


@contextmanager
def attending(config: Any, name: str = _NAME, function: Callable = attend_parts) -> Iterator[None]:
    """Inside, the layers of a model with this `config` attend_parts by `function`, registered as `name`."""
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, function)
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
