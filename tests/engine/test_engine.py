"""The engine against its twins: packs, frozen trunk, head rows and sampling, in values and adapter
gradients."""

import weakref
from contextlib import nullcontext
from dataclasses import replace

import numerics
import numpy as np
import oracles
import pytest
import tiny
import torch
from gradients import (
    credit_of,
    engine_gradient,
    groups_of,
    oracle_gradient,
    requests_of,
    scored,
    text_of,
    texts_of,
)
from numerics import assert_same, assert_same_text, assert_values

from twig.common.progress import Progress
from twig.config.sizes import Sizes
from twig.core.algorithms.base import Objective
from twig.core.rng import uniforms
from twig.core.types import Group
from twig.engine.decoder import Decoder
from twig.engine.kv_cache import PrefixKV
from twig.engine.pack import build_packs
from twig.engine.sampler import SamplingParams, sample
from twig.engine.update import LogProbs, Passes


@pytest.fixture(autouse=True)
def _float64(request):
    with nullcontext() if "float32" in request.function.__name__ else numerics.casts():
        yield


# Apart in what their layers compute: the first in both attentions, with soft caps, with windows, with scales.
APART = [("qwen2", "sdpa"), ("qwen2", "eager"), ("gemma2", "eager"), ("gemma3", "sdpa"), ("granite", "sdpa")]


def family_cases(quick):
    """Every family with every attention that it has, slow where the pair is not among `quick`."""
    pairs = [(f, a) for f in tiny.FAMILIES for a in ("sdpa", "eager") if a == "eager" or tiny.has_sdpa(f)]
    assert set(quick) <= set(pairs)
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in pairs]


of_families = pytest.mark.parametrize(("family", "attention"), family_cases(APART))
ONE_ATTENTION = [(family, "sdpa" if tiny.has_sdpa(family) else "eager") for family in tiny.FAMILIES]
SLOW_CUTS = [pytest.param(cut, marks=pytest.mark.slow) for cut in ("all", [1], [0, 2])]


@pytest.mark.parametrize("layers", ["last_third", *SLOW_CUTS], ids=str)
@pytest.mark.parametrize(("family", "attention"), family_cases(ONE_ATTENTION))
def test_pack_gradient_equals_prefix_by_prefix_forward(family, attention, layers):
    policy = tiny.build_policy(family, attention, layers=layers, temperature=0.8)
    groups, beta = groups_of(count=2), numerics.now().beta
    tries, credits = credit_of(groups, beta=beta)
    surrogate = Objective(beta=beta)
    assert_same(
        engine_gradient(policy, groups, tries, credits, surrogate),
        oracle_gradient(policy, groups, tries, credits, surrogate),
    )


@pytest.mark.parametrize("name", ["grpo", "s-grpo", "t-spmo"])
def test_each_algorithm_and_pack_size_gives_the_same_gradient(name):
    policy = tiny.build_policy(layers=[1, 3], head_chunk=5 * tiny.VOCAB)
    groups = groups_of(3)
    tries, credits = credit_of(groups, name)
    theirs = oracle_gradient(policy, groups, tries, credits, Objective())
    sizes = set()
    for size in (1, 9, 17, 30, 64, 4096):
        packs = build_packs(scored(groups, tries, credits), size)
        sizes.add(len(packs))
        assert_same(engine_gradient(policy, groups, tries, credits, Objective(), size), theirs)
    assert len(sizes) > 2, "the sizes must cut differently"


