"""The run folder, written: resolved settings, environment, a row of metrics a step, completions, summary.

`metrics.jsonl` is the truth about a run. Every file is written whole or not at all, and one process at a time
has the folder. Where what only records the run cannot be written (metrics, completions, warnings), the run
hears of it and goes on. Knows nothing of what the numbers mean; no torch.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from twig.common.errors import UserError
from twig.common.files import LOCK, FolderLock, append_whole, flush, write_whole
from twig.common.redact import hidden, secret_in, without_secrets
from twig.common.text import one_line, printable
from twig.config.load import RUN_CONFIG, Settings, load
from twig.runs.completions import parquet_bytes, public_rows
from twig.runs.reader import (
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
from twig.runtime.lifeline import Ended
from twig.runtime.machine import environment
from twig.tasks.reward_functions import RewardError, reward_file, reward_file_checksum

TRACKERS = ("tensorboard", "wandb")  # folders that trackers make
RUNS = Path("runs")
# All that `save_environment` takes from its caller: nothing else about a machine ends up in a run folder.
FACTS = (
    "device",
    "device_name",
    "dtype",
    "quantization",
    "model_revision",
    "data_revision",
    "passed",
    "reward_file_sha256",
    "processes",
)

# A folder with nothing but these holds a run that never began: nothing is lost by starting over in it.
_BEFORE_THE_START = {RUN_CONFIG, ENVIRONMENT, TRACEBACK, LOCK, *TRACKERS}
_BEFORE_THE_START |= {f".{name}.tmp" for name in (RUN_CONFIG, ENVIRONMENT)}  # of a process that was killed


class RunLog:
    """Writes one run's folder, which is its own until `close`. `settings` are those in its `config.yaml`.

    `on_trouble` hears, in words, what could not be written.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.settings = settings
        self.on_trouble: Callable[[str], None] = lambda words: None
        self._lock = FolderLock(folder)
        self._rows: list[str] = []  # rows of metrics that wait for a disk that takes them
        self._evaluations: dict[int, dict[str, Any]] = {}  # evaluations that do, by step
        self._in_trouble: set[str] = set()

    @classmethod
    def create(cls, output: str | Path | None, settings: Settings) -> "RunLog":
        """A new run in `output` (None: a new folder below runs/, named after the task and the algorithm).

        Raises UserError where `output` holds another run or anything else, nothing in it is changed then; and
        where another process has it.
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
            reason = error.strerror or error
            raise UserError(f"--output {folder}: cannot be written ({reason}); write another") from error
        except UserError:
            log.close()
            raise
        return log

    @classmethod
    def open(cls, output: str | Path) -> "RunLog":
        """The run in `output`, to go on with; raises UserError where there is none or another process has
        it."""
        folder = Path(output)
        if not is_run(folder):
            raise UserError(f"--resume: {folder} holds no run; leave --resume out to start one there")
        log = cls(folder, load(str(folder)))
        try:
            log._take("--resume")
        except OSError as error:
            raise UserError(
                f"--resume: {folder} cannot be written ({error.strerror or error}); make it writable, or go "
                "on in a copy of it"
            ) from error
        return log

    def close(self) -> None:
        """Lets other processes have the folder."""
        self._lock.release()

    def discard(self) -> None:
        """Removes the folder if the run never began (no metrics, checkpoint or traceback) and no other
        process has it."""
        if not self.folder.is_dir() or not _names(self.folder) <= _BEFORE_THE_START - {TRACEBACK}:
            return
        with suppress(OSError):
            if self._lock.take():
                self._lock.release()  # Windows removes no open file
                shutil.rmtree(self.folder, ignore_errors=True)

    def _take(self, option: str) -> None:
        if not self._lock.take():
            raise UserError(
                f"{option} {self.folder}: another process is training there; wait for it to end, or write "
                "another --output"
            )

    # ---- writing

    def save_settings(self, settings: Settings) -> None:
        """Writes config.yaml: those the run began with, or goes on with."""
        _refuse_secrets(settings)
        write_whole(self.folder / RUN_CONFIG, settings.to_yaml())

    def save_environment(self, **facts: str | int | None) -> None:
        """Writes environment.json: versions, platform, commit, and what the caller knows (FACTS)."""
        assert set(facts) <= set(FACTS), "environment.json holds what is on the list and nothing else"
        found = without_secrets(environment() | dict.fromkeys(FACTS) | facts)
        write_whole(self.folder / ENVIRONMENT, json.dumps(found, indent=2) + "\n")

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends a row to metrics.jsonl; a number that is not finite becomes null.

        Rows that cannot be written wait, and are written with the next one that can.
        """
        row = without_secrets(plain({"step": step, **metrics}))
        self._rows.append(json.dumps(row, allow_nan=False) + "\n")
        self._write_rows()

    def flush(self) -> None:
        """Waits until the disk has all rows of metrics: before a checkpoint that stands for them."""
        if self._rows:
            self._write_rows()
        self._write_evaluations()
        self._try(METRICS, lambda: flush(self.folder / METRICS))

    def _write_rows(self) -> None:
        if self._try(METRICS, lambda: append_whole(self.folder / METRICS, "".join(self._rows))):
            self._rows = []

    def save_completions(self, step: int, rows: list[dict[str, Any]], folder: str = COMPLETIONS) -> Path:
        """Writes completions/step-N.parquet, one row a completion, and returns its path."""
        path = self.folder / folder / f"step-{step}.parquet"

        def write() -> None:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, parquet_bytes(public_rows([{"step": step, **row} for row in rows])))

        self._try(f"{folder}/{path.name}", write)
        return path

    def save_summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json, whole or not at all; a number that is not finite becomes null."""
        text = json.dumps(without_secrets(plain(summary)), indent=2, allow_nan=False) + "\n"
        write_whole(self.folder / SUMMARY, text)

    def save_evaluation(self, step: int, each: dict[str, Any]) -> None:
        """Writes a row of evaluations.jsonl, problem by problem, in place of one of the same step.

        Rows that cannot be written wait, as those of metrics do.
        """
        self._evaluations[step] = {"step": step, **each}
        self._write_evaluations()

    def _write_evaluations(self) -> None:
        """Writes those that wait, beside those that are there."""

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
        with suppress(OSError):  # whoever warns has said it elsewhere too
            append_whole(self.folder / WARNINGS, one_line(hidden(text)) + "\n")

    def _try(self, name: str, write: Callable[[], None]) -> bool:
        """Whether the writing of what only records the run succeeded; says once where it does not."""
        what = name.partition("/")[0]
        try:
            write()
        except OSError as error:
            if what not in self._in_trouble:
                self._in_trouble.add(what)
                self.on_trouble(
                    f"{self.folder / name} cannot be written ({error.strerror or error}); training goes on "
                    "without it"
                )
            return False
        self._in_trouble.discard(what)
        return True

    def rewind(self, step: int) -> None:
        """Drops metrics, evaluations and completions of later steps, and a last row that a crash tore."""
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

    def refuse_another_reward_file(self, settings: Settings) -> None:
        """Raises UserError where the reward file is not the one that the run began with."""
        spec, before = settings.task.reward_file, self.environment().get("reward_file_sha256")
        if spec is not None and before is not None and reward_file_checksum(spec) != before:
            raise UserError(
                f"task.reward_file: {reward_file(spec)} has changed since the run began; put the old one "
                "back, or start a new run with another --output"
            )

    def environment(self) -> dict[str, Any]:
        """What environment.json holds, or nothing where there is none that can be read."""
        return read_json(self.folder / ENVIRONMENT) or {}

    def summary(self) -> dict[str, Any] | None:
        """What summary.json holds, or None where there is none that can be read."""
        return read_summary(self.folder)


class NoLog:
    """A run's log in the processes that write nothing: it knows the folder, and every call does nothing."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.settings = settings

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None


