"""Finds algorithms: by name in this folder, in a file of the user's, or passed from Python."""

import difflib
import importlib
import pkgutil
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from pydantic import ConfigDict, ValidationError

from twig.common.errors import Invalid, UserError
from twig.common.python_files import FileError, load_names, split_spec
from twig.common.text import either
from twig.core.algorithms.base import PASSED, Algorithm, Credit
from twig.core.trie import PrefixTrie

DEFAULT = "t-spmo"


@cache
def shipped() -> dict[str, type[Algorithm]]:
    """Returns the classes of this folder by name: every subclass of `Algorithm` that sets `name`."""
    folder = Path(__file__).parent
    classes = {}
    for module in pkgutil.iter_modules([str(folder)]):
        if module.name in ("base", "registry"):
            continue
        members = vars(importlib.import_module(f"{__package__}.{module.name}"))
        for kind in members.values():
            if isinstance(kind, type) and issubclass(kind, Algorithm) and kind.model_fields["name"].default:
                classes[kind.model_fields["name"].default] = kind
    return classes


class Unloaded(Algorithm):
    """An algorithm whose class is in a file that was not run: its settings as they are written.

    Reading a run's settings never runs code; `load_algorithm` does.
    """

    model_config = ConfigDict(extra="allow")

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Raises UserError: the class is not here."""
        refuse_unloaded(self)


def refuse_unloaded(algorithm: Algorithm) -> NoReturn:
    """Raises the UserError that says how to have the class of `algorithm`."""
    if algorithm.file == PASSED:
        raise UserError(
            "algorithm.file",
            f"{algorithm.name} was passed from Python and is in no file",
            "Pass it again as twig.train(..., algorithm=...)",
        )
    raise UserError("algorithm.file", f"{algorithm.file} was not run", "Use twig.train or twig train")


def class_for(values: dict[str, Any]) -> type[Algorithm]:
    """Returns the class that settings of the group `algorithm` name; raises UserError for an unknown name."""
    if values.get("file") is not None:
        return Unloaded
    name = values.get("name", DEFAULT)
    if not isinstance(name, str) or name not in shipped():
        begin_so = [own for own in shipped() if name and own.startswith(f"{name}-")]
        near = begin_so or difflib.get_close_matches(str(name), shipped(), 2)
        fix = f"Set it to {either(sorted(shipped()))}, or set algorithm.file=FILE.py:CLASS"
        if near:
            fix = f"Did you mean algorithm.name={either(near)}?"
        raise UserError("algorithm.name", f"{name!r} is no algorithm", fix)
    return shipped()[name]


def algorithm(name: str = DEFAULT, **settings: Any) -> Algorithm:
    """Returns the shipped algorithm of that name with settings of its own.

    >>> algorithm("s-grpo", k=20).describe()
    'the first alpha=50 tokens, later ones each with p=0.3, up to k=20'
    """
    return class_for({"name": name}).model_validate({"name": name, **settings})


def load_algorithm(algorithm: Algorithm, notice: Callable[[str], None] | None = None) -> Algorithm:
    """Returns the algorithm with its class: runs the file in `algorithm.file` after a `notice` that says so.

    Raises UserError if there is no such file or class, or if a setting is not one of the class.
    """
    if not isinstance(algorithm, Unloaded):
        return algorithm
    if algorithm.file is None or algorithm.file == PASSED:
        refuse_unloaded(algorithm)
    (kind,) = load_names(algorithm.file, "algorithm.file", "class", notice)
    if not (isinstance(kind, type) and issubclass(kind, Algorithm)):
        raise UserError(
            "algorithm.file",
            f"{split_spec(algorithm.file)[1]} is not a subclass of twig.Algorithm",
            "Derive the class from twig.Algorithm",
        )
    if algorithm.name != kind.__name__:
        raise UserError(
            "algorithm.name",
            f"{algorithm.name} here, but algorithm.file names {kind.__name__}",
            "Leave out algorithm.name",
        )
    values = algorithm.model_dump(exclude_unset=True, exclude={"name"})
    try:
        return _named(kind.model_validate(values), algorithm.file)
    except ValidationError as error:
        fault = error.errors()[0]
        carried = fault.get("ctx", {}).get("error")
        if isinstance(carried, Invalid):
            raise carried.error from None
        key = ".".join(["algorithm", *map(str, fault["loc"])])
        own = [f"algorithm.{name}" for name in kind.model_fields if name not in Algorithm.model_fields]
        fix = (
            f"{kind.__name__} has {', '.join(own)}" if own else f"{kind.__name__} has no settings of its own"
        )
        raise UserError(key, f"{fault['msg'][0].lower()}{fault['msg'][1:]}", fix) from None
    except UserError:
        raise
    except Exception as error:  # of the class's own validators
        problem = f"{kind.__name__} raised {type(error).__name__}: {error}"
        text = "".join(traceback.format_exception(error))
        raise FileError("algorithm.file", problem, traceback_text=text) from error


def passed_algorithm(algorithm: Algorithm) -> Algorithm:
    """Returns an algorithm made in Python with the `name` and `file` that its run folder will have.

    `file` is where its class is written, if it can be loaded from there again, else `PASSED`.
    """
    kind = type(algorithm)
    if kind in shipped().values():
        return algorithm
    module, source = sys.modules.get(kind.__module__), None
    if module is not None and kind.__module__ != "__main__" and getattr(module, kind.__name__, None) is kind:
        source = getattr(module, "__file__", None)
    return _named(algorithm, f"{source}:{kind.__name__}" if source else PASSED)


def _named(algorithm: Algorithm, file: str) -> Algorithm:
    return algorithm.model_copy(update={"name": type(algorithm).__name__, "file": file})
