"""Faults while a run trains: what only records it may fail, what saves it ends it cleanly, and numbers that
are none move nothing."""

import errno
import hashlib
import json
import random
import re
from functools import partial

import numpy as np
import pytest
import torch
from faults import Failing, one_of_each
from pyarrow import parquet
from saved import build_tokenizer, save_model
from small_runs import Heard, ask_to_stop, at, digits, record, rows_of, small_settings, train_small
from transformers import AutoModelForCausalLM

from twig.cli.app import main
from twig.common.errors import UserError
from twig.common.files import FolderLock
from twig.engine.load import load_model
from twig.engine.lora import attach
from twig.runs import checkpoint
from twig.runs.reader import is_run, read_metrics
from twig.runs.resume import changes, decided_model, open_run
from twig.runtime.rng_state import random_states, restore_random_states, seed_all

STEPS = 4
SHORT = (f"train.max_steps={STEPS}", "rollout.max_completion_length=5")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"), context=256)


@pytest.fixture
def settings(base):
    return partial(small_settings, base, *SHORT)


@pytest.fixture
def run(settings, tmp_path):
    def train(name, *overrides, **given):
        return train_small(settings(*overrides), tmp_path / name, **given)

    return train


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """What a run leaves that nothing happened to, as `record` has it."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return record(train_small(small_settings(base, *SHORT), output).folder, STEPS)


# The disk


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions"])
def test_where_a_record_cannot_be_written_training_goes_on_with_a_warning(run, whole, name):
    heard = Heard()
    with Failing(0, errno.ENOSPC, name, forever=True) as failing:
        done = run("run", progress=heard)
    assert failing.failed and done.summary["status"] == "finished"
    assert heard.heard(f"^message .*{name}.*No space left on device") == 1
    adapter = (done.folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert adapter == whole["adapter"]
    assert not list(done.folder.rglob("*.tmp")), "nothing half is left"


def test_rows_wait_for_a_disk_that_takes_them(run, whole):
    """The second write of metrics fails: its row is there in the end, in its place."""
    with Failing(2, errno.ENOSPC, "metrics.jsonl") as failing:
        done = run("run")
    assert failing.failed and rows_of(done.folder) == whole["metrics"]


@pytest.mark.parametrize("at_call, name", [(3, ".step-4.tmp"), (0, ".adapter-best.tmp"), (0, "summary.json")])
def test_where_the_run_cannot_be_saved_it_ends_cleanly_and_goes_on(run, whole, tmp_path, at_call, name):
    with Failing(at_call, errno.EROFS, name), pytest.raises(UserError) as ended:
        run("run")
    line = str(ended.value)
    assert "cannot be written (Read-only file system)" in line and "\n" not in line
    assert f"twig train {tmp_path / 'run'} --resume" in line
    assert record(run("run", resume=True).folder, STEPS) == whole


@pytest.mark.slow
def test_a_disk_that_fails_at_any_call_loses_nothing(run, whole, tmp_path):
    """Each kind of write, flush and rename of a run fails, half written: the run ends with one line or goes
    on with a warning, and in the end everything is as if nothing had happened."""
    with Failing(10**9, 0, "/run/") as seen:
        run("seen/run")
    calls = one_of_each(seen.calls, random.Random(1))
    assert len(calls) > 30
    for number, call in enumerate(calls):
        name, folder, ended = f"{call}/run", tmp_path / str(call) / "run", False
        with Failing(call, (errno.ENOSPC, errno.EROFS, errno.EIO)[number % 3], "/run/"):
            try:
                run(name)
            except UserError as error:
                ended = True
                assert "cannot be written" in str(error) and "\n" not in str(error)
        assert not list(folder.glob("**/*.tmp")) and not list(folder.glob("**/*.old")), seen.calls[call]
        run(name, resume=is_run(folder))
        if ended or "completions" not in seen.calls[call][1]:  # those of one step may be missing
            assert record(folder, STEPS) == whole, seen.calls[call]


def test_the_command_line_says_where_the_disk_is_full(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = (
        f"train quickstart --output run model.name={base} train.max_steps=1 eval.before=false eval.limit=1"
    )
    command += " rollout.max_completion_length=3 rollout.prompts_per_step=1 rollout.num_generations=2"
    with Failing(0, errno.ENOSPC, "checkpoints"):
        assert main([*command.split(), "log.progress=quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"twig: {tmp_path / 'run'}: ") and "No space left on device" in line
    assert f"twig train {tmp_path / 'run'} --resume" in line
    held = FolderLock(tmp_path / "run")
    assert held.take()
    assert main([*command.split(), "--resume"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"twig: --resume {tmp_path / 'run'}: another process")
    held.release()
    assert main([*command.split(), "log.progress=quiet", "--resume"]) == 0


def test_a_second_signal_within_a_checkpoint_leaves_the_one_before(run, whole, tmp_path):
    class Signalled(Failing):
        def now(self):
            ask_to_stop()
            ask_to_stop()

    with Signalled(4, 0, ".step-4.tmp"), pytest.raises(KeyboardInterrupt):
        run("run")
    heard = Heard()
    assert record(run("run", resume=True, progress=heard).folder, STEPS) == whole
    assert heard.heard("from step 2") == 1


# Numbers that are none


def huge(steps):
    """The share of digits, but so large in these steps that float32 cannot hold the gradient's square."""

    def reward(completions, trainer_state=None, **kwargs):
        large = trainer_state is not None and trainer_state.global_step + 1 in steps
        return [value * (1e30 if large else 1) for value in digits(completions)]

    return reward


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(run):
    heard = Heard()
    overrides = ["algorithm.name=grpo", "algorithm.scale_rewards=none", "algorithm.num_iterations=2"]
    done = run("run", *overrides, "train.save_steps=1", "train.save_total_limit=null", reward_funcs=huge([2]))
    rows = [row for row in rows_of(done.folder) if "loss" in row]
    assert [row["optimizer/skipped"] for row in rows] == [0, 1, 0, 0]
    assert rows[1]["grad_norm"] is None and all(row["grad_norm"] > 0 for row in rows if row["step"] != 2)
    saved = [checkpoint.load(done.folder / "checkpoints" / f"step-{step}")[0] for step in (1, 2, 3)]
    for name in ("adapter", "optimizer"):
        assert all(torch.equal(value, saved[1][name][key]) for key, value in saved[0][name].items())
    assert any(not torch.equal(v, saved[2]["adapter"][k]) for k, v in saved[1]["adapter"].items())
    assert "step 2 was skipped" in (done.folder / "warnings.txt").read_text()
    assert heard.said == []


