"""What is minimised: pure functions on flat vectors with one entry per weighted node.

The normalisation is already in the weights, so the objective is one plain sum: micro-batches, packs and ranks
cannot change it. Float32 or better; nothing here knows of tries, models or optimizers.

Legend: N weighted nodes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Surrogate:
    """The settings of the objective.

    `epsilon`, `epsilon_high`: the clip range of the ratio, used only where old log-probs are given.
    `beta`: weight of the KL term; `bias_correction`: multiply it by the ratio (TRL's
    `use_bias_correction_kl`).
    """

    epsilon: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0
    bias_correction: bool = True


def loss(
    surrogate: Surrogate,
    logp: Float[Tensor, " N"],
    plus: Float[Tensor, " N"],
    minus: Float[Tensor, " N"],
    kl: Float[Tensor, " N"],
    old_logp: Float[Tensor, " N"] | None = None,
    ref_logp: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, ""]:
    """The scalar to minimise, a sum over nodes.

    - sum(plus * min(r, 1 + epsilon_high) + minus * max(r, 1 - epsilon)) + beta * sum(kl * k3),
    where r = pi / pi_old. Without `old_logp` the batch is fresh: r is 1 and keeps its gradient, and nothing
    is clipped. For one completion the clipped surrogate is min(r A, clip(r) A): A * min(r, 1 + epsilon_high)
    for A >= 0 and A * max(r, 1 - epsilon) for A < 0. So a node shared by completions of both signs needs the
    two sums of weights and no more.
    """
    fresh = old_logp is None
    ratio = torch.exp(logp - (logp.detach() if fresh else old_logp))
    if fresh:
        policy = (plus + minus) * ratio
    else:
        policy = plus * ratio.clamp(max=1 + surrogate.epsilon_high) + minus * ratio.clamp(
            min=1 - surrogate.epsilon
        )
    total = -policy.sum()
    if surrogate.beta != 0.0:
        assert ref_logp is not None, "the KL term needs the reference's log-probs"
        divergence = k3(logp, ref_logp)
        if surrogate.bias_correction:
            divergence = divergence * ratio
        total = total + surrogate.beta * (kl * divergence).sum()
    return total


def k3(logp: Float[Tensor, " N"], ref_logp: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The estimate e^(ref - logp) - (ref - logp) - 1 of KL(pi || ref) at the sampled token, in nats, never
    negative.

    http://joschu.net/blog/kl-approx.html
    """
    gap = ref_logp - logp
    return torch.exp(gap) - gap - 1


@torch.no_grad()
def shrink(parameters: list[Tensor], learning_rate: float, l2: float) -> None:
    """Applies the decoupled L2 regulariser l2 * |theta|^2 in place: theta *= 1 - 2 * learning_rate * l2.

    Decoupled because inside Adam the gradient of the regulariser would be rescaled with everything else, so
    that its size would hardly matter.
    """
    if l2 == 0.0:
        return
    for parameter in parameters:
        parameter.mul_(1 - 2 * learning_rate * l2)
