"""The objective: by hand, against GRPO's per-completion sum, and against the KL divergence it estimates."""

import math

import numpy as np
import oracles
import pytest
import random_groups
import torch
from hypothesis import given
from hypothesis import strategies as st

from twig.core.algorithms.base import Objective
from twig.core.algorithms.registry import algorithm
from twig.core.credit import assign_one
from twig.core.objective import k3, loss, shrink
from twig.core.trie import PrefixTrie


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def value_and_gradient(surrogate, logp, *args, **kwargs):
    """The loss, and its gradient with respect to the log-probs."""
    logp = logp.detach().clone().requires_grad_()
    total = loss(surrogate, logp, *args, **kwargs)
    (gradient,) = torch.autograd.grad(total, logp)
    return float(total.detach()), gradient.tolist()


def approximately(*values):
    return pytest.approx(values, abs=1e-12)


# ---- by hand ---------------------------------------------------------------------------------------------


def test_k3_by_hand():
    # logp = ln 1/2, ref = ln 1/4: gap = -ln 2, e^gap = 1/2, so k3 = 1/2 + ln 2 - 1 = 0.1931471805599453.
    # logp = ln 1/4, ref = ln 1/2: 2 - ln 2 - 1 = 0.3068528194400547. Equal: 0.
    logp, ref = vector(0.5, 0.25, 0.3).log(), vector(0.25, 0.5, 0.3).log()
    assert k3(logp, ref).tolist() == approximately(0.1931471805599453, 0.3068528194400547, 0.0)


def test_a_fresh_batch_by_hand():
    # r = 1, so the loss is -(plus + minus) summed: -((2 - 0.5) + (0 - 1)) = -0.5; d r / d logp = r = 1.
    logp, plus, minus = vector(-0.3, -2.0), vector(2.0, 0.0), vector(-0.5, -1.0)
    total, gradient = value_and_gradient(Objective(), logp, plus, minus, vector(0.0, 0.0))
    assert total == pytest.approx(-0.5)
    assert gradient == approximately(-1.5, 1.0)
    # The same as old log-probs equal to the present ones.
    again = value_and_gradient(Objective(), logp, plus, minus, vector(0.0, 0.0), old_logp=logp)
    assert again == (pytest.approx(total), approximately(*gradient))


@pytest.mark.parametrize(
    ("advantage", "ratio", "term", "slope"),
    [
        (1.0, 1.1, 1.1, 1.1),  # inside: r A, whose slope in logp is r A
        (1.0, 1.5, 1.28, 0.0),  # above 1 + epsilon_high: no more push up
        (1.0, 0.5, 0.5, 0.5),  # below is not clipped where A > 0
        (-1.0, 0.9, -0.9, -0.9),
        (-1.0, 0.5, -0.8, 0.0),  # below 1 - epsilon: no more push down
        (-1.0, 1.5, -1.5, -1.5),  # above is not clipped where A < 0
    ],
)
def test_clipping_by_hand(advantage, ratio, term, slope):
    surrogate = Objective(epsilon=0.2, epsilon_high=0.28)
    old = vector(-1.0)
    weights = vector(max(advantage, 0.0)), vector(min(advantage, 0.0)), vector(0.0)
    total, gradient = value_and_gradient(surrogate, old + math.log(ratio), *weights, old_logp=old)
    assert -total == pytest.approx(term)
    assert [-g for g in gradient] == approximately(slope)


@pytest.mark.parametrize(("correction", "slope"), [(True, 0.3 * (0.5 + 0.1931471805599453)), (False, 0.15)])
def test_the_kl_term_by_hand(correction, slope):
    # same either way. d k3 / d logp = 1 - e^gap = 1/2; with the ratio its slope r * k3 is added.
    # same either way. d k3 / d logp = 1 - e^gap = 1/2; with the ratio its slope r k3 is added.
    surrogate = Objective(beta=0.1, bias_correction=correction)
    zero = vector(0.0)
    total, gradient = value_and_gradient(
        surrogate, vector(0.5).log(), zero, zero, vector(3.0), ref_logp=vector(0.25).log()
    )
    assert total == pytest.approx(0.1 * 3 * 0.1931471805599453)
    assert gradient == approximately(slope)


