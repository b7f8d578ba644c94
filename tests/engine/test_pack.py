"""Packs against their definition: each weighted node once, each token behind its own prefix and nothing
else."""

from collections import Counter
from dataclasses import replace

import numpy as np
import oracles
import pytest
import random_groups
import tiny
from gradients import scored
from hypothesis import given
from hypothesis import strategies as st

from twig.core.algorithms.base import Credit
from twig.core.algorithms.registry import algorithm
from twig.core.credit import assign, assign_one
from twig.core.trie import PrefixTrie
from twig.core.types import Completion, Example, Group
from twig.engine.pack import Pack, Targets, build_packs, halves, head_columns

SIZES = [1, 6, 9, 14, 25, 60, 4096]
ALWAYS, NEVER = 1, 10**9  # cells that a shared stem has to save


@st.composite
def steps(draw, alike=False):
    """(groups, tries, credits): groups of a step with prompts of several lengths and weights on random
    nodes. Prompts begin alike by chance, or never."""
    groups, tries, credits = [], [], []
    for g in range(draw(st.integers(2, 4) if alike else st.integers(1, 3))):
        completions, rewards = draw(random_groups.groups())
        prompt = range(100 * (g + 1), 100 * (g + 1) + draw(st.integers(1, 4)))  # tokens that name their place
        if alike:  # or part from another prompt, are its beginning, or the same
            prompt = [1000 + n for n in range(6)][: draw(st.integers(1, 6))]
            prompt += [1100 + n for n in draw(st.lists(st.integers(0, 1), max_size=2))]
        group = tiny.make_group(list(prompt), completions, rewards, g)
        trie = PrefixTrie.build(completions, rewards)
        weights = []
        for _ in range(3):
            on = draw(st.lists(st.booleans(), min_size=len(trie), max_size=len(trie)))
            weights.append(np.where(on, np.arange(len(trie)) + 0.5, 0.0) * (np.arange(len(trie)) > 0))
        groups.append(group)
        tries.append(trie)
        credits.append(Credit(weights[0], -weights[1], weights[2]))
    return groups, tries, credits


def visible_cells(pack, row, column) -> list[int]:
    """The columns that a cell sees, by an obvious loop."""
    return [k for k in range(pack.ids.shape[1]) if k <= column < pack.ends[row, k]]


def texts_of(pack) -> dict[tuple[int, int], list[int]]:
    """What each used cell has read, itself included: the token ids that it sees, at positions 0, 1, 2, ...

    A stem's tokens come first, and a stem is one of the texts of its packs.
    """
    texts = {}
    stem = pack.stem.ids.tolist() if pack.stem else []
    for row in range(pack.ids.shape[0]):
        for column in range(pack.ids.shape[1]):
            seen = visible_cells(pack, row, column)
            assert seen[-1] == column, "a cell sees itself"
            positions = pack.positions[row, seen].tolist()
            unused = pack.ids[row, column] == 0 and len(seen) == 1 and column > 0
            if not unused:
                places = list(range(len(stem), len(stem) + len(seen)))
                assert positions == places, "one token at each position, in order"
                texts[row, column] = stem + pack.ids[row, seen].tolist()
    return texts


def shifted(step):
    """The same step with tokens from 1 on, so that id 0 is an unused cell."""
    groups, _, credits = step
    moved = [
        tiny.make_group(g.prompt_ids, [c.ids + 1 for c in g.completions], g.rewards, i)
        for i, g in enumerate(groups)
    ]
    return moved, [PrefixTrie.build([c.ids for c in g.completions], g.rewards) for g in moved], credits


def needed_texts(groups, tries, credits) -> list[set[tuple[int, ...]]]:
    """By group every prefix (prompt included) that some weighted node's log-prob depends on."""
    every = []
    for group, trie, credit in zip(groups, tries, credits, strict=True):
        needed = set()
        for node in np.flatnonzero(credit.weighted):
            text = (*group.prompt_ids.tolist(), *oracles.prefix_of(trie, int(node))[:-1])
            needed |= {text[: stop + 1] for stop in range(len(text))}
        every.append(needed)
    return every


