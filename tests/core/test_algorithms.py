"""The algorithms as weights on nodes: against per-completion sums in plain Python, and by hand."""

import itertools
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
import random_groups
from hypothesis import given
from hypothesis import strategies as st

from twig.core.algorithms.base import advantages, entropy_at_quantile
from twig.core.algorithms.registry import algorithm, shipped
from twig.core.credit import assign, assign_one
from twig.core.trie import PrefixTrie


class Draws(np.random.Generator):
    """A generator whose uniform numbers are those of a table, [completions, positions]."""

    def __init__(self, table):
        super().__init__(np.random.PCG64(0))
        self.table = np.asarray(table, np.float64)

    def random(self, size=None):
        assert self.table.shape == tuple(size)
        return self.table.copy()


def rng(seed=0):
    return np.random.default_rng(seed)


def weights_of(completions, rewards, seed=0, trained=None, prompts=1, generator=None, **options):
    """(trie, credit) of one group."""
    if options["name"] == "dr-grpo":
        options = {"divisor": 8} | options
    trie = PrefixTrie.build(completions, rewards, oracles.entropies_of(completions), trained)
    credits, _ = assign(algorithm(**fitting(options)), [trie], [generator or rng(seed)], prompts)
    return trie, credits[0]


def fitting(options):
    """The options that the algorithm of that name has."""
    fields = shipped()[options["name"]].model_fields
    return {key: value for key, value in options.items() if key in fields}


def assert_sums(trie, credit, terms, beta=1.0):
    """The credit equals the sums of `terms` by sign, prefix by prefix."""
    for node in range(len(trie)):
        pairs = terms.get(oracles.prefix_of(trie, node), [])
        assert credit.plus[node] == pytest.approx(sum(w for w, _ in pairs if w > 0), abs=1e-12)
        assert credit.minus[node] == pytest.approx(sum(w for w, _ in pairs if w < 0), abs=1e-12)
        assert credit.kl[node] == pytest.approx(sum(s for _, s in pairs) * (beta != 0), abs=1e-12)


def every_token(completions):
    """GRPO's scales: 1 / |o_i| at each position."""
    return [{t: 1 / len(c) for t in range(len(c))} for c in completions]


def same(left, right):
    for name in ("plus", "minus", "kl"):
        np.testing.assert_allclose(getattr(left, name), getattr(right, name), rtol=0, atol=1e-12)


# ---- numbers worked out by hand ------------------------------------------------------------------------

#            root (4)            G = 4, rewards 1 0 0 1, mean 1/2
#            /      \            nodes: 1 = 5, 2 = 5 6, 3 = 5 7, 4 = 8, 5 = 8 9
#       5 (3)        8 (1)
#       /   \          \         completion 0: 5 6, R = 1;  1: 5 7, R = 0;  2: 5, R = 0;  3: 8 9, R = 1
#   6 (1)   7 (1)     9 (1)
HAND = [[5, 6], [5, 7], [5], [8, 9]], [1.0, 0.0, 0.0, 1.0]


def test_grpo_by_hand():
    # R - mean is +-1/2. Without scaling a token of a completion of length 2 gets +-1/2 / (4 * 2) = +-1/16,
    # the one token of completion 2 gets -1/2 / 4 = -1/8. So node 1 has +1/16 and -1/16 - 1/8 = -3/16.
    trie, credit = weights_of(*HAND, name="grpo", scale_rewards="none", beta=0.1)
    np.testing.assert_allclose(credit.plus, np.array([0, 1, 1, 0, 1, 1]) / 16)
    np.testing.assert_allclose(credit.minus, np.array([0, -3, 0, -1, 0, 0]) / 16)
    # KL weights 1 / (4 * 2) and 1 / 4: node 1 has 1/8 + 1/8 + 1/4 = 1/2
    np.testing.assert_allclose(credit.kl, np.array([0, 4, 1, 1, 1, 1]) / 8)
    # The sum of squares is 4 * 1/4 = 1, so std = sqrt(1 / 3) = 0.5773503 (ddof 1);
    # 1 / (std + 1e-4) = 1.7317509
    scaled = weights_of(*HAND, name="grpo", beta=0.1)[1]
    np.testing.assert_allclose(scaled.plus, credit.plus * 1.7317509, rtol=1e-7)
    np.testing.assert_allclose(scaled.minus, credit.minus * 1.7317509, rtol=1e-7)
    np.testing.assert_array_equal(scaled.kl, credit.kl)
    # With beta = 0 nothing is held to the base; with two prompts in the step everything is half as large.
    assert not weights_of(*HAND, name="grpo")[1].kl.any()
    halved = weights_of(*HAND, name="grpo", scale_rewards="none", beta=0.1, prompts=2)[1]
    np.testing.assert_allclose(halved.plus, credit.plus / 2)
    np.testing.assert_allclose(halved.minus, credit.minus / 2)
    np.testing.assert_allclose(halved.kl, credit.kl / 2)


