"""Layers that keep a state, on a tree, against the model's own forward over each completion by itself."""

import numerics
import numpy as np
import oracles
import pytest
import tiny
import torch
from family_cases import MODULES
from gradients import credit_of, engine_gradient, oracle_gradient, requests_of, scored, texts_of
from numerics import assert_same, assert_values
from peft.tuners.lora import LoraLayer

from twig.common.errors import UserError
from twig.core.algorithms.base import Objective
from twig.core.types import Example, Group
from twig.engine.decoder import Decoder
from twig.engine.lora import adapter_shape, attach
from twig.engine.mixers.mixer import StateCache, mixer_of
from twig.engine.mixers.runs import Runs
from twig.engine.pack import build_packs
from twig.engine.policy import Policy
from twig.engine.sampler import Request, SamplingParams, sample
from twig.engine.wave_cache import COMMON_FROM

CPU = torch.device("cpu")


def runs_of(ends, **options):
    """By level what is run: the cells of each part, with how many of them give outputs."""
    ends = np.array(ends)
    runs = Runs.of(ends, np.full(len(ends), ends.shape[1]), CPU, **options)
    return [
        [(batch.cells.tolist(), sorted(batch.places.tolist()), batch.saves) for batch in level]
        for level in runs.levels
    ]


def test_parts_of_a_tree_by_hand():
    # 0 1 2 | 3 4 and 5 below it: two leaves of one level start from the state behind token 2
    assert runs_of([[6, 6, 6, 5, 5, 6]]) == [
        [([[0, 1, 2]], [0, 1, 2], True)],
        [([[5, 5]], [5], False), ([[3, 4]], [3, 4], False)],
    ]


def test_a_single_token_behind_a_state_is_run_again_by_each_of_its_children():
    # behind a stem: token 0 forks at once, into 1 2 and 3 4
    assert runs_of([[5, 3, 3, 5, 5]], begun=True) == [[([[0, 1, 2], [0, 3, 4]], [0, 1, 2, 3, 4], False)]]


def test_every_cell_gives_its_output_once():
    rng = np.random.default_rng(0)
    for begun in (False, True):
        group = tiny.random_group(rng, prompt_length=4)
        tries, credits = credit_of([group])
        for pack in build_packs(scored([group], tries, credits), 4096):
            runs = Runs.of(pack.ends, pack.used, CPU, begun=begun)
            places = torch.cat([batch.places for level in runs.levels for batch in level])
            assert sorted(places.tolist()) == list(range(pack.num_tokens))
            for batch in (batch for level in runs.levels for batch in level):
                assert batch.cells.shape[1] > 1 or batch.starts is None and not begun


def forked_group(size, seed=0):
    """A prompt of 5 tokens; behind it parts of `size` tokens, with forks behind the prompt and behind two."""
    rng = np.random.default_rng(seed)
    first, second, third, other = (rng.integers(3, 20, size) for _ in range(4))
    tails = [np.array([20, 5]), np.array([21]), np.array([22, 6, 7])]
    paths = [
        np.concatenate([first, second, tails[0]]),
        np.concatenate([first, second, tails[1]]),
        np.concatenate([first, np.array([22]), third]),
        np.concatenate([np.array([21]), other]),
        np.concatenate([np.array([21]), other, tails[2]]),
    ]
    return tiny.make_group(rng.integers(3, 20, 5), paths, [1.0, 0.0, 0.5, 0.0, 1.0])


SIZES = [1, 2, 3, 63, 64, 65]  # convolutions see 3 or 4 tokens, chunks have 8 or 64
QUICK = {("lfm2", 1), ("lfm2", 2), ("qwen3_5", 1), ("qwen3_5", 3), ("qwen3_5", 64), ("bamba", 65)}


