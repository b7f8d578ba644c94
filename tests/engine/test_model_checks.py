"""What is checked of a model before it trains: windows, ids, weights, memory, devices, positions."""

import json
from typing import Any

import numerics
import odd_models
import oracles
import pytest
import tiny
import torch
import transformers
from family_cases import Family
from gradients import texts_of
from hypothesis import given, settings
from numerics import assert_values
from saved import build_tokenizer, save_model

from twig.common.errors import UserError
from twig.config.schema import Model
from twig.core.types import Example
from twig.engine import load
from twig.engine.decoder import Decoder, logit_tolerance
from twig.engine.load import end_ids, load_model, pick_device, suppressed_ids
from twig.engine.lora import attach
from twig.engine.plain_policy import PlainPolicy
from twig.engine.policy import Policy
from twig.engine.sampler import Request, SamplingParams, sample
from twig.evaluation.prepare import _refuse_ids_without_row
from twig.tasks.base import Task

DOGE = Family("DogeConfig", "", ("q_proj", "v_proj"))
LONG = Request(torch.arange(3, 15).numpy(), 4, 20, 0)


def sampled_and_own(policy, request=LONG, ends=(1,)):
    """Log-probs as recorded while sampling, and those of the model's own forward over the whole text."""
    params = SamplingParams(list(ends), texts_of, seed=1)
    (completions,) = sample(policy, [request], params).completions
    exact = numerics.exact(policy)
    return [
        (c.logps, oracles.completion_logps(exact, request.prompt_ids, c.ids).tolist()) for c in completions
    ]


# Windows


@pytest.mark.parametrize(
    ("family", "undeclared"),
    [
        ("llama", {"sliding_window": 5}),
        ("llama", {"layer_types": ["linear_attention"] * 4, "num_kv_shared_layers": 2}),
        ("qwen2", {"final_logit_softcapping": 2.0, "embedding_multiplier": 3.0, "logit_scale": 0.1}),
        ("granite", {"final_logit_softcapping": 2.0, "logit_scale": 0.1}),
    ],
)
def test_a_key_that_the_configs_class_does_not_declare_means_nothing(family, undeclared):
    with numerics.casts():
        model = tiny.build_model(family, **undeclared)
        for name, value in undeclared.items():
            assert getattr(model.config, name) == value, "transformers keeps it"
        policy = Policy(tiny.with_random_b(attach(model, r=4, alpha=8.0, target_modules=["q_proj"])))
        for recorded, own in sampled_and_own(policy):
            assert_values(recorded, own)


@pytest.mark.parametrize("window", [5, 11, 4096])
def test_a_model_that_narrows_its_attention_in_a_way_of_its_own_is_refused(window):
    """Doge attends to the best keep_window_size keys; a short text is not longer than that."""
    behind = "it predicts a token from those behind it" if window < 24 else "beyond its keep_window_size it"
    with pytest.raises(UserError, match=f"'doge' cannot be served: {behind}"):
        Decoder(DOGE.build(keep_window_size=window)).check()


@pytest.mark.parametrize("family", ["mistral", "qwen2-window", "gemma3", "phi3-window"])
@pytest.mark.parametrize("window", [12, 4096])
def test_a_window_beyond_the_checks_text_is_checked_too(family, window, monkeypatch):
    model = tiny.build_model(family, sliding_window=window, max_position_embeddings=8192)
    before = model.config.to_dict()
    Decoder(model).check()
    assert model.config.to_dict() == before and len(model.model.layers) == 4
    own = Decoder._windows
    monkeypatch.setattr(Decoder, "_windows", lambda self: [w and w + 1 for w in own(self)])  # one too wide
    with pytest.raises(UserError, match="cannot be served: beyond its sliding_window"):
        Decoder(model).check()
    assert model.config.to_dict() == before and len(model.model.layers) == 4


@settings(max_examples=4)
@given(**odd_models.MODELS)
def test_whatever_stands_in_a_models_config_and_adapter_they_are_exact_or_refused(**model):
    odd_models.check(**model)


@pytest.mark.slow
@settings(max_examples=60)
@given(**odd_models.MODELS)
def test_whatever_stands_in_many_configs_and_adapters_they_are_exact_or_refused(**model):
    odd_models.check(**model)


# Positions


