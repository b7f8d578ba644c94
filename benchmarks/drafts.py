"""Replays recorded completions with drafted tokens: which drafts stand, and how many passes that saves.

A pass runs a row's newest token and up to k drafts; the row gains the drafts that agree with what its noise
draws, and one token behind them. Rows move in lock step and learn of each other's tokens between passes.
Plain Python: knows nothing of models.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_LONGEST = 8  # tokens of context that n-gram drafts look at
_BRANCHES = 4  # continuations of one context that a tree of drafts considers

Counted = dict[int, int]  # how often each token followed a context


@dataclass(frozen=True)
class Scheme:
    """How drafts are made.

    `source` is where a context is looked up: "own" (the row's prompt and text), "siblings" (those and the
    texts of all rows so far), "prefix" (siblings whose whole text up to here is the same). `pick` chooses
    among the continuations: the most frequent one ("top"), the one that the row's own noise draws from their
    frequencies ("noise"), or several as a tree ("tree"). `earlier` looks up a whole earlier wave of the same
    prompt as well.
    """

    source: str
    pick: str = "top"
    earlier: bool = False


SCHEMES: dict[str, Scheme] = {
    "own text": Scheme("own"),
    "siblings": Scheme("siblings"),
    "siblings, by noise": Scheme("siblings", "noise"),
    "siblings, tree": Scheme("siblings", "tree"),
    "prefix": Scheme("prefix"),
    "prefix, after an earlier wave": Scheme("prefix", earlier=True),
    "siblings, after an earlier wave": Scheme("siblings", earlier=True),
    "siblings, after an earlier wave, by noise": Scheme("siblings", "noise", True),
    "siblings, after an earlier wave, tree": Scheme("siblings", "tree", True),
}


@dataclass(frozen=True)
class Replayed:
    """What one group took: the number of unfinished rows at each pass, and the tokens gained in all."""

    live: list[int]
    tokens: int


class Suffixes:
    """Counts which tokens followed each context of up to `longest` tokens.

    >>> table = Suffixes(2)
    >>> table.add([1, 2, 3, 1, 2, 4, 2, 4], 0)
    >>> table.after([9, 1, 2]), table.after([7, 2]), table.after([5])
    ({3: 1, 4: 1}, {3: 1, 4: 2}, {})
    """

    def __init__(self, longest: int = _LONGEST) -> None:
        self.longest = longest
        self.counts: dict[tuple[int, ...], Counted] = {}

    def add(self, text: Sequence[int], start: int) -> None:
        """Counts the tokens of `text` from `start` on."""
        for at in range(max(start, 1), len(text)):
            for length in range(1, min(self.longest, at) + 1):
                counted = self.counts.setdefault(tuple(text[at - length : at]), {})
                counted[text[at]] = counted.get(text[at], 0) + 1

    def after(self, text: Sequence[int]) -> Counted:
        """Looks up the longest context at the end of `text` that was seen before."""
        for length in range(min(self.longest, len(text)), 0, -1):
            found = self.counts.get(tuple(text[-length:]))
            if found:
                return found
        return {}


class Prefixes:
    """The same for whole texts: a context is everything before the token.

    >>> table = Prefixes()
    >>> table.add([1, 2, 3], 0)
    >>> table.after([1, 2]), table.after([2])
    ({3: 1}, {})
    """

    def __init__(self) -> None:
        self.counts: dict[tuple[int, ...], Counted] = {}

    def add(self, text: Sequence[int], start: int) -> None:
        """Counts the tokens of `text` from `start` on."""
        for at in range(start, len(text)):
            counted = self.counts.setdefault(tuple(text[:at]), {})
            counted[text[at]] = counted.get(text[at], 0) + 1

    def after(self, text: Sequence[int]) -> Counted:
        """Looks up the whole of `text`."""
        return self.counts.get(tuple(text), {})


def simulate(
    scheme: Scheme,
    prompt: Sequence[int],
    texts: Sequence[Sequence[int]],
    noise: Sequence[np.ndarray],
    width: int,
    earlier: Sequence[Sequence[int]] = (),
) -> Replayed:
    """Replays a group whose completions are `texts`, with `width` drafts a row and pass.

    The first token of each row comes from the prompt's own pass.
    """
    start = len(prompt)
    whole = [[*prompt, *text] for text in texts]
    tables = _tables(scheme, prompt, len(texts), earlier)
    known = [start + 1] * len(texts)
    for row, text in enumerate(whole):
        tables[row].add(text[: start + 1], start)
    live: list[int] = []
    rows = [row for row, text in enumerate(whole) if len(text) > start + 1]
    while rows:
        live.append(len(rows))
        gained = {}
        for row in rows:
            text, at = whole[row], known[row]
            drafts = _drafts(scheme.pick, tables[row], text[:at], noise[row][at - start :], width)
            gained[row] = _standing(drafts, text, at)
        for row, gain in gained.items():
            before, known[row] = known[row], known[row] + gain
            tables[row].add(whole[row][: known[row]], before)
        rows = [row for row in rows if known[row] < len(whole[row])]
    return Replayed(live, sum(len(text) - 1 for text in texts))


def _tables(
    scheme: Scheme, prompt: Sequence[int], rows: int, earlier: Sequence[Sequence[int]]
) -> list[Suffixes] | list[Prefixes]:
    """One table a row, or the same one for all rows."""
    if scheme.source == "own":
        tables = [Suffixes() for _ in range(rows)]
        for table in tables:
            table.add(prompt, 0)
        return tables
    table = Prefixes() if scheme.source == "prefix" else Suffixes()
    if scheme.source == "siblings":
        table.add(prompt, 0)
    if scheme.earlier:
        for text in earlier:
            table.add([*prompt, *text], len(prompt))
    return [table] * rows


def _drafts(
    pick: str, table: Suffixes | Prefixes, text: list[int], noise: np.ndarray, width: int
) -> set[tuple[int, ...]]:
    """The drafts as paths: each is a drafted token and all drafted ones before it."""
    if pick == "tree":
        return _best_first(table, text, width)
    found, path = set(), ()
    for number in noise[:width]:
        counted = table.after([*text, *path])
        if not counted:
            break
        token = max(counted, key=counted.get) if pick == "top" else _draw(counted, float(number))
        path = (*path, token)
        found.add(path)
    return found


def _draw(counted: Counted, number: float) -> int:
    """The token at which the cumulative frequency, by token id, first exceeds `number`."""
    tokens = sorted(counted)
    below = number * sum(counted.values())
    for token in tokens:
        below -= counted[token]
        if below < 0:
            return token
    return tokens[-1]


def _best_first(table: Suffixes | Prefixes, text: list[int], width: int) -> set[tuple[int, ...]]:
    """The `width` paths that are likeliest by the frequencies along them."""
    found: set[tuple[int, ...]] = set()
    waiting = list(_children(table, text, (), 1.0))
    heapq.heapify(waiting)
    while waiting and len(found) < width:
        score, path = heapq.heappop(waiting)
        found.add(path)
        for child in _children(table, text, path, -score):
            heapq.heappush(waiting, child)
    return found


def _children(
    table: Suffixes | Prefixes, text: list[int], path: tuple[int, ...], score: float
) -> Iterator[tuple[float, tuple[int, ...]]]:
    counted = table.after([*text, *path])
    total = sum(counted.values()) + 1  # one for a token that was never seen here
    for token in sorted(counted, key=counted.get, reverse=True)[:_BRANCHES]:
        yield -score * counted[token] / total, (*path, token)


def _standing(drafts: set[tuple[int, ...]], text: list[int], at: int) -> int:
    """The tokens that a pass gains: the drafts that agree with `text` from `at` on, and one more."""
    gain = 0
    while at + gain + 1 < len(text) and tuple(text[at : at + gain + 1]) in drafts:
        gain += 1
    return gain + 1
