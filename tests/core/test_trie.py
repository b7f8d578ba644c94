"""The prefix trie against a dictionary of all prefixes, on random groups and on small ones drawn by hand."""

import numpy as np
import oracles
import pytest
import random_groups
from hypothesis import given
from hypothesis import strategies as st

from twig.core.trie import ROOT, PrefixTrie


def prefixes_of(trie) -> list[tuple[int, ...]]:
    """The tokens from the root to each node, by node."""
    return [oracles.prefix_of(trie, node) for node in range(len(trie))]


@given(random_groups.groups())
@random_groups.bounded
def test_nodes_are_the_prefixes_with_their_counts_and_rewards(group):
    completions, rewards = group
    trie = PrefixTrie.build(completions, rewards)
    through = oracles.all_prefixes(completions, rewards)
    prefixes = prefixes_of(trie)
    assert len(trie) == len(through)
    assert set(prefixes) == set(through)
    for node, prefix in enumerate(prefixes):
        values = through[prefix]
        assert trie.depth[node] == len(prefix)
        assert trie.count[node] == len(values)
        assert trie.reward_sum[node] == pytest.approx(sum(values), abs=1e-12)
        assert trie.value[node] == pytest.approx(sum(values) / len(values), abs=1e-12)
        if min(values) == max(values):
            assert trie.value[node] == values[0], "one reward: its value to the last bit"
    assert (trie.token[ROOT], trie.parent[ROOT]) == (-1, -1)
    assert trie.count[ROOT] == trie.num_completions == len(completions)


@given(random_groups.groups())
@random_groups.bounded
def test_paths_spell_the_completions_in_the_order_given(group):
    completions, rewards = group
    trie = PrefixTrie.build(completions, rewards)
    prefixes = prefixes_of(trie)
    assert trie.lengths.tolist() == [len(c) for c in completions]
    assert trie.rewards.tolist() == rewards
    assert len(trie.paths) == len(completions)
    for completion, path in zip(completions, trie.paths, strict=True):
        assert [prefixes[node] for node in path] == [
            tuple(completion[: t + 1]) for t in range(len(completion))
        ]


@given(random_groups.groups())
@random_groups.bounded
def test_numbering_is_depth_first_and_a_subtree_is_a_range(group):
    trie = PrefixTrie.build(*group)
    prefixes = prefixes_of(trie)
    # Lexicographic order of the prefixes is depth-first order with children by token.
    assert prefixes == sorted(prefixes)
    for node, prefix in enumerate(prefixes):
        below = [n for n, other in enumerate(prefixes) if other[: len(prefix)] == prefix]
        assert below == list(range(node, trie.end[node]))
        if node != ROOT:
            assert prefixes[trie.parent[node]] == prefix[:-1]
            assert trie.parent[node] < node


@given(random_groups.groups())
@random_groups.bounded
def test_owner_passes_through_and_goes_on_where_any_completion_does(group):
    completions, rewards = group
    trie = PrefixTrie.build(completions, rewards)
    end_to_end = [token for completion in completions for token in completion]
    starts = np.cumsum([0, *(len(c) for c in completions)])
    for node, prefix in enumerate(prefixes_of(trie)):
        owner = int(trie.owner[node])
        assert tuple(completions[owner][: len(prefix)]) == prefix
        passing = [c for c in completions if tuple(c[: len(prefix)]) == prefix]
        assert (len(completions[owner]) > len(prefix)) == any(len(c) > len(prefix) for c in passing)
        if node != ROOT:
            (position,) = trie.position(np.array([node])).tolist()
            assert position == starts[owner] + len(prefix) - 1
            assert end_to_end[position] == trie.token[node]


@given(random_groups.groups(), st.randoms(use_true_random=False))
@random_groups.bounded
def test_order_of_the_completions_is_irrelevant(group, random):
    completions, rewards = group
    order = list(range(len(completions)))
    random.shuffle(order)
    trie = PrefixTrie.build(completions, rewards)
    other = PrefixTrie.build([completions[i] for i in order], [rewards[i] for i in order])
    for name in ("token", "parent", "depth", "count", "end"):
        np.testing.assert_array_equal(getattr(trie, name), getattr(other, name), err_msg=name)
    np.testing.assert_allclose(trie.reward_sum, other.reward_sum, rtol=0, atol=1e-12)
    np.testing.assert_allclose(trie.value, other.value, rtol=0, atol=1e-12)
    for place, i in enumerate(order):
        np.testing.assert_array_equal(trie.paths[i], other.paths[place])


