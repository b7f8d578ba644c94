"""REINFORCE++, MaxRL, MC-GRPO, the tree methods and both GTPOs: their formulas as loops, and identities."""

import numpy as np
import oracles
import pytest
import random_groups
from hypothesis import assume, given
from hypothesis import strategies as st

from twig.common.errors import UserError
from twig.core.algorithms.base import Algorithm, Credit, Scale, segment_heads
from twig.core.algorithms.registry import algorithm
from twig.core.credit import assign
from twig.core.trie import PrefixTrie

#            root (4)            G = 4, rewards 1 0 0 1, mean 1/2
#            /      \            nodes: 1 = 5, 2 = 5 6, 3 = 5 7, 4 = 8, 5 = 8 9
#       5 (3)        8 (1)       V: root 1/2, 1/3, 1, 0, 1, 1
#       /   \          \
#   6 (1)   7 (1)     9 (1)
HAND = [[5, 6], [5, 7], [5], [8, 9]], [1.0, 0.0, 0.0, 1.0]
ENTROPIES = [np.array(each) for each in ([0.1, 0.9], [0.1, 0.3], [0.1], [0.4, 0.6])]


def credit_of(group, entropies=None, trained=None, **options):
    """(trie, credit) of a group that is a step by itself."""
    completions, rewards = group
    entropies = oracles.entropies_of(completions) if entropies is None else entropies
    trie = PrefixTrie.build(completions, rewards, entropies, trained)
    (credit,), _ = assign(algorithm(**options), [trie], [np.random.default_rng(0)], 1)
    return trie, credit


def assert_sums(trie, credit, terms, kl=False):
    """The credit equals the sums of `terms` by sign, prefix by prefix."""
    for node in range(1, len(trie)):
        pairs = terms.get(oracles.prefix_of(trie, node), [])
        assert credit.plus[node] == pytest.approx(sum(w for w, _ in pairs if w > 0), rel=1e-9, abs=1e-12)
        assert credit.minus[node] == pytest.approx(sum(w for w, _ in pairs if w < 0), rel=1e-9, abs=1e-12)
        assert credit.kl[node] == pytest.approx(sum(s for _, s in pairs) * kl, abs=1e-12)


def same(left, right, factor=1.0):
    for name in ("plus", "minus"):
        np.testing.assert_allclose(getattr(left, name), factor * getattr(right, name), rtol=1e-9, atol=1e-12)


def trained_of(data, group):
    size = len(group[0])
    return np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))


binary = st.sampled_from([0.0, 1.0])
apart = st.lists(binary, min_size=2, max_size=6).map(
    lambda rewards: ([[i, 7, 8] for i in range(len(rewards))], rewards)  # nothing in common
)

# ---- by hand -----------------------------------------------------------------------------------------------


def test_maxrl_by_hand():
    # K = 2 of 4 are right: r / K - 1 / G is 1/4 or -1/4, for every token; node 1 is in 0, 1 and 2.
    _, credit = credit_of(HAND, name="maxrl")
    np.testing.assert_allclose(credit.plus, np.array([0, 1, 1, 0, 1, 1]) / 4)
    np.testing.assert_allclose(credit.minus, np.array([0, -2, 0, -1, 0, 0]) / 4)
    # With one right of four it counts 1 - 1/4 = 3/4, the wrong ones -1/4.
    _, credit = credit_of(([[1], [2], [3], [4]], [1.0, 0.0, 0.0, 0.0]), name="maxrl")
    np.testing.assert_allclose(credit.plus + credit.minus, np.array([0, 3, -1, -1, -1]) / 4)


def test_mc_grpo_by_hand():
    # Median of 0, 1, 4 is 1; differences -1, 0, 3, their sizes' median is 1. The 2 others divide.
    _, credit = credit_of(([[1], [2, 2], [3, 3, 3]], [0.0, 1.0, 4.0]), name="mc-grpo")
    expected = np.array([0, -1 / 2, 0, 0, 3 / 6, 3 / 6, 3 / 6]) / 1.001
    np.testing.assert_allclose(credit.plus + credit.minus, expected)
    # Of an even number the lower of the middle two: 0 of 0, 0, 1, 1. Two values leave a deviation of 0.
    _, credit = credit_of(HAND, name="mc-grpo")
    np.testing.assert_allclose(credit.plus, np.array([0, 1, 1, 0, 1, 1]) * 1000 / 6)
    assert not credit.minus.any()
    _, credit = credit_of(HAND, name="mc-grpo", scale_rewards="none")
    np.testing.assert_allclose(credit.plus, np.array([0, 1, 1, 0, 1, 1]) / 6)


