"""Whole training steps on models whose layers keep a state, or share keys and values, against slow twins."""

import numerics
import numpy as np
import oracles
import pytest
import tiny
import torch
from family_cases import MODULES
from gradients import engine_gradient, oracle_gradient
from numerics import assert_same, assert_values
from restarts import ENDS, LONGEST, PROMPTS
from test_trainer import build_trainer

from twig.core.algorithms.base import Objective
from twig.core.rng import uniforms

KINDS = ["qwen3_5", "lfm2", *tiny.SHARING]
RATE = 3e-2  # moves log-probs far enough that ratios are clipped
TWICE = {"name": "grpo", "num_iterations": 3, "epsilon": 0.02, "beta": 0.1}
FEW = ("rollout.prompts_per_step=2", "rollout.num_generations=4", "rollout.max_completion_length=6")


def every_other(completions, **columns):
    return [float(n % 2) for n in range(len(completions))]


@pytest.fixture(autouse=True)
def _float64():
    with numerics.casts():
        yield


def trainer_of(kind, *overrides, **options):
    """Layers of both kinds are adapted, and there is a trunk below them."""
    modules = MODULES.get(kind, ["q_proj", "v_proj"])
    policy = tiny.build_policy(kind, layers=[2, 3], target_modules=modules)
    return build_trainer(*overrides, policy=policy, reward=every_other, **options)


def node_logps(policy, batch):
    """By group the log-prob of each weighted node, from a forward pass over its prefix alone."""
    values = []
    with torch.no_grad():
        for each in batch.scored:
            nodes = np.flatnonzero(each.credit.weighted).tolist()
            prefixes = [oracles.prefix_of(each.trie, node) for node in nodes]
            logps = oracles.prefix_logps(policy, each.group.prompt_ids, prefixes)
            values.append(dict(zip(nodes, map(float, logps), strict=True)))
    return values


def clipped(batch, old, now, epsilon):
    """How many nodes have a ratio beyond the end of the range where it is clipped."""
    count = 0
    for each, before, after in zip(batch.scored, old, now, strict=True):
        for node, logp in after.items():
            ratio = float(np.exp(logp - before[node]))
            count += each.credit.plus[node] > 0 and ratio > 1 + epsilon
            count += each.credit.minus[node] < 0 and ratio < 1 - epsilon
    return count


@pytest.mark.parametrize("kind", [pytest.param("qwen3_5", marks=pytest.mark.slow), *KINDS[1:]])
def test_iterations_on_one_batch_are_those_of_the_slow_twin(kind):
    trainer, twin = (trainer_of(kind, *FEW, algorithm=TWICE) for _ in range(2))
    batch = trainer.sample(1)
    trainer.assign_credit(batch, 1)
    tries, credits = [each.trie for each in batch.scored], [each.credit for each in batch.scored]
    objective, old = trainer.settings.algorithm.objective(), node_logps(twin.policy, batch)
    beyond = 0
    for iteration in range(TWICE["num_iterations"]):
        if iteration > 0:
            beyond += clipped(batch, old, node_logps(twin.policy, batch), TWICE["epsilon"])
        oracle_gradient(twin.policy, batch.groups, tries, credits, objective, old)
        torch.nn.utils.clip_grad_norm_(twin.parameters, twin.settings.train.max_grad_norm)
        twin._optimize(RATE, 0.0)
    assert beyond > 0
    start = {name: p.detach().clone() for name, p in trainer.policy.parameters.items()}
    trainer.update(batch, RATE)
    moved, theirs = (
        {name: p.detach() - start[name] for name, p in policy.parameters.items()}
        for policy in (trainer.policy, twin.policy)
    )
    assert_same((0.0, moved), (0.0, theirs), bound=1e-6)  # Adam divides small gradients by their size


@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_draws_and_records_what_a_loop_over_whole_texts_does(kind):
    """And its gradient is that of its longer prompt, from what was recorded, in one pack and in many."""
    trainer = trainer_of(kind)
    trainer.step(1)
    batch = trainer.sample(2)
    assert len(batch.groups) == PROMPTS and sum(group.prefix_length > 0 for group in batch.groups) > 1
    policy, seed = trainer.policy, trainer.settings.train.seed
    for slot, group in enumerate(batch.groups):
        limit = LONGEST - group.prefix_length
        for number, completion in enumerate(group.completions):
            noise = uniforms(seed, 2, slot, number, limit)
            ids, logps, _ = oracles.sample_one(policy, group.prompt_ids, limit, ENDS, noise)
            assert completion.ids.tolist() == ids
            assert_values(completion.logps, logps)
    trainer.assign_credit(batch, 2)
    tries, credits = [each.trie for each in batch.scored], [each.credit for each in batch.scored]
    assert batch.boundary is not None
    step = (policy, batch.groups, tries, credits, Objective())
    theirs = oracle_gradient(*step)
    for size in (20, 4096):
        assert_same(engine_gradient(*step, size, batch.boundary), theirs)
