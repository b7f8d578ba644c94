"""Reward functions as objects: their names, where they are written, how they fail, and files that hold them.

Knows nothing about what the functions are given or return.
"""

import functools
import hashlib
import importlib.util
import inspect
import logging
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from twig.common.errors import UserError
from twig.common.text import printable

logger = logging.getLogger(__name__)


class RewardError(UserError):
    """A reward function failed: one line with name, file and line; `traceback_text` is the whole
    traceback."""

    def __init__(self, line: str, traceback_text: str = "") -> None:
        super().__init__(line)
        self.traceback_text = traceback_text


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling the function (also a partial one, or an object with `__call__`) gives a coroutine."""
    function = _unwrapped(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def function_name(function: Callable[..., Any]) -> str:
    """The name a reward function goes by in metrics: its own, or its class's where it is an object."""
    function = _unwrapped(function)
    return getattr(function, "__name__", type(function).__name__)


def function_names(functions: Sequence[Callable[..., Any]]) -> list[str]:
    """One name per function; a second `length` becomes `length_2`."""
    names: list[str] = []
    for function in functions:
        name, number = function_name(function), 2
        unique = name
        while unique in names:
            unique, number = f"{name}_{number}", number + 1
        names.append(unique)
    return names


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _code(function: Callable[..., Any]) -> Any:
    function = _unwrapped(function)
    if not inspect.isroutine(function):
        function = type(function).__call__
    return getattr(inspect.unwrap(function), "__code__", None)


def defined_at(function: Callable[..., Any]) -> str:
    """FILE:LINE of the function's definition."""
    code = _code(function)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else "built in"


def failure(function: Callable[..., Any], name: str, error: Exception) -> RewardError:
    """The error to raise for a function's exception; the place is the last line in the function's own
    file."""
    frames = traceback.extract_tb(error.__traceback__)
    code = _code(function)
    own = [frame for frame in frames if code and frame.filename == code.co_filename]
    frame = (own or frames)[-1]
    message = " ".join(str(error).split())
    place = f"{frame.filename}:{frame.lineno}"
    line = f"reward function {name!r} raised at {place}: {type(error).__name__}: {message}"
    if len(line) > 1000:
        line = line[:997] + "..."
    return RewardError(line, "".join(traceback.format_exception(error)))


def check_signature(function: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> None:
    """Raises RewardError where the function does not take these keyword arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in callables have none
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        given = ("prompts", "completions", "completion_ids")
        columns = ", ".join(key for key in arguments if key not in given)
        raise RewardError(
            f"reward function {name!r} ({defined_at(function)}) cannot be called: {error}; "
            f"give it **kwargs, and only parameters among prompts, completions, completion_ids, {columns}"
        ) from error


def reward_file(spec: str) -> Path:
    """The absolute path in "FILE.py:FUNCTION[,FUNCTION]". Raises UserError where no file is there."""
    path = Path(spec.rpartition(":")[0]).expanduser()
    try:
        path = path.resolve()
        found = path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a null in it, a loop of links
        found = False
    if not found:
        raise UserError(
            f"task.reward_file: {path} does not exist; write FILE.py:FUNCTION with the path of a file"
        )
    return path


def reward_file_checksum(spec: str) -> str:
    """The sha256 of the file in "FILE.py:FUNCTION[,FUNCTION]"; of no file that it imports."""
    path = reward_file(spec)
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(
            f"task.reward_file: {path} cannot be read ({error.strerror}); make it readable, or write another"
        ) from error


def load_reward_file(
    spec: str, notice: Callable[[str], None] | None = None
) -> tuple[Callable[..., Any], ...]:
    """The functions that "FILE.py:FUNCTION[,FUNCTION]" names. Runs the file: `notice` (None: the log) is told
    which before that.

    Raises UserError for a missing file or function, RewardError where the file itself fails.
    """
    wanted = spec.rpartition(":")[2]
    path = reward_file(spec)
    (notice or logger.warning)(f"running the Python file {printable(path)}")
    module = _run_file(path)
    functions = []
    for name in (part.strip() for part in wanted.split(",")):
        function = getattr(module, name, None)
        if not callable(function):
            own = [key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"]
            raise UserError(
                f"task.reward_file: {path} has no function {name!r}; "
                + (f"write one of {', '.join(own)}" if own else "it has no functions")
            )
        functions.append(function)
    return tuple(functions)


def _run_file(path: Path) -> Any:
    # Registered by a name of its own, so that dataclasses and pickling inside the file work; imports beside
    # it work too.
    name = f"twig_reward_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = (
            getattr(error, "lineno", None)
            if isinstance(error, SyntaxError)
            else frames[-1].lineno
            if frames
            else 1
        )
        message = " ".join(str(error).split())
        raise RewardError(
            f"task.reward_file: {path}:{line}: {type(error).__name__}: {message}",
            "".join(traceback.format_exception(error)),
        ) from error
    return module
