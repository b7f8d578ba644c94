"""Makes text from outside safe to show and to write; formats lists, sizes and times.

Handles control characters, halves of characters, endless lines. Knows nothing of secrets and paths
(`redact.py`).
"""

import math
import re
from collections.abc import Sequence
from typing import Any

_LONGEST_LINE = 2000
_HALVES = re.compile("[\ud800-\udfff]")


def printable(value: Any) -> str:
    """Returns the text with everything that a terminal could act on escaped; line ends and tabs stay.

    >>> printable("\\x1b[31mred")
    '\\\\x1b[31mred'
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def one_line(value: Any, longest: int = _LONGEST_LINE) -> str:
    """Returns the text as `printable` does, on one line; of a long one, its two ends.

    >>> one_line("a\\n b"), one_line("0123456789", 7)
    ('a b', '01...89')
    """
    text = str(value)
    if len(text) > 4 * longest:  # to escape a megabyte takes long
        text = shortened(text, 4 * longest)
    return shortened(printable(" ".join(text.split())), longest)


def shortened(text: str, longest: int) -> str:
    """Returns a text of at most `longest` characters: of a longer one, its two ends."""
    if len(text) <= longest:
        return text
    side = (longest - 3) // 2
    return f"{text[:side]}...{text[-side:]}"


def storable(text: str) -> str:
    """Returns the text with halves of characters (lone surrogates, which UTF-8 cannot hold) escaped.

    >>> storable("a\\ud800")
    'a\\\\ud800'
    """
    return _HALVES.sub(lambda match: repr(match[0])[1:-1], text)


def plain(value: Any) -> Any:
    """Returns the value in JSON's kinds: arrays become lists, NaN and infinity None, other objects text.

    >>> plain({1: (True, float("nan"))})
    {'1': [True, None]}
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def file_name(text: str) -> str:
    """Returns the text as part of a file's name: letters, digits and `. - _ +`, at most 100 of them.

    >>> file_name("my run/\\x1b[31m"), file_name("..")
    ('my_run_31m', 'run')
    """
    return re.sub(r"[^\w.+-]+", "_", storable(text))[:100].strip("_.") or "run"


_UNITS = (86400, 3600, 60, 1)  # seconds in d, h, m, s


def percent(share: float) -> str:
    """Returns a share in percent.

    >>> percent(0.1234)
    '12.3 %'
    """
    return f"{100 * share:.1f} %"


def message_of(error: object, longest: int = 200) -> str:
    """Returns an error's message on one line, cut if it is long."""
    return " ".join(str(error).split())[:longest]


def either(names: list[str]) -> str:
    """Returns the names with commas and an "or".

    >>> either(["a", "b", "c"])
    'a, b or c'
    """
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def listed(names: Sequence[str]) -> str:
    """Returns the names with commas and an "and".

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def parse_size(text: str) -> int | None:
    """Returns the bytes of a size, None if it is none: GiB is 1024 ** 3, GB 1000 ** 3, G alone is GiB.

    >>> parse_size("6GiB"), parse_size("500 MB"), parse_size("six")
    (6442450944, 500000000, None)
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kKMGT])(iB|B)?", text.strip())
    if match is None or float(match[1]) == 0:
        return None
    power = "kMGT".index(match[2].replace("K", "k")) + 1
    return round(float(match[1]) * (1000 if match[3] == "B" else 1024) ** power)


def format_size(size: float) -> str:
    """Returns a text for a number of bytes.

    >>> format_size(6442450944), format_size(1536)
    ('6.00 GiB', '1.5 KiB')
    """
    for unit, digits in (("B", 0), ("KiB", 1), ("MiB", 0)):
        if abs(size) < 1024:
            return f"{size:.{digits}f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def parse_duration(value: str | float) -> float | None:
    """Returns the seconds of a time such as 90 or "2h30m"; None if it is none.

    >>> parse_duration("2h30m"), parse_duration("90 s"), parse_duration(1.5), parse_duration("1 day")
    (9000.0, 90.0, 1.5, None)
    """
    if not isinstance(value, str):
        return float(value)
    number = r"(?:([0-9]+(?:\.[0-9]+)?) ?%s ?)?"
    match = re.fullmatch("".join(number % unit for unit in "dhms"), value.strip())
    seconds = (
        sum(float(part or 0) * unit for part, unit in zip(match.groups(), _UNITS, strict=True))
        if match
        else 0
    )
    return seconds or None
