"""Whole runs: stopped and resumed, finished, broken off; what Python may pass; what is in the run folder."""

import asyncio
import hashlib
import inspect
import json
import re
import signal
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from pyarrow import parquet
from saved import build_tokenizer
from small_runs import EVAL, STEPS, TRAIN, Heard, ask_to_stop, at, completions_of, digits, record, rows_of
from transformers import AutoModelForCausalLM

import twig
from twig.cli.app import main
from twig.common.errors import UserError
from twig.common.progress import Progress
from twig.config.load import load
from twig.config.sizes import SIZE_KEYS
from twig.engine import sampler
from twig.engine.load import load_model
from twig.engine.lora import attach
from twig.planner.choose import choose_sizes
from twig.report.credit_map import read_groups, saved_steps
from twig.runs import checkpoint
from twig.runs.reader import read_evaluations, read_metrics, read_summary
from twig.tasks.load import load_task

ALGORITHMS = {
    "t-spmo": ["algorithm.name=t-spmo"],
    "t-spmo with replay": ["algorithm.replay.probability=0.7", "algorithm.l2=0.01", "task.correct_at=0.3"],
    "t-spmo twice on a batch": ["algorithm.num_iterations=2", "algorithm.replay.probability=0.7"],
    "grpo twice on a batch": ["algorithm.name=grpo", "algorithm.num_iterations=2", "algorithm.beta=0.1"],
    "s-grpo": ["algorithm.name=s-grpo", "algorithm.alpha=2", "algorithm.p=0.5", "algorithm.k=5"],
}


def wanted(completions, wanted, **kwargs):
    """1 where a completion has the digit of the column `wanted`."""
    return [float(digit in text) for text, digit in zip(completions, wanted, strict=True)]


class Crash(Exception):
    pass


def crash():
    raise Crash


# Stopped and resumed


def stop_by_signal(run, *words):
    stopped = run("parts", *words, progress=Heard(step=at(3, ask_to_stop)))
    assert (stopped.summary["status"], stopped.summary["steps"]) == ("stopped", 3)
    return run("parts", *words, resume=True)


def crash_between_checkpoints(run, *words):
    with pytest.raises(Crash):
        run("parts", *words, progress=Heard(step=at(3, crash)))
    return run("parts", *words, resume=True)


def ask_for_more_steps(run, *words):
    run("parts", *words, "train.max_steps=3")
    return run("parts", *words, resume=True)


def stop_at_every_step(run, *words):
    for step in range(1, STEPS):
        run("parts", *words, resume=step > 1, progress=Heard(step=at(step, ask_to_stop)))
    return run("parts", *words, resume=True)


QUICK = "t-spmo with replay"
WAYS = [
    pytest.param(name, stop_by_signal, marks=() if name == QUICK else pytest.mark.slow) for name in ALGORITHMS
]
WAYS += [(QUICK, crash_between_checkpoints), (QUICK, ask_for_more_steps)]
WAYS += [("t-spmo twice on a batch", stop_at_every_step)]


@pytest.mark.parametrize("name, way", WAYS, ids=lambda value: getattr(value, "__name__", value))
def test_a_run_in_parts_is_the_run_in_one_piece(run, whole, name, way):
    """Bit for bit: adapter, optimizer, metrics, completions and the place in the data, in the second pass."""
    parts = way(run, *ALGORITHMS[name])
    expected, found = record(whole(*ALGORITHMS[name])), record(parts.folder)
    if way is ask_for_more_steps:  # the shorter run's last evaluation was one more
        for of in (expected, found):
            del of["state"]["standing"]["evaluations"], of["summary"]["accuracy_best"], of["evaluations"]
    for part in expected:
        assert found[part] == expected[part], part
    assert [row["step"] for row in expected["metrics"]] == [1, 2, 2, 3, 4, 4, 5, 6]
    assert all(row["grad_norm"] > 0 for row in expected["metrics"] if "grad_norm" in row)
    assert all(any(tensor) for tensor in expected["tensors"]["adapter"].values()), "B is no longer 0"
    if "replay" in name:
        replayed = [row["replay/groups"] for row in expected["metrics"] if "replay/groups" in row]
        assert replayed[3] > 0, "a restart waited where the run was stopped"


