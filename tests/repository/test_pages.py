"""The pages whose numbers are made from files: benchmarks, performance and study say what the files say."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from study_runs import write_run

from twig.common.errors import UserError
from twig.config.load import load
from twig.study.plan import Planned, load_study, runs_of

ROOT = Path(__file__).resolve().parents[2]
TUNING = """
base: quickstart
max_tokens: 300
seeds: [7, 8]
overrides: [eval.limit=4]
grid:
  train.learning_rate: [0.001, 0.002]
variants:
  grpo: [algorithm.name=grpo]
  t-spmo: [algorithm.name=t-spmo]
"""
TUNING_TRL = TUNING.partition("variants:")[0] + "variants:\n  trl grpo: [algorithm.name=grpo]\n"
STUDY = """
base: quickstart
max_tokens: 300
seeds: [0]
variants:
  grpo: [algorithm.name=grpo, train.learning_rate=0.004]
  # a remark that stays
  t-spmo: [algorithm.name=t-spmo, train.learning_rate=0.004]
  t-spmo, in another way: [train.learning_rate=0.004, algorithm.normalise=group]
"""
NEIGHBOURS = """
base: quickstart
grid:
  train.learning_rate: [0.002, 0.004]
variants:
  dr-grpo: [algorithm.name=dr-grpo]