@pytest.mark.parametrize("recorded", [True, pytest.param(False, marks=pytest.mark.slow)])
@of_families
def test_a_stem_shared_by_its_packs_and_a_last_layer_on_head_rows_give_the_same_gradient(
    family, attention, recorded, monkeypatch
):
    policy = tiny.build_policy(family, attention, layers=[1, 3])
    groups, beta, boundary = groups_of(count=2), numerics.now().beta, None
    tries, credits = credit_of(groups, "s-grpo", beta=beta)
    if recorded:
        groups, boundary = recorded_by_hand(policy, groups)
    few_rows, run_at = [], Decoder.run_at
    monkeypatch.setattr(Decoder, "run_at", lambda *a, **k: few_rows.append(1) or run_at(*a, **k))
    passes = Passes(policy, Sizes(1, 9, 2**22, False), Progress(), scored(groups, tries, credits), boundary)
    stems = [pack.stem.group for pack in passes.packs if pack.stem]
    assert len(stems) > 4 and len(set(stems)) == 2, "packs must share stems"
    with policy.base():
        ref = passes.logps()
    _, loss = passes.backward(Objective(beta=beta), LogProbs(None, ref))
    assert few_rows, "some packs must need few rows of the last layer"
    ours = loss, {n: p.grad.clone() for n, p in policy.parameters.items()}
    assert_same(ours, oracle_gradient(policy, groups, tries, credits, Objective(beta=beta)))


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "granite"])
def test_checkpointed_layers_share_stems_too_in_float32(family):
    groups, actual = groups_of(count=2), []
    tries, credits = credit_of(groups, "s-grpo")
    for checkpointed in (False, True):
        dtype = numerics.now().rerun
        policy = tiny.build_policy(family, layers=[2], dtype=dtype, checkpoint_layers=checkpointed)
        passes = Passes(
            policy, Sizes(1, 9, 2**22, checkpointed), Progress(), scored(groups, tries, credits), None
        )
        assert any(pack.stem for pack in passes.packs)
        actual.append((passes.backward(Objective())[1], {n: p.grad for n, p in policy.parameters.items()}))
    assert_same(actual[1], actual[0], bound=1e-12)


def recorded_by_hand(policy, groups):
    """The groups with cells, and the table that they index: every text through the trunk by itself."""
    rows, kept = [], []
    handle = policy.decoder.layers[policy.cut].register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    for group in groups:
        for completion in group.completions:
            oracles.forward_logits(policy, torch.tensor([*group.prompt_ids, *completion.ids]))
            rows.append(kept.pop()[0].detach())
    handle.remove()
    starts, made = np.cumsum([0, *map(len, rows)]), []
    for group in groups:
        number = sum(len(g.completions) for g in made)
        first = starts[number] + np.arange(len(group.prompt_ids))
        completions = [
            replace(c, cells=starts[number + i] + len(first) + np.arange(len(c)))
            for i, c in enumerate(group.completions)
        ]
        made.append(replace(group, completions=completions, prompt_cells=first))
    return made, torch.cat(rows)


