"""Describes reward functions as objects: their names, where they are defined, and how they fail.

Knows nothing about their arguments or results.
"""

import functools
import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from twig.common.python_files import FileError
from twig.common.user_code import message_from, traceback_from


class RewardError(FileError):
    """A reward function failed; `traceback_text` is the whole traceback, if it raised."""


def is_async(function: Callable[..., Any]) -> bool:
    """Tells whether calling the function (or a partial, or an object with `__call__`) gives a coroutine."""
    function = _unwrapped(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def function_name(function: Callable[..., Any]) -> str:
    """Returns a reward function's name in metrics: its own, or that of its class if it is an object."""
    function = _unwrapped(function)
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) else type(function).__name__


def function_names(functions: Sequence[Callable[..., Any]]) -> list[str]:
    """Returns one name per function; a second `length` becomes `length_2`."""
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
    """Returns FILE:LINE of the function's definition."""
    code = _code(function)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else "built in"


def label_of(function: Callable[..., Any], name: str) -> str:
    """Returns what an error about the function starts with: its name and where it is defined."""
    return f"reward function {name!r} ({defined_at(function)})"


def failure(function: Callable[..., Any], name: str, error: BaseException) -> RewardError:
    """Returns the error for a function's exception; its place is the last line in the function's own file.

    Never raises, whatever the exception does when it is shown.
    """
    frames = traceback.extract_tb(error.__traceback__)
    code = _code(function)
    own = [frame for frame in frames if code and frame.filename == code.co_filename]
    frame = (own or frames)[-1]
    return RewardError(
        f"reward function {name!r}",
        f"raised {type(error).__name__} at {frame.filename}:{frame.lineno}: {message_from(error)}",
        traceback_text=traceback_from(error),
    )


def check_signature(function: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> None:
    """Raises RewardError if the function does not take these keyword arguments."""
    try:
        signature = inspect.signature(function)
    except Exception:  # some callables have none
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        given = ("prompts", "completions", "completion_ids")
        columns = ", ".join(key for key in arguments if key not in given)
        raise RewardError(
            label_of(function, name),
            f"cannot be called: {error}",
            f"Give it **kwargs, and only parameters among {', '.join(given)}, {columns}",
        ) from error
