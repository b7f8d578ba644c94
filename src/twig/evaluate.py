"""Accuracy on problems that are not trained on, with a confidence interval.

Greedy answers, one per problem. Knows nothing of training.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from twig.policy import Policy
from twig.progress import Progress
from twig.records import Completion, Example
from twig.rollout import Request, sample
from twig.tasks.base import Task, encode_prompt
from twig.tasks.rewards import judge, score_completions

_Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on `n` problems: `value` in [0, 1] with its 95 % Wilson interval `low` .. `high`.

    `found` is the share in which an answer was found at all (None where the task cannot tell),
    `right_lenient` the accuracy if the last number of each text were its answer (None where that means
    nothing), `reward` the mean of the rewards that were given (None where none was), `mean_length` in tokens,
    `truncated` the share cut off by the length limit.
    """

    value: float
    low: float
    high: float
    n: int
    found: float | None
    right_lenient: float | None
    reward: float | None
    mean_length: float
    truncated: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of `right` successes in `n` trials.

    >>> [round(x, 4) for x in wilson(8, 10)]
    [0.4902, 0.9433]
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return (0.0 if right == 0 else centre - half), (1.0 if right == n else centre + half)


def evaluate_policy(
    policy: Policy,
    tokenizer: Any,
    task: Task,
    task_settings: Any,
    *,
    end_ids: Sequence[int],
    max_completion_length: int,
    limit: int | None = None,
    batch_size: int | None = None,
    stop: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[Evaluation, list[Completion]]:
    """The greedy accuracy on the first `limit` evaluation problems (there is at least one), and the
    completions behind it."""
    assert task.eval, "there is something to evaluate on"
    examples: list[Example] = list(task.eval[: limit or len(task.eval)])
    progress = progress or Progress()
    progress.phase("evaluating", len(examples))
    prompts = [encode_prompt(task, example, tokenizer, task_settings) for example in examples]
    order = np.argsort([len(p) for p in prompts], kind="stable")  # like lengths together: less padding
    size = batch_size or 128
    completions: list[Completion | None] = [None] * len(examples)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        requests = [Request(prompts[i], 1, max_completion_length, int(i)) for i in chosen]
        drawn = sample(
            policy,
            requests,
            end_ids=end_ids,
            decode=lambda ids: tokenizer.batch_decode(ids, skip_special_tokens=True),
            wave_size=size,
            greedy=True,
            record=False,
            stop=stop,
        )
        for i, (completion,) in zip(chosen, drawn.completions, strict=True):
            completions[i] = completion
        progress.advance(len(chosen))
    return _summarise(task, examples, completions), completions


def _summarise(task: Task, examples: list[Example], completions: list[Completion]) -> Evaluation:
    texts = [c.text for c in completions]
    rewards = score_completions(task, examples, texts, [c.ids for c in completions])
    totals = rewards.total
    found, right = judge(task, examples, texts, totals)
    low, high = wilson(int(right.sum()), len(right))
    given = totals[~np.isnan(totals)]
    return Evaluation(
        value=float(right.mean()),
        low=low,
        high=high,
        n=len(right),
        found=None if found is None else float(found.mean()),
        right_lenient=rewards.metrics.get("answers/right_lenient"),
        reward=float(given.mean()) if len(given) else None,
        mean_length=float(np.mean([len(c) for c in completions])),
        truncated=float(np.mean([not c.finished for c in completions])),
    )