@pytest.mark.parametrize("layers", [[3], [1, 3]])
def test_the_operations_of_an_update_are_those_that_torch_counts(layers, monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr("twig.engine.policy._FEW_ROWS", 2)  # the last layer runs on head rows only
    policy = tiny.build_policy(layers=layers, target_modules=["q_proj"])
    groups = groups_of(count=1)
    tries, credits = credit_of(groups)
    (pack,) = build_packs(scored(groups, tries, credits), 4096)
    boundary = torch.randn(100, 32, dtype=policy.model.dtype, device=policy.device)
    pack = replace(pack, cells=np.zeros_like(pack.ids))

    def counted(work):
        with FlopCounterMode(display=False) as counter:
            work()
        products = counter.get_flop_counts()["Global"]
        matrices = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return sum(products.get(kind, 0) for kind in matrices)

    cells, rows, upper = pack.ids.size, len(pack.rows), policy.num_layers - min(layers)  # padding is run too
    assert len(pack.ids) == 1 and rows < cells
    # A layer: q and o 32 x 32, k and v 32 x 16, three of 32 x 48; the head 23 x 32.
    keys, rest = 2 * 32 * 16, 2 * 32 * 32 + 3 * 32 * 48
    of_all, of_rows = (upper - 1) * (keys + rest) + keys, rest + 23 * 32
    assert policy.update_flops(cells, rows) == 4 * (cells * of_all + rows * of_rows)
    assert policy.update_flops(cells, rows, 2, 1) == 10 * (cells * of_all + rows * of_rows)
    # Not needed but run, as the attention module is called for keys and values, and again for the head rows:
    # queries of all tokens forwards, and the head rows' keys and values.
    extra = 2 * (cells * 32 * 32 + rows * keys)
    with policy.base():
        assert counted(lambda: policy.logps(pack, boundary)) == policy.update_flops(cells, rows, 0, 1) + extra
    # Not in it: A and B of an adapter (32 x 4 each), twice forwards and four times backwards, of which the
    # lowest layer's input needs none. In it but not run: the gradient of the input of its q, k and v.
    queries = {layer: rows if layer == 3 else cells for layer in layers}
    adapter = sum(2 * n * 32 * 4 * (5 if layer == min(layers) else 6) for layer, n in queries.items())
    adapter += 2 * cells * 2 * 32 * 4  # with the queries of all tokens
    inputs = 2 * (queries[min(layers)] * 32 * 32 + cells * keys)
    both = counted(lambda: policy.backward(pack, Objective(), boundary))
    assert both == policy.update_flops(cells, rows) + adapter - inputs + extra


@pytest.mark.parametrize("family, module", [("qwen2", "q_proj"), ("phi3", "qkv_proj"), ("olmo", "v_proj")])
def test_keys_and_values_of_one_matrix_with_the_queries_count_for_all_tokens(family, module):
    """phi3 has queries, keys and values in one matrix: 32 of its 64 outputs are needed of every token."""
    policy = tiny.build_policy(family, layers=[3], target_modules=[module])
    keys, rest = 2 * 32 * 16, 2 * 32 * 32 + 3 * 32 * 48
    assert policy.update_flops(1, 0, 0, 1) == 2 * keys
    assert policy.update_flops(0, 1, 0, 1) == 2 * (rest + 23 * 32)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "granite"])
def test_checkpointed_layers_give_the_same_gradient_and_only_they_run_again_in_float32(family):
    groups = groups_of(count=2)
    tries, credits = credit_of(groups)
    actual, runs = [], []
    for checkpointed in (False, True):
        dtype = numerics.now().rerun
        policy = tiny.build_policy(family, layers=[2], dtype=dtype, checkpoint_layers=checkpointed)
        count = [0] * policy.num_layers
        for i, layer in enumerate(policy.decoder.layers):
            layer.register_forward_pre_hook(lambda *_, i=i: count.__setitem__(i, count[i] + 1))  # noqa: B023
        saved = []

        def keep(tensor):
            saved.append(tensor.numel())  # noqa: B023
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            actual.append(engine_gradient(policy, groups, tries, credits, Objective()))
        runs.append((count, sum(saved)))
    assert_same(actual[1], actual[0], bound=1e-12)
    (plain, kept), (again, fewer) = runs
    assert plain[2] > 0 and again == [plain[0], plain[1], 2 * plain[2], plain[3]], "the last one is kept"
    assert fewer < kept, "what is saved at all, recomputed tensors included"


def test_a_checkpointed_layer_that_ran_again_is_gone_when_the_next_one_does_in_float32(monkeypatch):
    policy = tiny.build_policy("qwen2", layers="all", dtype=torch.float32, checkpoint_layers=True)
    groups = groups_of(count=1)
    pack = build_packs(scored(groups, *credit_of(groups)), 12)[0]
    again, alive = {}, []
    own, opened = PrefixKV.update, policy.open_stem(pack.stem, None, gradient=True)

    def update(cache, keys, values, layer, *rest, **options):
        seen.append(layer)
        if seen.count(layer) > 1:
            alive.extend(i for i, other in again.items() if other() is not None)
            again[layer] = weakref.ref(keys)
        return own(cache, keys, values, layer, *rest, **options)

    seen = []
    monkeypatch.setattr(PrefixKV, "update", update)
    policy.backward(pack, Objective(), opened=opened)
    assert len(again) > 1 and not alive


def test_float32_gradient_stays_within_1e5():
    groups = groups_of(5)
    tries, credits = credit_of(groups)
    exact = tiny.build_policy(layers="all", dtype=torch.float64)
    single = numerics.recast(exact, torch.float32)
    ours = engine_gradient(single, groups, tries, credits, Objective())
    theirs = oracle_gradient(exact, groups, tries, credits, Objective())
    assert_same((ours[0], {n: g.double() for n, g in ours[1].items()}), theirs, bound=1e-5)