def test_trees_by_hand():
    # Every completion adds over G |o| = 8, number 2 (of one token) over 4: node 1 gets 1/8 + 1/8 + 1/4 = 1/2.
    # TreeAdv, unscaled: V - 1/2 is -1/6, 1/2, -1/2, 1/2, 1/2.
    _, credit = credit_of(HAND, name="treeadv", scale_rewards="none")
    np.testing.assert_allclose(credit.plus + credit.minus, [0, -1 / 12, 1 / 16, -1 / 16, 1 / 16, 1 / 16])
    # TreeRL: node 1 (-1/6 - 1/6) / sqrt(3); node 2 1/2 + 2/3; node 3 -1/2 - 1/3; nodes 4 and 5 are one step
    # from the root: 1/2 + 1/2.
    _, credit = credit_of(HAND, name="treerl")
    signed = np.array([0, -4 / 3 / np.sqrt(3), 7 / 6, -5 / 6, 1, 1]) / 8
    np.testing.assert_allclose(credit.plus + credit.minus, signed)
    # TreeRPO: at the root 1/3 three times and 1 once, mean 1/2: -1/6 and 1/2. At node 1: 1 and 0.
    _, credit = credit_of(HAND, name="treerpo", scale_rewards="none")
    np.testing.assert_allclose(credit.plus + credit.minus, [0, -1 / 12, 1 / 16, -1 / 16, 1 / 16, 1 / 16])
    # Scaled: squares 3 / 36 + 1 / 4 = 1/3 over 3 and 1/2 over 1.
    _, credit = credit_of(HAND, name="treerpo")
    root, deep = 1 / (1 / 3 + 1e-4), 1 / (np.sqrt(0.5) + 1e-4)
    scaled = np.array([0, -root / 12, deep / 16, -deep / 16, root / 16, root / 16])
    np.testing.assert_allclose(credit.plus + credit.minus, scaled)


def test_segment_heads_by_hand():
    assert segment_heads(PrefixTrie.build(*HAND)).tolist() == [0, 1, 2, 3, 4, 4]
    # What all completions have in common belongs to the root; an end is a border like a fork.
    trie = PrefixTrie.build([[1, 2, 3, 4], [1, 2, 3], [1, 2, 5]], [1.0, 0.0, 0.0])
    assert segment_heads(trie).tolist() == [0, 0, 0, 3, 4, 5]


def test_reinforce_plus_plus_by_hand():
    # Two groups: rewards 1, 0 (one token and three) and 1, 1. Less the means: 1/2 on one token, -1/2 on
    # three, 0 on two: mean -1/6, variance ((2/3)^2 + 3 (1/3)^2 + 2 (1/6)^2) / 6 = (4/9 + 3/9 + 1/18) / 6.
    step = [([[1], [2, 2, 2]], [1.0, 0.0]), ([[1], [2]], [1.0, 1.0])]
    tries = [PrefixTrie.build(*group) for group in step]
    rngs = [np.random.default_rng(0)] * 2
    (a, b), scale = assign(algorithm("reinforce-plus-plus"), tries, rngs, 2)
    std = np.sqrt((4 / 9 + 3 / 9 + 1 / 18) / 6)
    assert scale.divisor == pytest.approx(6 * std)
    np.testing.assert_allclose(
        (a.plus + a.minus)[1:], np.array([2 / 3, *[-1 / 3] * 3]) / (6 * std), rtol=1e-6
    )
    np.testing.assert_allclose((b.plus + b.minus)[1:], np.array([1 / 6] * 2) / (6 * std), rtol=1e-6)
    # Without a baseline: 1 on three tokens, 0 on three, so +-1 after the normalisation.
    (a, b), _ = assign(algorithm("reinforce-plus-plus", baseline="none"), tries, rngs, 2)
    np.testing.assert_allclose((a.plus + a.minus)[1:], np.array([1, -1, -1, -1]) / 6, rtol=1e-6)
    np.testing.assert_allclose((b.plus + b.minus)[1:], np.array([1, 1]) / 6, rtol=1e-6)


