"""Several processes: equal to one, stopped and resumed together, ended by one another's failures."""

import json
import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import workers
from pyarrow import parquet
from saved import save_model

from twig.cli.app import main
from twig.common.errors import UserError
from twig.runs import checkpoint
from twig.runs.reader import read_metrics, read_summary
from twig.runtime.processes import ALONE, Launch, Processes, _meet, launched, together

HERE = Path(__file__).resolve().parents[1]
CLOSE = 1e-9


def start(scenario, folder, size, argument=None):
    """The exit statuses of `size` processes that run a scenario of workers.py, and what each said."""
    command = [sys.executable, str(HERE / "workers.py"), scenario, str(folder), str(size)]
    command += [] if argument is None else [json.dumps(argument)]
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=HERE, env=environ)
    said = [(folder / f"{rank}.txt").read_text() for rank in range(size)]
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), said


def assert_close(actual, expected, where=""):
    """Equal, numbers to 1e-9, whatever is a clock's or the machine's left out."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            if not key.startswith(("time/", "memory/", "seconds", "peak_memory", "predicted_peak")):
                assert_close(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_close(one, other, f"{where}[{number}]")
    elif isinstance(expected, float) and not isinstance(actual, bool):
        assert actual == pytest.approx(expected, abs=CLOSE, rel=CLOSE), where
    else:
        assert actual == expected, where


def assert_same_run(folder, expected, steps):
    """All that two runs left behind, the states of optimizer, data and replay included."""
    newest = [checkpoint.load(checkpoint.newest_valid(f / "checkpoints")[0]) for f in (folder, expected)]
    (tensors, state), (expected_tensors, expected_state) = newest
    for part in set(expected_tensors) - {"random"}:  # the type checks in tests draw Python's
        for name, tensor in expected_tensors[part].items():
            torch.testing.assert_close(tensors[part][name], tensor, rtol=CLOSE, atol=CLOSE, msg=name)
            assert tensor.dtype == torch.float64 or name.endswith("|step")
    assert_close(state, expected_state, "state")
    assert_close(read_metrics(folder), read_metrics(expected), "metrics")
    assert_close(read_summary(folder), read_summary(expected), "summary")
    for step in range(1, steps + 1):
        rows = [
            parquet.read_table(f / "completions" / f"step-{step}.parquet").to_pylist()
            for f in (folder, expected)
        ]
        for row in (row for table in rows for row in table):
            row["rewards"] = json.loads(row["rewards"])
        assert_close(*rows, f"completions of step {step}")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Tokens, rewards, metrics, restarts and the adapter; three prompts on two processes, of which one may
    have no signal."""
    overrides = workers.ALGORITHMS["t-spmo with replay"]
    statuses, said = start("runs", tmp_path, 2, {"two": overrides})
    assert statuses == [0, 0], said
    workers.train(tmp_path / "base", tmp_path / "one", overrides)
    assert_same_run(tmp_path / "two", tmp_path / "one", 6)
    assert sum(row["replay/groups"] for row in rows_of_steps(tmp_path / "two")) > 0
    environment = json.loads((tmp_path / "two" / "environment.json").read_text())
    assert environment["processes"] == 2


@pytest.mark.slow
def test_several_processes_end_early_where_one_does(tmp_path):
    runs = {"ended": ["train.stop_when.patience=1", "train.max_steps=20", "algorithm.name=grpo"]}
    statuses, said = start("runs", tmp_path, 2, runs)
    assert statuses == [0, 0], said
    workers.train(tmp_path / "base", tmp_path / "one", runs["ended"])
    both, one = read_summary(tmp_path / "ended"), read_summary(tmp_path / "one")
    assert both["steps"] == one["steps"] < 20
    assert both["ended_by"] == one["ended_by"] == "train.stop_when.patience"


def rows_of_steps(folder):
    return [row for row in read_metrics(folder) if "reward" in row]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_equal_one_after_20_steps(tmp_path, size):
    runs = {name: [*overrides, "train.max_steps=20"] for name, overrides in workers.ALGORITHMS.items()}
    statuses, said = start("runs", tmp_path, size, runs)
    assert statuses == [0] * size, said
    without_signal = 0
    for name, overrides in runs.items():
        workers.train(tmp_path / "base", tmp_path / "one" / name, overrides)
        assert_same_run(tmp_path / name, tmp_path / "one" / name, 20)
        norms = [row["grad_norm"] for row in rows_of_steps(tmp_path / name)]
        assert sum(norm > 0 for norm in norms) > 10, "most steps have a signal"
        for step in range(1, 21):  # the first process has the first prompt
            table = parquet.read_table(tmp_path / name / "completions" / f"step-{step}.parquet")
            weighted = [any(row["weights"]) for row in table.to_pylist()]
            without_signal += any(weighted) and not any(weighted[:4])
    assert without_signal > 0, "sometimes the first process has nothing to train on"


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    overrides = [*workers.ALGORITHMS["t-spmo with replay"], "eval.steps=0"]
    three = [*overrides, "train.max_steps=3"]
    statuses, said = start("runs", tmp_path, 2, {"from two": three})
    assert statuses == [0, 0], said
    base = tmp_path / "base"
    workers.train(base, tmp_path / "from one", three)
    statuses, said = start("runs", tmp_path, 3, {"from one": [*overrides, "resume"]})
    assert statuses == [0, 0, 0], said
    statuses, said = start("runs", tmp_path, 2, {"from two": [*overrides, "resume"]})
    assert statuses == [0, 0], said
    workers.train(base, tmp_path / "whole", overrides)
    for name in ("from one", "from two"):
        adapters = [
            checkpoint.load(checkpoint.newest_valid(tmp_path / n / "checkpoints")[0])[0]["adapter"]
            for n in (name, "whole")
        ]
        for key, tensor in adapters[1].items():
            torch.testing.assert_close(adapters[0][key], tensor, rtol=CLOSE, atol=CLOSE)
        assert_close(read_metrics(tmp_path / name), read_metrics(tmp_path / "whole"))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    statuses, said = start("stop", tmp_path, 2, "")
    assert statuses == [0, 0], said
    for name in ("stopped", "other"):
        assert [path.name for path in checkpoint.checkpoints(tmp_path / name / "checkpoints")][-1] == "step-3"


