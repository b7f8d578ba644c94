"""Describes how a run ends: exit statuses, and the failure of one process, which all others see. No torch."""

from dataclasses import dataclass

from twig.common.errors import UserError

FAULT, USAGE_ERROR, STOPPED = 1, 2, 130  # exit statuses


@dataclass(frozen=True)
class Failure:
    """Says why a process ended: its rank, its exit status and the reason in one line.

    `details` is the traceback of a user's code, or "".
    """

    rank: int
    status: int
    reason: str
    details: str = ""


class Ended(Exception):
    """Raised in all processes of a run in which one failed."""

    def __init__(self, failure: Failure) -> None:
        self.failure, self.status = failure, failure.status
        super().__init__(f"process {failure.rank}: {failure.reason}")


def exit_status(error: BaseException) -> int:
    """Returns the exit status that an error stands for."""
    if isinstance(error, UserError):
        return USAGE_ERROR
    return getattr(error, "status", STOPPED if isinstance(error, KeyboardInterrupt) else FAULT)


def failure_of(rank: int, error: BaseException) -> Failure:
    """Returns the failure that an error in process `rank` is."""
    if isinstance(error, Ended):
        return error.failure
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return Failure(rank, exit_status(error), reason, getattr(error, "traceback_text", None) or "")


def as_exception(failure: Failure) -> BaseException:
    """Returns the exception that a failure raises in the processes that did not cause it."""
    return KeyboardInterrupt() if failure.status == STOPPED else Ended(failure)
