"""The trainer, step by step: restarts come first, and every step is a function of the state."""

import json

import numerics
import numpy as np
import pytest
import saved
import tiny
import torch
from gradients import engine_gradient, oracle_gradient
from numerics import assert_same
from restarts import ENDS, LONGEST, PROMPTS, SIZE, Watched, ids_of, may_be_cut_to, own_prompt, prefix_of

from twig.common.progress import Progress
from twig.config.load import Settings
from twig.core.algorithms.base import Objective
from twig.core.trie import PrefixTrie
from twig.engine.sampler import Request, SamplingParams, sample
from twig.tasks.load import load_task
from twig.training.trainer import Trainer


def build_trainer(*overrides: str, reward=None, policy=None, algorithm=None) -> Trainer:
    """On a tiny float64 model whose 23 tokens are the first of the tokenizer: digits, signs, letters."""
    settings = Settings.from_dict(
        {
            "model": {"name": "tiny"},
            "task": {"name": "multiplication", "digits": [2, 1], "train_size": 40},
            "rollout": {
                "num_generations": SIZE,
                "prompts_per_step": PROMPTS,
                "max_completion_length": LONGEST,
            },
            "algorithm": algorithm or {"name": "t-spmo", "replay": {"probability": 1.0}},
            "train": {"learning_rate": 1e-2, "max_steps": 20},
        },
        overrides,
    )
    task = load_task(settings, reward_funcs=reward or Watched())
    policy = policy or tiny.build_policy()
    tokenizer = saved.build_tokenizer()
    sampling = SamplingParams.of(settings, tokenizer, ENDS)
    return Trainer(settings, policy, tokenizer, task, sampling, Progress())


@pytest.fixture(autouse=True)
def _float64():
    with numerics.casts():
        yield


def test_a_restart_takes_a_slot_of_the_next_step():
    """Restarts come first; only the slots they leave are filled from the data, where it had stopped."""
    trainer = build_trainer("algorithm.replay.probability=0.5")
    fresh, replayed = [], 0
    for step in range(1, 7):
        waiting, taken = list(trainer.restarts), trainer.drawn_prompts
        batch, metrics = trainer.step(step)
        assert len(batch.groups) == PROMPTS
        for group, restart in zip(batch.groups, waiting, strict=False):
            assert group.prompt_index == restart.prompt_index
            assert group.prefix_length == len(restart.prefix) > 0
            assert prefix_of(group) == restart.prefix
            assert group.prompt_ids.tolist() == own_prompt(trainer, group.prompt_index) + restart.prefix
            assert group.example == trainer.task.train[group.prompt_index]
        for group in batch.groups[len(waiting) :]:
            assert group.prefix_length == 0
            assert group.prompt_ids.tolist() == own_prompt(trainer, group.prompt_index)
            fresh.append(group.prompt_index)
        assert metrics["replay/groups"] == len(waiting) == sum(g.prefix_length > 0 for g in batch.groups)
        assert trainer.drawn_prompts - taken == PROMPTS - len(waiting)
        replayed += len(waiting)
    assert 3 < replayed < 15, "some slots of each kind"
    plain = build_trainer("algorithm.replay.probability=0")
    order = [g.prompt_index for step in range(1, 7) for g in plain.step(step)[0].groups]
    assert fresh == order[: len(fresh)], "replay skips no problem of the data"


def test_without_replay_there_is_no_restart():
    trainer = build_trainer("algorithm.replay.probability=0")
    for step in (1, 2):
        batch, metrics = trainer.step(step)
        assert metrics["replay/groups"] == 0 and not any(g.prefix_length for g in batch.groups)
        assert trainer.restarts == []


def test_restarts_come_from_the_last_steps_groups_and_prefixes_add_up():
    """Each restart is the prefix of its group and a proper part of one of its finished completions."""
    trainer, again = build_trainer(), 0
    for step in range(1, 6):
        batch, _ = trainer.step(step)
        assert len(trainer.restarts) > 0
        for restart in trainer.restarts:
            kept = [
                group
                for group in batch.groups
                if group.prompt_index == restart.prompt_index
                and restart.prefix[: group.prefix_length] == prefix_of(group)
                and any(may_be_cut_to(c, restart.prefix[group.prefix_length :]) for c in group.completions)
            ]
            assert len(kept) == 1
            assert len(restart.prefix) < LONGEST
            again += kept[0].prefix_length > 0
    assert again > 2, "restarts of restarts must occur"


