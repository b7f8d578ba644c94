"""Writes the run folder: resolved settings, environment, a row of metrics per step, completions, summary.

`metrics.jsonl` is the truth about a run. Every file is written whole or not at all, and one process at a time
has the folder. If a file that only records the run cannot be written (metrics, completions, warnings), the
run warns and continues. Knows nothing of what the numbers mean; no torch.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from twig.common.errors import UserError
from twig.common.files import LOCK, FolderLock, append_whole, clear_leftovers, flush, write_whole
from twig.common.python_files import FileError
from twig.common.redact import hidden, secret_in, without_secrets
from twig.common.text import one_line, plain, printable
from twig.config.load import RUN_CONFIG, Settings, load
from twig.runs.completions import parquet_bytes, public_rows
from twig.runs.contents import settings_of
from twig.runs.reader import (
    ADAPTER,
    BEST,
    CHECKPOINTS,
    COMPLETIONS,
    ENVIRONMENT,
    EVALUATIONS,
    METRICS,
    SUMMARY,
    TRACEBACK,
    WARNINGS,
    is_run,
    read_evaluations,
    read_json,
    read_metrics,
    read_summary,
)
from twig.runtime.failures import Ended
from twig.runtime.machine import environment

TRACKERS = ("tensorboard", "wandb")  # folders that trackers make
RUNS = Path("runs")
# All that `save_environment` takes from its caller: nothing else about a machine ends up in a run folder.
FACTS = (
    "device",
    "device_name",
    "dtype",
    "quantization",
    "model_revision",
    "model_sha256",
    "data_revision",
    "passed",
    "reward_file_sha256",
    "algorithm_file_sha256",
    "processes",
)

# A folder with nothing but these holds a run that never began: nothing is lost by starting over in it.
_BEFORE_THE_START = {RUN_CONFIG, ENVIRONMENT, TRACEBACK, LOCK, *TRACKERS}
_BEFORE_THE_START |= {f".{name}.tmp" for name in (RUN_CONFIG, ENVIRONMENT)}  # of a process that was killed


class RunLog:
    """Writes one run's folder, and keeps other processes out of it until `close`.

    `settings` are those that it began with. `on_trouble` is called with a line if a file cannot be written.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder.absolute()  # a reward function may change the working folder
        self.settings = settings
        self.on_trouble: Callable[[str], None] = lambda text: None
        self._lock = FolderLock(folder)
        self._rows: list[str] = []  # rows of metrics that wait for a disk that takes them
        self._evaluations: dict[int, dict[str, Any]] = {}  # evaluations that do, by step
        self._in_trouble: set[str] = set()

    @classmethod
    def create(cls, output: str | Path | None, settings: Settings) -> "RunLog":
        """Starts a run in `output`, by default in a new folder below runs/ named after task and algorithm.

        Raises UserError if `output` holds another run or anything else, or if another process has it; then
        nothing in it is changed.
        """
        if output is None:
            folder = new_folder(f"{settings.task.name}-{settings.algorithm.name}")
        else:
            folder = Path(output)
            _refuse_other_content(folder)
        _refuse_secrets(settings)
        log = cls(folder, settings)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            log._take("--output")
            _refuse_other_content(folder)  # it may have begun since
            (folder / TRACEBACK).unlink(missing_ok=True)
            log.save_settings(settings)
            log.save_environment()
        except OSError as error:
            log.close()
            problem = f"cannot be written ({error.strerror or error})"
            raise UserError(f"--output {folder}", problem, "Pass another --output") from error
        except UserError:
            log.close()
            raise
        return log

    @classmethod
    def open(cls, output: str | Path) -> "RunLog":
        """Opens the run in `output` to resume it.

        Raises UserError if there is none or another process has it.
        """
        folder = Path(output)
        if not is_run(folder):
            raise UserError("--resume", f"{folder} holds no run", "Leave --resume out to start one there")
        log = cls(folder, settings_of(folder) or load(str(folder)))
        try:
            log._take("--resume")
            for name in (ADAPTER, BEST):
                clear_leftovers(folder, name, put_back=True)
            clear_leftovers(folder / CHECKPOINTS, "step-*")
        except OSError as error:
            problem = f"{folder} cannot be written ({error.strerror or error})"
            raise UserError("--resume", problem, "Make it writable, or resume a copy of it") from error
        return log

    def close(self) -> None:
        """Lets other processes have the folder."""
        self._lock.release()

    def discard(self) -> None:
        """Removes the folder if the run never began and no other process has it.

        Metrics, checkpoints and a traceback say that it began.
        """
        if not self.folder.is_dir() or began(self.folder):
            return
        with suppress(OSError):
            if self._lock.take():
                self._lock.release()  # Windows removes no open file
                shutil.rmtree(self.folder, ignore_errors=True)

    def _take(self, option: str) -> None:
        if not self._lock.take():
            raise UserError(
                f"{option} {self.folder}",
                "another process is training there",
                "Wait until it ends, or pass another --output",
            )

    # ---- writing

    def save_settings(self, settings: Settings) -> None:
        """Writes config.yaml: the settings that the run starts or resumes with."""
        _refuse_secrets(settings)
        write_whole(self.folder / RUN_CONFIG, settings.to_yaml())

    def save_environment(self, **facts: str | int | None) -> None:
        """Writes environment.json: versions, platform, commit, and the caller's FACTS."""
        assert set(facts) <= set(FACTS), "environment.json holds what is on the list and nothing else"
        values = without_secrets(environment() | dict.fromkeys(FACTS) | facts)
        write_whole(self.folder / ENVIRONMENT, json.dumps(values, indent=2) + "\n")

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends a row to metrics.jsonl; a number that is not finite becomes null.

        Rows that cannot be written wait, and are written with the next one that can.
        """
        row = without_secrets(plain({"step": step, **metrics}))
        self._rows.append(json.dumps(row, allow_nan=False) + "\n")
        self._write_rows()

    def flush(self) -> None:
        """Waits until the disk has all rows of metrics; called before a checkpoint of the same step."""
        if self._rows:
            self._write_rows()
        self._write_evaluations()
        self._try(METRICS, lambda: flush(self.folder / METRICS))

    def _write_rows(self) -> None:
        if self._try(METRICS, lambda: append_whole(self.folder / METRICS, "".join(self._rows))):
            self._rows = []

    def save_completions(self, step: int, rows: list[dict[str, Any]], folder: str = COMPLETIONS) -> Path:
        """Writes completions/step-N.parquet, one row per completion, and returns its path."""
        path = self.folder / folder / f"step-{step}.parquet"

        def write() -> None:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, parquet_bytes(public_rows([{"step": step, **row} for row in rows])))

        self._try(f"{folder}/{path.name}", write)
        return path

    def save_summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json; a number that is not finite becomes null.

        The traceback of an older fault is removed.
        """
        text = json.dumps(without_secrets(plain(summary)), indent=2, allow_nan=False) + "\n"
        write_whole(self.folder / SUMMARY, text)
        with suppress(OSError):
            (self.folder / TRACEBACK).unlink(missing_ok=True)

    def save_evaluation(self, step: int, each: dict[str, Any]) -> None:
        """Writes a row of evaluations.jsonl, problem by problem, in place of one of the same step.

        Rows that cannot be written wait, as those of metrics do.
        """
        self._evaluations[step] = {"step": step, **each}
        self._write_evaluations()

    def _write_evaluations(self) -> None:
        """Writes the evaluations that wait, beside those in the file."""

        def write() -> None:
            rows = {row["step"]: row for row in read_evaluations(self.folder)} | self._evaluations
            write_whole(self.folder / EVALUATIONS, _lines([rows[step] for step in sorted(rows)]))

        if self._evaluations and self._try(EVALUATIONS, write):
            self._evaluations = {}

    def save_traceback(self, text: str) -> Path:
        """Writes traceback.txt (the last fault only), without secrets, and returns its path."""
        path = self.folder / TRACEBACK
        self._try(TRACEBACK, lambda: write_whole(path, printable(hidden(text))))
        return path

    def warn(self, text: str) -> None:
        """Appends a line to warnings.txt."""
        with suppress(OSError):  # the warning is shown elsewhere too
            append_whole(self.folder / WARNINGS, one_line(hidden(text)) + "\n")

    def _try(self, name: str, write: Callable[[], None]) -> bool:
        """Writes a file that only records the run; returns whether it could, and warns once if not."""
        self.refuse_vanished()
        what = name.partition("/")[0]
        try:
            write()
        except OSError as error:
            if what not in self._in_trouble:
                self._in_trouble.add(what)
                self.on_trouble(
                    f"{self.folder / name} cannot be written ({error.strerror or error}); training continues "
                    "without it"
                )
            return False
        self._in_trouble.discard(what)
        return True

    def refuse_vanished(self) -> None:
        """Raises UserError if the run's folder is no longer there: nothing makes a second one."""
        if not self.folder.is_dir():
            raise UserError(
                str(self.folder),
                "the folder of this run is gone",
                "Start the run again, and leave its folder where it is until it ends",
            )

    def rewind(self, step: int) -> None:
        """Removes metrics, evaluations and completions of later steps, and a last row that a crash tore."""
        path = self.folder / METRICS
        if path.exists():
            kept = [row for row in read_metrics(self.folder) if row["step"] <= step]
            write_whole(path, _lines(kept))
        if (self.folder / EVALUATIONS).exists():
            kept = [row for row in read_evaluations(self.folder) if row["step"] <= step]
            write_whole(self.folder / EVALUATIONS, _lines(kept))
        for file in (self.folder / COMPLETIONS).glob("step-*.parquet"):
            number = file.stem.removeprefix("step-")
            if number.isdigit() and int(number) > step:
                file.unlink()

    # ---- reading

    def environment(self) -> dict[str, Any]:
        """Returns what environment.json holds; nothing if it is missing or damaged."""
        return read_json(self.folder / ENVIRONMENT) or {}

    def summary(self) -> dict[str, Any] | None:
        """Returns what summary.json holds; None if it is missing or damaged."""
        return read_summary(self.folder)