def with_traceback(error: RewardError | Ended, log: RunLog | NoLog) -> BaseException:
    """The error, with the traceback of a reward function, in whatever process, saved to the run folder."""
    text = error.failure.details if isinstance(error, Ended) else error.traceback_text
    path = log.save_traceback(text) if text else None
    if path is None:
        return error
    if isinstance(error, Ended):
        return Ended(replace(error.failure, words=f"{error.failure.words} (traceback: {path})"))
    return UserError(f"{error} (traceback: {path})")


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
                raise UserError(f"--output: {RUNS} is a file, not a folder; write --output DIR") from None
        except OSError as error:
            raise UserError(
                f"--output: {folder} cannot be made ({error.strerror}); write --output DIR"
            ) from error
        else:
            return folder


def newest_folder(name: str) -> Path | None:
    """The run of the form runs/NAME-N with the largest N, else the run runs/NAME, else None."""
    names = [f"{name}-{number}" for number in sorted(_numbers(name), reverse=True)]
    found = [RUNS / each for each in (*names, name) if is_run(RUNS / each)]
    return found[0] if found else None


def _numbers(name: str) -> Iterable[int]:
    form = re.compile(re.escape(name) + r"-([0-9]+)")
    found = [form.fullmatch(path.name) for path in RUNS.glob("*")] if RUNS.is_dir() else []
    return [int(match[1]) for match in found if match]


def _refuse_other_content(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: a file, not a folder; write another --output")
    names = _names(folder)
    if names <= _BEFORE_THE_START:
        return
    if RUN_CONFIG in names:
        raise UserError(
            f"--output {folder}: holds another run; add --resume to go on with it, or write another"
        )
    raise UserError(f"--output {folder}: not empty and not a run; write another --output")


def _refuse_secrets(settings: Settings) -> None:
    """Raises UserError where a setting holds a secret of the environment: run folders are shared."""
    for key, value in settings.flat().items():
        variable = secret_in(str(value))
        if variable is not None:
            raise UserError(
                f"{key}: holds the secret in the environment's {variable}, and settings are written to the "
                "run folder; leave it out"
            )


def _names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UserError(
            f"--output {folder}: cannot be read ({error.strerror}); write another --output"
        ) from error


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def plain(value: Any) -> Any:
    """The value in JSON's kinds: arrays, numpy and torch numbers become lists and numbers; NaN and infinity,
    None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