def test_s_grpo_by_hand():
    # alpha = 1, p = 1/2: position 0 always, position 1 where its number is below 1/2. So T_0 = {0, 1},
    # T_1 = T_2 = T_3 = {0}, and weights +-1/2 / (4 |T_i|): 1/16 for completion 0, +-1/8 for the others.
    draws = Draws([[0.9, 0.4], [0.0, 0.5], [0.0, 0.0], [0.9, 0.6]])
    options = {"name": "s-grpo", "alpha": 1, "p": 0.5, "k": 2, "scale_rewards": "none", "beta": 0.1}
    trie, credit = weights_of(*HAND, generator=draws, **options)
    np.testing.assert_allclose(credit.plus, np.array([0, 1, 1, 0, 2, 0]) / 16)
    np.testing.assert_allclose(credit.minus, np.array([0, -4, 0, 0, 0, 0]) / 16)
    # KL weights 1 / (4 |T_i|): node 1 has 1/8 + 1/4 + 1/4
    np.testing.assert_allclose(credit.kl, np.array([0, 5, 1, 0, 2, 0]) / 8)
    assert credit.weighted.tolist() == [False, True, True, False, True, False]


def test_unbiased_s_grpo_by_hand():
    # One token of |o| = 5 is always there (alpha = 1), m = min(k - alpha, round(0.5 * 4)) = 2 of the 4
    # later ones are drawn: those with the lowest numbers, positions 2 and 4. Their weight A / (G * 5) is
    # doubled, as 4 / m = 2.
    completions, rewards = [[1, 2, 3, 4, 5], [9]], [1.0, 0.0]
    draws = Draws([[0.0, 0.9, 0.1, 0.8, 0.2], [0.0] * 5])
    options = {"name": "s-grpo", "unbiased": True, "alpha": 1, "p": 0.5, "k": 3, "scale_rewards": "none"}
    trie, credit = weights_of(completions, rewards, generator=draws, beta=1.0, **options)
    np.testing.assert_allclose(credit.plus, np.array([0, 1, 0, 2, 0, 2, 0]) * 0.5 / (2 * 5))
    np.testing.assert_allclose(credit.minus, np.array([0, 0, 0, 0, 0, 0, -1]) * 0.5 / 2)
    np.testing.assert_allclose(credit.kl, np.array([0, 0.1, 0, 0.2, 0, 0.2, 0.5]))


def test_t_spmo_by_hand():
    # V: root 1/2, node 1 1/3, node 2 1, node 3 0, nodes 4 and 5 1. |U| = 5 unique nodes:
    # (1/3 - 1/2) / 5 = -1/30, (1 - 1/3) / 5 = 2/15, (0 - 1/3) / 5 = -1/15, (1 - 1/2) / 5 = 1/10 and
    # (1 - 1) / 5 = 0.
    trie, credit = weights_of(*HAND, name="t-spmo")
    np.testing.assert_allclose(credit.plus + credit.minus, [0, -1 / 30, 2 / 15, -1 / 15, 1 / 10, 0])
    assert not (credit.plus * credit.minus).any(), "a node counts once, with one sign"
    assert not credit.kl.any()
    # Four of the five have credit.
    branches = weights_of(*HAND, name="t-spmo", normalise="branches")[1]
    np.testing.assert_allclose(branches.plus, credit.plus * 5 / 4)
    np.testing.assert_allclose(branches.minus, credit.minus * 5 / 4)
    # |U| is that of the step whatever its number of prompts, under `group` that of each prompt's group.
    np.testing.assert_array_equal(weights_of(*HAND, name="t-spmo", prompts=4)[1].plus, credit.plus)
    own = weights_of(*HAND, name="t-spmo", normalise="group", prompts=4)[1]
    np.testing.assert_allclose(own.plus, credit.plus / 4)


