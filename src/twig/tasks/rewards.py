"""Calls reward functions the way TRL 1.16 does and turns their results into numbers.

All arguments are keywords: prompts, completions (texts, or one assistant message each if the prompt is chat
messages), completion_ids, each column of the data as a list, trainer_state, log_extra, log_metric. Each call
gets its own copies of them. Async functions run together, in the background of sampling. None leaves a
completion out of that function's share. A function that fails stops the run with one line. Knows nothing
about models or algorithms.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from numbers import Real
from typing import Any

import numpy as np

from twig.common.metrics import logged_name
from twig.common.text import plain
from twig.common.user_code import ProcessState, is_ours, message_from, repr_of
from twig.core.types import Example, Score
from twig.tasks.answers import score_answer, score_lenient
from twig.tasks.base import Task
from twig.tasks.reward_calls import Background, Late, call, start
from twig.tasks.reward_functions import RewardError, function_names, is_async, label_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rewards:
    """The rewards of N completions.

    `total` is the weighted sum, float64 [N]; NaN if every function returned None: such a completion has no
    reward, is in no average and gets no credit. `per_function` has [N] per function, NaN for None. `logged`
    has the values passed to `log_metric`. `lenient`, bool [2, N], says whether a completion has a last number
    and whether that is right; None if the task has no lenient reading. `extra` has the columns passed to
    `log_extra`, N values each, in JSON's kinds.
    """

    total: np.ndarray
    per_function: dict[str, np.ndarray]
    logged: dict[str, list[float]] = field(default_factory=dict)
    lenient: np.ndarray | None = None
    extra: dict[str, list[Any]] = field(default_factory=dict)

    def at(self, numbers: np.ndarray) -> "Rewards":
        """Returns the rewards of some completions; `logged` stays whole, as its values belong to calls."""
        return Rewards(
            self.total[numbers],
            {name: values[numbers] for name, values in self.per_function.items()},
            self.logged,
            None if self.lenient is None else self.lenient[:, numbers],
            {name: [values[n] for n in numbers] for name, values in self.extra.items()},
        )

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the step.

        `rewards/NAME/mean` and `rewards/NAME/std` (if a function returned any number), the means of the
        values passed to `log_metric` (named by `common.metrics.logged_name`), `answers/found_lenient` and
        `answers/right_lenient`.
        """
        metrics = _statistics(self.per_function)
        metrics |= {logged_name(name): sum(values) / len(values) for name, values in self.logged.items()}
        if self.lenient is not None:
            names = ("answers/found_lenient", "answers/right_lenient")
            metrics |= {name: float(row.mean()) for name, row in zip(names, self.lenient, strict=True)}
        return metrics


def joined(parts: Sequence[Rewards]) -> Rewards:
    """Joins the rewards of all parts' completions, in their order."""
    lenient = [part.lenient for part in parts if part.lenient is not None]
    columns = {name: [None] for part in parts for name in part.extra}
    extra = [
        {name: part.extra.get(name, none * len(part.total)) for name, none in columns.items()}
        for part in parts
    ]
    return Rewards(
        np.concatenate([part.total for part in parts]),
        {name: np.concatenate([part.per_function[name] for part in parts]) for name in parts[0].per_function},
        _chained([part.logged for part in parts]),
        np.concatenate(lenient, axis=1) if lenient else None,
        _chained(extra),
    )


# ---- scoring -----------------------------------------------------------------------------------------------


def score_completions(
    task: Task,
    examples: Sequence[Example],
    texts: Sequence[str],
    completion_ids: Sequence[Any],
    trainer_state: Any = None,
) -> Rewards:
    """Rewards N completions with all of the task's functions; the n-th one answers the n-th example.

    A function gets an assistant message in place of a text if the prompt is chat messages. Raises RewardError
    if a function raises, takes too long, or returns anything but N finite numbers or Nones.
    """
    return Rewarding(task, trainer_state).finish(examples, texts, completion_ids)


