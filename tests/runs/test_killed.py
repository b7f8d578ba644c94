"""A process that is killed, at any moment and within any write, loses nothing but the steps since the last
checkpoint: the run that goes on ends with the same bytes."""

import os
import random
import signal
import time

import numpy as np
import pytest
from faults import Dying, Failing, one_of_each
from saved import save_model
from small_runs import completions_of, digits, record, small_settings, train_small

from twig.runs import checkpoint
from twig.runs.reader import is_run

STEPS = 5
# Every part of the state matters: restarts that wait, two iterations, a reward that draws random numbers.
WORDS = ["algorithm.num_iterations=2", "algorithm.replay.probability=0.7", "task.correct_at=0.3"]


def noisy_digits(completions, **kwargs):
    """The share of digits and a random part, from a generator of the process."""
    return [reward + 0.1 * np.random.random() for reward in digits(completions)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    base = save_model(tmp_path_factory.mktemp("base"), layers=2, width=32)
    return small_settings(base, f"train.max_steps={STEPS}", "train.save_total_limit=1", "lora.r=4", *WORDS)


def go_on(settings, folder, within=None):
    """Starts the run in `folder`, or goes on with it, inside the context `within` if there is one."""
    with within or Failing(-1, 0):
        return train_small(settings, folder, resume=is_run(folder), reward_funcs=noisy_digits)


def in_a_process(settings, folder, within=None, seconds=None) -> bool:
    """The same in a process of its own, killed after `seconds`; whether it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            go_on(settings, folder, within)
            status = 0
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "going on failed; its traceback is above"
    return False


def end_of(folder):
    """All that a run leaves, with the bytes of its tensors' files."""
    last = checkpoint.newest_valid(folder / "checkpoints")[0]
    files = [last / f"{name}.safetensors" for name in ("adapter", "optimizer")]
    files += [folder / name / "adapter_model.safetensors" for name in ("adapter", "adapter-best")]
    return {**record(folder, STEPS), "bytes": [file.read_bytes() for file in files]}


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(settings, tmp_path, capfd):
    """Each kind of write, flush and rename of a run kills it once, half of the bytes written; and a clock
    kills it at random moments, twice in a row."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    rng = random.Random(0)
    seen = Failing(10**9, 0)
    began = time.monotonic()
    expected = end_of(go_on(settings, tmp_path / "whole" / "run", seen).folder)
    duration = time.monotonic() - began
    calls = one_of_each(seen.calls, rng)
    assert {seen.calls[call][0] for call in calls} == {"write", "fsync", "replace"} and len(calls) > 30
    ways = [{"within": Dying(call)} for call in calls]
    ways += [{"seconds": rng.uniform(0, duration)} for _ in range(8)]
    killed = 0
    for number, way in enumerate(ways):
        folder = tmp_path / str(number) / "run"
        now = in_a_process(settings, folder, **way)
        assert now or "seconds" in way, "a call of the run is made each time"
        killed += now
        if "seconds" in way and now:  # and once more, within what going on writes
            killed += in_a_process(settings, folder, within=Dying(rng.randrange(len(seen.calls))))
        assert not in_a_process(settings, folder)
        left = end_of(folder)
        for part in expected:
            assert left[part] == expected[part], (number, way, part)
    assert killed >= 40
    replayed = [row["replay/groups"] for row in expected["metrics"] if "replay/groups" in row]
    assert len(completions_of(folder, STEPS)) == 8 and sum(replayed) > 0
