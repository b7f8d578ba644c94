"""A base in a GGUF file: read exactly, held as ordinary matrices, trained, exported; and what is refused."""

import copy
import hashlib
import json
import shutil

import gguf_files
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import twig
from twig.cli.app import app
from twig.common.errors import UserError
from twig.config.schema import Model
from twig.engine import model_files
from twig.engine.load import end_ids, load_config, load_model, load_tokenizer, quantization_of
from twig.engine.model_files import source_of
from twig.export.export import ExportOptions, export_run

TEXT = "347*26="
TEMPLATE = "{% for message in messages %}#{{ message['content'] }}={% endfor %}"
TRAIN = {
    "task": {"name": "multiplication", "train_size": 50, "eval_size": 8},
    "rollout": {"num_generations": 4, "prompts_per_step": 2, "max_completion_length": 24},
    "train": {"max_steps": 2, "learning_rate": 1e-2, "save_steps": 1},
}


@pytest.fixture(scope="module")
def embedded():
    return load_model("tiny-arithmetic")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, embedded):
    folder = tmp_path_factory.mktemp("gguf")
    gguf_files.write_gguf(folder / "exact.gguf", *embedded, template=TEMPLATE)
    gguf_files.write_gguf(folder / "q8.gguf", *embedded, quantised=True)
    return folder


def of(**values):
    return Model.model_validate(values)


def logits(model, tokenizer):
    with torch.no_grad():
        return model(torch.tensor([tokenizer(TEXT)["input_ids"]])).logits


@pytest.mark.parametrize("by", ["name", "gguf_file"])
def test_model_and_tokenizer_are_those_of_the_file(folder, embedded, by, capfd):
    values = {"name": str(folder / "exact.gguf")}
    if by == "gguf_file":
        values = {"name": str(folder), "gguf_file": "exact.gguf"}
    capfd.readouterr()
    model, tokenizer = load_model(of(**values))
    assert capfd.readouterr().err == "", "no bars, no warnings"
    expected = embedded[0].state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name].float(), rtol=0, atol=0)
    assert tokenizer(TEXT)["input_ids"] == embedded[1](TEXT)["input_ids"]
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert tokenizer.chat_template == TEMPLATE
    assert end_ids(model, tokenizer) == end_ids(*embedded)
    torch.testing.assert_close(logits(model, tokenizer), logits(*embedded))


def test_quantised_weights_become_ordinary_ones(folder, embedded, tmp_path):
    """Which take gradients, move, copy and are saved like any others."""
    model, tokenizer = load_model(of(name=str(folder / "q8.gguf")))
    assert quantization_of(model.config) is None and not getattr(model, "is_quantized", False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(type(m) is torch.nn.Linear for n, m in model.named_modules() if n.endswith("_proj"))
    size = logits(*embedded).abs().max()
    gap = (logits(model, tokenizer) - logits(*embedded)).abs().max()
    assert 0 < gap < 0.05 * size, "eight bits are near, and not the same"
    copy.deepcopy(model).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, tokenizer), logits(model, tokenizer))


def test_another_file_of_that_name_in_the_working_directory_is_not_taken(folder, tmp_path, monkeypatch):
    (tmp_path / "exact.gguf").write_bytes(b"not this one")
    monkeypatch.chdir(tmp_path)
    model, _ = load_model(of(name=str(folder), gguf_file="exact.gguf"))
    assert model.config.model_type == "qwen2"


def test_a_run_trains_evaluates_and_exports(folder, tmp_path, embedded):
    base = tmp_path / "base.gguf"
    shutil.copy(folder / "exact.gguf", base)
    settings = {**TRAIN, "model": {"name": str(base)}, "task": {**TRAIN["task"], "chat": "never"}}
    run = twig.train(settings, output=tmp_path / "run")
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["model_sha256"] == hashlib.sha256(base.read_bytes()).hexdigest()
    assert environment["model_revision"] is None
    same = {**settings, "model": {"name": "tiny-arithmetic"}}
    other = twig.train(same, output=tmp_path / "other")
    assert run.summary["tokens_sampled"] == other.summary["tokens_sampled"]
    assert json.loads((other.folder / "environment.json").read_text())["model_sha256"] is None
    exported = export_run(run.folder, tmp_path / "merged", ExportOptions(merged=True))
    assert (exported.folder / "model.safetensors").is_file()
    merged, tokenizer = load_model(of(name=str(exported.folder)))
    tuned = run.model(torch.tensor([tokenizer(TEXT)["input_ids"]])).logits
    torch.testing.assert_close(logits(merged, tokenizer), tuned.detach(), rtol=1e-4, atol=1e-4)


def test_a_run_is_not_resumed_on_another_file(folder, tmp_path):
    base = tmp_path / "base.gguf"
    shutil.copy(folder / "exact.gguf", base)
    settings = {**TRAIN, "model": {"name": str(base)}, "task": {**TRAIN["task"], "chat": "never"}}
    twig.train(settings, output=tmp_path / "run")
    longer = {**settings, "train": {**TRAIN["train"], "max_steps": 3}}
    shutil.copy(folder / "q8.gguf", base)
    with pytest.raises(UserError, match="have changed since the run began"):
        twig.train(longer, output=tmp_path / "run", resume=True)
    shutil.copy(folder / "exact.gguf", base)
    assert twig.train(longer, output=tmp_path / "run", resume=True).summary["steps"] == 3


def test_a_folder_of_safetensors_has_a_checksum_too(tmp_path, embedded):
    model, tokenizer = embedded
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    source = source_of(of(name=str(tmp_path)))
    weights = (tmp_path / "model.safetensors").read_bytes()
    assert source.checksum() == hashlib.sha256(weights).hexdigest()
    assert source_of(of(name="tiny-arithmetic")).checksum() is None
    assert source_of(of(name="some/model")).checksum() is None


def test_the_command_line_takes_a_file(folder):
    plan = CliRunner().invoke(
        app, ["plan", "quickstart", f"model.name={folder / 'q8.gguf'}", "task.chat=never"]
    )
    assert plan.exit_code == 0, plan.output
    assert "q8.gguf" in plan.output


@pytest.mark.parametrize(
    "values, key, fix",
    [
        ({"name": "{folder}"}, "model.name", "model.gguf_file=exact.gguf"),
        ({"name": "{folder}/none.gguf"}, "model.name", "GGUF"),
        ({"name": "{folder}", "gguf_file": "none.gguf"}, "model.gguf_file", "exact.gguf"),
        ({"name": "{folder}/q8.gguf", "gguf_file": "q8.gguf"}, "model.gguf_file", "out"),
        ({"name": "tiny-arithmetic", "gguf_file": "q8.gguf"}, "model.gguf_file", "out"),
        ({"name": "{folder}/q8.gguf", "quantization": "int8"}, "model.quantization", "out"),
        ({"name": "some/model", "gguf_file": "q8.gguf"}, "model.name", "network"),
        ({"name": "{folder}/bad/torn.gguf"}, "model.name", "again"),
        ({"name": "{folder}/bad/cut.gguf"}, "model.name", "again"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(folder, values, key, fix):
    (folder / "bad").mkdir(exist_ok=True)
    (folder / "bad" / "torn.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    whole = (folder / "exact.gguf").read_bytes()
    (folder / "bad" / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError) as caught:
        load_model(of(**{k: v.format(folder=folder) for k, v in values.items()}))
    assert caught.value.key == key and fix in caught.value.fix
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_model])
def test_without_the_package_the_extra_is_named(folder, monkeypatch, load):
    monkeypatch.setattr(model_files, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gguf"):
        load(of(name=str(folder / "exact.gguf")))
