"""`twig.trl.GRPOTrainer`: a script as people write it for TRL, with only its import changed."""

import logging
import sys
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from saved import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import twig
from twig.common.errors import UserError
from twig.runs.reader import read_metrics

pytest.importorskip("trl", reason="TRL is in the dev extra")
from twig.trl import GRPOConfig, GRPOTrainer

CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}.{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SMALL = {
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 6,
    "learning_rate": 1e-3,
    "max_steps": 4,
    "logging_steps": 2,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose tokenizer has a chat template."""
    folder = save_model(tmp_path_factory.mktemp("model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return str(folder)


def is_even(completions, solution, **kwargs):
    return [float(len(completion[0]["content"]) % 2 == 0) for completion in completions]


def is_short(completion_ids, log_metric, **kwargs):
    log_metric("longest", max(map(len, completion_ids)))
    return [1.0 if len(ids) < 5 else None for ids in completion_ids]


def share_of_digits(completions, **kwargs):
    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in completions]


@pytest.fixture
def tracker(monkeypatch):
    """The rows that a tracker gets, which is not installed."""
    rows = []
    run = SimpleNamespace(log=lambda row, step=None: rows.append(row), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=lambda **options: run))
    return rows


def chats(first: int, count: int) -> Dataset:
    rows = range(first, first + count)
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"{i} + 1"}], "solution": str(i + 1)} for i in rows]
    )


class Heard(TrainerCallback):
    """Keeps the events in their order; stops after `last` steps."""

    def __init__(self, last: int | None = None) -> None:
        self.events, self.logs, self.last = [], [], last

    def on_init_end(self, args, state, control, **kwargs):
        self.events.append("init")

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        assert isinstance(model, PeftModel) and processing_class is not None
        self.events.append("train")

    def on_step_begin(self, args, state, control, **kwargs):
        self.events.append(f"begin {state.global_step}")

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(f"end {state.global_step}")
        control.should_training_stop = state.global_step == self.last
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events.append(f"log {state.global_step}")
        self.logs.append(logs)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.events.append(f"evaluate {state.global_step}")

    def on_save(self, args, state, control, **kwargs):
        self.events.append(f"save {state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("done")


class Fails(TrainerCallback):
    """Fails when a checkpoint is there."""

    def on_save(self, args, state, control, **kwargs):
        raise RuntimeError("no more")


def trainer_of(model, folder, **given):
    """A trainer of texts with one reward; `given` are its arguments, `args` those of its GRPOConfig."""
    args = GRPOConfig(output_dir=str(folder), **SMALL | given.pop("args", {}))
    texts = Dataset.from_list([{"prompt": f"{i}+1="} for i in range(6)])
    usual = {"reward_funcs": share_of_digits, "train_dataset": texts, "peft_config": LoraConfig(**LORA)}
    return GRPOTrainer(model=model, args=args, **usual | given)


def test_a_script_with_two_rewards_chats_and_callbacks_trains(model, tmp_path, caplog, tracker):
    data = DatasetDict({"train": chats(0, 6), "test": chats(20, 3)})
    heard = Heard()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[is_even, is_short],
        args=GRPOConfig(
            output_dir=str(tmp_path / "run"),
            reward_weights=[1.0, 0.5],
            eval_strategy="steps",
            eval_steps=2,
            eval_on_start=True,
            save_steps=2,
            **SMALL | {"report_to": "trackio"},
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        peft_config=LoraConfig(**LORA | {"lora_dropout": 0.05}),
        callbacks=[heard],
    )
    with caplog.at_level(logging.WARNING, "twig.trl"):
        output = trainer.train()
    assert output.global_step == trainer.state.global_step == 4
    assert heard.events[:4] == ["init", "train", "log 0", "evaluate 0"]
    assert heard.events[4:9] == ["begin 0", "end 1", "begin 1", "end 2", "log 2"]
    assert {"save 2", "evaluate 2", "save 4", "evaluate 4"} <= set(heard.events)
    assert heard.events[-2:] == ["log 4", "done"]
    rows = [row for row in trainer.state.log_history if "reward" in row]
    assert [row["step"] for row in rows] == [2, 4]
    metrics = [row for row in read_metrics(tmp_path / "run") if "reward" in row]
    assert rows[0]["reward"] == pytest.approx((metrics[0]["reward"] + metrics[1]["reward"]) / 2)
    assert {"rewards/is_even/mean", "rewards/is_short/mean", "longest", "loss", "learning_rate"} <= set(
        rows[0]
    )
    assert [row["reward"] for row in tracker if "reward" in row] == [row["reward"] for row in metrics]
    settings = twig.load_settings(str(tmp_path / "run"))
    assert settings.task.reward_weights == [1.0, 0.5] and settings.rollout.prompts_per_step == 2
    measured = trainer.evaluate()
    last = [row for row in trainer.state.log_history if "eval_reward" in row]
    assert measured["eval_reward"] == last[-1]["eval_reward"] == pytest.approx(last[-2]["eval_reward"])
    trainer.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "saved")
    assert again.peft_config["default"].r == 4 and AutoTokenizer.from_pretrained(tmp_path / "saved")


def test_everything_without_an_equal_is_in_one_message(model, tmp_path):
    def rollout(prompts, trainer):
        return {}

    class Own(GRPOTrainer):
        def compute_loss(self, *args, **kwargs):
            return 0

        def helper(self):
            return 1

    given = {
        "args": {"top_p": 0.9, "delta": 2.0, "loss_type": "vespo", "optim": "adafactor"},
        "reward_funcs": [share_of_digits, "some/reward-model"],
        "rollout_func": rollout,
        "tools": [share_of_digits],
        "peft_config": None,
    }
    args = GRPOConfig(output_dir=str(tmp_path), **SMALL | given.pop("args"))
    images = Dataset.from_list([{"prompt": "x", "image": "y"}])
    with pytest.raises(UserError) as caught:
        Own(model=model, args=args, train_dataset=images, **given)
    text = str(caught.value)
    for name in ("top_p=0.9", "delta=2.0", "loss_type='vespo'", "optim='adafactor'", "some/reward-model"):
        assert name in text
    for name in ("rollout_func", "tools", "peft_config=None", "Own.compute_loss", "column 'image'"):
        assert name in text
    assert "helper" not in text and "\n" not in text


def test_what_happens_in_another_way_is_said_once(model, tmp_path, caplog):
    class Steps(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            pass

    args = {"use_vllm": True, "deepspeed": None, "dataloader_num_workers": 2, "optim": "adamw_8bit"}
    with caplog.at_level(logging.WARNING, "twig.trl"):
        trainer_of(model, tmp_path, args=args, callbacks=[Steps])
    (record,) = caplog.records
    for name in ("use_vllm=True", "dataloader_num_workers", "adamw_8bit", "Steps.on_substep_end"):
        assert name in record.getMessage()


def test_the_defaults_are_those_of_trl(model, tmp_path):
    config = GRPOConfig(output_dir=str(tmp_path))
    texts = Dataset.from_list([{"prompt": f"{i}+1="} for i in range(6)])
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=share_of_digits,
        args=config,
        train_dataset=texts,
        peft_config=LoraConfig(**LORA),
    )
    flat = trainer.settings.flat()
    assert flat["train.learning_rate"] == 1e-6 and flat["algorithm.name"] == "dapo"
    assert (flat["algorithm.epsilon"], flat["algorithm.epsilon_high"]) == (0.2, 0.2)
    assert flat["rollout.num_generations"] == 8 and flat["rollout.prompts_per_step"] == 1
    assert flat["train.num_train_epochs"] == 3 and flat["train.lr_scheduler_type"] == "linear"
    assert flat["task.chat"] == "never", "TRL leaves a text as it is"


def test_a_run_that_failed_is_resumed_to_the_same_end(model, tmp_path):
    whole = trainer_of(model, tmp_path / "whole")
    whole.train()
    args = {"save_steps": 3}
    with pytest.raises(RuntimeError, match="no more"):
        trainer_of(model, tmp_path / "parts", args=args, callbacks=[Fails]).train()
    with pytest.raises(UserError, match="output_dir"):
        trainer_of(model, tmp_path / "parts").train()
    rest = trainer_of(model, tmp_path / "parts", args=args)
    assert rest.train(resume_from_checkpoint=True).global_step == 4
    weights = [t.model.state_dict() for t in (whole, rest)]
    assert all((weights[1][name] == weight).all() for name, weight in weights[0].items())
    histories = [[row for row in t.state.log_history if "reward" in row] for t in (whole, rest)]
    assert [row["reward"] for row in histories[0]] == [row["reward"] for row in histories[1]]
    with pytest.raises(UserError, match=r"resume_from_checkpoint: .* is not in output_dir"):
        rest.train(resume_from_checkpoint=str(tmp_path / "whole"))


def test_a_callback_ends_a_run(model, tmp_path):
    trainer = trainer_of(model, tmp_path / "run", callbacks=[Heard(last=2)])
    assert trainer.train().global_step == 2
    assert trainer.run.summary["status"] == "finished" and trainer.run.summary["steps"] == 2


def test_an_algorithm_of_twig_takes_the_place_of_the_loss(model, tmp_path, caplog):
    trainer = trainer_of(model, tmp_path, algorithm="t-spmo", args={"epsilon": 0.1, "loss_type": "grpo"})
    assert trainer.settings.algorithm.name == "t-spmo" and trainer.settings.algorithm.epsilon == 0.1
    assert "`algorithm` was passed" in caplog.text
    with pytest.raises(UserError, match="beta=0.5"):
        trainer_of(model, tmp_path, algorithm={"name": "t-spmo"}, args={"beta": 0.5})


def test_a_model_with_an_adapter_is_trained_further(model, tmp_path):
    begun = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(**LORA))
    trainer = trainer_of(begun, tmp_path / "run", peft_config=None, args={"max_steps": 1})
    before = trainer.evaluate(Dataset.from_list([{"prompt": "3+4="}]))
    trainer.train()
    assert 0 <= before["eval_reward"] <= 1 and trainer.model.peft_config["default"].r == 4


def test_a_script_without_peft_config_may_train_an_adapter(model, tmp_path, caplog):
    from twig.trl import with_lora

    args = with_lora.GRPOConfig(output_dir=str(tmp_path), **SMALL)
    texts = Dataset.from_list([{"prompt": f"{i}+1="} for i in range(6)])
    trainer = with_lora.GRPOTrainer(model, share_of_digits, args, texts)
    assert trainer.settings.lora.r == 16 and "TRL trains all weights" in caplog.text
    with pytest.raises(UserError, match=r"twig\.trl\.with_lora"):
        GRPOTrainer(model, share_of_digits, args, texts)


def test_other_names_are_those_of_trl():
    import trl

    import twig.trl

    assert twig.trl.TrlParser is trl.TrlParser and twig.trl.get_peft_config is trl.get_peft_config
    with pytest.raises(AttributeError):
        twig.trl.no_such_name  # noqa: B018


def test_the_adapter_is_pushed(model, tmp_path, monkeypatch):
    pushed = []

    def push(folder, where, progress):
        pushed.append((where, {path.name for path in folder.iterdir()}))
        return "address"

    monkeypatch.setattr("twig.export.export.check_push", lambda where: None)
    monkeypatch.setattr("twig.export.export.push_folder", push)
    args = {"max_steps": 1, "hub_model_id": "me/mine", "push_to_hub": True}
    trainer = trainer_of(model, tmp_path / "run", args=args)
    with pytest.raises(UserError, match="push_to_hub: nothing is trained yet"):
        trainer.push_to_hub()
    trainer.train()
    ((where, names),) = pushed
    assert (where.repo, where.public) == ("me/mine", False)
    assert {"adapter_model.safetensors", "README.md"} <= names
    assert trainer.push_to_hub(dataset_name="some/data") == "address"


def test_several_evaluation_sets_have_their_names(model, tmp_path):
    texts = Dataset.from_list([{"prompt": "1+1="}])
    args = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_of(
        model, tmp_path / "run", args=args, eval_dataset=DatasetDict({"a": texts, "b": texts})
    )
    metrics = trainer.evaluate()
    assert {"eval_a_reward", "eval_b_reward", "eval_a_accuracy"} <= set(metrics)
    trainer.train()
    assert [row["eval_num_examples"] for row in trainer.state.log_history if "eval_num_examples" in row] == [
        2
    ]
    with pytest.raises(AttributeError, match="no 'compute_loss'"):
        trainer.compute_loss  # noqa: B018
