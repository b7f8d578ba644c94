"""Products through oneDNN in the benchmarks: what Twig's `auto` takes for a model, and the same for TRL."""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

KERNELS = ("auto", "onednn", "torch")


def resolve(kernels: str, config: Any) -> str:
    """Returns what `model.kernels` stands for with a float32 model on this processor: onednn or torch."""
    from twig.engine.kernels import choose_kernels
    from twig.planner.choose import matrices_of

    choice = choose_kernels(kernels, "cpu", "float32", matrices_of(config.to_dict()))
    print(f"kernels: {choice.kernels} ({choice.why})", file=sys.stderr, flush=True)
    return choice.kernels


def trl_products(model: Any, kernels: str) -> AbstractContextManager[None]:
    """Returns a context in which TRL's products with frozen matrices run on `kernels`; auto: as they come."""
    return _onednn(model) if kernels == "onednn" else nullcontext()


@contextmanager
def _onednn(model: Any) -> Iterator[None]:
    """Runs the frozen linear layers through oneDNN, and TRL's head, which multiplies without its layer.

    The head's function takes `torch.mm` for the logits of a chunk, forward and again backward, and
    `_addmm_fp32` for the gradient of its input. A product's result becomes the tile, so nothing is copied.
    """
    from trl.kernels import chunked_logprob

    from twig.engine.kernels import linear, onednn_products

    class Torch:
        """torch, as that module sees it."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def mm(rows: Tensor, transposed: Tensor, *, out: Tensor) -> Tensor:
            product: Any = linear(rows, transposed.t())
            return out.set_(product)

    def add_product(total: Tensor, rows: Tensor, matrix: Tensor) -> None:
        total.add_(linear(rows, matrix.t()))

    with (
        patch.object(chunked_logprob, "torch", Torch()),
        patch.object(chunked_logprob, "_addmm_fp32", add_product),
        onednn_products(model.modules()),
    ):
        yield


def counter() -> FlopCounterMode:
    """Returns torch's counter of operations, which by itself does not know oneDNN's products."""
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return FlopCounterMode(display=False, custom_mapping={operator: _linear_flops} if operator else None)


def _linear_flops(rows: Sequence[int], weight: Sequence[int], *rest: Any, **kwargs: Any) -> int:
    """Returns the multiplications and additions of a product, from the shapes of its factors."""
    return 2 * math.prod(rows) * weight[0]
