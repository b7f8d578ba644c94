"""Writes checkpoints and adapters whole or not at all, and verifies checkpoints before it reads them.

A checkpoint is a folder `step-N` of safetensors and JSON (nothing is ever unpickled) with a manifest of sizes
and checksums. Knows nothing of what the state means.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from twig.common.files import clear_leftovers, flush_folder, put_folder, remove_folder, write_flushed

_MANIFEST, _STATE, _TENSORS = "manifest.json", "state.json", ".safetensors"


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int | None,
) -> Path:
    """Writes checkpoint `step` below `folder`, keeps the newest `keep` (None: all) and returns its path.

    `tensors` maps file names (without suffix) to named tensors, `state` is anything JSON can hold. Everything
    goes to a temporary folder first, is flushed to disk and renamed, so a crash leaves either the whole
    checkpoint or none. Older ones are removed when this one is on disk. Raises OSError if it cannot be
    written; then no older one is removed.
    """
    target, draft = folder / f"step-{step}", folder / f".step-{step}.tmp"
    if not folder.exists():
        folder.mkdir(parents=True)
        flush_folder(folder.parent)
    clear_leftovers(folder, "step-*")
    draft.mkdir()
    try:
        _write(draft, tensors, state)
        put_folder(draft, target)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    # A later step's is damaged: from a valid one the run would have resumed.
    paths = checkpoints(folder)
    later = [path for path in paths if _step(path) > step]
    old = [] if keep is None else [path for path in paths if path not in later][:-keep]
    for path in later + old:
        with suppress(OSError):  # what cannot be removed costs space and nothing else
            remove_folder(path)
    return target


def save_adapter(peft_model: PeftModel, folder: Path) -> None:
    """Writes the adapter to `folder` in PEFT's format, replacing an older one; raises OSError.

    Whatever else is in the folder stays there.
    """
    config = peft_model.peft_config["default"].to_dict() | {"inference_mode": True}
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    weights = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    draft = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        write_flushed(draft / SAFETENSORS_WEIGHTS_NAME, _sealed(to_bytes(_on_cpu(weights), {"format": "pt"})))
        write_flushed(draft / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True))
        _copy_others(folder, draft)
        put_folder(draft, folder)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints below `folder`, oldest step first, valid or not."""
    paths = [p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    return sorted(paths, key=_step)


class Newest(NamedTuple):
    """The newest checkpoint that is whole (None: there is none), and the newer ones that are damaged."""

    path: Path | None
    damaged: list[Path]


def newest_valid(folder: Path) -> Newest:
    """Returns the newest checkpoint below `folder` whose files are those of its manifest."""
    damaged = []
    for path in reversed(checkpoints(folder)):
        if _valid(path):
            return Newest(path, damaged)
        damaged.append(path)
    return Newest(None, damaged)


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Returns the tensors, by file name, and the state of the checkpoint at `path`."""
    files, state = read(path)
    return tensors_of(files), state


def read(path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Returns the contents of the files of tensors, and the state of the checkpoint at `path`."""
    names = sorted(name for name in _manifest(path) if name.endswith(_TENSORS))
    return {name.removesuffix(_TENSORS): (path / name).read_bytes() for name in names}, load_state(path)


def tensors_of(files: Mapping[str, bytes]) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors, by file name, in what `read` returned."""
    return {name: from_bytes(data) for name, data in files.items()}


def load_state(path: Path) -> dict[str, Any]:
    """Returns only the state of the checkpoint at `path`."""
    return json.loads((path / _STATE).read_text(encoding="utf-8"))


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sealed(data: bytes) -> bytes:
    """Returns a safetensors file whose header has the checksum of its tensors, see `reader.is_adapter`."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"]["sha256"] = hashlib.sha256(data[start:]).hexdigest()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return len(text).to_bytes(8, "little") + text + data[start:]


def _copy_others(folder: Path, draft: Path) -> None:
    """Copies what somebody else put into a folder to the draft that replaces it."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if not (draft / path.name).exists():
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, draft / path.name, symlinks=True)
            else:
                shutil.copy2(path, draft / path.name, follow_symlinks=False)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _write(draft: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    manifest = {}

    def write(name: str, data: bytes) -> None:
        write_flushed(draft / name, data)
        manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    for name, named in tensors.items():
        # As bytes: if the disk is full, the library's own function to write files does not say so.
        write(name + _TENSORS, to_bytes(_on_cpu(named)))
    write(_STATE, json.dumps(dict(state), allow_nan=False).encode())
    write_flushed(draft / _MANIFEST, json.dumps(manifest, indent=2))


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