def test_a_damaged_checkpoint_is_passed_over(run, whole, tmp_path):
    run("parts", progress=Heard(step=at(5, ask_to_stop)))
    (tmp_path / "parts" / "checkpoints" / "step-5" / "adapter.safetensors").write_bytes(b"torn")
    heard = Heard()
    run("parts", resume=True, progress=heard)
    assert heard.heard("from step 4") == 1
    assert "step-5 is damaged" in (tmp_path / "parts" / "warnings.txt").read_text()
    assert record(tmp_path / "parts") == record(whole())


def test_without_a_checkpoint_a_run_starts_from_the_beginning_and_says_so(run, tmp_path):
    whole = run("whole", "train.save_steps=0")
    heard = Heard(step=at(4, crash))
    with pytest.raises(Crash):
        run("parts", "train.save_steps=0", progress=heard)
    assert heard.heard("^message") == 0
    assert len(rows_of(tmp_path / "parts")) > 3
    heard = Heard()
    run("parts", "train.save_steps=0", resume=True, progress=heard)
    assert heard.heard("no checkpoint yet: the run starts from the beginning") == 1
    assert record(tmp_path / "parts") == record(whole.folder)


def test_a_finished_run_is_returned_as_it_is(run):
    def never(completions, **kwargs):
        raise AssertionError("nothing is to be rewarded")

    def files():
        return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in first.folder.rglob("*") if p.is_file()}

    first = run("run")
    before = files()
    again = run("run", resume=True, reward_funcs=never)
    assert files() == before
    assert again.summary == first.summary
    expected = dict(first.model.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in again.model.named_parameters())


def test_a_finished_run_without_checkpoints_is_not_started_over(run, tmp_path):
    folder = run("run", "train.max_steps=1").folder
    (folder / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="^--resume: .* is finished and has no checkpoint"):
        run("run", resume=True)


def test_a_finished_run_that_goes_on_forgets_its_last_evaluation(run):
    run("run", "train.max_steps=2")
    stopped = run("run", "train.max_steps=5", resume=True, progress=Heard(step=at(3, ask_to_stop)))
    assert (stopped.summary["steps"], stopped.summary["accuracy_after"]) == (3, None)
    assert load(str(stopped.folder)).train.max_steps == 5, "config.yaml is what the run does now"
    # Ended between the last checkpoint and the summary: the summary on disk is that of an earlier end.
    summary = json.loads((stopped.folder / "summary.json").read_text())
    finished = run("run", "train.max_steps=5", resume=True)
    (stopped.folder / "summary.json").write_text(json.dumps(summary | {"status": "finished", "steps": 2}))
    again = run("run", "train.max_steps=5", resume=True)
    assert again.summary["steps"] == 5
    assert again.summary["accuracy_after"] == finished.summary["accuracy_after"] is not None


def test_what_is_trained_is_never_evaluated_as_before(run):
    run("run", "eval.before=false", "train.max_steps=2")
    heard = Heard()
    assert run("run", "train.max_steps=3", resume=True, progress=heard).summary["accuracy_before"] is None
    assert heard.heard("evaluation before") == 0 and heard.heard("evaluation after") == 1


# Broken off


def in_evaluation(number, action):
    """The action when the `number`-th evaluation begins, counted from 1."""
    begun = []

    def phase(name):
        begun.append(name)
        if name == "evaluating" and begun.count(name) == number:
            action()

    return phase


BEFORE, AT_STEP_2, AFTER = 1, 2, 4
QUICK_STOPS = {(BEFORE, signal.SIGINT), (AT_STEP_2, signal.SIGTERM), (AFTER, signal.SIGINT)}


@pytest.mark.parametrize(
    "evaluation, steps, number",
    [
        pytest.param(*when, number, marks=() if (when[0], number) in QUICK_STOPS else pytest.mark.slow)
        for when in ((BEFORE, 0), (AT_STEP_2, 2), (AFTER, STEPS))
        for number in (signal.SIGINT, signal.SIGTERM)
    ],
)
def test_a_run_stopped_in_an_evaluation_goes_on(run, whole, evaluation, steps, number):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    heard = Heard(phase=in_evaluation(evaluation, lambda: signal.raise_signal(number)))
    stopped = run("parts", progress=heard)
    assert (stopped.summary["status"], stopped.summary["steps"]) == ("stopped", steps)
    assert stopped.summary["accuracy_after"] is None
    # Between two steps an evaluation is part of the record, so it comes to its end.
    assert heard.heard("evaluation step 2") == (steps >= 2)
    assert read_summary(stopped.folder) == stopped.summary
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert record(run("parts", resume=True).folder) == record(whole())