"""
STUDY_TRL = "variants:\n  trl grpo: [algorithm.name=grpo, train.learning_rate=0.004]\n"
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
    sources = [*tables.PAGES, tables.README]
    pages = [tmp_path / page.name for page in sources]
    for source, page in zip(sources, pages, strict=True):
        shutil.copyfile(source, page)
    monkeypatch.setattr(tables, "PAGES", pages[:-1])
    monkeypatch.setattr(tables, "README", pages[-1])
    monkeypatch.setattr(tables, "save", lambda figure, name: drawn.append(name))
    monkeypatch.setattr(tables, "draw_scaling", lambda curves: drawn.append("scaling"))
    monkeypatch.setattr(tables, "draw_frontier", lambda name, points: drawn.append(name))
    drawn = []
    tables.refresh()
    for source, page in zip(sources, pages, strict=True):
        assert page.read_text() == source.read_text(), "run: python benchmarks/run.py --tables"
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
    texts = {
        **{"tuning": TUNING, "tuning-trl": TUNING_TRL, "study": STUDY, "study-trl": STUDY_TRL},
        "neighbours": NEIGHBOURS,
    }
    (tmp_path / "docs" / "study").mkdir(parents=True)
    for name, text in texts.items():
        (tmp_path / "docs" / "study" / f"{name}.yaml").write_text(text)
    (tmp_path / "docs" / "study.md").write_text(PAGE)
    return tmp_path / "docs"


@pytest.fixture
def script(monkeypatch):
    """scripts/study.py with the commands it calls replaced: they leave runs with a made-up history.

    The rate that is best on the way, 0.001 for GRPO and 0.002 for T-SPMO, ends worse than the other.
    """
    script = module(ROOT / "scripts" / "study.py", monkeypatch)
    script.commands = []

    def history(settings):
        quick = (settings.algorithm.name, settings.train.learning_rate) in (
            ("grpo", 0.001),
            ("t-spmo", 0.002),
        )
        return {0: "0000", 1: "1110", 2: "1110"} if quick else {0: "0000", 1: "0000", 2: "1111"}

    def write(planned, study):
        folder = write_run(planned, study, history(planned.settings), [150, 160]).folder
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(summary | {"trl": "1.2"}))

    def run(command, **how):
        script.commands.append(command)
        if "compare" in command:
            assert command[:3] == [sys.executable, "-m", "twig"]
            study = Path(command[command.index("compare") + 1])
            for planned in runs_of(load_study(study, []), study.parent):
                write(planned, Path(command[command.index("--output") + 1]))
        else:
            folder = Path(command[-1])
            assert Path(command[1]).is_file() and (folder / "config.yaml").is_file()
            settings = load(str(folder))
            shutil.rmtree(folder)
            variant, _, seed = folder.name.rpartition("-seed-")
            planned = Planned(variant, int(seed), settings)
            assert planned.name == folder.name
            write(planned, folder.parents[1])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run))
    made_here = {"platform": "here", "cpu_count": 2, "versions": {}}
    monkeypatch.setattr(script, "environment", lambda: made_here)
    return script


def test_tuning_puts_the_rate_with_the_best_area_into_the_studies(docs, tmp_path, script):
    assert script.main(["tune", "--docs", str(docs), "--work", str(tmp_path / "work")]) == 0
    folder = docs / "study"
    assert (folder / "study.yaml").read_text() == STUDY.replace(
        "grpo, train.learning_rate=0.004", "grpo, train.learning_rate=0.001"
    ).replace("t-spmo, train.learning_rate=0.004", "t-spmo, train.learning_rate=0.002").replace(
        "[train.learning_rate=0.004", "[train.learning_rate=0.002"
    )
    assert (folder / "study-trl.yaml").read_text() == STUDY_TRL.replace("0.004", "0.001")
    # Two rates around the best of grpo, which is not between those that were there.
    assert (folder / "neighbours.yaml").read_text() == NEIGHBOURS.replace("[0.002, 0.004]", "[0.0005, 0.001]")
    assert (folder / "tuning.yaml").read_text() == TUNING
    page = (docs / "study.md").read_text()
    assert "Not run yet." in page, "the study itself was not run"
    tuning = page.partition("<!-- study: tuning -->")[2]
    assert "75.0" in tuning and "| trl grpo, train.learning_rate=0.001 |" in tuning
    kept = docs / "study" / "raw" / "tuning"
    assert json.loads((kept / "record.json").read_text())["trl"] == "1.2"
    assert len(list((kept / "runs").iterdir())) == 12


def test_a_rate_is_tuned_only_by_runs_that_were_evaluated_on_the_way(docs, tmp_path, script, monkeypatch):
    monkeypatch.setattr(
        script, "compare_runs", lambda *of: {"variants": {f"a, {script.RATE}1": {"area": None}}}
    )
    with pytest.raises(UserError, match=r"eval\.steps"):
        script.main(["tune", "--docs", str(docs), "--work", str(tmp_path / "work")])


def test_results_are_kept_once_all_runs_of_both_are_there(docs, tmp_path, script, capsys):
    command = ["tune", "--docs", str(docs), "--work", str(tmp_path / "work")]
    assert script.main([*command, "--only", "twig"]) == 0
    assert len(script.commands) == 1 and "compare" in script.commands[0]
    assert "nothing kept, 4 runs are missing" in capsys.readouterr().out
    assert not (docs / "study" / "raw").exists()
    assert script.main([*command, "--only", "trl"]) == 0
    assert len(script.commands) == 5 and not any("compare" in command for command in script.commands[1:])
    assert len(list((docs / "study" / "raw" / "tuning" / "runs").iterdir())) == 12
    assert script.main([*command, "--only", "trl"]) == 0
    assert len(script.commands) == 5, "what TRL had finished is not made again"
    # A study that has got more variants since: its tables stay.
    page = (docs / "study.md").read_text()
    path = docs / "study" / "tuning.yaml"
    path.write_text(TUNING + "  s-grpo: [algorithm.name=s-grpo]\n")
    assert script.main(["tables", "--docs", str(docs)]) == 0
    assert (docs / "study.md").read_text() == page
    assert "4 runs are missing, such as s-grpo" in capsys.readouterr().out


def test_a_run_of_trl_that_began_with_other_settings_is_refused(docs, tmp_path, script):
    command = ["tune", "--docs", str(docs), "--work", str(tmp_path / "work"), "--only", "trl"]
    assert script.main(command) == 0
    with pytest.raises(UserError, match="trl-grpo.*began with other settings"):
        script.main([*command, "max_tokens=299"])


def test_a_study_that_fails_keeps_nothing(docs, tmp_path, script, monkeypatch):
    failing = SimpleNamespace(run=lambda command, **how: SimpleNamespace(returncode=3))
    monkeypatch.setattr(script, "subprocess", failing)
    for only in ([], ["--only", "trl"]):
        command = ["tune", "--docs", str(docs), "--work", str(tmp_path / "work"), *only]
        assert script.main(command) == 3
        assert (docs / "study.md").read_text() == PAGE
        assert not (docs / "study" / "raw").exists()
