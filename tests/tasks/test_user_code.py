"""Reward functions are other people's code: what they get, raise, return, log and leave behind."""

import asyncio
import os
import re
import signal
import threading
import time
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twig.common.errors import UserError
from twig.common.metrics import is_own, logged_name
from twig.common.python_files import FileError, load_names
from twig.common.user_code import ProcessState
from twig.config.load import Settings
from twig.core.types import Example
from twig.tasks import reward_calls
from twig.tasks.base import Task
from twig.tasks.load import load_task
from twig.tasks.reward_calls import Limit
from twig.tasks.reward_functions import RewardError
from twig.tasks.rewards import Rewarding, Rewards, score_completions

TEXTS = ["a", "bb", "ccc"]
NO_LIMIT = Limit()
needs_signals = pytest.mark.skipif(os.name == "nt", reason="Windows sends a thread no signals")


def reward(*functions: Any, limit: Limit = NO_LIMIT, example: Example | None = None) -> Rewards:
    """The rewards of TEXTS, all answers to one example."""
    examples = [example or Example("p")] * len(TEXTS)
    task = Task("test", (), (), functions, reward_limit=limit)
    return score_completions(task, examples, TEXTS, [[1, 2]] * len(TEXTS), trainer_state={"step": 1})


def returning(values: Any) -> Any:
    def function(completions: Any, **kwargs: Any) -> Any:
        return values() if callable(values) else values

    return function


def ones(**kwargs: Any) -> list[float]:
    return [1.0] * len(TEXTS)


# ---- what a function is given ------------------------------------------------------------------------------


def pops(completions: Any, tests: Any, **kwargs: Any) -> list[float]:
    return [float(bool(t) and t.pop() in c) for c, t in zip(completions, tests, strict=True)]


def test_each_completion_has_its_own_copy_of_a_column() -> None:
    example = Example("p", {"tests": ["c", "b", "a"]})
    # each list still has its last entry when its completion is scored, whatever was popped from the others
    assert reward(pops, example=example).total.tolist() == [1, 0, 0]
    assert reward(pops, pops, example=example).total.tolist() == [2, 0, 0]
    assert example.columns == {"tests": ["c", "b", "a"]}


def destroys(**kwargs: Any) -> list[float]:
    """Changes everything it gets, in place."""
    for rows in kwargs.values():
        if isinstance(rows, list):
            for row in rows:
                if isinstance(row, list):
                    for part in row:
                        if isinstance(part, dict):
                            part.clear()
                    row.clear()
                elif isinstance(row, dict):
                    row.clear()
            rows.clear()
    kwargs["trainer_state"].clear()
    return [0.0] * len(TEXTS)


async def destroys_later(**kwargs: Any) -> list[float]:
    return destroys(**kwargs)


@pytest.mark.parametrize("first", [destroys, destroys_later])
def test_what_a_function_changes_is_seen_nowhere(first: Any) -> None:
    seen: list[dict[str, Any]] = []

    def looks(**kwargs: Any) -> list[float]:
        seen.append(kwargs)
        return [1.0] * len(TEXTS)

    async def looks_later(**kwargs: Any) -> list[float]:
        return looks(**kwargs)

    prompt = [{"role": "user", "content": "p"}]
    example = Example(prompt, {"list": [1, [2]], "dict": {"a": [1]}})
    state = {"step": 1}
    rewarding = Rewarding(Task("test", (), (), (first, looks, first, looks_later)), state)
    rewarding.finish([example] * 3, TEXTS, [[1, 2]] * 3)
    for kwargs in seen:
        assert kwargs["prompts"] == [prompt] * 3
        assert [each[0]["content"] for each in kwargs["completions"]] == TEXTS
        assert kwargs["completion_ids"] == [[1, 2]] * 3
        assert kwargs["list"] == [[1, [2]]] * 3 and kwargs["dict"] == [{"a": [1]}] * 3
        assert kwargs["trainer_state"] == {"step": 1}
    assert len(seen) == 2
    assert prompt == [{"role": "user", "content": "p"}] and state == {"step": 1}
    assert example.columns == {"list": [1, [2]], "dict": {"a": [1]}}


def test_what_cannot_be_copied_is_refused_by_its_column() -> None:
    with pytest.raises(RewardError, match="^column 'held': holds .*lock.* cannot be copied"):
        reward(ones, example=Example("p", {"held": threading.Lock()}))