def test_rewards_see_the_prefix_and_the_continuation():
    reward = Watched()
    trainer, seen = build_trainer(reward=reward), 0
    for step in range(1, 4):
        batch, _ = trainer.step(step)
        call = reward.calls[-1]
        made = [(group, c) for group in batch.groups for c in group.completions]
        assert len(made) == len(call["texts"]) == PROMPTS * SIZE
        for number, (group, c) in enumerate(made):
            whole = prefix_of(group) + c.ids.tolist()
            assert call["ids"][number] == whole
            text = trainer.tokenizer.decode(whole, skip_special_tokens=True)
            assert call["texts"][number] == c.text == text
            assert call["prompts"][number] == group.example.prompt, "the prompt is that of the data"
            assert group.rewards[number % SIZE] == float(len(text) % 2 == 0)
            seen += group.prefix_length > 0
    assert seen > SIZE


def test_a_continuation_gets_the_tokens_that_its_prefix_left():
    trainer, longest, ended = build_trainer(), 0, 0
    for step in range(1, 9):
        batch, _ = trainer.step(step)
        for group in batch.groups:
            left = LONGEST - group.prefix_length
            assert left >= 1
            for c in group.completions:
                assert 1 <= len(c) <= left
                assert c.finished or len(c) == left, "cut off at the limit and nowhere else"
                if group.prefix_length:
                    longest += not c.finished
                    ended += c.finished
    assert longest > 3 and ended > 3, "continuations of both kinds"


def test_a_restart_is_sampled_as_a_prompt_of_its_slot_would_be():
    trainer = build_trainer()
    trainer.step(1)
    waiting = list(trainer.restarts)
    batch = trainer.sample(2)
    for slot, (restart, group) in enumerate(zip(waiting, batch.groups, strict=False)):
        ids = np.array(own_prompt(trainer, restart.prompt_index) + restart.prefix)
        request = Request(ids, SIZE, LONGEST - len(restart.prefix), slot, len(restart.prefix))
        (drawn,) = sample(trainer.policy, [request], trainer.sampling, step=2).completions
        assert [c.ids.tolist() for c in drawn] == [c.ids.tolist() for c in group.completions]


def restarted_and_fresh() -> tuple[Trainer, object]:
    """A step with a restart and, in another slot, the same prompt from its beginning."""
    trainer = build_trainer("task.train_size=1")
    trainer.step(1)
    trainer.restarts = trainer.restarts[:1]
    batch = trainer.sample(2)
    trainer.assign_credit(batch, 2)
    assert [g.prompt_index for g in batch.groups] == [0] * PROMPTS
    assert [g.prefix_length > 0 for g in batch.groups] == [True, False, False]
    return trainer, batch


def test_the_trie_of_a_restart_is_its_own():
    """Rooted at the cut: its values are means of its own rewards, and it adds nothing to the first one's."""
    _, batch = restarted_and_fresh()
    assert [each.slot for each in batch.scored] == list(range(PROMPTS))
    for group, each in zip(batch.groups, batch.scored, strict=True):
        trie, credit = each.trie, each.credit
        own = PrefixTrie.build([c.ids for c in group.completions], group.rewards)
        for name in ("token", "parent", "depth", "count", "reward_sum"):
            np.testing.assert_array_equal(getattr(trie, name), getattr(own, name))
        assert trie.count[0] == SIZE
        assert trie.value[0] == pytest.approx(group.rewards.mean())
        assert trie.depth.max() <= LONGEST - group.prefix_length
        assert len(credit.plus) == len(trie)


def test_the_gradient_of_a_restart_is_that_of_its_longer_prompt():
    """Against the node-by-node loss, with the boundary recorded while sampling; in one pack and in many."""
    trainer, batch = restarted_and_fresh()
    tries, credits = [each.trie for each in batch.scored], [each.credit for each in batch.scored]
    assert credits[0].weighted.any() and credits[1].weighted.any()
    step = (trainer.policy, batch.groups, tries, credits, Objective())
    theirs = oracle_gradient(*step)
    for size in (20, 4096):
        assert_same(engine_gradient(*step, size, batch.boundary), theirs)


def test_restarts_are_part_of_the_state():
    """A trainer restored from the state, by way of JSON, samples the steps that the first one samples."""
    first, second = build_trainer(), build_trainer()
    for step in (1, 2):
        first.step(step)
    tensors, state = first.state()
    tensors = {file: {n: t.detach().clone() for n, t in parts.items()} for file, parts in tensors.items()}
    state = json.loads(json.dumps(state))
    assert state["restarts"] == [restart.as_dict() for restart in first.restarts] != []
    second.restore(tensors, state)
    assert second.restarts == first.restarts
    for step in (3, 4):
        mine, theirs = second.step(step)[0], first.step(step)[0]
        assert [g.prompt_ids.tolist() for g in mine.groups] == [g.prompt_ids.tolist() for g in theirs.groups]
        assert ids_of(mine) == ids_of(theirs)
    for name, parameter in first.policy.parameters.items():
        assert torch.equal(parameter, second.policy.parameters[name])