class NoLog:
    """The run's log in processes other than the main one: every method of `RunLog` does nothing."""

    on_trouble: Callable[[str], None] | None = None

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.settings = settings

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_") or not callable(getattr(RunLog, name, None)):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return lambda *arguments, **options: None


def with_traceback(error: FileError | Ended, log: RunLog | NoLog) -> BaseException:
    """Saves the traceback of a user's code to the run folder; returns the error with the file's path."""
    text = error.failure.details if isinstance(error, Ended) else error.traceback_text
    path = log.save_traceback(text) if text else None
    if path is None:
        return error
    if isinstance(error, Ended):
        return Ended(replace(error.failure, reason=f"{error.failure.reason} (traceback: {path})"))
    return UserError(error.key, f"{error.problem} (traceback: {path})", error.fix)


def new_folder(name: str) -> Path:
    """Makes and returns the next folder of the form runs/NAME-N."""
    number = max([0, *_numbers(name)])
    while True:
        number += 1
        folder = RUNS / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not RUNS.is_dir():
                raise UserError("--output", f"{RUNS} is a file, not a folder", "Pass --output DIR") from None
        except OSError as error:
            problem = f"{folder} cannot be made ({error.strerror})"
            raise UserError("--output", problem, "Pass --output DIR") from error
        else:
            return folder


