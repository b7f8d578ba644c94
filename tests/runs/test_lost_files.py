"""What a run's folder has lost is said, what a kill left is tidied up, and a person's files are kept."""

import shutil

import pytest
from small_runs import STEPS, Heard, ask_to_stop, at, record

from twig.cli.app import main
from twig.common.files import put_folder
from twig.runs.folder import NoLog, RunLog
from twig.runs.reader import damage, is_adapter, read_metrics, read_summary


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of a small run that is finished."""
    shutil.copytree(whole(), tmp_path / "run")
    return tmp_path / "run"


def said(heard):
    return [line for line in heard.said if line.startswith("message warning")]


# Lost


def test_rows_of_metrics_that_are_gone_are_said_on_resume(run, tmp_path):
    run("run", progress=Heard(step=at(4, ask_to_stop)))
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if '"step": 2' not in line and '"step": 3' not in line))
    heard = Heard()
    run("run", resume=True, progress=heard)
    (line,) = said(heard)
    assert "lacks 2 of 4 steps (the first: 2)" in line
    assert "lacks 2 of 4 steps" in (tmp_path / "run" / "warnings.txt").read_text()


def test_a_whole_run_has_lost_nothing(finished, run):
    assert damage(finished, STEPS, ["adapter", "adapter-best"]) == []
    heard = Heard()
    run("run", resume=True, progress=heard)
    assert said(heard) == []


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def lose(path):
    path.unlink()


def replace(path):
    path.write_bytes(b"[1]" * 9)


_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_HARMS = [(_WEIGHTS, harm) for harm in (cut, flip, lose, replace)]
_HARMS += [(_CONFIG, harm) for harm in (cut, lose, replace)]  # it has no checksum


@pytest.mark.parametrize("file, harm", _HARMS)
def test_a_damaged_adapter_is_known_by_its_files(finished, file, harm):
    assert is_adapter(finished / "adapter-best")
    harm(finished / "adapter-best" / file)
    assert not is_adapter(finished / "adapter-best")


def test_a_damaged_adapter_is_said_on_resume(run, tmp_path, monkeypatch, capsys):
    run("run", progress=Heard(step=at(4, ask_to_stop)))
    flip(tmp_path / "run" / "adapter-best" / "adapter_model.safetensors")
    heard = Heard()
    run("run", resume=True, progress=heard)
    (line,) = said(heard)
    assert "adapter-best is missing or damaged" in line


def test_a_finished_run_says_what_it_lacks_and_makes_its_report(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished.parent)
    (finished / "report.html").unlink()
    (finished / "metrics.jsonl").unlink()
    shutil.rmtree(finished / "adapter-best")
    assert main(["train", "run", "--resume"]) == 0
    shown = capsys.readouterr()
    assert f"lacks {STEPS} of {STEPS} steps" in shown.err and "adapter-best is missing" in shown.err
    assert f"{STEPS} steps, finished" in shown.out
    assert (finished / "report.html").is_file()


def test_a_report_that_a_kill_prevented_is_made_on_resume(run, tmp_path, monkeypatch):
    """Also if the run has one of an earlier stop."""
    run("run", progress=Heard(step=at(4, ask_to_stop)))
    report = tmp_path / "run" / "report.html"
    assert report.is_file()

    class Killed(BaseException):
        pass

    def killed(*arguments):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("twig.training.session.report_of_run", killed)
        run("run", resume=True)
    assert read_summary(tmp_path / "run")["status"] == "finished"
    assert not report.exists(), "the old one is that of another summary"
    run("run", resume=True)
    assert report.is_file()


# Left over


def test_what_a_killed_process_set_aside_is_cleared_away(finished):
    for name in (".step-4.old", ".step-8.tmp", ".step-6.old"):
        (finished / "checkpoints" / name / "inner").mkdir(parents=True)
    (finished / ".adapter.tmp").mkdir()
    shutil.copytree(finished / "adapter", finished / ".adapter.old")
    (finished / ".notes.old").mkdir()
    before = {path.name for path in (finished / "checkpoints").glob("step-*")}
    RunLog.open(finished).close()
    assert {path.name for path in (finished / "checkpoints").iterdir()} == before
    assert [path.name for path in finished.glob(".*") if path.is_dir()] == [".notes.old"]


def test_an_adapter_that_was_set_aside_when_the_process_died_is_put_back(finished, monkeypatch):
    (finished / ".adapter.tmp").mkdir()
    real, calls = __import__("os").replace, []

    def replace(old, new):
        calls.append(new)
        if len(calls) >= 2:
            raise KeyboardInterrupt  # between the two renames: nothing is put back either
        real(old, new)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("os.replace", replace)
        put_folder(finished / ".adapter.tmp", finished / "adapter")
    assert not (finished / "adapter").exists()
    RunLog.open(finished).close()
    assert is_adapter(finished / "adapter")


def test_a_file_of_a_persons_in_an_adapter_is_kept(run, whole, tmp_path):
    """Until the run is finished, and after more steps."""
    run("run", progress=Heard(step=at(4, ask_to_stop)))
    for name in ("adapter", "adapter-best"):
        folder = tmp_path / "run" / name
        (folder / "mine").mkdir(parents=True, exist_ok=True)
        (folder / "mine" / "notes.txt").write_text("why")
        (folder / "README.md").write_text("what")
        (folder / "link").symlink_to("nowhere")
    done = run("run", resume=True)
    assert record(done.folder) == record(whole())
    for name in ("adapter", "adapter-best"):
        folder = done.folder / name
        assert (folder / "mine" / "notes.txt").read_text() == "why"
        assert (folder / "README.md").read_text() == "what" and (folder / "link").is_symlink()
        assert is_adapter(folder)


# The log of other processes


def test_the_silent_log_has_the_methods_of_the_real_one_and_no_other(finished):
    real = RunLog.open(finished)
    silent = NoLog(finished, real.settings)
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for name in (each for each in vars(RunLog) if each[0] != "_"):
        if callable(getattr(RunLog, name)):
            assert getattr(silent, name)(1, {}) is None
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    for misspelt in ("save_sumary", "_write_rows", "Log"):
        with pytest.raises(AttributeError, match=misspelt):
            getattr(silent, misspelt)
    real.close()
    assert len(read_metrics(finished)) > 0
