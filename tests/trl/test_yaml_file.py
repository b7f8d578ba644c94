"""`twig settings --from FILE`: a file for TRL's command line as settings."""

import yaml
from saved import save_model

from twig.cli.app import main
from twig.config.load import load

FILE = """
model_name_or_path: some/model
dataset_name: some/data
dataset_config: main
reward_funcs: [mine.rewards.exact, mine.rewards.short]
output_dir: out
learning_rate: 1.0e-5
per_device_train_batch_size: 8
gradient_accumulation_steps: 4
use_vllm: true
use_peft: true
lora_target_modules: [q_proj, v_proj]
eval_strategy: steps
eval_steps: 10
max_steps: 100
"""


def printed(tmp_path, capsys, text):
    path = tmp_path / "script.yaml"
    path.write_text(text)
    return main(["settings", "--from", str(path)]), *capsys.readouterr()


def test_a_file_becomes_settings_that_can_be_loaded(tmp_path, capsys):
    status, out, _ = printed(tmp_path, capsys, FILE)
    assert status == 0
    (tmp_path / "ours.yaml").write_text(out)
    flat = load(str(tmp_path / "ours.yaml")).flat()
    assert (flat["model.name"], flat["task.path"], flat["task.subset"]) == ("some/model", "some/data", "main")
    assert flat["task.reward_file"] == "mine/rewards.py:exact,short"
    assert (flat["task.eval_split"], flat["eval.steps"]) == ("test", 10)
    assert flat["rollout.prompts_per_step"] == 4 and flat["train.learning_rate"] == 1e-5
    assert (flat["lora.r"], flat["lora.alpha"], flat["lora.layers"]) == (16, 32, "all")
    comments = [line for line in out.splitlines() if line.startswith("#")]
    assert any("use_vllm" in line for line in comments) and any(
        "lora_dropout=0.05" in line for line in comments
    )


def test_modules_that_are_not_named_are_those_of_peft(tmp_path, capsys):
    folder = save_model(tmp_path / "model")
    text = FILE.replace("some/model", str(folder)).replace("lora_target_modules: [q_proj, v_proj]\n", "")
    status, out, _ = printed(tmp_path, capsys, text)
    assert status == 0 and yaml.safe_load(out)["lora"]["target_modules"] == ["q_proj", "v_proj"]


def test_all_that_has_no_equal_is_one_line(tmp_path, capsys):
    text = FILE.replace("use_peft: true", "top_p: 0.9\nno_such_field: 1")
    status, out, err = printed(tmp_path, capsys, text)
    assert status == 2 and not out and err.count("\n") == 1
    assert all(name in err for name in ("top_p=0.9", "no_such_field=1", "use_peft=False"))


def test_a_file_that_is_none_is_one_line(tmp_path, capsys):
    assert main(["settings", "--from", str(tmp_path / "none.yaml")]) == 2
    assert printed(tmp_path, capsys, "- 1")[0] == 2
