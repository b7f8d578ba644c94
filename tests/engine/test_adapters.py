"""Adapters from elsewhere: each is trained as PEFT computes it, or refused on one line.

The oracle is PEFT's own forward on the same text.
"""

import json
import shutil
import warnings

import numerics
import oracles
import pytest
import tiny
import torch
from gradients import credit_of, engine_gradient, groups_of, texts_of
from hypothesis import example, given
from hypothesis import strategies as st
from numerics import assert_same
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from twig.common.errors import UserError
from twig.config.load import Settings
from twig.config.schema import Model
from twig.core.algorithms.base import Objective
from twig.engine.lora import attach, load_adapter, saved_dropout
from twig.engine.model_files import source_of
from twig.engine.plain_policy import PlainPolicy
from twig.engine.policy import Policy
from twig.engine.sampler import Request, SamplingParams, sample
from twig.planner.model_shape import Shape, read_config
from twig.planner.plan import workload_of

ENGINES = {"trie": Policy, "plain": PlainPolicy}


def save_adapter(folder, model=None, embeddings=False, **options):
    """Writes a random adapter as PEFT does."""
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]} | options
    config = LoraConfig(task_type="CAUSAL_LM", **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        peft_model = get_peft_model(model or tiny.build_model(), config)
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name and parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    peft_model.save_pretrained(folder, save_embedding_layers=embeddings)
    return folder


def edit(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def policy_of(engine, adapter, model=None):
    model = attach(model or tiny.build_model(), r=1, alpha=1.0, target_modules=["q_proj"], adapter=adapter)
    return ENGINES[engine](model, temperature=0.8)


def assert_gradient_of_peft(policy):
    groups = groups_of(count=2)
    tries, credits = credit_of(groups)
    exact = numerics.exact(policy)
    loss, _ = oracles.path_loss(exact, groups, tries, credits)
    loss.backward()
    theirs = float(loss.detach()), {n: p.grad for n, p in exact.parameters.items() if p.grad is not None}
    assert_same(engine_gradient(policy, groups, tries, credits, Objective()), theirs)
    return theirs[1]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "layers_to_transform": [1, 3]},
        {"use_dora": True, "layers_to_transform": [2, 3]},
        {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 7}},
        {"target_modules": r".*layers\.(0|3)\.mlp\.(up|down)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["gate_proj"]},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_form_of_lora_is_trained_as_peft_computes_it(engine, options, tmp_path):
    with numerics.casts():
        gradients = assert_gradient_of_peft(policy_of(engine, save_adapter(tmp_path, **options)))
    assert all(bool(gradient.any()) for gradient in gradients.values())


FORMS = {
    "all-linear": ({"target_modules": "all-linear", "layers": "all"}, {"target_modules": "all-linear"}),
    "all-linear of some layers": (
        {"target_modules": "all-linear", "exclude_modules": ["gate_proj"], "layers": [1, 3]},
        {"target_modules": "all-linear", "exclude_modules": r".*(gate_proj|layers\.(0|2)\..*)"},
    ),
    "expression": (
        {"target_modules": r".*layers\.(0|3)\.mlp\.(up|down)_proj", "layers": "all"},
        {"target_modules": r".*layers\.(0|3)\.mlp\.(up|down)_proj"},
    ),
    "expression within layers": (
        {"target_modules": r".*\.[qk]_proj", "layers": [2]},
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [2]},
    ),
    "layers by pattern": (
        {"target_modules": ["mlp.up_proj"], "layers": [0, 1], "layers_pattern": "layers"},
        {"target_modules": ["up_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    ),
    "rslora and patterns": (
        {"use_rslora": True, "rank_pattern": {"v_proj": 3, "q_proj": 1}, "alpha_pattern": {"q_proj": 7.0}},
        {"use_rslora": True, "rank_pattern": {"v_proj": 3, "q_proj": 1}, "alpha_pattern": {"q_proj": 7.0}},
    ),
    "dora": (
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "rank_pattern": {"3.mlp.down_proj": 5}},
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "rank_pattern": {"3.mlp.down_proj": 5}},
    ),
}


@pytest.mark.parametrize(("ours", "theirs"), FORMS.values(), ids=FORMS)
def test_a_new_adapter_of_every_form_is_the_one_that_peft_builds(ours, theirs):
    """The same tensors from the same seed, as many as the planner counts, and PEFT's own gradient."""
    ours = {"r": 2, "alpha": 4.0, "layers": "last_third"} | ours
    config = {"lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]} | theirs
    if isinstance(config["target_modules"], list):
        config = {"layers_to_transform": [2, 3]} | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        built = get_peft_model(tiny.build_model(), LoraConfig(task_type="CAUSAL_LM", r=2, **config))
    attached = attach(tiny.build_model(), seed=5, **ours)
    expected = {name: p for name, p in built.named_parameters() if p.requires_grad}
    trained = {name: p for name, p in attached.named_parameters() if p.requires_grad}
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[name], p) for name, p in expected.items())
    mine, other = (
        {name: module.scaling for name, module in each.named_modules() if isinstance(module, LoraLayer)}
        for each in (attached, built)
    )
    assert mine == other
    shape = Shape.from_config(attached.get_base_model().config.to_dict())
    settings = {"model": {"name": "x"}, "task": {"name": "multiplication"}, "lora": ours}
    work = workload_of(shape, Settings.from_dict(settings), "cpu", 4)
    assert work.adapter_numbers == sum(p.numel() for p in expected.values())
    for name, parameter in attached.named_parameters():
        if "lora_" in name and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    with numerics.casts():
        gradients = assert_gradient_of_peft(Policy(attached, temperature=0.8))
    assert gradients.keys() == trained.keys() and all(bool(g.any()) for g in gradients.values())


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"target_modules": "q_proj"}, r"the expression 'q_proj' matches no linear module. Write \[q_proj\]"),
        ({"target_modules": "all_linear"}, "matches no linear module. It has to match a whole name"),
        ({"target_modules": r".*layers\.0\..*"}, "layer 0, which is not in lora.layers. Set lora.layers=all"),
        ({"target_modules": ["mlp.q_proj"]}, "layer 2 has no linear module 'mlp.q_proj'"),
        ({"exclude_modules": ["q_proj", "v_proj"]}, "lora.exclude_modules: no linear module"),
        ({"rank_pattern": {"up_proj": 4}}, "lora.rank_pattern: 'up_proj' matches no adapted module"),
        ({"alpha_pattern": {"proj": 4.0}}, "lora.alpha_pattern: 'proj' matches no adapted module"),
        ({"layers_pattern": "h"}, "lora.layers_pattern: the model has no module list 'h'. Set layers"),
    ],
)
def test_what_selects_nothing_is_one_line(shape, says):
    with pytest.raises(UserError, match=says):
        attach(tiny.build_model(), **shape)


