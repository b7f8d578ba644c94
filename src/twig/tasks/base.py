"""Defines a task.

A task module has one function, `load(settings) -> Task` (or `load(settings, train_dataset, eval_dataset)` if
it reads data), and is listed in `load.py`. Knows nothing about models, data files or algorithms.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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


def data_revision(task: Task) -> str:
    """Returns a checksum of the problems in their order, independent of their source."""
    digest = hashlib.sha256()
    for examples in (task.train, task.eval):
        for example in examples:
            row = [example.prompt, example.columns]
            text = json.dumps(row, skipkeys=True, default=lambda value: type(value).__name__)
            digest.update(text.encode() + b"\n")
        digest.update(b"\n")
    return f"sha256:{digest.hexdigest()}"
