"""Reward functions called the way TRL 1.16 calls them, and what they return made into numbers.

Everything goes by keyword: prompts, completions (texts, or one assistant message each where the prompt is
chat messages), completion_ids, each column of the data as a list, trainer_state, log_extra, log_metric. Async
functions run together. None leaves a completion out of that function's share. A function that fails stops the
run with one line. Knows nothing about models or algorithms.
"""

import asyncio
import atexit
import functools
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from twig.answers import score_answer, score_lenient
from twig.records import Example, Score
from twig.tasks.base import Task
from twig.tasks.functions import RewardError, check_signature, defined_at, failure, function_names, is_async

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rewards:
    """What the reward functions made of N completions.

    `total` is the weighted sum, float64 [N]; NaN where every function returned None: such a completion has no
    reward, belongs in no average and gets no credit. `per_function` has [N] per function, NaN for None.
    `metrics` has `rewards/NAME/mean` and `rewards/NAME/std` (where a function gave any number), the means of
    what was passed to `log_metric`, and `answers/found_lenient` and `answers/right_lenient` where the task
    has a lenient reading; `extra` has the columns passed to `log_extra`, N values each.
    """

    total: np.ndarray
    per_function: dict[str, np.ndarray]
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)


# ---- scoring -----------------------------------------------------------------------------------------------


def score_completions(
    task: Task,
    examples: Sequence[Example],
    texts: Sequence[str],
    completion_ids: Sequence[Any],
    trainer_state: Any = None,
) -> Rewards:
    """The rewards of N completions, the n-th one an answer to the n-th example."""
    rewards = score(
        task,
        prompts=[example.prompt for example in examples],
        completions=list(texts),
        completion_ids=completion_ids,
        columns=columns_of(examples),
        trainer_state=trainer_state,
    )
    return replace(rewards, metrics=rewards.metrics | lenient_shares(task, examples, texts))


def score(
    task: Task,
    *,
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    trainer_state: Any = None,
) -> Rewards:
    """The rewards of N completions by all of the task's functions.

    `completions` are texts; a function sees an assistant message instead where the prompt is chat messages.
    Raises RewardError where a function raises, or returns anything but N finite numbers or Nones.
    """
    count = len(prompts)
    assert count and len(completions) == len(completion_ids) == count, (
        "one text and one list of ids per prompt"
    )
    log = _Log()
    arguments = {
        **{name: list(values) for name, values in columns.items() if name not in ("prompt", "completion")},
        "prompts": list(prompts),
        "completions": [
            _as_prompted(prompt, text) for prompt, text in zip(prompts, completions, strict=True)
        ],
        "completion_ids": [[int(token) for token in ids] for ids in completion_ids],
        "trainer_state": trainer_state,
        "log_extra": log.add_extra,
        "log_metric": log.add_metric,
    }
    names = function_names(task.reward_funcs)
    returned = _call_all(task.reward_funcs, names, arguments)
    per_function = {
        name: _values(function, name, values, count)
        for function, name, values in zip(task.reward_funcs, names, returned, strict=True)
    }
    total = weighted_total(np.stack(list(per_function.values()), axis=1), task.reward_weights)
    _warn_unrewarded(total, prompts, completions)
    return Rewards(total, per_function, {**_statistics(per_function), **log.means()}, log.columns(count))


def judge(
    task: Task, examples: Sequence[Example], texts: Sequence[str], totals: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray]:
    """Whether an answer was found in each of N completions, and whether it is right: two bool [N].

    A task that cannot tell by itself finds nothing (None), and a completion is right when its total reward
    reaches `task.correct_at`.
    """
    if task.score is None:
        return None, np.asarray(totals) >= task.correct_at
    scores = [task.score(text, example) for text, example in zip(texts, examples, strict=True)]
    return np.array([s.found for s in scores], bool), np.array([s.right for s in scores], bool)


def lenient_shares(task: Task, examples: Sequence[Example], texts: Sequence[str]) -> dict[str, float]:
    """The shares of N completions whose last number was found and is right, by metric; none without such a
    reading."""
    if task.score_lenient is None:
        return {}
    scores = [task.score_lenient(text, example) for text, example in zip(texts, examples, strict=True)]
    return {
        "answers/found_lenient": float(np.mean([s.found for s in scores])),
        "answers/right_lenient": float(np.mean([s.right for s in scores])),
    }


def weighted_total(values: np.ndarray, weights: Sequence[float] | None) -> np.ndarray:
    """Weighted sums [N] of rewards [N, functions]; a NaN counts as 0, and a row of nothing but NaN gives NaN.

    >>> weighted_total(np.array([[1.0, 0.5], [np.nan, 2.0], [np.nan, np.nan]]), [1.0, 2.0])
    array([ 2.,  4., nan])
    """
    total = np.nansum(values * (1.0 if weights is None else np.array(weights)), axis=1)
    return np.where(np.isnan(values).all(axis=1), np.nan, total)


