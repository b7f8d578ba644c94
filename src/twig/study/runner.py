"""Runs the runs of a study, some at a time, each in a separate process.

Finished runs are skipped, stopped ones resumed. A run that fails does not stop the others. Needs no torch:
the processes do.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from twig.common.errors import UserError
from twig.config.load import Settings, affects, load
from twig.config.schema import Model
from twig.config.sizes import as_begun, with_values
from twig.planner.choose import with_kernels
from twig.runs.folder import RunLog
from twig.runs.reader import is_finished, is_run, read_metrics, read_summary
from twig.runtime.stop import Stop, stoppable
from twig.study.plan import Planned

_LOGS, _RUNS = "logs", "runs"


class StudyProgress:
    """Callbacks for the progress of a study; override what is of interest."""

    def begun(self, name: str) -> None:
        """The run `name` begins or resumes."""

    def going(self, tokens: dict[str, int], done: int) -> None:
        """A second has passed: tokens sampled so far by each run under way, and how many runs are done."""

    def ended(self, name: str, result: str) -> None:
        """The run `name` ended: finished, stopped, or failed with its last line."""


@dataclass
class Outcome:
    """How the runs of a study ended.

    Names of those `finished` (before or now), the last line of each that `failed`, and whether the study was
    `stopped` before all had run.
    """

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


@dataclass
class _Process:
    run: Planned
    process: subprocess.Popen
    log: Path
    signalled: bool = False


def folder_of(study: Path, run: Planned) -> Path:
    """Returns the folder of a run of the study in `study`."""
    return study / _RUNS / run.name


def run_all(
    runs: Sequence[Planned], study: Path, jobs: int = 1, watch: StudyProgress | None = None
) -> Outcome:
    """Runs what is not finished, `jobs` at a time, below the folder `study`, and returns how each ended.

    SIGINT or SIGTERM is passed on: the runs under way are saved and none is begun; a second one kills them.
    Raises UserError, before anything runs, if a run of that name began with other settings.
    """
    watch, outcome = watch or StudyProgress(), Outcome()
    for run in runs:
        _refuse_changes(folder_of(study, run), run)
    waiting = [run for run in runs if not is_finished(read_summary(folder_of(study, run)))]
    outcome.finished = [run.name for run in runs if run not in waiting]
    waiting = _with_one_choice(waiting, [folder_of(study, run) for run in runs])
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


def _with_one_choice(runs: Sequence[Planned], folders: Sequence[Path]) -> list[Planned]:
    """Returns the runs with what `model.kernels=auto` stands for: the same for all runs of a model.

    It is what an earlier run of the study took, else it is measured once. A model that does not load stays as
    it is: its own run says why.
    """
    chosen: dict[Model, Settings] = {}
    for folder in folders:
        if is_run(folder):
            settings = load(str(folder))
            chosen.setdefault(settings.model.model_copy(update={"kernels": "auto"}), settings)
    decided = []
    for run in runs:
        model = run.settings.model
        if model.kernels == "auto":
            if chosen.get(model, run.settings).model.kernels == "auto":
                try:
                    chosen[model] = with_kernels(run.settings)
                except UserError:
                    chosen[model] = run.settings
            kernels = chosen[model].model.kernels
            run = replace(run, settings=with_values(run.settings, {"model.kernels": kernels}))
        decided.append(run)
    return decided


def changed_since(folder: Path, run: Planned) -> dict[str, tuple[Any, Any]]:
    """Returns the settings that the run in `folder` began with and that the study has changed since.

    The value before and the value now by key, where results depend on it.
    """
    before = load(str(folder))
    old, new = before.flat(), as_begun(run.settings, before).flat()
    differ = [key for key in {**new, **old} if new.get(key) != old.get(key)]
    return {key: (old.get(key), new.get(key)) for key in differ if affects(key) not in ("speed", "display")}


def _refuse_changes(folder: Path, run: Planned) -> None:
    if not is_run(folder):
        return
    for key, (before, now) in changed_since(folder, run).items():
        problem = f"began with {key}={before!r}, and the study says {now!r}"
        raise UserError(str(folder), problem, "Pass another --output, or rename the variant")


def _begin(run: Planned, study: Path) -> _Process:
    folder, log = folder_of(study, run), study / _LOGS / f"{run.name}.txt"
    if not is_run(folder):
        RunLog.create(folder, run.settings).close()  # the process opens it again
    command = [sys.executable, "-m", "twig", "train", str(folder), "--resume", "log.progress=plain"]
    # A new session: Ctrl-C reaches the process through this one alone, once.
    flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # Windows has it
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            creationflags=flags,
        )
    return _Process(run, process, log)


def _wait(under_way: Sequence[_Process], stop: Stop) -> None:
    """Waits a second, or until a process ends; passes a signal on, once."""
    until = time.monotonic() + 1.0
    while time.monotonic() < until and all(each.process.poll() is None for each in under_way):
        if stop.asked:
            for each in under_way:
                if not each.signalled:
                    each.process.terminate()
                    each.signalled = True
        time.sleep(0.05)


def _take(ended: _Process, study: Path, outcome: Outcome, stop: Stop) -> str:
    """Records how a run ended, and returns that as text."""
    name, status = ended.run.name, ended.process.returncode
    if status == 0 and is_finished(read_summary(folder_of(study, ended.run))):
        outcome.finished.append(name)
        return "finished"
    if stop.asked:
        return "stopped, and can be resumed"
    lines = [line for line in ended.log.read_text(encoding="utf-8", errors="replace").splitlines() if line]
    reason = (lines or [f"exit status {status}"])[-1].removeprefix("twig: ")
    outcome.failed[name] = f"{reason} ({ended.log})"
    return f"failed: {reason}"


def _tokens(folder: Path) -> int:
    """Returns the number of tokens that a run has sampled so far."""
    if not (folder / "metrics.jsonl").exists():
        return 0
    return sum(row.get("tokens/sampled", 0) for row in read_metrics(folder))
