"""A result as a GGUF file: transformers reads back what was trained, q and k in llama.cpp's order; the
adapter; a base that came from such a file; what is refused."""

import ast
import re

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_files import write_gguf
from saved import build_tokenizer
from tiny import FAMILIES, SHAPE
from transformers import AutoModelForCausalLM

import twig
from twig.cli.app import main
from twig.common.errors import UserError
from twig.config.load import Settings
from twig.config.schema import Model
from twig.engine.load import load_model, load_tokenizer
from twig.export import gguf as written
from twig.export.export import ExportOptions, export_run

PROMPTS = {"12*3=": "1", "9+8=": "3", "abc?": "5", "#=": "7", "0,1,": "9"}
TRAIN = [{"prompt": prompt, "wanted": digit} for prompt, digit in PROMPTS.items()]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def digits(completions, **kwargs):
    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in completions]


def save_family(folder, family, **extra):
    """A random model of the family, with grouped queries and weights large enough to tell heads apart."""
    tokenizer = build_tokenizer()
    name, own = FAMILIES[family]
    values = SHAPE | own | {"vocab_size": len(tokenizer), "bos_token_id": None, "hidden_size": 64} | extra
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**values), dtype=torch.float32)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.25)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(base, output, *overrides):
    values = {
        "model": {"name": str(base)},
        "lora": {"layers": "all", "target_modules": ["q_proj", "k_proj", "v_proj"]},
        "task": {"name": "custom"},
        "rollout": {"num_generations": 4, "prompts_per_step": 2, "max_completion_length": 7},
        "train": {"max_steps": 2, "learning_rate": 0.05},
    }
    settings = Settings.from_dict(values, overrides)
    return twig.train(settings, output=output, reward_funcs=digits, train_dataset=TRAIN)


def read(file, config=None):
    """What transformers makes of a file; it takes biases and the size of a head only from a config."""
    return load_model(Model.model_validate({"name": str(file), "dtype": "float32"}), config=config)


def merged_weights(done):
    return done.model.merge_and_unload().state_dict()


CASES = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen2-tied", {}),
    ("qwen3", {"head_dim": 32}),
]


@pytest.mark.parametrize("family, extra", CASES, ids=["llama", "llama-biased-tied", "qwen2", "tied", "qwen3"])
def test_every_tensor_is_read_back_within_half_precision(family, extra, tmp_path):
    """Heads are grouped and their rows random, so that a missing or a wrong permutation fails."""
    done = train(save_family(tmp_path / "base", family, **extra), tmp_path / "run")
    exported = export_run(done.folder, tmp_path / "out", ExportOptions(merged=True, gguf="f16"))
    assert exported.file == tmp_path / "out" / "model-f16.gguf"
    model, tokenizer = read(exported.file, done.model.config)
    expected = merged_weights(done)
    own = model.state_dict()
    assert own.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(own[name], tensor, rtol=2**-11, atol=1e-7, msg=name)
    assert tokenizer("12*3= a.")["input_ids"] == build_tokenizer()("12*3= a.")["input_ids"]
    assert exported.merge.dtype == "f16"


def test_llama_s_queries_and_keys_are_in_another_order(tmp_path):
    done = train(save_family(tmp_path / "base", "llama"), tmp_path / "run")
    file = export_run(done.folder, tmp_path / "out", ExportOptions(merged=True, gguf="f16")).file
    tensors = {each.name: each.data for each in gguf.GGUFReader(file).tensors}
    q = merged_weights(done)["model.layers.0.self_attn.q_proj.weight"].numpy()
    head = q[:16]  # 64 / 4 heads: llama.cpp has 0, 8, 1, 9, ... where transformers has 0, 1, 2, ...
    order = [place for pair in zip(range(8), range(8, 16), strict=True) for place in pair]
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight"][:16], head[order].astype(np.float16))


