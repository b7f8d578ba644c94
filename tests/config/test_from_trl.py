"""Every field of TRL's GRPOConfig has its place; what values become; names that people type."""

import dataclasses

import pytest
from project import ROOT

from twig.cli.app import main
from twig.common.errors import UserError
from twig.config.from_trl import Around, translate
from twig.config.load import Settings, load
from twig.config.trl_names import INSTEAD, MAPPED, MEANINGLESS, REFUSED, WITHOUT_MEANING, hint
from twig.config.trl_page import with_tables


def theirs() -> dict[str, object]:
    """The fields of GRPOConfig and their defaults."""
    trl = pytest.importorskip("trl", reason="TRL is in the dev extra")
    return {field.name: field.default for field in dataclasses.fields(trl.GRPOConfig)}


def settings_of(around: Around | None = None, **changed) -> dict[str, object]:
    """The settings that fields become; whatever is refused fails the test."""
    translation = translate(changed, around)
    assert not translation.refused, translation.refused
    values = translation.settings
    values["model"]["name"] = "x"
    return Settings.from_dict(values).flat()


# ---- the tables --------------------------------------------------------------------------------------------


def test_every_field_is_in_one_table():
    tables = (MAPPED, REFUSED, INSTEAD, MEANINGLESS)
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names)), "a field is in two tables"
    assert len(MEANINGLESS) == sum(map(len, WITHOUT_MEANING.values())), "a field is there twice"
    assert set(names) == set(theirs())


@pytest.mark.parametrize("table", [MAPPED, REFUSED, INSTEAD], ids=["mapped", "refused", "instead"])
def test_the_defaults_are_those_of_trl(table):
    defaults = theirs()
    assert {name: default for name, (default, *_) in table.items()} == {
        name: defaults[name] for name in table
    }


def test_the_page_has_the_tables():
    page = (ROOT / "docs" / "from-trl.md").read_text(encoding="utf-8")
    assert page == with_tables(page), "run: python -m twig.config.trl_page docs/from-trl.md"
    assert all(f"`{name}`" in page for name in theirs())


@pytest.mark.parametrize("name", [n for n in REFUSED])
def test_another_value_of_a_refused_field_is_refused(name):
    value = {bool: True, str: "other"}.get(type(REFUSED[name][0]), 0.5)
    (line,) = translate({name: value}).refused
    assert line.startswith(f"{name}=")
    assert not translate({name: REFUSED[name][0]}).refused


@pytest.mark.parametrize("name", [n for n in INSTEAD])
def test_a_field_that_is_done_in_another_way_is_said(name):
    default = INSTEAD[name][0]
    (line,) = translate({name: (not default) if isinstance(default, bool) else "other"}).notes
    assert line.startswith(f"{name}=")


# ---- values ------------------------------------------------------------------------------------------------


def test_trl_defaults_are_kept():
    flat = settings_of()
    assert flat["train.learning_rate"] == 1e-6 and flat["algorithm.name"] == "dapo"
    assert flat["algorithm.epsilon_high"] == 0.2, "and not DAPO's own"
    assert (flat["rollout.num_generations"], flat["rollout.prompts_per_step"]) == (8, 1)


@pytest.mark.parametrize(
    ("changed", "key", "value"),
    [
        # 16 completions x 4 accumulations, in groups of 8
        (
            {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4},
            "rollout.prompts_per_step",
            8,
        ),
        ({"max_steps": 10, "num_iterations": 3}, "train.max_steps", 4),
        ({"warmup_steps": 6, "num_iterations": 2}, "train.warmup_steps", 3),
        ({"warmup_steps": 0.1, "max_steps": 50}, "train.warmup_steps", 5),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "train.warmup_steps", 0),
        ({"optim": "paged_adamw_8bit"}, "train.optim", "adamw_torch"),
        ({"save_strategy": "no"}, "train.save_steps", 0),
        ({"eval_strategy": "steps", "logging_steps": 7}, "eval.steps", 7),
        ({"eval_steps": 7}, "eval.steps", 0),
        ({"fp16": True}, "model.dtype", "float16"),
        ({"bf16": False}, "model.dtype", "float32"),
        ({"bf16": True}, "model.dtype", "auto"),
        ({"model_init_kwargs": {"dtype": "bfloat16", "device_map": "auto"}}, "model.dtype", "bfloat16"),
        ({"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}}, "model.quantization", "nf4"),
        ({"use_cpu": True}, "model.device", "cpu"),
        ({"report_to": ["wandb", "tensorboard"]}, "log.report_to", ["wandb", "tensorboard"]),
        ({"report_to": "wandb"}, "log.report_to", ["wandb"]),
        ({"report_to": "none"}, "log.report_to", []),
        ({"report_to": ["none"]}, "log.report_to", []),
        ({"loss_type": "dr_grpo"}, "algorithm.scale_rewards", "group"),
        ({"scale_rewards": False}, "algorithm.scale_rewards", "none"),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, "algorithm.name", "gspo"),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, "algorithm.epsilon_high", 4.0),
    ],
)
def test_a_value_becomes_a_setting(changed, key, value):
    assert settings_of(**changed)[key] == value


