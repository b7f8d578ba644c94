"""Checkpoints and adapters: written whole or not at all; checkpoints are verified before they are read.

A checkpoint is a folder `step-N` of safetensors and JSON (nothing is ever unpickled) with a manifest of sizes
and checksums. Knows nothing of what the state means.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from twig.common.files import flush_folder, put_folder, remove_folder, write_flushed

_MANIFEST, _STATE, _TENSORS = "manifest.json", "state.json", ".safetensors"


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
    checkpoint or none; and the older ones go when this one is on disk. Raises OSError where it cannot be
    written: the older ones are all there then.
    """
    target, draft = folder / f"step-{step}", folder / f".step-{step}.tmp"
    if not folder.exists():
        folder.mkdir(parents=True)
        flush_folder(folder.parent)
    _sweep(folder)
    draft.mkdir()
    try:
        _write(draft, tensors, state)
        put_folder(draft, target)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    # A later step's is damaged: had it been valid, the run would have gone on from there.
    found = checkpoints(folder)
    later = [path for path in found if _step(path) > step]
    old = [] if keep is None else [path for path in found if path not in later][:-keep]
    for path in later + old:
        with suppress(OSError):  # what cannot be removed costs space and nothing else
            remove_folder(path)
    return target


def save_adapter(peft_model: PeftModel, folder: Path) -> None:
    """Writes the adapter to `folder` in PEFT's format, in place of one that was there; raises OSError."""
    config = peft_model.peft_config["default"].to_dict() | {"inference_mode": True}
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    weights = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    draft = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        write_flushed(draft / SAFETENSORS_WEIGHTS_NAME, to_bytes(_on_cpu(weights), {"format": "pt"}))
        write_flushed(draft / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True))
        put_folder(draft, folder)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest step first, whether valid or not."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=_step)


def newest_valid(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint whose manifest holds (None if there is none), and the newer ones that were
    skipped."""
    skipped = []
    for path in reversed(checkpoints(folder)):
        if _valid(path):
            return path, skipped
        skipped.append(path)
    return None, skipped


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors, by file name, and the state of the checkpoint at `path`."""
    names = sorted(name for name in _manifest(path) if name.endswith(_TENSORS))
    return {name.removesuffix(_TENSORS): load_file(path / name) for name in names}, load_state(path)


def load_state(path: Path) -> dict[str, Any]:
    """The state alone of the checkpoint at `path`."""
    return json.loads((path / _STATE).read_text(encoding="utf-8"))


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _write(draft: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    manifest = {}

    def write(name: str, data: bytes) -> None:
        write_flushed(draft / name, data)
        manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    for name, named in tensors.items():
        # As bytes: where the disk is full, the library's own writing raises nothing that says so.
        write(name + _TENSORS, to_bytes(_on_cpu(named)))
    write(_STATE, json.dumps(dict(state), allow_nan=False).encode())
    write_flushed(draft / _MANIFEST, json.dumps(manifest, indent=2))


def _sweep(folder: Path) -> None:
    # Drafts, and what was about to be removed, of a process that was killed.
    for path in [*folder.glob(".step-*.tmp"), *folder.glob(".step-*.old")]:
        shutil.rmtree(path, ignore_errors=True)


def _valid(path: Path) -> bool:
    try:
        manifest = _manifest(path)
        return _STATE in manifest and all(_holds(path / name, said) for name, said in manifest.items())
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return False


def _manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / _MANIFEST).read_text(encoding="utf-8"))


def _holds(path: Path, said: Mapping[str, Any]) -> bool:
    if path.stat().st_size != said["bytes"]:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == said["sha256"]
