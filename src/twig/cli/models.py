"""Resolves what a command line names to a model: a run, an adapter, or a model on disk or the Hub."""

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twig.common.errors import UserError
from twig.common.text import listed
from twig.config.load import load
from twig.runs.reader import is_run, passed_parts

if TYPE_CHECKING:
    from twig.runs.adapters import RunAdapter


@dataclass(frozen=True)
class Named:
    """What was named: the settings it stands for, by group, and the adapter if it is a run's."""

    values: dict[str, Any]
    adapter: "RunAdapter | None" = None

    def tell(self, say: Callable[[str], None]) -> None:
        """Calls `say` if the adapter is that of a run which did not finish."""
        if self.adapter is not None and self.adapter.step is not None:
            say(f"the run is not finished; this is its adapter after step {self.adapter.step}")


@contextmanager
def named_model(model: str, best: bool, command: str, overrides: Sequence[str] = ()) -> Iterator[Named]:
    """Yields what `model` names; the adapter of a run's checkpoint is there only inside.

    Raises UserError if a run has no adapter, or if its model is not in its folder and no override names it.
    """
    if "=" in model and not Path(model).exists():
        raise UserError(model, "a setting in place of the model", f"Run twig {command} MODEL_OR_RUN {model}")
    folder = Path(model)
    if best and not is_run(folder):
        raise UserError("--best", f"{model} is not a run", "Leave --best out, or name the folder of a run")
    if not is_run(folder):
        _refuse_typo(folder)
        is_adapter = (folder / "adapter_config.json").is_file()
        named = {"name": _base_of(folder, command), "adapter": model} if is_adapter else {"name": model}
        yield Named({"model": named})
        return
    from twig.runs.adapters import adapter_of

    values = load(model).model_dump()
    if "model" in passed_parts(folder) and not any(each.startswith("model.name=") for each in overrides):
        problem = "its model was passed from Python, and the run folder does not have it"
        raise UserError(model, problem, "Add model.name= the folder or the name of that model")
    with adapter_of(folder, best) as adapter:
        values["model"]["adapter"] = str(adapter.folder)
        yield Named(values, adapter)


@contextmanager
def saying_what_was_passed(folder: Path) -> Iterator[None]:
    """Adds to an error about a run's task that parts of it were passed from Python."""
    try:
        yield
    except UserError as error:
        passed = passed_parts(folder) if is_run(folder) else []
        if not passed or not error.key.startswith("task"):
            raise
        problem = f"{error.problem}; the run got {listed(passed)} from Python, which its folder does not have"
        raise UserError(error.key, problem, error.fix) from error


def _refuse_typo(path: Path) -> None:
    """Raises UserError for a path beside runs that is not there; a name such as org/model has no folder."""
    if path.exists() or not path.parent.name or not path.parent.is_dir():
        return
    names = [each.name for each in path.parent.iterdir() if each.is_dir() and not each.name.startswith(".")]
    near = difflib.get_close_matches(path.name, names, 1, 0.3)
    fix = f"Did you mean {path.parent / near[0]}?" if near else "Run twig runs for a list"
    raise UserError(str(path), "there is no such folder", fix)


def _base_of(adapter: Path, command: str) -> str:
    file = adapter / "adapter_config.json"
    try:
        name = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError):
        name = None
    if not isinstance(name, str) or not name:
        task = " --task NAME" if command == "eval" else ""
        fix = f"Run twig {command} MODEL{task} model.adapter={adapter}"
        raise UserError(str(file), "names no base model", fix)
    return name