def test_a_signal_in_the_last_step_leaves_the_last_evaluation_for_later(run):
    stopped = run("run", progress=Heard(step=at(STEPS, ask_to_stop)))
    assert (stopped.summary["status"], stopped.summary["steps"]) == ("stopped", STEPS)
    heard = Heard()
    assert run("run", resume=True, progress=heard).summary["status"] == "finished"
    assert heard.heard("^step") == 0 and heard.heard("evaluation after") == 1


def test_a_second_signal_stops_within_the_step(run, whole):
    twice = Heard(step=at(3, lambda: (ask_to_stop(), ask_to_stop())))
    with pytest.raises(KeyboardInterrupt):
        run("parts", progress=twice)
    heard = Heard()
    assert record(run("parts", resume=True, progress=heard).folder) == record(whole())
    assert heard.heard("from step 2") == 1


def test_the_command_line_ends_the_same_wherever_it_is_stopped(base, tmp_path, monkeypatch, capsys):
    from twig.evaluation.evaluate import evaluate_policy

    def interrupted(*args, **kwargs):
        ask_to_stop()
        return evaluate_policy(*args, **kwargs)

    monkeypatch.chdir(tmp_path)
    words = f"train quickstart --output run model.name={base} train.max_steps=1 eval.limit=3".split()
    words += "rollout.max_completion_length=4 rollout.prompts_per_step=1 rollout.num_generations=2".split()
    for before in ("true", "false"):  # interrupted before training, then after it
        monkeypatch.setattr("twig.training.session.evaluate_policy", interrupted)
        more = [f"eval.before={before}", *(["--resume"] if before == "false" else [])]
        assert main([*words, *more]) == 130
        shown, said = capsys.readouterr()
        assert said.splitlines()[-1].endswith("twig train run --resume")
        assert f"{1 if before == 'false' else 0} steps, stopped" in shown
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--resume"]) == 0
    assert read_summary(tmp_path / "run")["status"] == "finished"


# What is trained, and what is not


