"""Lists runs: where each is, as its folder tells, what it is of, its accuracy and its time. No torch."""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twig.common.errors import UserError
from twig.common.files import in_use
from twig.common.text import one_line
from twig.config.load import RUN_CONFIG, Settings, load
from twig.runs.folder import began
from twig.runs.reader import (
    ENVIRONMENT,
    EVALUATIONS,
    METRICS,
    SUMMARY,
    TRACEBACK,
    is_finished,
    is_graded_run,
    is_run,
    read_evaluations,
    read_metrics,
    read_summary,
    results_of,
)

STATES = ("running", "finished", "stopped", "failed", "not begun")
_LONGEST_REASON = 200  # characters
# Written by the run and by nobody else.
_WRITTEN = (RUN_CONFIG, ENVIRONMENT, METRICS, EVALUATIONS, SUMMARY, TRACEBACK)


@dataclass(frozen=True)
class Listed:
    """A run in a list: None is what its folder does not say.

    `state` is one of STATES: a run that is locked is running; one without a result, or whose result is older
    than its last step or fault, failed, and `reason` is the last line of its traceback. `step` of `steps` are
    done. `accuracy_before` and `accuracy_after` are those of the newest evaluation's problems before training
    and after `accuracy_step` steps; mean rewards if the run is `graded`: its rewards are more than right or
    wrong. `seconds` are of training, `changed` is when the run last wrote a file.
    """

    name: str
    folder: Path
    task: str | None
    algorithm: str | None
    state: str
    step: int
    steps: int | None
    accuracy_before: float | None
    accuracy_after: float | None
    accuracy_step: int | None
    seconds: float | None
    changed: float
    reason: str | None = None
    graded: bool = False


def runs_in(folder: Path) -> list[Path]:
    """Returns the runs in a folder, those of a study in it, or the folder itself if it is a run; by name.

    Raises UserError if there is no such folder.
    """
    if is_run(folder):
        return [folder]
    if not folder.is_dir():
        raise UserError(str(folder), "no such folder", "Name a run, or a folder that runs are in")
    configs = [path for pattern in ("*", "runs/*") for path in folder.glob(f"{pattern}/{RUN_CONFIG}")]
    return sorted({path.parent for path in configs if path.is_file()}, key=_in_order)


def short_names(folders: Sequence[Path]) -> list[str]:
    """Returns a name of each folder: its own, and as many above it as tell it from the others.

    >>> short_names([Path("a/runs/x"), Path("b/runs/x"), Path("a/runs/y")])
    ['a/runs/x', 'b/runs/x', 'y']
    """
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for own in parts:
        others = {each for each in parts if each != own}
        length = 1
        while length < len(own) and any(each[-length:] == own[-length:] for each in others):
            length += 1
        names.append("/".join(own[-length:]))
    return names


def list_runs(folder: Path) -> list[Listed]:
    """Returns the runs in a folder (see `runs_in`), the one that wrote last first; raises UserError."""
    folders = runs_in(folder)
    runs = [_listed(name, path) for name, path in zip(short_names(folders), folders, strict=True)]
    return sorted(runs, key=lambda run: run.changed, reverse=True)


def _listed(name: str, folder: Path) -> Listed:
    settings = _settings(folder)
    summary, rows = read_summary(folder), _metrics(folder)
    last = rows[-1]["step"] if rows else 0
    current = summary is not None and _is_current(folder, summary, last)
    state, reason = state_of(folder, summary, last)
    step = last if summary is None or not current else int(summary["steps"])
    graded = is_graded_run(summary, rows)
    before, after, at = _accuracies(folder, summary if current else None, graded)
    return Listed(
        name=name,
        folder=folder,
        task=settings.task.name if settings else (summary or {}).get("task"),
        algorithm=settings.algorithm.name if settings else (summary or {}).get("algorithm"),
        state=state,
        step=step,
        steps=step if state == "finished" else _expected(settings),
        accuracy_before=before,
        accuracy_after=after,
        accuracy_step=at,
        seconds=summary["seconds"] if summary and current else _seconds(rows),
        changed=max(_changed(folder / file) for file in _WRITTEN),
        reason=reason,
        graded=graded,
    )


def state_of(folder: Path, summary: dict[str, Any] | None, last: int) -> tuple[str, str | None]:
    """Returns a run's state, one of STATES, and if it failed, the last line of its traceback.

    `summary` is that in the folder, and `last` the last step that has metrics.
    """
    current = summary is not None and _is_current(folder, summary, last)
    state = _state(folder, summary if current else None)
    return state, _reason(folder) if state == "failed" else None


def _state(folder: Path, summary: dict[str, Any] | None) -> str:
    """Returns one of STATES; `summary` is that of the run's last end, None without one."""
    if in_use(folder):
        return "running"
    if is_finished(summary):
        return "finished"
    if summary is not None:
        return "stopped"
    return "failed" if began(folder) else "not begun"


def _is_current(folder: Path, summary: dict[str, Any], last: int) -> bool:
    """Returns whether a summary is that of the run's last end: no step came after it, and no fault."""
    return last <= summary["steps"] and not (folder / TRACEBACK).exists()


def _accuracies(
    folder: Path, summary: dict[str, Any] | None, graded: bool
) -> tuple[float | None, float | None, int | None]:
    """Returns the accuracy before training, that of the newest evaluation, and the step of that.

    They are mean rewards if the run is `graded`.
    """
    key = "reward" if graded else "value"
    before, after = (None if result is None else result[key] for result in results_of(summary))
    if summary is not None and after is not None:
        return before, after, int(summary["steps"])
    rows = []
    with suppress(OSError, ValueError, KeyError, TypeError):  # a row of an evaluation that is damaged
        rows = [row for row in read_evaluations(folder) if row["right"]]
        rows = [row for row in rows if row["problems"] == rows[-1]["problems"]]
    if not rows:
        return before, None, None
    first, newest = (_result(row, graded) for row in (rows[0], rows[-1]))
    before = first if rows[0]["step"] == 0 else None
    return (before, newest, rows[-1]["step"]) if rows[-1]["step"] else (before, None, None)


def _result(row: dict[str, Any], graded: bool) -> float | None:
    """Returns the result of a row of evaluations.jsonl."""
    if not graded:
        return row["right"].count("1") / len(row["right"])
    given = [reward for reward in row.get("rewards") or () if reward is not None]
    return sum(given) / len(given) if given else None


def _metrics(folder: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(folder)
    except (OSError, UserError):
        return []


def _settings(folder: Path) -> Settings | None:
    try:
        return load(str(folder))
    except UserError:
        return None


def _expected(settings: Settings | None) -> int | None:
    """Returns how many steps a run takes, None if its settings alone do not say."""
    if settings is None or settings.train.max_tokens is not None:
        return None
    return settings.train.max_steps


def _seconds(rows: list[dict[str, Any]]) -> float | None:
    times = [row["time/step"] for row in rows if isinstance(row.get("time/step"), int | float)]
    return sum(times) if times else None


def _reason(folder: Path) -> str | None:
    try:
        lines = (folder / TRACEBACK).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return None
    lines = [line for line in lines if line.strip()]
    return one_line(lines[-1], _LONGEST_REASON) if lines else None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _in_order(path: Path) -> list[tuple[int, str]]:
    """Returns what paths are sorted by: x-9 comes before x-10."""
    return list(_pieces(str(path)))


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    for piece in re.findall(r"[0-9]+|[^0-9]+", text):
        yield (int(piece), "") if piece.isdecimal() and piece.isascii() else (-1, piece)
