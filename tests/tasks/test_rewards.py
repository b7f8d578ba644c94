"""Reward functions: called as TRL calls them, their values, what they log, and one line for each fault."""

import asyncio
import functools
import logging
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twig.common.errors import UserError
from twig.config.load import Settings
from twig.core.types import Completion, Example, Score
from twig.evaluation.evaluate import _judged, _summarise
from twig.tasks.base import Task
from twig.tasks.load import load_task
from twig.tasks.reward_calls import Limit
from twig.tasks.reward_functions import RewardError, function_names
from twig.tasks.rewards import (
    Rewarding,
    Rewards,
    accuracy,
    judge,
    score_completions,
    score_last_number,
    score_number,
)

TEXTS = ["a", "bb", "ccc"]
NO_LIMIT = Limit()


def run(
    *functions: Any,
    weights: tuple[float, ...] | None = None,
    prompt: Any = "p",
    limit: Limit = NO_LIMIT,
    **columns: Any,
) -> Rewards:
    """The rewards of TEXTS, each an answer to the same prompt."""
    task = Task("test", (), (), functions, reward_weights=weights, reward_limit=limit)
    examples = [
        Example(prompt, {name: values[n] for name, values in columns.items()}) for n in range(len(TEXTS))
    ]
    return score_completions(
        task, examples, TEXTS, [np.array([n]) for n in range(len(TEXTS))], trainer_state="state"
    )


def length(completions: Any, **kwargs: Any) -> list[float]:
    return [float(len(c)) for c in completions]


# ---- what a function is given ------------------------------------------------------------------------------


