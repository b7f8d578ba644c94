"""Divisors, selections and ratios of a whole step: against the papers' formulas as loops over completions.

In values and gradients.
"""

import numpy as np
import oracles
import pytest
import random_groups
import torch
from hypothesis import given
from hypothesis import strategies as st

from twig.common.errors import UserError
from twig.core.algorithms.base import Algorithm, Credit, Scale, Step
from twig.core.algorithms.registry import algorithm
from twig.core.credit import assign
from twig.core.objective import loss, sequence_weights
from twig.core.trie import PrefixTrie

steps = st.lists(random_groups.groups(max_size=5, longest=4), min_size=1, max_size=3)


class LogProbs:
    """A leaf per prefix of each group, with an old value beside it."""

    def __init__(self, step, seed):
        rng = np.random.default_rng(seed)
        self.leaves, self.old = {}, {}
        for g, (completions, rewards) in enumerate(step):
            for prefix in oracles.all_prefixes(completions, rewards):
                old = -rng.exponential()
                self.old[g, prefix] = old
                value = torch.tensor(old + rng.normal(0, 0.3), dtype=torch.float64, requires_grad=True)
                self.leaves[g, prefix] = value

    def ratio(self, g, prefix, fresh):
        logp = self.leaves[g, prefix]
        return (logp - (logp.detach() if fresh else self.old[g, prefix])).exp()

    def gradient(self, total):
        if not total.requires_grad:
            return {}
        actual = torch.autograd.grad(total, list(self.leaves.values()), allow_unused=True)
        return {k: 0.0 if v is None else float(v) for k, v in zip(self.leaves, actual, strict=True)}


def advantage(step, g, scale_rewards):
    rewards = step[g][1]
    if scale_rewards != "batch":
        return oracles.advantages(rewards, scale_rewards)
    every = np.concatenate([r for _, r in step])
    deviation = every.std(ddof=1) + 1e-4 if len(every) > 1 else 1.0
    return [a / deviation for a in oracles.advantages(rewards, "none")]


def clipped(ratio, weight, rule):
    high, low = 1 + rule.epsilon_high, 1 - rule.epsilon
    return torch.minimum(ratio * weight, ratio.clamp(low, high) * weight)


def by_completions(rule, step, logps, fresh):
    """The papers' losses: a sum over completions and their tokens."""
    total = torch.zeros((), dtype=torch.float64)
    num_tokens = sum(len(c) for completions, _ in step for c in completions)
    for g, (completions, _) in enumerate(step):
        adv = advantage(step, g, rule.scale_rewards)
        for completion, a in zip(completions, adv, strict=True):
            prefixes = [tuple(completion[: t + 1]) for t in range(len(completion))]
            if not prefixes:
                continue
            ratios = torch.stack([logps.ratio(g, prefix, fresh) for prefix in prefixes])
            share = 1 / (len(step) * len(completions))
            if rule.name == "dapo":
                total = total - clipped(ratios, a, rule).sum() / num_tokens
            elif rule.name == "cispo":
                logp = torch.stack([logps.leaves[g, prefix] for prefix in prefixes])
                weight = ratios.detach().clamp(max=1 + rule.epsilon_high) * a
                total = total - (weight * logp).sum() / num_tokens
            elif rule.name == "gspo":
                sequence = ratios.log().mean().exp()
                total = total - clipped(sequence, a, rule) * share
            else:
                total = total - clipped(ratios, a, rule).mean() * share
    return total