def test_neighbours_by_hand():
    # R - mean is +-1/2, G = 4. Dr. GRPO with L = 8: +-1/2 / (4 * 8) = +-1/64 for each token; node 1 is in
    # completions 0, 1 and 2, so it has +1/64 and -2/64.
    _, credit = weights_of(*HAND, name="dr-grpo", divisor=8, beta=0.1)
    np.testing.assert_allclose(credit.plus, np.array([0, 1, 1, 0, 1, 1]) / 64)
    np.testing.assert_allclose(credit.minus, np.array([0, -2, 0, -1, 0, 0]) / 64)
    np.testing.assert_allclose(credit.kl, np.array([0, 3, 1, 1, 1, 1]) / 32)
    # RLOO: the others of a right one have mean 1/3, of a wrong one 2/3: +-2/3 / 4 = +-1/6.
    _, credit = weights_of(*HAND, name="rloo")
    np.testing.assert_allclose(credit.plus, np.array([0, 1, 1, 0, 1, 1]) / 6)
    np.testing.assert_allclose(credit.minus, np.array([0, -2, 0, -1, 0, 0]) / 6)
    # lambda-GRPO: GRPO's +1/16 and -3/16 at node 1 (and its KL weight 1/2) are divided by its three
    # completions, the other nodes are of one completion.
    _, credit = weights_of(*HAND, name="lambda-grpo", scale_rewards="none", beta=0.1)
    np.testing.assert_allclose(credit.plus, np.array([0, 1 / 3, 1, 0, 1, 1]) / 16)
    np.testing.assert_allclose(credit.minus, np.array([0, -1, 0, -1, 0, 0]) / 16)
    np.testing.assert_allclose(credit.kl, np.array([0, 4 / 3, 1, 1, 1, 1]) / 8)
    # TEMPO: steps in value -1/6, 2/3, -1/3, 1/2, 0 at nodes 1 to 5. Node 1: (1/2 - 1/6) / 8 from
    # completion 0, (-1/2 - 1/6) / 8 from 1 and / 4 from 2; node 2 (1/2 + 2/3) / 8, node 3 (-1/2 - 1/3) / 8,
    # node 4 (1/2 + 1/2) / 8, node 5 1/2 / 8.
    _, credit = weights_of(*HAND, name="tempo", scale_rewards="none")
    np.testing.assert_allclose(credit.plus, np.array([0, 1 / 3, 7 / 6, 0, 1, 1 / 2]) / 8)
    np.testing.assert_allclose(credit.minus, np.array([0, -2, 0, -5 / 6, 0, 0]) / 8)


def test_high_entropy_tokens_by_hand():
    # Tokens and entropies: 5 (0.1) 6 (0.9), 5 7 (0.9), 5 again, 8 (0.1) 9 (0.3): sorted 0.1 0.1 0.1 0.1 0.3
    # 0.9 0.9. The top 0.4: the quantile 0.6 is at place 3.6 of 0 to 6, 0.1 + 0.6 * 0.2 = 0.22.
    entropies = [np.array(e) for e in ([0.1, 0.9], [0.1, 0.9], [0.1], [0.1, 0.3])]
    trie = PrefixTrie.build(*HAND, entropies)
    np.testing.assert_array_equal(trie.entropy, [np.nan, 0.1, 0.9, 0.9, 0.1, 0.3])
    assert entropy_at_quantile([trie], 0.4) == pytest.approx(0.22)
    whole = weights_of(*HAND, name="grpo", beta=0.1)[1]
    options = algorithm("grpo", beta=0.1, top_entropy_quantile=0.4)
    credit = assign_one(options, trie, rng())
    keep = np.array([0, 0, 1, 1, 0, 1])
    np.testing.assert_array_equal(credit.plus, whole.plus * keep)
    np.testing.assert_array_equal(credit.minus, whole.minus * keep)
    np.testing.assert_array_equal(credit.kl, whole.kl)
    # The floor is that of the whole step: beside a group of high entropies no token of this one is kept.
    other = PrefixTrie.build([[1, 2, 3, 4], [5, 6, 7, 8]], [1.0, 0.0], [np.full(4, 2.0)] * 2)
    credits, _ = assign(options, [trie, other], [rng(), rng()], 2)
    assert not credits[0].plus.any() and credits[0].weighted.sum() == whole.weighted.sum()  # KL stays
    assert credits[1].plus.any()
    # Cut-off completions have no say: without 0 and 1 the entropies are 0.1 0.1 0.3.
    kept = np.array([False, False, True, True])
    assert entropy_at_quantile([PrefixTrie.build(*HAND, entropies, kept)], 0.0) == 0.3
    assert entropy_at_quantile([PrefixTrie.build(*HAND, entropies, kept & False)], 0.4) == np.inf


