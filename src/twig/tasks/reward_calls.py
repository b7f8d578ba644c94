"""Calls reward functions: async ones in the background, each call within a time limit.

A function that is not async runs on the thread that calls it, so that signals work in it. Knows nothing about
its arguments or results.
"""

import asyncio
import atexit
import concurrent.futures
import ctypes
import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from twig.common.redact import hidden
from twig.common.text import one_line
from twig.common.user_code import is_ours, message_from
from twig.runtime.failures import USAGE_ERROR
from twig.tasks.reward_functions import RewardError, check_signature, failure, label_of

T = TypeVar("T")


@dataclass(frozen=True)
class Limit:
    """How long one call of a reward function may take.

    `seconds` is the limit (None: there is none), `score` the reward of every completion of a call that takes
    longer (None: the run stops). A call that has not returned `further` seconds later ends the process.
    Before it, `save` gets the error, and returns the one to report; if the function is not async, it is
    called on another thread.
    """

    seconds: float | None = None
    score: float | None = None
    further: float = 10.0
    save: Callable[[RewardError], BaseException] = lambda error: error


class Late(Exception):
    """A call took too long, and its completions get `score`."""

    def __init__(self, score: float) -> None:
        super().__init__(score)
        self.score = score


class TimeIsUp(BaseException):
    """Raised inside a reward function whose time is up; no `except Exception` catches it."""


def call(
    function: Callable[..., Any],
    name: str,
    arguments: dict[str, Any],
    limit: Limit,
    read: Callable[[Any], T],
) -> T:
    """Calls the function and returns what `read` makes of what it returned.

    Raises RewardError if either raises anything (KeyboardInterrupt passes) or they take too long, Late if
    the limit has a score for that. Reading runs the user's code too: a generator, a number of its own.
    """
    check_signature(function, name, arguments)
    watch, results, caught = _Watch(function, name, limit), [], None
    try:
        try:
            watch.begin()
            results.append(read(function(**arguments)))
        finally:
            watch.end()
    except BaseException as error:
        watch.end()  # the time may have been up just before the first
        caught = error
    if caught is not None and is_ours(caught):
        raise caught
    if watch.expired:
        raise _late(function, name, limit)
    if caught is None:
        return results[0]
    if isinstance(caught, RewardError):
        raise caught
    raise failure(function, name, caught) from caught


# ---- a limit for functions that are not async --------------------------------------------------------------


class _Watch:
    """Raises TimeIsUp on the thread that began it when the limit is over.

    A second thread waits, and sends the first one a signal that nothing else handles: it ends a wait too. On
    the processor's time a timer sends it, for C code that keeps the second thread from running, such as a
    search for a regular expression. Without signals (Windows, a thread other than the main one) the exception
    is raised from outside, as soon as the thread runs Python.
    """

    def __init__(self, function: Callable[..., Any], name: str, limit: Limit) -> None:
        self.function, self.name, self.limit = function, name, limit
        self.expired = False  # the limit was over before `end`
        self._ended = self._raised = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._wait, name=f"twig-limit-{name}", daemon=True)

    def begin(self) -> None:
        """Starts watching this thread; does nothing without a limit."""
        if self.limit.seconds is None:
            return
        self._watched = threading.get_ident()
        seconds = min(self.limit.seconds, threading.TIMEOUT_MAX)
        self._deadline = time.monotonic() + seconds
        self._signal = _free_signal()
        if self._signal is not None:
            self._before = signal.signal(self._signal, self._interrupt)
            if self._signal == signal.SIGVTALRM:
                signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        self._thread.start()

    def end(self) -> None:
        """Stops watching; after it nothing is raised."""
        while True:
            try:
                self._ended = True
                self._stop()
                return
            except TimeIsUp:  # it was on its way; there is only one
                pass

    def _stop(self) -> None:
        self._over.set()
        if self._thread.ident is None:  # never begun
            return
        self._thread.join()
        if self._signal is None:
            _raise_in(self._watched, None)
            return
        if self._signal == signal.SIGVTALRM:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.sigpending()  # a signal that was sent arrives with this call, while its handler is here
        signal.signal(self._signal, self._before)

    def _interrupt(self, number: int, frame: Any) -> None:
        if self._ended or self._raised:
            return
        left = self._deadline - time.monotonic()
        if left > 0 and not self.expired:
            # threads of the function have used more of the processor's time than has passed
            signal.setitimer(signal.ITIMER_VIRTUAL, left)
            return
        self.expired = self._raised = True
        raise TimeIsUp

    def _wait(self) -> None:
        if self._over.wait(max(self._deadline - time.monotonic(), 0)):
            return
        self.expired = True
        if self._signal is None:
            _raise_in(self._watched, TimeIsUp)
        else:
            signal.pthread_kill(self._watched, self._signal)
        if not self._over.wait(self.limit.further):
            self._give_up()

    def _give_up(self) -> None:
        frame = sys._current_frames().get(self._watched)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        error = _not_back(self.function, self.name, self.limit, stack)
        save_and_end(self.limit, error)


