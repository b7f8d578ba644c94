"""Attention by chains against one softmax under the pack's mask, and updates of long packs."""

from contextlib import nullcontext

import numerics
import numpy as np
import pytest
import tiny
import torch
from gradients import credit_of, groups_of, oracle_gradient, scored
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from numerics import assert_same
from torch import nn

from twig.common.progress import Progress
from twig.config.sizes import Sizes
from twig.core.algorithms.base import Objective
from twig.core.trie import PrefixTrie
from twig.engine.decoder import tree_visible
from twig.engine.mixers import tree_attention
from twig.engine.mixers.tree_attention import Chains, attend_tree, is_long
from twig.engine.update import LogProbs, Passes

completions = st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=5)


class Layer(nn.Module):
    """What transformers' attention functions read of a layer."""

    is_causal, num_key_value_groups = True, 2


def ends_of(rows, prompt):
    """`ends` of a segment: the last `prompt` tokens of a prompt and the whole trie of `rows`."""
    trie = PrefixTrie.build(rows, np.zeros(len(rows)))
    length = prompt + len(trie) - 1
    return np.concatenate([np.full(prompt - 1, length), trie.end + prompt - 1])


@examples(max_examples=60, deadline=None)
@given(
    st.lists(completions, min_size=1, max_size=2), st.integers(1, 3), st.integers(0, 3), st.integers(0, 99)
)
def test_chains_give_values_and_gradients_of_one_softmax_under_the_mask(tries, prompt, stem, seed):
    torch.manual_seed(seed)
    parts = [ends_of(rows, prompt) for rows in tries]
    ends = np.concatenate([part + before for part, before in zip(parts, [0, len(parts[0])], strict=False)])
    chains = Chains.of(ends, stem, torch.float64)
    length = len(ends)
    query = torch.randn(1, 4, length, 8, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(1, 2, stem + length, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    visible = tree_visible(torch.from_numpy(ends)[None])
    visible = torch.cat([visible.new_ones(1, length, stem), visible], 2)
    mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)[:, None]
    pull, results = torch.randn(1, length, 4, 8, dtype=torch.float64), []
    for each in (chains, mask):
        attended, _ = attend_tree(Layer(), query, key, value, each, scaling=0.3)
        results.append((attended, *torch.autograd.grad(attended, (query, key, value), pull)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    columns = torch.randint(length, (1, 3))
    assert torch.equal(chains.at(columns), mask[:, :, columns[0]])


def test_chains_are_for_long_rows_that_fork_seldom():
    causal = np.full((1, 2048), 2048)
    assert is_long(causal, 80)
    assert not is_long(causal[:, :512], 80), "short"
    assert not is_long(np.repeat(causal, 2, 0), 80), "several rows"
    assert not is_long(np.arange(1, 2049)[None], 80), "a fork at each token"


@pytest.mark.parametrize(("family", "checkpointed"), [("qwen2", False), ("granite", False), ("llama", True)])
def test_long_packs_give_the_same_gradient(family, checkpointed, monkeypatch):
    monkeypatch.setattr(tree_attention, "_CELLS", 0)
    monkeypatch.setattr(tree_attention, "_LENGTH", 0)
    calls, forward = [], tree_attention._forward
    monkeypatch.setattr(tree_attention, "_forward", lambda *a, **k: calls.append(a[0]) or forward(*a, **k))
    # `casts` does not reach layers that run again in the backward pass
    dtype, casts = (torch.float32, nullcontext()) if checkpointed else (None, numerics.casts())
    with casts:
        policy = tiny.build_policy(
            family, "sdpa", dtype, layers=[1, 3], checkpoint_layers=checkpointed, temperature=0.8
        )
        groups, beta = groups_of(count=2), numerics.now().beta
        tries, credits = credit_of(groups, "s-grpo", beta=beta)
        sizes = Sizes(1, 9, 2**22, checkpointed)
        passes = Passes(policy, sizes, Progress(), scored(groups, tries, credits), None)
        assert any(len(pack.ids) == 1 for pack in passes.packs)
        assert any(pack.stem for pack in passes.packs), "some packs must share a stem"
        with policy.base():
            ref = passes.logps()
        _, loss = passes.backward(Objective(beta=beta), LogProbs(None, ref))
        assert calls, "some packs must attend by chains"
        ours = loss, {n: p.grad.clone() for n, p in policy.parameters.items()}
        theirs = oracle_gradient(policy, groups, tries, credits, Objective(beta=beta))
    assert_same(ours, theirs, 1e-5 if checkpointed else 1e-9)


@pytest.mark.parametrize(("family", "modules"), [("lfm2", ["q_proj", "v_proj"]), ("gemma4", ["q_proj"])])
def test_layers_that_need_more_than_a_mask_give_the_same_gradient_in_long_packs(family, modules, monkeypatch):
    monkeypatch.setattr(tree_attention, "_CELLS", 0)
    monkeypatch.setattr(tree_attention, "_LENGTH", 0)
    with numerics.casts():
        policy = tiny.build_policy(family, "sdpa", layers="all", target_modules=modules)
        groups = groups_of(count=2)
        tries, credits = credit_of(groups)
        passes = Passes(policy, Sizes(1, 9, 2**22, False), Progress(), scored(groups, tries, credits), None)
        _, loss = passes.backward(Objective())
        ours = loss, {n: p.grad.clone() for n, p in policy.parameters.items()}
        theirs = oracle_gradient(policy, groups, tries, credits, Objective())
    assert_same(ours, theirs)


def test_layers_with_terms_of_their_own_keep_their_masks(monkeypatch):
    monkeypatch.setattr(tree_attention, "_CELLS", 0)
    monkeypatch.setattr(tree_attention, "_LENGTH", 0)
    policy = tiny.build_policy("qwen2", "sdpa")
    with policy.computing():
        ends, positions = np.array([[4, 4, 3, 4]]), torch.tensor([[0, 1, 2, 2]])
        assert isinstance(policy._masks(ends, positions, 0)[None], Chains)
        del policy._serves_chains
        monkeypatch.setattr("twig.engine.policy.Chains.of", lambda *args: ())  # a layer that cannot read it
        assert isinstance(policy._masks(ends, positions, 0)[None], torch.Tensor)
    assert isinstance(policy._masks(ends, positions, 0)[None], torch.Tensor), "outside `computing`"