def test_shares_and_epochs_are_counted_by_the_data():
    # 40 prompts, 2 a step: 20 steps a pass, 60 in all
    changed = {"per_device_train_batch_size": 16, "warmup_steps": 0.1, "save_strategy": "epoch"}
    flat = settings_of(Around(num_prompts=40), **changed)
    assert (flat["train.warmup_steps"], flat["train.save_steps"]) == (6, 20)
    assert translate({"warmup_steps": 0.1}).refused, "without the data a share is unknown"


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"loss_type": "sapo"}, "loss_type='sapo'"),
        ({"loss_type": "dapo", "importance_sampling_level": "sequence"}, "loss_type='dapo'"),
        ({"loss_type": "bnpo", "gradient_accumulation_steps": 2}, "loss_type='bnpo'"),
        ({"loss_type": "cispo"}, "epsilon_high=None"),
        ({"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.1}, "beta=0.1"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size=4"),
        ({"report_to": ["mlflow"]}, "report_to=['mlflow']"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type='polynomial'"),
        ({"optim": "adafactor"}, "optim='adafactor'"),
        ({"of_another_version": 1}, "of_another_version=1"),
        ({"model_init_kwargs": {"rope_scaling": 2}}, "model_init_kwargs['rope_scaling']=2"),
    ],
)
def test_what_has_no_equal_is_refused(changed, name):
    (line,) = translate(changed).refused
    assert line.startswith(name)


def test_several_steps_on_a_batch_are_sampled_anew_and_said():
    translation = translate({"steps_per_generation": 4})
    assert translation.settings["rollout"]["prompts_per_step"] == 1 and not translation.refused
    assert any("generation batch of 32" in line for line in translation.notes)


def test_a_step_without_whole_groups_is_that_of_the_generation_batch():
    # 4 completions a step, in groups of 8, sampled 8 at once: two steps of TRL are one here
    changed = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    translation = translate(changed | {"generation_batch_size": 8, "max_steps": 10})
    assert translation.settings["rollout"]["prompts_per_step"] == 1 and not translation.refused
    assert translation.settings["train"]["max_steps"] == 5
    assert any("no whole group of 8" in line for line in translation.notes)


def test_all_that_is_refused_is_in_one_error():
    with pytest.raises(UserError) as caught:
        translate({"top_p": 0.5, "delta": 2.0}).check("GRPOTrainer")
    assert "top_p=0.5" in str(caught.value) and "delta=2.0" in str(caught.value)


# ---- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.lr=1e-3", "train.learning_rate"),
        ("lr=1e-3", "train.learning_rate"),
        ("train.per_device_train_batch_size=4", "rollout.prompts_per_step"),
        ("per_device_train_batch_size=4", "rollout.prompts_per_step"),
        ("rollout.top_p=0.9", "full distribution"),
        ("train.use_vllm=true", "Twig samples by itself"),
        ("rollout.max_new_tokens=5", "rollout.max_completion_length"),
    ],
)
def test_a_name_of_trl_gets_a_hint(override, key):
    with pytest.raises(UserError) as caught:
        load("quickstart", [override])
    assert key in caught.value.fix


def test_a_setting_of_ours_gets_no_hint_of_itself():
    assert hint("train.learning_rate") is None and hint("rollout.num_generations") is None
    with pytest.raises(UserError, match="Did you mean train.learning_rate"):
        load("quickstart", ["train.learning_rte=1"])


def test_an_option_of_trl_gets_a_hint(capsys):
    assert main(["train", "quickstart", "--learning_rate", "1e-5"]) == 2
    assert "Write train.learning_rate" in capsys.readouterr().err