def _free_signal() -> int | None:
    """Returns a signal that nothing handles; None if this thread cannot be sent one."""
    if not hasattr(signal, "pthread_kill") or threading.current_thread() is not threading.main_thread():
        return None
    timer = signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0
    numbers: list[int] = [signal.SIGVTALRM] if timer else []
    if hasattr(signal, "SIGRTMIN"):
        numbers += list(range(signal.SIGRTMIN, signal.SIGRTMAX + 1))
    numbers += [signal.SIGUSR2, signal.SIGUSR1]
    return next((number for number in numbers if signal.getsignal(number) is signal.SIG_DFL), None)


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Raises an exception in a thread as soon as it runs Python; None takes back one that was not raised."""
    exception = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), exception)


def save_and_end(limit: Limit, error: RewardError) -> None:
    """Saves, and ends the process: its main thread does not return from a reward function."""
    try:
        reported: object = limit.save(error)
    except BaseException as fault:
        reported = f"{error.key}: {error.problem}; it cannot be saved ({message_from(fault)}). {error.fix}."
    try:
        sys.stderr.write(f"twig: {one_line(hidden(str(reported)))}\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # nobody is there to read it
    end_process(USAGE_ERROR)


def end_process(status: int) -> None:
    """Ends the process without waiting for any thread."""
    os._exit(status)


def _late(function: Callable[..., Any], name: str, limit: Limit) -> Exception:
    if limit.score is not None:
        return Late(limit.score)
    return RewardError(
        label_of(function, name),
        f"took longer than task.reward_timeout={limit.seconds:g} seconds",
        "Set a larger task.reward_timeout, or task.reward_on_timeout=0.0 to continue with that score",
    )


def _not_back(function: Callable[..., Any], name: str, limit: Limit, stack: str = "") -> RewardError:
    return RewardError(
        label_of(function, name),
        f"has not returned {limit.further:g} seconds after task.reward_timeout={limit.seconds:g}, so the run "
        "ends",
        "Let it return in time: C code and an exception that it swallows keep it from being interrupted",
        stack,
    )


# ---- async functions ---------------------------------------------------------------------------------------


class Background:
    """An async function at work: `result` waits for it. Made by `start`."""

    def __init__(self, function: Callable[..., Any], name: str, limit: Limit, future: Future[Any]) -> None:
        self._function, self._name, self._limit, self._future = function, name, limit, future
        self._began = time.monotonic()

    def result(self) -> Any:
        """Returns what `read` made of the result; raises what `call` raises."""
        limit, left = self._limit, None
        if limit.seconds is not None:
            left = self._began + limit.seconds + limit.further - time.monotonic()
            left = min(max(left, 0.0), threading.TIMEOUT_MAX)
        try:
            return self._future.result(left)
        except concurrent.futures.TimeoutError:
            if self._future.done():
                raise
        error = _not_back(self._function, self._name, limit)
        limit.save(error)
        raise error

    def cancel(self) -> None:
        """Stops the function if it is still at work, and waits for nothing."""
        self._future.cancel()


def start(
    function: Callable[..., Any],
    name: str,
    arguments: dict[str, Any],
    limit: Limit,
    read: Callable[[Any], Any],
) -> Background:
    """Starts an async function; see `call`."""

    async def run() -> Any:
        clock = asyncio.timeout(limit.seconds)
        try:
            async with clock:
                return read(await function(**arguments))
        except RewardError:
            raise
        except BaseException as error:  # nobody else may see it: SystemExit would end the loop
            if clock.expired():
                raise _late(function, name, limit) from error
            raise failure(function, name, error) from error

    check_signature(function, name, arguments)
    future = asyncio.run_coroutine_threadsafe(run(), _event_loop())
    return Background(function, name, limit, future)


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