@pytest.mark.slow
def test_a_signal_to_one_process_ends_an_evaluation_in_all(tmp_path):
    statuses, said = start("stop_evaluation", tmp_path, 2, "")
    assert statuses == [0, 0], said
    assert read_summary(tmp_path / "run")["status"] == "stopped"


@pytest.mark.slow
@pytest.mark.parametrize("how, reason", [("raises", "process 1: reward"), ("raises in the first", "reward")])
def test_a_reward_that_fails_in_one_process_ends_all_with_its_traceback_saved(tmp_path, how, reason):
    statuses, said = start("fault", tmp_path, 2, how)
    assert statuses == [2, 2], said
    assert re.search(f"{reason} function 'reward'.*ZeroDivisionError.*traceback.txt", said[0]), said
    assert "no such reward" in (tmp_path / "run" / "traceback.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, reason",
    [
        ("killed while another is busy", "SIGKILL"),
        ("raises while another is stuck", "reward function 'reward'.*ZeroDivisionError"),
    ],
)
def test_a_launcher_ends_a_process_that_does_not_notice_within_60_seconds(tmp_path, how, reason):
    save_model(tmp_path / "base")
    command = [*torchrun(), str(HERE / "workers.py"), "fault", str(tmp_path), "2", json.dumps(how)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=HERE)
    end = time.monotonic()
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert done.returncode != 0
    assert re.search(reason, done.stderr + said[1]), (done.stderr, said)
    failed = re.search(r"^at (\S+)$", said[1], re.M)
    assert failed and end - float(failed[1]) < 60, "what is promised"