@pytest.mark.parametrize("layers", [[3], "all"])
@pytest.mark.parametrize(
    ("family", "size"),
    [
        pytest.param(family, size, marks=() if (family, size) in QUICK else pytest.mark.slow)
        for family in tiny.HYBRIDS
        for size in SIZES
    ],
)
def test_parts_of_any_length_give_the_gradient_of_whole_texts(family, size, layers):
    with numerics.casts():
        policy = tiny.build_policy(family, layers=layers, temperature=0.8)
        groups = [forked_group(size)]
        tries, credits = credit_of(groups)
        exact = numerics.exact(policy)
        own, logps = oracles.path_loss(exact, groups, tries, credits)
        own.backward()
        theirs = float(own.detach()), {n: p.grad.clone() for n, p in exact.parameters.items()}
        for pack_size in (4096, 3 * size + 20, 1):
            ours = engine_gradient(policy, groups, tries, credits, Objective(), size=pack_size)
            assert_same(ours, theirs)
            for pack in build_packs(scored(groups, tries, credits), pack_size):
                values = policy.logps(pack).tolist()
                for node, value in zip(pack.targets.node, values, strict=True):
                    assert_values(value, float(logps[0][node]))


def groups_of_drawn(requests, drawn):
    """The groups of what was sampled, with rewards that rise."""
    parts = zip(requests, drawn.completions, drawn.prompt_cells, strict=True)
    return [
        Group(Example("", {}), i, r.prompt_ids, each, np.arange(float(r.num)), prompt_cells=cells)
        for i, (r, each, cells) in enumerate(parts)
    ]


RECORDED = [(family, [2, 3]) for family in tiny.HYBRIDS]
RECORDED += [(family, layers) for family in tiny.SHARING for layers in ([2, 3], [1, 3], [3])]


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        pytest.param(*case, marks=() if case[0] in ("qwen3_5", *tiny.SHARING) else pytest.mark.slow)
        for case in RECORDED
    ],
)
def test_an_update_from_what_sampling_recorded_is_that_of_whole_texts(family, layers):
    """With an opened stem, the KL term, and log-probs of the policy that sampled."""
    with numerics.casts():
        modules = MODULES.get(family, ["q_proj", "v_proj"])
        policy = tiny.build_policy(family, layers=layers, target_modules=modules)
        requests = requests_of(num=4, limits=(9, 7, 3))[:2]
        drawn = sample(policy, requests, SamplingParams([5, 6], texts_of, seed=3), step=2)
        groups = groups_of_drawn(requests, drawn)
        for group in groups:
            for completion in group.completions:
                own = oracles.completion_logps(policy, group.prompt_ids, completion.ids)
                assert_values(completion.logps, own.tolist())
        tries, credits = credit_of(groups, beta=0.1)
        exact = numerics.exact(policy)
        theirs = oracle_gradient(exact, groups, tries, credits, Objective(beta=0.1))
        for size in (4096, 12):
            ours = engine_gradient(
                policy, groups, tries, credits, Objective(beta=0.1), size=size, boundary=drawn.boundary
            )
            assert_same(ours, theirs)


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5"])
def test_a_stem_that_is_opened_once_gets_the_gradients_of_all_its_packs(family):
    with numerics.casts():
        policy = tiny.build_policy(family, layers="all")
        groups = [forked_group(3)]
        tries, credits = credit_of(groups)
        theirs = engine_gradient(policy, groups, tries, credits, Objective())[1]
        for parameter in policy.parameters.values():
            parameter.grad = None
        packs = build_packs(scored(groups, tries, credits), 12)
        assert len(packs) > 1 and packs[0].stem is not None
        opened = policy.open_stem(packs[0].stem, None, gradient=True)
        for pack in packs:
            policy.backward(pack, Objective(), opened=opened)
        policy.close_stem(opened, None)
        for name, parameter in policy.parameters.items():
            assert_values(parameter.grad.flatten().tolist(), theirs[name].flatten().tolist())


def test_the_gradient_of_a_convolutions_state_does_not_keep_that_of_all_its_inputs():
    before, new = (torch.zeros(1, 8, size, requires_grad=True) for size in (3, 50))
    cache = StateCache({("conv", 0): before})
    (gradient,) = torch.autograd.grad(cache.update_conv_state(new, 0).sum(), before)
    assert gradient.untyped_storage().nbytes() == before.untyped_storage().nbytes()