def test_gtpo_token_by_hand():
    # Right: 0 and 3. At place 0 they have 0.1 and 0.4: shares of 2 times 0.2 and 0.8, at place 1 0.9 and 0.6:
    # 2 times 0.6 and 0.4. Wrong: 1 and 2, alike at place 0 (1 each), and number 1 alone at place 1 (1).
    # With alphas 1/2: right 0.7 and 1.1 (number 0), 1.3 and 0.9 (number 3), wrong -1 for all.
    _, credit = credit_of(HAND, ENTROPIES, name="gtpo-token", alpha_1=0.5, alpha_2=0.5)
    up, down = np.array([0.7, 1.1, 0, 0, 0, 1.3, 0.9]), np.array([0, 0, -1.0, -1, -1, 0, 0])
    up, down = (up - up.mean()) / up.std() / 7, (down - down.mean()) / down.std() / 7
    np.testing.assert_allclose(credit.plus, [0, up[0], up[1], 0, up[5], up[6]], rtol=1e-4)
    np.testing.assert_allclose(credit.minus, [0, down[2] + down[4], 0, down[3], 0, 0], rtol=1e-4)


def test_gtpo_token_pushes_down_more_where_a_wrong_completion_was_sure():
    # Alike at place 0. At place 1 the wrong ones have 0.2 and 0.8, so 1 / H is 5 and 1.25: shares of 2 times
    # 0.8 and 0.2. With alphas 1/2: -1.3 and -0.7, and -1 for both at place 0; 0 for the right one.
    group = [[1, 2], [3, 4], [5, 6]], [1.0, 0.0, 0.0]
    entropies = [np.array(each) for each in ([0.3, 0.5], [0.3, 0.2], [0.3, 0.8])]
    _, credit = credit_of(group, entropies, name="gtpo-token", alpha_1=0.5, alpha_2=0.5)
    down = np.array([0, 0, -1, -1.3, -1, -0.7])
    down = (down - down.mean()) / down.std() / 6
    np.testing.assert_allclose(credit.minus[3:], down[2:], rtol=1e-4)


def test_gtpo_trajectory_by_hand():
    # Advantages +-a. Node 1 is a conflict for 0, 1 and 2; no two of unlike sign end alike but nothing else.
    # Each has one conflict at most. 0: 2 a / 8 at node 1, a / 8 at node 2; 1: 0 and -a / 8; 2: 0; 3: a / 8.
    a = 0.5 / (np.sqrt(1 / 3) + 1e-4)
    options = {"name": "gtpo-trajectory", "entropy_weight": 0.0, "max_entropy": 10.0}
    _, credit = credit_of(HAND, ENTROPIES, **options)
    np.testing.assert_allclose(credit.plus, np.array([0, 2, 1, 0, 1, 1]) * a / 8)
    np.testing.assert_allclose(credit.minus, np.array([0, 0, 0, -1, 0, 0]) * a / 8)
    # Mean entropies 0.5, 0.2, 0.1 and 0.5: those above the limit are left out, the others lose a tenth.
    _, credit = credit_of(HAND, ENTROPIES, **options | {"max_entropy": 0.3, "entropy_weight": 0.1})
    assert not credit.plus.any()
    np.testing.assert_allclose(credit.minus, np.array([0, 0, 0, -a - 0.02, 0, 0]) / 8)
    # "1 2 3" (right) and "1 4 3" (wrong) begin and end alike: two conflicts in each.
    _, credit = credit_of(([[1, 2, 3], [1, 4, 3]], [1.0, 0.0]), [np.zeros(3)] * 2, **options)
    a = 0.5 / (np.sqrt(0.5) + 1e-4)
    np.testing.assert_allclose(credit.plus, np.array([0, 2, 1, 2, 0, 0]) * a / 2 / 6)
    np.testing.assert_allclose(credit.minus, np.array([0, 0, 0, 0, -1, 0]) * a / 2 / 6)


