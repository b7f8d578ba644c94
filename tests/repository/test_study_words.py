"""The study on word problems: which problems are alike, its tables, its samples, wrong answers to read."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from study_runs import write_run
from test_pages import module

from twig.common.errors import UserError
from twig.core.types import Example
from twig.evaluation.record import write_evaluation
from twig.runs.completions import parquet_bytes
from twig.study.plan import load_study, runs_of

ROOT = Path(__file__).resolve().parents[2]
STUDY = """
base: quickstart
max_tokens: 300
seeds: [0, 1]
overrides: [eval.limit=4]
variants:
  grpo: [algorithm.name=grpo]
  t-spmo: [algorithm.name=t-spmo]
  t-spmo, redraw: [algorithm.name=t-spmo, rollout.redraw=2]
"""
PAGE = """# Study

<!-- words: svamp -->
Not run yet.
<!-- /words -->

<!-- study: svamp -->
<!-- /study -->
"""
# Right answers before and after of runs, problem by problem; the last two problems are not alike.
BEFORE, ENDS = "1000", {"grpo-seed-0": "1001", "grpo-seed-1": "0001", "t-spmo-redraw-seed-0": "1111"}
MISTAKES = {"base": ".orb", "base-again": ".orb", "t-spmo-seed-0": "..on"}


@pytest.fixture
def script(monkeypatch):
    return module(ROOT / "scripts" / "study.py", monkeypatch)


@pytest.fixture
def words(script):
    return script.study_words


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs" / "study"
    folder.mkdir(parents=True)
    (folder / "svamp.yaml").write_text(STUDY)
    (folder / "svamp-alike.json").write_text(json.dumps({"problems": "sha256:1", "alike": "1100"}))
    (folder.parent / "study-svamp.md").write_text(PAGE)
    return folder.parent


@pytest.fixture
def work(docs, tmp_path):
    """Finished runs of every variant, but for one seed of the last."""
    for planned in runs_of(load_study(docs / "study" / "svamp.yaml")):
        if planned.name != "t-spmo-redraw-seed-1":
            right = ENDS.get(planned.name, "1011")
            more = {
                "reward": [0.1, 0.3],
                "frac_reward_zero_std": [0.75, 0.5],
                "redraw/groups": [6, 4 if "redraw" in planned.name else 6],
            }
            peaks = {"peak_memory_bytes": 2**31, "predicted_peak_bytes": 2**31 + planned.seed * 2**27}
            study = tmp_path / "work" / "svamp"
            write_run(planned, study, {0: BEFORE, 2: right}, [150, 160], more=more, summary=peaks)
    return tmp_path / "work"


def row_of(page, *start):
    """The cells of the first row of a page that begins with these."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines()]
    return next(row for row in rows if row[: len(start)] == list(start))


# Which problems are alike


def test_bodies_with_the_same_words_are_alike_whatever_their_numbers(words):
    train = ["Tom has 3 hens, and 1,204 eggs.", "Ann sold 2."]
    test = ["Tom has 17 hens and 5 eggs", "Tom had 17 hens and 5 eggs", "Ann sold 2.50", "Ann sold"]
    assert words.alike(train, test) == [True, False, True, False]


