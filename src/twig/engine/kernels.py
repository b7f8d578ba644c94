"""Products of frozen float32 matrices on a CPU through oneDNN, on processors where that is faster.

`torch.nn.functional.linear` runs in torch's BLAS library, which on some processors takes twice as long. The
operator here is the one that `torch.compile` emits for frozen weights. It takes the ordinary weight, and its
transpose as a view for the gradient of the input, so nothing is copied; results differ by rounding.

Called under autograd, the operator itself returns a result that has no gradient, with only a warning. Nothing
but `_product` may call it.

Knows nothing of policies or plans. Legend: I inputs, O outputs.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twig.common.errors import UserError

KEY = "model.kernels"
FEW_ROWS = 64  # packed matrices are faster up to about so many rows
PACKED_AFTER = 16
# Compiled products are kept by their shape, and nearly every pack has another: 0.6 MiB each in two caches.
_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")  # torch's and oneDNN's: 1,024 by default
CACHED_SHAPES = 32  # a pass through a pack has about 16
_TAKEN_AT = 1.3  # `auto` takes oneDNN if it is so many times as fast
_SMALLEST = 2**20  # bytes of a layer's largest matrix from which oneDNN can be faster
_MEASURED_BYTES = 2**25  # matrices of this size do not stay in the processor's caches
_MEASURED_ROWS, _MEASURED_RUNS = 64, 5


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None) -> Tensor:
    """Returns x W^T + bias, differentiable in x only; through oneDNN if it is float32 on a CPU.

    `packed` is W in oneDNN's own layout (`Packed`), used where there is no gradient.
    """
    if not _serves(x, weight, bias):
        return nn.functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        return _FrozenLinear.apply(x, weight, bias)
    return _product(x, weight if packed is None else packed, bias)


def _serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tells whether oneDNN multiplies: float32 on a CPU, and no gradient is asked of weight or bias."""
    both = (x, weight)
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    return (
        not (trained and torch.is_grad_enabled())
        and all(each.dtype is torch.float32 and each.device.type == "cpu" for each in both)
        and x.dim() > 1
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


class _FrozenLinear(torch.autograd.Function):
    """x W^T + bias with constant W and bias; the gradient by x is another product, g W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return _product(gradients[0], weight.t(), None), None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x W^T + bias from the operator, which must not be recorded by autograd."""
    with torch.no_grad():
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


class Packed:
    """Copies of matrices in the layout that oneDNN reads fastest at few rows.

    They serve decoding; `clear` frees them before an update. A copy is made once a matrix was used
    `PACKED_AFTER` times, when it would have paid: making one takes about as long as so many products save.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple, Tensor] = {}
        self._uses: Counter[tuple] = Counter()

    def of(self, weight: Tensor) -> Tensor | None:
        """Returns the copy of `weight`, or None as long as it does not pay; tied weights share one."""
        key = (weight.data_ptr(), weight.shape, weight.stride())  # a view may begin where another does
        self._uses[key] += 1
        if key not in self._copies and self._uses[key] > PACKED_AFTER:
            self._copies[key] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), FEW_ROWS)
        return self._copies.get(key)

    def clear(self) -> bool:
        """Frees the copies; returns whether there were any."""
        there = bool(self._copies)
        self._copies, self._uses = {}, Counter()
        return there


@contextmanager
def onednn_products(modules: Iterable[nn.Module], packed: Packed | None = None) -> Iterator[None]:
    """Runs the frozen float32 linear layers among `modules` through oneDNN inside, with their gradient.

    With `packed`, products of at most `FEW_ROWS` rows without gradient use packed matrices. Every other
    module, layers with adapters around them included, stays what it is: only the instances' `forward` is
    another while the context is open.
    """
    changed = [module for module in modules if _is_frozen(module)]
    for module in changed:
        module.__dict__["forward"] = partial(_forward, module, packed)
    try:
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


def _is_frozen(module: nn.Module) -> bool:
    """Tells whether a module is a plain linear layer on a CPU whose weights are constants."""
    if type(module) not in (nn.Linear, Conv1D) or "forward" in module.__dict__:
        return False
    numbers = [each for each in (module.weight, module.bias) if each is not None]
    return all(
        type(each) is nn.Parameter
        and not each.requires_grad
        and each.dtype is torch.float32
        and each.device.type == "cpu"
        for each in numbers
    )


def _forward(module: nn.Module, packed: Packed | None, x: Tensor) -> Tensor:
    """What a linear layer returns, from `linear`."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    if isinstance(module, Conv1D):  # it keeps the transpose
        return linear(x, weight.t(), bias)
    rows = x.numel() // max(x.shape[-1], 1)
    # A single row gains nothing, and only its result would differ from the ordinary weight's.
    if packed is None or not 1 < rows <= FEW_ROWS or torch.is_grad_enabled():
        return linear(x, weight, bias)
    return linear(x, weight, bias, packed.of(weight))


# ---- choosing --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speeds:
    """Speeds of the two libraries at the same products, in GFLOP/s."""

    torch: float
    onednn: float

    @property
    def ratio(self) -> float:
        """How many times as fast oneDNN is."""
        return self.onednn / self.torch

    def __str__(self) -> str:
        return f"oneDNN {self.onednn:.0f} GFLOP/s, torch {self.torch:.0f}: {self.ratio:.2f} times"


@dataclass(frozen=True)
class Choice:
    """What `model.kernels` stands for (onednn or torch), and why."""

    kernels: str
    why: str


def choose_kernels(chosen: str, device_kind: str, dtype: str, matrices: Sequence[tuple[int, int]]) -> Choice:
    """Resolves `model.kernels` for a model on a device, from the (I, O) of a layer's `matrices`.

    `dtype` is the name of the base's. Raises UserError if `chosen` is onednn and this machine lacks it.
    """
    lack = "the device is no CPU" if device_kind != "cpu" else obstacle()
    if chosen == "onednn" and lack:
        fix = f"Set {KEY}=auto in a new run, or resume where there is one"
        raise UserError(KEY, f"there is no oneDNN for this run: {lack}", fix)
    if chosen != "auto":
        return Choice(chosen, "set")
    largest = 4 * max((i * o for i, o in matrices), default=0)
    if lack is None and dtype != "float32":
        lack = f"the model is {dtype}"
    if lack is None and largest < _SMALLEST:
        lack = f"matrices of at most {largest / 2**10:.0f} KiB are too small to gain"
    if lack is not None:
        return Choice("torch", lack)
    speeds = measure(matrices)
    return Choice("onednn" if speeds.ratio >= _TAKEN_AT else "torch", str(speeds))


def keep_few_products() -> None:
    """Limits the caches of compiled products, unless the environment does.

    Both are read at the first product through oneDNN, those of a bfloat16 model included: call it before.
    """
    for variable in _CACHES:
        os.environ.setdefault(variable, str(CACHED_SHAPES))


@cache
def obstacle() -> str | None:
    """Returns why oneDNN's products cannot be used here; None if they can."""
    keep_few_products()
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    numbers = torch.linspace(-1, 1, 57)  # the generator of random numbers stays as it is
    x, weight, bias = numbers[:15].view(3, 5), numbers[15:50].view(7, 5), numbers[50:]
    try:
        with torch.no_grad():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, 3)
            results = [_product(x, weight, bias), _product(x, packed, bias)]
            results.append(_product(x @ weight.t(), weight.t(), None) @ weight.t() + bias)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError) as error:
        return f"torch {torch.__version__} lacks its operator ({type(error).__name__})"
    plain = nn.functional.linear(x, weight, bias)
    twice = nn.functional.linear(x @ weight.t() @ weight, weight, bias)
    for result, right in zip(results, [plain, plain, twice], strict=True):
        if not torch.allclose(result, right, rtol=1e-4, atol=1e-4):
            return "its results differ"
    return None