def test_advantages_by_hand():
    # mean 2, squares 1 + 0 + 1, std = sqrt(2 / 2) = 1
    np.testing.assert_allclose(advantages(np.array([1.0, 2.0, 3.0]), "group"), np.array([-1, 0, 1]) / 1.0001)
    np.testing.assert_allclose(advantages(np.array([1.0, 2.0, 3.0]), "none"), [-1, 0, 1])
    assert advantages(np.array([7.0]), "group").tolist() == [0.0], "one completion: nothing to compare"


# ---- against plain Python on random groups -------------------------------------------------------------


@given(random_groups.groups(), st.sampled_from(["group", "none"]), st.sampled_from([0.0, 0.04]))
@random_groups.bounded
def test_grpo_is_the_sum_over_completions(group, scale_rewards, beta):
    trie, credit = weights_of(*group, name="grpo", scale_rewards=scale_rewards, beta=beta)
    assert_sums(trie, credit, oracles.token_terms(*group, every_token(group[0]), scale_rewards), beta)


NEIGHBOURS = ("dr-grpo", "rloo", "lambda-grpo", "tempo")


@pytest.mark.parametrize("name", NEIGHBOURS)
@given(random_groups.groups(), st.sampled_from(["group", "none"]), st.data())
@random_groups.bounded
def test_neighbours_are_the_sums_of_their_formulas(name, group, scale_rewards, data):
    trained = np.array(data.draw(st.lists(st.booleans(), min_size=len(group[0]), max_size=len(group[0]))))
    beta = 0.0 if name == "rloo" else 0.04
    options = {"name": name, "beta": beta, "scale_rewards": scale_rewards}
    trie, credit = weights_of(*group, trained=trained, **options)
    assert_sums(trie, credit, oracles.neighbour_terms(name, *group, scale_rewards, 8, trained), beta)


@given(random_groups.groups(), st.sampled_from([0.0, 0.2, 0.5, 0.9]), st.data())
@random_groups.bounded
def test_the_top_quantile_keeps_the_tokens_at_or_above_it(group, top, data):
    completions, rewards = group
    table = data.draw(st.lists(st.floats(0, 3), min_size=7, max_size=7))
    entropies = [np.array([table[(sum(c[:t]) + t) % 7] for t in range(len(c))]) for c in completions]
    trie = PrefixTrie.build(completions, rewards, entropies)
    credit = assign_one(algorithm("grpo", top_entropy_quantile=top), trie, rng())
    whole = assign_one(algorithm("grpo"), trie, rng())
    tokens = [float(e) for entropy in entropies for e in entropy]
    if not tokens:
        return
    floor = oracles.quantile(tokens, 1 - top)
    assert entropy_at_quantile([trie], top) == pytest.approx(floor)
    for node in range(1, len(trie)):
        prefix = oracles.prefix_of(trie, node)
        entropy = table[(sum(prefix[:-1]) + len(prefix) - 1) % 7]
        assert trie.entropy[node] == entropy
        if abs(entropy - floor) > 1e-9:
            assert credit.plus[node] == (whole.plus[node] if entropy > floor else 0)
            assert credit.minus[node] == (whole.minus[node] if entropy > floor else 0)


s_grpo_options = st.fixed_dictionaries(
    {"alpha": st.integers(0, 5), "p": st.sampled_from([0.0, 0.3, 0.8, 1.0]), "k": st.integers(1, 6)}
)


@given(random_groups.groups(), s_grpo_options, st.integers(0, 9))
@random_groups.bounded
def test_s_grpo_is_the_sum_over_chosen_tokens(group, options, seed):
    completions, rewards = group
    trie, credit = weights_of(completions, rewards, seed, name="s-grpo", beta=1.0, **options)
    draws = rng(seed).random((len(completions), max(map(len, completions))))
    scales = []
    for completion, draw in zip(completions, draws, strict=True):
        positions = oracles.s_grpo_positions(draw, len(completion), **options)
        assert set(range(min(options["alpha"], len(completion)))) <= set(positions)
        assert len(positions) <= max(options["alpha"], options["k"])
        scales.append({t: 1 / len(positions) for t in positions})
    assert_sums(trie, credit, oracles.token_terms(completions, rewards, scales))


