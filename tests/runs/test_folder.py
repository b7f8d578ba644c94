"""The run folder: what is in it, that it is never half written, and that it never replaces another run."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from twig.common.errors import UserError
from twig.common.files import FolderLock
from twig.config.load import load
from twig.runs.folder import FACTS, RunLog, new_folder, newest_folder
from twig.runs.reader import is_run, read_metrics, read_summary
from twig.runtime.machine import environment, processor

SUMMARY = {
    "status": "finished",
    "algorithm": "grpo",
    "task": "svamp",
    "steps": 3,
    "tokens_sampled": 100,
    "tokens_selected": 10,
    "nodes_run": 50,
    "seconds": 1.5,
}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def log(tmp_path):
    return RunLog.create(tmp_path / "run", load("quickstart"))


def snapshot(folder):
    """Path to content, for everything below a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The folder


def test_a_new_run_holds_its_settings_and_environment(log):
    assert {path.name for path in log.folder.iterdir()} == {"config.yaml", "environment.json", ".lock"}
    log.close()
    assert RunLog.open(log.folder).settings == load("quickstart")


def test_runs_are_numbered_and_the_newest_is_found():
    assert newest_folder("quickstart") is None
    first, second = (new_folder("quickstart") for _ in range(2))
    new_folder("quickstart-2")  # another name, though it begins alike
    assert (first.name, second.name) == ("quickstart-1", "quickstart-2")
    assert newest_folder("quickstart") is None, "empty folders are no runs"
    for folder in (first, second):
        RunLog.create(folder, load("quickstart"))
    assert newest_folder("quickstart") == second
    second.rename("runs/quickstart-10")
    assert newest_folder("quickstart").name == "quickstart-10"
    assert new_folder("quickstart").name == "quickstart-11"


def test_a_run_without_a_number_is_the_oldest():
    RunLog.create("runs/quickstart", load("quickstart"))
    assert newest_folder("quickstart").name == "quickstart"
    RunLog.create(new_folder("quickstart"), load("quickstart"))
    assert newest_folder("quickstart").name == "quickstart-1"


def test_without_output_the_folder_is_named_after_task_and_algorithm():
    folder = RunLog.create(None, load("quickstart")).folder
    assert folder == Path.cwd() / "runs" / "multiplication-t-spmo-1"


@pytest.mark.parametrize("began_with", ["metrics.jsonl", "summary.json", "checkpoints"])
def test_another_run_is_never_replaced(log, began_with):
    (log.folder / began_with).write_text("kept")
    before = snapshot(log.folder)
    with pytest.raises(UserError, match="holds another run.*--resume"):
        RunLog.create(log.folder, load("quickstart", ["train.seed=1"]))
    assert snapshot(log.folder) == before


def test_a_run_that_never_began_may_be_started_over(log):
    log.save_traceback("of a reward function, at the first evaluation")
    log.close()
    RunLog.create(log.folder, load("quickstart", ["train.seed=1"])).close()
    assert not (log.folder / "traceback.txt").exists()
    assert RunLog.open(log.folder).settings.train.seed == 1


def test_a_folder_that_another_process_has_is_refused_until_that_ends(log, tmp_path):
    """Whatever the process leaves behind: the lock ends with it."""
    log.close()
    code = "import sys, time; from pathlib import Path; from twig.common.files import FolderLock\n"
    code += "lock = FolderLock(Path(sys.argv[1])); print(lock.take(), flush=True); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", code, log.folder], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "True\n"
    for enter in (lambda: RunLog.open(log.folder), lambda: RunLog.create(log.folder, load("quickstart"))):
        with pytest.raises(UserError, match="another process is training there") as refused:
            enter()
        assert "\n" not in str(refused.value)
    log.discard()
    assert is_run(log.folder), "a folder that is another's is not removed"
    other.kill()
    other.wait()
    other.stdout.close()
    RunLog.open(log.folder).close()


FORKS = """
import os, sys, time
from pathlib import Path
from twig.common.files import FolderLock
lock = FolderLock(Path(sys.argv[1]))
assert lock.take()
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(600)
"""