def cases(change=lambda step: step):
    """(step, size, share, cells that a shared stem has to save): half of them share stems."""
    apart = st.tuples(steps().map(change), st.sampled_from(SIZES), st.booleans(), st.just(ALWAYS))
    sizes, least = st.sampled_from([9, 14, 25, 60, 4096]), st.sampled_from([ALWAYS, ALWAYS, 5, NEVER])
    return apart | st.tuples(steps(alike=True).map(change), sizes, st.just(True), least)


@given(cases(shifted))
@random_groups.bounded
def test_each_token_sees_its_own_prefix_and_only_what_is_needed_is_run(case):
    (groups, tries, credits), size, share, least = case
    packs = build_packs(scored(groups, tries, credits), size, share, least)
    run, stems, spared = Counter(), [], Counter()
    for pack in packs:
        stem = pack.stem
        if stem and stem.name not in stems:
            stems.append(stem.name)
            beginnings = [tuple(stem.ids[: stop + 1].tolist()) for stop in range(len(stem))]
            run.update(beginnings)
            behind = {g for p in packs if p.stem and p.stem.name == stem.name for g in p.targets.group}
            assert stem.shared == (len(behind) > 1)
            if not stem.shared:
                assert behind == {stem.group} and len(stem) == len(groups[stem.group].prompt_ids) - 1
            assert (len(behind) - 1) * len(stem) >= least or not stem.shared
            spared.update({text: len(behind) - 1 for text in beginnings})
        assert not stem or (stems[-1] == stem.name and share), "one stem's packs follow each other"
        texts = texts_of(pack)
        assert len(texts) == pack.num_tokens
        run.update(tuple(text) for text in texts.values())
    needed = needed_texts(groups, tries, credits)
    assert set(run) == set().union(*needed), "all that is needed, nothing else"
    if share and size == 4096:
        every = Counter(text for texts in needed for text in texts)
        assert run + spared == every, "once in a group, however many completions share it; a stem once"


@given(cases(shifted))
@random_groups.bounded
def test_each_weighted_node_is_computed_once_from_the_right_row(case):
    (groups, tries, credits), size, share, least = case
    seen = Counter()
    for pack in build_packs(scored(groups, tries, credits), size, share, least):
        texts = texts_of(pack)
        targets = pack.targets
        assert len(set(pack.rows.tolist())) == len(pack.rows)
        assert set(targets.row.tolist()) == set(range(len(pack.rows))), "no row without a target"
        for i in range(len(targets)):
            g, node = int(targets.group[i]), int(targets.node[i])
            seen[g, node] += 1
            prefix = oracles.prefix_of(tries[g], node)
            cell = divmod(int(pack.rows[targets.row[i]]), pack.ids.shape[1])
            assert texts[cell] == [*groups[g].prompt_ids.tolist(), *prefix[:-1]]
            assert targets.token[i] == prefix[-1]
            assert targets.plus[i] == credits[g].plus[node]
            assert targets.minus[i] == credits[g].minus[node]
            assert targets.kl[i] == credits[g].kl[node]
    expected = {(g, int(n)) for g, c in enumerate(credits) for n in np.flatnonzero(c.weighted)}
    assert seen == Counter(expected)


@given(cases(shifted))
@random_groups.bounded
def test_a_pack_exceeds_its_size_only_where_one_path_does(case):
    step, size, _, least = case
    for pack in build_packs(scored(*step), size, least_saved=least):
        if pack.stem and pack.stem.shared:
            rows, columns = pack.ids.shape
            assert columns <= size and (rows == 1 or rows * (len(pack.stem) + columns) == pack.size <= size)
        elif pack.ids.size > size:
            assert pack.ids.shape[0] == 1
            first = len(pack.stem) if pack.stem else 0
            path = list(range(first, first + pack.ids.shape[1]))
            assert pack.positions[0].tolist() == path, "one path"
            assert (pack.ends == pack.ids.shape[1]).all()
            prompt = step[0][pack.targets.group[0]].prompt_ids
            assert first == len(prompt) - 1, "of the prompt no more than its last token"


