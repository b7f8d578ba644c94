"""Runs with reward functions that are careless or hostile: the same bytes as a plain run's, or one line.

Each of `SAME` gives the rewards of `digits`, and does something else besides; the others end it.
"""

import asyncio
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import EVAL, TRAIN, Heard, ask_to_stop, at, completions_of, digits, record, rows_of

from twig.common.errors import UserError
from twig.runs.reader import read_metrics

STEPS = 3
WORDS = [f"train.max_steps={STEPS}", "train.save_steps=1", "eval.steps=1"]


# ---- the same run


def mutates(prompts, completions, completion_ids, trainer_state, wanted, notes, **kwargs):
    values = digits(completions)
    for rows in (prompts, completions, completion_ids, wanted, *notes):
        rows.clear()
    notes.append(len(notes))
    if trainer_state is not None:
        trainer_state.global_step = 99
        trainer_state.max_steps = 0
    return values


async def mutates_later(**kwargs):
    await asyncio.sleep(0)
    return mutates(**kwargs)


def mutates_in_a_thread(completions, completion_ids, **kwargs):
    values = digits(completions)

    def later():
        for _ in range(20):
            completion_ids.append([1])
            completions[:] = ["9"]
            time.sleep(0.001)

    threading.Thread(target=later, daemon=True).start()
    return values


def uses_an_alarm(completions, **kwargs):
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, lambda number, frame: 1 / 0)
        signal.setitimer(signal.ITIMER_REAL, 0.05)  # and forgets it
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return digits(completions)


def prints(completions, **kwargs):
    sys.stdout.write(f"a line {completions}\n")
    sys.stderr.write("and another\n")
    return digits(completions)


def changes_directory(completions, **kwargs):
    os.chdir(os.sep)
    return digits(completions)


async def changes_directory_later(completions, **kwargs):
    return changes_directory(completions)


def seeds(completions, **kwargs):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return digits(completions)


def switches_torch(completions, **kwargs):
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(torch.get_num_threads() + 1)
    np.seterr(all="raise")
    return digits(completions)


def logs(completions, log_extra, log_metric, **kwargs):
    for name in ("step", "reward", "kl", "loss", "eval/accuracy", "tokens/sampled"):
        log_metric(name, float("nan"))
    for name in ("step", "reward", "token_ids"):
        log_extra(name, [float("nan")] * len(completions))
    return digits(completions)


def starts_threads(completions, **kwargs):
    for _ in range(4):
        threading.Thread(target=time.sleep, args=(0.01,), daemon=True).start()
    return digits(completions)


SAME = [mutates, mutates_later, mutates_in_a_thread, uses_an_alarm, prints, changes_directory]
SAME += [changes_directory_later, seeds, switches_torch, logs, starts_threads]
TRAIN = [row | {"notes": ["a", ["b"]]} for row in TRAIN]
EVAL = [row | {"notes": ["c"]} for row in EVAL]


@pytest.fixture(scope="module")
def harmless(base, tmp_path_factory):
    """What a run leaves whose reward function does nothing else."""
    from small_runs import small_settings, train_small

    folder = tmp_path_factory.mktemp("harmless") / "run"
    settings = small_settings(base, *WORDS)
    return record(train_small(settings, folder, train_dataset=TRAIN, eval_dataset=EVAL).folder, STEPS)


def own(row):
    return {name: value for name, value in row.items() if not name.startswith("logged/")}


