"""Writes and reads evaluations: evaluation.json has the figures, completions.jsonl a row per completion.

Needs no torch. Knows nothing of how answers are made.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twig.common.errors import UserError
from twig.common.files import write_whole
from twig.common.redact import without_secrets

SCHEMA_VERSION = 1
RESULT, COMPLETIONS = "evaluation.json", "completions.jsonl"


@dataclass(frozen=True)
class Written:
    """An evaluation read from disk: figures, checksum of the problems, `right` [problems] of the greedy."""

    folder: Path
    greedy: dict[str, Any]
    problems: str
    right: np.ndarray


def refuse_other_content(folder: Path) -> None:
    """Raises UserError if `folder` is a file, or holds anything but an evaluation."""
    if folder.exists() and not folder.is_dir():
        raise UserError("--output", f"{folder} is a file", "Name a folder")
    if folder.is_dir() and (other := sorted({p.name for p in folder.iterdir()} - {RESULT, COMPLETIONS})):
        problem = f"{folder} holds {other[0]} and is not an evaluation"
        raise UserError("--output", problem, "Name another folder")


def write_evaluation(folder: Path, record: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Writes both files, each whole or not at all, without secrets of the environment."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=True) for row in without_secrets(rows)]
    record = {"schema_version": SCHEMA_VERSION} | without_secrets(record)
    write_whole(folder / COMPLETIONS, "\n".join(lines) + "\n")
    write_whole(folder / RESULT, json.dumps(record, indent=2) + "\n")


def read_evaluation(folder: Path) -> Written:
    """Reads the evaluation in `folder`; raises UserError if there is none that can be read."""
    try:
        record = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        lines = (folder / COMPLETIONS).read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if row["sample"] is None]
        right = np.array([row["right"] for row in rows], bool)
        return Written(folder, record["greedy"], record["problems"], right)
    except FileNotFoundError:
        fix = f"Make one: twig eval MODEL --output {folder}"
        raise UserError("--against", f"{folder} holds no {RESULT}", fix) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{folder} cannot be read as an evaluation ({error})"
        raise UserError("--against", problem, "Evaluate again") from None