def by_nodes(rule, step, logps, fresh):
    """The same through tries, credit and the objective."""
    tries = [PrefixTrie.build(*group) for group in step]
    credits, _ = assign(rule, tries, [np.random.default_rng(0) for _ in tries], len(step))
    total, objective = torch.zeros((), dtype=torch.float64), rule.objective()
    for g, (trie, credit) in enumerate(zip(tries, credits, strict=True)):
        keys = [(g, oracles.prefix_of(trie, node)) for node in range(len(trie))]
        logp = torch.stack([logps.leaves[key] for key in keys])
        old = None if fresh else torch.tensor([logps.old[key] for key in keys], dtype=torch.float64)
        plus, minus = credit.plus, credit.minus
        if objective.kind == "sequence ratio":
            pair = (None, None) if old is None else (logp.detach().numpy(), old.numpy())
            sums = sequence_weights(objective, trie, credit, *pair)
            plus, minus, old, total = sums.plus, sums.minus, None, total - sums.constant
        vectors = [torch.from_numpy(weight) for weight in (plus, minus, credit.kl)]
        total = total + loss(objective, logp, *vectors, old)
    return total


RULES = {
    "dapo": algorithm("dapo", epsilon=0.1, epsilon_high=0.3),
    "cispo": algorithm("cispo", epsilon_high=0.2),
    "gspo": algorithm("gspo", epsilon=0.05, epsilon_high=0.1),
    "batch": algorithm("grpo", scale_rewards="batch", epsilon=0.1, epsilon_high=0.3),
    "dapo, batch": algorithm("dapo", scale_rewards="batch"),
    "gspo, unscaled": algorithm("gspo", scale_rewards="none", epsilon=0.05, epsilon_high=0.1),
}


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("name", RULES)
@given(step=steps, seed=st.integers(0, 99))
@random_groups.bounded
def test_nodes_give_the_loss_and_the_gradient_of_completions(name, fresh, step, seed):
    logps, rule = LogProbs(step, seed), RULES[name]
    ours, theirs = (each(rule, step, logps, fresh) for each in (by_nodes, by_completions))
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-9)
    expected = logps.gradient(theirs)
    for key, value in logps.gradient(ours).items():
        assert value == pytest.approx(expected.get(key, 0.0), abs=1e-9)


def test_a_node_shared_by_completions_of_different_ratios_by_hand():
    # "1 2" (R 1) and "1 3" (R 0) share the node of 1. Without scaling A = +-1/2, and each token's share is
    # 1 / (G |o|) = 1/4. Ratios: s of the first is e^((0.2 + 0.4) / 2) = e^0.3, of the second
    # e^((0.2 - 0.4) / 2) = e^-0.1. With wide clipping the shared node has
    # + 1/2 * e^0.3 / 4 and - 1/2 * e^-0.1 / 4.
    trie = PrefixTrie.build([[1, 2], [1, 3]], [1.0, 0.0])
    rule = algorithm("gspo", scale_rewards="none", epsilon=0.5, epsilon_high=0.5)
    (credit,), _ = assign(rule, [trie], [np.random.default_rng(0)], 1)
    old, logp = np.zeros(4), np.array([0.0, 0.2, 0.4, -0.4])
    actual = sequence_weights(rule.objective(), trie, credit, logp, old)
    np.testing.assert_allclose(actual.plus, np.exp(0.3) / 8 * np.array([0, 1, 1, 0]))
    np.testing.assert_allclose(actual.minus, -np.exp(-0.1) / 8 * np.array([0, 1, 0, 1]))
    # Clipped at 1.1, the first completion counts 1/2 * 1.1 / 2 in the value and has no gradient.
    tight = algorithm("gspo", scale_rewards="none", epsilon=0.5, epsilon_high=0.1).objective()
    actual = sequence_weights(tight, trie, credit, logp, old)
    assert not actual.plus.any() and actual.constant == pytest.approx(1.1 / 4)


@given(steps, st.sampled_from(["step", "branches", "group"]))
@random_groups.bounded
def test_t_spmo_divides_all_groups_of_a_step_alike(step, normalise):
    tries = [PrefixTrie.build(*group) for group in step]
    rngs = [np.random.default_rng(0) for _ in tries]
    credits, _ = assign(algorithm("t-spmo", normalise=normalise), tries, rngs, len(step))
    expected = oracles.t_spmo_weights(step, normalise)
    for trie, credit, weights in zip(tries, credits, expected, strict=True):
        for node in range(1, len(trie)):
            weight = weights[oracles.prefix_of(trie, node)]
            assert credit.plus[node] + credit.minus[node] == pytest.approx(weight, rel=1e-9, abs=1e-15)