@given(random_groups.groups(), st.sampled_from(["step", "branches", "group"]))
@random_groups.bounded
def test_t_spmo_is_the_step_in_value_of_each_unique_prefix(group, normalise):
    trie, credit = weights_of(*group, name="t-spmo", normalise=normalise)
    (expected,) = oracles.t_spmo_weights([group], normalise)
    for node in range(1, len(trie)):
        weight = expected[oracles.prefix_of(trie, node)]
        assert credit.plus[node] + credit.minus[node] == pytest.approx(weight, abs=1e-12)
    assert not credit.kl.any()
    assert (credit.plus >= 0).all() and (credit.minus <= 0).all() and not (credit.plus * credit.minus).any()


OPTIONS = [
    {"name": "grpo"},
    {"name": "s-grpo", "alpha": 2, "p": 0.5, "k": 4},
    {"name": "s-grpo", "alpha": 1, "p": 0.5, "k": 4, "unbiased": True},
    {"name": "t-spmo"},
    {"name": "t-spmo", "normalise": "branches"},
    {"name": "dr-grpo"},
    {"name": "rloo"},
    {"name": "lambda-grpo"},
    {"name": "tempo"},
    {"name": "dapo"},
    {"name": "gspo"},
    {"name": "cispo"},
    {"name": "reinforce-plus-plus"},
    {"name": "reinforce-plus-plus", "baseline": "none"},
    {"name": "maxrl"},
    {"name": "mc-grpo"},
    {"name": "treerl"},
    {"name": "treeadv"},
    {"name": "treerpo"},
    {"name": "gtpo-token"},
    {"name": "gtpo-trajectory", "entropy_weight": 0.0},  # else the entropy alone is signal
]


def each_of(options):
    return pytest.mark.parametrize("options", options, ids=lambda o: "-".join(map(str, o.values())))


every_option = each_of(OPTIONS)


@every_option
@given(group=random_groups.groups(), data=st.data())
@random_groups.bounded
def test_untrained_completions_bring_no_weight_but_count_in_the_mean(options, group, data):
    completions, rewards = group
    trained = np.array(data.draw(st.lists(st.booleans(), min_size=len(rewards), max_size=len(rewards))))
    beta = 1.0 if "beta" in shipped()[options["name"]].model_fields else 0.0
    trie, credit = weights_of(completions, rewards, trained=trained, beta=beta, **options)
    if options["name"] == "t-spmo":
        whole = weights_of(completions, rewards, **options)[1]
        passed = oracles.all_prefixes(
            [c for c, on in zip(completions, trained, strict=True) if on], [0.0] * int(trained.sum())
        )
        keep = np.array([oracles.prefix_of(trie, n) in passed for n in range(len(trie))])
        np.testing.assert_array_equal(credit.plus, whole.plus * keep)
        np.testing.assert_array_equal(credit.minus, whole.minus * keep)
    elif options["name"] == "grpo":
        terms = oracles.token_terms(completions, rewards, every_token(completions), trained=trained)
        assert_sums(trie, credit, terms)
    else:
        # Before the step's divisor, which may count trained tokens, and with the same random numbers, the
        # trained and the untrained part add up to the whole.
        rule = algorithm(**fitting({"divisor": 8, **options, "beta": beta}))
        parts = (trained, ~trained, np.ones(len(rewards), bool))
        credit, rest, whole = (
            rule.weights(
                PrefixTrie.build(completions, rewards, oracles.entropies_of(completions), part), rng(0)
            )
            for part in parts
        )
        np.testing.assert_allclose(credit.plus + rest.plus, whole.plus, atol=1e-12)
        np.testing.assert_allclose(credit.minus + rest.minus, whole.minus, atol=1e-12)
        np.testing.assert_allclose(credit.kl + rest.kl, whole.kl, atol=1e-12)
        if not trained.any():
            assert not credit.weighted.any()


@pytest.mark.parametrize("name", ["grpo", "t-spmo"])
@given(group=random_groups.groups(), random=st.randoms(use_true_random=False))
@random_groups.bounded
def test_order_of_the_completions_is_irrelevant(name, group, random):
    pairs = list(zip(*group, strict=True))
    random.shuffle(pairs)
    shuffled = [c for c, _ in pairs], [r for _, r in pairs]
    beta = 1.0 if name == "grpo" else 0.0
    same(weights_of(*group, name=name, beta=beta)[1], weights_of(*shuffled, name=name, beta=beta)[1])