def test_clipped_surrogate_with_old_logps_equals_the_per_node_loss():
    policy = tiny.build_policy()
    groups = groups_of(6)
    tries, credits = credit_of(groups)
    rng, exact = np.random.default_rng(0), numerics.exact(policy)
    # Ratios of 0.67, 1.08 and 1.57: below, inside and above the range, and none so near to its ends that
    # rounding would carry it over.
    moved = [0.4, -0.08, -0.45]
    old = [
        {
            int(n): float(
                oracles.completion_logps(exact, g.prompt_ids, oracles.prefix_of(t, int(n)))[-1].detach()
            )
            + rng.choice(moved)
            for n in np.flatnonzero(c.weighted)
        }
        for g, t, c in zip(groups, tries, credits, strict=True)
    ]
    surrogate = Objective(epsilon=0.1, epsilon_high=0.25)
    assert_same(
        engine_gradient(policy, groups, tries, credits, surrogate, old=old),
        oracle_gradient(policy, groups, tries, credits, surrogate, old=old),
    )


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "granite"])
def test_plain_engine_gives_the_same_gradient(family):
    policy = tiny.build_policy(family, "eager", engine="plain")
    groups, beta = groups_of(7), numerics.now().beta
    tries, credits = credit_of(groups, beta=beta)
    surrogate = Objective(beta=beta)
    assert_same(
        engine_gradient(policy, groups, tries, credits, surrogate, size=40),
        oracle_gradient(policy, groups, tries, credits, surrogate),
    )


@of_families
def test_sampling_equals_a_step_by_step_loop(family, attention):
    policy = tiny.build_policy(family, attention, temperature=1.3, suppress_tokens=[0, 4])
    requests = requests_of()
    end_ids = list(range(5, 9))  # several end tokens, so that rows end at many steps
    drawn = sample(policy, requests, SamplingParams(end_ids, texts_of, seed=3), step=2)
    lengths, exact = set(), numerics.exact(policy)
    for request, completions in zip(requests, drawn.completions, strict=True):
        assert len(completions) == request.num
        for c, completion in enumerate(completions):
            noise = uniforms(3, 2, request.slot, c, request.max_tokens)
            follow = numerics.follow(completion.ids, noise)
            ids, logps, entropies = oracles.sample_one(
                exact, request.prompt_ids, request.max_tokens, end_ids, noise, follow
            )
            assert completion.ids.tolist() == ids
            assert completion.finished == (ids[-1] in end_ids)
            assert completion.text == text_of(ids)
            assert_values(completion.logps, logps)
            assert_values(completion.entropies, entropies)
            assert not {0, 4} & set(ids)
            lengths.add(len(ids))
    assert len(lengths) > 3, "completions must end at different steps"


def test_sampling_does_not_depend_on_waves_prompt_order_branches_or_engine(monkeypatch):
    policy, requests, end_ids = tiny.build_policy(), requests_of(), [5, 6, 7]

    def draw(policy=policy, requests=requests, **kwargs):
        return sample(
            policy, requests, SamplingParams(end_ids, texts_of, seed=1, **kwargs), step=4
        ).completions

    def assert_whole(completions):
        assert_same_text(policy, requests, completions, whole, seed=1, step=4)

    whole = draw()
    assert len({tuple(c.ids) for group in whole for c in group}) > 10
    for wave in (1, 2, 4, 7):
        assert_whole(draw(wave_size=wave))
    assert_whole(draw(requests=requests[::-1])[::-1])
    for logits in (1, 2**30):  # tokens drawn branch by branch, and for all branches at once
        monkeypatch.setattr("twig.engine.sampler._LOGITS_AT_ONCE", logits)
        assert_whole(draw())
    monkeypatch.setattr("twig.engine.sampler.split", oracles.split_all)
    assert_whole(draw())
    assert_whole(draw(policy=tiny.build_policy(engine="plain")))