def test_the_divisor_of_the_step_makes_a_short_group_count_like_a_long_one():
    # The same fork in a group of 2 nodes and in one of 20: a divisor per group pushes it 10 times as hard.
    tail = list(range(10, 19))
    short, long = ([[1], [2]], [1.0, 0.0]), ([[1, *tail], [2, *tail]], [1.0, 0.0])
    tries = [PrefixTrie.build(*group) for group in (short, long)]
    rngs = [np.random.default_rng(0)] * 2
    (a, b), _ = assign(algorithm("t-spmo"), tries, rngs, 2)
    assert a.plus.max() == b.plus.max() == 0.5 / 22
    (a, b), _ = assign(algorithm("t-spmo", normalise="branches"), tries, rngs, 2)
    assert a.plus.max() == b.plus.max() == 0.5 / 4
    (a, b), _ = assign(algorithm("t-spmo", normalise="group"), tries, rngs, 2)
    assert a.plus.max() == pytest.approx(10 * b.plus.max())


@given(steps, st.sampled_from([0.2, 0.5]))
@random_groups.bounded
def test_the_tokens_of_highest_entropy_are_those_of_the_step(step, top):
    def entropy(completion, t):
        return (7 * sum(completion[: t + 1]) + 3 * t) % 11 / 10

    recorded = [[np.array([entropy(c, t) for t in range(len(c))]) for c in group] for group, _ in step]
    tries = [PrefixTrie.build(*group, each) for group, each in zip(step, recorded, strict=True)]
    tokens = sorted(float(e) for group in recorded for each in group for e in each)
    if not tokens:
        return
    rngs = [np.random.default_rng(0) for _ in tries]
    whole, _ = assign(algorithm("dapo"), tries, rngs, len(step))
    credits, scale = assign(algorithm("dapo", top_entropy_quantile=top), tries, rngs, len(step))
    floor = oracles.quantile(tokens, 1 - top)
    for trie, credit, full, keep in zip(tries, credits, whole, scale.keep, strict=True):
        for node in range(1, len(trie)):
            if abs(trie.entropy[node] - floor) > 1e-9:
                assert keep[node] == (trie.entropy[node] > floor)
                assert credit.plus[node] == full.plus[node] * keep[node]


# ---- rules of one's own -----------------------------------------------------------------------------------


class Deep(Algorithm):
    """Forks only, less the deeper they are, divided by the sum of all sizes in the step."""

    decay: float = 0.5

    def weights(self, trie, rng):
        steps = np.append(0.0, trie.value[1:] - trie.value[trie.parent[1:]])
        return Credit.signed(steps * self.decay**trie.depth)

    def scale(self, step):
        return Scale(sum(float((c.plus - c.minus).sum()) for c in step.credits))


def test_a_rule_of_ones_own_by_hand():
    # V: root 1/2, "1" 1, "2" 0: steps +-1/2, at depth 1 halved: +-1/4; the sum of sizes is 1/2.
    trie = PrefixTrie.build([[1, 5], [2]], [1.0, 0.0])
    (credit,), scale = assign(Deep(), [trie], [np.random.default_rng(0)], 1)
    assert scale.divisor == 0.5
    assert (credit.plus + credit.minus).tolist() == [0.0, 0.5, 0.0, -0.5]
    assert Deep().name == "Deep" and Deep(decay=0.1).decay == 0.1