@every_option
def test_all_empty_completions_and_single_ones_have_no_policy_weight(options):
    for completions in ([[], []], [[3, 4, 5]]):
        trie, credit = weights_of(completions, np.arange(len(completions), dtype=float), **options)
        assert len(trie) in (1, 4)
        assert not credit.weighted.any()


def test_every_file_of_the_folder_is_an_algorithm():
    from importlib.resources import files

    names = {path.name for path in files("twig.core.algorithms").iterdir() if path.name.endswith(".py")}
    names -= {"__init__.py", "base.py", "registry.py"}
    assert {f"{name.replace('-', '_')}.py" for name in shipped()} == names
    for name, kind in shipped().items():
        assert weights_of(*HAND, name=name)[1].weighted.any()
        assert kind.title and kind.summary and "\n" not in kind.summary


# ---- facts ---------------------------------------------------------------------------------------------


@given(random_groups.groups())
@random_groups.bounded
def test_t_spmo_credit_is_at_forks_only(group):
    completions, _ = group
    trie, credit = weights_of(*group, name="t-spmo")
    chain = trie.count[1:] == trie.count[trie.parent[1:]]
    assert not credit.weighted[1:][chain].any()
    distinct = len({tuple(c) for c in completions})
    assert credit.weighted.sum() <= max(2 * distinct - 2, 0)


def test_t_spmo_bound_on_nodes_with_credit_is_reached_whatever_the_length():
    # A fork at each of the first three tokens into tails: u = 4 distinct completions, 2 * 4 - 2 = 6 nodes.
    # V: root 0.35, then 1.3 / 3 and 0.1, then 0.5 and 0.3, then 1 and 0: no two neighbours alike.
    tail = [7] * 200
    completions = [[0, 0, 0, *tail], [0, 0, 1, *tail], [0, 1, *tail], [1, *tail]]
    trie, credit = weights_of(completions, [1.0, 0.0, 0.3, 0.1], name="t-spmo")
    assert len(trie) > 800
    assert credit.weighted.sum() == 6


@given(random_groups.groups())
@random_groups.bounded
def test_t_spmo_advantages_along_a_completion_sum_to_its_last_value_minus_the_mean(group):
    completions, rewards = group
    trie, credit = weights_of(*group, name="t-spmo")
    advantage = (credit.plus + credit.minus) * max(len(trie) - 1, 1)
    mean = sum(rewards) / len(rewards)
    through = oracles.all_prefixes(completions, rewards)
    for completion, path, reward in zip(completions, trie.paths, rewards, strict=True):
        at_end = through[tuple(completion)]
        total = advantage[path].sum()
        assert total == pytest.approx(sum(at_end) / len(at_end) - mean, abs=1e-12)
        if set(at_end) == {reward}:
            assert total == pytest.approx(reward - mean, abs=1e-12)


@pytest.mark.parametrize("unbiased", [False, True])
@given(group=random_groups.groups(), seed=st.integers(0, 9))
@random_groups.bounded
def test_s_grpo_with_alpha_at_least_the_length_is_grpo(unbiased, group, seed):
    longest = max(map(len, group[0]))
    full = weights_of(*group, name="grpo", beta=1.0)[1]
    options = {"name": "s-grpo", "alpha": longest, "p": 0.3, "k": 1000, "unbiased": unbiased, "beta": 1.0}
    same(weights_of(*group, seed, **options)[1], full)
    # p = 1 and room for all keeps every token too
    same(weights_of(*group, seed, **options | {"alpha": 0, "p": 1.0})[1], full)


@every_option
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.7, 1e9 / 3, 0.0])
def test_equal_rewards_have_policy_weights_of_exactly_zero(options, reward):
    completions = [[1, 2, 3], [1, 2, 4], [1, 5], [6], [6], [1]]
    betas = [0.0, 0.04] if "beta" in shipped()[options["name"]].model_fields else [0.0]
    for size, beta in itertools.product((3, 5, 6), betas):
        trie, credit = weights_of(completions[:size], [reward] * size, beta=beta, **options)
        assert not credit.plus.any() and not credit.minus.any()
        unequal = weights_of(completions[:size], [reward + i for i in range(size)], beta=beta, **options)[1]
        np.testing.assert_array_equal(credit.kl, unequal.kl)
        assert credit.kl.any() == (beta > 0)


