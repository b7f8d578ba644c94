"""The pages whose numbers are made from files: benchmarks, performance and study say what the files say."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from study_runs import write_run

from twig.study.plan import load_study, runs_of

ROOT = Path(__file__).resolve().parents[2]
TUNING = """
base: quickstart
max_tokens: 300
seeds: [7, 8]
overrides: [eval.limit=4]
grid: {train.learning_rate: [0.001, 0.002]}
variants:
  grpo: [algorithm.name=grpo]
  t-spmo: [algorithm.name=t-spmo]
"""
STUDY = """
base: quickstart
max_tokens: 300
seeds: [0]
variants:
  grpo: [algorithm.name=grpo, train.learning_rate=0.004]
  # a remark that stays
  t-spmo: [algorithm.name=t-spmo, train.learning_rate=0.004]
"""
PAGE = """# Study

<!-- study: study -->
Not run yet.
<!-- /study -->

<!-- study: tuning -->
<!-- /study -->
"""


def module(path, monkeypatch):
    """A script as a module; what lies beside it can be imported."""
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"twig_page_{path.stem}", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_pages_of_benchmarks_say_what_the_results_say(tmp_path, monkeypatch):
    tables = module(ROOT / "benchmarks" / "tables.py", monkeypatch)
    pages = [tmp_path / page.name for page in tables.PAGES]
    for source, page in zip(tables.PAGES, pages, strict=True):
        shutil.copyfile(source, page)
    monkeypatch.setattr(tables, "PAGES", pages)
    monkeypatch.setattr(tables, "save", lambda figure, name: drawn.append(name))
    monkeypatch.setattr(tables, "draw_scaling", lambda curves: drawn.append("scaling"))
    monkeypatch.setattr(tables, "draw_frontier", lambda name, points: drawn.append(name))
    drawn = []
    tables.refresh()
    for page in pages:
        assert page.read_text() == (ROOT / "docs" / page.name).read_text(), (
            "run: python benchmarks/run.py --tables"
        )
    assert all((ROOT / "docs" / "images" / f"{name}.svg").is_file() for name in drawn)
    marks = {name for page in pages for name in tables.TABLES if f"<!-- {name} -->" in page.read_text()}
    assert {path.stem for path in tables.RESULTS.glob("*.json")} <= marks


@pytest.mark.slow  # thousands of resamples of every pair of variants
def test_the_page_of_the_study_says_what_its_raw_results_say(tmp_path, monkeypatch):
    script = module(ROOT / "scripts" / "study.py", monkeypatch)
    shutil.copytree(ROOT / "docs" / "study", tmp_path / "study")
    shutil.copyfile(ROOT / "docs" / "study.md", tmp_path / "study.md")
    assert script.main(["tables", "--docs", str(tmp_path)]) == 0
    assert (tmp_path / "study.md").read_text() == (ROOT / "docs" / "study.md").read_text(), (
        "run: python scripts/study.py tables"
    )


@pytest.fixture
def docs(tmp_path):
    (tmp_path / "docs" / "study").mkdir(parents=True)
    (tmp_path / "docs" / "study" / "tuning.yaml").write_text(TUNING)
    (tmp_path / "docs" / "study" / "study.yaml").write_text(STUDY)
    (tmp_path / "docs" / "study.md").write_text(PAGE)
    return tmp_path / "docs"


def test_tuning_puts_the_best_rate_of_each_variant_into_the_study(docs, tmp_path, monkeypatch):
    script = module(ROOT / "scripts" / "study.py", monkeypatch)
    right = {("grpo", 0.001): "1110", ("grpo", 0.002): "1000", ("t-spmo", 0.001): "0000"}

    def compare(command, **how):
        assert command[:3] == [sys.executable, "-m", "twig"]
        arguments = command[command.index("compare") + 1 :]
        monkeypatch.chdir(tmp_path)
        study = load_study(Path(arguments[0]), [])
        output = Path(arguments[arguments.index("--output") + 1])
        monkeypatch.setattr("study_runs.folder_of", lambda study, planned: output / "runs" / planned.name)
        for planned in runs_of(study, Path(arguments[0]).parent):
            settings = planned.settings
            ended = right.get((settings.algorithm.name, settings.train.learning_rate), "1111")
            write_run(planned, study, {0: "0000", 2: ended}, [150, 160])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=compare))
    made_here = {"commit": "abc", "platform": "here", "cpu_count": 2, "versions": {}}
    monkeypatch.setattr(script, "environment", lambda: made_here)
    monkeypatch.setattr(script, "KEPT", ("summary.json", "evaluations.jsonl", "config.yaml"))
    assert script.main(["tune", "--docs", str(docs), "--work", str(tmp_path / "work")]) == 0
    assert (docs / "study" / "study.yaml").read_text() == STUDY.replace(
        "grpo, train.learning_rate=0.004", "grpo, train.learning_rate=0.001"
    ).replace("t-spmo, train.learning_rate=0.004", "t-spmo, train.learning_rate=0.002")
    page = (docs / "study.md").read_text()
    assert "Not run yet." in page, "the study itself was not run"
    assert "75.0" in page.partition("<!-- study: tuning -->")[2], "grpo's best"
    kept = docs / "study" / "raw" / "tuning"
    assert json.loads((kept / "record.json").read_text())["commit"] == "abc"
    assert len(list((kept / "runs").iterdir())) == 8


def test_a_study_that_fails_keeps_nothing(docs, tmp_path, monkeypatch):
    script = module(ROOT / "scripts" / "study.py", monkeypatch)
    failing = SimpleNamespace(run=lambda command: SimpleNamespace(returncode=3))
    monkeypatch.setattr(script, "subprocess", failing)
    assert script.main(["run", "--docs", str(docs), "--work", str(tmp_path / "work")]) == 3
    assert (docs / "study.md").read_text() == PAGE
    assert not (docs / "study" / "raw").exists()
