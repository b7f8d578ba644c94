"""The check that runs scripts of TRL: it changes only an import, and notices what does not run."""

import sys

import pytest
from pages import script
from project import ROOT

OWN = """
from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

trainer = GRPOTrainer(
    model="Qwen/Qwen2-0.5B-Instruct",
    reward_funcs=lambda completions, **kwargs: [float(len(set(text))) for text in completions],
    args=GRPOConfig(output_dir="out", max_steps=1, max_completion_length=4),
    train_dataset=load_dataset("trl-lib/tldr", split="train"),
    peft_config=LoraConfig(target_modules="all-linear"),
)
trainer.train()
"""
check = script("trl_scripts")


def test_only_the_import_is_changed():
    (ours, theirs) = (
        check.Script("a.py", "c"),
        "import os\n    from trl import (\n  A,\n)\nfrom trl.rewards import b\n",
    )
    assert check.changed(theirs, ours) == theirs.replace("from trl import", "from twig.trl import")


def test_the_script_of_a_page_and_of_a_docstring_is_taken():
    code = "from trl import GRPOTrainer\ntrainer = GRPOTrainer(\n    model=1,\n)\ntrainer.train()\n"
    page = f"```python\nGRPOConfig()\n```\ntext\n```python\n{code}```\n"
    assert check.changed(page, check.Script("a.md", "c")) == code.replace("from trl", "from twig.trl")
    lines = [f"    {'...' if line[0] in ' )' else '>>>'} {line}" for line in code.splitlines()]
    source = '"""Trains.\n\n    ```python\n' + "\n".join(lines) + '\n    ```\n"""\n'
    assert check.changed(source, check.Script("a.py", "c")).strip() == (
        code.replace("from trl", "from twig.trl").strip()
    )


def test_enough_scripts_are_listed_each_at_its_commit():
    assert len({each.path for each in check.SCRIPTS}) == len(check.SCRIPTS) >= check.LEAST == 8
    assert all(each.commit for each in check.SCRIPTS)


@pytest.mark.slow
def test_a_script_runs_over_the_stand_ins_and_too_few_fail_the_check(tmp_path, monkeypatch, capsys):
    path = next(each.path for each in check.SCRIPTS if not each.arguments and each.module == "twig.trl")
    assert path.endswith(".py")
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(OWN)
    monkeypatch.setattr(sys, "argv", ["trl_scripts.py", str(tmp_path)])
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    assert check.main() == 1
    out = capsys.readouterr().out
    assert f"ran      {path} (twig.trl): 1 steps" in out and out.count("missing") == len(check.SCRIPTS) - 1