def began(folder: Path) -> bool:
    """Returns whether the run in a folder came as far as an evaluation, a step or a fault."""
    return not _names(folder) <= _BEFORE_THE_START - {TRACEBACK}


def newest_folder(name: str) -> Path | None:
    """Returns the run runs/NAME-N with the largest N, else the run runs/NAME, else None."""
    names = [f"{name}-{number}" for number in sorted(_numbers(name), reverse=True)]
    return next((RUNS / each for each in (*names, name) if is_run(RUNS / each)), None)


def _numbers(name: str) -> Iterable[int]:
    form = re.compile(re.escape(name) + r"-([0-9]+)")
    matches = [form.fullmatch(path.name) for path in RUNS.glob("*")] if RUNS.is_dir() else []
    return [int(match[1]) for match in matches if match]


def _refuse_other_content(folder: Path) -> None:
    key, fix = f"--output {folder}", "Pass another --output"
    if folder.exists() and not folder.is_dir():
        raise UserError(key, "a file, not a folder", fix)
    names = _names(folder)
    if names <= _BEFORE_THE_START:
        return
    if RUN_CONFIG in names:
        raise UserError(key, "holds another run", "Add --resume to resume it, or pass another --output")
    raise UserError(key, "not empty and not a run", fix)


def _refuse_secrets(settings: Settings) -> None:
    """Raises UserError if a setting holds a secret of the environment: run folders are shared."""
    for key, value in settings.flat().items():
        variable = secret_in(str(value))
        if variable is not None:
            raise UserError(
                key,
                f"holds the secret in the environment's {variable}, and the run folder would show it",
                f"Leave the secret out of {key}",
            )


def _names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise UserError(f"--output {folder}", problem, "Pass another --output") from error


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