def test_rewards_of_a_tenth_would_have_a_spurious_deviation():
    # Why the rule above says max == min and not std == 0.
    rewards = np.array([0.1] * 3)
    assert rewards.std(ddof=1) != 0
    assert (rewards - rewards.mean()).any()


@every_option
def test_rewards_that_differ_by_rounding_are_equal(options):
    _, credit = weights_of([[1, 2], [1, 3], [2]], [0.3, 0.1 + 0.2, 0.3], **options)
    assert not credit.plus.any() and not credit.minus.any()


@each_of([option for option in OPTIONS if option["name"] != "gtpo-token"])  # that one knows right and wrong
def test_a_reward_that_is_the_mean_but_for_rounding_has_no_credit(options):
    # (0.1 + 0.2 + 0.3) / 3 is above 0.2: without a tolerance the second completion would be trained.
    trie, credit = weights_of([[1], [2], [3]], [0.1, 0.2, 0.3], **options)
    assert credit.minus[1] < 0 < credit.plus[3], "signal stays"
    assert credit.plus[2] == credit.minus[2] == 0
    assert trie.value[0] == trie.rewards[1]


def test_rounding_is_no_branch():
    # Two of three nodes have credit, as they would with rewards of 1, 2 and 3.
    _, credit = weights_of([[1], [2], [3]], [0.1, 0.2, 0.3], name="t-spmo", normalise="branches")
    np.testing.assert_allclose(credit.plus + credit.minus, [0, -0.05, 0, 0.05])


def test_a_small_difference_of_large_rewards_is_no_signal_and_of_small_ones_is():
    for scale, signal in ((1e6, False), (1e-6, True)):
        rewards = [scale, scale + 1e-9]
        assert weights_of([[1], [2]], rewards, name="t-spmo")[1].plus.any() == signal
        assert weights_of([[1], [2]], rewards, name="grpo")[1].plus.any() == signal


def test_a_group_of_equal_rewards_stays_in_the_number_of_prompts():
    import tiny

    from twig.tasks.rewards import Rewards
    from twig.training.batch import Batch, Outcomes
    from twig.training.trainer import Trainer

    flat = tiny.make_group([1], HAND[0], [0.1] * 4)
    fork = tiny.make_group([1], HAND[0], HAND[1])
    settings = SimpleNamespace(algorithm=algorithm("grpo"), train=SimpleNamespace(seed=0))
    alone = weights_of(*HAND, name="grpo")[1]
    for groups, prompts in (([fork], 1), ([flat, fork], 2), ([flat, fork, flat], 3)):
        total = np.concatenate([g.rewards for g in groups])
        batch = Batch(Outcomes(groups, Rewards(total, {}), None, total > 0), None)
        Trainer.assign_credit(SimpleNamespace(settings=settings), batch, 1)
        credits = [each.credit for each in batch.scored if each.group is fork]
        for name in ("plus", "minus", "kl"):
            np.testing.assert_allclose(getattr(credits[0], name), getattr(alone, name) / prompts, atol=1e-12)
        assert len(batch.scored) == len(groups)


def test_the_end_token_is_trained():
    # 0 ends a completion; the last one was cut off before it.
    completions, rewards = [[5, 6, 0], [5, 0], [5, 6, 7]], [1.0, 0.0, 0.3]
    for options in ({"name": "grpo"}, {"name": "s-grpo"}):
        trie, credit = weights_of(completions, rewards, **options)
        ends = [path[-1] for path in trie.paths]
        assert trie.token[ends[:2]].tolist() == [0, 0]
        assert credit.weighted[ends].all()
        assert credit.plus[ends[0]] > 0 > credit.minus[ends[1]]
    # T-SPMO: the end after 5 and going on after 5 are a fork like any other.
    trie, credit = weights_of(completions, rewards, name="t-spmo")
    assert credit.minus[trie.paths[1][-1]] < 0


# ---- S-GRPO's choice of tokens -------------------------------------------------------------------------


def copies(completion, number):
    """A group of copies of a completion that share no node, all right, and one wrong completion."""
    completions = [[100 + i, *completion[1:]] for i in range(number)]
    return [*completions, [0]], [1.0] * number + [0.0]