ENDS = """
import os, sys
from twig.common.errors import UserError
from twig.runtime.failures import exit_status
from twig.runtime.processes import together
how, ends = sys.argv[1:]
if how == "refused in a group of the caller's":
    import torch.distributed as dist
    dist.init_process_group("gloo")
try:
    with together() as processes:
        ranks = processes.gather(processes.rank)
        assert ranks == [0, 1, 2] and processes.from_main([processes.rank]) == [0]
        if processes.rank == int(ends):
            if how == "killed":
                os.kill(os.getpid(), 9)
            if how == "stopped":
                processes.interrupted()
                raise KeyboardInterrupt
            raise UserError("train.seed", "is odd", "Set train.seed=2")
        processes.gather(None)
except BaseException as error:
    print(processes.reported, type(error).__name__, error)
    sys.exit(exit_status(error))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, rank, statuses, reason",
    [
        ("refused", 1, [2, 2, 2], "Ended process 1: train.seed: is odd. Set train.seed=2."),
        ("refused", 0, [2, 2, 2], "UserError train.seed"),
        ("stopped", 2, [130] * 3, "KeyboardInterrupt"),
        ("killed", 2, [1, 1, -9], "Ended process [01]: lost another"),
        ("killed", 0, [-9, 1, 1], "Ended process [12]: lost another"),
        ("refused in a group of the caller's", 1, [2, 2, 2], "Ended process 1"),
    ],
)
def test_three_processes_end_with_the_status_of_the_one_that_fails(how, rank, statuses, reason):
    """Process 0 gives the reason; if it is gone, the others do."""
    environ = os.environ | {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
    environ |= {"MASTER_PORT": str(workers.free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ENDS, how, str(rank)],
            env=environ | {"RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == statuses, said
    first = 1 if statuses[0] == -9 else 0
    assert re.match(f"False {reason}", said[first]), said
    if first == 0:
        assert all(text.startswith("True") for text in said[1:] if text), said


def torchrun():
    module = [sys.executable, "-m", "torch.distributed.run"]
    return [*module, "--nproc-per-node=2", f"--master-port={workers.free_port()}"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_launcher_and_the_command_line(tmp_path, launcher):
    """One result on stdout; one line if a setting is wrong or a reward fails; the reason if one is killed."""
    base = save_model(tmp_path / "base")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in workers.TRAIN * 2))
    (tmp_path / "rewards.py").write_text(
        "import os\n"
        "def length(completions, **columns):\n"
        "    return [len(text) / (1 - int(os.environ['RANK'])) for text in completions]\n"
        "def digits(completions, **columns):\n"
        "    return [float(sum(c.isdigit() for c in text)) for text in completions]\n"
        "def killed(completions, trainer_state, **columns):\n"
        "    if trainer_state is not None and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return digits(completions)\n"
    )
    module = torchrun()
    if launcher == "accelerate":
        module = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        module += ["--num_processes=2", "--num_machines=1"]
        module += [
            "--mixed_precision=no",
            "--dynamo_backend=no",
            f"--main_process_port={workers.free_port()}",
        ]
    command = [*module, "-m", "twig", "train", "custom", f"model.name={base}", "task.path=data.jsonl"]
    command += ["train.max_steps=2", "rollout.max_completion_length=6", "rollout.num_generations=2"]
    command += ["rollout.prompts_per_step=3", "model.dtype=float64", "task.reward_file=rewards.py:digits"]

    def run(*more):
        done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        said = [line for line in done.stderr.splitlines() if line.startswith("twig: ")]
        return done, said

    done, said = run("--output", "run")
    assert (done.returncode, said) == (0, []), done.stderr
    assert done.stdout.count("2 steps, finished") == 1
    done, said = run("--output", "bad", "task.reward_file=rewards.py:length")
    assert done.returncode != 0
    assert len(said) == 1 and re.search("process 1: reward function 'length'.*ZeroDivisionError", said[0])
    done, said = run("--output", "gone", "task.reward_file=rewards.py:killed")
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    assert len(said) == 1 and "lost another process" in said[0], done.stderr
    if launcher == "accelerate":
        return  # the rest does not depend on the launcher
    done, said = run("--output", "other", "train.max_step=3")
    assert len(said) == 1 and "train.max_step" in said[0], done.stderr
    done, said = run("--output", "other", "rollout.prompts_per_step=1")
    assert len(said) == 1 and "rollout.prompts_per_step" in said[0], done.stderr
    # A launcher may end the first process before it has tidied up: then what is left is no run yet.
    left = {path.name for path in (tmp_path / "other").glob("*")}
    assert left <= {"config.yaml", "environment.json", ".lock"}


# Alone


def test_alone_nothing_is_shared_and_torch_distributed_is_not_asked(monkeypatch):
    assert (ALONE.share([1, 2, 3]), ALONE.gather("x"), ALONE.from_main("x")) == ([1, 2, 3], ["x"], "x")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert launched() is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched() is None, "a cluster may set this for other reasons"
    for name, value in {"RANK": "1", "LOCAL_RANK": "0", "MASTER_PORT": "1", "MASTER_ADDR": "head"}.items():
        monkeypatch.setenv(name, value)
    assert (launched().rank, launched().size) == (1, 2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched() is None


@pytest.mark.parametrize("count, size", [(3, 2), (8, 3), (2, 4), (0, 2)])
def test_shares_laid_end_to_end_are_the_whole(count, size):
    shares = []
    for rank in range(size):
        one = Processes()
        one.rank, one.size = rank, size
        shares.append(list(one.share(range(count))))
    assert sum(shares, []) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_only_training_takes_several_processes(monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["eval", "runs/x"]) == 2
    assert "twig eval: " in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_variables_of_a_launcher_that_is_gone_are_said_and_then_refused(rank, monkeypatch, caplog):
    """Nobody else comes: one line says what is waited for, and why; in the end it is an error."""
    monkeypatch.setattr("twig.runtime.processes._PATIENCE", 0.1)
    monkeypatch.setattr("twig.runtime.processes._JOINING", timedelta(seconds=1))
    port = str(workers.free_port())
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (variables | {"MASTER_PORT": port}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="unset RANK WORLD_SIZE") as refused, together():
        pass
    assert f"127.0.0.1:{port}" in str(refused.value)
    (line,) = [record.message for record in caplog.records if record.name == "twig.runtime.processes"]
    for text in (f"RANK={rank}", "WORLD_SIZE=2", f"127.0.0.1:{port}", "unset RANK WORLD_SIZE"):
        assert text in line


class Meeting(dict):
    """A store in which process 1 comes late, or never."""

    def __init__(self, late):
        self.late = late

    def set(self, key, value):
        self[key] = value

    def check(self, keys):
        self.late -= 1
        return all(key in self or (key == "1 is here" and self.late < 0) for key in keys)


def test_a_process_waits_until_all_are_there(monkeypatch):
    monkeypatch.setattr("twig.runtime.processes._JOINING", timedelta(seconds=0.2))
    launch = Launch(0, 2, 0, 2)
    _meet(launch, Meeting(late=2))
    with pytest.raises(RuntimeError, match="process 1"):
        _meet(launch, Meeting(late=10**9))
