"""What shows a run may break at any time, and the run neither ends nor fails nor falls silent."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from saved import save_model

from twig.cli.app import main
from twig.cli.console import Stream, unfailing_streams
from twig.report.progress import LiveProgress, PlainProgress, showing
from twig.runs.reader import read_metrics

SMALL = (
    "eval.limit=4 rollout.max_completion_length=8 rollout.num_generations=4 rollout.prompts_per_step=2 "
    "train.max_steps=3"
).split()
METRICS = {"reward": 0.5, "tokens/sampled": 100, "tokens/selected": 5, "time/step": 0.1}
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


class Failing(io.StringIO):
    """A terminal whose writes and flushes fail while `broken` is set."""

    def __init__(self, error):
        super().__init__()
        self.error, self.broken = error, True

    def write(self, text):
        if self.broken:
            raise self.error
        return super().write(text)

    def flush(self):
        if self.broken:
            raise self.error

    def isatty(self):
        return True


ERRORS = [BrokenPipeError(32, "pipe"), OSError(5, "hung up"), OSError(28, "full"), ValueError("closed")]


@pytest.mark.parametrize("error", ERRORS, ids=str)
@pytest.mark.parametrize("kind", [PlainProgress, LiveProgress])
def test_a_display_that_breaks_is_there_again_when_it_can_be(error, kind, monkeypatch):
    terminal = Failing(error)
    monkeypatch.setattr(sys, "stderr", terminal)
    before = sys.stdout, sys.stderr
    with unfailing_streams():
        with showing("live" if kind is LiveProgress else "plain") as progress:
            assert isinstance(progress, kind)
            progress.phase("sampling", 8)
            progress.advance(3)
            progress.step(1, 3, METRICS)
            progress.message("lost")
            sys.stderr.write("of a reward function\n")
            sys.stderr.close()
            terminal.broken = False
            progress.message("the disk has space again")
    assert (sys.stdout, sys.stderr) == before
    assert "the disk has space again" in terminal.getvalue() and "lost" not in terminal.getvalue()


def test_what_an_encoding_lacks_is_escaped_and_the_rest_is_written():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    Console(file=Stream(file)).print("naïve 東京 ok")  # pyright: ignore[reportArgumentType]
    file.seek(0)
    assert file.read().strip() == "na\\xefve \\u6771\\u4eac ok"


def test_streams_that_are_not_there_are_made_up_for(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["--version"]) == 0
    assert sys.stdout is None and sys.stderr is None


@needs_dev_full
@pytest.mark.parametrize("command, status", [("--version", 2), ("recipes", 2), ("schema", 2)])
def test_a_command_that_only_shows_says_that_it_could_not(command, status, monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main([command]) == status
        monkeypatch.undo()
    said = capsys.readouterr().err
    assert said.startswith("twig: stdout: No space left") and said.count("\n") == 1


@pytest.mark.slow
@needs_dev_full
def test_a_run_does_not_fail_with_what_shows_it(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("/dev/full", "w", encoding="utf-8") as out, open("/dev/full", "w", encoding="utf-8") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        status = main(["train", "quickstart", "--output", "run", f"model.name={model}", *SMALL])
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
    assert status == 0
    assert read_metrics(Path("run"))[-1]["step"] == 3 and Path("run/summary.json").exists()


REWARD = """
import sys
def good(completions, **kwargs):
    print("from a reward function", flush=True)
    print("and another", file=sys.stderr, flush=True)
    return [float(len(text)) for text in completions]
"""
SHELLS = {
    "nobody reads": "{twig} | true; exit ${{PIPESTATUS[0]}}",
    "somebody reads a line": "{twig} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}",
    "stderr is on a full disk": "{twig} 2>/dev/full",
    "all is on a full disk": "{twig} >/dev/full 2>&1",
    "stdout is closed": "{twig} >&-",
    "all is closed": "{twig} <&- >&- 2>&-",
    "a terminal of ASCII": "PYTHONIOENCODING=ascii:strict {twig}",
}


@pytest.mark.slow
@needs_dev_full
@pytest.mark.parametrize("progress", ["live", "plain"])
@pytest.mark.parametrize("shell", SHELLS)
def test_a_run_ends_well_wherever_it_is_shown(shell, progress, model, tmp_path):
    (tmp_path / "rewards.py").write_text(REWARD)
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1="}\n' * 8)
    words = ["task.path=data.jsonl", "task.reward_file=rewards.py:good", f"log.progress={progress}", *SMALL]
    twig = " ".join(
        [sys.executable, "-m twig train custom --output", "'näme 東'", f"model.name={model}", *words]
    )
    done = subprocess.run(
        SHELLS[shell].format(twig=twig),
        shell=True,
        executable="/bin/bash",
        cwd=tmp_path,
        capture_output=True,
        timeout=600,
    )
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    assert "Traceback" not in said and "Exception ignored" not in said
    assert read_metrics(tmp_path / "näme 東")[-1]["step"] == 3
    assert (tmp_path / "näme 東" / "summary.json").exists()
    if shell == "a terminal of ASCII":
        assert "n\\xe4me \\u6771" in said and "accuracy" in said or "right" in said


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_a_run_outlives_its_terminal(model, tmp_path):
    """The window is closed in the middle of a run that ignores SIGHUP, as under nohup."""
    master, slave = os.openpty()
    words = ["--output", "run", f"model.name={model}", *SMALL, "train.max_steps=40", "log.progress=live"]
    run = subprocess.Popen(
        [sys.executable, "-m", "twig", "train", "quickstart", *words],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    os.close(slave)
    end = time.monotonic() + 600
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.close(master)
    assert run.wait(600) == 0
    assert read_metrics(tmp_path / "run")[-1]["step"] == 40
