"""What a task is.

A task module holds one function, `load(settings) -> Task` (one that reads data: `load(settings,
train_dataset, eval_dataset)`), and is listed in `load.py`. Knows nothing about models, data files or
algorithms.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from twig.core.types import Example, Score
from twig.tasks.reward_calls import Limit


@dataclass(frozen=True)
class Task:
    """Problems to train on and to evaluate on, and how a completion is rewarded.

    `reward_funcs` have TRL's signature: by keyword `prompts`, `completions`, `completion_ids`, every column
    of the data as a list, and `trainer_state`, `log_extra`, `log_metric`; they return one number or None per
    completion. `reward_weights` has one weight per function (None: 1 each). `score` reads one completion's
    text; a task that cannot tell by itself has none, and then a completion is right when its weighted reward
    reaches `correct_at`. `score_lenient` reads the last number instead of the marked answer: it tells what a
    model knows from how it writes it down, and is only reported. `prompt_template` is filled with the
    example's columns, and `{question}` or `{prompt}` with its prompt where no column has that name; None
    leaves the prompt as it is. `reward_limit` is the time that one call of a reward function may take. `eval`
    may be empty.
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
    correct_at: float = 1.0
    reward_limit: Limit = Limit()


def data_revision(task: Task) -> str:
    """A checksum of the problems in their order, wherever they came from."""
    digest = hashlib.sha256()
    for examples in (task.train, task.eval):
        for example in examples:
            row = [example.prompt, example.columns]
            text = json.dumps(row, skipkeys=True, default=lambda value: type(value).__name__)
            digest.update(text.encode() + b"\n")
        digest.update(b"\n")
    return f"sha256:{digest.hexdigest()}"
