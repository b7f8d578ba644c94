"""Checkpoints: written whole or not at all, and verified before they are read.

A checkpoint is a folder `step-N` of safetensors and JSON (nothing is ever unpickled) with a list of checksums
that is written last. Knows nothing of what the state means.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

_SUMS = "checksums.json"
_STATE = "state.json"


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int | None,
) -> Path:
    """Writes checkpoint `step` below `folder` and returns its path; the newest `keep` are kept (None: all).

    `tensors` maps file names (without suffix) to named tensors, `state` is anything JSON can hold. Everything
    goes to a temporary folder first, is flushed to disk and renamed, so a crash leaves either the whole
    checkpoint or none.
    """
    target, draft = folder / f"step-{step}", folder / f".step-{step}.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name, named in tensors.items():
        save_file({k: v.detach().cpu().contiguous() for k, v in named.items()}, draft / f"{name}.safetensors")
    (draft / _STATE).write_text(json.dumps(dict(state), allow_nan=False), encoding="utf-8")
    sums = {path.name: _checksum(path) for path in sorted(draft.iterdir())}
    (draft / _SUMS).write_text(json.dumps(sums), encoding="utf-8")
    for path in draft.iterdir():
        _flush(path)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(draft, target)
    _flush(folder)
    if keep is not None:
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest step first, whether valid or not."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def newest_valid(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint whose checksums hold (None if there is none), and the newer ones that were
    skipped."""
    skipped = []
    for path in reversed(checkpoints(folder)):
        if _valid(path):
            return path, skipped
        skipped.append(path)
    return None, skipped


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors, by file name, and the state of the checkpoint at `path`."""
    tensors = {p.stem: load_file(p) for p in sorted(path.glob("*.safetensors"))}
    return tensors, json.loads((path / _STATE).read_text(encoding="utf-8"))


def _valid(path: Path) -> bool:
    try:
        sums = json.loads((path / _SUMS).read_text(encoding="utf-8"))
        return _STATE in sums and all(_checksum(path / name) == value for name, value in sums.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder to flush it
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