def test_eight_bits_are_near_and_half_the_size(tmp_path):
    done = train(save_family(tmp_path / "base", "llama"), tmp_path / "run")
    half, small = (
        export_run(done.folder, tmp_path / form, ExportOptions(merged=True, gguf=form))
        for form in ("f16", "q8_0")
    )
    assert half.merge.difference < small.merge.difference < 0.1 * small.merge.largest
    kinds = {each.name: each.tensor_type.name for each in gguf.GGUFReader(small.file).tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q8_0" and kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] == "F16", "rows of 48 are no whole number of blocks"


def effective(file):
    """The matrices that a LoRA file adds, by the name of the weight, as llama.cpp computes them."""
    reader = gguf.GGUFReader(file)
    assert reader.fields["general.type"].contents() == "adapter"
    tensors = {each.name: torch.tensor(each.data) for each in reader.tensors}
    alpha, stems = reader.fields["adapter.lora.alpha"].contents(), {name[:-7] for name in tensors}
    return {
        stem: alpha / len(tensors[f"{stem}.lora_a"]) * tensors[f"{stem}.lora_b"] @ tensors[f"{stem}.lora_a"]
        for stem in stems
    }


@pytest.mark.parametrize("family, words", [("llama", []), ("qwen2", ["lora.use_rslora=true", "lora.r=4"])])
def test_the_adapter_adds_what_the_merged_file_has_more_than_the_base(family, words, tmp_path):
    base = save_family(tmp_path / "base", family)
    done = train(base, tmp_path / "run", *words)
    file = export_run(done.folder, tmp_path / "out", ExportOptions(gguf="f16")).file
    added = effective(file)
    assert len(added) == 4 * 3, "q, k and v of every layer"
    own, _ = load_model(str(base))
    merged = done.model.merge_and_unload()
    weights = [{n: w for n, w in _gguf_weights(model, tmp_path).items()} for model in (own, merged)]
    for name, matrix in added.items():
        torch.testing.assert_close(weights[0][name] + matrix, weights[1][name], rtol=0, atol=2e-3)
        assert matrix.abs().max() > 0.05, "it is far more than what float16 rounds away"
    config = written.json.loads((done.folder / "adapter" / "adapter_config.json").read_text())
    assert config["lora_alpha"] != config["r"], "otherwise a forgotten scale would not show"


@pytest.mark.parametrize("words", [["lora.rank_pattern={q_proj: 4}"], ["lora.use_dora=true"]])
def test_an_adapter_that_gguf_cannot_say_is_refused(words, tmp_path):
    done = train(save_family(tmp_path / "base", "qwen2"), tmp_path / "run", *words)
    with pytest.raises(UserError, match="--gguf: .* Pass --merged too"):
        export_run(done.folder, tmp_path / "out", ExportOptions(gguf="f16"))
    assert not (tmp_path / "out").exists()


def _gguf_weights(model, folder):
    file = folder / f"{id(model)}.gguf"
    texts = written.Vocabulary(build_tokenizer(), [1])
    written.write_model(file, model, "f16", texts, written.Origin("x"))
    return {each.name: torch.tensor(each.data).float() for each in gguf.GGUFReader(file).tensors}


def test_the_frequencies_of_llama_3_are_written(tmp_path):
    done = train(save_family(tmp_path / "base", "llama", rope_parameters=LLAMA3), tmp_path / "run")
    file = export_run(done.folder, tmp_path / "out", ExportOptions(merged=True, gguf="f16")).file
    (factors,) = (each.data for each in gguf.GGUFReader(file).tensors if each.name == "rope_freqs.weight")
    # With theta 10000 and heads of 16 the periods are 6.28, 19.87, 62.8, ... tokens. Those below 32/4 stay,
    # those above 32 are 8 times as long, and 19.87 is in between: s = (32 / 19.87 - 1) / 3 = 0.2035,
    # and 1 / ((1 - s) / 8 + s) = 3.2995.
    np.testing.assert_allclose(factors, [1, 3.2995, *[8] * 6], rtol=1e-3)


def test_a_base_in_a_gguf_file_keeps_its_header(tmp_path):
    base = write_gguf(tmp_path / "base.gguf", *load_model("tiny-arithmetic"), template="{{ messages }}")
    settings = {
        "model": {"name": str(base)},
        "task": {"name": "multiplication", "train_size": 50, "eval_size": 4, "chat": "never"},
        "rollout": {"num_generations": 4, "prompts_per_step": 2, "max_completion_length": 24},
        "train": {"max_steps": 1, "learning_rate": 1e-2},
    }
    done = twig.train(settings, output=tmp_path / "run")
    file = export_run(done.folder, tmp_path / "out", ExportOptions(merged=True, gguf="f16")).file
    fields, own = (gguf.GGUFReader(path).fields for path in (file, base))
    changed = {"general.file_type", "general.quantization_version", "GGUF.kv_count"}
    for name, field in own.items():
        if name not in changed:
            assert fields[name].contents() == field.contents(), name
    assert fields.keys() - own.keys() <= changed
    assert load_tokenizer(Model(name=str(file))).chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"model_type": "gemma2"}, "gemma2"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"use_sliding_window": True}, "window"),
    ],
)
@pytest.mark.parametrize("merged, command", [(True, "convert_hf_to_gguf"), (False, "convert_lora_to_gguf")])
def test_what_is_not_written_is_refused_with_a_command(change, problem, merged, command):
    config = transformers.Qwen2Config(**SHAPE)
    for key, value in change.items():
        object.__setattr__(config, key, value)
    with pytest.raises(UserError, match=problem) as caught:
        written.refuse_gguf(config, "base", merged)
    assert command in caught.value.fix


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(written, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install gguf"):
        written.refuse_gguf(transformers.Qwen2Config(**SHAPE), "base", merged=True)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
PLAIN, AFTER = BYTES | {"use_regex": True}, BYTES | {"use_regex": False}


def split(expression):
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


QWEN2, LLAMA3_SPLIT = written._QWEN2 + written._SPACES, written._LLAMA3 + written._SPACES
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    "before, ignore, name",
    [
        (PLAIN, False, "gpt-2"),
        (sequence(DIGITS, PLAIN), False, "smollm"),
        (sequence(split(QWEN2), AFTER), False, "qwen2"),
        (sequence(split(LLAMA3_SPLIT), AFTER), True, "llama-bpe"),
        (sequence(split(LLAMA3_SPLIT), AFTER), False, "dbrx"),
        (sequence(split(QWEN2), AFTER), True, None),
        (sequence(split(QWEN2), PLAIN), False, None),
        (sequence(DIGITS | {"individual_digits": False}, PLAIN), False, None),
        (PLAIN | {"add_prefix_space": True}, False, None),
        (None, False, None),
    ],
)
def test_how_a_text_is_cut_has_a_name_or_is_refused(before, ignore, name):
    layout = {"pre_tokenizer": before, "model": {"type": "BPE", "ignore_merges": ignore}, "normalizer": None}
    assert written._split(layout) == name
    assert written._split(layout | {"normalizer": {"type": "Lowercase"}}) is None