def test_everything_goes_by_keyword() -> None:
    seen: dict[str, Any] = {}

    def spy(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [0.0] * 3

    run(spy, answer=["1", "2", "3"], prompt="p")
    assert set(seen) == {
        *("prompts", "completions", "completion_ids", "answer", "trainer_state", "log_extra", "log_metric")
    }
    assert seen["prompts"] == ["p", "p", "p"]
    assert seen["completions"] == TEXTS
    assert seen["completion_ids"] == [[0], [1], [2]]
    assert type(seen["completion_ids"][0][0]) is int
    assert seen["answer"] == ["1", "2", "3"]
    assert seen["trainer_state"] == "state"


def test_chat_prompts_get_chat_completions() -> None:
    def contents(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        assert prompts[0] == [{"role": "user", "content": "p"}]
        assert completions[1] == [{"role": "assistant", "content": "bb"}]
        return [float(len(completion[0]["content"])) for completion in completions]

    assert run(contents, prompt=[{"role": "user", "content": "p"}]).total.tolist() == [1, 2, 3]


def test_the_prompt_and_completion_columns_are_not_passed() -> None:
    def only(prompts: Any, completions: Any, completion_ids: Any, answer: Any, **kwargs: Any) -> list[float]:
        assert "prompt" not in kwargs and "completion" not in kwargs
        return [1.0] * 3

    columns = {"prompt": ["x"] * 3, "completion": ["y"] * 3, "answer": ["z"] * 3}
    task = Task("test", (), (), (only,))
    examples = [Example("p", {name: values[n] for name, values in columns.items()}) for n in range(3)]
    assert score_completions(task, examples, TEXTS, [[1]] * 3).total.tolist() == [1, 1, 1]


def test_functions_of_trl_run_unchanged() -> None:
    rewards = pytest.importorskip("trl.rewards")
    thinking = [{"role": "user", "content": "p"}]
    result = run(rewards.think_format_reward, prompt=thinking)
    assert list(result.per_function) == ["think_format_reward"]
    assert result.total.tolist() == [0, 0, 0]
    overlong = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    assert run(overlong, prompt=thinking).total.tolist() == [0, 0, 0]


# ---- values, weights, None ---------------------------------------------------------------------------------


def test_weighted_sum_of_several_functions() -> None:
    def last(completions: Any, **kwargs: Any) -> list[float | None]:
        return [None, 1, np.float32(0.5)]

    result = run(length, last, weights=(1.0, 10.0))
    assert result.total.dtype == np.float64
    assert result.total.tolist() == [1, 12, 8]  # 1; 2 + 10 * 1; 3 + 10 * 0.5
    np.testing.assert_array_equal(result.per_function["last"], [np.nan, 1, 0.5])
    # mean and sample standard deviation over the two values given: 0.75, |1 - 0.5| / sqrt(2)
    assert result.metrics["rewards/last/mean"] == 0.75
    assert result.metrics["rewards/last/std"] == pytest.approx(0.5 / 2**0.5)
    assert result.metrics["rewards/length/mean"] == 2


def test_a_completion_without_any_reward_is_nan_and_named(caplog: pytest.LogCaptureFixture) -> None:
    result = run(lambda completions, **kwargs: [1.0, None, 0.0])
    np.testing.assert_array_equal(result.total, [1, np.nan, 0])
    assert len(caplog.records) == 1
    assert "1 of 3 completions" in caplog.text and "'bb'" in caplog.text
    nothing = run(lambda completions, **kwargs: [None] * 3)
    assert np.isnan(nothing.total).all() and nothing.metrics == {}


def test_arrays_tensors_and_booleans_are_numbers() -> None:
    import torch

    assert run(lambda completions, **kwargs: np.array([1, 2, 3])).total.tolist() == [1, 2, 3]
    assert run(lambda completions, **kwargs: torch.tensor([1.0, 2.0, 3.0])).total.tolist() == [1, 2, 3]
    assert run(lambda completions, **kwargs: (True, False, True)).total.tolist() == [1, 0, 1]
    assert run(lambda completions, **kwargs: (x for x in (1, 2, 3))).total.tolist() == [1, 2, 3]


def test_names_as_in_metrics() -> None:
    class Judge:
        def __call__(self, **kwargs: Any) -> list[float]:
            return [0.0]

    assert function_names([length, functools.partial(length), Judge(), length]) == [
        *("length", "length_2", "Judge", "length_3")
    ]


# ---- async -------------------------------------------------------------------------------------------------


def test_async_functions_run_together_after_the_others() -> None:
    order: list[str] = []
    meeting: dict[str, Any] = {}

    async def first(completions: Any, **kwargs: Any) -> list[float]:
        meeting["event"] = asyncio.Event()
        order.append("first waits")
        await asyncio.wait_for(
            meeting["event"].wait(), 30
        )  # set by the second: in sequence this would time out
        return [1.0] * 3

    class Second:
        async def __call__(self, completions: Any, **kwargs: Any) -> list[float | None]:
            order.append("second")
            meeting["event"].set()
            return [None, 1.0, 2.0]

    def plain(completions: Any, **kwargs: Any) -> list[float]:
        order.append("plain")
        return [10.0] * 3

    result = run(first, Second(), plain)
    assert order == ["plain", "first waits", "second"]
    assert result.total.tolist() == [11, 12, 13]
    assert list(result.per_function) == ["first", "Second", "plain"]


def test_async_functions_keep_one_loop_and_work_inside_a_running_one() -> None:
    loops = []

    async def reward(completions: Any, **kwargs: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [1.0] * 3

    async def notebook() -> None:
        run(reward)

    run(reward)
    asyncio.run(notebook())
    assert loops[0] is loops[1]


def test_async_functions_begin_with_what_is_there_and_are_called_once_a_part() -> None:
    calls: list[list[str]] = []
    begun = threading.Event()

    async def slow(
        completions: Any, note: Any, log_extra: Any, log_metric: Any, **kwargs: Any
    ) -> list[float]:
        calls.append(list(completions))
        begun.set()
        log_extra("seen", [f"{text}:{value}" for text, value in zip(completions, note, strict=True)])
        log_metric("calls", len(calls))
        return [float(len(text)) for text in completions]

    examples = [Example("p", {"note": n}) for n in range(4)]
    texts, ids = ["a", "bb", "ccc", "dddd"], [[n] for n in range(4)]
    rewarding = Rewarding(Task("test", (), (), (slow, length)))
    for part in ([3, 1], [0, 2]):
        rewarding.start(part, *([values[n] for n in part] for values in (examples, texts, ids)))
        assert begun.wait(30), "it is at work before the batch is complete"
        begun.clear()
    result = rewarding.finish(examples, texts, ids)
    assert calls == [["dddd", "bb"], ["a", "ccc"]]
    assert result.per_function["slow"].tolist() == [1, 2, 3, 4] and result.total.tolist() == [2, 4, 6, 8]
    assert list(result.per_function) == ["slow", "length"]
    assert result.extra == {"seen": ["a:0", "bb:1", "ccc:2", "dddd:3"]}
    assert result.metrics["calls"] == 1.5


# ---- time limits -------------------------------------------------------------------------------------------


def hangs(completions: Any, **kwargs: Any) -> list[float]:
    time.sleep(20)
    return [1.0] * 3


async def hangs_async(completions: Any, **kwargs: Any) -> list[float]:
    await asyncio.sleep(20)
    return [1.0] * 3


def times_out_itself(completions: Any, **kwargs: Any) -> list[float]:
    raise TimeoutError("of its own")


async def times_out_itself_async(completions: Any, **kwargs: Any) -> list[float]:
    raise TimeoutError("of its own")


@pytest.mark.parametrize("function", [hangs, hangs_async])
def test_a_call_that_takes_too_long_stops_the_run_or_gets_the_chosen_score(function: Any) -> None:
    began = time.perf_counter()
    with pytest.raises(RewardError) as caught:
        run(function, limit=Limit(0.05))
    line = function.__code__.co_firstlineno
    assert caught.value.key == f"reward function {function.__name__!r} ({__file__}:{line})"
    assert "task.reward_timeout=0.05" in caught.value.problem
    assert "task.reward_on_timeout=0.0" in caught.value.fix
    assert run(function, length, limit=Limit(0.05, -1.0)).total.tolist() == [0, 1, 2]
    assert time.perf_counter() - began < 10, "nobody waits for it"


@pytest.mark.parametrize("function", [times_out_itself, times_out_itself_async])
def test_a_timeout_of_the_function_s_own_is_its_error(function: Any) -> None:
    with pytest.raises(RewardError, match=f"{function.__name__}': raised TimeoutError at .*: of its own"):
        run(function, limit=Limit(30, 0.0))


@pytest.mark.parametrize("limit", [Limit(), Limit(30)])
def test_in_time_a_limit_changes_nothing(limit: Limit) -> None:
    assert run(length, limit=limit).total.tolist() == [1, 2, 3]
    with pytest.raises(RewardError, match="'raises': raised ZeroDivisionError"):
        run(raises, limit=limit)


# ---- logging -----------------------------------------------------------------------------------------------


def test_log_extra_and_log_metric() -> None:
    def reward(completions: Any, log_extra: Any, log_metric: Any, **kwargs: Any) -> list[float]:
        log_extra("upper", [c.upper() for c in completions])
        log_metric("share", 0.25)
        log_metric("share", 0.75)
        return [0.0] * 3

    result = run(reward)
    assert result.extra == {"upper": ["A", "BB", "CCC"]}
    assert result.metrics["share"] == 0.5
    assert run(length).extra == {}


def test_a_logged_column_has_one_value_per_completion() -> None:
    def reward(completions: Any, log_extra: Any, **kwargs: Any) -> list[float]:
        log_extra("note", ["only one"])
        return [0.0] * 3

    with pytest.raises(RewardError, match=r"^log_extra: column 'note' got 1 values for 3"):
        run(reward)


# ---- faults ------------------------------------------------------------------------------------------------


def _deep(completions: Any) -> list[float]:
    return [1 / (len(c) - 1) for c in completions]


def raises(completions: Any, **kwargs: Any) -> list[float]:
    return _deep(completions)


async def raises_later(completions: Any, **kwargs: Any) -> list[float]:
    await asyncio.sleep(0)
    raise KeyError("two\nlines")


def test_an_exception_becomes_one_line_with_the_place() -> None:
    line = _deep.__code__.co_firstlineno + 1
    with pytest.raises(RewardError) as caught:
        run(raises)
    assert caught.value.key == "reward function 'raises'"
    assert f" {__file__}:{line}: division by zero" in caught.value.problem
    assert "Traceback" in caught.value.traceback_text and "_deep" in caught.value.traceback_text
    assert isinstance(caught.value, UserError)


def test_an_exception_in_an_async_function_too() -> None:
    with pytest.raises(RewardError) as caught:
        run(length, raises_later)
    assert "\n" not in str(caught.value)
    assert "'raises_later': raised KeyError at " in str(caught.value) and "'two\\nlines'" in str(caught.value)
    assert "raises_later" in caught.value.traceback_text


def test_an_exception_inside_a_library_names_the_users_line() -> None:
    def reward(completions: Any, **kwargs: Any) -> list[float]:
        return np.array(["x"]).astype(float).tolist()

    place = f"{reward.__code__.co_filename}:{reward.__code__.co_firstlineno + 1}"
    with pytest.raises(RewardError, match=f"ValueError at {place}:"):
        run(reward)


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        ([1.0, 2.0], "returned 2 values for 3 completions"),
        ([1.0] * 4, "returned 4 values for 3 completions"),
        (None, "returned None, not a list"),
        (1.0, "returned 1.0, not a list"),
        ("abc", "returned 'abc', not a list"),
        ({"a": 1, "b": 2, "c": 3}, "not a list"),
        ([1.0, "0.5", 1.0], "returned '0.5' for completion 1"),
        ([1.0, [0.5], 1.0], r"returned \[0.5\] for completion 1"),
        ([1.0, 1.0, float("nan")], "returned nan for completion 2"),
        ([float("-inf"), 1.0, 1.0], "returned -inf for completion 0"),
        ([np.array([1.0, 2.0])] * 3, "returned array"),
    ],
)
def test_wrong_values_are_refused(returned: Any, problem: str) -> None:
    def reward(completions: Any, **kwargs: Any) -> Any:
        return returned

    with pytest.raises(RewardError, match=problem) as caught:
        run(reward)
    message = str(caught.value)
    assert f"'reward' ({__file__}:{reward.__code__.co_firstlineno})" in message
    assert caught.value.fix and "\n" not in message


def test_a_function_that_cannot_take_the_arguments_is_told_how() -> None:
    with pytest.raises(RewardError, match=r"cannot be called: .*prompts.*\*\*kwargs"):
        run(lambda completions: [0.0] * 3)
    with pytest.raises(RewardError, match=r"missing a required argument: 'answer'.*among .*gold"):
        run(lambda completions, answer, **kwargs: [0.0] * 3, gold=["1"] * 3)


# ---- reward files ------------------------------------------------------------------------------------------

FILE = """
from dataclasses import dataclass

import beside

LIMIT = 2

@dataclass
class Box:
    value: float

def exact(completions, **kwargs):
    return [Box(beside.VALUE).value for _ in completions]

async def short(completions, **kwargs):
    return [float(len(c) <= LIMIT) for c in completions]
"""


PROMPTS = [{"prompt": "p"}]


def settings_with(reward_file: str) -> Settings:
    task = {"name": "custom", "reward_file": reward_file}
    return Settings.from_dict({"model": {"name": "tiny-arithmetic"}, "task": task})


def test_reward_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 5.0\n")
    file = tmp_path / "rewards.py"
    file.write_text(FILE)
    with caplog.at_level(logging.INFO):
        functions = load_task(settings_with(f"{file}:exact, short"), PROMPTS).reward_funcs
    assert str(file) in caplog.text
    assert run(*functions).total.tolist() == [6, 6, 5]


@pytest.mark.parametrize(
    ("text", "name", "problem"),
    [
        (None, "exact", "^task.reward_file: .*FILE.py:"),
        ("def exact(**k): pass\n", "exat", "^task.reward_file: .*'exat'.* exact"),
        ("exact = 3\n", "exact", "^task.reward_file: .*'exact'"),
        ("x = 1\nraise OSError('no')\n", "exact", "wrong.py:2: OSError: no"),
        ("x = 1\n\ndef f(:\n", "exact", "wrong.py:3: SyntaxError"),
        ("import nowhere_to_be_found\n", "exact", "wrong.py:1: ModuleNotFoundError"),
    ],
)
def test_a_faulty_reward_file_is_one_line(tmp_path: Path, text: str | None, name: str, problem: str) -> None:
    file = tmp_path / "wrong.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=problem) as caught:
        load_task(settings_with(f"{file}:{name}"), PROMPTS)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


# ---- the reward of number tasks, right and found -----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answered", "right"),
    [
        ("#### 1200", True, True),
        ("The answer is 1,200.", True, True),
        ("#### 1200.0", True, True),
        ("#### -1200", True, False),
        ("#### 1201", True, False),
        ("", False, False),
        ("####", False, False),
        ("<answer></answer>", False, False),
        ("The answer is 1200 or 1300.", False, False),
        ("#### 1200 1300", False, False),
        ("The answer is not 1200.", False, False),
        ("They sold 1200.", False, False),
    ],
)
def test_accuracy(text: str, answered: bool, right: bool) -> None:
    example = Example("How many?", {"answer": "1200"})
    assert score_number(text, example) == Score(answered, right)
    assert accuracy([text], ["1200"]) == [float(right)]
    assert accuracy([[{"role": "assistant", "content": text}]], ["1200"]) == [float(right)]


