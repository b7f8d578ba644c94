"""What is minimised: pure functions on flat vectors with one entry per weighted node.

The normalisation is already in the weights, so the objective is one plain sum: micro-batches, packs and ranks
cannot change it. `base.Objective` names one of three:

- token ratio: the clipped surrogate of each token, `loss`;
- clipped weight: the ratio is a number without a gradient, `loss`;
- sequence ratio: one ratio per completion. It needs the log-probs of all nodes first: `sequence_weights`
  turns them into weights on nodes, which `loss` then takes as those of a fresh batch.

Float32 or better; nothing here knows of models or optimizers. Legend: N weighted nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from twig.core.algorithms.base import Credit, Objective
from twig.core.trie import PrefixTrie


def loss(
    objective: Objective,
    logp: Float[Tensor, " N"],
    plus: Float[Tensor, " N"],
    minus: Float[Tensor, " N"],
    kl: Float[Tensor, " N"],
    old_logp: Float[Tensor, " N"] | None = None,
    ref_logp: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, ""]:
    """Returns the scalar to minimise, a sum over nodes.

    - sum(plus * min(r, 1 + epsilon_high) + minus * max(r, 1 - epsilon)) + beta * sum(kl * k3),
    where r = pi / pi_old. Without `old_logp` the batch is fresh: r is 1 and keeps its gradient, and nothing
    is clipped. For one completion the clipped surrogate is min(r A, clip(r) A): A * min(r, 1 + epsilon_high)
    for A >= 0 and A * max(r, 1 - epsilon) for A < 0. So a node shared by completions of both signs needs the
    two sums of weights and no more.

    "clipped weight": - sum((plus + minus) * min(r, 1 + epsilon_high) * log pi), r without a gradient.
    """
    fresh = old_logp is None
    ratio = torch.exp(logp - (logp.detach() if old_logp is None else old_logp))
    if objective.kind == "clipped weight":
        policy = (plus + minus) * ratio.detach().clamp(max=1 + objective.epsilon_high) * logp
    elif fresh:
        policy = (plus + minus) * ratio
    else:
        policy = plus * ratio.clamp(max=1 + objective.epsilon_high) + minus * ratio.clamp(
            min=1 - objective.epsilon
        )
    total = -policy.sum()
    if objective.beta != 0.0:
        assert ref_logp is not None, "the KL term needs the reference's log-probs"
        divergence = k3(logp, ref_logp)
        if objective.bias_correction:
            divergence = divergence * ratio
        total = total + objective.beta * (kl * divergence).sum()
    return total


@dataclass(frozen=True)
class SequenceWeights:
    """Weights per node whose plain sum of log-probs has the gradient of the sequence objective.

    `constant` is what the completions that are clipped add to its value.
    """

    plus: np.ndarray
    minus: np.ndarray
    constant: float


def sequence_weights(
    objective: Objective,
    trie: PrefixTrie,
    credit: Credit,
    logp: np.ndarray | None = None,
    old_logp: np.ndarray | None = None,
) -> SequenceWeights:
    """Returns the weights of one group under a ratio per completion, from the log-probs of its nodes.

    With w_t the weights of a completion's tokens (`credit.tokens`), W their sum and n the number of those
    that are not 0, the completion adds W min(s, 1 + epsilon_high) if W > 0, W max(s, 1 - epsilon) if W < 0,
    where log s = sum over its weighted tokens of (logp - old_logp) / n. The gradient of W s is W s / n at
    each of its tokens, whether other completions share the node or not. Without log-probs the batch is fresh:
    s is 1. GSPO, arXiv 2507.18071, eq. 5 to 7.
    """
    assert credit.tokens is not None, "the sequence ratio needs the weights of each completion's tokens"
    plus, minus, constant = np.zeros(len(trie)), np.zeros(len(trie)), 0.0
    for path, tokens in zip(trie.paths, credit.tokens, strict=True):
        nodes = path[tokens != 0]
        if not len(nodes):
            continue
        total, ratio = float(tokens.sum()), 1.0
        if logp is not None and old_logp is not None:
            ratio = float(np.exp((logp[nodes] - old_logp[nodes]).mean()))
        side = plus if total > 0 else minus
        limit = 1 + objective.epsilon_high if total > 0 else 1 - objective.epsilon
        if (ratio > limit) if total > 0 else (ratio < limit):
            constant += total * limit
        else:
            side[nodes] += total * ratio / len(nodes)
    return SequenceWeights(plus, minus, constant)


def k3(logp: Float[Tensor, " N"], ref_logp: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Returns the estimate e^(ref - logp) - (ref - logp) - 1 of KL(pi || ref) at the sampled token, in nats.

    Never negative. http://joschu.net/blog/kl-approx.html
    """
    gap = ref_logp - logp
    return torch.exp(gap) - gap - 1


@torch.no_grad()
def shrink(parameters: Sequence[Tensor], learning_rate: float, l2: float) -> None:
    """Applies the decoupled L2 regulariser l2 * |theta|^2 in place: theta *= 1 - 2 * learning_rate * l2.

    Decoupled because inside Adam the gradient of the regulariser would be rescaled with everything else, so
    that its size would hardly matter.
    """
    if l2 == 0.0:
        return
    for parameter in parameters:
        parameter.mul_(1 - 2 * learning_rate * l2)