@given(steps().map(shifted), st.sampled_from(SIZES))
@random_groups.bounded
def test_without_sharing_every_row_is_one_path(step, size):
    for pack in build_packs(scored(*step), size, share=False):
        assert pack.ids.shape[0] == 1 or pack.ids.size <= size
        for ids, positions, ends in zip(pack.ids, pack.positions, pack.ends, strict=True):
            used = int((ids != 0).sum())
            assert positions[:used].tolist() == list(range(used))
            assert (ends[:used] == used).all(), "plain causal attention"


@given(st.integers(0, 10**6), st.sampled_from(SIZES))
@random_groups.bounded
def test_visible_is_ancestor_or_self(seed, size):
    # Tokens that name their node, so that the cells of a pack can be told apart.
    rng = np.random.default_rng(seed)
    parents = [-1] + [int(rng.integers(max(0, n - 4), n)) for n in range(1, int(rng.integers(2, 25)))]

    def ancestors(node):
        return [] if node == 0 else [*ancestors(parents[node]), node]

    completions = [ancestors(n) for n in range(len(parents)) if n not in parents[1:] or rng.random() < 0.2]
    group = tiny.make_group([500], [c for c in completions if c], [0.0] * sum(map(bool, completions)))
    trie = PrefixTrie.build([c.ids for c in group.completions], group.rewards)
    everywhere = np.ones(len(trie)) * (np.arange(len(trie)) > 0)
    credit = Credit(everywhere, np.zeros(len(trie)), np.zeros(len(trie)))
    for pack in build_packs(scored([group], [trie], [credit]), size):
        for row in range(len(pack.ids)):
            for column, token in enumerate(pack.ids[row].tolist()):
                if token:
                    seen = pack.ids[row, visible_cells(pack, row, column)].tolist()
                    assert seen == ([500] if token == 500 else [500, *ancestors(token)])


def test_a_pack_by_hand():
    # The group 5 6, 5 7, 5, 8 9 with prompt 1 2; nodes 1 = 5, 2 = 5 6, 3 = 5 7, 4 = 8, 5 = 8 9. All have
    # weight, so the rows of 2 (the root), 5 and 8 are needed, and 6, 7 and 9 are not run: 1 2 5 8.
    group = tiny.make_group([1, 2], [[5, 6], [5, 7], [5], [8, 9]], [1.0, 0.0, 0.0, 1.0])
    trie = PrefixTrie.build([c.ids for c in group.completions], group.rewards)
    credit = assign_one(algorithm("grpo"), trie, np.random.default_rng(0))
    (pack,) = build_packs(scored([group], [trie], [credit]), 100)
    assert pack.ids.tolist() == [[1, 2, 5, 8]]
    assert pack.positions.tolist() == [[0, 1, 2, 2]]
    assert pack.ends.tolist() == [[4, 4, 3, 4]], "8 does not see 5"
    assert pack.rows.tolist() == [1, 2, 3]
    order = np.argsort(pack.targets.node)
    assert pack.targets.node[order].tolist() == [1, 2, 3, 4, 5]
    assert pack.targets.row[order].tolist() == [0, 1, 1, 0, 2]
    assert pack.targets.token[order].tolist() == [5, 6, 7, 8, 9]
    assert (pack.num_tokens, pack.cells) == (4, None)
    # T-SPMO gives 8 9 nothing (8 decided it), so 8 is not run either.
    credit = assign_one(algorithm("t-spmo"), trie, np.random.default_rng(0))
    (pack,) = build_packs(scored([group], [trie], [credit]), 100)
    assert pack.ids.tolist() == [[1, 2, 5]]
    # At most 2 cells: a pack for the path 2 5 and one for 2 8, behind the stem 1; the root's row is computed
    # in the first.
    credit = assign_one(algorithm("grpo"), trie, np.random.default_rng(0))
    first, second = build_packs(scored([group], [trie], [credit]), 2)
    assert (first.ids.tolist(), second.ids.tolist()) == ([[2, 5]], [[2, 8]])
    assert first.stem.ids.tolist() == second.stem.ids.tolist() == [1]
    assert first.positions.tolist() == second.positions.tolist() == [[1, 2]]
    assert (sorted(first.targets.node), sorted(second.targets.node)) == ([1, 2, 3, 4], [5])


