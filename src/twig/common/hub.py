"""Whether the Hugging Face Hub can be reached, and why it did not give a model or a data set.

Asks once and briefly, because the libraries wait half a minute for each file before they give up. Knows
nothing of what is fetched. `huggingface_hub` is imported only where it is needed.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

_SECONDS = 5.0
Refusal = Literal["gated", "missing", "revision", "offline"]


@cache
def reachable() -> bool:
    """Whether the Hub answers, asked once in a process; False where HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # dozens of kinds, by proxy and version: whatever it is, there is no answer
        return False
    return True


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Inside, nothing waits for a Hub that cannot be reached: what is not in its cache fails at once.

    The switch is what HF_HUB_OFFLINE sets, for as long as this lasts, so all libraries above it follow.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def refusal(error: BaseException) -> Refusal | None:
    """Why the Hub gave nothing, out of an exception and those that it came from; None: another reason.

    A repository that is private or misspelt looks the same from outside: "missing".
    """
    from huggingface_hub import errors

    found: set[Refusal] = set()
    for cause in _causes(error):
        text = " ".join(str(cause).split()).lower()
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, errors.GatedRepoError) or "gated" in text:
            found.add("gated")
        elif isinstance(cause, errors.RevisionNotFoundError) or "is not a valid git identifier" in text:
            found.add("revision")
        elif isinstance(cause, (errors.RepositoryNotFoundError, errors.HFValidationError)) or status in (
            401,
            403,
            404,
        ):
            found.add("missing")
        elif isinstance(cause, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)) or re.search(
            r"offline|couldn't (connect|reach)|connection|timed? ?out|name or service not known", text
        ):
            found.add("offline")
        elif "not a valid model identifier" in text or "doesn't exist on the hub" in text:
            found.add("missing")
    order: tuple[Refusal, ...] = ("gated", "revision", "missing", "offline")
    return next((why for why in order if why in found), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