def test_an_adapter_in_place_of_a_model_is_told_apart(tmp_path):
    folder = save_adapter(tmp_path)
    for read in (read_config, lambda name: source_of(Model(name=name))):
        with pytest.raises(UserError, match=f"It is an adapter: set model.adapter={folder}"):
            read(str(folder))


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_what_is_no_expression_is_one_line(key):
    settings = {"model": {"name": "x"}, "task": {"name": "multiplication"}, "lora": {key: "(q_proj"}}
    with pytest.raises(UserError, match=rf"lora.{key}: '\(q_proj' is no regular expression"):
        Settings.from_dict(settings)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (["embed_tokens", "q_proj"], "model.embed_tokens"),
        (["embed_tokens"], "model.embed_tokens"),
        (["lm_head"], "lm_head"),
    ],
)
def test_an_adapter_outside_the_layers_needs_the_plain_engine_which_trains_all_of_it(target, name, tmp_path):
    """The trie engine would put it into the optimizer and never move it."""
    folder = save_adapter(tmp_path, target_modules=target)
    with pytest.raises(UserError, match=rf"^model.engine=trie: .*{name} .*model.engine=plain"):
        policy_of("trie", folder)
    with numerics.casts():
        policy = policy_of("plain", folder)
        gradients = assert_gradient_of_peft(policy)
        assert all(bool(gradient.any()) for gradient in gradients.values())
        request = Request(torch.arange(3, 9).numpy(), 3, 8, 0)
        (completions,) = sample(policy, [request], SamplingParams([1], texts_of, seed=1)).completions
        for completion in completions:
            own = oracles.completion_logps(policy, request.prompt_ids, completion.ids)
            numerics.assert_values(completion.logps, own.tolist())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_trained_tensor_without_a_gradient_is_refused_by_name(engine, monkeypatch):
    """Whatever keeps it from the logits: here a layer runs without gradient."""
    model = attach(tiny.build_model(), r=2, alpha=4.0, target_modules=["q_proj"], layers=[1, 3])
    layer = model.get_submodule("base_model.model.model.layers.3.self_attn.q_proj")
    own = layer.forward
    monkeypatch.setattr(layer, "forward", torch.no_grad()(own))
    with pytest.raises(UserError, match=r"^model.adapter: model.layers.3.self_attn.q_proj gets no gradient"):
        ENGINES[engine](model)


