"""The pages whose numbers are made from files: benchmarks, performance and study say what the files say."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from study_runs import write_run

from twig.common.errors import UserError
from twig.config.load import load
from twig.runs.folder import RunLog
from twig.study.plan import Planned
from twig.study.runner import Outcome, folder_of

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
STUDY_TRL = (
    "base: quickstart\nmax_tokens: 300\nseeds: [0]\n"
    "variants:\n  trl grpo: [algorithm.name=grpo, train.learning_rate=0.004]\n"
)
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
def test_the_pages_of_the_studies_say_what_their_raw_results_say(tmp_path, monkeypatch):
    script = module(ROOT / "scripts" / "study.py", monkeypatch)
    shutil.copytree(ROOT / "docs" / "study", tmp_path / "study")
    pages = sorted((ROOT / "docs").glob("study*.md"))
    assert len(pages) == 3
    for page in pages:
        shutil.copyfile(page, tmp_path / page.name)
    assert script.main(["tables", "--docs", str(tmp_path)]) == 0
    for page in pages:
        assert (tmp_path / page.name).read_text() == page.read_text(), "run: python scripts/study.py tables"


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

    def run_all(runs, study, jobs, watch):
        outcome = Outcome()
        for planned in runs:
            if planned.name in script.failing:
                outcome.failed[planned.name] = "no memory"
                continue
            if not (folder_of(study, planned) / "summary.json").exists():
                script.commands.append("twig")
                watch.begun(planned.name)
                write(planned, study)
                watch.ended(planned.name, "finished")
        return outcome

    def run(command, **how):
        script.commands.append(command)
        folder = Path(command[-1])
        assert Path(command[1]).is_file() and (folder / "config.yaml").is_file()
        settings = load(str(folder))
        shutil.rmtree(folder)
        variant, _, seed = folder.name.rpartition("-seed-")
        planned = Planned(variant, int(seed), settings)
        assert planned.name == folder.name
        write(planned, folder.parents[1])
        return SimpleNamespace(returncode=0)

    script.failing = set()
    monkeypatch.setattr(script, "run_all", run_all)
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


def test_results_are_kept_as_they_come(docs, tmp_path, script, capsys):
    command = ["tune", "--docs", str(docs), "--work", str(tmp_path / "work")]
    script.failing = {"t-spmo-train.learning_rate-0.002-seed-8"}
    assert script.main([*command, "--only", "twig"]) == 2
    shown = capsys.readouterr().out
    assert "0.002-seed-8: failed: no memory" in shown and "tuning: 5 of 12 runs are missing" in shown
    kept = docs / "study" / "raw" / "tuning"
    assert len(list((kept / "runs").iterdir())) == 7
    page = (docs / "study.md").read_text()
    assert "**So far 7 of 12 runs are there.**" in page
    assert "| t-spmo, train.learning_rate=0.001 | 2 |" in page
    assert "| t-spmo, train.learning_rate=0.002 | 1 of 2 |" in page
    assert (docs / "study" / "study.yaml").read_text() == STUDY, "rates are chosen when all runs are there"
    script.failing = set()
    assert script.main(command) == 0
    assert script.commands[:7] == ["twig"] * 7 and script.commands.count("twig") == 8
    assert len(script.commands) == 12 and len(list((kept / "runs").iterdir())) == 12
    page = (docs / "study.md").read_text()
    assert "So far" not in page and "| 1 of 2 |" not in page and "| trl grpo, train" in page
    assert script.main([*command, "--only", "trl"]) == 0
    assert len(script.commands) == 12, "what TRL had finished is not made again"
    # A study that has got more variants since, and one less.
    path = docs / "study" / "tuning.yaml"
    path.write_text(TUNING.replace("  t-spmo:", "  s-grpo: [algorithm.name=s-grpo]\n  t-spmo:"))
    assert script.main(["tables", "--docs", str(docs)]) == 0
    assert "**So far 12 of 16 runs are there.**" in (docs / "study.md").read_text()
    path.write_text(TUNING.partition("  t-spmo:")[0])
    assert script.main([*command, "--only", "trl"]) == 0
    assert sorted({folder.name[:4] for folder in (kept / "runs").iterdir()}) == ["grpo", "trl-"]
    assert "t-spmo-train.learning_rate-0.001-seed-8 is not in the study any more" in capsys.readouterr().out
    assert "t-spmo" not in (docs / "study.md").read_text()


def test_a_run_is_kept_when_it_ends_and_not_when_all_have(docs, tmp_path, script, monkeypatch):
    monkeypatch.setattr(script, "keep", lambda name, options: False)  # as if it was killed before
    assert script.main(["run", "--docs", str(docs), "--work", str(tmp_path / "work"), "--only", "twig"]) == 0
    assert len(list((docs / "study" / "raw" / "study" / "runs").iterdir())) == 3
    assert "| grpo | 1 |" in (docs / "study.md").read_text()


def test_a_run_that_another_process_trains_is_waited_for(docs, tmp_path, script, monkeypatch, capsys):
    """A study that is killed leaves the processes of its runs, which go on."""
    command = ["run", "--docs", str(docs), "--work", str(tmp_path / "work"), "--only", "twig"]
    planned = script.plan(docs, "study", [])[0][0]
    log = RunLog.create(folder_of(tmp_path / "work" / "study", planned), planned.settings)
    waited = []

    def sleep(seconds):
        assert not script.commands, "nothing begins before"
        waited.append(seconds)
        if len(waited) == 2:
            log.close()

    monkeypatch.setattr(script, "time", SimpleNamespace(sleep=sleep))
    assert script.main(command) == 0
    assert len(waited) == 2 and "grpo-seed-0: waiting" in capsys.readouterr().out
    assert len(script.commands) == 3


def test_what_was_kept_of_other_settings_is_not_shown(docs, tmp_path, script, capsys):
    """Rates that are tuned again make other runs of the same names."""
    command = ["run", "--docs", str(docs), "--only", "twig", "--work"]
    assert script.main([*command, str(tmp_path / "work")]) == 0
    path = docs / "study" / "study.yaml"
    path.write_text(STUDY.replace("grpo, train.learning_rate=0.004", "grpo, train.learning_rate=0.001"))
    assert script.main(["tables", "--docs", str(docs)]) == 0
    page = (docs / "study.md").read_text()
    assert "**So far 2 of 4 runs are there.**" in page and "| grpo |" not in page
    assert script.main([*command, str(tmp_path / "again")]) == 0
    assert "**So far 3 of 4 runs are there.**" in (docs / "study.md").read_text()


def test_seeds_that_are_run_on_their_own_are_seeds_of_the_study(docs, tmp_path, script):
    (docs / "study" / "study.yaml").write_text(STUDY.replace("[0]", "[0, 1]"))
    (docs / "study" / "study-trl.yaml").unlink()
    command = ["run", "--docs", str(docs), "--work", str(tmp_path / "work")]
    for seeds, there in (("[0]", "1 of 2"), ("[1]", "2")):
        assert script.main([*command, f"seeds={seeds}"]) == 0
        assert f"| grpo | {there} |" in (docs / "study.md").read_text()
    record = json.loads((docs / "study" / "raw" / "study" / "record.json").read_text())
    assert record["overrides"] == []


def test_no_folder_of_a_machine_is_in_what_is_kept(docs, tmp_path, script):
    (docs / "study" / "study-trl.yaml").unlink()
    model = tmp_path / "somewhere" / "words"
    model.mkdir(parents=True)
    command = ["run", "--docs", str(docs), "--work", str(tmp_path / "work"), f"model.name={model}"]
    assert script.main([*command, "model.adapter=owner/of-the-hub"]) == 0
    raw = docs / "study" / "raw" / "study"
    texts = {path: path.read_text() for path in raw.rglob("*.*") if path.is_file()}
    assert len(texts) == 3 * 5 + 1 and not any("somewhere" in text for text in texts.values())
    assert all("owner/of-the-hub" in text for path, text in texts.items() if path.name == "config.yaml")
    assert "model.name=words model.adapter=owner/of-the-hub" in texts[raw / "record.json"]
    assert "model.name=words" in (docs / "study.md").read_text(), "and they are those of the study"


def test_svamp_s_test_problems_choose_no_rate(script, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=r"^task\.path: .*held out"):
        script.given("svamp-tuning", ["train.seed=1"])
    with pytest.raises(UserError, match=r"^task\.path: "):
        script.given("svamp-tuning", [f"task.path={tmp_path / 'data'}"])
    file = tmp_path / "data" / "train.jsonl"
    file.write_text("{}")
    for path in (file, file.parent):
        assert script.given("svamp-tuning", [f"task.path={path}", "a.b=1"]) == ["a.b=1", f"task.path={file}"]
    assert script.given("svamp", ["task.path=x"]) == ["task.path=x"]


def test_the_rates_of_each_model_go_into_its_own_studies(docs, tmp_path, script):
    text = TUNING.replace("eval.limit=4", "eval.limit=4, lora.r=4")
    (docs / "study" / "svamp-tuning.yaml").write_text(text)
    (docs / "study" / "svamp.yaml").write_text(STUDY)
    (tmp_path / "train.jsonl").write_text("")
    command = ["run", "--study", "svamp-tuning", "--docs", str(docs), "--work", str(tmp_path / "work")]
    assert script.main([*command, f"task.path={tmp_path}"]) == 0
    chosen = (docs / "study" / "svamp.yaml").read_text()
    assert "grpo, train.learning_rate=0.001" in chosen and "t-spmo, train.learning_rate=0.002" in chosen
    assert (docs / "study" / "study.yaml").read_text() == STUDY
    assert script.main(["tune", "--docs", str(docs), "--work", str(tmp_path / "work")]) == 0
    assert (docs / "study" / "study.yaml").read_text() != STUDY
    assert (docs / "study" / "svamp.yaml").read_text() == chosen


def test_a_run_of_trl_that_began_with_other_settings_is_refused(docs, tmp_path, script):
    command = ["tune", "--docs", str(docs), "--work", str(tmp_path / "work"), "--only", "trl"]
    assert script.main(command) == 0
    with pytest.raises(UserError, match="trl-grpo.*began with other settings"):
        script.main([*command, "max_tokens=299"])


def test_a_study_that_fails_keeps_nothing(docs, tmp_path, script, monkeypatch):
    failing = SimpleNamespace(run=lambda command, **how: SimpleNamespace(returncode=3))
    monkeypatch.setattr(script, "subprocess", failing)
    command = ["tune", "--docs", str(docs), "--work", str(tmp_path / "work")]
    assert script.main([*command, "--only", "trl"]) == 3
    monkeypatch.setattr(script, "run_all", lambda *of: Outcome(stopped=True))
    assert script.main(command) == 130
    assert (docs / "study.md").read_text() == PAGE
    assert not (docs / "study" / "raw").exists()
