"""Prompts whose completions all get the same reward give way to the next ones of the data."""

import numpy as np
import pytest
import tiny
from gradients import engine_gradient, oracle_gradient
from numerics import assert_same, casts
from restarts import LONGEST, PROMPTS, SIZE, Watched, ids_of, own_prompt
from test_trainer import build_trainer

from twig.core.algorithms.base import Objective
from twig.engine.sampler import Request, sample
from twig.tasks.rewards import judge
from twig.training.batch import completion_rows

REDRAW = 3
WORDS = ("algorithm.replay.probability=0", f"rollout.redraw={REDRAW}")


@pytest.fixture(autouse=True)
def _float64():
    with casts():
        yield


class Choosy(Watched):
    """Rewards length by its parity, but gives the same to all completions of four prompts in five."""

    def __call__(self, completions, completion_ids, prompts, **kwargs):
        rewards = super().__call__(completions, completion_ids, prompts, **kwargs)
        return [r if sum(map(ord, p)) % 5 == 0 else 1.0 for r, p in zip(rewards, prompts, strict=True)]


def choosy(*overrides, policy=None):
    return build_trainer(*WORDS, *overrides, reward=Choosy(), policy=policy)


def one_by_one(trainer, step, taken):
    """The twin: round after round, each prompt sampled by itself; returns kept and let-go groups' ids."""
    order = trainer._order(0)
    kept, gone = {}, []
    places = list(range(PROMPTS))
    for number in range(REDRAW + 1):
        for n, place in enumerate(places):
            index = int(order[taken])
            taken += 1
            ids = np.array(own_prompt(trainer, index))
            request = Request(ids, SIZE, LONGEST, number * PROMPTS + n)
            (drawn,) = sample(trainer.policy, [request], trainer.sampling, step=step).completions
            prompt = trainer.task.train[index].prompt
            rewards = Choosy()([c.text for c in drawn], None, [prompt] * SIZE)
            if place in kept:
                gone.append(kept[place])
            kept[place] = (index, [c.ids.tolist() for c in drawn], rewards)
        places = [place for place in places if len(set(kept[place][2])) == 1]
        if not places:
            break
    return [kept[place] for place in range(PROMPTS)], gone, taken


def test_a_step_is_that_of_prompts_sampled_one_by_one():
    trainer, redrawn, refilled = choosy(), 0, 0
    for step in range(1, 5):
        kept, gone, taken = one_by_one(trainer, step, trainer.drawn_prompts)
        batch, metrics = trainer.step(step)
        assert [group.prompt_index for group in batch.groups] == [index for index, _, _ in kept]
        assert ids_of(batch) == [ids for _, ids, _ in kept]
        assert [group.rewards.tolist() for group in batch.groups] == [rewards for _, _, rewards in kept]
        assert trainer.drawn_prompts == taken
        every = kept + gone
        assert metrics["redraw/groups"] == len(gone)
        assert metrics["tokens/sampled"] == sum(len(ids) for _, rows, _ in every for ids in rows)
        assert metrics["reward"] == pytest.approx(np.mean([rewards for _, _, rewards in every]))
        equal = [len(set(rewards)) == 1 for _, _, rewards in every]
        assert metrics["frac_reward_zero_std"] == pytest.approx(np.mean(equal))
        redrawn += len(gone)
        refilled += sum(len(set(rewards)) > 1 for _, _, rewards in kept)
    assert redrawn > 5 and refilled > 3, "both kinds of places occur"


@pytest.mark.parametrize("family", ["qwen2", "gemma4"])
def test_the_gradient_reads_the_boundary_of_the_groups_that_stay(family):
    """Rows recorded in several rounds, some let go: against the node-by-node loss."""
    policy = tiny.build_policy(family, layers=[2, 3], target_modules=["q_proj"])
    trainer, mixed = choosy(policy=policy), 0
    for step in range(1, 5):
        batch = trainer.sample(step)
        trainer.assign_credit(batch, step)
        assert batch.boundary is not None
        rows = [len(g.prompt_ids) + sum(len(c) for c in g.completions) for g in batch.groups]
        if batch.redrawn:
            stay = PROMPTS - len(batch.redrawn[-1].groups)
            assert len(batch.boundary) >= sum(rows) - PROMPTS * SIZE and stay >= 0
        tries, credits = [each.trie for each in batch.scored], [each.credit for each in batch.scored]
        mixed += bool(batch.redrawn) and sum(each.weighted.any() for each in credits) > 1
        mine = (trainer.policy, batch.groups, tries, credits, Objective())
        assert_same(engine_gradient(*mine, 4096, batch.boundary), oracle_gradient(*mine))
    assert mixed > 0, "a step that trains on groups of several rounds"


def test_completions_on_file_are_those_that_are_trained_on():
    trainer = choosy()
    batch, _ = trainer.step(1)
    assert batch.redrawn
    rows = completion_rows(batch, trainer.tokenizer)
    assert [row["token_ids"] for row in rows] == [ids for group in ids_of(batch) for ids in group]
    assert [row["reward"] for row in rows] == [r for group in batch.groups for r in group.rewards.tolist()]
    examples = [group.example for group in batch.groups for _ in group.completions]
    texts = [completion.text for group in batch.groups for completion in group.completions]
    judged = judge(trainer.task, examples, texts, batch.kept.rewards.total)
    assert [row["right"] for row in rows] == judged.right.tolist()


def test_nothing_is_redrawn_that_has_a_signal_or_unasked():
    every = build_trainer("algorithm.replay.probability=0", reward=Choosy())
    batch, metrics = every.step(1)
    assert metrics["redraw/groups"] == 0 and every.drawn_prompts == PROMPTS
    differing = build_trainer(*WORDS, reward=lambda completions, **_: np.arange(len(completions)) * 1.0)
    batch, metrics = differing.step(1)
    assert metrics["redraw/groups"] == 0 and differing.drawn_prompts == PROMPTS


def test_a_restart_without_signal_gives_way_too():
    trainer = build_trainer("algorithm.replay.probability=1", f"rollout.redraw={REDRAW}", reward=Choosy())
    replayed = 0
    for step in range(1, 6):
        waiting = len(trainer.restarts)
        batch, _ = trainer.step(step)
        replayed += waiting
        gone = [group for part in batch.redrawn for group in part.groups]
        assert sum(g.prefix_length > 0 for g in [*batch.groups, *gone]) == waiting
        fresh = [g for g in batch.groups if not g.prefix_length]
        assert all(g.prompt_ids.tolist() == own_prompt(trainer, g.prompt_index) for g in fresh)
    assert replayed > 0