def test_the_tokenizer_of_qwen_2_is_written_as_it_is(test_data, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(test_data / "qwen2_tokenizer")
    config = transformers.Qwen2Config(**SHAPE | {"vocab_size": 151936, "hidden_size": 4, "head_dim": 1})
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config)
    file = tmp_path / "model.gguf"
    texts = written.Vocabulary(tokenizer, [tokenizer.eos_token_id, 151643])
    model = model.to_empty(device="cpu")
    torch.nn.init.zeros_(model.model.embed_tokens.weight)
    written.write_model(file, model, "f16", texts, written.Origin("x", "Qwen/Qwen2-0.5B"))
    again, fields = load_tokenizer(Model(name=str(file))), gguf.GGUFReader(file).fields
    for text in ("347*26= 9022\n\n#### 5", "  Ünïcödé 中文 don't", "<|im_start|>user\nhi<|im_end|>"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"], text
    assert fields["tokenizer.ggml.pre"].contents() == "qwen2"
    assert fields["general.base_model.0.repo_url"].contents() == "https://huggingface.co/Qwen/Qwen2-0.5B"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


@pytest.mark.parametrize("merged", [True, False])
def test_the_card_s_lines_are_python_and_name_the_file(merged, tmp_path):
    done = train(save_family(tmp_path / "base", "qwen2"), tmp_path / "run", "train.max_steps=1")
    exported = export_run(done.folder, tmp_path / "out", ExportOptions(merged=merged, gguf="q8_0"))
    assert sorted(path.name for path in exported.folder.iterdir()) == ["README.md", exported.file.name]
    card = (exported.folder / "README.md").read_text()
    (lines,) = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    calls = [node for node in ast.walk(ast.parse(lines)) if isinstance(node, ast.Call)]
    (load,) = (call for call in calls if getattr(call.func, "id", "") == "Llama")
    named = {word.arg: ast.literal_eval(word.value) for word in load.keywords}
    assert (ast.literal_eval(load.args[0]) if merged else named["lora_path"]) == exported.file.name
    assert named["n_ctx"] > 7 and card.startswith("---\n") and "- gguf" in card


def test_the_command_writes_a_file_and_says_what_answers_with_it(tmp_path, capsys):
    done = train(save_family(tmp_path / "base", "qwen2"), tmp_path / "run", "train.max_steps=1")
    out, words = tmp_path / "out", ["export", str(done.folder), "--gguf"]
    assert main([*words, "--merged", "--gguf-type", "q8_0", "--output", str(out)]) == 0
    assert str(out / "model-q8_0.gguf") in capsys.readouterr().out
    assert main([*words, "--output", str(tmp_path / "adapter")]) == 0
    assert f"--lora {tmp_path / 'adapter' / 'adapter.gguf'}" in capsys.readouterr().out
    for wrong in (["--gguf-type", "q8_0"], ["--merged", "--gguf-type", "q4_0"]):
        assert main([*words, *wrong, "--output", str(tmp_path / "none")]) == 2
        assert "--gguf-type: " in capsys.readouterr().err
