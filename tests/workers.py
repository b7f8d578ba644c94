"""Runs a scenario as several processes: imports everything once, forks, and prints each one's exit status.

    python workers.py SCENARIO FOLDER SIZE [JSON]

`tests/runtime/test_processes.py` starts it. Nothing watches over the processes, as a launcher would. Started
by a launcher, it is one of the processes. What process N says on stderr goes to FOLDER/N.txt.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from numerics import Float64
from saved import save_model

import twig
from twig.common.progress import Progress
from twig.config.load import Settings
from twig.runtime.failures import exit_status
from twig.runtime.processes import together

PROMPTS = {"12*3=": "1", "9+8=": "3", "abc?": "5", "#=": "7", "0,1,": "9"}
TRAIN = [{"prompt": prompt, "wanted": digit} for prompt, digit in PROMPTS.items()]
EVAL = [{"prompt": text, "wanted": "2"} for text in ("4*4=", "x?", "77+1=")]
ALGORITHMS = {
    "t-spmo with replay": ["algorithm.replay.probability=0.7", "algorithm.l2=0.01", "task.correct_at=0.3"],
    "grpo twice on a batch": ["algorithm.name=grpo", "algorithm.num_iterations=2", "algorithm.beta=0.1"],
    "s-grpo": ["algorithm.name=s-grpo", "algorithm.alpha=2", "algorithm.p=0.5", "algorithm.k=5"],
    "grpo with redrawn prompts": ["algorithm.name=grpo", "rollout.redraw=2"],
    "grpo with a curriculum": ["algorithm.name=grpo", "rollout.curriculum=0.3"],
}


def digits(prompts, completions, log_metric, log_extra, **kwargs):
    """The share of digits in a completion; the same for all completions of two of the prompts."""
    log_metric("ones", 1.0)
    shares = [sum(c.isdigit() for c in text) / (1 + len(text)) for text in completions]
    return [0.5 if prompt in ("#=", "abc?") else value for prompt, value in zip(prompts, shares, strict=True)]


def train(base: Path, output: Path, overrides: Sequence[str], *, wide: bool = True, **given):
    """A small run with three prompts a step; `wide`: everything is computed in float64."""
    values = {
        "model": {"name": str(base), "dtype": "float64"},
        "task": {"name": "custom"},
        "rollout": {"num_generations": 4, "prompts_per_step": 3, "max_completion_length": 7},
        "train": {"max_steps": 6, "learning_rate": 0.05, "save_steps": 2},
        "eval": {"steps": 2},
        "log": {"completions_steps": 1},
    }
    given = {"reward_funcs": digits, "train_dataset": TRAIN, "eval_dataset": EVAL} | given
    with Float64() if wide else nullcontext():
        return twig.train(Settings.from_dict(values, overrides), output=output, **given)


# ---- scenarios: functions of the folder and what was passed


def runs(folder: Path, trained: dict[str, list[str]]) -> None:
    """Trains once for each of `trained`, a run's name and its overrides; "resume" among them resumes it."""
    with together() as processes:
        for name, overrides in trained.items():
            resume = "resume" in overrides
            overrides = [word for word in overrides if word != "resume"]
            run = train(folder / "base", folder / name, overrides, resume=resume, processes=processes)
            adapters = [dict(run.model.named_parameters())[n] for n in sorted(_adapted(run.model))]
            each_has = processes.gather([a.detach().numpy().tobytes() for a in adapters])
            assert all(each == each_has[0] for each in each_has), "the adapters of all processes are the same"
            alike = {k: v for k, v in run.summary.items() if k not in ("seconds", "peak_memory_bytes")}
            each_has = processes.gather(alike)
            assert all(each == each_has[0] for each in each_has), "and so are the results"


def _adapted(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def fault(folder: Path, how: str) -> None:
    """One process comes to its end in step 2, in the way named, while the others go on."""
    rank = int(os.environ["RANK"])
    calls = []

    def reward(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 2:
            sys.stderr.write(f"at {time.monotonic()}\n")
            _end_as(how, rank)
        return [float(len(text)) for text in completions]

    overrides = ["eval.before=false", "eval.steps=0", "train.max_steps=4"]
    train(folder / "base", folder / "run", overrides, wide=False, reward_funcs=reward, eval_dataset=None)


def _end_as(how: str, rank: int) -> None:
    if how == "raises" and rank == 1:
        raise ZeroDivisionError("no such reward")
    if how == "raises in the first" and rank == 0:
        raise ZeroDivisionError("no such reward")
    if how == "raises while another is stuck":
        if rank == 1:
            raise ZeroDivisionError("no such reward")
        time.sleep(100)
    if how == "killed while another is busy":
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            try:
                sum(range(1000))
            except Exception:  # such code must not hold it up
                pass


class StopAt(Progress):
    """Sends this process a signal behind step 3."""

    def step(self, step, total, metrics):
        if step == 3:
            signal.raise_signal(signal.SIGINT)


def stop(folder: Path, _: str) -> None:
    """A signal to the first process alone; then, in another run, to the second one, while it rewards."""
    with together() as processes:
        base = folder / "base"
        run = train(base, folder / "stopped", [], progress=StopAt(), processes=processes)
        assert (run.summary["status"], run.summary["steps"]) == ("stopped", 3)
        calls = []

        def reward(completions, **kwargs):
            calls.append(1)
            if len(calls) == 3 and not processes.main:
                signal.raise_signal(signal.SIGTERM)
            return digits(completions=completions, **kwargs)

        overrides = ["eval.before=false", "eval.steps=0"]
        run = train(base, folder / "other", overrides, reward_funcs=reward, processes=processes)
        assert (run.summary["status"], run.summary["steps"]) == ("stopped", 3)


def stop_evaluation(folder: Path, _: str) -> None:
    """A signal to the second process alone during the evaluation before training ends both at once."""

    def reward(completions, **kwargs):
        if os.environ["RANK"] == "0":
            (folder / "there").touch()  # the first process is in its evaluation too
        else:
            while not (folder / "there").exists():
                time.sleep(0.01)
            signal.raise_signal(signal.SIGTERM)
        return [0.0 for _ in completions]

    run = train(folder / "base", folder / "run", [], wide=False, reward_funcs=reward)
    assert (run.summary["status"], run.summary["steps"]) == ("stopped", 0)


def command(folder: Path, arguments: list[str]) -> None:
    """The command line."""
    from twig.cli.app import main

    sys.exit(main(arguments))


# ---- as several processes


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _fork(scenario, folder: Path, size: int, argument) -> list[int]:
    environ = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(environ | {"MASTER_PORT": str(free_port())})
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            _be(scenario, folder / f"{rank}.txt", folder, argument)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _be(scenario, said: Path, folder: Path, argument) -> None:
    status = 0
    with open(said, "w") as file:
        os.dup2(file.fileno(), 2)
    try:
        scenario(folder, argument)
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        traceback.print_exc()
        status = exit_status(error)
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    scenario, place = globals()[sys.argv[1]], Path(sys.argv[2])
    given = json.loads(sys.argv[4]) if len(sys.argv) > 4 else ""
    if "RANK" in os.environ:  # a launcher started it
        _be(scenario, place / f"{os.environ['RANK']}.txt", place, given)
    if not (place / "base").exists():
        save_model(place / "base")
    sys.stdout.write(json.dumps(_fork(scenario, place, int(sys.argv[3]), given)))
