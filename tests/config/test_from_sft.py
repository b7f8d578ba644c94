"""The page "SFT first, then Twig", run from top to bottom on a tiny model."""

import json

import pytest
from gguf_files import write_gguf
from pages import PAGES, examples
from saved import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from twig.config.load import load

pytest.importorskip("trl", reason="TRL is in the dev extra")
NAME = "Qwen/Qwen2.5-0.5B-Instruct"
SHORTER = {
    "max_steps=200": "max_steps=2, use_cpu=True, bf16=False, save_strategy='no'",
    '"max_completion_length": 16': '"max_completion_length": 4, "num_generations": 4, "prompts_per_step": 2',
    '"max_steps": 100': '"max_steps": 2',
    "problems[600:]": "problems[776:]",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of TRL and of its trainer
def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = save_model(tmp_path / "base")
    names, runs = {}, []
    for text in examples(PAGES["docs/from-sft.md"]):
        for long, short in {**SHORTER, NAME: str(base)}.items():
            text = text.replace(long, short)
        if "model.gguf" in text:
            folder = tmp_path / "sft" / "merged"
            model, tokenizer = (
                AutoModelForCausalLM.from_pretrained(folder),
                AutoTokenizer.from_pretrained(folder),
            )
            write_gguf(tmp_path / "sft" / "model.gguf", model, tokenizer)
        exec(compile(text, "from-sft.md", "exec"), names)
        if "twig.train(" in text:
            runs.append(names["run"])
    adapter, merged, gguf = runs
    models = [load(str(run.folder)).model for run in runs]
    assert [(model.name, model.adapter) for model in models] == [
        (str(base), "sft/adapter"),
        ("sft/merged", None),
        ("sft/model.gguf", None),
    ]
    for run in runs:
        assert run.summary["status"] == "finished" and run.summary["accuracy_after"]["n"] == 4
    continued = json.loads((adapter.adapter / "adapter_config.json").read_text())
    assert continued["r"] == 16 and len(continued["target_modules"]) == 7
    new = json.loads((merged.adapter / "adapter_config.json").read_text())
    assert new["layers_to_transform"] == [2] and gguf.summary["steps"] == 2
