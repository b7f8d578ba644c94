"""Multiplication: generated problems such as `347*26=`, with the answer in two forms.

    direct    #9022
    worked    300*26=7800,40*26=1040:8840,7*26=182:9022#9022

A worked answer multiplies each digit of the first factor, highest first, and writes the running total after
`:`. Digits that are zero are left out. The answer is what follows the last `#`.

With your own prompt template (for other models) the problems are the same, and the answer is read as in word
problems (`answers.py`).

A split by hash keeps the problems of the embedded model's own training (`pretrain`), of reinforcement
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
# A problem belongs to the first split whose bound is above its hash, as a fraction of the hash's range.
_UPPER: dict[Split, float] = {"pretrain": 0.5, "train": 0.8, "eval": 1.0}
_ENUMERATED = 100_000  # problems that are listed in half a second; of more, some are drawn
_ANSWER = re.compile(r"#(0|[1-9][0-9]{0,39})\Z")


def split_of(a: int, b: int) -> Split:
    """Returns the split that a problem belongs to, in either order of its factors.

    >>> split_of(347, 26) == split_of(26, 347)
    True
    """
    digest = hashlib.sha256(b"%d*%d" % ((a, b) if a < b else (b, a))).digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    for split, upper in _UPPER.items():
        if fraction < upper:
            return split
    return "eval"  # a fraction that rounds to 1


def prompt_text(a: int, b: int) -> str:
    """Returns the problem as the embedded model reads it."""
    return TEMPLATE.format(a=a, b=b)


def at_once(a: int, b: int) -> str:
    """Returns the answer without any work.

    >>> at_once(347, 26)
    '#9022'
    """
    return f"#{a * b}"


def worked(a: int, b: int) -> str:
    """Returns the answer, worked out over the digits of the first factor.

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
    """Returns the integer after the last `#`, or None: digits up to the end of the text, no leading zeros.

    >>> read_answer("7*26=182#182"), read_answer("#182 or so"), read_answer("182")
    (182, None, None)
    """
    match = _ANSWER.search(text)
    return int(match[1]) if match else None


def problems(
    split: Split, digits: Sequence[int], seed: int, size: int | None = None
) -> list[tuple[int, int]]:
    """Returns different problems of a split in a seeded order: pairs of factors with `digits` digits each.

    `size` None returns all of them. Raises UserError if there are fewer than `size`, or too many to list.
    """
    ranges = [range(10 ** (count - 1), 10**count) for count in digits]
    generator = random.Random(f"{split} {seed}")
    space = len(ranges[0]) * len(ranges[1])
    if space > _ENUMERATED:
        return _drawn(split, ranges, generator, size)
    pairs = list(_listed(*ranges)[split])
    if size is not None and size > len(pairs):
        raise UserError(
            f"task.{split}_size",
            f"{size}, but there are only {len(pairs)} {split} problems of {digits[0]} x {digits[1]} digits",
            f"Set task.{split}_size={len(pairs)} or less, or larger task.digits",
        )
    generator.shuffle(pairs)
    return pairs[:size]


@lru_cache(maxsize=1)
def _listed(first: range, second: range) -> dict[Split, list[tuple[int, int]]]:
    """Returns all problems by split."""
    pairs: dict[Split, list[tuple[int, int]]] = {split: [] for split in _UPPER}
    for a in first:
        for b in second:
            pairs[split_of(a, b)].append((a, b))
    return pairs


def _drawn(
    split: Split, ranges: Sequence[range], generator: random.Random, size: int | None
) -> list[tuple[int, int]]:
    # A split has at least a fifth of all problems. At most half of those are drawn, so most draws are new.
    most = len(ranges[0]) * len(ranges[1]) // 10
    if size is None or size > most:
        raise UserError(
            f"task.{split}_size",
            f"{'all' if size is None else size} problems are too many to list with factors this long",
            f"Set for example task.{split}_size={min(10_000, most)}",
        )
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < size:
        pair = generator.choice(ranges[0]), generator.choice(ranges[1])
        if split_of(*pair) == split:
            pairs[pair] = None
    return list(pairs)


def load(settings: Any) -> Task:
    """Makes the problems: `train` in an order set by `train.seed`, `eval` in the same order for every run.

    Columns: `a` and `b`, the factors; `answer`, their product as text. Raises UserError for a setting that
    asks for other data, or for more problems than exist.
    """
    task = settings.task
    for name, value, own in (
        ("path", task.path, None),
        ("subset", task.subset, None),
        ("train_split", task.train_split, "train"),
        ("eval_split", task.eval_split, "eval"),
    ):
        if value not in (None, own):
            raise UserError(
                f"task.{name}",
                f"{value!r}, but multiplication makes its own problems",
                f"Leave task.{name} out",
            )
    train = _examples(problems("train", task.digits, settings.train.seed, task.train_size))
    evaluation = _examples(problems("eval", task.digits, 0, task.eval_size))
    as_shipped = task.prompt_template is None
    return Task(
        "multiplication",
        train,
        evaluation,
        (product if as_shipped else accuracy,),
        score=score_product if as_shipped else score_number,
        score_lenient=score_last_number,
        prompt_template=TEMPLATE,
    )


def product(completions: Sequence[Any], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """Rewards a completion with 1 if the product follows its last `#`, else with 0.

    >>> product(["#9022", "300*26=7800#7800", "9022"], ["9022"] * 3)
    [1.0, 0.0, 0.0]
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(read_answer(text) == int(gold)) for text, gold in zip(texts, answer, strict=True)]


def score_product(text: str, example: Example) -> Score:
    """Tells whether a text has an answer after its last `#`, and whether that is the product."""
    answer = read_answer(text)
    return Score(answer is not None, answer == int(example.columns["answer"]))


def _examples(pairs: list[tuple[int, int]]) -> list[Example]:
    return [Example(prompt_text(a, b), {"a": a, "b": b, "answer": str(a * b)}) for a, b in pairs]
