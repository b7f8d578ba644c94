"""Checks that a run resumes with what it began with: its settings, and the code, data and weights they name.

Every checkpoint has the settings and a checksum of each of these parts. A part is known by its content: where
it lies may be written differently. No torch.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from twig.common.errors import UserError
from twig.common.python_files import file_checksum, python_file, split_spec
from twig.config.load import RUN_CONFIG, Settings, load, parse_yaml
from twig.core.algorithms.base import PASSED
from twig.runs.reader import CHECKPOINTS, is_run, read_json

logger = logging.getLogger(__name__)

_COMMIT = 40  # characters of a commit on the Hub, which stands for the weights there
_WHERE = ("task.path", "task.revision", "task.subset")


class Part(NamedTuple):
    """Something that a run is made of: the settings that say where it is, and what it is."""

    settings: tuple[str, ...]
    what: str


PARTS = {
    "reward_file": Part(("task.reward_file",), "the Python file has"),
    "algorithm_file": Part(("algorithm.file",), "the Python file has"),
    "train_data": Part(_WHERE, "the data to train on has"),
    "eval_data": Part(_WHERE, "the data to evaluate on has"),
    "base": Part(("model.name", "model.gguf_file", "model.revision"), "the weights of the base have"),
    "adapter": Part(("model.adapter",), "the adapter to continue from has"),
}
_CODE = ("reward_file", "algorithm_file")
# Names in environment.json, for a run without a checkpoint and those of older versions.
_RECORDED = {name: f"{name}_sha256" for name in _CODE} | {"base": "model_sha256"}


def settings_of(folder: Path) -> Settings | None:
    """Returns the settings that the newest checkpoint of a run has; None if there is none that has any."""
    for path in sorted((folder / CHECKPOINTS).glob("step-*"), key=_step, reverse=True):
        try:
            data = (path / "state.json").read_bytes()
            expected = (read_json(path / "manifest.json") or {})["state.json"]["sha256"]
            text = json.loads(data)["settings"] if hashlib.sha256(data).hexdigest() == expected else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(text, str):
            return Settings.from_dict(parse_yaml(text, str(path)), (), str(path))
    return None


def load_to_resume(source: str, overrides: Sequence[str] = ()) -> Settings:
    """Returns the settings to resume a run with; `source` and `overrides` are those of `config.load.load`.

    If the config.yaml of a run folder is damaged, its newest checkpoint has the settings; the log says so.
    """
    folder = Path(source)
    begun = settings_of(folder) if is_run(folder) else None
    error = None if begun is None else config_damage(folder)
    if begun is not None and error is not None:
        logger.warning(f"{error.key}: {error.problem}; the settings of the newest checkpoint are used")
        return Settings.from_dict(begun.model_dump(), overrides, str(folder / RUN_CONFIG))
    return load(source, overrides)


def config_damage(folder: Path) -> UserError | None:
    """Returns what is wrong with the config.yaml of a run folder; None if nothing is."""
    try:
        load(str(folder))
    except UserError as error:
        return error
    return None


def contents_of(state: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, str]:
    """Returns the checksums of what a run began with: those in a checkpoint's state, else those recorded."""
    recorded = {name: environment.get(key) for name, key in _RECORDED.items()}
    contents = state.get("contents") or recorded
    return {name: checksum for name, checksum in contents.items() if name in PARTS and checksum is not None}


def code_checksums(settings: Settings) -> dict[str, str]:
    """Returns the checksums of the Python files that the settings name."""
    specs = zip(_CODE, (settings.task.reward_file, settings.algorithm.file), strict=True)
    named = {name: spec for name, spec in specs if spec is not None and spec != PASSED}
    return {name: file_checksum(spec, PARTS[name].settings[0]) for name, spec in named.items()}


def may_be_written_as(key: str, was: Any, value: Any, comparable: Collection[str]) -> bool:
    """Returns whether a setting may name the same part in another way.

    `comparable` are the parts whose contents are compared, now or when they are loaded.
    """
    parts = [name for name, part in PARTS.items() if key in part.settings]
    if not parts or not all(name in comparable for name in parts):
        return False
    if parts[0] in _CODE:  # the same file, and the same names in it
        return was is not None and value is not None and split_spec(was)[1] == split_spec(value)[1]
    return True


def refuse_changed(
    begun: Mapping[str, str], now: Mapping[str, str | None], settings: Settings, written: Collection[str] = ()
) -> None:
    """Raises UserError if a part has another checksum than the run began with.

    `now` has the checksums of the parts at hand (None: it has none, as a model that was passed). `written`
    are the settings that are written differently: their parts must have one.
    """
    for name, checksum in now.items():
        part, before = PARTS[name], begun.get(name)
        key = part.settings[0]
        if before is None or checksum == before:
            continue
        if checksum is None and not any(each in written for each in part.settings):
            continue
        what = part.what
        if name in _CODE and checksum is not None:
            spec = settings.task.reward_file if name == "reward_file" else settings.algorithm.file
            what = f"{python_file(spec or '', key)} has"
        fix = "Put back what was there, or use another --output"
        if name == "base" and len(before) == _COMMIT:
            fix = f"Set model.revision={before}, or use another --output"
        raise UserError(key, f"{what} changed since the run began", fix)


def _step(path: Path) -> int:
    number = path.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1
