"""From TRL: its names and defaults as the page has them; rewards, data and LoraConfig run unchanged."""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
from pages import examples
from peft import IA3Config, LoraConfig, PeftModel
from project import ROOT
from saved import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import twig
from twig.common.errors import UserError
from twig.config.from_peft import lora_values
from twig.config.load import Settings, settings_with
from twig.config.messages import fields_of, write
from twig.config.schema import Lora
from twig.core.algorithms.registry import shipped
from twig.runs.reader import read_metrics
from twig.training.train import Passed, train

pytest.importorskip("trl", reason="TRL is in the dev extra")
PAGE = (ROOT / "docs" / "from-trl.md").read_text(encoding="utf-8")
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}.{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NAME = "Qwen/Qwen2.5-0.5B-Instruct"
SHORTER = {'"max_steps": 50': '"max_steps": 2', '"max_completion_length": 128': '"max_completion_length": 6'}


def rows(title: str) -> list[list[str]]:
    """The cells of the table below a title, without their backticks."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in lines][1:]


def defaults(kind: type) -> dict[str, str]:
    return {
        f.name: repr(f.default if f.default is not dataclasses.MISSING else f.default_factory())
        for f in dataclasses.fields(kind)
    }


def default_of(key: str) -> str:
    """The default of a setting; of `algorithm`, that of the first algorithm that has it."""
    least = {"model": {"name": "x"}, "task": {"name": "multiplication"}}
    for name in ("t-spmo", "grpo", *shipped()):
        flat = Settings.from_dict(least, [f"algorithm.name={name}"]).flat()
        if key in flat:
            infos = dict(fields_of(settings_with(shipped()[name])))
            return write(infos[key].get_default(call_default_factory=True))
    raise KeyError(key)


# ---- the page ----------------------------------------------------------------------------------------------


def test_every_name_and_default_is_what_both_sides_have():
    theirs, table = defaults(LoraConfig), rows("LoraConfig")
    assert len(table) >= 4
    for name, default, ours, our_default, *_ in table:
        assert theirs[name] == default, name
        assert default_of(ours) == our_default, ours


def test_the_arguments_are_those_of_both_functions():
    from trl import GRPOTrainer

    theirs, ours = (set(inspect.signature(f).parameters) for f in (GRPOTrainer.__init__, twig.train))
    ours |= set(Passed.__annotations__)
    table = rows("The trainer's arguments")
    assert len(table) == 7
    for their_name, our_name, *_ in table:
        assert their_name in theirs and our_name in ours


def test_what_is_not_here_is_there():
    from trl import GRPOConfig, GRPOTrainer

    known = {*defaults(GRPOConfig), *inspect.signature(GRPOTrainer.__init__).parameters}
    section = PAGE.split("\n## What is not here\n")[1]
    named = [word for word in re.findall(r"`([^`]+)`", section) if re.fullmatch(r"[a-z_]+", word)]
    assert len(named) > 4 and set(named) <= known
    lora = defaults(LoraConfig)
    refused = re.search(r"refused by name: (.*?) and the rest", PAGE, re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", refused)) <= set(lora)
    for name in ("per_device_train_batch_size", "steps_per_generation", "gradient_accumulation_steps"):
        assert f"`{name}`" in PAGE and name in known


# ---- a script ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model whose tokenizer has a chat template."""
    folder = save_model(tmp_path_factory.mktemp("model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def test_the_script_of_the_page_runs(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (script,) = examples(PAGE)
    for long, short in {**SHORTER, NAME: str(model)}.items():
        assert long in script
        script = script.replace(long, short)
    names = {}
    exec(compile(script, "from-trl.md", "exec"), names)
    run = names["run"]
    assert run.summary["status"] == "finished" and run.summary["algorithm"] == "grpo"
    metrics = read_metrics(run.folder)
    assert {"rewards/is_right/mean", "rewards/is_short/mean", "longest", "kl"} <= set(metrics[-1])
    config = LoraConfig.from_pretrained(run.folder / "adapter")
    expected = names["peft_config"]
    assert (config.r, config.lora_alpha, config.target_modules) == (8, 16, expected.target_modules)
    assert config.layers_to_transform == [0, 1, 2]
    base = AutoModelForCausalLM.from_pretrained(model)
    PeftModel.from_pretrained(base, run.folder / "adapter")


def test_rewards_data_and_adapter_are_used_as_they_are(model, tmp_path):
    from datasets import Dataset

    seen = []

    def watch(prompts, completions, completion_ids, solution, trainer_state, **kwargs):
        seen.append((prompts, completions, completion_ids, solution, trainer_state, set(kwargs)))
        return [float(len(ids) % 2) for ids in completion_ids]

    data = [{"prompt": [{"role": "user", "content": f"{i} + 1"}], "solution": i + 1} for i in range(6)]
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["v_proj", "q_proj"], layers_to_transform=[1, 2])
    settings = {
        "model": {"name": str(model)},
        "task": {"name": "custom"},
        "algorithm": {"name": "grpo"},
        "rollout": {"num_generations": 3, "prompts_per_step": 2, "max_completion_length": 5},
        "train": {"max_steps": 1, "learning_rate": 1e-3},
    }
    run = train(
        settings,
        reward_funcs=watch,
        train_dataset=Dataset.from_list(data),
        peft_config=config,
        output=tmp_path / "run",
    )
    ((prompts, completions, ids, solution, state, others),) = seen
    assert len(prompts) == len(completions) == len(ids) == len(solution) == 6
    for prompt, completion, right in zip(prompts, completions, solution, strict=True):
        assert prompt == [{"role": "user", "content": f"{right - 1} + 1"}]
        assert [set(message) for message in completion] == [{"role", "content"}]
        assert completion[0]["role"] == "assistant"
    assert state.global_step == 0 and {"log_extra", "log_metric"} <= others
    shapes = {name: p.shape for name, p in run.model.named_parameters() if "lora_A" in name}
    assert len(shapes) == 4 and all(shape[0] == 4 and ".layers.0." not in n for n, shape in shapes.items())
    assert run.model.peft_config["default"].lora_alpha == 4
    stored = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    assert sorted(stored["target_modules"]) == ["q_proj", "v_proj"]
    # The shape is in the run's settings: another one does not go on with the run.
    assert (
        Settings.from_dict(settings | {"lora": lora_values(config, str)}).lora
        == twig.load_settings(str(run.folder)).lora
    )
    with pytest.raises(UserError, match=r"lora\.r: 8 here, but the run began with 4"):
        other = LoraConfig(r=8, lora_alpha=4, target_modules=["v_proj", "q_proj"], layers_to_transform=[1, 2])
        train(settings, reward_funcs=watch, peft_config=other, output=run.folder, resume=True)


# ---- LoraConfig --------------------------------------------------------------------------------------------


def test_a_bare_config_means_what_it_means_to_peft():
    assert lora_values(LoraConfig(), lambda: "qwen2") == {
        "r": 8,
        "alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "layers": "all",
    }
    assert lora_values(LoraConfig(layers_to_transform=3), lambda: "llama")["layers"] == [3]
    with pytest.raises(UserError, match="PEFT chooses none for the family noone"):
        lora_values(LoraConfig(), lambda: "noone")


def test_every_form_of_adapter_becomes_settings_that_mean_the_same():
    seen = []
    config = LoraConfig(
        target_modules="ALL-linear",
        exclude_modules=["gate_proj"],
        lora_dropout=0.05,
        use_rslora=True,
        use_dora=True,
        rank_pattern={"down_proj": 4},
        alpha_pattern={"down_proj": 3},
    )
    values = lora_values(config, str, seen.append)
    assert values == {
        "r": 8,
        "alpha": 8,
        "target_modules": "all-linear",
        "exclude_modules": ["gate_proj"],
        "layers": "all",
        "use_rslora": True,
        "use_dora": True,
        "rank_pattern": {"down_proj": 4},
        "alpha_pattern": {"down_proj": 3},
    }
    assert Lora(**values).alpha_pattern == {"down_proj": 3.0}
    assert len(seen) == 1 and "lora_dropout=0.05" in seen[0]
    config = LoraConfig(target_modules=["c_attn"], layers_to_transform=[1], layers_pattern=["h"])
    assert lora_values(config, str)["layers_pattern"] == "h"
    assert lora_values(LoraConfig(target_modules=r".*\.q_proj"), str)["target_modules"] == r".*\.q_proj"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bias": "all"}, "peft_config.bias: 'all' .*Set bias=\"none\""),
        ({"lora_bias": True}, "peft_config.lora_bias: True is not supported. Leave it out"),
        ({"modules_to_save": ["lm_head"]}, "peft_config.modules_to_save"),
        ({"init_lora_weights": "gaussian"}, "peft_config.init_lora_weights: 'gaussian'"),
        ({"trainable_token_indices": [1]}, "peft_config.trainable_token_indices"),
        ({"task_type": "SEQ_CLS"}, "peft_config.task_type: 'SEQ_CLS'"),
        (
            {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["layers", "h"]},
            "peft_config.layers_pattern: .* more than one name",
        ),
    ],
)
def test_what_has_no_equal_is_refused_by_name(values, words):
    with pytest.raises(UserError, match=words):
        lora_values(LoraConfig(**values), lambda: "qwen2")


def test_another_kind_of_adapter_is_refused():
    with pytest.raises(UserError, match="IA3Config is no LoRA adapter"):
        lora_values(IA3Config(), lambda: "qwen2")
    with pytest.raises(UserError, match="dict is no LoRA adapter"):
        lora_values({"r": 4}, lambda: "qwen2")


def test_a_rank_of_none_is_one_line():
    with pytest.raises(UserError, match=r"peft_config: lora\.r: 0 should be greater than or equal to 1"):
        train(
            {"model": {"name": "x"}, "task": {"name": "custom"}},
            peft_config=LoraConfig(r=0, target_modules=["q_proj"]),
        )
