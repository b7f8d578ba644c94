"""Multiplication: problems made by a generator, such as `347*26=`, and the answer in two forms.

    at once   #9022
    worked    300*26=7800,40*26=1040:8840,7*26=182:9022#9022

A worked answer multiplies each digit of the first factor, highest first, and writes the running total after
`:`. Digits that are zero are left out. The answer is what follows the last `#`.

With a prompt template of one's own (for other models) the problems are the same, and the answer is read as
in word problems (`answers.py`).

One split by hash keeps the problems of the embedded model's own training (`pretrain`), of reinforcement
learning (`train`) and of evaluation (`eval`) apart.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from twig.common.errors import UserError
from twig.core.types import Example, Score
from twig.tasks.base import Task
from twig.tasks.rewards import accuracy, score_last_number, score_number

Split = Literal["pretrain", "train", "eval"]

TEMPLATE = "{a}*{b}="
# The hash, as a fraction of its range, below which a problem belongs to the split.
_UPPER: dict[Split, float] = {"pretrain": 0.5, "train": 0.8, "eval": 1.0}
_ENUMERATED = 100_000  # so many problems are listed in half a second; of more, some are drawn
_ANSWER = re.compile(r"#(0|[1-9][0-9]{0,39})\Z")


def split_of(a: int, b: int) -> Split:
    """The split that a problem belongs to; the order of its factors does not matter.

    >>> split_of(347, 26) == split_of(26, 347)
    True
    """
    digest = hashlib.sha256(b"%d*%d" % ((a, b) if a < b else (b, a))).digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    for split, upper in _UPPER.items():
        if fraction < upper:
            return split
    return "eval"  # a fraction that was rounded to 1


def prompt_text(a: int, b: int) -> str:
    """The problem as the embedded model reads it."""
    return TEMPLATE.format(a=a, b=b)


def at_once(a: int, b: int) -> str:
    """The answer without any work.

    >>> at_once(347, 26)
    '#9022'
    """
    return f"#{a * b}"


def worked(a: int, b: int) -> str:
    """The answer worked out over the digits of the first factor.

    >>> worked(347, 26)
    '300*26=7800,40*26=1040:8840,7*26=182:9022#9022'
    >>> worked(300, 26)
    '300*26=7800#7800'
    """
    lines, total = [], 0
    for place, digit in enumerate(str(a)):
        part = int(digit) * 10 ** (len(str(a)) - 1 - place)
        if part:
            total += part * b
            lines.append(f"{part}*{b}={part * b}" + (f":{total}" if lines else ""))
    return ",".join(lines) + at_once(a, b)


def read_answer(text: str) -> int | None:
    """The integer after the last `#`, or None: digits up to the very end of the text, without leading zeros.

    >>> read_answer("7*26=182#182"), read_answer("#182 or so"), read_answer("182")
    (182, None, None)
    """
    match = _ANSWER.search(text)
    return int(match[1]) if match else None


def problems(
    split: Split, digits: Sequence[int], seed: int, size: int | None = None
) -> list[tuple[int, int]]:
    """Different problems of a split in a seeded order: pairs of factors with exactly `digits` digits each.

    `size` None gives all there are. Raises UserError where there are fewer than `size`, or too many to list.
    """
    ranges = [range(10 ** (count - 1), 10**count) for count in digits]
    generator = random.Random(f"{split} {seed}")
    space = len(ranges[0]) * len(ranges[1])
    if space > _ENUMERATED:
        return _drawn(split, ranges, generator, size)
    found = list(_listed(*ranges)[split])
    if size is not None and size > len(found):
        raise UserError(
            f"task.{split}_size: {size}, but there are only {len(found)} {split} problems of "
            f"{digits[0]} x {digits[1]} digits; write {len(found)} or less, or larger task.digits"
        )
    generator.shuffle(found)
    return found[:size]


@lru_cache(maxsize=1)
def _listed(first: range, second: range) -> dict[Split, list[tuple[int, int]]]:
    """All problems by split."""
    found: dict[Split, list[tuple[int, int]]] = {split: [] for split in _UPPER}
    for a in first:
        for b in second:
            found[split_of(a, b)].append((a, b))
    return found


def _drawn(
    split: Split, ranges: Sequence[range], generator: random.Random, size: int | None
) -> list[tuple[int, int]]:
    # A split has at least a fifth of all problems. At most half of those are drawn, so most draws are new.
    most = len(ranges[0]) * len(ranges[1]) // 10
    if size is None or size > most:
        raise UserError(
            f"task.{split}_size: {size or 'all'} is too many problems to list with factors this long; "
            f"write a smaller number, such as {min(10_000, most)}"
        )
    found: dict[tuple[int, int], None] = {}
    while len(found) < size:
        pair = generator.choice(ranges[0]), generator.choice(ranges[1])
        if split_of(*pair) == split:
            found[pair] = None
    return list(found)


def load(settings: Any) -> Task:
    """The task: problems `train` in an order set by `train.seed`, and problems `eval` in one order for all
    runs.

    Columns: `a` and `b`, the factors; `answer`, their product as text. Raises UserError for a setting that
    asks for other data, or for more problems than there are.
    """
    wanted = settings.task
    for name, value, own in (
        ("path", wanted.path, None),
        ("train_split", wanted.train_split, "train"),
        ("eval_split", wanted.eval_split, "eval"),
    ):
        if value not in (None, own):
            raise UserError(
                f"task.{name}: {value!r}, but multiplication makes its own problems; leave it out"
            )
    train = _examples(problems("train", wanted.digits, settings.train.seed, wanted.train_size))
    evaluation = _examples(problems("eval", wanted.digits, 0, wanted.eval_size))
    own = wanted.prompt_template is None
    return Task(
        "multiplication",
        train,
        evaluation,
        (product if own else accuracy,),
        score=score_product if own else score_number,
        score_lenient=score_last_number,
        prompt_template=TEMPLATE,
    )


def product(completions: Sequence[Any], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """The reward: 1 where what follows a completion's last `#` is the product, else 0.

    >>> product(["#9022", "300*26=7800#7800", "9022"], ["9022"] * 3)
    [1.0, 0.0, 0.0]
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(read_answer(text) == int(gold)) for text, gold in zip(texts, answer, strict=True)]


def score_product(text: str, example: Example) -> Score:
    """Whether a text has an answer after its last `#`, and whether that is the product."""
    found = read_answer(text)
    return Score(found is not None, found == int(example.columns["answer"]))


def _examples(pairs: list[tuple[int, int]]) -> list[Example]:
    return [Example(prompt_text(a, b), {"a": a, "b": b, "answer": str(a * b)}) for a, b in pairs]
