"""Evaluations on disk: evaluation.json with the figures, completions.jsonl with what they were made from.

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
    """An evaluation that was read back: its figures, the checksum of its problems, and `right` [problems] of
    the greedy answers."""

    folder: Path
    greedy: dict[str, Any]
    problems: str
    right: np.ndarray


def refuse_other_content(folder: Path) -> None:
    """Raises UserError where `folder` is a file, or holds anything but an evaluation."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output: {folder} is a file; write the name of a folder")
    if folder.is_dir() and (other := sorted({p.name for p in folder.iterdir()} - {RESULT, COMPLETIONS})):
        raise UserError(f"--output: {folder} holds {other[0]} and is not an evaluation; write another folder")


def write_evaluation(folder: Path, record: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Writes both files, each whole or not at all, without secrets of the environment."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=True) for row in without_secrets(rows)]
    record = {"schema_version": SCHEMA_VERSION} | without_secrets(record)
    write_whole(folder / COMPLETIONS, "\n".join(lines) + "\n")
    write_whole(folder / RESULT, json.dumps(record, indent=2) + "\n")


def read_evaluation(folder: Path) -> Written:
    """The evaluation in `folder`; raises UserError where there is none that can be read."""
    try:
        record = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        lines = (folder / COMPLETIONS).read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if row["sample"] is None]
        right = np.array([row["right"] for row in rows], bool)
        return Written(folder, record["greedy"], record["problems"], right)
    except FileNotFoundError:
        raise UserError(
            f"--against: {folder} holds no {RESULT}; make one: twig eval MODEL --output {folder}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--against: {folder} cannot be read as an evaluation ({error}); make it anew"
        ) from None