@pytest.mark.parametrize("limit", [[], ["task.reward_timeout=30"]], ids=["", "limit"])
@pytest.mark.parametrize("function", SAME)
def test_it_gives_the_same_bytes(run, harmless, function, limit, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    handlers = signal.getsignal(signal.SIGINT)

    def same(*args, **kwargs):
        return function(*args, **kwargs)

    async def same_later(*args, **kwargs):
        return await function(*args, **kwargs)

    reward = same_later if asyncio.iscoroutinefunction(function) else same
    reward.__name__ = "digits"
    done = run("run", *WORDS, *limit, reward_funcs=reward, train_dataset=TRAIN, eval_dataset=EVAL)
    left = record(done.folder, STEPS)
    if function is seeds:  # what functions draw is theirs
        del left["tensors"]["random"]
        harmless = {**harmless, "tensors": {k: v for k, v in harmless["tensors"].items() if k != "random"}}
    left["metrics"] = [own(row) for row in left["metrics"]]
    for rows, plain in zip(left["completions"], harmless["completions"], strict=True):
        for row, other in zip(rows, plain, strict=True):
            assert row | {"extra": other["extra"]} == other
    for name in ("adapter", "tensors", "metrics", "evaluations", "summary"):
        assert left[name] == harmless[name], name
    assert Path.cwd() == tmp_path and signal.getsignal(signal.SIGINT) is handlers
    assert torch.get_default_dtype() is torch.float32 and torch.is_grad_enabled()


def test_a_relative_folder_stays_where_it_was(run, settings, monkeypatch, tmp_path):
    import twig

    (tmp_path / "elsewhere").mkdir()

    def wanders(completions, **kwargs):
        os.chdir(tmp_path / "elsewhere")
        return digits(completions)

    monkeypatch.chdir(tmp_path)
    data = {"train_dataset": TRAIN, "eval_dataset": EVAL}
    done = twig.train(settings(*WORDS), output="run", reward_funcs=wanders, **data)
    assert done.folder == tmp_path / "run"
    assert len(read_metrics(tmp_path / "run")) > STEPS and (tmp_path / "run" / "adapter").is_dir()
    assert not any((tmp_path / "elsewhere").iterdir())


def test_what_functions_log_is_in_the_files_and_the_run_is_readable(run):
    def logs_too(completions, log_extra, log_metric, **kwargs):
        log_extra("length", [len(text) for text in completions])
        log_metric("share", 0.5)
        log_metric("kl", float("nan"))
        return digits(completions)

    folder = run("run", *WORDS, "rollout.redraw=1", reward_funcs=logs_too).folder
    for row in completions_of(folder, 2):
        assert json.loads(row["extra"]) == {"length": len(row["completion"])}
    steps = [row for row in rows_of(folder) if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(row["share"] == 0.5 and row["logged/kl"] is None and "kl" not in row for row in steps)


def test_a_changed_column_makes_no_difference_to_a_resumed_run(run):
    """Each prompt comes several times: what was taken from its list would be gone the second time."""

    def takes(completions, notes, **kwargs):
        return [
            value + bool(each.pop()) + len(each)
            for value, each in zip(digits(completions), notes, strict=True)
        ]

    words = ["train.max_steps=4", "train.save_steps=2"]
    given = {"reward_funcs": takes, "train_dataset": TRAIN, "eval_dataset": EVAL}
    whole = record(run("whole", *words, **given).folder, 4)
    run("parts", *words, progress=Heard(step=at(2, ask_to_stop)), **given)
    assert record(run("parts", *words, resume=True, **given).folder, 4) == whole


# ---- one line


class Own(BaseException):
    pass


def leaves(completions, **kwargs):
    sys.exit(0)


def raises_its_own(completions, **kwargs):
    raise Own


async def leaves_later(completions, **kwargs):
    sys.exit(0)


def gives_too_much(completions, **kwargs):
    return [(-1) ** n * 1e308 for n in range(len(completions))]


def gives_a_set(completions, **kwargs):
    return set(range(len(completions)))


@pytest.mark.parametrize("function", [leaves, raises_its_own, leaves_later, gives_too_much, gives_a_set])
def test_it_ends_the_run_with_one_line(run, function, tmp_path):
    with pytest.raises(UserError, match=f"reward function '{function.__name__}'") as ended:
        run("run", *WORDS, reward_funcs=function, train_dataset=TRAIN, eval_dataset=EVAL)
    assert "\n" not in str(ended.value)
    if function not in (gives_too_much, gives_a_set):
        assert "Traceback" in (tmp_path / "run" / "traceback.txt").read_text()


def test_a_folder_that_vanishes_ends_the_run(run, tmp_path):
    def removes(completions, trainer_state=None, **kwargs):
        if trainer_state is not None and trainer_state.global_step == 1:
            shutil.rmtree(tmp_path / "run")
        return digits(completions)

    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path / 'run'))}: .* gone"):
        run("run", *WORDS, reward_funcs=removes)
    assert not (tmp_path / "run").exists()


# ---- from a shell

SWALLOWS = """
import time
calls = []
def digits(completions, trainer_state=None, **kwargs):
    calls.append(1)
    while True:
        try:
            while trainer_state is not None and trainer_state.global_step == 2 and not SAFE:
                time.sleep(0.05)
            break
        except BaseException:
            pass
    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in completions]
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows sends a thread no signals")
def test_a_call_that_never_returns_ends_the_run_saved_and_it_resumes(base, settings, tmp_path, monkeypatch):
    """What was saved at the end of step 2 is what a run has that stops there."""
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("\n".join(map(json.dumps, TRAIN)))
    Path("rewards.py").write_text("import os\nSAFE = os.environ.get('SAFE')\n" + SWALLOWS)
    words = [
        *("task.path=data.jsonl", "task.reward_file=rewards.py:digits", "task.reward_timeout=0.5"),
        *("train.save_steps=0", "train.max_steps=3", "eval.before=false", "eval.steps=0"),
    ]
    Path("run.yaml").write_text(settings(*words).to_yaml())
    command = [sys.executable, "-m", "twig", "train", "run.yaml", "log.progress=quiet"]

    def train(*more, **environment):
        return subprocess.run(
            [*command, *more], capture_output=True, text=True, timeout=600, env=os.environ | environment
        )

    stuck = train("--output", "stuck")
    lines = [line for line in stuck.stderr.splitlines() if not line.startswith("running the Python file")]
    assert stuck.returncode == 2 and len(lines) == 1 and lines[0].startswith("twig: "), stuck.stderr
    assert "'digits'" in lines[0] and "rewards.py" in Path("stuck/traceback.txt").read_text()
    assert [path.name for path in Path("stuck/checkpoints").iterdir()] == ["step-2"]
    assert train("--output", "stuck", "--resume", SAFE="1").returncode == 0
    assert train("--output", "whole", SAFE="1").returncode == 0
    assert record(Path("stuck"), 3) == record(Path("whole"), 3)