# ---- against plain Python on random groups -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["treerl", "treeadv", "treerpo"])
@given(random_groups.groups(), st.sampled_from(["group", "none"]), st.booleans(), st.data())
@random_groups.bounded
def test_trees_are_the_sums_of_their_formulas(name, group, scale_rewards, kl, data):
    trained = trained_of(data, group)
    scaled = {} if name == "treerl" else {"scale_rewards": scale_rewards}
    trie, credit = credit_of(group, trained=trained, name=name, beta=0.1 * kl, **scaled)
    assert_sums(trie, credit, oracles.tree_terms(name, *group, scale_rewards, trained), kl)


@given(random_groups.groups(reward=binary), st.data())
@random_groups.bounded
def test_maxrl_is_its_estimator(group, data):
    trained = trained_of(data, group)
    trie, credit = credit_of(group, trained=trained, name="maxrl")
    assert_sums(trie, credit, oracles.maxrl_terms(*group, trained))


@given(random_groups.groups(), st.sampled_from(["mad", "none"]), st.data())
@random_groups.bounded
def test_mc_grpo_is_the_sum_of_its_formula(group, scale_rewards, data):
    trained = trained_of(data, group)
    trie, credit = credit_of(group, trained=trained, name="mc-grpo", scale_rewards=scale_rewards)
    assert_sums(trie, credit, oracles.mc_grpo_terms(*group, scale_rewards, trained))


@given(
    st.lists(random_groups.groups(max_size=5, longest=4), min_size=1, max_size=3),
    st.sampled_from(["group", "none"]),
    st.data(),
)
@random_groups.bounded
def test_reinforce_plus_plus_normalises_over_the_tokens_of_the_step(step, baseline, data):
    trained = [trained_of(data, group) for group in step]
    tries = [PrefixTrie.build(*group, trained=on) for group, on in zip(step, trained, strict=True)]
    rngs = [np.random.default_rng(0) for _ in tries]
    credits, _ = assign(algorithm("reinforce-plus-plus", baseline=baseline), tries, rngs, len(step))
    expected = oracles.reinforce_plus_plus_terms(step, baseline, trained)
    for trie, credit, terms in zip(tries, credits, expected, strict=True):
        assert_sums(trie, credit, terms)


@given(random_groups.groups(reward=binary), st.sampled_from([(0.9, 0.1), (0.0, 1.0), (1.0, 0.0)]), st.data())
@random_groups.bounded
def test_gtpo_token_is_its_equations(group, alphas, data):
    trained, entropies = trained_of(data, group), oracles.entropies_of(group[0])
    options = {"alpha_1": alphas[0], "alpha_2": alphas[1]}
    trie, credit = credit_of(group, trained=trained, name="gtpo-token", **options)
    assert_sums(trie, credit, oracles.gtpo_token_terms(*group, entropies, *alphas, trained=trained))


@given(random_groups.groups(), st.sampled_from([0.0, 0.1]), st.sampled_from([0.3, 5.0]), st.data())
@random_groups.bounded
def test_gtpo_trajectory_is_its_rules(group, entropy_weight, max_entropy, data):
    trained, entropies = trained_of(data, group), oracles.entropies_of(group[0])
    options = {"conflict_weight": 2.0, "entropy_weight": entropy_weight, "max_entropy": max_entropy}
    trie, credit = credit_of(group, trained=trained, name="gtpo-trajectory", **options)
    # Without their own mean near the limit, which rounding could move across it.
    assume(all(abs(e.mean() - max_entropy) > 1e-9 for e in entropies if len(e)))
    assert_sums(trie, credit, oracles.gtpo_trajectory_terms(*group, entropies, **options, trained=trained))


# ---- what they are in special cases ------------------------------------------------------------------------


@given(random_groups.groups(reward=binary))
@random_groups.bounded
def test_maxrl_is_rloo_divided_by_the_mean_reward(group):
    rewards = group[1]
    assume(0 < sum(rewards))
    rloo, size = credit_of(group, name="rloo")[1], len(rewards)
    same(credit_of(group, name="maxrl")[1], rloo, (size - 1) / sum(rewards))


@given(apart)
@random_groups.bounded
def test_where_nothing_is_shared_tree_advantages_are_those_of_grpo(group):
    grpo = credit_of(group, name="grpo")[1]
    same(credit_of(group, name="treeadv")[1], grpo)
    same(credit_of(group, name="treerpo")[1], grpo)
    same(credit_of(group, name="treerl")[1], credit_of(group, name="grpo", scale_rewards="none")[1], 2.0)
    # Without the entropy, and if right and wrong share no token, so is GTPO (trajectory).
    trie = [[i, 7 + i, 20 + i] for i in range(len(group[1]))], group[1]
    same(
        credit_of(trie, name="gtpo-trajectory", entropy_weight=0.0, max_entropy=9.0)[1],
        credit_of(trie, name="grpo")[1],
    )


