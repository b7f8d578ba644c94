"""`twig runs` and folders of runs: states, order, names, widths; and what only looks changes nothing."""

import io
import json
import os
import threading
from pathlib import Path

import pytest
from rich.console import Console
from run_folders import write_run

from twig.cli.app import main
from twig.cli.completion import complete_folder
from twig.common import files
from twig.common.errors import UserError
from twig.common.files import FolderLock, in_use
from twig.config.load import load
from twig.runs.folder import RunLog
from twig.runs.listing import STATES, list_runs, runs_in, short_names
from twig.runs.reader import read_summary


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made(name: str, *overrides: str, **options) -> Path:
    return write_run(Path("runs", name), [*overrides, "train.max_steps=40"], saved=(), **options)


def without_summary(folder: Path) -> Path:
    (folder / "summary.json").unlink()
    return folder


def log_of(folder: Path) -> RunLog:
    return RunLog(folder, load(str(folder)))


def one(folder: Path):
    (run,) = list_runs(folder)
    return run


def shown(*arguments: object, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["runs", *map(str, arguments)]) == 0
    return capsys.readouterr().out


# ---- states ------------------------------------------------------------------------------------------------


def test_a_run_with_a_result_is_finished() -> None:
    run = one(made("a"))
    assert (run.state, run.step, run.steps, run.seconds) == ("finished", 40, 40, pytest.approx(36))
    assert (run.accuracy_before, run.accuracy_after, run.accuracy_step) == (0.45, 0.8, 40)
    assert (run.task, run.algorithm, run.reason) == ("multiplication", "t-spmo", None)


def test_a_folder_that_is_locked_is_a_running_run_whatever_is_in_it() -> None:
    folder = made("a")
    lock = FolderLock(folder)
    assert lock.take()
    assert one(folder).state == "running"
    lock.release()
    assert one(folder).state == "finished"


def test_a_stopped_run_says_how_far_it_came() -> None:
    folder = made("a", steps=25)
    log_of(folder).save_summary((read_summary(folder) or {}) | {"status": "stopped", "accuracy_after": None})
    run = one(folder)
    assert (run.state, run.step, run.steps) == ("stopped", 25, 40)
    assert (run.accuracy_before, run.accuracy_after) == (0.45, None)


def test_a_run_that_ended_without_a_result_failed() -> None:
    run = one(without_summary(made("a", steps=7)))
    assert (run.state, run.step, run.steps, run.reason) == ("failed", 7, 40, None)
    assert run.seconds == pytest.approx(7 * 0.9), "from the rows"


def test_a_fault_after_a_result_counts_and_a_result_after_a_fault_too() -> None:
    folder = made("a")
    log_of(folder).save_traceback("Traceback (most recent call last):\nValueError: no \x1b[31mreward\n")
    run = one(folder)
    assert (run.state, run.reason) == ("failed", "ValueError: no \\x1b[31mreward")
    log_of(folder).save_summary(read_summary(folder) or {})
    assert one(folder).state == "finished"


def test_steps_after_the_result_are_of_a_run_that_was_resumed_and_ended_without_one() -> None:
    folder = made("a")
    log_of(folder).log(41, {"tokens/sampled": 5})
    assert (one(folder).state, one(folder).step) == ("failed", 41)


def test_a_folder_with_settings_only_is_a_run_not_begun() -> None:
    RunLog.create(Path("runs/a"), load("quickstart")).close()
    run = one(Path("runs"))
    assert (run.state, run.step, run.steps, run.seconds) == ("not begun", 0, 100, None)


def test_a_run_under_way_has_the_accuracy_of_its_newest_evaluation() -> None:
    folder = without_summary(made("a"))
    log = log_of(folder)
    for step, problems, right in ((0, "a", "0001"), (0, "b", "1000"), (20, "b", "1100"), (30, "b", "1110")):
        log.save_evaluation(step, {"problems": problems, "right": right, "answered": None})
    run = one(folder)
    assert (run.accuracy_before, run.accuracy_after, run.accuracy_step) == (0.25, 0.75, 30)
    log.save_evaluation(40, {"problems": "c", "right": "1111", "answered": None})
    assert (one(folder).accuracy_before, one(folder).accuracy_after) == (None, 1.0), "other problems"


def test_what_is_damaged_is_listed_with_what_is_left() -> None:
    folder = without_summary(made("a"))
    (folder / "config.yaml").write_text("model: [")
    (folder / "metrics.jsonl").write_text("{\n{}\n")
    (folder / "evaluations.jsonl").write_text('{"step": 1\n')
    run = one(folder)
    assert (run.state, run.task, run.step, run.steps, run.accuracy_after) == ("failed", None, 0, None, None)


def test_a_run_of_so_many_tokens_does_not_say_of_how_many_steps() -> None:
    folder = without_summary(made("a", "train.max_tokens=100000"))
    assert one(folder).steps is None


# ---- which runs, and their names ---------------------------------------------------------------------------