def test_the_cap_makes_late_tokens_rarer():
    # alpha = 1, k = 2: one later token, the first with a number below p = 1/2, so position t >= 1 is chosen
    # with probability p (1 - p)^(t - 1). Rarer tokens with the same weight: the rule is biased.
    number = 4000
    trie, credit = weights_of(*copies([1, 2, 3, 4, 5], number), name="s-grpo", alpha=1, p=0.5, k=2)
    chosen = (credit.plus[np.array(trie.paths[:number])] > 0).mean(0)
    expected = np.array([1.0, 0.5, 0.25, 0.125, 0.0625])
    bound = 5 * np.sqrt(expected * (1 - expected) / number)
    assert (np.abs(chosen - expected) <= bound).all()


def test_unbiased_expected_weights_are_those_of_grpo_by_enumeration():
    # The drawn set follows from the order of the later positions' numbers, and every order is equally likely:
    # 4! orders for the later tokens of one completion times 3! for the other are all there is.
    completions, rewards = [[1, 2, 3, 4, 5], [1, 2, 6, 7], [1]], [1.0, 0.0, 0.4]
    options = {"name": "s-grpo", "unbiased": True, "alpha": 1, "p": 0.5, "k": 3, "beta": 1.0}
    credits = []
    orders = itertools.product(itertools.permutations(range(4)), itertools.permutations(range(3)))
    for first, second in orders:
        draws = Draws([[0, *first], [0, *second, 0], [0] * 5])
        credits.append(weights_of(completions, rewards, generator=draws, **options)[1])
    full = weights_of(completions, rewards, name="grpo", beta=1.0)[1]
    assert len({tuple(c.weighted) for c in credits}) > 5
    for name in ("plus", "minus", "kl"):
        mean = np.mean([getattr(c, name) for c in credits], 0)
        np.testing.assert_allclose(mean, getattr(full, name), rtol=0, atol=1e-12)


def test_unbiased_expected_weights_are_those_of_grpo_by_sampling():
    # 4000 independent draws of the weights of 12 positions, relative to those of GRPO; each mean is within 5
    # standard errors of 1, so a false alarm has probability below 12 * 6e-7.
    number = 4000
    group = copies(list(range(12)), number)
    trie, credit = weights_of(*group, name="s-grpo", unbiased=True, alpha=2, p=0.3, k=5)
    full = weights_of(*group, name="grpo")[1]
    nodes = np.array(trie.paths[:number])
    drawn = credit.plus[nodes] / full.plus[nodes]
    error = drawn.std(0, ddof=1) / np.sqrt(number)
    assert (error[2:] > 1e-3).all(), "the positions after alpha are drawn"
    assert (np.abs(drawn.mean(0) - 1) <= 5 * error + 1e-12).all()


@pytest.mark.parametrize(
    ("length", "alpha", "p", "k", "later"),
    [
        (10, 2, 0.3, 5, 2),  # round(0.3 * 8 = 2.4) = 2
        (10, 2, 0.9, 5, 3),  # round(7.2) = 7, but k - alpha = 3
        (10, 2, 0.0, 5, 1),  # at least one, or the tail would never be trained
        (3, 2, 0.3, 5, 1),
        (2, 2, 0.3, 5, 0),  # nothing after alpha
        (10, 0, 1.0, 100, 10),
    ],
)
def test_unbiased_number_of_later_tokens(length, alpha, p, k, later):
    completions = [list(range(length)), [99]]
    options = {"name": "s-grpo", "unbiased": True, "alpha": alpha, "p": p, "k": k}
    trie, credit = weights_of(completions, [1.0, 0.0], **options)
    chosen = credit.plus[1 : 1 + length] > 0
    assert chosen[:alpha].all()
    assert chosen[alpha:].sum() == later


@every_option
def test_credit_is_a_function_of_its_arguments(options):
    completions = [list(range(i, i + 12)) for i in (0, 0, 3, 3)]
    rewards = np.array([1.0, 0.0, 0.5, 0.5])
    trained = np.array([True, True, False, True])
    trie = PrefixTrie.build(completions, rewards, oracles.entropies_of(completions), trained)
    before = {name: getattr(trie, name).copy() for name in ("token", "count", "reward_sum", "rewards")}
    options = {"divisor": 8} | options if options["name"] == "dr-grpo" else options
    first, second = (assign(algorithm(**options), [trie], [rng(3)], 2)[0][0] for _ in range(2))
    for name in ("plus", "minus", "kl"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(trie, name), value)
    assert trie.trained.tolist() == [True, True, False, True]