def measure(matrices: Sequence[tuple[int, int]]) -> Speeds:
    """Times both libraries at products and their gradients with matrices of these (I, O), in turn.

    Takes about a second, and 64 MiB or one matrix if that is larger; uses the threads that torch has.
    """
    flops, weights = 0, []
    size = 4 * sum(i * o for i, o in matrices)
    for i, o in [*matrices] * max(_MEASURED_BYTES // size, 1):
        if weights and 4 * (sum(w.numel() for w in weights) + i * o) > 2 * _MEASURED_BYTES:
            break
        weights.append(torch.ones(o, i))
        flops += 4 * _MEASURED_ROWS * i * o
    inputs = {n: torch.ones(_MEASURED_ROWS, n) for pair in matrices for n in pair}

    def run(product: Callable[[Tensor, Tensor], Tensor]) -> float:
        began = time.perf_counter()
        for weight in weights:
            product(inputs[weight.shape[1]], weight)
            product(inputs[weight.shape[0]], weight.t())
        return flops / (time.perf_counter() - began) / 1e9

    sides = {"torch": nn.functional.linear, "onednn": linear}
    with torch.no_grad():
        for product in sides.values():
            run(product)
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(_MEASURED_RUNS):
            for name, product in sides.items():
                speeds[name].append(run(product))
    return Speeds(*(median(speeds[name]) for name in sides))