@dataclass(frozen=True)
class _Part:
    # Completions of a batch, by their numbers in it, and the async functions at work on them.
    numbers: np.ndarray
    log: "_Log"
    returned: dict[str, Background]


class Rewarding:
    """Rewards one batch.

    Async functions can start with the completions that are finished, while others are still being sampled;
    then they are called once for each such part.
    """

    def __init__(self, task: Task, trainer_state: Any = None) -> None:
        self.task, self.trainer_state = task, trainer_state
        self.state = ProcessState.now()
        names = function_names(task.reward_funcs)
        self.functions = dict(zip(names, task.reward_funcs, strict=True))
        self.background = {name: f for name, f in self.functions.items() if is_async(f)}
        self.parts: list[_Part] = []

    def start(
        self,
        numbers: Sequence[int],
        examples: Sequence[Example],
        texts: Sequence[str],
        completion_ids: Sequence[Any],
    ) -> None:
        """Starts the async functions for the completions that have these numbers in the batch."""
        if not self.background:
            return
        log, limit = _Log(), self.task.reward_limit
        returned = {
            name: start(
                function,
                name,
                self._arguments(examples, texts, completion_ids, log),
                limit,
                _Reader(function, name, len(texts)),
            )
            for name, function in self.background.items()
        }
        self.parts.append(_Part(np.array(numbers, np.int64), log, returned))

    def finish(
        self, examples: Sequence[Example], texts: Sequence[str], completion_ids: Sequence[Any]
    ) -> Rewards:
        """Returns the rewards of the whole batch; see `score_completions`."""
        task, count, log = self.task, len(texts), _Log()
        assert count == len(completion_ids) == len(examples) > 0, "one text, list of ids and example each"
        per_function = {}
        try:
            for name, function in self.functions.items():
                if name not in self.background:
                    arguments = self._arguments(examples, texts, completion_ids, log)
                    read = _Reader(function, name, count)
                    values = partial(call, function, name, arguments, task.reward_limit, read)
                    per_function[name] = _or_score(values, count)
            if not self.parts:
                self.start(range(count), examples, texts, completion_ids)
            assert not self.parts or sum(len(part.numbers) for part in self.parts) == count, "each once"
            for name in self.background:
                per_function[name] = np.empty(count)
                for part in self.parts:
                    values = _or_score(part.returned[name].result, len(part.numbers))
                    per_function[name][part.numbers] = values
        finally:
            for part in self.parts:
                for background in part.returned.values():
                    background.cancel()
            self.state.restore()
        per_function = {name: per_function[name] for name in self.functions}
        total = weighted_total(np.stack(list(per_function.values()), axis=1), task.reward_weights)
        _refuse_beyond(total)
        _warn_unrewarded(total, [example.prompt for example in examples], texts)
        logged = _chained([log.metrics, *(part.log.metrics for part in self.parts)])
        lenient = read_leniently(task, examples, texts)
        return Rewards(total, per_function, logged, lenient, self._extra(log, count))

    def _arguments(
        self, examples: Sequence[Example], texts: Sequence[str], completion_ids: Sequence[Any], log: "_Log"
    ) -> dict[str, Any]:
        columns = {
            name: [_copied(value, f"column {name!r}") for value in values]
            for name, values in columns_of(examples).items()
            if name not in ("prompt", "completion")
        }
        return {
            **columns,
            "prompts": [_copied(example.prompt, "the prompt") for example in examples],
            "completions": [
                _as_prompted(example.prompt, text) for example, text in zip(examples, texts, strict=True)
            ],
            "completion_ids": [[int(token) for token in ids] for ids in completion_ids],
            "trainer_state": deepcopy(self.trainer_state),
            "log_extra": log.add_extra,
            "log_metric": log.add_metric,
        }

    def _extra(self, log: "_Log", count: int) -> dict[str, list[Any]]:
        """Returns the columns passed to `log_extra`, each value at its completion."""
        extra = log.columns(count)
        for part in self.parts:
            for name, values in part.log.columns(len(part.numbers)).items():
                column = extra.setdefault(name, [None] * count)
                for number, value in zip(part.numbers.tolist(), values, strict=True):
                    column[number] = value
        return extra


