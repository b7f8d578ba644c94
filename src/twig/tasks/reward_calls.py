"""Calls reward functions: async ones in the background, each call within a time limit.

Knows nothing about their arguments or results.
"""

import asyncio
import atexit
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from twig.tasks.reward_functions import RewardError, check_signature, failure, label_of


@dataclass(frozen=True)
class Limit:
    """How long one call of a reward function may take.

    `seconds` is the limit (None: there is none), `score` the reward of every completion of a call that takes
    longer (None: the run stops).
    """

    seconds: float | None = None
    score: float | None = None


def call(function: Callable[..., Any], name: str, arguments: dict[str, Any], limit: Limit, count: int) -> Any:
    """Calls the function with `count` completions; raises RewardError if it raises or takes too long.

    NOTE: with a time limit the function runs on a separate thread. A thread cannot be stopped: one that is
    late keeps running.
    """
    check_signature(function, name, arguments)
    if limit.seconds is None:
        try:
            return function(**arguments)
        except Exception as error:
            raise failure(function, name, error) from error
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(function(**arguments))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name=f"twig-reward-{name}", daemon=True).start()
    try:
        return result.result(limit.seconds)
    except Exception as error:
        if not result.done():
            return _late(function, name, limit, count)
        raise failure(function, name, error) from error


def start(
    function: Callable[..., Any], name: str, arguments: dict[str, Any], limit: Limit, count: int
) -> Future[Any]:
    """Starts an async function and returns its future result.

    The future raises RewardError if the function raises or takes too long.
    """
    check_signature(function, name, arguments)

    async def run() -> Any:
        clock = asyncio.timeout(limit.seconds)
        try:
            async with clock:
                return await function(**arguments)
        except Exception as error:
            if clock.expired():
                return _late(function, name, limit, count)
            raise failure(function, name, error) from error

    return asyncio.run_coroutine_threadsafe(run(), _event_loop())


def _late(function: Callable[..., Any], name: str, limit: Limit, count: int) -> list[float]:
    if limit.score is not None:
        return [limit.score] * count
    raise RewardError(
        label_of(function, name),
        f"took longer than task.reward_timeout={limit.seconds:g} seconds for {count} completions",
        "Set a larger task.reward_timeout, or task.reward_on_timeout=0.0 to continue with that score",
    )


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    # One loop for the whole process, on a separate thread: clients that users keep between calls are bound to
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
