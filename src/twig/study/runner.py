"""Runs the runs of a study, some at a time, each in a process of its own.

What is finished is skipped, what is not goes on where it stopped. A run that fails does not stop the others.
Needs no torch: the processes do.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from twig.common.errors import UserError
from twig.config.load import load
from twig.config.sizes import with_sizes
from twig.runs.folder import RunLog
from twig.runs.reader import is_finished, is_run, read_metrics, read_summary
from twig.runtime.stop import Stop, stoppable
from twig.study.plan import Planned

_LOGS, _RUNS = "logs", "runs"
# Settings that may differ between a study's file and a run that it began: nothing is learned from them.
_SHOWN = ("log.", "train.save_")


class StudyProgress:
    """What running a study tells whoever watches; override what is of interest."""

    def begun(self, name: str) -> None:
        """The run `name` begins or goes on."""

    def going(self, tokens: dict[str, int], done: int) -> None:
        """Told every second: tokens sampled so far by each run under way, and how many runs are done."""

    def ended(self, name: str, words: str) -> None:
        """The run `name` ended: finished, stopped, or failed with its last line."""


@dataclass
class Outcome:
    """How the runs ended: names of those `finished` (before or now), the last line of each that `failed`, and
    whether it was `stopped` before all had run."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


@dataclass
class _Process:
    run: Planned
    process: subprocess.Popen
    log: Path
    told: bool = False  # to stop


def folder_of(study: Path, run: Planned) -> Path:
    """Where a run of the study in `study` lies."""
    return study / _RUNS / run.name


def run_all(
    runs: Sequence[Planned], study: Path, jobs: int = 1, watch: StudyProgress | None = None
) -> Outcome:
    """Runs what is not finished, `jobs` at a time, below the folder `study`, and returns how each ended.

    SIGINT or SIGTERM is passed on: the runs under way are saved and none is begun; a second one ends them at
    once. Raises UserError, before anything runs, where a run of that name began with other settings.
    """
    watch, outcome = watch or StudyProgress(), Outcome()
    for run in runs:
        _refuse_changes(folder_of(study, run), run)
    waiting = [run for run in runs if not is_finished(read_summary(folder_of(study, run)))]
    outcome.finished = [run.name for run in runs if run not in waiting]
    (study / _LOGS).mkdir(parents=True, exist_ok=True)
    under_way: list[_Process] = []
    with stoppable() as stop:
        try:
            while under_way or (waiting and not stop.asked):
                while waiting and len(under_way) < jobs and not stop.asked:
                    under_way.append(_begin(waiting.pop(0), study))
                    watch.begun(under_way[-1].run.name)
                _wait(under_way, stop)
                for ended in [p for p in under_way if p.process.poll() is not None]:
                    under_way.remove(ended)
                    watch.ended(ended.run.name, _take(ended, study, outcome, stop))
                tokens = {p.run.name: _tokens(folder_of(study, p.run)) for p in under_way}
                watch.going(tokens, len(outcome.finished) + len(outcome.failed))
        finally:
            for each in under_way:
                each.process.kill()
    outcome.stopped = stop.asked
    return outcome


def _refuse_changes(folder: Path, run: Planned) -> None:
    if not is_run(folder):
        return
    old = load(str(folder)).flat()
    new = with_sizes(run.settings, old).flat()
    changed = [key for key in new if new[key] != old.get(key) and not key.startswith(_SHOWN)]
    if changed:
        key = changed[0]
        raise UserError(
            f"{folder}: began with {key}={old.get(key)!r}, and the study says {new[key]!r}; write another "
            "--output, or give the variant another name"
        )


def _begin(run: Planned, study: Path) -> _Process:
    folder, log = folder_of(study, run), study / _LOGS / f"{run.name}.txt"
    if not is_run(folder):
        RunLog.create(folder, run.settings).close()  # the process takes it
    command = [sys.executable, "-m", "twig", "train", str(folder), "--resume", "log.progress=plain"]
    # A session of its own: Ctrl-C reaches it through us alone, once.
    options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {}
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, **options
        )
    return _Process(run, process, log)


def _wait(under_way: Sequence[_Process], stop: Stop) -> None:
    """A second, or until one ends; passes a signal on, once."""
    until = time.monotonic() + 1.0
    while time.monotonic() < until and all(each.process.poll() is None for each in under_way):
        if stop.asked:
            for each in under_way:
                if not each.told:
                    each.process.terminate()
                    each.told = True
        time.sleep(0.05)


def _take(ended: _Process, study: Path, outcome: Outcome, stop: Stop) -> str:
    """Notes how a run ended, and says so in words."""
    name, status = ended.run.name, ended.process.returncode
    if status == 0 and is_finished(read_summary(folder_of(study, ended.run))):
        outcome.finished.append(name)
        return "finished"
    if stop.asked:
        return "stopped, and can go on"
    lines = [line for line in ended.log.read_text(encoding="utf-8", errors="replace").splitlines() if line]
    words = (lines or [f"exit status {status}"])[-1].removeprefix("twig: ")
    outcome.failed[name] = f"{words} ({ended.log})"
    return f"failed: {words}"


def _tokens(folder: Path) -> int:
    """Tokens that a run has sampled so far."""
    if not (folder / "metrics.jsonl").exists():
        return 0
    return sum(row.get("tokens/sampled", 0) for row in read_metrics(folder))
