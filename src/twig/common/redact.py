"""Removes secrets and paths of this machine from what others may see, and writes it as safe Markdown.

It removes what looks like an access token or a path, and the values of secrets in this process's environment.
No torch.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import quote

from twig.common.text import printable

_REMOVED = "(removed)"
_SECRET = re.compile(
    r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA|AIza)[\w-]{12,}"
    # A JSON web token. NOTE: a match begins only where a run of such characters does, and looks into the run
    # once: every text takes time in proportion to its length.
    r"|(?<![\w-])(?=[\w-]*\beyJ[\w-]{8})[\w-]+\.[\w-]{8,}\.[\w-]*|(?<=://)[^\s/@]+(?=@)"
)
_SECRET_KEY = re.compile(r"token$|secret|password|passwd|api_?key|credential|authorization", re.IGNORECASE)
# Variables that hold a secret. A shorter value may be any word.
_SECRET_VARIABLE = re.compile(r"(?:TOKEN|KEY|KEY_ID|PASS|PASSPHRASE|PASSWD)$|SECRET|PASSWORD", re.IGNORECASE)
_SHORTEST_SECRET = 8
# Two steps down from a root, a drive, a share or a home: `/think` and `3/4` are no paths.
_PATH = re.compile(r"(?<![\w.:/\\<])(?:~|[A-Za-z]:|\\)?(?:[/\\]+[^\s/\\:*?\"'`<>|]+){2,}[/\\]?")


def environment_secrets() -> dict[str, str]:
    """Returns the secrets in the environment, by variable: its name says so, or the value's form does."""
    return {
        name: value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST_SECRET and (_SECRET_VARIABLE.search(name) or _SECRET.fullmatch(value))
    }


def secret_in(text: str) -> str | None:
    """Returns the environment variable whose secret is in a text, None without one."""
    return next((name for name, value in environment_secrets().items() if value in text), None)


def without_secrets(value: Any) -> Any:
    """Returns the value, also nested, without the secrets of the environment.

    They are removed as they are, and as URLs, JSON and Python write them.
    """
    forms = set()
    for secret in environment_secrets().values():
        forms |= {secret, quote(secret, safe=""), json.dumps(secret)[1:-1], repr(secret)[1:-1]}
    return _without(value, sorted(forms, key=len, reverse=True))


def _without(value: Any, forms: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {_without(key, forms): _without(item, forms) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without(item, forms) for item in value]
    if isinstance(value, str):
        for form in forms:
            value = value.replace(form, _REMOVED)
    return value


def hidden(text: str) -> str:
    """Returns a message or traceback without the environment's secrets and what looks like one.

    >>> hidden("401 for hf_abcdefghijklmnop")
    '401 for (removed)'
    """
    return _SECRET.sub(_REMOVED, without_secrets(text))


def public(value: Any) -> Any:
    """Returns the value without secrets, and with only the last part of each path.

    >>> public({"file": "/home/ann/rewards.py:exact", "api_key": "abc", "n": 3})
    {'file': 'rewards.py:exact', 'api_key': '(removed)', 'n': 3}
    """
    if isinstance(value, Mapping):
        return {
            public(str(key)): _REMOVED if _SECRET_KEY.search(str(key)) else public(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if not isinstance(value, str):
        return value
    if "\n" not in value and _is_path(value):
        value = last_part(value)
    return _PATH.sub(lambda match: f".../{last_part(match[0])}", _SECRET.sub(_REMOVED, value))


def last_part(path: str) -> str:
    """Returns the last part of a path in either notation.

    >>> last_part("/models/mine/"), last_part("C:\\\\models\\\\mine")
    ('mine', 'mine')
    """
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _is_path(text: str) -> bool:
    absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return (absolute and len(re.findall(r"[/\\]", text)) > 1) or text.startswith(
        ("~/", "./", "../", ".\\", "..\\")
    )


def shown(value: Any) -> str:
    """Returns a text on one line, with unprintable characters escaped."""
    text = " ".join(str(public(value)).split())
    return printable(text)


def code(value: Any) -> str:
    """Returns a text as Markdown's inline code, whatever is in it.

    >>> code("a`b\\n|<b>")
    '``a`b |<b>``'
    """
    text = shown(value) or " "
    ticks = "`" * (_longest_run(text) + 1)
    pad = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def fenced(text: str, language: str) -> str:
    """Returns a text as Markdown's block of code, whatever is in it."""
    text = printable(text)
    ticks = "`" * max(3, _longest_run(text) + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _longest_run(text: str) -> int:
    return max([0, *(len(run) for run in re.findall(r"`+", text))])