def test_a_forked_process_does_not_keep_the_folder(log):
    """The process that took it is killed, one that it forked lives on."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    log.close()
    parent = subprocess.Popen([sys.executable, "-c", FORKS, log.folder], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    try:
        with pytest.raises(UserError, match="another process"):
            RunLog.open(log.folder)
        parent.kill()
        parent.wait()
        RunLog.open(log.folder).close()
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP], ids=errno.errorcode.get)
def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch, number):
    def refuse(*arguments):
        raise OSError(number, "no locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert FolderLock(tmp_path).take()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(UserError, match="not empty and not a run"):
        RunLog.create(tmp_path / "photos", load("quickstart"))
    with pytest.raises(UserError, match="a file, not a folder"):
        RunLog.create(tmp_path / "photos" / "cat.png", load("quickstart"))
    with pytest.raises(UserError, match="--output"):
        RunLog.create(tmp_path / "photos" / "cat.png" / "run", load("quickstart"))
    assert snapshot(tmp_path / "photos") == {next(iter(snapshot(tmp_path / "photos"))): b"cat"}
    with pytest.raises(UserError, match="holds no run"):
        RunLog.open(tmp_path / "photos")


def test_discard_removes_a_run_that_never_began_and_no_other(tmp_path, log):
    log.log(1, {"reward": 1.0})
    log.discard()
    assert is_run(log.folder)
    other = RunLog.create(tmp_path / "other", load("quickstart"))
    other.save_traceback("to be read")
    other.discard()
    (other.folder / "traceback.txt").unlink()
    other.discard()
    assert not other.folder.exists()


# Metrics


def test_metrics_are_appended_one_row_a_line(log):
    log.log(1, {"reward": 0.5, "tokens/sampled": np.int64(7)})
    log.log(2, {"reward": np.float32(0.25), "list": np.arange(2)})
    lines = (log.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "reward": 0.5, "tokens/sampled": 7},
        {"step": 2, "reward": 0.25, "list": [0, 1]},
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -np.inf, np.float32("nan"), [1.0, float("nan")]])
def test_a_number_that_is_not_finite_is_null_and_never_invalid_json(log, bad):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    log.log(1, {"reward": bad, "nested": {"x": bad}})
    log.save_summary({"value": bad})
    for name in ("metrics.jsonl", "summary.json"):
        json.loads((log.folder / name).read_text(), parse_constant=refuse)
    assert read_metrics(log.folder)[0]["reward"] in (None, [1.0, None])


def test_rewinding_drops_later_rows_and_a_torn_one(log):
    for step in (1, 2, 3):
        log.log(step, {"reward": step})
        log.save_completions(step, [])
    with open(log.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')
    log.rewind(2)
    log.log(3, {"reward": 30})
    assert [row["reward"] for row in read_metrics(log.folder)] == [1, 2, 30]
    assert sorted(p.name for p in (log.folder / "completions").iterdir()) == [
        "step-1.parquet",
        "step-2.parquet",
    ]


def test_rewinding_a_run_without_metrics_does_nothing(log):
    log.rewind(0)
    assert not (log.folder / "metrics.jsonl").exists()


# Completions


def test_completions_are_a_table_with_a_list_per_token(log):
    from pyarrow import parquet

    rows = [
        {
            "prompt_index": 3,
            "completion_index": 0,
            "prompt": "2+3=",
            "completion": "5 \x00 ä",
            "token_ids": [4, 5],
            "logps": [-0.1, -0.2],
            "entropies": [0.5, 0.25],
            "weights": [0.0, -1.0],
            "reward": 1.0,
            "finished": True,
        },
        {"prompt_index": 3, "completion_index": 1, "token_ids": [], "reward": None},
    ]
    path = log.save_completions(25, rows)
    assert path.name == "step-25.parquet"
    saved = parquet.read_table(path).to_pylist()
    assert [row["step"] for row in saved] == [25, 25]
    assert {key: saved[0][key] for key in rows[0]} == rows[0]
    assert (saved[1]["token_ids"], saved[1]["reward"]) == ([], None)
    assert list(saved[0]) == [field.name for field in parquet.read_schema(log.save_completions(26, []))]


# Whole files


def test_a_crash_while_writing_the_summary_leaves_the_old_one(log, monkeypatch):
    log.save_summary(SUMMARY | {"status": "stopped"})

    def crash(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="No space"):
        log.save_summary(SUMMARY)
    assert read_summary(log.folder) == SUMMARY | {"status": "stopped"}


@pytest.mark.parametrize(
    "damaged",
    [
        "{",
        "[]",
        "{}",
        '"finished"',
        json.dumps(SUMMARY | {"tokens_sampled": "many"}),
        json.dumps(SUMMARY | {"status": None}),
        json.dumps(SUMMARY | {"accuracy_after": "good"}),
        json.dumps(SUMMARY | {"accuracy_after": {"value": 0.5, "low": None, "high": 1, "n": 3}}),
    ],
)
def test_a_summary_that_cannot_be_read_is_none(log, damaged):
    assert log.summary() is None
    (log.folder / "summary.json").write_text(damaged)
    assert log.summary() is None
    log.save_summary(SUMMARY)
    assert log.summary() == SUMMARY


def test_a_damaged_row_of_metrics_is_one_line(log):
    log.log(1, {"reward": 0.5})
    for damaged in (b"{bro\n", b"\xff\n", b"[]\n", b"{}\n"):
        (log.folder / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + damaged)
        with pytest.raises(UserError, match="metrics.jsonl line 2: damaged"):
            read_metrics(log.folder)


def test_tracebacks_and_warnings_have_their_files(log):
    assert log.save_traceback("Traceback\n").read_text() == "Traceback\n"
    log.warn("one\nline")
    log.warn("two")
    assert (log.folder / "warnings.txt").read_text() == "one line\ntwo\n"


# The environment


def test_the_environment_is_an_allow_list(log, monkeypatch):
    """Nothing of the machine's owner is written: no variable of the environment, no user, no host."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    log.save_environment(device="cpu", dtype="float32")
    text = (log.folder / "environment.json").read_text()
    values = json.loads(text)
    own = {"python", "platform", "machine", "processor", "cpu_count", "versions", "commit"}
    assert set(values) == {*own, *FACTS}
    assert (values["device"], values["dtype"], values["device_name"]) == ("cpu", "float32", None)
    assert {"twig-rl", "torch", "transformers", "peft"} <= set(values["versions"])
    assert "hf_secret" not in text
    assert not re.search(r"/(home|Users|root)/", text)
    with pytest.raises(AssertionError, match="on the list"):
        log.save_environment(token="x")


def test_the_processor_has_a_name(tmp_path):
    """Runs of one study may be made on several kinds of machines, whose seconds are not to be compared."""
    place = tmp_path / "cpuinfo"
    place.write_text("model name\t: Some Xeon\nflags\t\t: fpu avx2 avx512f avx512vl amx_bf16\n" * 2)
    assert processor(place) == "Some Xeon (avx2, avx512f, amx_bf16)"
    place.write_bytes(b"model name\t: An older \xa9ne\nflags\t\t: fpu\n")
    assert processor(place) == "An older \ufffdne"
    place.write_text("Features\t: fp asimd\n")
    assert processor(place) is None
    assert environment()["processor"] == processor()


def test_the_commit_is_that_of_twigs_own_checkout():
    commit = environment()["commit"]
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit)
