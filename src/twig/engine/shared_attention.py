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
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "twig_shared"  # in transformers' interface


@dataclass(frozen=True)
class Groups:
    """Which rows share a table of keys.

    `rows` [P, M] has the rows of each table, row 0 again where a table has fewer than the largest; row n is
    at `place[n]` in it, flattened.
    """

    rows: Int[Tensor, "P M"]
    place: Int[Tensor, " N"]

    @classmethod
    def of(cls, table: Int[np.ndarray, " N"], count: int, device: torch.device) -> "Groups":
        """Returns the groups of rows that each use one of `count` tables, made on the host."""
        sizes = np.bincount(table, minlength=count)
        order = np.argsort(table, kind="stable")
        sorted_table = table[order]
        number = np.arange(len(table)) - (np.cumsum(sizes) - sizes)[sorted_table]
        rows, place = np.zeros((count, sizes.max()), np.int64), np.empty(len(table), np.int64)
        rows[sorted_table, number] = order
        place[order] = sorted_table * rows.shape[1] + number
        return cls(torch.from_numpy(rows).to(device), torch.from_numpy(place).to(device))


@dataclass(frozen=True)
class KeyPart:
    """A part of the keys: who shares it (None: each row has its own), and its additive mask [P or 1, S]."""

    groups: Groups | None
    mask: Float[Tensor, "P S"] | None


def attend_parts(
    module: nn.Module,
    query: Float[Tensor, "N H 1 D"],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    attention_mask: Sequence[KeyPart],
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " H"] | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "N 1 H D"], None]:
    """Attention of one query a row over all parts of its keys, each [P, K, S, D], as transformers calls it.

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
    """Inside, the layers of a model with this `config` attend by `function`, registered as `name`."""
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, function)
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
