"""The run-time type checker of the tests: beartype, which takes an int for a float as PEP 484 does."""

from typing import Self

from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function):
    """Returns the function with its types checked, except Self, which needs the whole class."""
    hints = getattr(function, "__annotations__", {})
    if Self in hints.values():
        function.__annotations__ = {name: hint for name, hint in hints.items() if hint is not Self}
    return _beartype(function)