@given(random_groups.groups())
@random_groups.bounded
def test_nodes_with_the_count_of_their_parent_have_its_value_to_the_last_bit(group):
    trie = PrefixTrie.build(*group)
    same = np.flatnonzero(trie.count[1:] == trie.count[trie.parent[1:]]) + 1
    np.testing.assert_array_equal(trie.reward_sum[same], trie.reward_sum[trie.parent[same]])
    np.testing.assert_array_equal(trie.value[same], trie.value[trie.parent[same]])


def test_a_group_drawn_by_hand():
    #            root (4)
    #            /      \
    #       5 (3)        8 (1)
    #       /   \          \
    #   6 (1)   7 (1)     9 (1)     and [5] ends inside: no node of its own
    trie = PrefixTrie.build([[5, 6], [8, 9], [5], [5, 7]], [1.0, 1.0, 0.0, 0.0])
    assert trie.token.tolist() == [-1, 5, 6, 7, 8, 9]
    assert trie.parent.tolist() == [-1, 0, 1, 1, 0, 4]
    assert trie.depth.tolist() == [0, 1, 2, 2, 1, 2]
    assert trie.count.tolist() == [4, 3, 1, 1, 1, 1]
    assert trie.end.tolist() == [6, 4, 3, 4, 6, 6]
    assert trie.reward_sum.tolist() == [2.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert [p.tolist() for p in trie.paths] == [[1, 2], [4, 5], [1], [1, 3]]
    assert trie.owner[[2, 3, 4, 5]].tolist() == [0, 3, 1, 1]
    assert trie.owner[1] in (0, 3), "not completion 2, which ends there"


def test_one_completion_is_a_chain_and_empty_ones_have_no_nodes():
    one = PrefixTrie.build([[4, 4, 2]], [0.5])
    assert one.parent.tolist() == [-1, 0, 1, 2]
    assert one.end.tolist() == [4] * 4
    assert one.value.tolist() == [0.5] * 4

    empty = PrefixTrie.build([[], []], [1.0, 0.0])
    assert (len(empty), empty.count.tolist(), empty.value.tolist()) == (1, [2], [0.5])
    assert [len(p) for p in empty.paths] == [0, 0]

    mixed = PrefixTrie.build([[], [3]], [1.0, 0.0])
    assert (mixed.count.tolist(), mixed.value.tolist()) == ([2, 1], [0.5, 0.0])


def test_a_group_of_real_size():
    # 32 completions of up to 150 tokens from two tokens, copied from one another at random cuts.
    rng = np.random.default_rng(0)
    completions = [rng.integers(0, 2, 150)]
    while len(completions) < 32:
        source = completions[rng.integers(len(completions))]
        cut = rng.integers(len(source) + 1)
        completions.append(np.concatenate([source[:cut], rng.integers(0, 2, rng.integers(151 - cut))]))
    rewards = rng.random(32)
    trie = PrefixTrie.build(completions, rewards)
    through = oracles.all_prefixes(completions, rewards)
    actual = dict(zip(prefixes_of(trie), zip(trie.count, trie.reward_sum, strict=True), strict=True))
    assert actual.keys() == through.keys()
    assert len(actual) > 500
    for prefix, (count, total) in actual.items():
        assert count == len(through[prefix])
        assert total == pytest.approx(sum(through[prefix]))


def test_building_leaves_its_arguments_alone():
    completions = [np.array([2, 1]), np.array([2]), np.array([], np.int64)]
    rewards = np.array([1.0, 2.0, 3.0])
    before = [c.copy() for c in completions], rewards.copy()
    PrefixTrie.build(completions, rewards)
    for now, then in zip([*completions, rewards], [*before[0], before[1]], strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize(("completions", "rewards"), [([], []), ([[1], [2]], [1.0])])
def test_a_trie_needs_completions_with_one_reward_each(completions, rewards):
    with pytest.raises(AssertionError, match="one reward per completion"):
        PrefixTrie.build(completions, rewards)