def test_the_newest_run_comes_first_and_runs_in_a_folder_are_in_the_order_of_their_numbers() -> None:
    for number in (2, 10, 1):
        folder = made(f"a-{number}", steps=2)
        for path in folder.iterdir():
            os.utime(path, (number, number))
    (Path("runs") / "photos").mkdir()
    assert [run.name for run in list_runs(Path("runs"))] == ["a-10", "a-2", "a-1"]
    assert [path.name for path in runs_in(Path("runs"))] == ["a-1", "a-2", "a-10"]


def test_the_folder_of_a_study_has_the_runs_of_the_study() -> None:
    folder = made("a", steps=2)
    assert runs_in(Path()) == [folder]
    assert runs_in(folder) == [folder]


def test_a_name_is_as_long_as_it_must_be() -> None:
    folders = [Path("one/runs/a"), Path("two/runs/a"), Path("one/runs/b")]
    assert short_names(folders) == ["one/runs/a", "two/runs/a", "b"]
    assert short_names([Path("one/runs/a"), Path("one/b/a")]) == ["runs/a", "b/a"]
    assert short_names([Path("/")]) == ["/"] or os.name == "nt"


def test_no_runs_is_no_mistake_but_no_folder_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert "twig train quickstart" in shown(capsys=capsys)
    assert json.loads(shown("--json", capsys=capsys)) == []
    with pytest.raises(UserError, match="nowhere"):
        list_runs(Path("nowhere"))


# ---- what is shown -----------------------------------------------------------------------------------------


def test_a_line_has_all_about_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    made("quickstart-1")
    lines = shown(capsys=capsys).splitlines()
    assert lines[0].split() == ["run", "task", "algorithm", "state", "step", "accuracy", "time"]
    assert lines[1].split() == "quickstart-1 multiplication t-spmo finished 40/40 45.0 -> 80.0 % 0:36".split()


def test_json_has_plain_values(capsys: pytest.CaptureFixture[str]) -> None:
    made("quickstart-1")
    (run,) = json.loads(shown("--json", capsys=capsys))
    assert (run["folder"], run["state"], run["accuracy_after"]) == ("runs/quickstart-1", "finished", 0.8)
    assert run["changed"].startswith("20") and run["state"] in STATES


@pytest.mark.parametrize("width", [60, 80])
def test_lines_fit_into_a_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made("a \x1b[31mname that is longer than any terminal has room for " + "x" * 60)
    made("漢字-1", "algorithm.name=grpo")
    out = io.StringIO()
    monkeypatch.setattr(
        "twig.cli.runs.result_console",
        lambda: Console(file=out, force_terminal=True, width=width, color_system=None),
    )
    shown(capsys=capsys)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width and "\x1b" not in out.getvalue()
    assert len(lines) == 4, "two lines for each run"


def test_folders_with_runs_are_completed() -> None:
    made("a", steps=2)
    (Path("photos") / "summer").mkdir(parents=True)
    assert complete_folder("") == complete_folder("ru") == ["runs"]
    assert complete_folder("p") == []
    write_run(Path("studies/mine/runs/b"), saved=(), steps=2)
    assert complete_folder("studies/") == ["studies/mine/runs"]


# ---- folders of runs in a report ---------------------------------------------------------------------------


def test_a_report_takes_a_folder_of_runs(capsys: pytest.CaptureFixture[str]) -> None:
    made("a-1", steps=2)
    made("a-2", "algorithm.name=grpo", steps=2)
    write_run(Path("others/a-1"), seed=3, saved=(), steps=2)
    RunLog.create(Path("runs/new"), load("quickstart")).close()
    assert main(["report", "runs", "others/a-1"]) == 0
    page = Path("report.html").read_text(encoding="utf-8")
    rows = [
        name for name in ("a-2", "runs/a-1", "others/a-1", "new") if f'<th scope="row">{name}</th>' in page
    ]
    assert rows == ["a-2", "runs/a-1", "others/a-1"], "and not the one that never began"
    assert main(["report", "."]) == 0
    Path("photos").mkdir()
    assert main(["report", "photos"]) == 2
    assert "photos: it holds no run" in capsys.readouterr().err


def test_arms_that_differ_in_much_have_the_names_of_runs(capsys: pytest.CaptureFixture[str]) -> None:
    made("a-1", steps=2)
    made("a-2", "train.learning_rate=0.5", "lora.r=4", "rollout.temperature=0.5", steps=2)
    assert main(["report", "runs"]) == 0
    page = Path("report.html").read_text(encoding="utf-8")
    assert '<th colspan="8" scope="colgroup">a-2</th>' in page


# ---- looking changes nothing -------------------------------------------------------------------------------


def test_looking_leaves_no_file_and_no_lock() -> None:
    folder = made("a", steps=2)
    (folder / ".lock").unlink(missing_ok=True)
    before = sorted(folder.iterdir())
    assert not in_use(folder) and sorted(folder.iterdir()) == before
    lock = FolderLock(folder)
    assert lock.take() and in_use(folder)
    lock.release()
    assert not in_use(folder) and FolderLock(folder).take()


def test_a_run_waits_for_one_who_only_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is let go while another waits: with 60 s of patience, however slow the machine."""
    monkeypatch.setattr(files, "_PATIENCE", 60.0)
    looking = FolderLock(Path())
    assert looking.take()
    timer = threading.Timer(0.01, looking.release)
    timer.start()
    assert FolderLock(Path()).take()
    timer.join()