def test_requests_expected_to_be_long_are_sampled_first_and_waves_are_told_of():
    policy, requests = tiny.build_policy(), requests_of(num=2)
    whole = sample(policy, requests, SamplingParams([5, 6, 7], texts_of, seed=1)).completions
    requests = [replace(r, expected=e) for r, e in zip(requests, (3.0, 9.0, 3.0), strict=True)]
    for wave_size, target in ((2, [[1], [0], [2]]), (4, [[1, 0], [2]]), (6, [[0, 1, 2]])):
        waves = []
        drawn = sample(
            policy,
            requests,
            SamplingParams([5, 6, 7], texts_of, seed=1, wave_size=wave_size),
            on_wave=waves.append,
        )
        # of two that are expected to be as long, that with the longer prompt (4 tokens against 3) comes first
        assert [list(dict.fromkeys(each.request for each in wave)) for wave in waves] == target
        assert_same_text(policy, requests, drawn.completions, whole, seed=1)
        for each in (each for wave in waves for each in wave):
            assert drawn.completions[each.request][each.number] is each.completion


def test_greedy_sampling_takes_the_most_probable_token():
    policy, requests = tiny.build_policy("gemma3"), requests_of(num=1)
    drawn = sample(policy, requests, SamplingParams([5], texts_of, greedy=True, record=False))
    exact = numerics.exact(policy)
    for request, (completion,) in zip(requests, drawn.completions, strict=True):
        follow = numerics.follow(completion.ids)
        ids, _, _ = oracles.sample_one(exact, request.prompt_ids, request.max_tokens, [5], follow=follow)
        assert completion.ids.tolist() == ids


@pytest.mark.parametrize("wave_size", [pytest.param(128, marks=pytest.mark.slow), 4])
@of_families
def test_recorded_boundary_gives_the_gradient_of_a_fresh_trunk_and_the_sampled_logps(
    family, attention, wave_size
):
    policy = tiny.build_policy(family, attention, layers=[2, 3])
    drawn = sample(policy, requests_of(), SamplingParams([5, 6, 7], texts_of, seed=5, wave_size=wave_size))
    rng = np.random.default_rng(0)
    groups = [
        Group(tiny.make_group([1], [[1]], [0]).example, i, r.prompt_ids, c, rng.random(len(c)), 0, cells)
        for i, (r, c, cells) in enumerate(
            zip(requests_of(), drawn.completions, drawn.prompt_cells, strict=True)
        )
    ]
    tries, credits = credit_of(groups)
    recorded = engine_gradient(policy, groups, tries, credits, Objective(), 40, drawn.boundary)
    fresh = engine_gradient(policy, groups, tries, credits, Objective(), 40)
    assert_same(recorded, fresh)
    assert_same(fresh, oracle_gradient(policy, groups, tries, credits, Objective()))
    for pack in build_packs(scored(groups, tries, credits), 40):
        logps = policy.logps(pack, drawn.boundary)
        for g, n, logp in zip(pack.targets.group, pack.targets.node, logps.tolist(), strict=True):
            owner, depth = tries[g].owner[n], tries[g].depth[n]
            assert_values(logp, groups[g].completions[owner].logps[depth - 1])


def test_adapter_off_is_the_base_model_and_the_base_never_changes():
    policy = tiny.build_policy()
    before = {n: p.clone() for n, p in policy.model.named_parameters() if "lora" not in n}
    base = tiny.build_model()
    ids = torch.arange(3, 13, device=policy.device)
    with policy.base(), torch.no_grad():
        off = oracles.forward_logits(policy, ids)
    torch.testing.assert_close(off, base(input_ids=ids[None]).logits[0].to(off.dtype), rtol=0, atol=0)
    assert not torch.allclose(oracles.forward_logits(policy, ids), off)
    groups = groups_of(1)
    tries, credits = credit_of(groups)
    engine_gradient(policy, groups, tries, credits, Objective())
    torch.optim.AdamW(policy.parameters.values(), lr=0.1).step()
    for name, parameter in policy.model.named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, before[name]), name
            assert parameter.grad is None, name
