"""Evaluations: the statistics by hand, the answers against transformers' own generate, the files."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from saved import save_model

from twig.cli.app import main
from twig.common.progress import Progress
from twig.config.load import Settings
from twig.core.types import Example
from twig.engine.load import end_ids, load_model
from twig.engine.lora import attach
from twig.engine.policy import Policy
from twig.engine.sampler import SamplingParams
from twig.evaluation.evaluate import evaluate_policy, measure_model, sample_policy
from twig.evaluation.record import read_evaluation
from twig.evaluation.statistics import bootstrap, majority, mcnemar, pass_at_k, wilson
from twig.tasks.base import Task
from twig.tasks.load import load_task
from twig.tasks.prompts import encode_prompt
from twig.tasks.rewards import accuracy, score_last_number, score_number

# ---- the statistics ----------------------------------------------------------------------------------------


def test_wilson_contains_the_share_and_stays_inside():
    for n in (1, 7, 300):
        for right in {0, 1, n // 2, n}:
            low, high = wilson(right, n)
            assert 0 <= low <= right / n <= high <= 1
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_all_choices_with_a_right_one(n):
    for right in range(n + 1):
        answers = [i < right for i in range(n)]
        for k in range(1, n + 1):
            choices = [any(choice) for choice in itertools.combinations(answers, k)]
            assert pass_at_k(right, n, k) == pytest.approx(sum(choices) / len(choices), abs=1e-12)


def test_pass_at_k_of_many_and_of_none():
    exact = 1 - math.comb(900, 100) / math.comb(1000, 100)
    assert pass_at_k(100, 1000, 100) == pytest.approx(exact, rel=1e-12)
    with pytest.raises(ValueError, match="k is 3"):
        pass_at_k(1, 2, 3)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [(["1", "2", "2"], "2"), (["1", "2"], "1"), ([None, None, "3"], "3"), ([None], None), ([], None)],
)
def test_majority(answers, expected):
    assert majority(answers) == expected


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (5, 0), (1, 7), (4, 4), (30, 12)])
def test_mcnemar_is_the_two_tails_of_a_fair_coin(only_first, only_second):
    first = np.array([1] * only_first + [0] * only_second + [1, 1, 0], bool)
    second = np.array([0] * only_first + [1] * only_second + [1, 1, 0], bool)
    actual, apart = mcnemar(first, second), only_first + only_second
    # every outcome of the coin that is no likelier than this one, one by one
    chance = [math.comb(apart, i) / 2**apart for i in range(apart + 1)]
    p_value = sum(c for c in chance if c <= chance[only_first] * (1 + 1e-9))
    assert actual.p_value == pytest.approx(p_value)
    assert (actual.only_first, actual.only_second, actual.n) == (only_first, only_second, len(first))
    assert actual.difference == pytest.approx((only_first - only_second) / len(first))
    assert actual.low <= actual.difference <= actual.high


def test_bootstrap_has_the_width_of_the_normal_interval_and_is_always_the_same():
    values = np.random.default_rng(0).random(400)
    low, high = bootstrap(values)
    assert (low, high) == bootstrap(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


# ---- the answers -------------------------------------------------------------------------------------------


def tiny_task():
    rows = [Example(f"{i}+{i % 7}=", {"answer": str(i + i % 7)}) for i in range(24)]
    return Task("test", rows, rows, (accuracy,), score=score_number, score_lenient=score_last_number)


@pytest.mark.parametrize("name", ["random", "embedded"])
def test_greedy_answers_are_those_of_a_loop_over_generate(name, tmp_path):
    if name == "random":
        settings = Settings.from_dict(
            {"model": {"name": str(save_model(tmp_path))}, "task": {"name": "custom"}}
        )
        task, length = tiny_task(), 12
    else:
        values = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "multiplication", "eval_size": 10}}
        settings = Settings.from_dict(values)
        task, length = load_task(settings), 64
    model, tokenizer = load_model(settings.model)
    ends = end_ids(model, tokenizer)
    peft_model = attach(model, r=4, alpha=8.0, target_modules=["q_proj"])
    params = replace(SamplingParams.of(settings, tokenizer, ends), max_completion_length=length, wave_size=7)
    result, completions = evaluate_policy(Policy(peft_model), tokenizer, task, params)
    right = 0
    for example, completion in zip(task.eval, completions, strict=True):
        prompt = torch.from_numpy(encode_prompt(task, example, tokenizer))[None]
        with torch.no_grad():
            ids = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=length,
                eos_token_id=ends,
                pad_token_id=ends[0],
            )[0, prompt.shape[1] :]
        assert completion.ids.tolist() == ids.tolist()
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert completion.text == text
        right += task.score(text, example).right
    assert result.value == right / len(task.eval)
    assert len({len(c) for c in completions}) > 1 or name == "random"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter for the embedded model that changes many of its answers."""
    folder = tmp_path_factory.mktemp("adapter")
    peft_model = attach(load_model("tiny-arithmetic")[0], r=4, alpha=8.0, target_modules=["q_proj", "v_proj"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    peft_model.peft_config["default"].base_model_name_or_path = "tiny-arithmetic"
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    return folder


PROBLEMS = [(a, b) for a in (7, 12, 86, 347, 905) for b in (3, 26, 71)]


def generated(adapter, stop):
    """The texts and numbers of tokens of a loop over `model.generate`, one problem at a time."""
    model, tokenizer = load_model("tiny-arithmetic")
    ends = end_ids(model, tokenizer)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    actual = []
    for a, b in PROBLEMS:
        prompt = tokenizer(f"{a}*{b}=", return_tensors="pt").input_ids
        how = {"do_sample": False, "max_new_tokens": 48, "eos_token_id": ends, "pad_token_id": ends[0]}
        if stop:
            how |= {"stop_strings": [stop], "tokenizer": tokenizer}
        with torch.no_grad():
            ids = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **how)[0]
        ids = ids[prompt.shape[1] :]
        actual.append((tokenizer.decode(ids, skip_special_tokens=True), len(ids)))
    return actual


@pytest.mark.parametrize(
    ("adapted", "stop"), [(False, ""), pytest.param(True, "", marks=pytest.mark.slow), (True, "2")]
)
def test_the_command_agrees_with_a_loop_over_generate_item_by_item(
    adapted, stop, adapter, tmp_path, monkeypatch
):
    """Prompts of unequal lengths, some in one batch."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{a}*{b}=", "answer": a * b} for a, b in PROBLEMS]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["eval", str(adapter) if adapted else "tiny-arithmetic", "--task", "custom", "--output", "out"]
    words += ["task.path=problems.jsonl", "task.train_split=all", "task.eval_split=all", "log.progress=quiet"]
    words += [
        "rollout.max_completion_length=48",
        "eval.batch_size=4",
        *([f"rollout.stop=['{stop}']"] * bool(stop)),
    ]
    assert main(words) == 0
    actual = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    expected = generated(adapter if adapted else None, stop)
    assert [row["prompt"] for row in actual] == [row["prompt"] for row in rows]
    assert [(row["completion"], row["tokens"]) for row in actual] == expected
    right = [
        text.rpartition("#")[2] == str(a * b) for (a, b), (text, _) in zip(PROBLEMS, expected, strict=True)
    ]
    assert [row["right"] for row in actual] == right
    assert read_evaluation(tmp_path / "out").greedy["value"] == sum(right) / len(right)
    assert len({length for _, length in expected}) > 1
    if adapted:
        assert expected != generated(None, stop), "the adapter is in the answers"
    else:
        assert 0 < sum(right) < len(right)
    if stop:
        assert sum(text.endswith(stop) for text, _ in expected) > 2, "the stop text ends some"


@pytest.mark.slow
def test_an_evaluation_answers_as_many_at_once_as_memory_has_room_for(monkeypatch):
    sizes = []

    def seen(policy, tokenizer, task, params, **options):
        sizes.append(params.wave_size)
        return evaluate_policy(policy, tokenizer, task, params, **options)

    monkeypatch.setattr("twig.evaluation.evaluate.evaluate_policy", seen)
    values = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "multiplication", "eval_size": 96}}
    values |= {"rollout": {"max_completion_length": 64}}
    actual = [
        measure_model(Settings.from_dict(values | {"memory": {"budget": budget}})).greedy
        for budget in ("auto", "78MiB")
    ]
    assert sizes[0] == 96 > sizes[1] >= 8
    assert actual[0] == actual[1]
    few = values | {"eval": {"limit": 5}}
    measure_model(Settings.from_dict(few), samples=4)
    assert sizes[2] == 20, "with several answers to each problem"


def test_samples_are_summed_up_as_by_hand(tmp_path):
    values = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "multiplication", "eval_size": 6}}
    settings = Settings.from_dict(values)
    task = load_task(settings)
    model, tokenizer = load_model(settings.model)
    policy = Policy(attach(model, r=4, alpha=8.0, target_modules=["q_proj"]))
    params = SamplingParams.of(settings, tokenizer, end_ids(model, tokenizer))
    params = replace(params, max_completion_length=64, seed=3)

    def drawn(**changes):
        return sample_policy(policy, tokenizer, task, replace(params, **changes), samples=6)

    actual, groups = drawn()
    assert actual == drawn(wave_size=5)[0], "whatever is answered at once"
    assert actual != drawn(seed=4)[0]
    right = np.array(
        [[task.score(c.text, e).right for c in g] for e, g in zip(task.eval, groups, strict=True)]
    )
    assert 0 < right.mean() < 1
    assert actual.mean[0] == pytest.approx(right.mean())
    assert sorted(actual.pass_at) == [1, 2, 4, 6]
    assert actual.pass_at[1][0] == pytest.approx(right.mean())
    assert actual.pass_at[6][0] == pytest.approx(right.any(1).mean())
    votes = 0
    for example, group in zip(task.eval, groups, strict=True):
        said = [c.text.rpartition("#")[2] for c in group]
        votes += max(said, key=said.count) == example.columns["answer"]
    assert actual.vote[0] == pytest.approx(votes / 6)
    for value, low, high in (actual.mean, actual.vote, *actual.pass_at.values()):
        assert low <= value <= high


class Recorded(Progress):
    """Keeps the phases with their totals and what was advanced in each, and the messages."""

    def __init__(self):
        self.phases, self.messages = [], []

    def phase(self, name, total=None):
        self.phases.append([name, total, []])

    def advance(self, count=1):
        self.phases[-1][2].append(count)

    def message(self, text):
        self.messages.append(text)


@pytest.mark.parametrize("wave_size", [7, 128])
def test_progress_advances_while_problems_are_answered(wave_size):
    values = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "multiplication", "eval_size": 24}}
    settings = Settings.from_dict(values | {"rollout": {"max_completion_length": 48}})
    model, tokenizer = load_model(settings.model)
    policy = Policy(attach(model, r=4, alpha=8.0, target_modules=["q_proj"]))
    params = SamplingParams.of(settings, tokenizer, end_ids(model, tokenizer))
    of = (policy, tokenizer, load_task(settings), replace(params, wave_size=wave_size))
    recorded = Recorded()
    evaluate_policy(*of, progress=recorded)
    sample_policy(*of, samples=3, progress=recorded)
    assert [(name, total) for name, total, _ in recorded.phases] == [("evaluating", 24)] * 2
    for _, total, advanced in recorded.phases:
        assert sum(advanced) == total and sum(count > 0 for count in advanced) > 24 // wave_size + 1


def test_falling_back_to_plain_decoding_is_reported(monkeypatch):
    def fails(policy):
        raise ValueError("its layers are of glass")

    monkeypatch.setattr("twig.engine.sampler.DecodeSteps", fails)
    monkeypatch.setattr("twig.engine.policy.resolve_decode", lambda *_: "graph")
    values = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "multiplication", "eval_size": 2}}
    recorded = Recorded()
    measure_model(Settings.from_dict(values | {"rollout": {"max_completion_length": 2}}), progress=recorded)
    (said,) = recorded.messages
    assert "rollout.decode=plain" in said and "its layers are of glass" in said


# ---- the command and its files -----------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `twig eval tiny-arithmetic ...`; returns (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*words, model="tiny-arithmetic"):
        capsys.readouterr()
        status = main(["eval", model, "--task", "multiplication", "log.progress=quiet", *words])
        return status, *capsys.readouterr()

    return call


def test_an_evaluation_is_written_and_compared(run, tmp_path):
    status, shown, said = run("--limit", "10", "--samples", "4", "--output", "first")
    assert status == 0, said
    assert "pass@4" in shown and "majority vote" in shown and "written to first" in shown
    record = json.loads((tmp_path / "first" / "evaluation.json").read_text())
    assert record["schema_version"] == 1 and record["greedy"]["n"] == 10
    assert (record["model"], record["task"], record["adapter"]) == ("tiny-arithmetic", "multiplication", None)
    rows = [json.loads(line) for line in (tmp_path / "first" / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 10 + 40
    greedy = [row for row in rows if row["sample"] is None]
    assert np.mean([row["right"] for row in greedy]) == record["greedy"]["value"]
    assert all(row["right"] == (row["read"] == row["answer"]) for row in rows)
    sampled = [row["right"] for row in rows if row["sample"] is not None]
    assert np.mean(sampled) == pytest.approx(record["sampled"]["mean"][0])

    status, shown, _ = run("--limit", "10", "--against", "first")
    assert status == 0
    assert "difference +0.0 points" in shown and "p = 1" in shown and "only this one right: 0" in shown
    assert read_evaluation(tmp_path / "first").right.sum() == round(10 * record["greedy"]["value"])


def test_other_problems_are_not_compared(run):
    assert run("--limit", "5", "--output", "five")[0] == 0
    status, _, said = run("--limit", "6", "--against", "five")
    assert status == 2 and "five answered other problems" in said and "--limit" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--against", "nowhere"], "nowhere holds no evaluation.json"),
        (["--output", "taken"], "taken holds mine.txt"),
        (["--output", "taken/mine.txt"], "taken/mine.txt is a file"),
        (["--against", "torn"], "torn cannot be read as an evaluation"),
        (["--best"], "tiny-arithmetic is not a run"),
        (["--samples", "1"], "--samples"),
    ],
)
def test_what_cannot_be_is_one_line_and_changes_nothing(words, expected, run, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "evaluation.json").write_text('{"greedy": {}, "prob')
    (tmp_path / "torn" / "completions.jsonl").write_text("")
    status, shown, said = run("--limit", "3", *words)
    assert status == 2 and expected in said and said.count("\n") == 1 and not shown
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["mine.txt"]