@dataclass(frozen=True)
class Judged:
    """Whether N completions have an answer (bool [N]; None if the task cannot tell), and a right one."""

    answered: np.ndarray | None
    right: np.ndarray


def judge(task: Task, examples: Sequence[Example], texts: Sequence[str], totals: np.ndarray) -> Judged:
    """Tells which of N completions have an answer, and which a right one.

    If the task has no `score`, a completion is right when its total reward reaches `task.correct_at`.
    """
    if task.score is None:
        return Judged(None, np.asarray(totals) >= task.correct_at)
    scores = [task.score(text, example) for text, example in zip(texts, examples, strict=True)]
    return Judged(np.array([s.answered for s in scores], bool), np.array([s.right for s in scores], bool))


def is_graded(task: Task, totals: np.ndarray) -> bool:
    """Tells whether the rewards of completions say more than which are right, so that their mean is shown.

    They do if the task cannot tell by itself, `task.correct_at` is left at 1, and some reward is neither 1
    nor the lowest: 0, or the smallest if that is negative.
    """
    if task.score is not None or task.correct_at != 1.0:
        return False
    values = totals[~np.isnan(totals)]
    lowest = min(0.0, *values) if len(values) else 0.0
    return not all(np.isclose(value, lowest) or np.isclose(value, 1.0) for value in np.unique(values))


def read_leniently(task: Task, examples: Sequence[Example], texts: Sequence[str]) -> np.ndarray | None:
    """Tells which of N completions have a last number, and which a right one: bool [2, N].

    None if the task has no lenient reading.
    """
    if task.score_lenient is None:
        return None
    scores = [task.score_lenient(text, example) for text, example in zip(texts, examples, strict=True)]
    return np.array([[s.answered for s in scores], [s.right for s in scores]], bool)


def weighted_total(values: np.ndarray, weights: Sequence[float] | None) -> np.ndarray:
    """Returns weighted sums [N] of rewards [N, functions]; NaN counts as 0, a row of only NaN gives NaN.

    >>> weighted_total(np.array([[1.0, 0.5], [np.nan, 2.0], [np.nan, np.nan]]), [1.0, 2.0])
    array([ 2.,  4., nan])
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.nansum(values * (1.0 if weights is None else np.array(weights)), axis=1)
    return np.where(np.isnan(values).all(axis=1), np.nan, total)


def columns_of(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """Returns one value per example for each column name; None if an example lacks the column."""
    names = {name: None for example in examples for name in example.columns}
    return {name: [example.columns.get(name) for example in examples] for name in names}


# ---- the reward of tasks whose answer is a number ----------------------------------------------------------


def accuracy(completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any) -> list[float]:
    """Rewards a completion with 1 if its marked answer is the gold number, else with 0.

    >>> accuracy(["5 + 7 = 12\\n#### 12", "It is 12."], ["12", "12"])
    [1.0, 0.0]
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(score_answer(text, str(gold)).right) for text, gold in zip(texts, answer, strict=True)]


def score_number(text: str, example: Example) -> Score:
    """Scores a text for an example whose column `answer` holds the gold number."""
    return score_answer(text, str(example.columns["answer"]))


def score_last_number(text: str, example: Example) -> Score:
    """Scores a text by the lenient reading: the last number of the text."""
    return score_lenient(text, str(example.columns["answer"]))


# ---- what functions log, and statistics --------------------------------------------------------------------


