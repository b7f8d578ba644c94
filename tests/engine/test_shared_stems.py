"""What prompts begin with is run once for several groups, with the log-probs and gradients of each alone."""

from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import numerics
import numpy as np
import pytest
import random_groups
import tiny
import torch
from gradients import credit_of, oracle_gradient, scored, texts_of
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_same
from test_engine import recorded_by_hand
from test_mixers import MODULES, groups_of_drawn
from test_out_of_memory import Heard, break_at

from twig.common.progress import Progress
from twig.config.sizes import Sizes
from twig.core.algorithms.base import Objective
from twig.core.algorithms.registry import algorithm
from twig.engine import pack
from twig.engine.decoder import Decoder
from twig.engine.sampler import Request, SamplingParams, sample
from twig.engine.update import LogProbs, Passes


@pytest.fixture(autouse=True)
def _exact(request):
    with nullcontext() if "float32" in request.function.__name__ else numerics.casts():
        yield


ALWAYS, NEVER = 1, 10**9  # cells that a shared stem has to save


def groups_of(rng, beginnings):
    """Groups whose prompts begin with so many tokens of one text; one prompt is the next one's beginning."""
    text, groups = rng.integers(3, tiny.VOCAB, 20), []
    for number, length in enumerate(beginnings):
        prompt = np.concatenate([text[:length], rng.integers(3, tiny.VOCAB, number % 3 + (length == 0))])
        groups.append(replace(tiny.random_group(rng, index=number), prompt_ids=prompt))
    return groups


def passes_of(policy, batch, size=4096, least=ALWAYS, boundary=None, progress=None, checkpointed=False):
    sizes = Sizes(1, size, 2**22, checkpointed)
    with patch.dict(pack.LEAST_SAVED, {policy.device.type: least}):
        return Passes(policy, sizes, progress or Progress(), scored(*batch), boundary)


def update(policy, passes, objective, old=None):
    """Log-probs of all nodes, those of the base if there is a KL term, the loss and the gradient."""
    for parameter in policy.parameters.values():
        parameter.grad = None
    with policy.base():
        ref = passes.logps() if objective.beta else None
    logps, loss = passes.backward(objective, LogProbs(old, ref, old))
    return logps, ref, (loss, {name: p.grad.clone() for name, p in policy.parameters.items()})


def shares(passes):
    """Whether some packs are behind a stem that groups share."""
    return any(each.stem and each.stem.shared for each in passes.packs)


policy_of_examples = tiny.build_policy(layers=[1, 3], temperature=0.8)


@given(
    st.integers(0, 10**6),
    st.lists(st.sampled_from([0, 1, 4, 9, 9, 12]), min_size=1, max_size=5),
    st.sampled_from([("grpo", 0.0), ("grpo", 0.1), ("s-grpo", 0.1), ("t-spmo", 0.0), ("gspo", 0.0)]),
    st.sampled_from([9, 20, 40, 4096]),
)
@random_groups.bounded
def test_groups_that_share_stems_have_the_update_of_each_alone(seed, beginnings, rule, size):
    policy, rng = policy_of_examples, np.random.default_rng(seed)
    groups = groups_of(rng, beginnings)
    name, beta = rule
    tries, credits = credit_of(groups, name, beta, seed)
    objective = algorithm(name, **({"beta": beta} if beta else {})).objective()
    together = passes_of(policy, (groups, tries, credits), size)
    logps, ref, (loss, gradient) = update(policy, together, objective, together.logps())

    alone = [passes_of(policy, ([g], [t], [c])) for g, t, c in zip(groups, tries, credits, strict=True)]
    assert not any(map(shares, alone))
    losses, summed = 0.0, {name: torch.zeros_like(g) for name, g in gradient.items()}
    for index, passes in enumerate(alone):
        if not passes.packs:
            continue
        own_logps, own_ref, own = update(policy, passes, objective, passes.logps())
        for values, own_values in ((logps, own_logps), (ref, own_ref)):
            if values is not None:
                np.testing.assert_allclose(values.of_group(index), own_values.of_group(0), rtol=1e-12)
        losses += own[0]
        summed = {name: g + own[1][name] for name, g in summed.items()}
    assert loss == pytest.approx(losses, rel=1e-12, abs=1e-12)
    scale = max(float(g.abs().max()) for g in summed.values())
    for name, expected in summed.items():
        assert float((gradient[name] - expected).abs().max()) <= 1e-12 * max(scale, 1e-3), name


SERVED = ["qwen2", "qwen2-window", "gemma3", "lfm2", "qwen3_5", "bamba", "gemma4"]
WAYS = {"recorded": ([2, 3], True), "run again": ([2, 3], False), "all layers": ("all", False)}
QUICK = [("qwen2", "recorded"), ("gemma3", "run again"), ("lfm2", "all layers"), ("qwen3_5", "recorded")]


