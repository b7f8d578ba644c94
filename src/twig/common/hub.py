"""Checks whether the Hugging Face Hub can be reached, and why it did not give a model or a data set.

Asks once and briefly, because the libraries wait half a minute for each file before they give up. Knows
nothing of what is fetched. `huggingface_hub` is imported only when it is needed.
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
    """Returns whether the Hub answers, asked once per process; False if HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # pyright: ignore[reportPrivateImportUsage]  # documented there

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # dozens of kinds, by proxy and version; each means that there is no answer
        return False
    return True


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Inside, nothing waits for a Hub that cannot be reached: what is not in its cache fails immediately.

    This sets what HF_HUB_OFFLINE sets, so all libraries that use the Hub follow.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def refusal(error: BaseException) -> Refusal | None:
    """Returns why the Hub gave nothing, from an exception and its causes; None for another reason.

    A private repository looks like a misspelt one: "missing".
    """
    from huggingface_hub import errors

    reasons: set[Refusal] = set()
    for cause in _causes(error):
        text = " ".join(str(cause).split()).lower()
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, errors.GatedRepoError) or "gated" in text:
            reasons.add("gated")
        elif isinstance(cause, errors.RevisionNotFoundError) or "is not a valid git identifier" in text:
            reasons.add("revision")
        elif isinstance(cause, (errors.RepositoryNotFoundError, errors.HFValidationError)) or status in (
            401,
            403,
            404,
        ):
            reasons.add("missing")
        elif isinstance(cause, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)) or re.search(
            r"offline|couldn't (connect|reach)|connection|timed? ?out|name or service not known", text
        ):
            reasons.add("offline")
        elif "not a valid model identifier" in text or "doesn't exist on the hub" in text:
            reasons.add("missing")
    order: tuple[Refusal, ...] = ("gated", "revision", "missing", "offline")
    return next((reason for reason in order if reason in reasons), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