def test_judge_by_the_task_or_by_the_reward() -> None:
    examples = [Example("p", {"answer": "1"})] * 3
    texts = ["#### 1", "#### 2", "one"]
    totals = np.array([0.2, 0.5, np.nan])
    judged = judge(Task("test", (), (), (), score=score_number), examples, texts, totals)
    assert judged.answered is not None and judged.answered.tolist() == [True, True, False]
    assert judged.right.tolist() == [True, False, False]
    judged = judge(Task("test", (), (), (), correct_at=0.5), examples, texts, totals)
    assert judged.answered is None
    assert judged.right.tolist() == [False, True, False]


def test_both_readings_are_reported() -> None:
    """Of four answers to 12, one is marked, three end with it or another number, one has none."""
    texts = ["#### 12", "It is 12.", "12, or 13", "twelve"]
    examples = [Example("p", {"answer": "12"})] * 4
    task = Task("test", (), (), (accuracy,), score=score_number, score_lenient=score_last_number)
    rewards = score_completions(task, examples, texts, [np.array([1])] * 4)
    assert rewards.total.tolist() == [1, 0, 0, 0], "only the strict reading is rewarded"
    assert rewards.metrics["answers/found_lenient"] == 0.75
    assert rewards.metrics["answers/right_lenient"] == 0.5
    made = [Completion(np.array([1]), np.zeros(1), np.zeros(1), True, text) for text in texts]
    result = _summarise(task, examples, [_judged(task, examples, made)])
    assert (result.value, result.found, result.right_lenient) == (0.25, 0.25, 0.5)


def test_a_task_without_a_lenient_reading_reports_none() -> None:
    task = Task("test", (), (), (accuracy,), score=score_number)
    rewards = score_completions(task, [Example("p", {"answer": "12"})], ["#### 12"], [np.array([1])])
    assert not [name for name in rewards.metrics if name.startswith("answers/")]
    made = [Completion(np.array([1]), np.zeros(1), np.zeros(1), True, "#### 12")]
    examples = [Example("p", {"answer": "12"})]
    assert _summarise(task, examples, [_judged(task, examples, made)]).right_lenient is None