def test_by_default_a_layer_with_a_state_is_adapted_where_its_mixer_reads():
    model = attach(
        tiny.build_model("lfm2"), r=2, alpha=4.0, target_modules=["q_proj", "v_proj"], layers="all"
    )
    assert adapter_shape(model)["target_modules"] == ["in_proj", "q_proj", "v_proj"]
    with pytest.raises(UserError, match=r"^lora.target_modules: layer 0 has no linear module 'q_proj'"):
        attach(tiny.build_model("lfm2"), r=2, alpha=4.0, target_modules=["q_proj"], layers="all")


def test_a_layer_that_hands_over_no_gradient_with_its_state_is_refused(monkeypatch):
    own = StateCache.update_conv_state

    def forgetful(self, new, *args, **options):
        result = own(self, new, *args, **options)
        self.after["conv", 0] = self.after["conv", 0].detach()
        return result

    monkeypatch.setattr(StateCache, "update_conv_state", forgetful)
    with pytest.raises(UserError, match="'lfm2' cannot be served: its gradients differ by .* of their size"):
        tiny.build_policy("lfm2", layers="all")


def test_a_layer_that_starts_from_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(StateCache, "get_recurrent_state", lambda *args, **options: None)
    with pytest.raises(UserError, match="'qwen3_5_text' cannot be served: .* its logits differ by"):
        tiny.build_policy("qwen3_5")


def test_a_mixer_is_what_keeps_a_state_in_the_cache():
    assert all(mixer_of(layer) is None for layer in tiny.build_model("qwen2").model.layers)
    kinds = [mixer_of(layer) for layer in tiny.build_model("lfm2").model.layers]
    assert [mixer is not None for mixer in kinds] == [True, False, True, False]
    assert all(mixer_of(layer).attends for layer in tiny.build_model("falcon_h1").model.layers)


def test_states_move_with_their_branches():
    """Greedy or not, each completion's log-probs are those of its own text, whatever ended beside it."""
    policy = tiny.build_policy("qwen3_5", target_modules=["q_proj"], layers=[3])
    assert isinstance(policy, Policy) and policy.sharing_refusal is None
    with numerics.casts():
        drawn = sample(policy, requests_of(num=6), SamplingParams([5, 6, 7, 8], texts_of, seed=1))
        for request, completions in zip(requests_of(), drawn.completions, strict=True):
            for completion in completions:
                own = oracles.completion_logps(policy, request.prompt_ids, completion.ids)
                assert_values(completion.logps, own.tolist())


@pytest.mark.parametrize("family", tiny.SHARING)
@pytest.mark.parametrize("layers", [[3], [1, 3], "all"])
def test_layers_get_the_keys_of_the_layer_that_they_share_with(family, layers):
    """One below the lowest adapter, or an adapted one; behind a stem too."""
    policy = tiny.build_policy(family, layers=layers, target_modules=["q_proj"])
    groups = [forked_group(3)]
    tries, credits = credit_of(groups)
    with numerics.casts():
        theirs = oracle_gradient(policy, groups, tries, credits, Objective())
        for size in (4096, 12):
            ours = engine_gradient(policy, groups, tries, credits, Objective(), size=size)
            assert_same(ours, theirs)
    kept = engine_gradient(policy, groups, tries, credits, Objective(), size=12)
    policy.checkpoint_layers = True
    assert_same(engine_gradient(policy, groups, tries, credits, Objective(), size=12), kept)


@pytest.mark.parametrize("copied", [False, True])
def test_recorded_keys_are_those_of_prompts_that_share_a_beginning(copied, monkeypatch):
    """Two prompts that begin alike, run apart or once, in several waves; updates run no trunk."""
    model = attach(
        tiny.build_model("gemma4", sliding_window=64), r=2, alpha=4.0, target_modules=["q_proj"], layers=[2]
    )
    policy = Policy(tiny.with_random_b(model), decode="plain")
    assert sorted(policy.trunk.taken) == [0, 1] and policy.sharing_refusal is None
    policy.sharing_refusal = "asked for" if copied else None
    rng = np.random.default_rng(0)
    common, rests = rng.integers(3, tiny.VOCAB, 2 * COMMON_FROM), (rng.integers(3, 9, n) for n in (1, 4))
    requests = [Request(np.concatenate([common, rest]), 3, 8, i) for i, rest in enumerate(rests)]
    with numerics.casts():
        drawn = sample(policy, requests, SamplingParams([5], texts_of, seed=3, wave_size=4))
        groups = groups_of_drawn(requests, drawn)
        tries, credits = credit_of(groups)
        theirs = oracle_gradient(policy, groups, tries, credits, Objective())
        monkeypatch.setattr(policy.decoder.layers[0], "forward", None)
        for size in (4096, 12):
            ours = engine_gradient(
                policy, groups, tries, credits, Objective(), size=size, boundary=drawn.boundary
            )
            assert_same(ours, theirs)


