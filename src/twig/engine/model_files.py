"""Where a model's files are: the embedded model, a folder, a GGUF file, or a repository on the Hub.

Knows nothing of what is in them.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any

from twig.common.errors import UserError
from twig.common.hub import hub_or_cache
from twig.common.text import message_of
from twig.config.schema import Model

EMBEDDED = ("tiny-arithmetic",)
_A_MODEL = "Set model.name= the folder of a saved model, a GGUF file, or a Hub id"
_GGUF = ".gguf"


@dataclass(frozen=True)
class Source:
    """What transformers loads a model from: a folder or an id on the Hub, and a GGUF file there if it is one.

    The GGUF file of a folder is an absolute path: transformers would take a relative one from the working
    directory first.
    """

    place: str
    gguf_file: str | None = None

    @property
    def is_local(self) -> bool:
        """Tells whether it is a folder on this machine."""
        return Path(self.place).is_dir()

    def fetched(self, revision: str | None) -> "Source":
        """Returns the source with its GGUF file on this machine, fetched from the Hub if it is there."""
        if self.gguf_file is None or self.is_local:
            return self
        from huggingface_hub import hf_hub_download

        with hub_or_cache():
            path = Path(hf_hub_download(self.place, self.gguf_file, revision=revision))
        return Source(str(path.parent), str(path))

    def checksum(self) -> str | None:
        """Returns the sha256 of the weights on this machine, of several files in the order of their names.

        None for the embedded model, which the version names, and for one on the Hub, which its commit names.
        """
        if not self.is_local or Path(self.place) == _assets():
            return None
        folder = Path(self.place)
        paths = [Path(self.gguf_file)] if self.gguf_file else sorted(folder.glob("*.safetensors"))
        digest = hashlib.sha256()
        for path in paths:
            with path.open("rb") as file:
                while block := file.read(2**24):
                    digest.update(block)
        return digest.hexdigest() if paths else None


def is_gguf(chosen: Model) -> bool:
    """Tells whether a model is read from a GGUF file."""
    return chosen.gguf_file is not None or chosen.name.lower().endswith(_GGUF)


def source_of(chosen: Model) -> Source:
    """Returns where `model.name` and `model.gguf_file` are; nothing is downloaded.

    Raises UserError if there is no such file or folder on this machine and it cannot be on the Hub, or if a
    GGUF file cannot be read here.
    """
    name, path = chosen.name, Path(chosen.name).expanduser()
    if is_gguf(chosen):
        return _gguf_source(chosen, path)
    if name in EMBEDDED:
        return Source(str(_assets(name)))
    if path.is_dir():
        if (path / "config.json").is_file():
            return Source(str(path))
        ggufs = sorted(each.name for each in path.glob(f"*{_GGUF}"))
        fix = f"Set model.gguf_file={ggufs[0]}" if ggufs else _A_MODEL
        if (path / "adapter_config.json").is_file():
            fix = f"It is an adapter: set model.adapter={path}, and model.name to its base"
        raise UserError("model.name", f"{path} has no config.json", fix)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError("model.name", f"{name} is not a folder", _A_MODEL)
    return Source(name)


def refuse_unsafe_weights(chosen: Model, config: Any) -> None:
    """Raises UserError if loading the model would read anything but safetensors files beside its config.

    transformers reads whatever a model's index names, pickles and other folders included.
    """
    source = source_of(chosen)
    if source.gguf_file is not None:
        return
    # a config may name the file of the weights
    index = str(getattr(config, "transformers_weights", None) or "model.safetensors.index.json")
    names = [] if index.endswith(".index.json") else [index]
    if not names and (path := _file_of(source, index, chosen.revision)) is not None:
        try:
            shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            names = [str(name) for name in shards.values()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problem = f"the {index} of {chosen.name} cannot be read ({message_of(error)})"
            raise UserError("model.name", problem, "Copy or download the model again") from error
    for name in names:
        if PurePath(name).name != name or not name.endswith(".safetensors"):
            problem = f"the weights of {chosen.name} are in {message_of(name)}"
            fix = "Save the model again: only safetensors files of its own folder are read"
            raise UserError("model.name", problem, fix)


def _file_of(source: Source, name: str, revision: str | None) -> Path | None:
    """Returns a file of a model on this machine, fetched from the Hub if it is there; None if it has none."""
    if source.is_local:
        path = Path(source.place) / name
        return path if path.is_file() else None
    from transformers.utils.hub import cached_file

    with hub_or_cache():
        kinds = ("gated_repo", "missing_entries", "connection_errors")
        quiet = {f"_raise_exceptions_for_{kind}": False for kind in kinds}
        cached = cached_file(source.place, name, revision=revision or "main", **quiet)
    return None if cached is None else Path(cached)


def _gguf_source(chosen: Model, path: Path) -> Source:
    name, file = chosen.name, chosen.gguf_file
    if find_spec("gguf") is None:
        problem = f"{file or path.name} needs the package gguf, which is not installed"
        raise UserError("model.name", problem, "Run pip install gguf")
    if chosen.quantization is not None:
        key, problem = "model.quantization", f"the weights of {file or path.name} are quantised already"
        raise UserError(key, problem, f"Leave {key} out")
    if file is None:
        if not path.is_file():
            raise UserError("model.name", f"{name} is not a file", _A_MODEL)
        return Source(str(path.absolute().parent), str(path.absolute()))
    if path.is_file() or name in EMBEDDED:
        raise UserError("model.gguf_file", f"{name} is a model by itself", "Leave model.gguf_file out")
    if path.is_dir():
        if not (path / file).is_file():
            ggufs = sorted(each.name for each in path.glob(f"*{_GGUF}"))
            fix = f"Set model.gguf_file={ggufs[0]}" if ggufs else "Leave model.gguf_file out"
            raise UserError("model.gguf_file", f"{path} has no {file}", fix)
        return Source(str(path), str((path / file).absolute()))
    return Source(name, file)


def _assets(name: str = EMBEDDED[0]) -> Path:
    return Path(str(files("twig") / "assets" / name))