def test_too_many_such_steps_in_a_row_end_the_run_with_the_batch_saved(run, tmp_path):
    """They are counted across a stop, and a good step in between starts the count anew."""
    overrides = ["algorithm.name=grpo", "algorithm.scale_rewards=none", "train.max_skipped_steps=2"]
    bad = {"reward_funcs": huge([1, 3, 4])}
    assert run("run", *overrides, **bad, progress=Heard(step=at(3, ask_to_stop))).summary["steps"] == 3
    with pytest.raises(UserError, match="2 steps in a row.*step-4.parquet") as ended:
        run("run", *overrides, **bad, resume=True)
    assert "train.learning_rate" in str(ended.value) and "\n" not in str(ended.value)
    batch = parquet.read_table(tmp_path / "run" / "nonfinite" / "step-4.parquet").to_pylist()
    assert len(batch) == 8 and max(row["reward"] for row in batch) > 1e28
    assert [row["optimizer/skipped"] for row in rows_of(tmp_path / "run") if "loss" in row] == [1, 0, 1, 1]


def test_a_step_without_any_signal_ends_a_row_of_skipped_steps(run):
    """Steps 1 and 3 are skipped; the completions of step 2 all have the same reward."""
    bad = huge([1, 3])

    def reward(completions, trainer_state=None, **kwargs):
        alike = trainer_state is not None and trainer_state.global_step == 1
        return [0.5] * len(completions) if alike else bad(completions, trainer_state)

    overrides = ["algorithm.name=grpo", "algorithm.scale_rewards=none", "train.max_skipped_steps=2"]
    rows = [row for row in rows_of(run("run", *overrides, reward_funcs=reward).folder) if "loss" in row]
    assert [row["optimizer/skipped"] for row in rows[:4]] == [1, 0, 1, 0]
    assert rows[1]["tokens/selected"] == 0 < rows[3]["tokens/selected"]


def test_a_model_that_is_not_finite_is_one_line(run, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="probabilities are not finite"):
        run("run", "eval.before=false", "model.engine=plain", model=model, tokenizer=build_tokenizer())


# Reward functions, trackers, tokenizers, prompts


@pytest.mark.parametrize(
    "returned, pattern",
    [
        (lambda n: [float("nan")] * n, "returned nan for completion 0"),
        (lambda n: [1.0, float("inf"), *[0.0] * (n - 2)], "returned inf for completion 1"),
        (lambda n: [1.0] * (n - 1), "returned 7 values for 8 completions"),
        (lambda n: 1 / 0, "ZeroDivisionError.*traceback: .*traceback.txt"),
    ],
)
def test_a_reward_function_that_fails_ends_the_run_with_one_line_and_it_resumes(
    run, whole, returned, pattern
):
    """In step 3: what was saved at step 2 is what the run goes on from, once the function is right."""

    def digits_(completions, trainer_state=None, **kwargs):
        if trainer_state is not None and trainer_state.global_step == 2:
            return returned(len(completions))
        return digits(completions)

    digits_.__name__ = "digits"
    with pytest.raises(UserError, match=pattern) as ended:
        run("run", reward_funcs=digits_)
    assert "\n" not in str(ended.value)
    assert record(run("run", resume=True).folder, STEPS) == whole


