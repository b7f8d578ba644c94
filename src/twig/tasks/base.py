"""Defines a task.

A task module has one function, `load(settings) -> Task` (or `load(settings, train_dataset, eval_dataset)` if
it reads data), and is listed in `load.py`. Knows nothing about models, data files or algorithms.
"""

import datetime
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePath
from typing import Any
from uuid import UUID

from twig.core.types import Example, Score
from twig.tasks.reward_calls import Limit


@dataclass(frozen=True)
class Task:
    """Problems to train and to evaluate on, how they are asked, and how a completion is rewarded.

    `reward_funcs` have TRL's signature: by keyword `prompts`, `completions`, `completion_ids`, every column
    of the data as a list, `trainer_state`, `log_extra` and `log_metric`; they return one number or None per
    completion. `reward_weights` has one weight per function (None: 1 each).

    `score` reads one completion's text. Without it a completion is right if its weighted reward reaches
    `correct_at`. `score_lenient` reads the last number instead of the marked answer: it tells what a model
    knows apart from how it writes answers, and is only reported.

    `prompt_template` is filled with the example's columns, and `{question}` or `{prompt}` with its prompt if
    no column has that name; None leaves the prompt unchanged. `chat` says whether prompts go through the
    tokenizer's chat template (auto, always, never), which gets `chat_template_kwargs`. `reward_limit` is the
    time that one call of a reward function may take. `eval` may be empty.
    """

    name: str
    train: Sequence[Example]
    eval: Sequence[Example]
    reward_funcs: tuple[Callable[..., Any], ...]
    reward_weights: tuple[float, ...] | None = None
    score: Callable[[str, Example], Score] | None = None
    score_lenient: Callable[[str, Example], Score] | None = None
    prompt_template: str | None = None
    system_prompt: str | None = None
    chat: str = "auto"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    correct_at: float = 1.0
    reward_limit: Limit = Limit()


def right_answer(example: Example) -> str | None:
    """Returns the column `answer` of a problem if it is a text or a number, else None."""
    value = example.columns.get("answer")
    return str(value) if isinstance(value, str | int | float) else None


def data_checksums(task: Task) -> dict[str, str]:
    """Returns a checksum of the problems to train on and one of those to evaluate on, each in their order.

    They are `train_data` and `eval_data`, independent of where the problems come from.
    """
    return {"train_data": _checksum(task.train), "eval_data": _checksum(task.eval)}


def data_revision(checksums: Mapping[str, str]) -> str:
    """Returns one checksum for all problems of a task, from its `data_checksums`."""
    both = checksums["train_data"] + checksums["eval_data"]
    return f"sha256:{hashlib.sha256(both.encode()).hexdigest()}"


def as_json(row: Any) -> bytes:
    """Returns what a row says, for a checksum: equal for equal rows, in any process."""
    return json.dumps(row, skipkeys=True, default=_stand_in).encode()


def _checksum(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(as_json([example.prompt, example.columns]) + b"\n")
    return digest.hexdigest()


def _stand_in(value: Any) -> Any:
    """Returns what stands for a value that JSON has no kind for; of objects that say nothing, their type."""
    if isinstance(value, bytes | bytearray):
        return value.hex()
    if hasattr(value, "tolist"):  # an array
        with suppress(Exception):  # or any object of the user's
            return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    kinds = (datetime.date, datetime.time, datetime.timedelta, Decimal, Fraction, complex, UUID, PurePath)
    return str(value) if isinstance(value, kinds) else type(value).__name__
