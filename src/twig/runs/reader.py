"""Reads run folders: which folder is a run, its metrics, evaluations and summary. No torch."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from twig.common.errors import UserError
from twig.config.load import RUN_CONFIG, RUN_ENVIRONMENT

ENVIRONMENT, METRICS, SUMMARY = RUN_ENVIRONMENT, "metrics.jsonl", "summary.json"
EVALUATIONS = "evaluations.jsonl"
CHECKPOINTS, ADAPTER, BEST = "checkpoints", "adapter", "adapter-best"
COMPLETIONS, TRACEBACK, WARNINGS = "completions", "traceback.txt", "warnings.txt"

# Numbers of summary.json, and of an evaluation in it.
_NUMBERS = ("steps", "tokens_sampled", "tokens_selected", "nodes_run", "seconds")
_RESULT = ("value", "low", "high", "n")

# Problems whose answers summary.json has: an answer that became right, one that stayed wrong, any other.
KINDS = {"became_right": "became right", "stayed_wrong": "stayed wrong", "random": "at random"}


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Returns a run folder's summary.json; None if it is missing or damaged."""
    summary = read_json(folder / SUMMARY)
    return summary if summary is not None and _is_summary(summary) else None


def answers_of(summary: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Returns the problems of a summary with the answers before and after training, by kind.

    None if there are none, because one of the two evaluations was not made.
    """
    rows = summary.get("answers")
    whole = isinstance(rows, list) and all(isinstance(row, dict) and _is_answers(row) for row in rows)
    return rows if whole and rows else None


def results_of(summary: Mapping[str, Any] | None) -> list[dict[str, Any] | None]:
    """Returns the evaluations of a summary, before and after training; None for one that was not made."""
    return [(summary or {}).get(f"accuracy_{when}") for when in ("before", "after")]


def any_graded(results: Iterable[Mapping[str, Any] | None]) -> bool:
    """Tells whether rewards are more than right or wrong: the results are then shown as mean rewards."""
    return any(result is not None and result.get("graded") for result in results)


def is_graded_run(summary: Mapping[str, Any] | None, rows: Iterable[Mapping[str, Any]]) -> bool:
    """Tells the same of a run, from its summary and its metrics, of which evaluations are rows too."""
    told = [{"graded": row["eval/accuracy"] is None} for row in rows if "eval/accuracy" in row]
    return any_graded([*results_of(summary), *told])


def missing_kinds(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns a line for each kind of KINDS that no problem is of; `rows` are those of `answers_of`."""
    kinds = {row["kind"] for row in rows}
    return [f"no problem {KINDS[kind]}" for kind in ("became_right", "stayed_wrong") if kind not in kinds]


def _is_answers(row: dict[str, Any]) -> bool:
    answers = [row.get(when) for when in ("before", "after")]
    return (
        row.get("kind") in KINDS
        and isinstance(row.get("prompt"), str)
        and isinstance(row.get("answer"), str | None)
        and all(isinstance(each, dict) and isinstance(each.get("text"), str) for each in answers)
        and all(isinstance(each.get("right"), bool) for each in answers if each)
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file; None if it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_summary(summary: dict[str, Any]) -> bool:
    """Returns whether everything that is shown and exported is there, in its type."""
    results = [summary.get(f"accuracy_{when}") for when in ("before", "after", "best")]
    return (
        all(isinstance(summary.get(key), str) for key in ("status", "algorithm", "task"))
        and all(_is_number(summary.get(key)) for key in _NUMBERS)
        and all(
            result is None
            or (isinstance(result, dict) and all(_is_number(result.get(key)) for key in _RESULT))
            for result in results
        )
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run folder's metrics.jsonl, without a last row that a crash tore.

    Raises UserError for a damaged row before it.
    """
    path, rows = folder / METRICS, []
    # What follows the last line end is a torn row, or nothing.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line) if line else None
            if row is not None:
                rows.append(row | {"step": int(row["step"])})
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(
                f"{path} line {number}",
                "damaged, not a row of metrics",
                "Remove the line, or pass another --output",
            ) from None
    return rows


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run folder's evaluations.jsonl by step; none if it is missing.

    A row has the checksum of the `problems`, and which of them were `right` and `answered`: a text with a 1
    or 0 per problem, null if the task cannot tell. `rewards` is a list with a number or null per problem,
    null if the task itself tells right from wrong; older rows do not have it.
    """
    path = folder / EVALUATIONS
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: row["step"])


def is_run(folder: Path) -> bool:
    """Returns whether a folder holds a run."""
    return (folder / RUN_CONFIG).is_file()


def passed_parts(folder: Path) -> list[str]:
    """Returns the names of what a run got from Python in place of what its settings name."""
    passed = (read_json(folder / ENVIRONMENT) or {}).get("passed")
    return passed.split(", ") if isinstance(passed, str) and passed else []


def newest_step(folder: Path) -> int | None:
    """Returns the step of a run's newest checkpoint, by the names of their folders; None without one."""
    names = [path.name.removeprefix("step-") for path in (folder / CHECKPOINTS).glob("step-*")]
    return max((int(name) for name in names if name.isdigit()), default=None)


def is_finished(summary: dict[str, Any] | None) -> bool:
    """Returns whether a summary is that of a finished run."""
    return summary is not None and summary.get("status") == "finished"


def damage(folder: Path, steps: int, adapters: Iterable[str]) -> list[str]:
    """Returns a line for each part of a run that is missing or damaged, though it was written once.

    These are a row of metrics for each of the `steps` done, and the folders of `adapters`.
    """
    rows = read_metrics(folder) if (folder / METRICS).exists() else []
    missing = sorted(set(range(1, steps + 1)) - {row["step"] for row in rows})
    lines = [f"{folder / name} is missing or damaged" for name in adapters if not is_adapter(folder / name)]
    if missing:
        lines.append(
            f"{folder / METRICS} lacks {len(missing)} of {steps} steps (the first: {missing[0]}), and so "
            "does the report"
        )
    return lines


def is_adapter(folder: Path) -> bool:
    """Returns whether a folder holds a whole adapter, checked by the checksum in its file if it has one."""
    try:
        data = (folder / "adapter_model.safetensors").read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        about = header.pop("__metadata__", {})
        end = max(each["data_offsets"][1] for each in header.values())
        actual = hashlib.sha256(data[start:]).hexdigest()
        expected = about.get("sha256", actual)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return False
    return (
        end == len(data) - start
        and expected == actual
        and read_json(folder / "adapter_config.json") is not None
    )
