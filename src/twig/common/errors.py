"""The exception for mistakes that the person running Twig can fix."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from twig.common.text import one_line

P = ParamSpec("P")
T = TypeVar("T")


class UserError(Exception):
    """A mistake the user can fix: one printable line saying where, what and how to fix it.

    `key` is what the error is about (a setting, a file, an option), `problem` a clause, `fix` an imperative
    sentence or a question; neither ends with a full stop. It is no ValueError: code that catches the errors
    of a library must not wrap it.

    >>> str(UserError("train.max_steps", "0 is below 1", "Set train.max_steps=100"))
    'train.max_steps: 0 is below 1. Set train.max_steps=100.'
    >>> str(UserError("my\\x1b[31m.yaml", "no\\nfile"))
    'my\\\\x1b[31m.yaml: no file.'
    """

    def __init__(self, key: str, problem: str, fix: str = "") -> None:
        self.key, self.problem, self.fix = key, problem, fix
        sentences = [f"{key}: {problem}", *([fix] if fix else [])]
        super().__init__(one_line(" ".join(s if s.endswith((".", "?")) else f"{s}." for s in sentences)))

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str, str]]:
        return type(self), (self.key, self.problem, self.fix)


class Invalid(ValueError):
    """Carries a UserError out of a validator: pydantic collects the ValueErrors of all validators."""

    def __init__(self, error: UserError) -> None:
        super().__init__(str(error))
        self.error = error


def as_validator(check: Callable[P, T]) -> Callable[P, T]:
    """Returns a check for pydantic: it raises Invalid in place of UserError."""

    @wraps(check)
    def checked(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return check(*arguments, **options)
        except UserError as error:
            raise Invalid(error) from error

    return checked
