"""How long a run takes, from its first steps: against the whole run, by its own clock."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import small_settings

from twig.cli.app import main
from twig.common.progress import Progress
from twig.runtime.machine import waited_for_a_core
from twig.training import estimate
from twig.training.estimate import Estimate, _estimate, _Watch, measure_run


def rows(seconds: list[float]) -> list[dict]:
    return [{"time/step": s, "tokens/sampled": 100 * s, "completions/mean_length": 5.0} for s in seconds]


def watched(seconds: list[float], total: int) -> _Watch:
    watch = _Watch(Progress())
    watch.rows, watch.total, watch.evaluated = rows(seconds), total, [(6.0, 2), (2.0, 2)]
    return watch


def test_measured_steps_count_as_they_were_and_the_others_as_the_later_half(base) -> None:
    settings = small_settings(base, "train.max_steps=10", "eval.steps=4")
    taken = _estimate(settings, watched([9.0, 1.0, 2.0, 2.0], 10), 30)
    assert taken.training == pytest.approx(14 + 6 * 2)
    assert taken.tokens == pytest.approx(1400 + 6 * 200)
    assert taken.evaluations == 4 and taken.evaluating == pytest.approx(4 * 30 * 2.0)
    fewer = _estimate(small_settings(base, "train.max_tokens=2000"), watched([2.0] * 4, 50), 0)
    assert fewer.steps == 10 and fewer.evaluations == 0


def test_a_measurement_is_the_run_itself_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    from twig.config.load import load

    settings = load("quickstart", ["rollout.max_completion_length=8", "eval.limit=6", "train.max_steps=50"])
    taken = measure_run(settings, Progress(), seconds=0.0)
    assert (taken.measured, taken.steps, taken.problems, taken.evaluations) == (4, 50, 6, 2)
    assert 0 < taken.mean_length <= 8 and taken.tokens_per_step <= 8 * 128
    assert taken.seconds_per_step > 0 and taken.seconds_per_problem > 0
    assert os.listdir(tmp_path) == []


def test_waiting_for_a_core_is_a_share_of_what_was_measured(base, monkeypatch) -> None:
    clock, waits = iter([0.0, 0.0, 10.0, 20.0]), iter([1.0, 4.0, 9.0])
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(estimate, "waited_for_a_core", lambda: next(waits))
    watch = _Watch(Progress())
    watch.phase("sampling")
    for step in (1, 2):
        watch.step(step, 9, rows([1.0])[0])
    assert watch.waiting == pytest.approx(8 / 20)
    monkeypatch.undo()
    assert _estimate(small_settings(base), watch, 0).waiting == pytest.approx(8 / 20)
    unknown = Path("/nowhere")
    assert waited_for_a_core(unknown) is None and (waited_for_a_core() or 0.0) >= 0.0


def test_the_command_says_time_and_tokens(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    taken = Estimate(9, 36.0, 1000.0, 20.0, 1000, 3, 500, 0.1)
    monkeypatch.setattr(estimate, "measure_run", lambda settings, progress: taken)
    assert main(["plan", "quickstart", "--measure"]) == 0
    out = capsys.readouterr().out
    for part in ("10.0 h", "1,000,000 tokens", "36 s a step", "32.0 h", "sample 3,200,000 tokens"):
        assert part in out
    assert "other work" not in out
    busy = replace(taken, waiting=0.5)
    monkeypatch.setattr(estimate, "measure_run", lambda settings, progress: busy)
    assert main(["plan", "quickstart", "--measure"]) == 0
    assert "50 % of the time other work had the processor" in (out := capsys.readouterr().out)
    assert "it takes 5.0 h" in out and "10.0 h" in out
    assert main(["train", "quickstart", "--dry-run", "--measure"]) == 0
    assert "# Time" in capsys.readouterr().out and not list(Path().iterdir())
    assert main(["plan", "quickstart", "--measure", "--for", "4GiB"]) == 2
    assert main(["train", "quickstart", "--measure"]) == 2
    assert "--dry-run" in capsys.readouterr().err
