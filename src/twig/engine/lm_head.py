"""The head in one pass: log-probs of chosen tokens and their gradient by the rows, without stored logits.

The vocabulary is read in chunks with an online softmax (https://arxiv.org/abs/1805.02867), so the logits of
one chunk at a time are alive and none is computed twice: the gradient of log Z, which is the expected row of
the head's matrix, is summed up beside Z itself. What the loss does with the log-probs comes after.

Knows nothing of models or losses. Legend: R rows, N targets, D hidden, V vocabulary, C vocabulary of one
chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twig.engine.kernels import linear

_PART = 2**19  # numbers of a half-precision matrix that are held in float32 at a time: a cache holds them


def has_wide_products(weight: Tensor) -> bool:
    """Tells whether products with a matrix are float32 though it is not: half precision on a CPU.

    A product of half precision rounds its results, and logits from 16 to 32 would come in steps of 1/8.
    """
    return weight.dtype in (torch.bfloat16, torch.float16) and weight.device.type == "cpu"


def head_product(
    rows: Float[Tensor, "R D"], weight: Float[Tensor, "V D"], bias: Tensor | None, onednn: bool = False
) -> Float[Tensor, "R V"]:
    """Returns rows W^T + bias in float32 or better."""
    if has_wide_products(weight):
        rows, results = rows.float(), rows.new_empty(len(rows), len(weight), dtype=torch.float32)
        for part, wide in _wide_parts(weight):
            torch.mm(rows, wide.t(), out=results[:, part])
        return results if bias is None else results.add_(bias)
    results = (linear if onednn else torch.nn.functional.linear)(rows, weight, bias)
    return results.to(torch.promote_types(results.dtype, torch.float32))


def _wide_parts(weight: Float[Tensor, "V D"]) -> Iterator[tuple[slice, Float[Tensor, "P D"]]]:
    """Yields a matrix in float32, some rows at a time, and which: each is gone when the next one comes."""
    size = max(_PART // weight.shape[1], 1)
    buffer = weight.new_empty(min(size, len(weight)), weight.shape[1], dtype=torch.float32)
    for start in range(0, len(weight), size):
        part = slice(start, start + size)
        yield part, buffer[: len(weight[part])].copy_(weight[part])


def _transposed_product(weights: Tensor, weight: Float[Tensor, "V D"], onednn: bool) -> Float[Tensor, "R D"]:
    """Returns weights W for weights in float32 or better."""
    if has_wide_products(weight):
        results = weights.new_zeros(len(weights), weight.shape[1])
        for part, wide in _wide_parts(weight):
            results.addmm_(weights[:, part], wide)
        return results
    product = linear if onednn else torch.nn.functional.linear
    return product(weights.to(weight.dtype), weight.t(), None)


@dataclass(frozen=True)
class Head:
    """What becomes of a row x: softcap(scale * (W x + bias)) / temperature, without the suppressed tokens.

    `weight` [V, D] and `bias` [V] are constants: no gradient goes to them. `chunk` is the number of logits
    that are computed at once, over all rows. With `onednn` products go through it (`kernels.linear`).
    """

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    suppressed: Int[Tensor, " S"] | None = None
    chunk: int = 2**22
    onednn: bool = False

    def logps(
        self, rows: Float[Tensor, "R D"], row: Int[Tensor, " N"], token: Int[Tensor, " N"]
    ) -> Float[Tensor, " N"]:
        """Returns log-probs of `token` [N] under the distributions of `rows[row]`, differentiable in `rows`.

        In float32 or better.
        """
        return _LogProbs.apply(rows, self, row, token)

    def logits(
        self, rows: Float[Tensor, "R D"], start: int, stop: int
    ) -> tuple[Float[Tensor, "R C"], Tensor | float]:
        """Returns logits of the tokens start .. stop - 1, and their derivative by W x + bias."""
        bias = None if self.bias is None else self.bias[start:stop]
        logits = head_product(rows, self.weight[start:stop], bias, self.onednn)
        slope: Tensor | float = self.scale / self.temperature
        if self.softcap is None:
            if slope != 1.0:
                logits = logits.mul_(slope)
        else:
            bent = logits.mul_(self.scale / self.softcap).tanh_()
            slope = (1 - bent * bent).mul_(slope)
            logits = bent * (self.softcap / self.temperature)
        if self.suppressed is not None:
            inside = self.suppressed[(self.suppressed >= start) & (self.suppressed < stop)]
            # finite, so that a chunk of nothing else has a maximum
            logits.index_fill_(-1, inside - start, torch.finfo(logits.dtype).min)
        return logits, slope


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, head: Head, row: Tensor, token: Tensor) -> Tensor:
        size, wide = len(rows), torch.promote_types(rows.dtype, torch.float32)
        highest = rows.new_full((size,), torch.finfo(wide).min, dtype=wide)
        total = rows.new_zeros(size, dtype=wide)
        # sum over v of exp(logit_v - highest) * slope_v * W_v: divided by `total`, the gradient of log Z
        expected = rows.new_zeros(size, rows.shape[1], dtype=wide) if ctx.needs_input_grad[0] else None
        chosen, slopes = rows.new_empty(len(token), dtype=wide), rows.new_empty(len(token), dtype=wide)
        order = torch.argsort(token)
        vocabulary = len(head.weight)
        step = min(max(head.chunk // max(size, 1), 1), vocabulary)
        starts = torch.arange(0, vocabulary + step, step, device=token.device)
        edges = torch.searchsorted(token[order], starts).tolist()
        for i, start in enumerate(range(0, vocabulary, step)):
            stop = min(start + step, vocabulary)
            logits, slope = head.logits(rows, start, stop)
            here = order[edges[i] : edges[i + 1]]
            at = (row[here], token[here] - start)
            chosen[here] = logits[at]
            slopes[here] = slope[at] if isinstance(slope, Tensor) else slope
            higher = torch.maximum(highest, logits.amax(-1))
            shrink = torch.exp(highest - higher)
            weights = logits.sub_(higher[:, None]).exp_()
            total = total * shrink + weights.sum(-1)
            if expected is not None:
                if isinstance(slope, Tensor):
                    weights.mul_(slope)
                expected.mul_(shrink[:, None])
                expected += _transposed_product(weights, head.weight[start:stop], head.onednn)
            highest = higher
        if expected is not None:
            ctx.head = head
            # a slope that varies is in `weights` already
            slope = 1.0 if head.softcap is not None else head.scale / head.temperature
            expected.mul_((slope / total)[:, None])
            ctx.save_for_backward(expected, row, token, slopes)
        return chosen - (highest + total.log())[row]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        expected, row, token, slopes = ctx.saved_tensors
        weight = ctx.head.weight
        by_row = expected.new_zeros(len(expected)).index_add_(0, row, grad)
        of_rows = expected * -by_row[:, None]
        of_rows.index_add_(0, row, weight[token].to(of_rows.dtype) * (grad * slopes)[:, None])
        return of_rows.to(weight.dtype), None, None, None
