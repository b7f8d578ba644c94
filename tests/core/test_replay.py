"""Replay: which completion a group restarts from and where, and what the trainer makes of it."""

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_groups import bounded
from restarts import may_be_cut_to

from twig.core.replay import Replay, Restart, choose_cut, choose_restart
from twig.core.rng import REPLAY, generator
from twig.core.types import Completion, Example, Group


class Given(np.random.Generator):
    """A generator whose four uniform numbers (wanted, prefer, pick, where) are given."""

    def __init__(self, *numbers: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.numbers = numbers

    def random(self, size: int) -> np.ndarray:
        assert size == len(self.numbers)
        return np.array(self.numbers, np.float64)


def completion(ids, entropies=None, finished=True) -> Completion:
    entropies = np.ones(len(ids)) if entropies is None else np.array(entropies, np.float64)
    return Completion(np.array(ids, np.int64), np.zeros(len(ids)), entropies, finished, "")


def group_of(*completions: Completion, prompt=(3, 4, 5), prefix=(), index=17) -> Group:
    ids = np.array([*prompt, *prefix], np.int64)
    rewards = np.zeros(len(completions))
    return Group(Example(""), index, ids, list(completions), rewards, len(prefix))


def grid(size: int) -> np.ndarray:
    """0, 1 / size, ... below 1; `size` a power of two, so that each is exact."""
    return np.arange(size) / size


# ---- where a completion is cut -----------------------------------------------------------------------------


def cuts(done: Completion, how: str, size: int = 1024) -> dict[int, Fraction]:
    """The share of all uniform numbers that gives each cut, by walking over a grid."""
    actual = [choose_cut(done, how, float(uniform)) for uniform in grid(size)]
    assert actual == sorted(actual), "a larger number never cuts earlier"
    return {cut: Fraction(actual.count(cut), size) for cut in sorted(set(actual))}


def test_a_uniform_cut_is_before_each_later_token_alike():
    assert cuts(completion([6, 7, 8, 9, 1]), "uniform") == {t: Fraction(1, 4) for t in (1, 2, 3, 4)}
    quiet = completion([6, 7, 8, 9, 1], [9, 0, 0, 5, 0])
    assert cuts(quiet, "uniform") == {t: Fraction(1, 4) for t in (1, 2, 3, 4)}, "entropy plays no part"


@pytest.mark.parametrize(
    "entropies, shares",
    [
        ([5, 1, 3, 0, 4], {1: (1, 8), 2: (3, 8), 4: (4, 8)}),  # the entropy of the first token plays no part
        ([0, 0.25, 0.25, 0.5], {1: (1, 4), 2: (1, 4), 3: (1, 2)}),
        ([0, 0, 0, 2, 0], {3: (1, 1)}),
        ([7, 0, 0, 0, 0], {t: (1, 4) for t in (1, 2, 3, 4)}),  # nowhere any: uniform
        ([0, 3], {1: (1, 1)}),
    ],
)
def test_an_entropy_cut_is_in_proportion_to_the_entropy_there(entropies, shares):
    actual = cuts(completion(range(len(entropies)), entropies), "entropy")
    assert actual == {cut: Fraction(*share) for cut, share in shares.items()}


@given(st.lists(st.integers(0, 40), min_size=2, max_size=30), st.integers(0, 4095))
@bounded
def test_an_entropy_cut_equals_a_loop_in_exact_fractions(quarters, number):
    entropies, uniform = [q / 4 for q in quarters], Fraction(number, 4096)
    weights = [Fraction(e) for e in entropies[1:]]
    if not any(weights):
        weights = [Fraction(1)] * len(weights)
    bound, total, expected = uniform * sum(weights), Fraction(0), 0
    while total <= bound:
        total += weights[expected]
        expected += 1
    cut = choose_cut(completion(range(len(entropies)), entropies), "entropy", float(uniform))
    assert cut == expected
    assert 1 <= cut < len(entropies)


@given(
    st.lists(st.floats(0, 20), min_size=2, max_size=12),
    st.sampled_from([0.0, 5e-324, 0.5, 1 - 2**-53]),
    st.sampled_from(["entropy", "uniform"]),
)
@bounded
def test_a_cut_leaves_a_token_on_either_side(entropies, uniform, how):
    assert 1 <= choose_cut(completion(range(len(entropies)), entropies), how, uniform) < len(entropies)


# ---- which completion --------------------------------------------------------------------------------------


def test_probability_0_and_1():
    group = group_of(completion([6, 7, 1]))
    for target in (0.0, 0.5, 1 - 2**-53):
        rng = Given(target, 0, 0, 0)
        assert choose_restart(group, [False], Replay(probability=0.0), rng) is None
        assert choose_restart(group, [False], Replay(probability=1.0), rng) == Restart(17, [6])


def test_the_whole_distribution_by_walking_over_all_four_numbers():
    """Each (completion, cut) has exactly the share of the numbers that the rule gives it.

    Two of the four usable completions are right; a right one that was cut off and one of a single token are
    among the unusable. With probability 3/4, and 1/4 of the time a right one where there is one.
    """
    group = group_of(
        completion([10, 11, 12, 1], [9, 2, 1, 1]),
        completion([20, 21, 22], [1, 1, 1], finished=False),
        completion([30, 31, 1], [0, 3, 1]),
        completion([1], [1]),
        completion([40, 1], [0, 0]),
        completion([50, 51, 52, 53, 1], [0, 1, 1, 1, 1]),
    )
    right = np.array([True, True, False, True, False, True])
    expected: dict[tuple[int, ...], Fraction] = {}
    for i, weights in ((0, (2, 1, 1)), (2, (3, 1)), (4, (1,)), (5, (1, 1, 1, 1))):
        chosen = Fraction(3, 4) * Fraction(1, 4) + (Fraction(1, 4) * Fraction(1, 2) if right[i] else 0)
        for t, weight in enumerate(weights, 1):
            prefix = tuple(group.completions[i].ids[:t].tolist())
            expected[prefix] = Fraction(3, 4) * chosen * Fraction(weight, sum(weights))

    options = Replay(probability=0.75, prefer_correct=0.25, cut="entropy")
    actual: dict[tuple[int, ...], int] = {}
    numbers = list(itertools.product(grid(4), grid(4), grid(8), grid(8)))
    for four in numbers:
        restart = choose_restart(group, right, options, Given(*four))
        if restart is not None:
            assert restart.prompt_index == 17
            actual[tuple(restart.prefix)] = actual.get(tuple(restart.prefix), 0) + 1
    assert {prefix: Fraction(count, len(numbers)) for prefix, count in actual.items()} == expected
    assert sum(expected.values()) == Fraction(3, 4)


@pytest.mark.parametrize("prefer, firsts", [(1.0, {10}), (0.0, {10, 20, 30})])
def test_prefer_correct_0_and_1(prefer, firsts):
    group = group_of(*(completion([first, 2, 1]) for first in (10, 20, 30)))
    options = Replay(probability=1.0, prefer_correct=prefer)
    drawn = [
        choose_restart(group, [True, False, False], options, Given(0, prefer_number, pick, 0))
        for prefer_number, pick in itertools.product((0.0, 0.5, 1 - 2**-53), (0.0, 0.4, 0.7, 1 - 2**-53))
    ]
    assert {restart.prefix[0] for restart in drawn} == firsts


def test_where_none_is_right_all_may_restart():
    group = group_of(*(completion([first, 2, 1]) for first in (10, 20)))
    options = Replay(probability=1.0, prefer_correct=1.0)
    drawn = [choose_restart(group, [False, False], options, Given(0, 0, pick, 0)) for pick in (0, 0.75)]
    assert [restart.prefix[0] for restart in drawn] == [10, 20]


def test_a_right_completion_that_cannot_be_used_is_not_preferred():
    """Right ones are cut off or of one token: any usable one is taken."""
    group = group_of(completion([10, 11], finished=False), completion([1]), completion([20, 1]))
    options = Replay(probability=1.0, prefer_correct=1.0)
    for pick in grid(8):
        restart = choose_restart(group, [True, True, False], options, Given(0, 0, float(pick), 0))
        assert restart == Restart(17, [20])


@pytest.mark.parametrize(
    "completions",
    [
        [completion([6, 7, 8], finished=False)] * 3,
        [completion([1])] * 3,
        [completion([1]), completion([6, 7, 8, 9], finished=False), completion([], finished=True)],
    ],
    ids=["unfinished", "one token", "both"],
)
def test_nothing_usable_gives_none(completions):
    options = Replay(probability=1.0, prefer_correct=0.5)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert choose_restart(group_of(*completions), [True] * 3, options, rng) is None


def test_a_restart_of_a_restart_keeps_the_whole_prefix():
    """The prompt's own tokens are no part of it; those of the earlier prefix are."""
    group = group_of(completion([8, 9, 1], [0, 0, 1]), prompt=(3, 4), prefix=(6, 7))
    assert group.prompt_ids.tolist() == [3, 4, 6, 7]
    restart = choose_restart(group, [False], Replay(probability=1.0), Given(0, 0, 0, 0))
    assert restart == Restart(17, [6, 7, 8, 9])
    assert all(type(token) is int for token in restart.prefix), "json writes no numpy numbers"


def test_a_restart_survives_json():
    restart = Restart(5, [1, 2, 3])
    assert Restart(**json.loads(json.dumps(restart.as_dict()))) == restart
    assert restart.as_dict() == {"prompt_index": 5, "prefix": [1, 2, 3]}


def random_group(seed: int) -> tuple[Group, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = [
        completion(rng.integers(2, 9, n), rng.random(n), bool(rng.random() < 0.6))
        for n in rng.integers(1, 9, 6)
    ]
    return group_of(*made, prefix=rng.integers(2, 9, rng.integers(0, 4))), rng.random(6) < 0.5


@given(
    st.integers(0, 10**6),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.3, 1.0]),
    st.sampled_from(["entropy", "uniform"]),
)
@bounded
def test_a_restart_is_a_function_of_its_generator(group_seed, seed, probability, how):
    group, right = random_group(group_seed)
    options = Replay(probability=probability, cut=how)
    first = choose_restart(group, right, options, generator(seed, REPLAY, 2, 3))
    np.random.seed(seed % 1000)
    assert choose_restart(group, right, options, generator(seed, REPLAY, 2, 3)) == first
    if first is not None:
        kept, drawn = first.prefix[: group.prefix_length], first.prefix[group.prefix_length :]
        assert kept == group.prompt_ids[3:].tolist()
        assert any(may_be_cut_to(c, drawn) for c in group.completions)
