"""Chooses three problems of the evaluations whose answers before and after training are kept.

One became right, one stayed wrong, one is random. Which of them became right shows only after training: until
then the run's state has the first answers of every problem that may be chosen. No torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from twig.common.text import shortened
from twig.core.rng import ANSWERS, generator
from twig.core.types import Example
from twig.runs.reader import KINDS
from twig.tasks.base import right_answer
from twig.tasks.prompts import problem_text

_LONGEST = 4000  # characters of a text that is kept


@dataclass(frozen=True)
class Answered:
    """What an evaluation asked, the greedy answers, and which of them are right."""

    examples: Sequence[Example]
    texts: Sequence[str]
    right: Sequence[bool]


def answers_before(answered: Answered, seed: int) -> list[dict[str, Any]]:
    """Returns the answers before training of the problems that `answers_after` may choose."""
    first = _order(len(answered.texts), seed)[: len(KINDS)]
    numbers = [n for n, right in enumerate(answered.right) if n in first or not right]
    return [{"problem": number, "before": _answer(answered, number)} for number in numbers]


def answers_after(before: Sequence[dict[str, Any]], answered: Answered, seed: int) -> list[dict[str, Any]]:
    """Returns up to three problems with both answers, the first ones of each kind in an order of the seed's.

    `before` are those of `answers_before` for the same problems. A kind that no problem is of is left out.
    """
    kept = {row["problem"]: row["before"] for row in before}
    order = _order(len(answered.texts), seed)
    wrong = [number for number in order if number in kept and not kept[number]["right"]]
    chosen: dict[str, int] = {}
    for kind, right in (("became_right", True), ("stayed_wrong", False)):
        numbers = [number for number in wrong if bool(answered.right[number]) == right]
        chosen |= {kind: numbers[0]} if numbers else {}
    others = [n for n in order[: len(KINDS)] if n in kept and n not in chosen.values()]
    chosen |= {"random": others[0]} if others else {}
    return [
        {
            "kind": kind,
            "problem": number,
            "prompt": shortened(problem_text(answered.examples[number]), _LONGEST),
            "answer": right_answer(answered.examples[number]),
            "before": kept[number],
            "after": _answer(answered, number),
        }
        for kind, number in chosen.items()
    ]


def _order(size: int, seed: int) -> list[int]:
    return generator(seed, ANSWERS).permutation(size).tolist()


def _answer(answered: Answered, number: int) -> dict[str, Any]:
    return {"text": shortened(answered.texts[number], _LONGEST), "right": bool(answered.right[number])}