NOBODY = Targets(*[np.empty(0, np.int64)] * 4, *[np.empty(0)] * 3)


def test_head_columns_by_hand():
    ids = np.zeros((3, 4), np.int64)
    rows = np.array([9, 1, 3, 2])  # row 2 column 1; row 0 columns 1, 3, 2
    pack = Pack(ids, ids, ids, None, rows, NOBODY, np.array([4, 4, 4]))
    table, place = head_columns(pack)
    assert table.tolist() == [[1, 3, 2], [0, 0, 0], [1, 0, 0]]
    assert place.tolist() == [6, 0, 1, 2]


def test_t_spmo_prunes_what_lies_behind_the_last_fork():
    # Two completions fork after 3 tokens and go on for 100: the fork's two nodes have credit, so T-SPMO runs
    # the prompt and the 3 shared tokens. GRPO runs those and all but the last of the 2 * 100.
    shared, prompt = [3, 4, 5], [1, 2]
    group = tiny.make_group(prompt, [[*shared, 6, *[9] * 99], [*shared, 7, *[9] * 99]], [1.0, 0.0])
    trie = PrefixTrie.build([c.ids for c in group.completions], group.rewards)

    def cells(name):
        credit = assign_one(algorithm(name), trie, np.random.default_rng(0))
        return sum(p.num_tokens for p in build_packs(scored([group], [trie], [credit]), 4096))

    assert cells("t-spmo") == 2 + 3
    assert cells("grpo") == 2 + 3 + 2 * 99


def test_small_tries_share_a_pack_and_nothing_weighted_is_no_pack():
    groups = [tiny.make_group([1, 2], [[5], [6]], [1.0, 0.0], i) for i in range(6)]
    tries = [PrefixTrie.build([c.ids for c in g.completions], g.rewards) for g in groups]
    credits, _ = assign(algorithm("grpo"), tries, [np.random.default_rng(0) for _ in tries], 6)
    assert [p.ids.shape for p in build_packs(scored(groups, tries, credits), 100)] == [(6, 2)]
    assert [p.ids.shape for p in build_packs(scored(groups, tries, credits), 5)] == [(2, 2)] * 3
    nothing = [Credit(np.zeros(3), np.zeros(3), np.zeros(3))] * 6
    assert build_packs(scored(groups, tries, nothing), 100) == []
    assert build_packs([], 100) == []


@given(cases())
@random_groups.bounded
def test_cells_name_the_boundary_row_of_a_token_with_the_same_prefix(case):
    (groups, tries, credits), size, share, least = case
    recorded, table = [], []  # `table[cell]` is what had been read when the boundary row was recorded

    def record(text):
        table.append(tuple(text))
        return len(table) - 1

    for g in groups:
        prompt = g.prompt_ids.tolist()
        cells = np.array([record(prompt[: t + 1]) for t in range(len(prompt))])
        completions = []
        for c in g.completions:
            own = [record([*prompt, *c.ids[: t + 1].tolist()]) for t in range(len(c))]
            if own:
                own[-1] = record(["never recorded: the last token was sampled and not run"])
            completions.append(Completion(c.ids, c.logps, c.entropies, True, "", np.array(own, np.int64)))
        recorded.append(Group(Example(""), g.prompt_index, g.prompt_ids, completions, g.rewards, 0, cells))
    plain = build_packs(scored(groups, tries, credits), size, share, least)
    packs = build_packs(scored(recorded, tries, credits), size, share, least)
    for pack, other in zip(packs, plain, strict=True):
        assert other.cells is None
        if pack.stem:
            assert other.stem.cells is None
            for place, cell in enumerate(pack.stem.cells):
                assert table[cell] == tuple(pack.stem.ids[: place + 1].tolist())
        stem = pack.stem.ids.tolist() if pack.stem else []
        for row, used in enumerate(pack.used):
            for column in range(used):
                text = stem + pack.ids[row, visible_cells(pack, row, column)].tolist()
                assert table[pack.cells[row, column]] == tuple(text)


