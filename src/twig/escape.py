"""Text from outside, made safe to show and to write: control characters, halves of characters, endless lines.

Knows nothing of secrets and paths (`redact.py`). No torch.
"""

import re
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