def test_the_ratio_in_the_kl_term_is_that_to_the_old_policy():
    # r = 3/2 and unclipped, beta = 0.1, kl = 1: 0.1 * 1.5 * 0.1931471805599453
    surrogate, zero, logp = Objective(beta=0.1), vector(0.0), vector(0.5).log()
    args = zero, zero, vector(1.0), logp - math.log(1.5), vector(0.25).log()
    assert float(loss(surrogate, logp, *args)) == pytest.approx(0.1 * 1.5 * 0.1931471805599453)


def test_beta_needs_the_reference():
    zero = vector(0.0)
    with pytest.raises(AssertionError, match="reference"):
        loss(Objective(beta=0.1), zero, zero, zero, zero)


def test_shrink_by_hand():
    # 1 - 2 * 0.1 * 0.5 = 0.9
    parameters = [vector(2.0, -1.0), vector(0.5)]
    shrink(parameters, 0.1, 0.5)
    assert [p.tolist() for p in parameters] == [approximately(1.8, -0.9), approximately(0.45)]
    before = parameters[0].clone()
    shrink(parameters, 0.1, 0.0)
    assert torch.equal(parameters[0], before)


def test_shrink_is_a_gradient_step_on_the_squared_norm():
    parameter = torch.linspace(-2, 3, 5, dtype=torch.float64).requires_grad_()
    expected = parameter.detach().clone()
    (0.3 * parameter.pow(2).sum()).backward()
    expected -= 0.01 * parameter.grad
    shrink([parameter], 0.01, 0.3)
    torch.testing.assert_close(parameter.detach(), expected)
    assert parameter.requires_grad


# ---- plus and minus against the sum over completions -----------------------------------------------------


def both_ways(completions, rewards, noise, epsilon, epsilon_high):
    """(value, gradient) of the node sum, of the per-completion sum, and of a single signed weight per
    node."""
    trie = PrefixTrie.build(completions, rewards)
    credit = assign_one(algorithm("grpo"), trie, np.random.default_rng(0))
    old = torch.linspace(-3, -0.1, len(trie), dtype=torch.float64)
    logp = (old + torch.tensor(noise, dtype=torch.float64)).requires_grad_()
    surrogate = Objective(epsilon=epsilon, epsilon_high=epsilon_high)
    plus, minus = torch.from_numpy(credit.plus), torch.from_numpy(credit.minus)
    signed = plus + minus
    zero = torch.zeros_like(plus)
    ours = loss(surrogate, logp, plus, minus, zero, old_logp=old)
    one = loss(surrogate, logp, signed.clamp(min=0), signed.clamp(max=0), zero, old_logp=old)
    prefixes = [oracles.prefix_of(trie, n) for n in range(len(trie))]
    scales = [{t: 1 / len(c) for t in range(len(c))} for c in completions]
    theirs = oracles.clipped_sum(
        oracles.token_terms(completions, rewards, scales),
        dict(zip(prefixes, logp, strict=True)),
        dict(zip(prefixes, old, strict=True)),
        epsilon,
        epsilon_high,
    )

    def gradient(total):
        if not total.requires_grad:  # no completion has a token
            return torch.zeros_like(logp)
        return torch.autograd.grad(total, logp, retain_graph=True)[0]

    return [(float(total.detach()), gradient(total)) for total in (ours, theirs, one)]


@given(random_groups.groups(), st.integers(0, 99), st.sampled_from([(0.2, 0.2), (0.1, 0.3), (0, 0)]))
@random_groups.bounded
def test_plus_and_minus_equal_the_sum_over_completions(group, seed, clip):
    nodes = len(PrefixTrie.build(*group))
    noise = np.random.default_rng(seed).normal(0, 0.4, nodes)
    ours, theirs, _ = both_ways(*group, noise, *map(float, clip))
    assert ours[0] == pytest.approx(theirs[0], abs=1e-12)
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-12)