def test_the_list_of_svamp_s_problems_is_current(words, test_data, tmp_path, capsys):
    (tmp_path / "study").mkdir()
    assert words.main(["alike", str(test_data / "svamp"), "--docs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("131 of 300 ")
    written = (tmp_path / words.ALIKE).read_text()
    assert written == (ROOT / "docs" / words.ALIKE).read_text()
    assert json.loads(written)["alike"].count("1") == 131


# The tables


def test_the_tables_are_what_the_runs_say(script, docs, work):
    for folder in (work / "svamp" / "runs").iterdir():
        began = json.loads((folder / "environment.json").read_text())
        began |= {"commit": folder.name[-1], "processor": "A 1" if folder.name == "grpo-seed-0" else None}
        (folder / "environment.json").write_text(json.dumps(began))
    assert script.keep("svamp", options_of(script, docs, work)) is False
    raw = docs / "study" / "raw" / "svamp" / "sampled"
    raw.mkdir()
    counts = {"base": [2, 0, 1, 0], "base-again": [0, 0, 1, 0], "t-spmo-seed-0": [2, 2, 2, 0]}
    for name, right in counts.items():
        kept = {"problems": "sha256:1", "samples": 2, "right": right, "mistakes": MISTAKES[name]}
        (raw / f"{name}.json").write_text(json.dumps(kept))
    assert script.main(["tables", "--docs", str(docs)]) == 0
    page, _, rest = (docs / "study-svamp.md").read_text().partition("<!-- /words -->")
    # One seed's plan is the peak itself, the other's a sixteenth above it.
    assert "Predicted peaks of memory were +0.0 to +6.2 % off the measured ones." in rest
    assert "processors (A 1; others not kept); training took" in rest
    assert "**So far 5 of 6 runs are there.**" in page
    # Problems 0 and 3 right in one run, 3 alone in the other: 3 of 8, and 2 of 4 of those not alike.
    grpo = row_of(page, "grpo", "2", "25.0 % (0.0 to 75.0)")
    assert [cell.partition(" (")[0] for cell in grpo[2:8]] == [
        *("25.0 %", "37.5 %", "+12.5", "0.0 %", "50.0 %", "+50.0")
    ]
    # One problem more in the first run; in the second one lost and one won. Never below 0.05.
    assert grpo[8] == "1, 1"
    last = row_of(page, "t-spmo, redraw", "1 of 2")
    # Three more, in the one run: p = 2 / 2 ** 3.
    assert (last[3], last[8]) == ("100.0 % (100.0 to 100.0)", "0.25")
    # Without training 2, 0, 1 and 0 of 2 samples are right, and once more 0, 0, 1 and 0.
    base = row_of(page, "no training")
    assert [cell.partition(" (")[0] for cell in base[1:]] == [
        *("-", "25.0 %", "37.5 %", "25.0 %", "50.0 %", "-")
    ]
    sampled = row_of(page, "t-spmo", "1 of 2")
    assert [cell.partition(" (")[0] for cell in sampled[2:]] == [
        *("75.0 %", "75.0 %", "50.0 %", "50.0 %", "200.0 %")  # greedy 75 % against pass@2 of 37.5 %
    ]
    # One problem more in the one run, of the seed that both have.
    redrawn = row_of(page, "t-spmo", "1", "75.0 % (25.0 to 100.0)")
    assert [cell.partition(" (")[0] for cell in redrawn[3:]] == ["+25.0", "1", "10", "2, 2"]
    mistakes = page.partition("by mistake")[2]
    assert row_of(mistakes, "no training", "-")[2:] == ["25.0 %", "25.0 %", "25.0 %", "25.0 %", "0.0 %"]
    assert row_of(mistakes, "t-spmo", "1 of 2")[2:] == ["50.0 %", "0.0 %", "25.0 %", "0.0 %", "25.0 %"]
    costs = row_of(page, "grpo", "2", "155 (50.0 %)")
    assert costs[3:] == [
        *("1e+03", "4", "0.10 to 0.30", "75.0 % to 50.0 %", "1.000 to 0.500", "7.0 to 7.0"),
        *("2.00", "2.12", "+6.2 %"),
    ]
    peaks = page.partition("Predicted peaks of memory against")[2]
    assert row_of(peaks, "0")[1:] == ["3", "+0.0 %", "+0.0 %", "grpo, t-spmo, t-spmo, redraw"]
    assert row_of(peaks, "1")[1:] == ["2", "+6.2 %", "+6.2 %", "grpo, t-spmo"]


def test_redrawing_is_compared_with_a_study_beside_seed_by_seed(script, docs, work):
    """Where the runs without it are: another study, with seeds that this one has not."""
    head = STUDY.partition("variants:")[0].replace("[0, 1]", "[1]")
    redrawn = "variants:\n  t-spmo, redraw: [algorithm.name=t-spmo, rollout.redraw=2]\n"
    (docs / "study" / "svamp-once.yaml").write_text(head + redrawn)
    (docs / "study-svamp.md").write_text(PAGE + PAGE.replace(": svamp -->", ": svamp-once -->"))
    for planned in runs_of(load_study(docs / "study" / "svamp-once.yaml")):
        more = {"frac_reward_zero_std": [0.75, 0.5], "redraw/groups": [5, 6]}
        write_run(planned, work / "svamp-once", {0: BEFORE, 2: "0000"}, [150, 160], more=more)
    for name in ("svamp", "svamp-once"):
        script.keep(name, options_of(script, docs, work))
    assert script.main(["tables", "--docs", str(docs)]) == 0
    page = (docs / "study-svamp.md").read_text().rpartition("Redrawing prompts")[2]
    # Of 1011 in the run of the same seed nothing is left.
    row = row_of(page, "t-spmo", "1")
    assert [cell.partition(" (")[0] for cell in row[2:]] == ["75.0 %", "-75.0", "0.25", "11", "2, 2"]


def saved(prompt, number, tokens, plus, minus, right):
    """A saved completion with the policy weights of its tokens; different tokens have different ids."""
    return {
        **{"step": 1, "prompt_index": prompt, "completion_index": number, "prompt": "", "prefix_length": 0},
        **{"tokens": tokens, "token_ids": [sum(map(ord, token)) for token in tokens], "finished": True},
        **{"entropies": [0.0] * len(tokens), "plus": plus, "minus": minus, "reward": float(right)},
        "right": right,
    }


def test_the_credit_of_an_answer_is_counted_by_its_parts(script, words, docs, work):
    assert words.parts_of([" 3", "-2", "=", "1", "\n", "####", " 1", "<end>"]) == [
        *[words.PARTS[0]] * 3,
        *[words.PARTS[1]] * 2,
        *[words.PARTS[2]] * 3,
    ]
    # The first token is shared; no other is. A weight of two signs counts as their sum.
    one = saved(0, 0, ["3", "-2", "=", "1", "####"], [0, 0.5, 0, 0.25, 0], [0, 0, 0, 0, 0], True)
    other = saved(0, 1, ["3", "+2", "=", "5", "####"], [0, 0, 0, 0, 0], [0, -0.5, 0, 0, -0.25], False)
    wrong = [saved(1, number, ["7", "="], [0.0] * 2, [0.0] * 2, False) for number in (0, 1)]
    both = saved(0, 0, ["3", "=", "2"], [1, 0, 2], [-1, 0, -1], True)
    for name, steps in {
        "grpo-seed-0": {1: [one, other, *wrong], 4: [one, other]},
        "grpo-seed-1": {1: [both]},
    }.items():
        folder = work / "svamp" / "runs" / name / "completions"
        folder.mkdir(parents=True)
        for step, rows in steps.items():
            (folder / f"step-{step}.parquet").write_bytes(parquet_bytes(rows))
    counted = {
        name: words.credit_of(work / "svamp" / "runs" / name) for name in ("grpo-seed-0", "grpo-seed-1")
    }
    first, later = counted["grpo-seed-0"]
    assert (first["step"], first["groups"], later["groups"]) == (1, {"mixed": 1, "wrong": 1}, {"mixed": 1})
    assert later["tokens"] == dict(zip(words.PARTS, (5, 2, 2), strict=True))
    assert first["tokens"] == dict(zip(words.PARTS, (7, 2, 2), strict=True))
    assert first["trained"] == dict(zip(words.PARTS, (2, 1, 1), strict=True))
    assert first["weight"] == dict(zip(words.PARTS, (1.0, 0.25, 0.25), strict=True))
    assert counted["grpo-seed-1"][0]["weight"] == {words.PARTS[0]: 0.0, words.PARTS[1]: 1.0}

    older = work / "svamp" / "runs" / "t-spmo-seed-0" / "completions"
    older.mkdir()
    (older / "step-1.parquet").write_bytes(parquet_bytes([one | {"plus": None, "minus": None}]))
    script.keep("svamp", options_of(script, docs, work))
    assert script.main(["tables", "--docs", str(docs)]) == 0
    page = (docs / "study-svamp.md").read_text().partition("Where the credit lies")[2]
    row = row_of(page, "grpo", "2")
    assert row[2:5] == ["33, 33, 33 %", "0, 100, 0 %", "9 of 23"]
    assert row[5:] == ["50.0 %", "37.5 %", "12.5 %"]


def test_the_readme_has_what_training_gained_and_cost(script, docs, work):
    readme = docs.parent / "README.md"
    readme.write_text("# Twig\n\n<!-- words: svamp-in-short -->\n<!-- /words -->\n")
    script.keep("svamp", options_of(script, docs, work))
    assert script.main(["tables", "--docs", str(docs)]) == 0
    page = readme.read_text()
    assert row_of(page, "no training")[1:3] == ["-", "25.0 % (0.0 to 75.0)"]
    grpo = row_of(page, "grpo", "2")
    assert [cell.partition(" (")[0] for cell in grpo[2:]] == ["37.5 %", "+12.5", "50.0 %", "0", "2.00 GiB"]


def test_the_curves_of_a_study_are_drawn_from_what_is_kept(script, docs, tmp_path, monkeypatch, capsys):
    draw = module(ROOT / "scripts" / "learning_curve.py", monkeypatch).main
    command = ["--study", "svamp", "--docs", str(docs), "--output", str(tmp_path / "curves.svg")]
    assert draw(command) == 2
    assert capsys.readouterr().err.count("\n") == 1
    for planned in runs_of(load_study(docs / "study" / "svamp.yaml")):
        write_run(planned, tmp_path / "work" / "svamp", {0: BEFORE, 1: "1011", 2: "1111"}, [150, 150])
    script.keep("svamp", options_of(script, docs, tmp_path / "work"))
    assert draw(command) == 0
    picture = (tmp_path / "curves.svg").read_text()
    for text in ("grpo", "t-spmo, redraw", "sampled tokens, thousands", "accuracy, %"):
        assert text in picture
    assert draw([*command, "--variants", "grpo"]) == 0
    picture = (tmp_path / "curves.svg").read_text()
    assert "grpo" in picture and "t-spmo" not in picture
    assert draw([*command, "--variants", "gspo"]) == 2
    assert "nothing is kept of 'gspo'" in capsys.readouterr().err


def test_a_study_of_number_types_says_how_far_sampling_is_from_the_update(script, tmp_path):
    docs, work = tmp_path / "docs", tmp_path / "work"
    (docs / "study").mkdir(parents=True)
    (docs / "study" / "dtype.yaml").write_text(STUDY)
    for planned in runs_of(load_study(docs / "study" / "dtype.yaml")):
        gaps = [0.5, 0.25] if planned.name == "grpo-seed-0" else [0.1, 0.2]
        more = {"sampling/logp_gap": gaps, "time/step": [1.0, 2.0]}
        write_run(planned, work / "dtype", {0: BEFORE, 2: BEFORE}, [150, 160], more=more)
    assert script.keep("dtype", options_of(script, docs, work)) is True
    table = script.tables("dtype", script.read_study(docs, "dtype"))
    assert row_of(table, "grpo", "1.5", "0.35")  # the mean over the runs of each one's largest
    assert row_of(table, "t-spmo", "1.5", "0.2")


def options_of(script, docs, work, **more):
    values = {"docs": docs, "work": work, "overrides": [], "jobs": 1, "samples": 3, "only": None}
    return SimpleNamespace(**values | more)


def test_runs_on_other_problems_are_refused(script, words, docs, work):
    script.keep("svamp", options_of(script, docs, work))
    (docs / "study" / "svamp-alike.json").write_text(json.dumps({"problems": "sha256:2", "alike": "1100"}))
    with pytest.raises(UserError, match=r"svamp-alike\.json: lists other problems"):
        script.main(["tables", "--docs", str(docs)])


@pytest.mark.parametrize(
    "base", [{"problems": "sha256:2", "samples": 2}, {"problems": "sha256:1", "samples": 4}], ids=str
)
def test_samples_of_other_problems_or_of_another_number_are_refused(script, docs, work, base):
    script.keep("svamp", options_of(script, docs, work))
    raw = docs / "study" / "raw" / "svamp" / "sampled"
    raw.mkdir()
    own = {"problems": "sha256:1", "samples": 2, "right": [0, 0, 0, 0], "mistakes": "nnnn"}
    (raw / "grpo-seed-0.json").write_text(json.dumps(own))
    (raw / "base.json").write_text(json.dumps(own | base))
    with pytest.raises(UserError, match="ample again"):
        script.main(["tables", "--docs", str(docs)])


# Told the answers


def test_an_equation_of_svamp_becomes_worked_lines(monkeypatch):
    script = module(ROOT / "scripts" / "study_supervised.py", monkeypatch)

    def solution(equation):
        problem = script.worked(Example("Q", {"question": "Q", "Equation": equation}))
        return problem and (problem.prompt + problem.solution)

    asked = "Problem: Q\nSolution:"
    assert solution("( ( 8.0 - 2.0 ) / 3.0 )") == f"{asked} 8 - 2 = 6\n6 / 3 = 2\n#### 2"
    assert solution("( 7.0 - ( 2.5 * 2.0 ) )") == f"{asked} 2.5 * 2 = 5\n7 - 5 = 2\n#### 2"
    assert solution("( 10.0 / 3.0 )") is None  # no number of at most two decimals
    assert solution("5.0") is None


def test_the_table_of_what_is_learned_from_answers_has_a_column_for_each_epoch(script, words, docs):
    rows = [{"adapter": "all", "epoch": epoch, "right": right} for epoch, right in ((0, "1000"), (1, "1101"))]
    (docs / words.SUPERVISED).parent.mkdir()
    (docs / words.SUPERVISED).write_text(json.dumps({"rows": rows}))
    page = docs / "study-svamp.md"
    page.write_text(PAGE + "\n<!-- words: svamp-supervised -->\n<!-- /words -->\n")
    assert script.main(["tables", "--docs", str(docs)]) == 0
    assert "| adapter | no training | epoch 1 |" in page.read_text()
    cells = row_of(page.read_text(), "all")
    assert [cell.partition(" (")[0] for cell in cells] == ["all", "25.0 %", "75.0 %"]


# Samples


def completions(rights):
    """Rows of an evaluation: the greedy answer and the samples of each problem, given which are right."""
    greedy = [row(n, None, each[0] == "1") for n, each in enumerate(rights)]
    return greedy + [
        row(n, k, digit == "1") for n, each in enumerate(rights) for k, digit in enumerate(each[1:])
    ]


def row(problem, sample, right):
    return {
        **{
            "problem": problem,
            "sample": sample,
            "prompt": f"How many are {problem}?",
            "answer": str(problem),
        },
        **{
            "completion": f" {problem} - 1 = 7\n#### 7",
            "read": "7",
            "right": right,
            "finished": problem != 2,
        },
    }


def test_the_base_and_what_has_finished_is_sampled_once(script, docs, work, monkeypatch, capsys):
    calls = []

    def run(command, **how):
        calls.append(command)
        assert command[1:4] == ["-m", "twig", "eval"] and command[command.index("--samples") + 1] == "3"
        if len(calls) == 2:  # the first time that grpo-seed-0 is sampled
            return SimpleNamespace(returncode=2)
        record = {"greedy": {"n": 4}, "sampled": {"samples": 3}, "problems": "sha256:1"}
        record["settings"] = {"rollout": {"temperature": 1.0}}
        folder = Path(command[command.index("--output") + 1])
        write_evaluation(folder, record, completions(["1111", "0010", "0000", "1000"]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run))
    command = ["sample", "--study", "svamp", "--docs", str(docs), "--work", str(work)]
    command += ["--samples", "3", "--jobs", "1"]
    script.keep("svamp", options_of(script, docs, work))
    raw = docs / "study" / "raw" / "svamp" / "sampled"
    raw.mkdir()
    again = raw / "base-again.json"
    again.write_text("of a model that was there before")
    assert script.main(command) == 2
    assert len(calls) == 6 and "grpo-seed-0-sampled: failed" in capsys.readouterr().out
    names = {"base", "grpo-seed-1", "t-spmo-seed-0", "t-spmo-seed-1", "t-spmo-redraw-seed-0"}
    assert {path.stem for path in raw.iterdir()} == names
    kept = json.loads((raw / "base.json").read_text())
    assert (kept["right"], kept["mistakes"], kept["samples"]) == ([3, 1, 0, 0], ".bb.", 3)
    assert [("model.adapter=null" in each) for each in calls] == [True] + [False] * 5
    again.write_text((raw / "base.json").read_text())
    assert script.main(command) == 0
    assert len(calls) == 7 and calls[6][4].endswith("grpo-seed-0")
    assert again.is_file(), "the same base was sampled once more"
    again.unlink()
    # A run that was made again has not been sampled.
    summary = work / "svamp" / "runs" / "grpo-seed-0" / "summary.json"
    summary.write_text(summary.read_text().replace('"seconds": 4.0', '"seconds": 5.0'))
    script.keep("svamp", options_of(script, docs, work))
    assert {path.stem for path in raw.iterdir()} == names


# Wrong answers


@pytest.mark.parametrize(
    ("completion", "kind"),
    [
        (" 71 - 20 = 59\n#### 59", "r"),
        (" 1,071 - 1,020 = 41\n#### 41", "r"),
        (" 71 + 20 = 91\n#### 91", "o"),
        (" 71 + 20 = 81\n#### 81", "b"),
        (" 7 * 8 = 54\n54 - 5 = 49\n#### 49", "r"),  # 56 - 5 = 51
        (" 50 + 1 = 51\n51 - 5 = 46\n#### 46", "o"),
        (" 50 / 0 = 51\n#### 51", "n"),
        (" 1.2.3 + 4 = 5\n#### 5", "n"),
        ("#### 59", "n"),
    ],
)
def test_a_wrong_answer_is_of_the_kind_that_its_lines_show(words, completion, kind):
    assert words.mistake(completion, "51") == kind


def test_wrong_answers_are_printed_one_by_one(words, tmp_path, capsys):
    write_evaluation(tmp_path, {}, completions(["01", "11", "01", "00"]))
    assert words.main(["wrong", str(tmp_path), "--number", "9"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("3 of 4 greedy answers are wrong:\n")
    assert "\n   3 other operations or numbers, and a wrong result\n" in shown and "\n3 of them:\n" in shown
    parts = shown.split("\n\n----")[1:]
    assert [part.partition("\n")[0] for part in parts] == [
        f" {place} of 3, problem {problem}" for place, problem in ((1, 0), (2, 2), (3, 3))
    ]
    assert parts[1].splitlines()[1:] == [
        *("How many are 2?", "right: 2, read: 7 (cut off)", " 2 - 1 = 7", "#### 7")
    ]
    assert "cut off" not in parts[2]
    assert words.main(["wrong", str(tmp_path), "--number", "1"]) == 0
    assert capsys.readouterr().out.count("----") == 1


def test_answers_that_training_changed_are_counted_and_the_first_that_became_right_shown(
    words, tmp_path, capsys
):
    before, after = tmp_path / "before", tmp_path / "after"
    write_evaluation(before, {}, completions(["11", "01", "00", "10", "00"]))
    rows = completions(["01", "10", "10", "10", "10"])
    rows[1]["completion"] = " 2 - 1 = 1\n#### 1"
    write_evaluation(after, {}, rows)
    assert words.main(["changed", str(before), str(after), "--number", "2"]) == 0
    first, *shown = capsys.readouterr().out.split("\n\n----")
    assert first == "Of 5 greedy answers 3 became right, 1 became wrong, 4 are unchanged."
    assert [part.splitlines()[0] for part in shown] == [" problem 1", " problem 2"]
    assert shown[0].splitlines()[1:] == [
        *("How many are 1?", "right: 1", "before: 1 - 1 = 7", "#### 7", "after: 2 - 1 = 1", "#### 1")
    ]
    write_evaluation(after, {}, completions(["01", "10"]))
    assert words.main(["changed", str(before), str(after)]) == 2
    assert "answers to other problems" in capsys.readouterr().err


def test_a_folder_without_answers_is_one_line(words, tmp_path, capsys):
    assert words.main(["wrong", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# All of it


SMALL = """
base: quickstart
max_tokens: 1500
seeds: [0, 1]
overrides: [task.eval_size=4, eval.steps=1, rollout.num_generations=4, rollout.prompts_per_step=2,
            rollout.max_completion_length=10, train.save_steps=1]
variants:
  grpo: [algorithm.name=grpo]
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_study_that_is_killed_keeps_what_has_finished_and_resumes(docs, tmp_path):
    (docs / "study" / "svamp.yaml").write_text(SMALL)
    command = [sys.executable, str(ROOT / "scripts" / "study.py"), "run", "--study", "svamp", "--jobs", "1"]
    command += ["--docs", str(docs), "--work", str(tmp_path / "work"), "model.num_threads=1"]
    raw = docs / "study" / "raw" / "svamp"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 300
    second = tmp_path / "work" / "svamp" / "runs" / "grpo-seed-1" / "metrics.jsonl"
    while not second.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [path.name for path in (raw / "runs").iterdir()] == ["grpo-seed-0"]
    assert "Not run yet." in (docs / "study-svamp.md").read_text()
    # The run under way has a process of its own, which ends it; the same command waits for it.
    alike = json.loads((raw / "runs" / "grpo-seed-0" / "evaluations.jsonl").read_text().splitlines()[0])
    (docs / "study" / "svamp-alike.json").write_text(
        json.dumps({"problems": alike["problems"], "alike": "0011"})
    )
    first = (tmp_path / "work" / "svamp" / "runs" / "grpo-seed-0" / "summary.json").stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work" / "svamp" / "runs" / "grpo-seed-0" / "summary.json").stat().st_mtime_ns == first
    assert len(list((raw / "runs").iterdir())) == 2
    page = (docs / "study-svamp.md").read_text()
    assert "So far" not in page and "Not run yet." not in page
    sample = [*command[:2], "sample", *command[3:-1], "--samples", "2"]
    done = subprocess.run(sample, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in (raw / "sampled").iterdir()) == [
        *("base.json", "grpo-seed-0.json", "grpo-seed-1.json")
    ]
    assert "| no training | - |" in (docs / "study-svamp.md").read_text()