def checksum(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_saved_adapter_is_the_trained_policy_and_the_base_is_untouched(run, base):
    files = {path: checksum(path) for path in base.iterdir()}
    done = run("run")
    trained = done.model
    fresh = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = fresh(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(fresh, done.folder / "adapter").eval()(input_ids=ids).logits
        assert torch.equal(loaded, trained(input_ids=ids).logits)
        with trained.disable_adapter():
            assert torch.equal(trained(input_ids=ids).logits, before)
    assert not torch.allclose(loaded, before)
    assert trained.peft_config["default"].base_model_name_or_path == str(base)
    assert {path: checksum(path) for path in base.iterdir()} == files


def test_the_weights_of_a_model_that_is_passed_stay_as_they_are(run, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = {"model": model, "tokenizer": build_tokenizer()}
    trained = run("run", **given)
    with pytest.raises(UserError, match="model: .*inside a PEFT model. Pass the PEFT model itself"):
        run("second", **given)
    after = trained.model.unload()
    assert after is model
    assert set(after.state_dict()) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in after.state_dict().items())
    assert record(run("second", **given).folder) == record(trained.folder)


def test_a_peft_model_is_trained_on_as_its_saved_adapter_is(run, base):
    """Bit for bit, the KL to where it began included; a resume needs the adapter that the run began with."""
    words = ["algorithm.name=grpo", "algorithm.beta=0.1", "lora.use_rslora=true", "lora.r=3"]
    first = run("first", *words, "train.max_steps=1")
    saved = run("saved", *words, f"model.adapter={first.folder / 'adapter'}")

    def loaded():
        fresh = AutoModelForCausalLM.from_pretrained(base)
        return PeftModel.from_pretrained(fresh, first.folder / "adapter")

    given = {"tokenizer": build_tokenizer()}
    peft_model = loaded()
    passed = run("passed", *words[:2], model=peft_model, **given)
    assert passed.model is peft_model
    expected, result = record(saved.folder), record(passed.folder)
    assert result["tensors"] == expected["tensors"] and result["metrics"] == expected["metrics"]
    assert load(str(passed.folder)).lora.r == 3 and load(str(passed.folder)).lora.use_rslora
    with pytest.raises(UserError, match="adapter"):
        run("passed", *words[:2], "train.max_steps=9", model=peft_model, resume=True, **given)
    with pytest.raises(UserError, match="peft_config: the model that was passed has an adapter"):
        run("other", model=loaded(), peft_config=LoraConfig(), **given)


@pytest.mark.parametrize(
    "words",
    [["algorithm.l2=0.5"], ALGORITHMS["s-grpo"], ["algorithm.name=grpo", "algorithm.num_iterations=2"]],
)
def test_equal_rewards_everywhere_change_nothing(run, words):
    """No gradient, no decay, no moment of Adam: 1/3 has a spurious standard deviation."""
    equal = run(
        "run",
        *words,
        "train.weight_decay=0.5",
        reward_funcs=lambda completions, **kw: [1 / 3] * len(completions),
    )
    fresh, _ = load_model(load(str(equal.folder)).model)
    expected = dict(attach(fresh, r=16, alpha=32.0, target_modules=["q_proj", "v_proj"]).named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in equal.model.named_parameters())
    tensors, _ = checkpoint.load(equal.folder / "checkpoints" / f"step-{STEPS}")
    assert tensors["optimizer"] == {}
    rows = [row for row in rows_of(equal.folder) if "reward" in row]
    assert {row["frac_reward_zero_std"] for row in rows} == {1.0}
    assert {(row["grad_norm"], row["tokens/selected"], row["tokens/nodes_run"]) for row in rows} == {
        (0.0, 0, 0)
    }


# What Python passes


def test_objects_give_the_run_of_the_same_files(run, base, tmp_path, monkeypatch):
    """Model, tokenizer, data and rewards, passed or named: the same run, the same revision of the data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for split, rows in (("train", TRAIN), ("test", EVAL)):
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rewards.py").write_text(inspect.getsource(digits) + "\n\n" + inspect.getsource(wanted))
    names = ["task.path=data", "task.reward_file=rewards.py:digits,wanted", "task.reward_weights=[1,2]"]
    files = run("files", *names, reward_funcs=None, train_dataset=None, eval_dataset=None)
    given = run(
        "objects",
        "task.reward_weights=[1,2]",
        "model.name=elsewhere",
        model=AutoModelForCausalLM.from_pretrained(base),
        tokenizer=build_tokenizer(),
        reward_funcs=[digits, wanted],
        train_dataset=datasets.Dataset.from_list(TRAIN),
    )
    assert record(given.folder) == record(files.folder)
    assert any(row["rewards/wanted/mean"] > 0 for row in rows_of(given.folder) if "reward" in row)
    environments = [json.loads((r.folder / "environment.json").read_text()) for r in (files, given)]
    passed = [environment.pop("passed") for environment in environments]
    for name in ("reward_file_sha256", "model_sha256"):  # of what has no file there is none
        assert [environment.pop(name) is None for environment in environments] == [False, True]
    assert passed == [None, "model, tokenizer, reward_funcs, train_dataset, eval_dataset"]
    assert environments[0] == environments[1]


def test_a_model_without_its_tokenizer_is_refused(run, base):
    with pytest.raises(UserError, match="tokenizer: .*tokenizer="):
        run("run", model=AutoModelForCausalLM.from_pretrained(base))


def test_an_async_reward_gives_the_same_run(run):
    in_step = digits

    async def later(completions, **kwargs):
        await asyncio.sleep(0)
        return in_step(completions)

    later.__name__ = "digits"
    assert record(run("later", reward_funcs=later).folder) == record(run("now").folder)


def test_an_async_reward_works_while_the_next_wave_is_sampled(run, monkeypatch):
    """A step of two waves: the second does not begin before the first one's reward does."""
    begun, waves, real, in_step = threading.Event(), [], sampler._LOOPS["layers"], digits

    async def later(completions, **kwargs):
        begun.set()
        return in_step(completions)

    def sampling(*args):
        waves.append(len(args[1].rows))
        if len(waves) % 2 == 0:
            assert begun.wait(20), "no reward began while there was more to sample"
            begun.clear()
        return real(*args)

    later.__name__ = "digits"
    words = (
        "train.max_steps=2",
        "rollout.wave_size=4",
        "eval.before=false",
        "eval.steps=0",
        "train.save_steps=0",
    )
    now = run("now", *words, eval_dataset=None).folder
    monkeypatch.setitem(sampler._LOOPS, "layers", sampling)
    overlapped = run("later", *words, eval_dataset=None, reward_funcs=later).folder
    assert waves == [4, 4] * 2
    assert completions_of(overlapped, 2) == completions_of(now, 2) and rows_of(overlapped) == rows_of(now)


def test_progress_advances_while_completions_are_sampled(run):
    phases = []

    class Recorded(Progress):
        def phase(self, name, total=None):
            phases.append((name, total, []))

        def advance(self, count=1):
            phases[-1][2].append(count)

    run("run", "train.max_steps=2", progress=Recorded())
    sampling = [(total, advanced) for name, total, advanced in phases if name == "sampling"]
    assert [total for total, _ in sampling] == [8, 8]
    assert [sum(advanced) for _, advanced in sampling] == [8, 8]
    assert max(len(advanced) for _, advanced in sampling) > 1
    assert all(sum(advanced) == total for name, total, advanced in phases if name == "evaluating")


def test_a_group_without_rewards_is_left_out(run):
    """None for every completion of one prompt: the others train as if it were worth nothing to know."""

    def some(prompts, completions, **kwargs):
        return [
            None if prompt == "abc?" else value
            for prompt, value in zip(prompts, digits(completions), strict=True)
        ]

    folder = run("run", reward_funcs=some).folder
    left_out = 0
    for row in rows_of(folder):
        if "reward" not in row:
            continue
        completions = completions_of(folder, row["step"])
        without = [c for c in completions if c["prompt"] == "abc?"]
        given = [c["reward"] for c in completions if c["prompt"] != "abc?"]
        assert all(c["reward"] is None and not any(c["weights"]) for c in without)
        assert json.loads(without[0]["rewards"]) == {"some": None} if without else True
        assert row["reward"] == pytest.approx(np.mean(given))
        left_out += len(without)
    assert 0 < left_out < 8 * STEPS


def test_no_reward_anywhere_is_no_step_and_a_reward_of_null(run):
    done = run("run", reward_funcs=lambda completions, **kwargs: [None] * len(completions))
    steps = [row for row in rows_of(done.folder) if "grad_norm" in row]
    assert [(row["grad_norm"], row["reward"]) for row in steps] == [(0.0, None)] * STEPS
    assert done.summary["accuracy_after"]["reward"] is None
    assert read_summary(done.folder)["accuracy_best"]["reward"] is None


def test_an_evaluation_means_over_the_rewards_that_were_given(run):
    def once(prompts, completions, **kwargs):
        return [0.25 if prompt == "x?" else None for prompt in prompts]

    assert run("run", "train.max_steps=1", reward_funcs=once).summary["accuracy_before"]["reward"] == 0.25


def test_without_anything_to_evaluate_on_a_run_trains_and_says_so_once(run):
    heard = Heard()
    done = run("run", eval_dataset=None, progress=heard)
    assert heard.heard("nothing to evaluate on") == 1
    assert heard.heard("^phase evaluating|^evaluation") == 0
    assert done.summary["status"] == "finished"
    assert [done.summary[f"accuracy_{when}"] for when in ("before", "after", "best")] == [None] * 3
    assert not (done.folder / "adapter-best").exists() and (done.folder / "adapter").is_dir()
    assert [row["step"] for row in rows_of(done.folder)] == list(range(1, STEPS + 1))


def test_the_command_line_shows_a_run_without_an_evaluation(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "four.jsonl").write_text("\n".join(map(json.dumps, TRAIN[:4])))  # too few to hold any out
    (tmp_path / "rewards.py").write_text(inspect.getsource(digits))
    words = f"train quickstart model.name={base} task.name=custom task.path=four.jsonl train.max_steps=1"
    assert (
        main([*words.split(), "task.reward_file=rewards.py:digits", "rollout.max_completion_length=4"]) == 0
    )
    shown, said = capsys.readouterr()
    assert said.count("nothing to evaluate on") == 1
    assert shown.startswith("accuracy not measured\nrun ") and "next" not in shown


def test_the_environment_names_the_revisions_of_model_and_data(run, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config._commit_hash = "0123abc"  # as transformers sets it for a model from the Hub
    odd = [row | {"photo": b"\0", "by": {("a", 1): 2}} for row in TRAIN]

    def environment(name, **given):
        folder = run(name, "train.max_steps=1", **given).folder
        return json.loads((folder / "environment.json").read_text())

    found = [environment("local"), environment("odd", train_dataset=odd)]
    found.append(environment("hub", model=model, tokenizer=build_tokenizer(), train_dataset=TRAIN[::-1]))
    assert [each["model_revision"] for each in found] == [None, None, "0123abc"]
    assert len({each["data_revision"] for each in found}) == 3
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", each["data_revision"]) for each in found)
    assert (found[0]["device"], found[0]["dtype"]) == ("cpu", "torch.float32")


# What ends up in the run folder


def test_completions_agree_with_metrics_and_summary(run):
    done = run("run", *ALGORITHMS["t-spmo with replay"])
    set_to = load(str(done.folder))
    tokenizer, weighted = done.tokenizer, 0
    rows = [row for row in rows_of(done.folder) if "reward" in row]
    for row in rows:
        found = completions_of(done.folder, row["step"])
        assert len(found) == 8 and {c["step"] for c in found} == {row["step"]}
        lengths = [len(c["token_ids"]) for c in found]
        assert row["tokens/sampled"] == sum(lengths) == sum(len(c["logps"]) for c in found)
        assert row["completions/mean_length"] == pytest.approx(np.mean(lengths))
        assert row["reward"] == pytest.approx(np.mean([c["reward"] for c in found]))
        assert row["answers/right"] == np.mean([c["right"] for c in found])
        assert row["completions/clipped_ratio"] == np.mean([not c["finished"] for c in found])
        assert row["entropy"] == pytest.approx(np.mean(np.concatenate([c["entropies"] for c in found])))
        assert row["replay/groups"] == len([c for c in found if c["prefix_length"]]) / 4
        nodes = {}
        for place, c in enumerate(found):
            assert c["prompt"].startswith(TRAIN[c["prompt_index"]]["prompt"])
            assert c["completion"].endswith(tokenizer.decode(c["token_ids"], skip_special_tokens=True))
            assert "".join(c["tokens"]) == tokenizer.decode(c["token_ids"])
            assert json.loads(c["rewards"]) == {"digits": pytest.approx(c["reward"])}
            assert c["finished"] == (c["token_ids"][-1] == tokenizer.eos_token_id)
            for t, weight in enumerate(c["weights"]):
                node = (place // 4, *c["token_ids"][: t + 1])
                assert nodes.setdefault(node, weight) == weight, (
                    "completions that share a node share its weight"
                )
        assert row["tokens/selected"] == sum(weight != 0 for weight in nodes.values())
        weighted += row["tokens/selected"]
        path = done.folder / "completions" / f"step-{row['step']}.parquet"
        for group in read_groups(row["step"], path, set_to):
            trie, again = group.trie, group.credit(set_to)[set_to.algorithm.name]
            saved = found[4 * group.slot : 4 * group.slot + 4]
            for path, c in zip(trie.paths, saved, strict=True):
                assert (again.plus + again.minus)[path].tolist() == c["weights"], "the very weights, again"
    assert weighted > 0 and any(row["replay/groups"] for row in rows)
    for total, name in (
        ("tokens_sampled", "sampled"),
        ("tokens_selected", "selected"),
        ("nodes_run", "nodes_run"),
    ):
        assert done.summary[total] == sum(row[f"tokens/{name}"] for row in rows)
    seconds = sum(row.get("time/step", 0) for row in read_metrics(done.folder))
    assert done.summary["seconds"] == pytest.approx(seconds)
    assert done.summary["update_flops"] == sum(row.get("flops/update", 0) for row in rows) > 0


def test_a_run_ends_with_the_step_that_reaches_its_tokens(run, whole):
    rows = rows_of(whole())
    upto = np.cumsum([row["tokens/sampled"] for row in rows if "tokens/sampled" in row])
    for limit, steps in ((int(upto[2]), 3), (int(upto[2]) + 1, 4), (10**9, STEPS)):
        done = run(f"of {limit}", f"train.max_tokens={limit}")
        assert (done.summary["steps"], done.summary["tokens_sampled"]) == (steps, upto[steps - 1])
        assert done.summary["status"] == "finished"
    # A finished run with more tokens allowed goes on, and is then the run that had them from the beginning.
    on = run(f"of {upto[2]}", f"train.max_tokens={int(upto[2]) + 1}", resume=True)
    assert on.summary["steps"] == 4
    assert rows_of(on.folder)[:5] == rows[:5]


def test_evaluations_are_kept_problem_by_problem(run):
    done = run("run", reward_funcs=wanted)
    rows = read_evaluations(done.folder)
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    for row, result in ((rows[0], "accuracy_before"), (rows[-1], "accuracy_after")):
        assert len(row["right"]) == done.summary[result]["n"] == len(EVAL)
        assert np.mean([int(digit) for digit in row["right"]]) == done.summary[result]["value"]
        assert row["answered"] is None, "the task cannot tell"
    assert len({row["problems"] for row in rows}) == 1 and rows[0]["problems"].startswith("sha256:")


@pytest.mark.parametrize(
    "overrides", [ALGORITHMS["s-grpo"], ["algorithm.name=tempo", "algorithm.top_entropy_quantile=0.4"]]
)
def test_credit_of_a_saved_step_is_computed_again_to_the_last_bit(run, overrides):
    """Tokens are drawn by the step and the group's place in it; an entropy floor is that of all groups."""
    done = run("run", *overrides, "train.max_steps=2")
    set_to, step = load(str(done.folder)), 2
    found = completions_of(done.folder, step)
    path = saved_steps(done.folder)[step]
    # As an older version saved it, without the weights by sign: they are computed again.
    parquet.write_table(parquet.read_table(path).drop_columns(["plus", "minus"]), path)
    groups = read_groups(step, path, set_to)
    assert len(groups) == 2
    for group in groups:
        trie, credit = group.trie, group.credit(set_to)[set_to.algorithm.name]
        assert group.saved_credit() is None
        saved = found[4 * group.slot : 4 * group.slot + 4]
        for path, c in zip(trie.paths, saved, strict=True):
            assert (credit.plus + credit.minus)[path].tolist() == c["weights"]
    assert (done.folder / "report.html").stat().st_size > 20_000, "a run ends with its report"


def test_a_report_that_cannot_be_made_costs_no_run(run, monkeypatch):
    def broken(folders, end=None):
        raise ZeroDivisionError("of a mean")

    class Heard(Progress):
        def message(self, text):
            heard.append(text)

    heard = []
    monkeypatch.setattr("twig.report.page.write_report", broken)
    done = run("run", "train.max_steps=1", progress=Heard())
    assert done.summary["status"] == "finished"
    assert any("report.html is not written (ZeroDivisionError: of a mean)" in text for text in heard)


def documented(title):
    """The names that docs/metrics.md explains below a title, up to the next one."""
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    section = page.split(f"\n{title}\n")[1].split("\n## ")[0].split("\nAn evaluation has")[0]
    names = re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE)
    assert len(names) == len(set(names)) > 5
    return set(names)


def test_every_metric_and_field_is_explained_and_no_explanation_is_stale(run, whole):
    """Three runs write all names between them: with replay, with a KL term, of a task that finds answers."""
    folders = [whole(*ALGORITHMS[name]) for name in ("t-spmo with replay", "grpo twice on a batch")]
    own = {"reward_funcs": None, "train_dataset": None, "eval_dataset": None}
    words = ["task.name=multiplication", "eval.limit=3", "train.max_steps=3", "rollout.curriculum=0.2"]
    folders.append(run("product", *words, **own).folder)
    metrics = {name for folder in folders for row in read_metrics(folder) for name in row}
    of_rewards = {re.sub("^rewards/(digits|product)/", "rewards/NAME/", name) for name in metrics}
    assert of_rewards == documented("## metrics.jsonl")
    for folder in folders:
        summary = read_summary(folder)
        assert set(summary) == documented("## summary.json")
        parts = documented("An evaluation has these:")
        assert set(summary["accuracy_before"]) == set(summary["accuracy_after"]) == parts
        assert set(summary["accuracy_best"]) == parts | {"step"}
        assert all(set(row) == documented("## answers of summary.json") for row in summary["answers"])
        environment = json.loads((folder / "environment.json").read_text())
        assert set(environment) == documented("## environment.json")


# What training is for


@pytest.mark.slow
def test_the_quickstart_learns(tmp_path):
    """The shipped recipe, 100 steps: at least 25 points more on 500 problems that are never trained on."""
    settings = load("quickstart", ["train.max_steps=100", "eval.limit=500", "log.progress=quiet"])
    task = load_task(settings)
    assert not {e.prompt for e in task.train} & {e.prompt for e in task.eval}
    summary = twig.train(settings, output=tmp_path / "run").summary
    assert summary["accuracy_after"]["n"] == 500
    assert summary["accuracy_after"]["value"] - summary["accuracy_before"]["value"] >= 0.25


# The plan of memory


def free(monkeypatch, size):
    """What the device says is free from now on."""
    monkeypatch.setattr("twig.planner.choose.free_memory", lambda *arguments: size)


def sizes_of(folder):
    """What a run's config.yaml and its newest checkpoint say of sizes."""
    state = checkpoint.load(checkpoint.newest_valid(folder / "checkpoints")[0])[1]
    return {key: load(str(folder)).flat()[key] for key in SIZE_KEYS}, state["sizes"]


def test_the_sizes_of_a_run_are_planned_and_go_with_it(run, monkeypatch, tmp_path):
    """Chosen once, from what was free then; on a day with less memory, a run that goes on has the same."""
    free(monkeypatch, 10**9)
    whole = run("whole")
    chosen, kept = sizes_of(whole.folder)
    assert list(chosen.values()) == [8, 256, 2**22, False, 3, False]
    sizes = {"wave_size": 8, "pack_size": 256, "head_chunk": 2**22, "checkpoint_layers": False}
    assert kept == sizes | {"packed_weights": False}
    run("parts", progress=Heard(step=at(3, ask_to_stop)))
    free(monkeypatch, 2**20)
    heard = Heard()
    run("parts", resume=True, progress=heard)
    assert heard.heard("memory may run out") == 1
    assert sizes_of(tmp_path / "parts") == (chosen, kept)
    assert record(tmp_path / "parts") == record(whole.folder)
    less = run("less", progress=Heard(step=at(1, ask_to_stop)))
    assert list(sizes_of(less.folder)[0].values()) == [1, 7, 2**16, True, 1, False], "a new run takes less"
    assert "memory may run out" in (less.folder / "warnings.txt").read_text()


def test_the_predicted_peak_stands_beside_the_measured_one(whole):
    rows = [row for row in read_metrics(whole()) if "memory/peak_bytes" in row]
    predicted = read_summary(whole())["predicted_peak_bytes"]
    assert {row["memory/predicted_peak_bytes"] for row in rows} == {predicted}
    assert predicted > 50 * 2**20


def test_a_budget_that_is_too_small_is_refused_before_anything_is_loaded(run, monkeypatch):
    def never(*arguments):
        raise AssertionError("the model is not to be loaded")

    monkeypatch.setattr("twig.evaluation.prepare.load_model", never)
    with pytest.raises(UserError, match=r"^memory\.budget: 1MiB is too little: the run takes up to"):
        run("run", "memory.budget=1MiB")
    with pytest.raises(UserError, match=r"^memory\.budget: 0\.001 is too little"):
        run("run", "memory.budget=0.001")


def test_a_model_that_is_passed_is_planned_as_it_is(base, run, monkeypatch):
    """In its own dtype; its weights are there already, so they do not count twice."""
    model, tokenizer = load_model(str(base))
    seen = []

    def note(asked, config, kind, available, **options):
        seen.append((asked.model.dtype, kind, available))
        return choose_sizes(asked, config, kind, available, **options)

    free(monkeypatch, 10**9)
    monkeypatch.setattr("twig.planner.choose.choose_sizes", note)
    done = run("run", "train.max_steps=1", model=model.double(), tokenizer=tokenizer)
    weights = sum(p.numel() * 8 for p in model.parameters() if not p.requires_grad)
    assert seen == [("float64", "cpu", 10**9 + weights)]
    assert load(str(done.folder)).model.dtype == "auto"
