"""Runs that end before their last step: by an accuracy, by no gain, by a callback."""

import json

import pytest
from project import ROOT
from small_runs import STEPS, Heard, ask_to_stop, at, record

from twig.common.errors import UserError
from twig.config.schema import StopWhen
from twig.runs.reader import read_metrics, read_summary
from twig.training.state import RunState


def state(*values, n=10):
    """A state after one evaluation per step, the first of them before training."""
    evaluations = [{"step": step, "value": value, "n": n} for step, value in enumerate(values)]
    return RunState(step=len(values) - 1, evaluations=evaluations)


@pytest.mark.parametrize(
    "values, when, key",
    [
        ([], {"accuracy": 0.1}, None),
        ([0.9], {"accuracy": 0.5}, None),  # before training
        ([0.9], {"patience": 1}, None),
        ([0.1, 0.5], {"accuracy": 0.5}, "train.stop_when.accuracy"),
        ([0.1, 0.49], {"accuracy": 0.5}, None),
        ([0.1, 0.6, 0.4], {"accuracy": 0.5}, None),  # of the newest alone: it would have ended before
        ([0.1, 0.6, 0.4], {"patience": 1}, "train.stop_when.patience"),
        ([0.1, 0.6, 0.6], {"patience": 1}, "train.stop_when.patience"),  # as good is no gain
        ([0.1, 0.6, 0.4], {"patience": 2}, None),
        ([0.1, 0.6, 0.4, 0.5], {"patience": 2}, "train.stop_when.patience"),
        ([0.5, 0.1, 0.2], {"patience": 2}, "train.stop_when.patience"),  # nor is what is below the base
        ([0.1, 0.6, 0.4, 0.7], {"patience": 2}, None),
        ([0.1, 0.6, 0.4], {"accuracy": 0.4, "patience": 1}, "train.stop_when.accuracy"),
        ([0.1, 0.6, 0.4], {}, None),
    ],
)
def test_evaluations_end_a_run(values, when, key):
    assert state(*values).ended_by(StopWhen(**when)) == key


def test_an_evaluation_counts_once_and_only_with_those_of_the_same_problems():
    twice = state(0.1, 0.6, 0.4)
    twice.evaluations.append(dict(twice.evaluations[-1]))
    assert twice.ended_by(StopWhen(patience=2)) is None
    other = state(0.1, 0.6, 0.4)
    other.evaluations[1]["n"] = 20
    assert other.ended_by(StopWhen(patience=1)) is None, "0.4 is the best of ten problems"


def test_a_run_ends_where_the_accuracy_is_reached_and_stays_finished(run):
    """Two of three problems have no answer that this model gives: it is the callback that says when."""
    heard = Heard()
    folder = run("run", "train.stop_when.patience=1", progress=heard).folder
    summary = read_summary(folder)
    assert summary["status"] == "finished" and summary["ended_by"] == "train.stop_when.patience"
    assert summary["steps"] == 2 < STEPS, "evaluated every second step, and no better than before training"
    assert summary["accuracy_after"]["n"] == 3
    assert sum(said.startswith("evaluation step") for said in heard.said) == 1
    before = json.dumps(record(folder, steps=2)["metrics"])
    assert run("run", "train.stop_when.patience=1", resume=True).summary["steps"] == 2
    assert json.dumps(record(folder, steps=2)["metrics"]) == before
    longer = run("run", resume=True).summary
    assert longer["steps"] == STEPS and longer["ended_by"] is None


def test_a_run_that_was_broken_off_ends_at_the_same_step(run):
    words = ("train.stop_when.patience=2", "train.save_steps=1")
    whole = run("whole", *words).folder
    broken = run("broken", *words, progress=Heard(step=at(3, ask_to_stop))).folder
    assert read_summary(broken)["status"] == "stopped" and read_summary(broken)["ended_by"] is None
    run("broken", *words, resume=True)
    assert read_summary(whole)["steps"] == 4
    assert record(broken, steps=4) == record(whole, steps=4)


def test_callbacks_get_what_is_on_file_and_end_a_run(run):
    steps, evaluations = [], []

    def on_step(step, metrics):
        steps.append((step, metrics["reward"]))
        metrics.clear()
        return step == 3

    folder = run("run", on_step=on_step, on_evaluation=lambda *values: evaluations.append(values)).folder
    rows = [row for row in read_metrics(folder) if "reward" in row]
    assert steps == [(row["step"], row["reward"]) for row in rows] and len(steps) == 3
    assert [step for step, _ in evaluations] == [0, 2, 3]
    summary = read_summary(folder)
    assert summary["ended_by"] == "on_step" and summary["steps"] == 3
    assert evaluations[-1][1]["value"] == summary["accuracy_after"]["value"]
    assert run("run", resume=True).summary["steps"] == 3, "it is finished"


def test_an_evaluation_may_end_a_run_too_and_is_not_made_again(run):
    seen = []
    folder = run("run", on_evaluation=lambda step, result: seen.append(step) or step == 2).folder
    assert seen == [0, 2]
    summary = read_summary(folder)
    assert (summary["steps"], summary["ended_by"]) == (2, "on_evaluation")
    assert summary["accuracy_after"]["value"] == summary["accuracy_best"]["value"]


def test_only_true_ends_a_run(run):
    summary = run("run", on_step=lambda step, metrics: "yes").summary
    assert summary["steps"] == STEPS and summary["ended_by"] is None


def test_a_callback_that_fails_is_one_line_and_the_run_can_be_resumed(run):
    def fail(step, metrics):
        if step == 5:
            raise KeyError("no such\nthing")

    with pytest.raises(UserError, match="on_step: it raised KeyError: .*traceback: ") as caught:
        run("run", on_step=fail)
    assert "\n" not in str(caught.value)
    assert run("run", resume=True).summary["steps"] == STEPS


def test_an_accuracy_that_is_never_measured_is_refused(run, settings):
    with pytest.raises(UserError, match=r"train.stop_when.accuracy: .* Set eval.steps=20"):
        settings("train.stop_when.accuracy=0.9", "eval.steps=0")
    with pytest.raises(UserError, match="train.stop_when.patience: there is nothing to evaluate on"):
        run("run", "train.stop_when.patience=1", eval_dataset=None)


@pytest.mark.parametrize("patience", [1, 2, 9])
def test_where_a_run_would_have_ended_is_where_it_ends(patience, run, monkeypatch):
    """`scripts/early_end.py` on a run that did not end early, and the run that does."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import early_end

    whole = run("whole").folder
    early = run("early", f"train.stop_when.patience={patience}").summary
    ending = early_end.ending(whole, StopWhen(patience=patience))
    assert ending.step == early["steps"] and ending.steps == STEPS
    assert ending.there == pytest.approx(early["accuracy_after"]["value"])
    sampled = read_summary(whole)["tokens_sampled"]
    assert ending.saved == pytest.approx(1 - early["tokens_sampled"] / sampled)
