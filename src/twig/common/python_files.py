"""Names out of a Python file of the user's: `FILE.py:NAME[,NAME]`."""

import hashlib
import importlib.util
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twig.common.errors import UserError
from twig.common.text import printable
from twig.common.user_code import ProcessState, is_ours, message_from, traceback_from

logger = logging.getLogger(__name__)


class FileError(UserError):
    """A Python file of the user's failed; `traceback_text` is the whole traceback."""

    def __init__(self, key: str, problem: str, fix: str = "", traceback_text: str = "") -> None:
        super().__init__(key, problem, fix)
        self.traceback_text = traceback_text


def split_spec(spec: str) -> tuple[str, list[str]]:
    """Returns the file and the names in "FILE.py:NAME[,NAME]".

    >>> split_spec("rewards.py:exact, short")
    ('rewards.py', ['exact', 'short'])
    """
    file, _, names = spec.rpartition(":")
    return file, [name.strip() for name in names.split(",")]


def check_spec(spec: str, key: str) -> str:
    """Returns `spec` if it is "FILE.py:NAME[,NAME]"; raises UserError."""
    file, names = split_spec(spec)
    if not file.endswith(".py") or not all(name.isidentifier() for name in names):
        raise UserError(key, f"{spec!r} does not name anything in a file", f"Set {key}=FILE.py:NAME")
    return spec


def python_file(spec: str, key: str) -> Path:
    """Returns the absolute path in "FILE.py:NAME[,NAME]". Raises UserError if no file is there."""
    path = Path(split_spec(spec)[0]).expanduser()
    try:
        path = path.resolve()
        exists = path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a null in it, a loop of links
        exists = False
    if not exists:
        raise UserError(key, f"{path} does not exist", f"Set {key}=FILE.py:NAME with the path of a file")
    return path


def file_checksum(spec: str, key: str) -> str:
    """Returns the sha256 of the file in "FILE.py:NAME[,NAME]"; files that it imports are not in it."""
    path = python_file(spec, key)
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(
            key, f"{path} cannot be read ({error.strerror})", "Make it readable, or name another"
        ) from error


def load_names(
    spec: str, key: str, kind: str, notice: Callable[[str], None] | None = None
) -> tuple[Callable[..., Any], ...]:
    """Runs the file in "FILE.py:NAME[,NAME]" and returns what it names, which must be callable.

    `notice` (None: the log) gets a line before the file is run. `kind` is "function" or "class". What the
    file changes in the process is put back. Raises UserError for a missing file or name, FileError if the
    file itself fails, in whatever way.
    """
    path = python_file(spec, key)
    (notice or logger.warning)(f"running the Python file {printable(path)}")
    with _failing(path, key):
        module = _run(path)
        names = split_spec(spec)[1]
        values: list[Any] = [getattr(module, name, None) for name in names]
        lacking = [name for name, value in zip(names, values, strict=True) if not callable(value)]
        own = _own_names(module) if lacking else []
    if lacking:
        fix = f"Name {'one of ' if len(own) > 1 else ''}{', '.join(own)}" if own else f"Write a {kind} in it"
        raise UserError(key, f"{path} has no {kind} {lacking[0]!r}", fix)
    return tuple(values)


def _own_names(module: Any) -> list[str]:
    names = [name for name, item in vars(module).items() if callable(item) and not name.startswith("_")]
    return [name for name in names if getattr(vars(module)[name], "__module__", None) == module.__name__]


def _run(path: Path) -> Any:
    # Registered by a name of its own, so that dataclasses and pickling inside the file work; imports from the
    # file's folder work too.
    name = f"twig_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


@contextmanager
def _failing(path: Path, key: str) -> Iterator[None]:
    """Turns whatever the file raises into FileError, and puts back what it changes in the process."""
    state = ProcessState.now()
    try:
        yield
    except BaseException as error:
        if is_ours(error):
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        own = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
        raise FileError(
            key,
            f"{path}:{own or 1}: {type(error).__name__}: {message_from(error)}",
            traceback_text=traceback_from(error),
        ) from error
    finally:
        state.restore()
