"""The paper's experiment with everything real but the weights: SVAMP, Qwen2's tokenizer and vocabulary."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Qwen2Config

from twig.runs.reader import read_metrics, read_summary

pytestmark = pytest.mark.slow
# Two layers of width 128 under the head of Qwen2-1.5B.
SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 151643,
}


def twig(*words, cwd):
    """Runs the command line in a process of its own; returns (what it printed, its peak memory in bytes)."""
    code = (
        "import sys; from twig.cli.app import main; from twig.runtime.memory_use import PeakMemory; "
        "status = main(); "
        "print(PeakMemory('cpu').peak(), file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, int(done.stderr.strip().splitlines()[-1])


def test_svamp_from_training_to_export(tmp_path, test_data):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE))
    model.save_pretrained(tmp_path / "base")
    del model
    for file in (test_data / "qwen2_tokenizer").iterdir():
        shutil.copy(file, tmp_path / "base")

    words = f"train svamp-qwen2-1.5b --output run model.name=base task.path={test_data / 'svamp'}"
    words += " train.max_steps=3 train.warmup_steps=1 rollout.prompts_per_step=4 rollout.num_generations=8"
    words += " rollout.wave_size=32 rollout.max_completion_length=40 eval.steps=2 eval.limit=32"
    words += " algorithm.normalise=branches"
    _, peak = twig(*words.split(), cwd=tmp_path)
    assert peak < 2 * 2**30
    summary = read_summary(tmp_path / "run")
    assert summary["status"] == "finished" and summary["accuracy_after"]["n"] == 32
    steps = [row for row in read_metrics(tmp_path / "run") if "tokens/sampled" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(row["completions/mean_length"] > 20 for row in steps), "random weights rarely end a text"

    shown, peak = twig("eval", "run", "--limit", "16", cwd=tmp_path)
    assert "svamp" in shown and peak < 2 * 2**30
    _, peak = twig("export", "run", "--output", "shared", cwd=tmp_path)
    assert peak < 2 * 2**30
    with safe_open(tmp_path / "shared" / "adapter_model.safetensors", "pt") as file:
        assert any("layers.1.self_attn.q_proj.lora_A" in name for name in file.keys())
    config = json.loads((tmp_path / "shared" / "adapter_config.json").read_text())
    assert config["r"] == 16 and sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert "svamp" in (tmp_path / "shared" / "README.md").read_text().lower()
