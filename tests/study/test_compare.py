"""Studies: reading the file, running and resuming it, and the tables that come out."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from study_runs import write_run

from twig.cli.app import main
from twig.common.errors import UserError
from twig.config.load import load
from twig.evaluation.statistics import bootstrap_gap, bootstrap_runs, permutation
from twig.runs.folder import RunLog
from twig.runs.reader import read_metrics, read_summary
from twig.study.plan import load_study, runs_of
from twig.study.runner import _refuse_changes, folder_of, run_all
from twig.study.tables import Result, compare_runs, markdown

STUDY = """
base: quickstart
max_tokens: 300
seeds: [3, 4]
overrides: [eval.limit=6, eval.steps=1, rollout.num_generations=4, rollout.prompts_per_step=2,
            rollout.max_completion_length=10, log.completions_steps=0]
variants:
  grpo: [algorithm.name=grpo]
  "t-spmo: branches": [algorithm.normalise=branches]
"""


def study_in(folder, text=STUDY, overrides=()):
    path = folder / "small.yaml"
    path.write_text(text)
    return load_study(path, list(overrides))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("algorithm.normalise=all", "every variant of the study sets algorithm.normalise"),
        ("train.learning_rate=0.5", "the grid of the study sets train.learning_rate"),
    ],
)
def test_an_override_that_every_variant_sets_again_is_refused(tmp_path, override, says):
    text = STUDY.replace("[algorithm.name=grpo]", "[algorithm.normalise=branches]")
    text += "grid: {train.learning_rate: [0.1, 0.2]}\n"
    with pytest.raises(UserError, match=f"^{override}: {says}. Change it there"):
        study_in(tmp_path, text, [override])
    assert study_in(tmp_path, STUDY, [override]).overrides[-1] == override  # one of the two has its own


# What a file says


def test_a_study_is_variants_times_values_times_seeds(tmp_path):
    study = study_in(tmp_path, STUDY + "grid:\n  train.learning_rate: [1e-3, 0.002]\n")
    runs = runs_of(study)
    names = ["grpo", "t-spmo: branches"]
    expected = [
        (f"{name}, train.learning_rate={rate}", seed)
        for seed in (3, 4)
        for name, rate in itertools.product(names, ("0.001", "0.002"))
    ]
    assert [(run.variant, run.seed) for run in runs] == expected
    assert runs[3].name == "t-spmo-branches-train.learning_rate-0.002-seed-3"
    assert len({run.name for run in runs}) == len(runs)
    settings = runs[3].settings
    assert (settings.algorithm.name, settings.algorithm.normalise) == ("t-spmo", "branches")
    assert (settings.train.learning_rate, settings.train.seed) == (0.002, 3)
    assert (settings.train.max_tokens, settings.train.max_steps) == (300, None)
    assert settings.lora == load("quickstart").lora


def test_words_change_the_study_or_all_its_runs(tmp_path):
    study = study_in(tmp_path, overrides=["seeds=[9]", "max_tokens=50", "train.learning_rate=1.0"])
    runs = runs_of(study)
    assert {(r.seed, r.settings.train.max_tokens, r.settings.train.learning_rate) for r in runs} == {
        (9, 50, 1.0)
    }


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("- 1\n", ["small.yaml", "base:"]),
        ("base: quickstart\n", ["max_tokens", "not set"]),
        (STUDY + "sedes: [1]\n", ["sedes", "unknown", "seeds"]),
        (STUDY.replace("300", "0"), ["max_tokens: 0 ", " max_tokens="]),
        (STUDY.replace("name=grpo", "name=grpoo"), ["variant grpo", "algorithm.name"]),
        (STUDY.replace("name=grpo", "name=grpo, train.seed=3"), ["train.seed", "seeds:"]),
        (STUDY.replace("name=grpo", "name=grpo, train.max_tokens=3"), ["train.max_tokens", "max_tokens:"]),
        (STUDY.replace("t-spmo: branches", "-grpo-"), ["names", "alike"]),
        (STUDY.replace("quickstart", "quickstrat"), ["quickstrat", "quickstart"]),
    ],
)
def test_a_wrong_study_is_one_line_and_nothing_is_run(tmp_path, monkeypatch, capsys, text, parts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(text)
    assert main(["compare", "small.yaml"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and all(part in shown for part in parts), shown
    assert not (tmp_path / "studies").exists()


def test_a_run_that_began_with_other_settings_is_refused_by_name(tmp_path):
    first = runs_of(study_in(tmp_path))
    RunLog.create(folder_of(tmp_path, first[0]), first[0].settings).close()
    changed = runs_of(
        study_in(tmp_path, STUDY.replace("quickstart", "quickstart", 1), ["train.learning_rate=0.5"])
    )
    with pytest.raises(UserError, match=r"grpo-seed-3: began with train\.learning_rate=0\.004, .* 0\.5"):
        run_all(changed, tmp_path)
    assert not folder_of(tmp_path, first[1]).exists()
    for override in (
        "log.completions_steps=3",
        "memory.budget=2GiB",
    ):  # nothing that is learned depends on it
        _refuse_changes(folder_of(tmp_path, first[0]), runs_of(study_in(tmp_path, overrides=[override]))[0])


# The tables


def test_intervals_over_runs_and_problems_are_those_of_a_loop():
    rng = np.random.default_rng(1)
    first = (rng.random((4, 30)) < 0.7).astype(float)
    second = (rng.random((3, 30)) < 0.4).astype(float)
    means, gaps = [], []
    for _ in range(4000):
        problems = rng.integers(30, size=30)
        ours = first[rng.integers(4, size=4)][:, problems].mean()
        theirs = second[rng.integers(3, size=3)][:, problems].mean()
        means.append(ours)
        gaps.append(ours - theirs)
    np.testing.assert_allclose(bootstrap_runs(first), np.quantile(means, [0.025, 0.975]), atol=0.02)
    np.testing.assert_allclose(bootstrap_gap(first, second), np.quantile(gaps, [0.025, 0.975]), atol=0.02)
    assert bootstrap_runs(first) == bootstrap_runs(first)
    assert bootstrap_runs(np.ones((3, 5))) == (1.0, 1.0)


def test_runs_exchanged_by_hand():
    # Of the 20 ways to choose three of six values, only two separate them as far.
    assert permutation([0.9, 0.8, 0.85], [0.1, 0.2, 0.15]) == pytest.approx(2 / 20)
    assert permutation([0.5, 0.5], [0.5, 0.5]) == 1.0


def test_the_tables_are_what_the_runs_say(tmp_path):
    runs = runs_of(study_in(tmp_path))
    before = "1000"
    ends = {"grpo-seed-3": "1100", "grpo-seed-4": "1110", "t-spmo-branches-seed-3": "1111"}
    results = []
    for run in runs:
        evaluations = {0: before, 1: "1010", 3: ends.get(run.name, "0111")}
        results.append(write_run(run, tmp_path, evaluations, [100, 60, 150 if run.seed == 3 else 120]))
    comparison = compare_runs(results, 300)
    grpo, branches = comparison["variants"]["grpo"], comparison["variants"]["t-spmo: branches"]
    assert (grpo["accuracy"]["value"], grpo["by_seed"], grpo["before"]) == (5 / 8, [0.5, 0.75], 0.25)
    assert (branches["accuracy"]["value"], branches["seeds"]) == (7 / 8, [3, 4])
    assert grpo["accuracy"]["low"] < 5 / 8 < grpo["accuracy"]["high"]
    # 310 tokens of the first seed, 280 of the second, which has not used its 300; half of them trained.
    assert (grpo["tokens_sampled"], grpo["share_trained"]) == (295, 0.5)
    assert grpo["under_budget"] == ["grpo-seed-4"]
    assert grpo["answers"] == {"found": 0.5, "right_when_found": 1.25, "found_before": 0.5}
    assert (grpo["update_flops"], grpo["seconds"], grpo["entropy"]) == (1000, 6.0, pytest.approx(1 / 3))
    # At 0 % and 25 % (75 tokens) nothing but the first evaluation; at 50 % (150) that after step 1, which
    # had seen 100 tokens; at 75 % (225) still that; in the end the last.
    curve = [(point["tokens"], point["seconds"], point["value"]) for point in grpo["curve"]]
    assert curve == [(0, 0, 0.25), (0, 0, 0.25), (100, 2, 0.5), (100, 2, 0.5), (295, 6, 5 / 8)]
    (pair,) = comparison["pairs"]
    assert pair["difference"] == pytest.approx(5 / 8 - 7 / 8)
    assert pair["p_runs"] == permutation([0.5, 0.75], [1.0, 0.75])
    # Seed 3: only the second right in two problems, so p = 2 / 4; seed 4: one problem each way.
    assert [pair["mcnemar"][seed]["p_value"] for seed in "34"] == [0.5, 1.0]
    text = markdown(comparison)
    for part in (
        "| grpo | 2 | 25.0 % | 62.5 % (",
        "| -25.0 (",
        "0 of 2 seeds",
        "before the budget: grpo-seed-4",
        "below 0.333",  # 2 seeds against 2: at least 2 of 6 ways to deal them
    ):
        assert part in text, text
    other = write_run(
        runs_of(study_in(tmp_path, overrides=["seeds=[7]"]))[0], tmp_path, {0: "10", 1: "11"}, [300]
    )
    RunLog.open(other.folder).save_evaluation(1, {"problems": "sha256:2", "right": "11", "answered": None})
    with pytest.raises(UserError, match="^task: "):
        compare_runs([*results, Result("x", 7, other.folder)], 300)


def test_accuracy_before_the_first_evaluation_is_not_made_up(tmp_path):
    runs = runs_of(study_in(tmp_path))
    results = [write_run(run, tmp_path, {2: "1100"}, [150, 160]) for run in runs]
    comparison = compare_runs(results, 300)
    values = [point["value"] for point in comparison["variants"]["grpo"]["curve"]]
    assert values == [None, None, None, None, 0.5]
    text = markdown(comparison)
    assert "Accuracy after a share" not in text, "a table of nothing but its last column"
    assert "Differences" in text and "set eval.steps" in text
    assert "Differences" not in markdown(comparison, differences=False)
    for i, run in enumerate(runs):
        if run.variant == "grpo":
            results[i] = write_run(run, tmp_path / "more", {1: "1000", 2: "1100"}, [150, 160])
    text = markdown(compare_runs(results, 300))
    assert re.search(r"\| grpo \| - \| - \| 25\.0 % \(.* s\) \| 25\.0 %", text)
    assert "| t-spmo: branches | - | - | - | - | 50.0 %" in text


# Running


@pytest.mark.slow
def test_a_study_runs_resumes_and_writes_its_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # A variant that cannot train: the others run all the same.
    bad = STUDY + "  broken: ['lora.target_modules=[nothing]']\n"
    (tmp_path / "small.yaml").write_text(bad)
    assert main(["compare", "small.yaml", "seeds=[3]", "--jobs", "2"]) == 2
    shown = capsys.readouterr()
    assert "1 of 3 runs failed; the first: broken-seed-3: lora.target_modules" in shown.err
    folder = tmp_path / "studies" / "small"
    comparison = json.loads((folder / "comparison.json").read_text())
    assert set(comparison["variants"]) == {"grpo", "t-spmo: branches"}
    assert (folder / "comparison.md").read_text() in shown.out
    grpo = folder / "runs" / "grpo-seed-3"
    sampled = [row["tokens/sampled"] for row in read_metrics(grpo) if "tokens/sampled" in row]
    assert sum(sampled[:-1]) < 300 <= sum(sampled) == read_summary(grpo)["tokens_sampled"]
    # What has finished is not run again; a new seed is.
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("summary.json")}
    (tmp_path / "small.yaml").write_text(STUDY)
    assert main(["compare", "small.yaml"]) == 0
    assert "grpo-seed-3" not in capsys.readouterr().err
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert json.loads((folder / "comparison.json").read_text())["variants"]["grpo"]["seeds"] == [3, 4]
    assert main(["compare", "small.yaml", "--tables"]) == 0
    assert (folder / "comparison.md").read_text() in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_saves_what_runs_and_the_same_command_resumes_it(tmp_path):
    (tmp_path / "small.yaml").write_text(STUDY)
    command = [sys.executable, "-m", "twig", "compare", "small.yaml", "seeds=[3]", "max_tokens=100000"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    run = tmp_path / "studies" / "small" / "runs" / "grpo-seed-3"
    until = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    shown = process.communicate(timeout=300)[1]
    assert process.returncode == 130, shown
    assert re.search(r"grpo-seed-3: stopped.*\n.*to resume:\n  twig compare small\.yaml", shown, re.DOTALL), (
        shown
    )
    summary = read_summary(run)
    assert summary["status"] == "stopped" and summary["steps"] >= 1
    assert not (tmp_path / "studies" / "small" / "runs" / "t-spmo-branches-seed-3").exists()
    # Another budget is another study.
    budget = f"max_tokens={summary['tokens_sampled'] + 1}"
    done = subprocess.run([*command[:-1], budget], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "train.max_tokens" in done.stderr