def test_one_signed_weight_would_be_wrong_by_the_whole_gradient():
    # Two completions share the node of token 5 with advantages +A and -A: one signed weight is 0 there. With
    # r = 2 the positive one is clipped and the negative one is not: the node's true slope is 2 A / (G |o|).
    completions, rewards = [[5, 6], [5, 7]], [1.0, 0.0]
    ours, theirs, one = both_ways(completions, rewards, [0.0, math.log(2.0), 0.0, 0.0], 0.2, 0.2)
    advantage = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert float(theirs[1][1]) == pytest.approx(2 * advantage / 4)
    assert float(ours[1][1]) == pytest.approx(2 * advantage / 4)
    assert float(one[1][1]) == 0.0


def test_one_signed_weight_would_be_wrong_by_most_of_the_gradient_of_random_groups():
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(20):
        completions = [rng.integers(0, 2, 6) for _ in range(16)]
        rewards = rng.integers(0, 2, 16).astype(float)
        noise = rng.normal(0, 0.5, len(PrefixTrie.build(completions, rewards)))
        ours, theirs, one = both_ways(completions, rewards, noise, 0.2, 0.2)
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-12)
        shares.append(float((one[1] - theirs[1]).norm() / theirs[1].norm()))
    assert np.median(shares) > 0.5


@pytest.mark.parametrize("old", [False, True])
def test_the_loss_of_all_nodes_is_the_sum_over_any_cut(old):
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(6, 12, dtype=torch.float64, generator=generator)
    logp, plus, minus, kl, old_logp, ref_logp = columns
    args = [logp, plus.abs(), -minus.abs(), kl.abs(), old_logp if old else None, ref_logp]
    surrogate = Objective(beta=0.3)
    whole = loss(surrogate, *args)
    for at in ([0, 5, 12], [0, 1, 2, 11, 12], [0, 0, 12]):
        parts = [
            loss(surrogate, *(None if a is None else a[i:j] for a in args))
            for i, j in zip(at[:-1], at[1:], strict=True)
        ]
        torch.testing.assert_close(sum(parts), whole)


# ---- what k3 estimates -----------------------------------------------------------------------------------


def distributions():
    generator = torch.Generator().manual_seed(3)
    logits, ref = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    return logits.requires_grad_(), ref.log_softmax(-1)


def divergence(logp, ref):
    """KL(pi || ref) by its definition."""
    return (logp.exp() * (logp - ref)).sum()


def test_k3_is_never_negative_and_its_expectation_is_the_divergence():
    logits, ref = distributions()
    logp = logits.log_softmax(-1).detach()
    estimates = k3(logp, ref)
    assert (estimates >= 0).all()
    torch.testing.assert_close((logp.exp() * estimates).sum(), divergence(logp, ref))


@pytest.mark.parametrize("correction", [True, False])
def test_only_with_the_ratio_is_the_expected_gradient_that_of_the_divergence(correction):
    # The expectation over sampled tokens, each with its probability (a constant) as KL weight.
    logits, ref = distributions()
    logp = logits.log_softmax(-1)
    zero = torch.zeros_like(ref)
    surrogate = Objective(beta=1.0, bias_correction=correction)
    expected = loss(surrogate, logp, zero, zero, logp.detach().exp(), ref_logp=ref)
    (actual,) = torch.autograd.grad(expected, logits, retain_graph=True)
    (true,) = torch.autograd.grad(divergence(logp, ref), logits)
    assert torch.allclose(actual, true, atol=1e-12) == correction


def test_the_settings_of_the_objective_are_used_only_where_they_apply():
    # Without old log-probs nothing is clipped, however narrow the range; with beta = 0 KL weights do nothing.
    logp, plus, minus, kl = vector(-1.0), vector(0.7), vector(-0.2), vector(5.0)
    narrow = Objective(epsilon=0.0, epsilon_high=0.0)
    for surrogate in (Objective(), narrow, Objective(bias_correction=False)):
        total, gradient = value_and_gradient(surrogate, logp, plus, minus, kl)
        assert (total, gradient) == (pytest.approx(-0.5), approximately(-0.5))
