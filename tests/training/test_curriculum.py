"""Problems whose last group taught nothing are drawn less often; the order is a function of the state."""

import json

import numpy as np
import pytest
from numerics import casts
from restarts import PROMPTS, Watched, ids_of
from test_trainer import build_trainer

from twig.core.rng import CURRICULUM, generator

CHANCE = 0.3
WORDS = ("algorithm.replay.probability=0", "task.train_size=12", f"rollout.curriculum={CHANCE}")


@pytest.fixture(autouse=True)
def _float64():
    with casts():
        yield


class Settles(Watched):
    """Rewards length by its parity, but gives the same to all completions of two prompts in three."""

    def __call__(self, completions, completion_ids, prompts, **kwargs):
        rewards = super().__call__(completions, completion_ids, prompts, **kwargs)
        return [r if sum(map(ord, p)) % 3 == 0 else 1.0 for r, p in zip(rewards, prompts, strict=True)]


def steps_of(trainer, first, last):
    return [trainer.step(step) for step in range(first, last + 1)]


def in_turn(trainer, groups):
    """The twin: the prompts that come after groups with these problems, taught or not, in this order."""
    size, settled, taken, drawn = len(trainer.task.train), {}, 0, []
    for batch in groups:
        chosen = []
        while len(chosen) < PROMPTS:
            index = int(trainer._order(taken // size)[taken % size])
            taken += 1
            coin = generator(trainer.settings.train.seed, CURRICULUM, taken).random()
            if not settled.get(index) or coin < CHANCE:
                chosen.append(index)
        drawn.append(chosen)
        settled |= {index: equal for index, equal in batch}
    return drawn, taken


def test_settled_problems_are_drawn_less_often():
    trainer = build_trainer(*WORDS, reward=Settles())
    batches = steps_of(trainer, 1, 20)
    groups = [[(g.prompt_index, len(set(g.rewards)) == 1) for g in batch.groups] for batch, _ in batches]
    drawn, taken = in_turn(trainer, groups)
    assert [[index for index, _ in batch] for batch in groups] == drawn
    assert trainer.drawn_prompts == taken
    passed = [metrics["curriculum/passed_over"] for _, metrics in batches]
    assert sum(passed) == taken - 20 * PROMPTS > 20
    later = [equal for batch in groups[8:] for _, equal in batch]
    plain = [e for b, _ in steps_of(build_trainer(*WORDS[:2], reward=Settles()), 1, 8) for e in equal_of(b)]
    assert np.mean(later) < np.mean(plain) - 0.15, "fewer groups without signal"


def equal_of(batch):
    return [len(set(group.rewards)) == 1 for group in batch.groups]


def test_a_problem_that_teaches_again_has_every_turn_again():
    trainer = build_trainer(*WORDS, reward=Settles())
    trainer.settled = set(range(len(trainer.task.train)))
    batch = trainer.sample(1)
    indices = [group.prompt_index for group in batch.groups]
    assert [index in trainer.settled for index in indices] == equal_of(batch)
    assert True in equal_of(batch) and False in equal_of(batch)


def test_what_is_settled_is_part_of_the_state():
    """A trainer restored from the state, by way of JSON, samples the steps that the first one samples."""
    first, second = (build_trainer(*WORDS, reward=Settles()) for _ in range(2))
    steps_of(first, 1, 6)
    assert first.settled
    tensors, state = first.state()
    copies = {file: {name: t.detach().clone() for name, t in ts.items()} for file, ts in tensors.items()}
    text = json.dumps(state)
    expected = [ids_of(batch) for batch, _ in steps_of(first, 7, 9)]
    second.restore(copies, json.loads(text))
    assert [ids_of(batch) for batch, _ in steps_of(second, 7, 9)] == expected


def test_a_restart_settles_nothing():
    trainer = build_trainer("algorithm.replay.probability=1", *WORDS[1:], reward=Settles())
    kept = []
    for step in range(1, 6):
        before = set(trainer.settled)
        batch, _ = trainer.step(step)
        restarted = {g.prompt_index for g in batch.groups if g.prefix_length}
        fresh = {g.prompt_index for g in batch.groups if not g.prefix_length}
        kept += restarted
        assert {i for i in restarted - fresh if i in trainer.settled} == (restarted - fresh) & before
    assert kept


def test_off_it_keeps_and_logs_nothing():
    trainer = build_trainer(*WORDS[:2], reward=Settles())
    _, metrics = trainer.step(1)
    assert not trainer.settled and "curriculum/passed_over" not in metrics