class Wrong(Deep):
    """Returns what `make` makes of the right weights."""

    make: str

    def weights(self, trie, rng):
        good = super().weights(trie, rng)
        if self.make == "raise":
            return good.plus["x"]
        if self.make == "none":
            return None
        if self.make == "tokens":
            return Credit(good.plus, good.minus, good.kl, [np.ones(1)] * 2)
        return Credit(
            {
                "short": good.plus[1:],
                "nan": good.plus * np.nan,
                "negative": good.plus - 1,
                "root": good.plus + 1,
            }[self.make],
            good.minus,
            good.kl,
        )


@pytest.mark.parametrize("make", ["short", "nan", "negative", "root", "raise", "none", "tokens"])
def test_weights_that_are_none_stop_the_run_in_one_line(make):
    trie = PrefixTrie.build([[1, 5], [2]], [1.0, 0.0])
    with pytest.raises(UserError, match=r"^algorithm Wrong: .*\.$") as caught:
        assign(Wrong(make=make), [trie], [np.random.default_rng(0)], 1)
    if make == "raise":
        assert "test_steps.py:" in str(caught.value) and "IndexError" in caught.value.traceback_text


class Scales(Deep):
    """Returns what `make` says in place of a scale."""

    make: str

    def scale(self, step):
        few = [np.ones(1, bool)] * len(step.tries)
        return {"number": 2.0, "short": Scale(1.0, few), "nan": Scale(np.nan), "fewer": Scale(1.0, [])}[
            self.make
        ]


@pytest.mark.parametrize("make", ["number", "short", "nan", "fewer"])
def test_a_scale_that_is_none_stops_the_run_in_one_line(make):
    trie = PrefixTrie.build([[1, 5], [2]], [1.0, 0.0])
    with pytest.raises(UserError, match=r"^algorithm Scales: .*\.$"):
        assign(Scales(make=make), [trie], [np.random.default_rng(0)], 1)


def test_an_objective_has_what_it_needs_or_is_refused():
    class Sequences(Deep):
        objective_kind = "sequence ratio"

    class Misspelt(Deep):
        def objective(self):
            objective = super().objective()
            object.__setattr__(objective, "kind", "sequence-ratio")  # as if types were not checked
            objective.__post_init__()
            return objective

    trie = PrefixTrie.build([[1, 5], [2]], [1.0, 0.0])
    with pytest.raises(UserError, match=r"^algorithm Sequences: .*each token of each completion"):
        assign(Sequences(), [trie], [np.random.default_rng(0)], 1)
    with pytest.raises(
        UserError, match=r"^objective_kind: 'sequence-ratio' is no objective.*'sequence ratio'"
    ):
        assign(Misspelt(), [trie], [np.random.default_rng(0)], 1)


def test_weights_may_be_lists():
    class Lists(Deep):
        def weights(self, trie, rng):
            credit = super().weights(trie, rng)
            for name in ("plus", "minus", "kl"):  # as if types were not checked
                object.__setattr__(credit, name, getattr(credit, name).tolist())
            return credit

    trie = PrefixTrie.build([[1, 5], [2]], [1.0, 0.0])
    pair = [assign(each, [trie], [np.random.default_rng(0)], 1)[0][0] for each in (Lists(), Deep())]
    np.testing.assert_array_equal(pair[0].plus, pair[1].plus)


def test_a_divisor_that_is_no_number_above_zero_stops_the_run():
    trie = PrefixTrie.build([[1], [1]], [1.0, 1.0])
    with pytest.raises(UserError, match="divisor is 0.0"):
        assign(Deep(), [trie], [np.random.default_rng(0)], 1)


def test_a_step_counts_trained_tokens_nodes_and_weights():
    trie = PrefixTrie.build([[1, 2], [1, 3], [1]], [1.0, 0.0, 0.5], trained=np.array([True, False, True]))
    credit = Credit.signed(np.array([0.0, 0.0, 1.0, 0.0]))
    step = Step([trie, trie], [credit, credit], 3)
    assert (step.num_tokens, step.num_nodes, step.num_weighted) == (6, 6, 2)