DEEP = '{"peft_type": ' + '{"a": ' * 20_000 + "1" + "}" * 20_001


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save in"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices in"),
        ({"bias": "all"}, "bias='all' in"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication in"),
        ({"loftq_config": {"loftq_bits": 4}, "init_lora_weights": "loftq"}, "loftq_config in"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config in"),
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters in"),
        ({"alora_invocation_tokens": [4, 5]}, "alora_invocation_tokens in"),
        ({"lora_bias": True}, "lora_bias in"),
        ({"a_field_of_a_later_version": 3}, "a_field_of_a_later_version in"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' in .* changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' in .* changes the base"),
        ({"peft_type": "IA3"}, "holds no LoRA adapter .*IA3"),
        ({"r": "four"}, "does not fit|holds no LoRA adapter"),
        ({"r": 3}, "does not fit"),
        ({"r": 0}, "does not fit|holds no LoRA adapter"),
        ({"r": [1]}, "does not fit|holds no LoRA adapter"),
        ({"lora_alpha": {}}, "does not fit|holds no LoRA adapter"),
        ({"target_modules": ["nothing"]}, "does not fit"),
        ({"target_modules": "("}, "does not fit|holds no LoRA adapter"),
        ({"target_modules": ["q_proj"]}, "does not fit the model .*v_proj"),
        ({"layers_to_transform": [0]}, "does not fit"),
        ({"rank_pattern": 3}, "does not fit|holds no LoRA adapter"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_an_adapter_that_is_more_or_other_than_lora_is_one_line(values, says, tmp_path):
    edit(save_adapter(tmp_path), **values)
    with pytest.raises(UserError, match=f"^model.adapter: .*({says})") as caught:
        load_adapter(tiny.build_model(), tmp_path, trainable=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [DEEP, "[]", "{", "", "null", '"LORA"', '{"peft_type": null}', "\udce4"])
def test_a_config_that_is_none_is_one_line(text, tmp_path):
    save_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="^model.adapter: .* holds no LoRA adapter"):
        load_adapter(tiny.build_model(), tmp_path)


def test_an_adapter_that_carries_other_weights_of_the_base_is_refused_and_equal_ones_change_nothing(tmp_path):
    model = tiny.build_model(dtype=torch.float32)
    target = {"target_modules": ["embed_tokens", "q_proj"]}
    same = save_adapter(tmp_path / "same", tiny.build_model(dtype=torch.float32), embeddings=True, **target)
    assert any("embed_tokens.base_layer" in key for key in load_file(same / "adapter_model.safetensors"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loaded = load_adapter(model, same)
    with loaded.disable_adapter():
        own = tiny.build_model(dtype=torch.float32)
        ids = torch.arange(3, 12)[None]
        assert torch.equal(loaded(input_ids=ids).logits, own(input_ids=ids).logits)
    assert len(before) < len(loaded.state_dict())

    other = tmp_path / "other"
    shutil.copytree(same, other)
    weights = load_file(other / "adapter_model.safetensors")
    (key,) = [key for key in weights if "embed_tokens.base_layer" in key]
    weights[key][5] += 1e-3
    save_file(weights, other / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="^model.adapter: .*also holds other weights .*embed_tok"):
        load_adapter(tiny.build_model(dtype=torch.float32), other)


def test_weights_that_the_model_has_no_place_for_are_refused(tmp_path):
    save_adapter(tmp_path, tiny.build_model(num_hidden_layers=6))
    with pytest.raises(UserError, match=r"^model.adapter: .*does not fit the model .*layers\.4"):
        load_adapter(tiny.build_model(), tmp_path)


def test_dropout_of_a_saved_adapter_is_off_and_told(tmp_path):
    """PEFT's own forward in eval mode is what is sampled and trained."""
    assert saved_dropout(save_adapter(tmp_path, lora_dropout=0.25)) == 0.25
    with numerics.casts():
        policy = policy_of("trie", tmp_path)
        assert policy.peft_model.peft_config["default"].lora_dropout == 0
        policy.peft_model.train()
        ids = torch.arange(3, 12)[None]
        assert torch.equal(policy.model(input_ids=ids).logits, policy.model(input_ids=ids).logits)
        policy.peft_model.eval()
        assert_gradient_of_peft(policy)


_JUNK = st.one_of(st.none(), st.booleans(), st.integers(-3, 9), st.floats(-2, 2), st.text(max_size=4))
_JUNK = st.one_of(_JUNK, st.lists(_JUNK, max_size=3), st.dictionaries(st.text(max_size=4), _JUNK, max_size=2))


@example(values={"lora_dropout": None})
@given(
    values=st.dictionaries(
        st.sampled_from([*LoraConfig().to_dict(), "later_field"]), _JUNK, min_size=1, max_size=3
    )
)
def test_whatever_stands_in_an_adapters_config_it_loads_as_peft_does_or_is_one_line(values, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    edit(save_adapter(folder, layers_to_transform=[3]), **values)
    try:
        loaded = load_adapter(tiny.build_model(num_hidden_layers=4), folder)
    except UserError as error:
        assert error.key == "model.adapter" and "\n" not in str(error)
        return
    ids = torch.arange(3, 12)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fields without effect
        theirs = PeftModel.from_pretrained(tiny.build_model(num_hidden_layers=4), folder).eval()
    assert torch.equal(loaded.eval()(input_ids=ids).logits, theirs(input_ids=ids).logits)
