"""What others may see: text without secrets or paths of this machine, as Markdown that it cannot break.

Knows forms, not contents: what looks like an access token or like a path is cut. No torch.
"""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

_REMOVED = "(removed)"
_SECRET = re.compile(
    r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA|AIza)[\w-]{12,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*|(?<=://)[^\s/@]+(?=@)"
)
_SECRET_KEY = re.compile(r"token$|secret|password|passwd|api_?key|credential|authorization", re.IGNORECASE)
# Two steps down from a root, a drive, a share or a home: `/think` and `3/4` are no paths.
_PATH = re.compile(r"(?<![\w.:/\\<])(?:~|[A-Za-z]:|\\)?(?:[/\\]+[^\s/\\:*?\"'`<>|]+){2,}[/\\]?")


def public(value: Any) -> Any:
    """The value without secrets, and with the last part of a path in its place.

    >>> public({"file": "/home/ann/work/rewards.py:exact", "api_key": "abc", "n": 3})
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
    """The last part of a path in either notation.

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
    """A text on one line, with what is not printable written out."""
    text = " ".join(str(public(value)).split())
    return _printable(text)


def code(value: Any) -> str:
    """A text as inline code, whatever is in it.

    >>> code("a`b\\n|<b>")
    '``a`b |<b>``'
    """
    text = shown(value) or " "
    ticks = "`" * (_longest_run(text) + 1)
    pad = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def fenced(text: str, language: str) -> str:
    """A block of code, whatever is in it."""
    text = _printable(text)
    ticks = "`" * max(3, _longest_run(text) + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _longest_run(text: str) -> int:
    return max([0, *(len(run) for run in re.findall(r"`+", text))])