# ---- time limits -------------------------------------------------------------------------------------------


@needs_signals
def test_a_limit_leaves_the_function_its_thread_and_its_alarm() -> None:
    def limited(completions: Any, **kwargs: Any) -> list[float]:
        """A limit of the function's own, as math-verify has it."""
        assert threading.current_thread() is threading.main_thread()

        def raise_timeout(number: int, frame: Any) -> None:
            raise TimeoutError

        before = signal.signal(signal.SIGALRM, raise_timeout)
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        try:
            time.sleep(20)
        except TimeoutError:
            return [7.0] * len(completions)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        return [0.0] * len(completions)

    assert reward(limited, limit=Limit(30)).total.tolist() == [7, 7, 7]


def sleeps(**kwargs: Any) -> list[float]:
    time.sleep(20)
    return ones()


def computes(**kwargs: Any) -> list[float]:
    while True:
        pass


def searches(**kwargs: Any) -> list[float]:
    """A search for a regular expression that ends after the sun: C code that holds Python's lock."""
    re.match("(a+)+$", "a" * 100 + "b")
    return ones()


def yields(**kwargs: Any) -> Any:
    yield 1.0
    time.sleep(20)


@needs_signals
@pytest.mark.parametrize("function", [sleeps, computes, searches, yields])
def test_whatever_takes_too_long_is_interrupted(function: Any) -> None:
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    began = time.perf_counter()
    with pytest.raises(RewardError, match=r"task\.reward_timeout=0\.05"):
        reward(function, limit=Limit(0.05))
    assert reward(function, limit=Limit(0.05, -1.0)).total.tolist() == [-1, -1, -1]
    assert time.perf_counter() - began < 15, "nobody waits for it"
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0


@needs_signals
def test_a_limit_takes_another_signal_if_its_first_is_in_use() -> None:
    def handler(number: int, frame: Any) -> None:
        raise AssertionError("this is somebody else's")

    before = signal.signal(signal.SIGVTALRM, handler)
    try:
        with pytest.raises(RewardError, match=r"task\.reward_timeout"):
            reward(sleeps, limit=Limit(0.05))
        assert signal.getsignal(signal.SIGVTALRM) is handler
    finally:
        signal.signal(signal.SIGVTALRM, before)


def test_outside_the_main_thread_a_function_that_runs_python_is_interrupted_too() -> None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            reward(computes, limit=Limit(0.05))
        except RewardError as error:
            caught.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert len(caught) == 1 and "task.reward_timeout=0.05" in str(caught[0])


def test_a_call_that_does_not_return_ends_the_process_after_the_run_was_saved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = threading.Event()
    order: list[Any] = []

    def swallows(**kwargs: Any) -> list[float]:
        while True:
            try:
                while not ended.is_set():
                    time.sleep(0.01)
                return ones()
            except BaseException:
                order.append("swallowed")

    def save(error: RewardError) -> BaseException:
        order.append("saved")
        assert "swallows" in error.traceback_text
        return error

    def end(status: int) -> None:
        order.append(status)
        ended.set()

    monkeypatch.setattr(reward_calls, "end_process", end)
    with pytest.raises(RewardError, match=r"task\.reward_timeout"):
        reward(swallows, limit=Limit(0.3, further=0.1, save=save))
    assert order == ["swallowed", "saved", 2]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("twig: ") and "'swallows'" in said


def test_an_async_function_that_does_not_return_ends_the_run_saved() -> None:
    saved = []

    async def swallows(**kwargs: Any) -> list[float]:
        for _ in range(100):
            try:
                await asyncio.sleep(0.02)
            except BaseException:
                pass
        return ones()

    def save(error: RewardError) -> BaseException:
        saved.append(error)
        return error

    with pytest.raises(RewardError, match="has not returned"):
        reward(swallows, limit=Limit(0.03, 0.0, further=0.05, save=save))
    assert len(saved) == 1


# ---- what a function raises --------------------------------------------------------------------------------


class Own(BaseException):
    """What `except Exception` does not catch."""


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise Own

    __repr__ = __str__