@pytest.mark.parametrize(
    ("family", "way"),
    [
        pytest.param(family, way, marks=() if (family, way) in QUICK else pytest.mark.slow)
        for family in SERVED
        for way in WAYS
        if (family, way) != ("gemma4", "recorded")  # layers share keys across the cut
    ],
)
def test_a_shared_stem_gives_the_gradient_of_plain_forwards(family, way):
    """With windows that end inside it, layers that keep a state, and layers with others' keys."""
    layers, recorded = WAYS[way]
    policy, objective = tiny.build_policy(family, layers=layers), Objective(beta=numerics.now().beta)
    groups, boundary = groups_of(np.random.default_rng(0), [9, 9, 9, 12]), None
    tries, credits = credit_of(groups, "s-grpo", objective.beta)
    if recorded:
        groups, boundary = recorded_by_hand(policy, groups)
    passes = passes_of(policy, (groups, tries, credits), 64, boundary=boundary)
    assert shares(passes) and len(passes.packs) > 1
    assert max(len(each.ids) for each in passes.packs) > 1, "rows start from one stem"
    ours = update(policy, passes, objective)[2]
    assert_same(ours, oracle_gradient(policy, groups, tries, credits, objective))


@pytest.mark.parametrize("family", ["qwen2", "gemma4", pytest.param("qwen3_5", marks=pytest.mark.slow)])
def test_what_sampling_recorded_of_prompts_that_begin_alike_serves_their_stem(family):
    """Which holds a long beginning once; of layers with others' keys it records those beside the boundary."""
    policy = tiny.build_policy(family, layers=[3], target_modules=MODULES.get(family, ["q_proj", "v_proj"]))
    text = np.random.default_rng(0).integers(3, tiny.VOCAB, 21)
    requests = [Request(np.concatenate([text[: 21 - n], np.full(n, 3 + n)]), 4, 9, n) for n in range(3)]
    drawn = sample(policy, requests, SamplingParams([5, 6], texts_of, seed=3))
    groups, objective = groups_of_drawn(requests, drawn), Objective(beta=numerics.now().beta)
    tries, credits = credit_of(groups, beta=objective.beta)
    passes = passes_of(policy, (groups, tries, credits), 100, boundary=drawn.boundary)
    assert shares(passes) and all(each.cells is not None for each in passes.packs)
    assert max(len(each.ids) for each in passes.packs) > 1, "rows start from one stem"
    ours = update(policy, passes, objective)[2]
    assert_same(ours, oracle_gradient(policy, groups, tries, credits, objective))


def test_checkpointed_layers_share_stems_of_several_groups_in_float32():
    groups = groups_of(np.random.default_rng(0), [9, 9, 12])
    batch, actual = (groups, *credit_of(groups)), []
    for checkpointed, least in ((False, NEVER), (True, ALWAYS)):
        dtype = numerics.now().rerun
        policy = tiny.build_policy(layers=[1, 3], dtype=dtype, checkpoint_layers=checkpointed)
        passes = passes_of(policy, batch, 64, least, checkpointed=checkpointed)
        assert shares(passes) == checkpointed
        actual.append(update(policy, passes, Objective())[2])
    assert_same(actual[1], actual[0], bound=1e-5)


BREAKS = {
    "the stem's first run": (None, "open_stem", [1], None),
    "the upper layers": (Decoder, "run", [2, 3, 5], lambda *args: torch.is_grad_enabled()),
    "the backward pass": (torch.autograd, "grad", [1, 2, 3], None),
}


@pytest.mark.parametrize(
    ("owner", "name", "call", "when"),
    [(owner, name, call, when) for owner, name, calls, when in BREAKS.values() for call in calls],
)
def test_packs_that_run_out_of_memory_behind_a_shared_stem_go_on_in_parts(
    owner, name, call, when, monkeypatch
):
    policy, groups = tiny.build_policy(), groups_of(np.random.default_rng(0), [9, 12, 12, 9, 0, 12])
    batch, heard = (groups, *credit_of(groups)), Heard()
    first = passes_of(policy, batch, 90)
    assert shares(first) and len(first.packs) > 2
    whole = update(policy, first, Objective())[2]
    calls = break_at(monkeypatch, owner or policy, name, call, when=when or (lambda *args: True))
    passes = passes_of(policy, batch, 90, progress=heard)
    again = update(policy, passes, Objective())[2]
    assert len(calls) > call and len(heard.said) == 1
    assert_same(again, whole, bound=1e-10)


def test_tokens_of_a_shared_stem_count_once():
    groups = groups_of(np.random.default_rng(0), [9, 9, 9])
    batch, policy = (groups, *credit_of(groups)), tiny.build_policy()
    together, alone = (passes_of(policy, batch, 64, least) for least in (ALWAYS, NEVER))
    assert len(together.packs) > 1 and not any(each.stem for each in alone.packs)
    stem = together.packs[0].stem
    assert alone.num_tokens - together.num_tokens == 2 * len(stem)
    assert together.num_rows == alone.num_rows


def test_a_plain_engine_shares_nothing():
    groups = groups_of(np.random.default_rng(0), [9, 9])
    passes = passes_of(tiny.build_policy(engine="plain"), (groups, *credit_of(groups)))
    assert passes.packs and not any(each.stem for each in passes.packs)