def test_one_group_without_recorded_cells_leaves_its_pack_without_them():
    group = tiny.make_group([1], [[5], [6]], [1.0, 0.0])
    other = Group(Example(""), 1, group.prompt_ids, group.completions, group.rewards, 0, np.array([3]))
    trie = PrefixTrie.build([c.ids for c in group.completions], group.rewards)
    credit = assign_one(algorithm("grpo"), trie, np.random.default_rng(0))
    assert build_packs(scored([group, other], [trie] * 2, [credit] * 2), 100)[0].cells is None


@pytest.mark.parametrize("size", SIZES)
def test_packs_do_not_depend_on_the_order_of_the_completions(size):
    group = tiny.random_group(np.random.default_rng(0))
    back = tiny.make_group(group.prompt_ids, [c.ids for c in group.completions][::-1], group.rewards[::-1])
    packs = []
    for g in (group, back):
        trie = PrefixTrie.build([c.ids for c in g.completions], g.rewards)
        credit = assign_one(algorithm("grpo"), trie, np.random.default_rng(0))
        packs.append(build_packs(scored([g], [trie], [credit]), size))
    for left, right in zip(*packs, strict=True):
        np.testing.assert_array_equal(left.ids, right.ids)
        np.testing.assert_array_equal(left.ends, right.ends)
        np.testing.assert_array_equal(left.targets.node, right.targets.node)
        np.testing.assert_allclose(left.targets.plus, right.targets.plus, atol=1e-12)


# Stems that groups share


def in_step(*parts):
    """Groups, each (prompt, completions), all of whose nodes have weight, as the engine takes them."""
    groups = [
        tiny.make_group(prompt, paths, [0.0] * len(paths), i) for i, (prompt, paths) in enumerate(parts)
    ]
    tries = [PrefixTrie.build([c.ids for c in g.completions], g.rewards) for g in groups]
    weights = [np.arange(len(trie)).clip(0, 1) * 1.0 for trie in tries]
    return scored(groups, tries, [Credit(w, 0 * w, 0 * w) for w in weights])


def test_a_shared_stem_by_hand():
    # Prompts 1 2 3 4, 1 2 3 5 6 and 1 2 3: the last is the beginning of the others, and keeps its last token.
    step = in_step(([1, 2, 3, 4], [[7, 8]]), ([1, 2, 3, 5, 6], [[7], [8]]), ([1, 2, 3], [[4, 9], [5]]))
    assert [p.ids.shape for p in build_packs(step, 100, least_saved=5)] == [(3, 5)], "it would save 4 cells"
    (pack,) = build_packs(step, 100, least_saved=4)
    assert (pack.stem.ids.tolist(), pack.stem.shared, pack.stem.cells) == ([1, 2], True, None)
    assert pack.ids.tolist() == [[3, 4, 7], [3, 5, 6], [3, 4, 0]]
    assert pack.positions.tolist() == [[2, 3, 4], [2, 3, 4], [2, 3, 0]]
    assert pack.ends.tolist() == [[3, 3, 3], [3, 3, 3], [2, 2, 3]]
    assert (pack.num_tokens, pack.size) == (8, 15)
    targets = sorted(zip(pack.rows[pack.targets.row].tolist(), pack.targets.token.tolist(), strict=True))
    assert targets == [(1, 7), (2, 8), (5, 7), (5, 8), (6, 4), (6, 5), (7, 9)]
    # Two rows of 2 + 3 cells at most, and a row by itself
    first, second = build_packs(step, 10, least_saved=4)
    assert (first.ids.tolist(), second.ids.tolist()) == ([[3, 4, 7], [3, 5, 6]], [[3, 4]])
    assert first.stem.name == second.stem.name == (0, 2)


