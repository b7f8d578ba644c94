"""The engine on a device that refuses to mix with the CPU, without a GPU. In processes of their own: torch
learns of such a device once, before its first backward pass."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration as backends

pytestmark = pytest.mark.skipif(
    not hasattr(backends, "_setup_privateuseone_for_python_backend"),
    reason="this version of torch has no devices whose backend is written in Python",
)
ROOT = Path(__file__).parents[2]
MIXED = """
import sys, torch, there
there.register()
with there.Device():
    one = torch.ones(2, 3, device="there")
    assert one.device.type == "there" and (one @ one.T).sum().item() == 12
    assert (one + torch.tensor(1.0)).tolist() == [[2.0] * 3] * 2  # a number may come from anywhere
    assert one[torch.tensor([1])].tolist() == [[1.0] * 3]  # and so may indices
    for mix in (lambda x: x + torch.ones(3), lambda x: x.gather(1, torch.zeros(2, 1, dtype=torch.long))):
        try:
            mix(one)
        except RuntimeError as error:
            assert "same device" in str(error)
        else:
            sys.exit("mixed in silence")
    try:
        one.numpy()
    except TypeError:
        pass
    else:
        sys.exit("numpy in silence")
"""


def run(*command, **environ):
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "src")])
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths} | environ,
    )


@pytest.mark.slow
def test_tensors_of_two_devices_do_not_mix():
    done = run("-c", MIXED)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_gradients_sampling_and_the_trainer_stay_on_their_device():
    chosen = "float32 and (is_on_the_device or holds or restart_is_that_of or (qwen2-sdpa and not -all]))"
    words = ["tests/gpu", "-m", "gpu", "-k", chosen, "-q", "-p", "no:cacheprovider"]
    done = run("-m", "pytest", *words, TWIG_TEST_DEVICE="there")
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout


@pytest.mark.slow
def test_steps_and_evaluations_on_a_device_equal_those_on_the_cpu():
    """Updates with and without checkpointed layers, the KL term, replay, redrawing, greedy evaluation."""
    done = run("tests/there_runs.py", "equal")
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["mask", "index", "positions"])
def test_a_tensor_on_the_wrong_device_is_seen(fault):
    done = run("tests/there_runs.py", fault)
    assert done.returncode != 0 and "same device" in done.stderr, done.stderr[-4000:]


# How often a decode step waits for the device, at most: a wait costs a GPU the time of a launch. One is
# whether any row is unfinished; recording the trunk takes two more. The plain engine asks twice.
MOST_WAITS = {"trie, training": 3, "trie, evaluation": 1, "plain, training": 2, "plain, evaluation": 2}


@pytest.mark.slow
def test_a_decode_step_waits_for_the_device_no_more_often_than_it_did():
    done = run("tests/there_runs.py", "waits")
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout)
    assert counts.keys() == MOST_WAITS.keys()
    assert all(0 < counts[name] <= most for name, most in MOST_WAITS.items()), counts