def columns_of(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """Column name to one value per example; None where an example lacks the column."""
    names = {name: None for example in examples for name in example.columns}
    return {name: [example.columns.get(name) for example in examples] for name in names}


# ---- the reward of tasks whose answer is a number ----------------------------------------------------------


def accuracy(completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any) -> list[float]:
    """1 where a completion's marked answer is the gold number, else 0, also where none is marked.

    >>> accuracy(["5 + 7 = 12\\n#### 12", "It is 12."], ["12", "12"])
    [1.0, 0.0]
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(score_answer(text, str(gold)).right) for text, gold in zip(texts, answer, strict=True)]


def score_number(text: str, example: Example) -> Score:
    """How a text answers an example whose column `answer` holds the gold number."""
    return score_answer(text, str(example.columns["answer"]))


def score_last_number(text: str, example: Example) -> Score:
    """The same with the lenient reading: the last number of the text."""
    return score_lenient(text, str(example.columns["answer"]))


# ---- what functions log, and statistics --------------------------------------------------------------------


class _Log:
    # Receives what reward functions log during one call of `score`.
    def __init__(self) -> None:
        self.extra: dict[str, list[Any]] = {}
        self.metrics: dict[str, list[float]] = {}

    def add_extra(self, column: str, values: list[Any]) -> None:
        self.extra.setdefault(column, []).extend(values)

    def add_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))

    def means(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self.metrics.items()}

    def columns(self, count: int) -> dict[str, list[Any]]:
        for name, values in self.extra.items():
            if len(values) != count:
                raise RewardError(
                    f"log_extra: column {name!r} got {len(values)} values for {count} completions; "
                    "log one value per completion, and each column from one reward function"
                )
        return self.extra


def _as_prompted(prompt: Any, text: str) -> Any:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _statistics(per_function: Mapping[str, np.ndarray]) -> dict[str, float]:
    metrics = {}
    for name, values in per_function.items():
        given = values[~np.isnan(values)]
        if len(given):
            metrics[f"rewards/{name}/mean"] = float(given.mean())
            metrics[f"rewards/{name}/std"] = float(given.std(ddof=1)) if len(given) > 1 else 0.0
    return metrics


def _warn_unrewarded(total: np.ndarray, prompts: Sequence[Any], completions: Sequence[str]) -> None:
    missing = np.flatnonzero(np.isnan(total))
    if len(missing):
        first = int(missing[0])
        logger.warning(
            "%d of %d completions got None from every reward function and are left out; the first: "
            "prompt %.200r, completion %.200r",
            *(len(missing), len(total), prompts[first], completions[first]),
        )


# ---- calling -----------------------------------------------------------------------------------------------


def _call_all(
    functions: Sequence[Callable[..., Any]], names: Sequence[str], arguments: dict[str, Any]
) -> list[Any]:
    # What each function returned. Those that are async start when the others are done, all at once.
    for function, name in zip(functions, names, strict=True):
        check_signature(function, name, arguments)
    results: dict[int, Any] = {}
    later = []
    for index, (function, name) in enumerate(zip(functions, names, strict=True)):
        if is_async(function):
            later.append((index, function, name))
            continue
        try:
            results[index] = function(**arguments)
        except Exception as error:
            raise failure(function, name, error) from error
    if later:
        results.update(_await_all(later, arguments))
    return [results[index] for index in range(len(functions))]


def _await_all(
    functions: list[tuple[int, Callable[..., Any], str]], arguments: dict[str, Any]
) -> dict[int, Any]:
    async def call(index: int, function: Callable[..., Any], name: str) -> tuple[int, Any]:
        try:
            return index, await function(**arguments)
        except Exception as error:
            raise failure(function, name, error) from error

    async def gather() -> list[tuple[int, Any]]:
        return await asyncio.gather(*(call(*item) for item in functions))

    future = asyncio.run_coroutine_threadsafe(gather(), _event_loop())
    try:
        return dict(future.result())
    finally:
        future.cancel()


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    # One loop for the whole process, on its own thread: clients that users keep between calls are bound to
    # the loop they were first used on, and a notebook already runs one on the main thread.
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="twig-async-rewards", daemon=True)
    thread.start()

    def close() -> None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=5)
        if not loop.is_running():
            loop.close()

    atexit.register(close)
    return loop


def _values(function: Callable[..., Any], name: str, returned: Any, count: int) -> np.ndarray:
    where = f"reward function {name!r} ({defined_at(function)})"
    instead = "return one number or None per completion"
    if isinstance(returned, (str, bytes, Mapping)) or not _is_iterable(returned):
        raise RewardError(f"{where} returned {_show(returned)}, not a list; {instead}")
    returned = list(returned)
    if len(returned) != count:
        raise RewardError(f"{where} returned {len(returned)} values for {count} completions; {instead}")
    values = np.empty(count)
    for index, value in enumerate(returned):
        number = math.nan if value is None else _as_number(value)
        if number is None or value is not None and not math.isfinite(number):
            raise RewardError(
                f"{where} returned {_show(value)} for completion {index}; {instead}, no NaN or infinity"
            )
        values[index] = number
    return values


def _as_number(value: Any) -> float | None:
    # numpy and torch make scalars of themselves here; text does not count, even where float() would read it.
    value = value.tolist() if hasattr(value, "tolist") else value
    return float(value) if isinstance(value, (bool, int, float)) else None


def _is_iterable(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:  # also a tensor of no dimension
        return False
    return True


def _show(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