@pytest.mark.parametrize(
    ("prompts", "stems"),
    [
        # all of them begin with 1; the first two save more with a stem of their own
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 3, 3]], [[1, 2, 3, 4]]),
        ([[1, 2, 3, 5], [1, 2, 4, 5], [1, 2, 4, 6], [1, 2, 5]], [[1, 2]]),
        # two kinds of prompts, in any order
        ([[1, 1, 1, 5], [2, 2, 2, 5], [1, 1, 1, 6], [2, 2, 2, 6]], [[1, 1, 1], [2, 2, 2]]),
        # the same prompt twice: each group needs its last token
        ([[1, 2, 3], [1, 2, 3]], [[1, 2]]),
        ([[1], [1], [1]], []),
        ([[1, 2], [2, 1]], []),
    ],
)
def test_which_prompts_share_a_stem(prompts, stems):
    step = in_step(*((prompt, [[8], [9]]) for prompt in prompts))
    packs = build_packs(step, 100, least_saved=ALWAYS)
    assert sorted(pack.stem.ids.tolist() for pack in packs if pack.stem) == stems


@given(steps().map(shifted), st.sampled_from(SIZES))
@random_groups.bounded
def test_prompts_with_nothing_in_common_are_packed_as_ever(step, size):
    for one, other in zip(
        *(build_packs(scored(*step), size, least_saved=least) for least in (ALWAYS, NEVER)), strict=True
    ):
        assert all(np.array_equal(getattr(one, x), getattr(other, x)) for x in ("ids", "ends", "rows"))
        assert one.targets.node.tolist() == other.targets.node.tolist()


def test_a_trie_that_is_cut_keeps_its_own_stem_beside_a_shared_one():
    long = [[n, *range(20, 29)] for n in range(10, 14)]
    step = in_step(([1, 2, 3, 4], [[7], [8]]), ([1, 2, 3, 5], long), ([1, 2, 3, 6], [[7], [8]]))
    packs = build_packs(step, 20, least_saved=ALWAYS)
    assert {pack.stem.name: pack.stem.shared for pack in packs} == {(0, 3): True, (1, 3): False}


def test_a_group_without_recorded_cells_leaves_all_behind_its_stem_without_them():
    # a stem that is run from recorded rows has no keys in the layers below
    first, second, third = in_step(*(([1, 2, 3, n], [[7], [8]]) for n in range(4, 7)))
    cells = np.arange(4)
    step = [replace(each, group=replace(each.group, prompt_cells=cells)) for each in (first, second)]
    packs = build_packs([*step, third], 4, least_saved=ALWAYS)
    assert len(packs) == 3 and packs[0].stem.shared
    assert all(pack.cells is None and pack.stem.cells is None for pack in packs)


def test_halves_of_a_pack_behind_a_shared_stem_share_it_still():
    step = in_step(*(([*range(20), n], [[n, 7], [39, 8]]) for n in range(30, 38)))
    (pack,) = build_packs(step, 4096)
    assert pack.stem is None, "on a CPU 140 cells are not worth it"
    (pack,) = build_packs(step, 4096, least_saved=ALWAYS)
    assert (pack.ids.shape, len(pack.stem), pack.size) == ((8, 3), 20, 8 * 23)
    while len(pack.ids) > 1:
        parts = halves(pack, step)
        assert len(parts) == 2 and all(2 * part.size == pack.size for part in parts)
        assert sorted(np.concatenate([p.targets.group for p in parts])) == sorted(pack.targets.group)
        assert all(part.stem.shared and part.stem.name == parts[0].stem.name for part in parts)
        pack = parts[1]
    # one group of two paths is left: its own prompt becomes its stem
    parts = halves(pack, step)
    assert [(part.stem.shared, len(part.stem), part.ids.shape) for part in parts] == [(False, 20, (1, 2))] * 2


def test_prompts_longer_than_a_pack_share_a_stem_if_what_is_behind_it_fits():
    step = in_step(*(([*range(20), 30 + n, 40], [[n, 7], [n, 8]]) for n in range(3)))
    packs = build_packs(step, 10, least_saved=ALWAYS)
    assert [(pack.ids.shape, pack.stem.name) for pack in packs] == [((1, 3), (0, 20))] * 3
    packs = build_packs(step, 2, least_saved=ALWAYS)
    assert [(pack.ids.shape, len(pack.stem), pack.stem.shared) for pack in packs] == [((1, 2), 21, False)] * 3