def test_a_tracker_that_fails_while_training_is_left_out_with_a_warning(run, whole, monkeypatch):
    import sys
    from types import ModuleType

    def init(**given):
        return type("Run", (), {"log": fail, "finish": fail})()

    def fail(*args, **kwargs):
        calls.append(args)
        raise ConnectionError("no\nnetwork")

    calls, module, heard = [], ModuleType("wandb"), Heard()
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    done = run("run", "log.report_to=[wandb]", progress=heard)
    assert heard.heard(r"warning: log.report_to: wandb fails .ConnectionError: no network.") == 1
    assert len(calls) == 2, "one row, and the end"
    assert record(done.folder, STEPS)["metrics"] == whole["metrics"]
    # One that does not start stops a run that begins, and none that goes on.
    module.init = fail
    with pytest.raises(UserError, match="wandb does not start"):
        run("new", "log.report_to=[wandb]")
    heard = Heard()
    run("run", "log.report_to=[wandb]", "train.max_steps=5", resume=True, progress=heard)
    assert heard.heard("wandb does not start .ConnectionError: no network. and is left out") == 1


def test_a_tokenizer_without_a_pad_token_is_none_the_worse(run, whole, base):
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    done = run("run", model=AutoModelForCausalLM.from_pretrained(base), tokenizer=tokenizer)
    assert record(done.folder, STEPS)["adapter"] == whole["adapter"]


def test_without_any_end_token_a_run_is_refused(run, base):
    tokenizer, model = build_tokenizer(), AutoModelForCausalLM.from_pretrained(base)
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(UserError, match="end token"):
        run("run", model=model, tokenizer=tokenizer)


def test_a_prompt_longer_than_the_context_is_refused_with_its_length(run):
    long = [{"prompt": "7" * 256, "wanted": "1"}]
    with pytest.raises(UserError, match="256 tokens.*context.*256"):
        run("train", train_dataset=long)
    with pytest.raises(UserError, match="256 tokens"):
        run("eval", eval_dataset=long)
    heard = Heard()
    fits = [{"prompt": "7" * 252, "wanted": "1"}]
    assert run("fits", "train.max_steps=1", train_dataset=fits, progress=heard).summary["steps"] == 1
    assert heard.heard("252 tokens.*256.*rollout.max_completion_length=4") == 1


# Time, random numbers, and settings that change


def test_a_run_in_slices_of_time_is_the_run_in_one_piece(run, whole):
    """Each slice has time for one step; the evaluation at the end has one of its own."""
    steps = []
    for number in range(STEPS + 1):
        heard = Heard()
        part = run("run", "train.max_time=0.001", resume=number > 0, progress=heard)
        steps.append((part.summary["status"], part.summary["steps"]))
        assert heard.heard("train.max_time=0.001 is up") == (number < STEPS)
    assert steps == [("stopped", n) for n in range(1, STEPS + 1)] + [("finished", STEPS)]
    assert record(part.folder, STEPS) == whole


def draws():
    """A number of each generator: two from those that make them in pairs and keep one."""
    return [random.gauss(0, 1), np.random.standard_normal(), float(torch.randn(()))]


def test_every_random_state_is_kept():
    seed_all(3)
    first = draws()
    kept = random_states()
    expected = [draws() for _ in range(3)]
    restore_random_states({name: value.clone() for name, value in kept.items()})
    assert [draws() for _ in range(3)] == expected
    seed_all(3)
    assert draws() == first


def test_a_reward_that_draws_random_numbers_draws_the_same_after_a_stop(run):
    def noisy(completions, **kwargs):
        # not from Python's generator: the checks of types, which only tests have, draw from it
        noise = [np.random.standard_normal() + float(torch.randn(())) for _ in completions]
        return (np.array(digits(completions)) + 0.01 * np.array(noise)).tolist()

    noise = run("whole", reward_funcs=noisy)
    for step in (1, 3):
        run("parts", reward_funcs=noisy, resume=step > 1, progress=Heard(step=at(step, ask_to_stop)))
    parts = run("parts", reward_funcs=noisy, resume=True)
    assert record(parts.folder, STEPS) == record(noise.folder, STEPS)


