"""Where the engine's tests run, in what precision, and how near two ways must come to each other there.

On a CPU everything is float64 and compared at 1e-9. `tests/gpu/` runs the same tests in float32 and in
bfloat16, inside `use`. A test asks `now` for its dtype and bounds, and `place` for its device.

- float32: TF32 is off. Gradients agree to 1e-4 of the largest entry. A token is the one that its own pass
  draws: two passes may take different tokens only if the uniform number lies within 1e-4 of both.
- bfloat16: the oracle is the same model, with its rounded weights, in float32 (`exact`), so the noise is one
  side's alone. The whole gradient is measured too, by its norm. On a CPU, the engine's gradients were off by
  up to 0.09 of it and 0.10 of the largest entry, most by less than half as much, and those of the model's own
  forward in bfloat16 alike; an H100 keeps the bounds too. They fail for a wrong mask, window or position, for
  a head row that is another's, for a stem without its gradient, and for one weight lost in each pack.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from twig.core.rng import uniforms
from twig.engine.base_policy import BasePolicy


@dataclass(frozen=True)
class Numerics:
    """A precision and its bounds.

    `value`: of log-probs, entropies and losses, in nats. `gradient`: of a gradient, relative to its largest
    entry and to its norm. `hidden`: of hidden states, relative to the largest entry. `draw`: how far from a
    token's part of the cumulative distribution the number may be that drew it. `logit`: how far below the
    largest logit that of a greedy token may be. `rerun`: the dtype of tests in which layers run again in the
    backward pass, where `Float64` does not reach. `beta`: of the KL term, which multiplies rounding by e
    to the distance from the base.
    """

    dtype: torch.dtype
    value: float
    gradient: float
    hidden: float
    draw: float
    logit: float
    rerun: torch.dtype
    beta: float = 0.1

    @property
    def is_exact(self) -> bool:
        return self.dtype is torch.float64


EXACT = Numerics(torch.float64, 1e-9, 1e-9, 1e-10, 0.0, 0.0, torch.float32)
SINGLE = Numerics(torch.float32, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4, torch.float32)
HALF = Numerics(torch.bfloat16, 0.3, 0.12, 0.05, 0.03, 0.15, torch.bfloat16, beta=0.01)
ON_A_DEVICE = {"float32": SINGLE, "bfloat16": HALF}

_now: list[tuple[Numerics, torch.device]] = [(EXACT, torch.device("cpu"))]


def now() -> Numerics:
    """The precision of the test that runs."""
    return _now[-1][0]


def place() -> torch.device:
    """The device of the test that runs."""
    return _now[-1][1]


class Float64(TorchFunctionMode):
    """Inside, every cast to float32 is one to float64.

    The models compute norms, rotations and the softmax of eager attention in float32 whatever their dtype,
    which would leave 1e-7 of noise in comparisons that ought to be exact.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wide(value):
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})


@contextmanager
def use(numerics: Numerics, device: str) -> Iterator[None]:
    """Inside, tests run on the device in that precision."""
    _now.append((numerics, torch.device(device)))
    try:
        yield
    finally:
        _now.pop()


def casts() -> AbstractContextManager:
    """Inside, nothing is rounded to less than the precision of the test: on a CPU no cast to float32 is."""
    return Float64() if now().is_exact else nullcontext()


def exact(policy: BasePolicy) -> BasePolicy:
    """The policy that oracles run: itself, or in bfloat16 the same weights in float32."""
    return recast(policy, torch.float32) if now().dtype is torch.bfloat16 else policy


def recast(policy: BasePolicy, dtype: torch.dtype, device: str | torch.device | None = None) -> BasePolicy:
    """A copy of the policy, all weights in `dtype`, on its device or another one."""
    made = deepcopy(
        policy, {id(getattr(policy, "decode_steps", None)): None}
    )  # captured graphs cannot be copied
    made.device = torch.device(policy.device if device is None else device)
    made.peft_model.to(made.device, dtype)
    made.suppressed = made.suppressed.to(made.device)
    made.parameters = {n: p for n, p in made.peft_model.named_parameters() if p.requires_grad}
    return made