RAISED = [SystemExit(0), Own("x"), GeneratorExit(), asyncio.CancelledError(), Unspeakable(), StopIteration()]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("limit", [NO_LIMIT, Limit(30)], ids=["", "limit"])
def test_whatever_a_function_raises_is_one_line(error: BaseException, limit: Limit) -> None:
    def raises(**kwargs: Any) -> list[float]:
        raise error

    async def raises_later(**kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        raise error

    for function in (raises, raises_later):
        with pytest.raises(RewardError, match=f"'{function.__name__}'") as caught:
            reward(function, limit=limit)
        assert "\n" not in str(caught.value) and caught.value.traceback_text
    assert reward(ones).total.tolist() == [1, 1, 1], "the next call is as good as any"


def test_the_person_at_the_keyboard_is_still_heard() -> None:
    def interrupted(**kwargs: Any) -> list[float]:
        raise KeyboardInterrupt

    for limit in (NO_LIMIT, Limit(30)):
        with pytest.raises(KeyboardInterrupt):
            reward(interrupted, limit=limit)


# ---- what a function returns -------------------------------------------------------------------------------


class Hostile:
    def __getattr__(self, name: str) -> Any:
        raise Own(name)

    def __repr__(self) -> str:
        raise Own

    __str__ = __repr__


class Wrong(float):
    def __float__(self) -> float:
        raise Own


class Array:
    def tolist(self) -> Any:
        raise Own


def breaks_off() -> Any:
    yield 1.0
    raise Own


REFUSED = {
    "a set": {1.0, 2.0, 3.0},
    "a frozen set": frozenset((1.0, 2.0, 3.0)),
    "values of a dict": {1: 1.0, 2: 2.0, 3: 3.0}.values(),
    "bytes": b"abc",
    "too large for a float": [10**400, 0.0, 0.0],
    "too large for float32": [1e308, -1e308, 0.0],
    "complex": [1j, 0.0, 0.0],
    "a text": ["1", "2", "3"],
    "rows": np.zeros((3, 1)),
    "a scalar": np.float64(1.0),
    "a generator that breaks off": breaks_off,
    "endless": lambda: iter(int, 1),
    "objects": [Hostile()] * 3,
    "an object": Hostile(),
    "no float": [Wrong(1.0)] * 3,
    "no array": Array(),
    "no values on a device": torch.zeros(3, device="meta"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_ordered_row_of_finite_numbers_is_refused(what: str) -> None:
    value = REFUSED[what]
    made = value if callable(value) and not isinstance(value, Array | Hostile) else lambda: value
    with pytest.raises(RewardError, match="reward function 'function'") as caught:
        reward(returning(made))
    assert "\n" not in str(caught.value)


numbers = st.one_of(
    st.floats(allow_nan=False, width=32, allow_infinity=False),
    st.integers(-(10**38), 10**38),
    st.booleans(),
    st.none(),
    st.fractions(Fraction(-(10**9)), Fraction(10**9)),
)
row = st.lists(numbers, min_size=3, max_size=3)


@given(row, st.sampled_from([list, tuple, iter, np.array]))
def test_what_is_one_is_taken_as_it_is(values: list[Any], kind: Any) -> None:
    total = reward(returning(lambda: kind(values))).total
    expected = [np.nan if value is None else float(value) for value in values]
    np.testing.assert_array_equal(total, expected)


@given(st.lists(st.one_of(numbers, st.floats(), st.integers(), st.text(), st.binary()), max_size=5))
def test_anything_else_is_one_line(values: list[Any]) -> None:
    try:
        total = reward(returning(values)).total
    except RewardError as error:
        assert "\n" not in str(error)
    else:
        assert len(values) == 3 and np.isfinite(total[~np.isnan(total)]).all()


def test_a_weighted_sum_that_is_too_large_is_refused() -> None:
    task = Task("test", (), (), (ones, ones), reward_weights=(3e38, 3e38))
    with pytest.raises(RewardError, match=r"^task\.reward_weights: .*completion 0 is 6e\+38"):
        score_completions(task, [Example("p")] * 3, TEXTS, [[1]] * 3)


# ---- what a function logs ----------------------------------------------------------------------------------


def test_a_metric_never_takes_the_name_of_one_of_the_run_s_own() -> None:
    names = [
        "step",
        "reward",
        "kl",
        "eval/accuracy",
        "rewards/function/mean",
        "mine",
        "mine/too",
        "logged/kl",
    ]

    def logs(log_metric: Any, **kwargs: Any) -> list[float]:
        for number, name in enumerate(names):
            log_metric(name, float(number))
        log_metric("mine/nan", float("nan"))
        return ones()

    metrics = reward(logs).metrics
    assert metrics["mine"] == 5 and metrics["mine/too"] == 6
    assert [metrics[logged_name(name)] for name in names] == list(range(8))
    assert metrics["rewards/logs/mean"] == 1
    assert not [
        name for name in metrics if is_own(name) and not name.startswith(("rewards/logs/", "logged/"))
    ]


@given(st.lists(st.text(max_size=6), unique=True), st.sampled_from(["", "logged/", "time/", "kl"]))
def test_names_of_metrics_stay_apart(names: list[str], prefix: str) -> None:
    taken = [logged_name(prefix + name) for name in names]
    assert len(set(taken)) == len(names)
    assert all(not is_own(name) or name.startswith("logged/") for name in taken)


@pytest.mark.parametrize(
    "log",
    [
        lambda log_extra, log_metric: log_metric(3, 1.0),
        lambda log_extra, log_metric: log_metric("a", "x"),
        lambda log_extra, log_metric: log_metric("a", 10**400),
        lambda log_extra, log_metric: log_metric("a", Hostile()),
        lambda log_extra, log_metric: log_extra(None, [1, 2, 3]),
        lambda log_extra, log_metric: log_extra("a", {1, 2, 3}),
        lambda log_extra, log_metric: log_extra("a", [10**5000] * 3),
        lambda log_extra, log_metric: log_extra("a", [Hostile()] * 3),
        lambda log_extra, log_metric: log_extra("a", 3),
    ],
)
def test_what_cannot_be_logged_is_the_function_s_error(log: Any) -> None:
    def logs(log_extra: Any, log_metric: Any, **kwargs: Any) -> list[float]:
        log(log_extra, log_metric)
        return ones()

    with pytest.raises(RewardError, match="reward function 'logs'") as caught:
        reward(logs)
    assert "\n" not in str(caught.value)


# ---- what a function leaves behind -------------------------------------------------------------------------


def changes_the_process(folder: str) -> None:
    os.chdir(folder)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled())
    np.seterr(all="raise")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 100)


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_function_changes_in_the_process_is_put_back(tmp_path: Any, fails: bool) -> None:
    def careless(**kwargs: Any) -> list[float]:
        changes_the_process(str(tmp_path))
        return [] if fails else ones()

    before = ProcessState.now()
    try:
        reward(careless)
    except RewardError:
        assert fails
    assert ProcessState.now() == before


def test_a_file_that_is_run_changes_nothing_in_the_process_and_may_raise_anything(tmp_path: Any) -> None:
    code = "import os, torch\nos.chdir('/')\ntorch.set_default_dtype(torch.float64)\ndef f(**k): ...\n"
    (tmp_path / "mine.py").write_text(code)
    before = ProcessState.now()
    load_names(f"{tmp_path / 'mine.py'}:f", "task.reward_file", "function")
    assert ProcessState.now() == before
    for line in ("import sys; sys.exit(0)", "raise BaseException", "def __getattr__(name): raise SystemExit"):
        (tmp_path / "mine.py").write_text(f"x = 1\n{line}\n")
        with pytest.raises(FileError, match="mine.py:2: ") as caught:
            load_names(f"{tmp_path / 'mine.py'}:f", "task.reward_file", "function")
        assert "\n" not in str(caught.value)


# ---- what is no function -----------------------------------------------------------------------------------


@pytest.mark.parametrize("funcs", ["org/model", ["org/model", ones], torch.nn.Linear(1, 1)])
def test_a_reward_model_is_refused_for_what_it_is(funcs: Any) -> None:
    values = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "custom"}}
    with pytest.raises(UserError, match="^reward_funcs: .*(org/model|Linear).* reward model"):
        load_task(Settings.from_dict(values), [{"prompt": "p"}], reward_funcs=funcs)


@pytest.mark.parametrize("funcs", [3, [3]])
def test_what_is_no_function_at_all_is_refused(funcs: Any) -> None:
    values = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "custom"}}
    with pytest.raises(UserError, match="^reward_funcs: 3 is not a function"):
        load_task(Settings.from_dict(values), [{"prompt": "p"}], reward_funcs=funcs)