def test_layers_that_share_other_keys_than_they_are_taken_to_share_are_refused(monkeypatch):
    monkeypatch.setattr(Decoder, "_given", lambda self: {"sliding_attention": 1, "full_attention": 0})
    with pytest.raises(UserError, match="'gemma4_text' cannot be served: its layers share keys and values,"):
        tiny.build_policy("gemma4", layers=[2, 3], target_modules=["q_proj"])


def test_by_default_a_layer_without_its_own_keys_is_adapted_where_it_asks():
    model = attach(tiny.build_model("gemma4"), r=2, alpha=4.0, layers="all")
    layers = model.get_base_model().get_decoder().layers
    assert isinstance(layers[1].self_attn.v_proj, LoraLayer) and isinstance(
        layers[3].self_attn.q_proj, LoraLayer
    )


def continued_logps(policy, prompt, completion):
    """Log-probs of a completion's tokens by the model's own forward, token by token with its own cache."""
    logps, past, ids = [], None, torch.as_tensor(prompt)[None]
    for token in completion.tolist():
        done = policy.model(input_ids=ids, past_key_values=past, use_cache=True)
        logps.append(torch.log_softmax(policy.sampled_logits(done.logits[:, -1]), -1)[0, token])
        past, ids = done.past_key_values, torch.tensor([[token]])
    return torch.stack(logps)


@pytest.mark.parametrize(
    "family", ["lfm2", "qwen3_5", "gemma4", pytest.param("falcon_h1", marks=pytest.mark.slow)]
)
def test_in_bfloat16_log_probs_are_as_near_to_whole_texts_as_the_models_own_continued_ones(family):
    """In updates they are at most three times as far on average: of few tokens the distance is large, as a
    step of rounding may grow from layer to layer. Against the same weights in float32 they are as near."""
    modules = MODULES.get(family, ["q_proj", "v_proj"])
    policy = tiny.build_policy(family, dtype=torch.bfloat16, layers="all", target_modules=modules)
    exact = numerics.recast(policy, torch.float32)
    requests = requests_of(num=4, limits=(16, 16, 16))
    drawn = sample(policy, requests, SamplingParams([5], texts_of, seed=3))
    groups = groups_of_drawn(requests, drawn)
    tries, credits = credit_of(groups, beta=0.1)  # so that every token has a weight
    texts = [(group.prompt_ids, c) for group in groups for c in group.completions]
    with torch.no_grad():
        whole, continued, near = (
            torch.cat([logps_of(each, prompt, c.ids) for prompt, c in texts]).numpy()
            for logps_of, each in (
                (oracles.completion_logps, policy),
                (continued_logps, policy),
                (oracles.completion_logps, exact),
            )
        )
    own, error = np.mean(abs(whole - continued)), np.linalg.norm(whole - near)
    assert 0 < own < 0.1
    assert np.linalg.norm(np.concatenate([c.logps for _, c in texts]) - near) <= 1.5 * error
    for size in (4096, 40, 12):
        updated: list[dict] = [{} for _ in groups]
        for pack in build_packs(scored(groups, tries, credits), size):
            values = zip(pack.targets.group, pack.targets.node, policy.logps(pack).tolist(), strict=True)
            for g, node, value in values:
                updated[g][int(node)] = value
        logps = [
            updated[g][node]
            for g, (trie, group) in enumerate(zip(tries, groups, strict=True))
            for row in range(len(group.completions))
            for node in trie.paths[row].tolist()
        ]
        assert np.mean(abs(np.array(logps) - whole)) <= 3 * own
        assert np.linalg.norm(np.array(logps) - near) <= 1.5 * error
