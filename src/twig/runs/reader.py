"""The run folder, read: which folder is a run, its metrics, evaluations and summary. No torch."""

import json
from pathlib import Path
from typing import Any

from twig.common.errors import UserError
from twig.config.load import RUN_CONFIG

ENVIRONMENT, METRICS, SUMMARY = "environment.json", "metrics.jsonl", "summary.json"
EVALUATIONS = "evaluations.jsonl"
COMPLETIONS, TRACEBACK, WARNINGS = "completions", "traceback.txt", "warnings.txt"

# Numbers of summary.json, and of an evaluation in it.
_NUMBERS = ("steps", "tokens_sampled", "tokens_selected", "nodes_run", "seconds")
_RESULT = ("value", "low", "high", "n")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """What a run folder's summary.json holds, or None where there is none that can be read."""
    found = read_json(folder / SUMMARY)
    return found if found is not None and _is_summary(found) else None


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_summary(found: dict[str, Any]) -> bool:
    """Whether what is shown and exported is there, and of its kind."""
    results = [found.get(f"accuracy_{when}") for when in ("before", "after", "best")]
    return (
        all(isinstance(found.get(key), str) for key in ("status", "algorithm", "task"))
        and all(_is_number(found.get(key)) for key in _NUMBERS)
        and all(
            result is None
            or (isinstance(result, dict) and all(_is_number(result.get(key)) for key in _RESULT))
            for result in results
        )
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run folder's metrics.jsonl; a last row that a crash tore is left out.

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
                f"{path} line {number}: damaged, not a row of metrics; remove the line, or write another "
                "--output"
            ) from None
    return rows


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run folder's evaluations.jsonl (none where there is none), by step: the checksum of the
    `problems`, which were `right` and which `answered` (a 1 or 0 each, in a text; null where the task cannot
    tell)."""
    path = folder / EVALUATIONS
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: row["step"])


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / RUN_CONFIG).is_file()


def is_finished(summary: dict[str, Any] | None) -> bool:
    """Whether a summary is that of a finished run."""
    return summary is not None and summary.get("status") == "finished"
