"""Rewards that are more than right or wrong: their mean is shown, and no share of right answers."""

import json

import numpy as np
import pytest
from rich.console import Console

from twig.cli.display import accuracy_table, show_run
from twig.cli.runs import runs_command
from twig.cli.show import show_command
from twig.runs.listing import list_runs
from twig.runs.reader import read_metrics
from twig.study.tables import Result, compare_runs, markdown
from twig.tasks.base import Task
from twig.tasks.rewards import is_graded


def halves(completions, **kwargs):
    """Half the share of digits: never 1."""
    return [0.5 * sum(c.isdigit() for c in text) / (1 + len(text)) for text in completions]


@pytest.mark.parametrize(
    ("rewards", "graded"),
    [
        ([0, 1, 1], False),
        ([-1, 1], False),
        ([0, 0], False),
        ([0, 0.5], True),
        ([0.5, 0.5], True),
        ([-1, 0], True),
        ([-1, 0, 1], True),
        ([0, 0.1 + 0.2 + 0.7], False),
        ([0, 2], True),
        ([0, 0.5, 1], True),
        ([0, np.nan, 1], False),
        ([np.nan], False),
    ],
)
def test_rewards_of_1_and_the_lowest_are_right_or_wrong(rewards, graded):
    totals = np.array(rewards, np.float64)
    task = Task("custom", (), (), ())
    assert is_graded(task, totals) is graded
    assert not is_graded(Task("custom", (), (), (), correct_at=0.5), totals), "the user says what is right"
    assert not is_graded(Task("svamp", (), (), (), score=lambda *_: None), totals), "the task can tell"


def test_their_mean_is_shown_everywhere_and_decides_what_is_best(run, capsys):
    done = run("run", "train.stop_when.patience=1", reward_funcs=halves)
    summary = done.summary
    after = summary["accuracy_after"]
    assert after["graded"] and after["value"] == 0
    rows = read_metrics(done.folder)
    assert {row["answers/right"] for row in rows if "reward" in row} == {None}
    evaluated = {row["step"]: row["eval/reward"] for row in rows if "eval/reward" in row}
    assert {row["eval/accuracy"] for row in rows if "eval/reward" in row} == {None}
    rewards = [*evaluated.values(), after["reward"]]
    assert summary["accuracy_best"]["reward"] == max(rewards)
    console = Console(width=120, record=True)
    show_run(console, done.folder, summary)
    console.print(accuracy_table({"run": after}))
    runs_command(done.folder.parent)
    show_command(done.folder)
    texts = [console.export_text(), capsys.readouterr().out, repr(done), done._repr_html_()]
    page = (done.folder / "report.html").read_text(encoding="utf-8")
    for text in texts:
        assert f"{after['reward']:.3f}" in text
    before = summary["accuracy_before"]["reward"]
    assert f"Reward from {before:.3f} to {after['reward']:.3f}" in page
    for text in [*texts[:3], page]:
        assert "0.0 %" not in text.replace("\u00a0", " ")


def test_a_run_without_a_result_is_listed_with_them(run):
    done = run("run", "eval.steps=1", reward_funcs=halves)
    (listed,) = list_runs(done.folder)
    done.folder.joinpath("summary.json").unlink()
    (failed,) = list_runs(done.folder)
    assert listed.graded and failed.graded
    assert failed.accuracy_before == pytest.approx(listed.accuracy_before, rel=1e-5)
    assert failed.accuracy_after == pytest.approx(listed.accuracy_after, rel=1e-5)


def test_completions_are_shown_without_metrics_too(run, capsys):
    done = run("run", "log.completions_steps=1", reward_funcs=halves)
    for name in ("damaged", None):
        metrics = done.folder / "metrics.jsonl"
        metrics.unlink() if name is None else metrics.write_text(f"{name}\n")
        show_command(done.folder)
        assert "mean reward" in capsys.readouterr().out


def test_a_study_whose_rewards_were_all_none_at_first_begins_at_0(run):
    runs = [run(f"run-{seed}", f"train.seed={seed}", "eval.steps=1", reward_funcs=halves) for seed in (1, 2)]
    for done in runs:
        path = done.folder / "summary.json"
        summary = json.loads(path.read_text())
        summary["accuracy_before"]["reward"] = None
        path.write_text(json.dumps(summary))
    results = [Result("a", seed, done.folder) for seed, done in enumerate(runs)]
    assert compare_runs(results, 100)["variants"]["a"]["before"] == 0


def test_a_study_compares_mean_rewards(run):
    runs = {
        (name, seed): run(f"{name}-{seed}", "eval.steps=1", f"train.seed={seed}", reward_funcs=halves)
        for name in ("a", "b")
        for seed in (1, 2)
    }
    results = [Result(name, seed, done.folder) for (name, seed), done in runs.items()]
    tokens = min(done.summary["tokens_sampled"] for done in runs.values())
    comparison = compare_runs(results, tokens, target=0.1)
    for name in ("a", "b"):
        after = [runs[name, seed].summary["accuracy_after"]["reward"] for seed in (1, 2)]
        assert comparison["variants"][name]["accuracy"]["value"] == pytest.approx(np.mean(after), rel=1e-5)
    (pair,) = comparison["pairs"]
    assert pair["difference"] == pytest.approx(0, abs=1e-6), "the same seeds"
    assert not pair["mcnemar"]
    text = markdown(comparison)
    assert "tokens to reward 0.1" in text and "mean rewards" in text
    value = comparison["variants"]["a"]["accuracy"]["value"]
    assert f"| {value:.3f} (" in text and f"{100 * value:.1f} %" not in text
    assert comparison["variants"]["a"]["area"] is not None


def test_right_or_wrong_stays_accuracy(run):
    one = run("run", reward_funcs=lambda completions, **kwargs: [float("1" in text) for text in completions])
    assert not one.summary["accuracy_after"]["graded"]
    rows = read_metrics(one.folder)
    assert None not in {row["answers/right"] for row in rows if "reward" in row}
    assert None not in {row["eval/accuracy"] for row in rows if "eval/reward" in row}
