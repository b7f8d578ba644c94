"""The head in one pass against a softmax over the whole vocabulary: log-probs and gradients of each loss."""

import itertools

import numerics
import pytest
import torch

from twig.core.algorithms.base import Objective
from twig.core.objective import loss
from twig.engine.lm_head import Head, head_product

ROWS, HIDDEN, VOCABULARY, TARGETS = 7, 6, 53, 20


def problem(dtype=torch.float64, bias=False, **options):
    """A random head, rows, targets (some the same token, one row without any) and weights."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape, size=1.0):
        drawn = torch.randn(*shape, generator=draw, dtype=torch.float64).mul_(size)
        return drawn.to(numerics.place(), dtype)

    if "suppressed" in options:
        options["suppressed"] = options["suppressed"].to(numerics.place())
    head = Head(normal(VOCABULARY, HIDDEN), normal(VOCABULARY) if bias else None, **options)
    rows = normal(ROWS, HIDDEN, size=2.0).requires_grad_()
    row = torch.randint(ROWS - 1, (TARGETS,), generator=draw)
    token = torch.randint(10, VOCABULARY, (TARGETS,), generator=draw)
    token[:3], row[:3] = token[0], row[0]
    return (
        head,
        rows,
        row.to(numerics.place()),
        token.to(numerics.place()),
        [normal(TARGETS).to(torch.promote_types(dtype, torch.float32)) for _ in range(5)],
    )


def obvious(head, rows, row, token):
    """The same by the definition, with every logit at once and autograd."""
    logits = (rows @ head.weight.T + (0 if head.bias is None else head.bias)).to(
        torch.promote_types(rows.dtype, torch.float32)
    )
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logits = logits / head.temperature
    if head.suppressed is not None:
        logits = logits.index_fill(-1, head.suppressed, float("-inf"))
    return torch.log_softmax(logits, -1)[row, token]


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale": {"scale": 0.125, "temperature": 1.3},
    "softcap": {"softcap": 3.0, "temperature": 0.8, "scale": 2.0},
    "suppressed": {"suppressed": torch.tensor([*range(10)])},  # with chunks of one token: nothing but these
    "bias": {"bias": True, "softcap": 4.0},
}
SURROGATES = {
    "fresh": (Objective(), False, False),
    "clipped": (Objective(epsilon=0.1, epsilon_high=0.3), True, False),
    "kl": (Objective(beta=0.04), False, True),
    "kl, clipped": (Objective(beta=0.5, bias_correction=False), True, True),
}


@pytest.mark.parametrize("chunk", [1, 5 * ROWS, 17 * ROWS, 10**6])
@pytest.mark.parametrize(("options", "surrogate"), list(itertools.product(OPTIONS, SURROGATES)))
def test_log_probs_and_gradient_equal_those_of_a_whole_softmax(options, surrogate, chunk):
    head, rows, row, token, (plus, minus, kl, old, ref) = problem(chunk=chunk, **OPTIONS[options])
    how, has_old, has_ref = SURROGATES[surrogate]
    kl = kl.abs()

    def both(logps):
        # old log-probs near the new ones, so that some ratios are clipped and some are not
        near = logps.detach() + 0.2 * old if has_old else None
        value = loss(how, logps, plus, minus, kl, near, logps.detach() + 0.3 * ref if has_ref else None)
        return logps.detach(), torch.autograd.grad(value, rows)[0]

    ours, theirs = both(head.logps(rows, row, token)), both(obvious(head, rows, row, token))
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert not ours[1][ROWS - 1].any() and ours[1][: ROWS - 1].any(-1).sum() > 3


def test_large_logits_do_not_overflow():
    head, rows, row, token, _ = problem(torch.float32, chunk=ROWS)
    rows = (rows.detach() * 1e4).requires_grad_()
    ours, theirs = head.logps(rows, row, token), obvious(head, rows, row, token)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-2)
    assert torch.isfinite(torch.autograd.grad(ours.sum(), rows)[0]).all()


def test_a_bfloat16_head_gives_float32_log_probs_and_a_gradient_as_near_as_autograds():
    """Distance from the float64 gradient of the same rounded head: ours and autograd's own in bfloat16."""
    head, rows, row, token, (plus, *_) = problem(torch.bfloat16, chunk=5 * ROWS)
    exact = Head(head.weight.double(), chunk=head.chunk)
    wide = rows.detach().double().requires_grad_()
    expected = torch.autograd.grad((exact.logps(wide, row, token) * plus).sum(), wide)[0]
    logps = head.logps(rows, row, token)
    assert logps.dtype == torch.float32
    ours = torch.autograd.grad((logps * plus).sum(), rows)[0]
    theirs = torch.autograd.grad((obvious(head, rows, row, token) * plus).sum(), rows)[0]
    assert ours.dtype == torch.bfloat16
    assert (ours - expected).norm() < max(1.5 * (theirs - expected).norm(), 0.02 * expected.norm())


def test_no_targets_and_no_gradient():
    head, rows, *_ = problem()
    none = torch.empty(0, dtype=torch.long, device=rows.device)
    assert head.logps(rows, none, none).shape == (0,)
    with torch.no_grad():
        assert not head.logps(rows, none.new_tensor([1]), none.new_tensor([2])).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_not_rounded_on_a_cpu(dtype, monkeypatch):
    """Values and gradient are those of the same numbers in float64, though a product would be rounded."""
    monkeypatch.setattr("twig.engine.lm_head._PART", 7 * 16)
    draw = torch.Generator().manual_seed(0)
    weight, rows = (8 * torch.randn(n, 16, generator=draw, dtype=torch.float64).to(dtype) for n in (23, 5))
    row, token = torch.tensor([0, 2, 2, 4]), torch.tensor([3, 22, 0, 7])
    exact = rows.double().requires_grad_()
    logits = exact @ weight.double().t()
    expected = torch.log_softmax(logits, -1)[row, token]
    (expected * torch.arange(1.0, 5.0)).sum().backward()
    assert exact.grad is not None
    torch.testing.assert_close(
        head_product(rows, weight, None).double(), logits.detach(), rtol=1e-5, atol=1e-3
    )
    rounded = torch.nn.functional.linear(rows, weight).double()
    assert float((rounded - logits).detach().abs().max()) > 0.05, "or nothing is tested"
    for chunk in (11 * 5, 2**20):
        ours = rows.clone().requires_grad_()
        logps = Head(weight, chunk=chunk).logps(ours, row, token)
        assert logps.dtype is torch.float32
        torch.testing.assert_close(logps.detach().double(), expected.detach(), rtol=1e-5, atol=1e-3)
        (logps * torch.arange(1.0, 5.0)).sum().backward()
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=0.01, atol=0.01)
