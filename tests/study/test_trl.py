"""Runs of the study that TRL makes: the same model, problems and evaluation as Twig's own."""

import json
import sys
from pathlib import Path

import pytest

import twig
from twig.config.load import load
from twig.runs.folder import RunLog
from twig.runs.reader import read_evaluations, read_metrics, read_summary
from twig.study.plan import load_study, runs_of
from twig.study.tables import Result, compare_runs

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("eval.limit=10", "eval.steps=1", "rollout.num_generations=8", "rollout.prompts_per_step=2"),
    *("log.completions_steps=0", "train.learning_rate=0.05"),
]


@pytest.mark.parametrize("name", ["tuning", "study"])
def test_runs_of_trl_are_set_up_as_those_of_grpo(name):
    folder = ROOT / "docs" / "study"
    ours, theirs = (runs_of(load_study(folder / f"{name}{end}.yaml"), folder) for end in ("", "-trl"))

    def settings(runs, variant):
        flat = {
            (r.variant.partition(",")[2], r.seed): r.settings.flat() for r in runs if variant in r.variant
        }
        # The learning rate of the study is that which tuning found for each.
        return {key: each | {"train.learning_rate": None} for key, each in flat.items()}

    of_grpo = [run for run in ours if run.variant.partition(",")[0] == "grpo"]
    assert settings(theirs, "trl grpo") == settings(of_grpo, "grpo")
    assert len(theirs) == len(of_grpo)


@pytest.mark.slow
def test_trl_trains_a_run_of_the_study(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="TRL is in the dev extra")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import study_trl

    settings = load(
        "quickstart",
        ["algorithm.name=grpo", *SMALL],
        shared=["train.max_steps=null", "train.max_tokens=1000"],
    )
    folder = tmp_path / "trl"
    RunLog.create(folder, settings).close()
    assert study_trl.main([str(folder)]) == 0
    steps = [row["tokens/sampled"] for row in read_metrics(folder)]
    assert sum(steps[:-1]) < 1000 <= sum(steps) == read_summary(folder)["tokens_sampled"]
    evaluations = read_evaluations(folder)
    assert [row["step"] for row in evaluations] == list(range(len(steps) + 1))
    # What Twig measures before it trains, on the same problems; and both can stand in one table.
    own = twig.train(settings, output=tmp_path / "own")
    before = read_evaluations(own.folder)[0]
    assert evaluations[0] == before
    assert any(row["right"] != before["right"] for row in evaluations), "the evaluated adapter is not trained"
    results = [Result(name, 0, tmp_path / path) for name, path in (("trl grpo", "trl"), ("grpo", "own"))]
    variants = compare_runs(results, 1000)["variants"]
    assert variants["trl grpo"]["before"] == variants["grpo"]["before"]
    assert variants["trl grpo"]["update_flops"] is None
    # Finished: left as it is. Not finished: from the beginning.
    kept = (folder / "metrics.jsonl").read_bytes()
    study_trl.main([str(folder)])
    assert (folder / "metrics.jsonl").read_bytes() == kept
    (folder / "summary.json").unlink()
    study_trl.main([str(folder)])
    again = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in kept.decode().splitlines()]
    assert [row["reward"] for row in again] == [row["reward"] for row in before]
    assert sys.modules["study_trl"] is study_trl