CHANGES = {
    "train.max_steps=9": "harmless",
    "train.save_steps=7": "harmless",
    "train.max_time=1h": "harmless",
    "eval.limit=2": "harmless",
    "log.completions_steps=0": "harmless",
    "rollout.wave_size=3": "harmless",
    "train.pack_size=64": "harmless",
    "train.checkpoint_layers=true": "harmless",
    "model.num_threads=1": "harmless",
    "model.dtype=float32": "the same",
    "model.device=cpu": "the same",
    "model.dtype=float64": "model.dtype=float32",
    "train.learning_rate=0.1": "train.learning_rate=0.05",
    "train.seed=3": "train.seed=0",
    "algorithm.num_iterations=2": "algorithm.num_iterations=1",
    "rollout.num_generations=5": "rollout.num_generations=4",
    "task.prompt_template=a{prompt}": "task.prompt_template=null",
}


@pytest.mark.parametrize("override, expected", CHANGES.items())
def test_a_changed_setting_is_harmless_or_refused_by_name(settings, override, expected):
    decided = {"model.dtype": "float32", "model.device": "cpu", "model.attn_implementation": "sdpa"}
    key = override.partition("=")[0]
    if expected in ("harmless", "the same"):
        changed = changes(settings(), settings(override), decided)
        assert list(changed) == ([key] if expected == "harmless" else [])
        return
    with pytest.raises(UserError, match=f"^{key}: .*{re.escape(expected)}"):
        changes(settings(), settings(override), decided)


@pytest.mark.parametrize("key", ["train.max_steps=9", "train.num_train_epochs=2"])
def test_the_length_may_not_change_under_a_schedule_that_ends_with_it(settings, key):
    overrides = ["train.lr_scheduler_type=linear"]
    with pytest.raises(UserError, match=f"^{key.partition('=')[0]}: .*train.lr_scheduler_type=linear"):
        changes(settings(*overrides), settings(*overrides, key), {})
    assert len(changes(settings(), settings(key), {})) == 1


def test_what_changed_is_said_and_what_auto_stood_for_is_kept(run, settings, tmp_path):
    run("run", progress=Heard(step=at(2, ask_to_stop)))
    heard = Heard()
    start = open_run(settings("train.pack_size=64"), tmp_path / "run", True, heard)
    start.log.close()
    assert heard.heard("^message train.pack_size: 64") == 1
    assert "train.pack_size: 64" in (tmp_path / "run" / "warnings.txt").read_text()
    state = checkpoint.load_state(start.checkpoint)
    path = start.checkpoint / "state.json"
    assert state["decided"] == {
        "model.device": "cpu",
        "model.dtype": "float32",
        "model.attn_implementation": "sdpa",
        "model.kernels": "torch",
    }
    path.write_text(json.dumps(state | {"decided": state["decided"] | {"model.dtype": "float64"}}))
    kept = decided_model(settings().model, start)
    assert (kept.device, kept.dtype, kept.attn_implementation) == ("cpu", "float64", "sdpa")
    assert decided_model(settings("model.dtype=float32").model, start).dtype == "float32"


def test_a_changed_size_is_used_and_changes_nothing(run, whole):
    run("run", progress=Heard(step=at(2, ask_to_stop)))
    done = run("run", "rollout.wave_size=3", resume=True)
    state = checkpoint.load_state(done.folder / "checkpoints" / f"step-{STEPS}")
    assert state["sizes"]["wave_size"] == 3
    for row, expected in zip(read_metrics(done.folder), whole["metrics"], strict=True):
        assert row["step"] == expected["step"]
        if "loss" in row:
            assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)


# The adapter


def parts_of(safetensors: bytes) -> tuple[dict, bytes]:
    """The header of a safetensors file, and its tensors."""
    start = 8 + int.from_bytes(safetensors[:8], "little")
    return json.loads(safetensors[8:start]), safetensors[start:]


def test_the_adapter_is_what_peft_writes(base, tmp_path):
    model, _ = load_model(str(base))
    adapted = attach(model, r=4, alpha=8.0, target_modules=["v_proj", "q_proj"])
    adapted.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    checkpoint.save_adapter(adapted, tmp_path / "ours")
    checkpoint.save_adapter(adapted, tmp_path / "ours")
    (ours, our_config), (theirs, their_config) = (
        (
            (tmp_path / who / "adapter_model.safetensors").read_bytes(),
            json.loads((tmp_path / who / "adapter_config.json").read_text()),
        )
        for who in ("ours", "theirs")
    )
    their_config["target_modules"].sort()
    assert our_config == their_config
    headers, tensors = zip(*map(parts_of, (ours, theirs)), strict=True)
    assert tensors[0] == tensors[1]
    assert headers[0].pop("__metadata__") == headers[1].pop("__metadata__") | {
        "sha256": hashlib.sha256(tensors[0]).hexdigest()
    }
    assert headers[0] == headers[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "theirs"]