class _Log:
    # Collects the values that reward functions log about some completions.
    def __init__(self) -> None:
        self.extra: dict[str, list[Any]] = {}
        self.metrics: dict[str, list[float]] = {}

    # What cannot be written raises inside the function that logs it, so that it is that function's error.
    def add_extra(self, column: Any, values: Any) -> None:
        ordered = _ordered(values)
        if ordered is None:
            raise TypeError(f"log_extra takes a list, not {repr_of(values)}")
        columns = [plain(value) for value in ordered]
        json.dumps(columns)
        self.extra.setdefault(_name(column), []).extend(columns)

    def add_metric(self, name: Any, value: Any) -> None:
        self.metrics.setdefault(_name(name), []).append(float(value))

    def columns(self, count: int) -> dict[str, list[Any]]:
        for name, values in self.extra.items():
            if len(values) != count:
                raise RewardError(
                    "log_extra",
                    f"column {name!r} got {len(values)} values for {count} completions",
                    "Log one value per completion, and each column from only one reward function",
                )
        return self.extra


def _chained(columns: Sequence[Mapping[str, list[Any]]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [value for column in columns for value in column.get(name, [])] for name in names}


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


# ---- what functions return ---------------------------------------------------------------------------------

_LARGEST = float(np.finfo(np.float32).max)  # weights of tokens are float32
_FIX = "Return one finite number or None per completion"


@dataclass(frozen=True)
class _Reader:
    # Turns what a function returned for `count` completions into numbers; runs the user's code.
    function: Callable[..., Any]
    name: str
    count: int

    def __call__(self, returned: Any) -> np.ndarray:
        values = np.empty(self.count)
        for index, value in enumerate(self._in_order(returned)):
            number = math.nan if value is None else _as_number(value)
            if number is None or value is not None and not abs(number) <= _LARGEST:
                raise self._refused(f"{repr_of(value)} for completion {index}")
            values[index] = number
        return values

    def _in_order(self, returned: Any) -> list[Any]:
        values = _ordered(returned)
        if values is None:
            raise self._refused(f"{repr_of(returned)}, not a list")
        endless = isinstance(values, Iterator)  # or so long that nobody wants to wait for its end
        first = list(islice(values, self.count + 1)) if endless else list(values)
        if len(first) != self.count:
            number = f"more than {self.count}" if endless and len(first) > self.count else len(first)
            raise self._refused(f"{number} values for {self.count} completions")
        return first

    def _refused(self, problem: str) -> RewardError:
        return RewardError(label_of(self.function, self.name), f"returned {problem}", _FIX)


def _ordered(values: Any) -> Sequence[Any] | Iterator[Any] | None:
    # A sequence, an array or tensor with a dimension, or an iterator: they have an order, a set has none.
    values = values.tolist() if hasattr(values, "tolist") else values
    is_text = isinstance(values, str | bytes | bytearray)
    return values if isinstance(values, Sequence | Iterator) and not is_text else None


def _as_number(value: Any) -> float | None:
    # Scalars of numpy and torch have `tolist`; a text is no number, even if float() could read it.
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _or_score(call: Callable[[], np.ndarray], count: int) -> np.ndarray:
    # Rewards, or the score of a call that took too long.
    try:
        return call()
    except Late as late:
        return np.full(count, late.score)


def _refuse_beyond(total: np.ndarray) -> None:
    beyond = np.flatnonzero(~np.isnan(total) & ~(np.abs(total) <= _LARGEST))
    if len(beyond):
        raise RewardError(
            "task.reward_weights",
            f"the weighted sum of the rewards of completion {beyond[0]} is {total[beyond[0]]:g}",
            "Set smaller weights, or return smaller rewards",
        )


def _copied(value: Any, what: str) -> Any:
    # Rows may hold any object: what copy.deepcopy returns is the function's own.
    try:
        return deepcopy(value)
    except BaseException as error:
        if is_ours(error):
            raise
        raise RewardError(
            what,
            f"holds {repr_of(value)}, which cannot be copied ({type(error).__name__}: {message_from(error)})",
            "Leave it out of the data, or make it something that copy.deepcopy copies",
        ) from error


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"a name is a text, not {repr_of(name)}")
    return name
