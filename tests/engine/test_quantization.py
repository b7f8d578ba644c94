"""Bases in 4 and 8 bits: refused in one line where they cannot be, and otherwise trained as any other."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import oracles
import pytest
import tiny
import torch
from gradients import credit_of, engine_gradient, requests_of, texts_of
from saved import build_tokenizer

from twig.cli.app import main
from twig.common.errors import UserError
from twig.config.load import Settings
from twig.config.schema import Model
from twig.core.algorithms.base import Objective
from twig.core.types import Example, Group
from twig.engine import load as models
from twig.engine.lora import attach
from twig.engine.policy import Policy
from twig.engine.sampler import SamplingParams, sample
from twig.planner.model_shape import Shape
from twig.planner.plan import workload_of
from twig.runs.reader import read_metrics, read_summary

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
needs_library = pytest.mark.skipif(
    not INSTALLED, reason="bitsandbytes is not installed: pip install -c constraints.txt -e '.[quantization]'"
)
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # blocks of 64 weights
# Of gradients, relative to the largest entry, and of log-probs. In int8 a float's last bit may become a step
# of 1/127 of what goes into a layer, and the next layers' inputs are rounded again.
GRADIENT = {"nf4": 1e-4, "int8": 0.15}
LOGP = {"nf4": 1e-4, "int8": 0.5}


@pytest.fixture
def base(tmp_path) -> Path:
    """A random Qwen2 with a tokenizer, in float32."""
    tokenizer, folder = build_tokenizer(), tmp_path / "base"
    shape = WIDE | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model = tiny.build_model(dtype=torch.float32, **shape)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def expected(base, kind="nf4", **changes) -> Model:
    return Model(**{"name": str(base), "device": "cpu", "quantization": kind} | changes)


def test_without_the_library_one_line_names_the_extra(base, monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="^model.quantization: nf4 .*pip install bitsandbytes"):
        models.load_model(expected(base))


@pytest.mark.parametrize(
    ("device", "dtype", "change"),
    [("mps", torch.float32, "model.device=cpu"), ("cpu", torch.float64, "model.dtype=float32")],
)
def test_what_cannot_be_quantised_is_one_line(device, dtype, change, base):
    asked = expected(base, "int8")
    with pytest.raises(UserError, match=f"^model.quantization: int8 .*{change}"):
        models._quantised(asked, models.load_config(asked), torch.device(device), dtype)


@pytest.mark.parametrize(
    ("stored", "kind"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ],
)
def test_a_base_that_is_quantised_already_is_not_quantised_again(stored, kind, base):
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": stored}))
    assert models.quantization_of(models.load_config(expected(base))) == kind
    with pytest.raises(UserError, match=rf"^model.quantization: .*\({kind}\)"):
        models.load_model(expected(base))


def test_the_plan_of_memory_counts_quantised_layers(base):
    shape = Shape.from_config(json.loads((base / "config.json").read_text()))

    def weights(*words):
        values = {"model": {"name": str(base)}, "task": {"name": "custom", "path": "none.jsonl"}}
        work = workload_of(shape, Settings.from_dict(values, words), "cpu", 10)
        return work.shape.weight_bytes(work.element, work.quantised)

    nf4, int8 = (weights(f"model.quantization={kind}") for kind in ("nf4", "int8"))
    assert nf4 < int8 < weights()


def policy_on(base, kind, dtype="float32") -> Policy:
    model, _ = models.load_model(expected(base, kind, dtype=dtype))
    peft_model = attach(
        model, r=4, alpha=8.0, target_modules=["q_proj", "v_proj", "down_proj"], layers=[2, 3]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return Policy(peft_model)


def bytes_of(policy) -> dict[str, bytes]:
    """All of the base: what is stored, in whatever form, and what undoes its quantisation."""
    state = {n: p for n, p in policy.model.state_dict().items() if "lora_" not in n}
    return {n: p.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for n, p in state.items()}


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_layers_are_quantised_and_nothing_else(kind, dtype, base):
    policy = policy_on(base, kind, dtype)
    stored = {"nf4": torch.uint8, "int8": torch.int8}[kind]
    layer = policy.decoder.layers[0]
    assert layer.self_attn.q_proj.weight.dtype == layer.mlp.up_proj.weight.dtype == stored
    full = getattr(torch, dtype)
    for part in (policy.decoder.head, policy.decoder.embedding, policy.decoder.norm):
        assert part.weight.dtype == full
    assert {p.dtype for p in policy.parameters.values()} == {torch.float32}
    assert models.quantization_of(policy.model.config) == kind


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_packs_and_boundary_give_the_gradient_of_the_quantised_models_own_forward(kind, base):
    policy = policy_on(base, kind)
    before = bytes_of(policy)
    drawn = sample(policy, requests_of(), SamplingParams([5, 6, 7], texts_of, seed=5))
    rng = np.random.default_rng(0)
    groups = [
        Group(Example(""), i, request.prompt_ids, made, rng.random(len(made)), 0, cells)
        for i, (request, made, cells) in enumerate(
            zip(requests_of(), drawn.completions, drawn.prompt_cells, strict=True)
        )
    ]
    tries, credits = credit_of(groups)
    loss, logps = oracles.path_loss(policy, groups, tries, credits)
    loss.backward()
    own = {n: p.grad.clone() for n, p in policy.parameters.items()}
    scale = max(float(g.abs().max()) for g in own.values())
    for boundary in (None, drawn.boundary):
        _, ours = engine_gradient(policy, groups, tries, credits, Objective(), 40, boundary)
        gap = max(float((ours[n] - g).abs().max()) for n, g in own.items()) / scale
        assert gap < GRADIENT[kind], gap
    for group, actual, trie in zip(groups, logps, tries, strict=True):
        for completion, path in zip(group.completions, trie.paths, strict=True):
            values = [float(actual[int(node)]) for node in path]
            np.testing.assert_allclose(completion.logps, values, atol=LOGP[kind])
    torch.optim.AdamW(policy.parameters.values(), lr=0.1).step()
    assert bytes_of(policy) == before


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_on_a_quantised_base_from_training_to_export(kind, base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1="}\n' * 10)
    (tmp_path / "rewards.py").write_text(
        "def digits(completions, **kwargs):\n"
        "    return [sum(c.isdigit() for c in text) for text in completions]\n"
    )
    words = "train quickstart --output run model.name=base task.name=custom task.path=data.jsonl".split()
    words += "task.reward_file=rewards.py:digits train.max_steps=2 rollout.max_completion_length=6".split()
    words += [f"model.quantization={kind}", "rollout.prompts_per_step=2", "log.progress=quiet"]
    capsys.readouterr()
    assert main(words) == 0
    assert "float16" not in capsys.readouterr().err, "no line for each call of a layer"
    assert read_summary(tmp_path / "run")["steps"] == 2
    assert all(row["grad_norm"] > 0 for row in read_metrics(tmp_path / "run"))
    gaps = [row["sampling/logp_gap"] for row in read_metrics(tmp_path / "run")]
    assert max(gaps) < LOGP[kind]
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (environment["quantization"], environment["dtype"]) == (kind, "torch.float32")

    assert main(["eval", "run", "--limit", "2"]) == 0
    again = ["--output", "again", "model.adapter=run/adapter", *words[4:]]
    assert main(["train", "quickstart", *again]) == 0
    assert main(["export", "run", "--output", "shared"]) == 0
    assert f"layers quantised to `{kind}`" in (tmp_path / "shared" / "README.md").read_text()
    assert main(["export", "run", "--merged", "--output", "merged"]) == 0, "into the base as it is on disk"
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"In training, the base had its layers quantised to `{kind}`" in " ".join(card.split())
    model, _ = models.load_model(str(tmp_path / "merged"))
    assert models.quantization_of(model.config) is None
