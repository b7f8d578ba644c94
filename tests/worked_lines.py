"""Whether every line of a worked multiplication is true."""

import re

LINE = re.compile(r"([1-9]0*)\*([1-9][0-9]*)=([1-9][0-9]*)(?::([1-9][0-9]*))?")


def assert_every_line_is_true(text: str, a: int, b: int) -> None:
    """Reads a worked answer and checks each product, each running total and the answer."""
    work, answer = text.split("#")
    parts, total = [], 0
    for number, line in enumerate(work.split(",")):
        part, factor, result, running = LINE.fullmatch(line).groups()
        assert int(factor) == b
        assert int(part) * b == int(result), line
        total += int(result)
        assert (running is None) == (number == 0), "the first product is its own running total"
        assert running is None or int(running) == total, line
        parts.append(int(part))
    assert parts == sorted(parts, reverse=True) and sum(parts) == a
    assert len({len(str(part)) for part in parts}) == len(parts), "one line per digit"
    assert int(answer) == total == a * b
