"""Text: what comes from outside made safe to show and to write; lists, sizes and times in words.

Control characters, halves of characters, endless lines. Knows nothing of secrets and paths (`redact.py`).
"""

import re
from collections.abc import Sequence
from typing import Any

_LONGEST_LINE = 2000
_HALVES = re.compile("[\ud800-\udfff]")


def printable(value: Any) -> str:
    """The text with everything that a terminal could act on written out; line ends and tabs stay.

    >>> printable("\\x1b[31mred")
    '\\\\x1b[31mred'
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def one_line(value: Any, longest: int = _LONGEST_LINE) -> str:
    """The text as `printable` gives it, on one line; of a longer one, its two ends.

    >>> one_line("a\\n b"), one_line("0123456789", 7)
    ('a b', '01...89')
    """
    text = str(value)
    if len(text) > 4 * longest:  # a megabyte need not be gone through
        text = shortened(text, 4 * longest)
    return shortened(printable(" ".join(text.split())), longest)


def shortened(text: str, longest: int) -> str:
    """A text of at most `longest` characters: where it is longer, its two ends."""
    if len(text) <= longest:
        return text
    side = (longest - 3) // 2
    return f"{text[:side]}...{text[-side:]}"


def storable(text: str) -> str:
    """The text with halves of characters (lone surrogates, which UTF-8 cannot hold) written out.

    >>> storable("a\\ud800")
    'a\\\\ud800'
    """
    return _HALVES.sub(lambda match: repr(match[0])[1:-1], text)


def file_name(text: str) -> str:
    """The text as part of a file's name: letters, digits and `. - _ +`, at most 100 of them.

    >>> file_name("my run/\\x1b[31m"), file_name("..")
    ('my_run_31m', 'run')
    """
    return re.sub(r"[^\w.+-]+", "_", storable(text))[:100].strip("_.") or "run"


_UNITS = (86400, 3600, 60, 1)  # seconds in d, h, m, s


def percent(share: float) -> str:
    """A share in words.

    >>> percent(0.1234)
    '12.3 %'
    """
    return f"{100 * share:.1f} %"


def message_of(error: object, longest: int = 200) -> str:
    """What an error says, on one line, and not the end of a long one."""
    return " ".join(str(error).split())[:longest]


def either(names: list[str]) -> str:
    """The names with commas and an "or".

    >>> either(["a", "b", "c"])
    'a, b or c'
    """
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def listed(names: Sequence[str]) -> str:
    """The names with commas and an "and".

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def parse_size(text: str) -> int | None:
    """The bytes of a size, None where it is none: GiB are powers of 1024, GB of 1000, G alone is GiB.

    >>> parse_size("6GiB"), parse_size("500 MB"), parse_size("six")
    (6442450944, 500000000, None)
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kKMGT])(iB|B)?", text.strip())
    if match is None or float(match[1]) == 0:
        return None
    power = "kMGT".index(match[2].replace("K", "k")) + 1
    return round(float(match[1]) * (1000 if match[3] == "B" else 1024) ** power)


def format_size(size: float) -> str:
    """Bytes in words.

    >>> format_size(6442450944), format_size(1536)
    ('6.00 GiB', '1.5 KiB')
    """
    for unit, digits in (("B", 0), ("KiB", 1), ("MiB", 0)):
        if abs(size) < 1024:
            return f"{size:.{digits}f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def parse_duration(value: str | float) -> float | None:
    """The seconds of a time: a number of them, or hours, minutes and seconds; None where it is none.

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
