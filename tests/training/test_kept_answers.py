"""Three problems with their answers before and after training: which ones, and that a resume changes none."""

import json
from pathlib import Path

import pytest
from small_runs import STEPS, Heard, ask_to_stop, at

from twig.core.types import Example
from twig.runs import checkpoint
from twig.runs.reader import answers_of, missing_kinds, read_evaluations, read_summary
from twig.training.answers import Answered, answers_after, answers_before


def answered(right: str, when: str = "") -> Answered:
    """An evaluation of as many problems as `right` has digits."""
    examples = [Example(f"{n}+1=", {"answer": n + 1}) for n in range(len(right))]
    return Answered(examples, [f"{when}{n}" for n in range(len(right))], [each == "1" for each in right])


def chosen(before: str, after: str, seed: int = 0) -> list[dict]:
    rows = answers_before(answered(before, "before "), seed)
    return answers_after(rows, answered(after, "after "), seed)


def kinds(rows: list[dict]) -> dict[str, int]:
    return {row["kind"]: row["problem"] for row in rows}


def test_one_of_each_kind_with_both_answers() -> None:
    rows = chosen("0011", "0111")
    assert kinds(rows)["became_right"] == 1 and kinds(rows)["stayed_wrong"] == 0
    assert kinds(rows)["random"] in (2, 3)
    assert rows[0] == {
        "kind": "became_right",
        "problem": 1,
        "prompt": "1+1=",
        "answer": "2",
        "before": {"text": "before 1", "right": False},
        "after": {"text": "after 1", "right": True},
    }


@pytest.mark.parametrize("seed", range(5))
def test_a_kind_that_does_not_exist_is_left_out_and_said(seed: int) -> None:
    rows = chosen("1" * 9, "0" * 9, seed)
    assert set(kinds(rows)) == {"random"}
    assert missing_kinds(rows) == ["no problem became right", "no problem stayed wrong"]
    assert set(kinds(chosen("0" * 9, "1" * 9, seed))) == {"became_right", "random"}
    assert missing_kinds(chosen("0" * 9, "01" * 4 + "0", seed)) == []


def test_the_choice_is_the_seeds_and_no_problem_is_there_twice() -> None:
    before, after = "0" * 50 + "1" * 50, "01" * 50
    each = [kinds(chosen(before, after, seed)) for seed in range(20)]
    assert each == [kinds(chosen(before, after, seed)) for seed in range(20)]
    assert all(len(set(numbers.values())) == 3 for numbers in each)
    for kind in ("became_right", "stayed_wrong", "random"):
        assert len({numbers[kind] for numbers in each}) > 5, "and another seed takes another"


@pytest.mark.parametrize("size", [1, 2])
def test_few_problems_are_shown_once(size: int) -> None:
    assert len(chosen("0" * size, "0" * size)) == size


def test_only_what_may_be_chosen_is_kept() -> None:
    rows = answers_before(answered("1" * 90 + "0" * 10), seed=0)
    assert {row["problem"] for row in rows} >= set(range(90, 100)) and len(rows) <= 13


def test_a_run_of_an_older_version_kept_nothing() -> None:
    assert answers_after([], answered("0101"), seed=0) == []


# ---- in a run ----------------------------------------------------------------------------------------------


def test_a_run_has_the_answers_of_its_evaluations(whole) -> None:
    folder = whole()
    summary = read_summary(folder) or {}
    rows, evaluations = answers_of(summary) or [], read_evaluations(folder)
    assert rows and (evaluations[0]["step"], evaluations[-1]["step"]) == (0, STEPS)
    for row in rows:
        for when, evaluation in (("before", evaluations[0]), ("after", evaluations[-1])):
            assert row[when]["right"] == (evaluation["right"][row["problem"]] == "1")
        assert row["prompt"] in ("4*4=", "x?", "77+1=") and row["answer"] is None


def test_a_resumed_run_has_the_same_and_a_stopped_one_none(run, whole) -> None:
    stopped = run("parts", progress=Heard(step=at(3, ask_to_stop)))
    assert stopped.summary["answers"] == []
    again = run("parts", resume=True).summary["answers"]
    assert again == (read_summary(whole()) or {})["answers"] != []


def test_evaluations_of_other_problems_are_not_compared(run) -> None:
    run("parts", progress=Heard(step=at(3, ask_to_stop)))
    assert run("parts", "eval.limit=2", resume=True).summary["answers"] == []


def test_without_an_evaluation_before_there_are_none(run) -> None:
    assert run("a", "train.max_steps=1", "eval.before=false").summary["answers"] == []


def test_no_secret_of_the_environment_is_kept(run, monkeypatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "sesame-open")
    data = [{"prompt": "sesame-open 1+1=", "answer": "sesame-open"}]
    folder = run("a", "train.max_steps=1", eval_dataset=data).folder
    assert (
        "sesame" not in (folder / "summary.json").read_text()
        and "(removed)" in (folder / "summary.json").read_text()
    )
    newest = checkpoint.newest_valid(folder / "checkpoints").path
    assert newest and "sesame" not in json.dumps(checkpoint.load_state(newest)["standing"])


@pytest.mark.parametrize(
    "answers",
    [None, 3, [3], [{"kind": "random"}], [{"kind": "other", "prompt": "", "before": {}, "after": {}}]],
)
def test_damaged_answers_are_none(answers: object, whole, tmp_path: Path) -> None:
    summary = (read_summary(whole()) or {}) | {"answers": answers}
    assert answers_of(summary) is None
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert read_summary(tmp_path) == summary, "and the rest of the result is read"