def test_the_plain_engine_samples_a_model_that_counts_positions_anew_at_every_call():
    """Bamba takes positions from its inputs alone: without them each token of the cache's is at 0."""
    bamba = Family(
        "BambaConfig",
        "",
        ("q_proj", "v_proj"),
        {
            "attn_layer_indices": [1, 3],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    )
    model = attach(bamba.build(torch.float32), r=2, alpha=4.0, target_modules=["q_proj"], layers=[3])
    policy = PlainPolicy(tiny.with_random_b(model))
    assert policy.reading.cache and policy.reading.positions
    for recorded, own in sampled_and_own(policy):
        assert recorded == pytest.approx(own, abs=1e-3)


def test_a_cache_that_gives_other_values_is_not_used(monkeypatch):
    model = attach(tiny.build_model(), r=2, alpha=4.0, target_modules=["q_proj"])
    own = model.get_base_model().forward

    def forgetful(input_ids, past_key_values=None, **options):
        return own(input_ids=input_ids, past_key_values=None, **options)

    monkeypatch.setattr(model.get_base_model(), "forward", forgetful)
    policy = PlainPolicy(tiny.with_random_b(model))
    assert not policy.reading.cache
    for recorded, logps in sampled_and_own(policy):
        assert_values(recorded, logps)


def test_a_model_that_sees_what_comes_after_is_refused():
    bert = Family("BertConfig", "", ("query", "value")).build(is_decoder=True)
    PlainPolicy(attach(bert, r=2, alpha=4.0, target_modules=["query"]))
    bert = Family("BertConfig", "", ("query", "value")).build(is_decoder=False)
    with pytest.raises(UserError, match="^model.name: model type 'bert' predicts a token from those behind"):
        PlainPolicy(attach(bert, r=2, alpha=4.0, target_modules=["query"]))


# Ids


def as_any(value: Any) -> Any:
    """The value, whose attributes type checkers do not know."""
    return value


@pytest.mark.parametrize("own, end", [([1, 23], 1), (1, 23), (-1, 1)])
def test_an_end_token_beyond_the_model_is_refused(own, end):
    model, tokenizer = tiny.build_model(), as_any(build_tokenizer())
    model.generation_config.eos_token_id = own
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    with pytest.raises(UserError, match="^model.name: the end token (23|-1) is beyond the 23 tokens"):
        end_ids(model, tokenizer)


@pytest.mark.parametrize("token", [23, 10**9, -1])
def test_suppressed_tokens_beyond_the_model_are_refused(token):
    model = tiny.build_model()
    model.generation_config.suppress_tokens = [2, token]
    with pytest.raises(UserError, match=f"^model.name: its generation config suppresses {token},"):
        suppressed_ids(model, [], tiny.VOCAB)


def test_a_prompt_with_a_token_beyond_the_model_is_refused_before_training():
    tokenizer = as_any(build_tokenizer())
    model = tiny.build_model(vocab_size=len(tokenizer))
    tokenizer.add_tokens(["<new>"])
    task = Task("custom", (Example("1+1=", {}),), (Example("2*2=", {}),), ())
    _refuse_ids_without_row(task, model, tokenizer)
    for field in ("train", "eval"):
        rows = {"train": task.train, "eval": task.eval, field: (Example("1<new>=", {}),)}
        with pytest.raises(UserError, match="^task custom: a prompt has token .*'<new>'.*resize_token_emb"):
            _refuse_ids_without_row(Task("custom", rows["train"], rows["eval"], ()), model, tokenizer)


# Weights and memory


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "../elsewhere/x.bin", "../elsewhere/x.safetensors"])
def test_an_index_that_names_other_files_is_refused_and_they_are_not_read(shard, tmp_path, monkeypatch):
    folder = save_model(tmp_path / "base")
    weights = load_model(str(folder))[0].state_dict()
    (folder / "model.safetensors").unlink()
    (tmp_path / "elsewhere").mkdir()
    torch.save(weights, folder / shard)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was read"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="^model.name: the weights of .* are in .*only safetensors"):
        load_model(str(folder))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_a_damaged_index_is_one_line(text, tmp_path):
    folder = save_model(tmp_path / "base")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="^model.name: the model.safetensors.index.json of .* cannot be read"):
        load_model(str(folder))


def test_sharded_weights_are_loaded(tmp_path):
    folder = save_model(tmp_path / "base")
    model, _ = load_model(str(folder))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="4KB")
    assert (folder / "model.safetensors.index.json").is_file()
    again, _ = load_model(str(folder))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("unable to mmap 9 bytes from file </x/model.safetensors>: Cannot allocate memory (12)"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_out_of_memory_while_loading_is_called_that(error, wrapped, tmp_path, monkeypatch):
    def full(*arguments, **options):
        if not wrapped:
            raise error
        try:
            raise error
        except Exception as cause:
            raise OSError("Unable to load weights from safetensors file") from cause

    folder = save_model(tmp_path / "base")
    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(UserError, match="^memory: .*base does not fit .*model.quantization=nf4"):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["meta", "xpu", "hpu", "vulkan", "nonsense", "", "cpu:x", "cuda:99"])
def test_a_device_that_cannot_be_used_is_one_line(name):
    with pytest.raises(UserError, match="^model.device: .* is not usable here"):
        pick_device(name)


def test_quantised_models_are_not_told_to_quantise():
    line = str(load._no_room(Model(name="x", quantization="nf4", dtype="bfloat16")))
    assert line == "memory: x does not fit while it is loaded. Choose a smaller model."


# Rounding


@pytest.mark.slow
def test_a_model_that_makes_much_of_a_last_bit_may_differ_more_from_itself(monkeypatch):
    """In float32, thirty layers of several streams move logits further than is usual; other logits do not
    pass for theirs."""
    config = transformers.Gemma3nTextConfig(
        **tiny.SHAPE
        | tiny.SHARING["gemma3n"][1]
        | {"hidden_size": 256, "num_hidden_layers": 30, "num_kv_shared_layers": 15, "head_dim": 64}
        | {"layer_types": ["sliding_attention", "full_attention"] * 15, "intermediate_size": [1024] * 30}
        | {"activation_sparsity_pattern": [0.95] * 10 + [0.0] * 20, "altup_num_inputs": 4}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        decoder = Decoder(model)
        gap = decoder._gap(decoder._own_logits())
    assert logit_tolerance(model) < gap <= decoder.tolerance <= 1e-3
    decoder.check()
    monkeypatch.setattr("twig.engine.decoder._as_large", lambda new, like: new)
    with pytest.raises(UserError, match="'gemma3n_text' cannot be served: layer by layer its logits differ"):
        decoder.check()


def test_in_bfloat16_a_model_that_makes_much_of_a_last_bit_may_differ_more_from_itself():
    config = transformers.LlamaConfig(
        **tiny.SHAPE | {"hidden_size": 64, "num_hidden_layers": 12, "initializer_range": 0.08}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        decoder = Decoder(model)
        moved = decoder._moved_by_rounding()
    assert logit_tolerance(model) == 0.05 < 3 * moved < 0.2
    assert decoder.tolerance == 3 * moved
    decoder.check()
    decoder.logit_scale = 1.2
    with pytest.raises(UserError, match="layer by layer its logits differ"):
        decoder.check()
