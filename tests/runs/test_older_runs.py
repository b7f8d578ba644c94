"""A run folder that an older commit wrote is still read, evaluated, exported and resumed.

`fixtures/run-96be401` is the quickstart with small numbers and restarts, finished after 4 steps; `expected`
has what that commit itself made of it when it went on to step 6.
"""

import json
import shutil

import numpy as np
import pytest
from project import ROOT
from safetensors.numpy import load_file

from twig.cli.app import main
from twig.report.history import read_run
from twig.runs.reader import read_metrics, read_summary

FIXTURE = ROOT / "tests" / "fixtures" / "run-96be401"
STEPS = 4


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the folder, as its owner has it."""
    folder = tmp_path / "run-96be401"
    shutil.copytree(FIXTURE, folder, ignore=shutil.ignore_patterns("expected"))
    monkeypatch.chdir(tmp_path)
    return folder


def test_it_is_one_of_that_commit():
    assert json.loads((FIXTURE / "environment.json").read_text())["commit"].startswith("96be401")


def test_its_numbers_are_read(old):
    run = read_run(old)
    assert len(run.history) == read_summary(old)["steps"] == STEPS
    assert run.settings.algorithm.replay.probability == 0.5


def test_it_is_reported(old, capsys):
    assert main(["report", str(old)]) == 0
    page = (old / "report.html").read_text(encoding="utf-8")
    assert "run-96be401" in page and len(page) > 50_000
    assert '"groups":[{' in page, "its completions are drawn as credit maps"


def test_it_is_evaluated(old, capsys):
    """The trained adapter answers as it did at the end of its run."""
    assert main(["eval", str(old), "log.progress=quiet", "--output", "evaluation"]) == 0
    greedy = json.loads((old.parent / "evaluation" / "evaluation.json").read_text())["greedy"]
    after = read_summary(old)["accuracy_after"]
    assert {key: greedy[key] for key in after} == pytest.approx(after)


@pytest.mark.parametrize("merged", [False, True])
def test_it_is_exported(old, merged):
    command = ["export", str(old), "--output", "shared", *(["--merged"] if merged else [])]
    assert main(command) == 0
    name = "model.safetensors" if merged else "adapter_model.safetensors"
    assert (old.parent / "shared" / name).is_file()
    assert "T-SPMO" in (old.parent / "shared" / "README.md").read_text()


def test_it_is_resumed_as_the_commit_that_wrote_it_would(old):
    """Adapter, optimizer, position in the data, restarts that wait and the noise: all go on."""
    assert main(["train", str(old), "train.max_steps=6", "log.progress=quiet", "--resume"]) == 0
    expected = FIXTURE / "expected"
    ours, theirs = read_metrics(old), read_metrics(expected)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert any(row.get("replay/groups") for row in theirs[-2:]), "a restart waited in the checkpoint"
    for our, their in zip(ours, theirs, strict=True):
        kept = {key for key in their if not key.startswith(("time/", "memory/"))}
        assert {key: our[key] for key in kept} == pytest.approx(
            {key: their[key] for key in kept}, rel=1e-3, abs=1e-5
        )
    adapter, like = (load_file(f / "adapter_model.safetensors") for f in (old / "adapter", expected))
    assert adapter.keys() == like.keys()
    for name, values in like.items():
        np.testing.assert_allclose(adapter[name], values, atol=1e-5)