# ---- comparisons -------------------------------------------------------------------------------------------


def assert_values(ours, theirs, bound: float = 1e-9) -> None:
    """Equal log-probs, entropies or losses, to `bound` or to what the precision allows."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=max(bound, now().value))


def assert_hidden(ours: Tensor, theirs: Tensor) -> None:
    """Equal hidden states."""
    if not len(theirs):
        return
    gap, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    assert gap <= now().hidden * largest, (gap, largest)


def assert_same(
    ours: tuple[float, Mapping[str, Tensor]], theirs: tuple[float, Mapping[str, Tensor]], bound: float = 1e-9
) -> None:
    """Equal losses and gradients, to `bound` or to what the precision allows: each entry relative to the
    largest of all, and all of them relative to their norm."""
    assert ours[0] == pytest.approx(theirs[0], abs=max(bound, now().value))
    bound = max(bound, now().gradient)
    scale = max(float(g.abs().max()) for g in theirs[1].values())
    assert scale > 1e-6, "the comparison needs a gradient"
    gaps = {name: (ours[1][name] - gradient).double() for name, gradient in theirs[1].items()}
    for name, gap in gaps.items():
        assert float(gap.abs().max()) < bound * scale, name
    assert _norm(gaps) < bound * _norm(theirs[1])


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return sum(float(tensor.double().pow(2).sum()) for tensor in tensors.values()) ** 0.5


def may_draw(logp: Tensor, token: int, uniform: float | None) -> bool:
    """Whether a pass with log-probs [V] that are these but for rounding may take `token`: by `uniform`, or
    as the most probable one."""
    if uniform is None:
        return float(logp.max() - logp[token]) <= now().logit
    ends = logp.double().exp().cumsum(0)
    number = uniform * float(ends[-1])
    before = float(ends[token - 1]) if token else 0.0
    return before - now().draw <= number <= float(ends[token]) + now().draw and bool(logp[token].isfinite())


def follow(ids, uniform=None) -> Callable[[int, Tensor], int | None] | None:
    """For `oracles.sample_one`: takes the tokens `ids` of another pass wherever rounding excuses them."""
    if now().is_exact:
        return None

    def other(t: int, logp: Tensor) -> int | None:
        drawn = None if uniform is None else float(uniform[t])
        return int(ids[t]) if t < len(ids) and may_draw(logp, int(ids[t]), drawn) else None

    return other


def common_length(policy: BasePolicy, request, ours, theirs, uniform=None) -> int:
    """How many tokens two ways of sampling one completion have in common.

    All of them, or up to a first difference that the precision excuses: the oracle's probabilities there may
    draw either token. What comes behind it is another text, so nothing else is compared.
    """
    ours, theirs = list(map(int, ours)), list(map(int, theirs))
    pairs = zip(ours, theirs, strict=False)
    first = next((t for t, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    if ours == theirs:
        return first
    assert first < min(len(ours), len(theirs)), "one goes on where the other ends"
    assert not now().is_exact, (first, ours, theirs)
    with torch.no_grad():
        ids = torch.tensor([*request.prompt_ids.tolist(), *ours[:first]])
        logp = torch.log_softmax(oracles.forward_logits(exact(policy), ids)[-1], -1)
    drawn = None if uniform is None else float(uniform[first])
    assert may_draw(logp, ours[first], drawn) and may_draw(logp, theirs[first], drawn), (first, ours, theirs)
    return first


def assert_same_text(policy: BasePolicy, requests, ours, theirs, seed: int = 0, step: int = 0) -> list[int]:
    """Equal completions of all requests; returns how many tokens of each were compared."""
    lengths = []
    for request, left, right in zip(requests, ours, theirs, strict=True):
        for number, (a, b) in enumerate(zip(left, right, strict=True)):
            drawn = uniforms(seed, step, request.slot, number, request.max_tokens)
            lengths.append(common_length(policy, request, a.ids, b.ids, drawn))
    # an excuse is for single rows: most tokens must be the same
    assert sum(lengths) > 0.5 * sum(len(c) for completions in theirs for c in completions)
    return lengths