@given(random_groups.groups())
@random_groups.bounded
def test_treeadv_has_the_signed_weights_of_grpo_for_completions_of_one_length(group):
    """The paper's mean over the leaves: it moves weight between completions that share a token only."""
    completions = [(c + [9] * 7)[:7] for c in group[0]]
    _, tree = credit_of((completions, group[1]), name="treeadv", scale_rewards="none")
    _, grpo = credit_of((completions, group[1]), name="grpo", scale_rewards="none")
    np.testing.assert_allclose(tree.plus + tree.minus, grpo.plus + grpo.minus, atol=1e-9)


@given(apart)
@random_groups.bounded
def test_gtpo_token_without_the_entropy_is_grpo_with_the_deviation_of_all(group):
    rewards = np.array(group[1])
    assume(rewards.std() > 0)
    grpo = credit_of(group, name="grpo", scale_rewards="none")[1]
    credit = credit_of(group, name="gtpo-token", alpha_1=1.0, alpha_2=0.0)[1]
    for name in ("plus", "minus"):
        np.testing.assert_allclose(getattr(credit, name), getattr(grpo, name) / rewards.std(), rtol=1e-5)


def test_shaping_by_entropy_keeps_the_sum_of_rewards_at_each_position():
    """Proposition 2.2 of GTPO (token), which alphas with the sum 1 have: here before the normalisation."""
    completions, rewards = [[1, 2, 3], [4, 5], [6, 7, 8], [9]], [1.0, 1.0, 0.0, 0.0]
    rule = algorithm("gtpo-token", alpha_1=0.3, alpha_2=0.7)
    entropies = oracles.entropies_of(completions)
    there = np.arange(3) < np.array([[3], [2], [3], [1]])
    table = np.full((4, 3), 1.0)
    for row, each in zip(table, entropies, strict=True):
        row[: len(each)] += each
    right = np.array(rewards) > 0.5
    shaped = rule.shaped(1, there, right, table)
    np.testing.assert_allclose(shaped.sum(0), [2, 2, 1])
    np.testing.assert_allclose(rule.shaped(-1, there, ~right, 1 / table).sum(0), [-2, -1, -1])


@given(random_groups.groups(reward=binary))
@random_groups.bounded
def test_bad_completions_push_nothing_down_that_good_ones_begin_with(group):
    options = {"name": "gtpo-trajectory", "entropy_weight": 0.0, "max_entropy": 9.0}
    trie, credit = credit_of(group, **options)
    good = {n for path, r in zip(trie.paths, group[1], strict=True) if r == 1 for n in path}
    assert not credit.minus[sorted(good)].any()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("gtpo", ("gtpo-token", "gtpo-trajectory")),
        ("reinforce++", ("reinforce-plus-plus",)),
        ("max-rl", ("maxrl",)),
    ],
)
def test_a_name_that_others_use_is_answered_with_ours(typed, meant):
    with pytest.raises(UserError) as caught:
        algorithm(typed)
    assert all(name in caught.value.fix for name in meant)


def test_the_credits_of_a_scale_are_checked_like_weights():
    class Late(Algorithm):
        size: int = 0
        number: int = 1

        def weights(self, trie, rng):
            return Credit.signed(np.zeros(len(trie)))

        def scale(self, step):
            return Scale(2.0, credits=[Credit.signed(np.arange(self.size, dtype=float))] * self.number)

    trie = PrefixTrie.build([[1], [2]], [1.0, 0.0])
    (credit,), _ = assign(Late(size=3), [trie], [np.random.default_rng(0)], 1)
    assert credit.plus.tolist() == [0.0, 0.5, 1.0]
    with pytest.raises(UserError, match="3 finite numbers"):
        assign(Late(size=2), [trie], [np.random.default_rng(0)], 1)
    with pytest.raises(UserError, match="2 credits"):
        assign(Late(size=3, number=2), [trie], [np.random.default_rng(0)], 1)
