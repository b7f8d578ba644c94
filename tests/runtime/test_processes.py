"""Several processes: equal to one, stopped and resumed together, ended by one another's failures."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import workers
from pyarrow import parquet
from saved import save_model

from twig.cli.app import main
from twig.runs import checkpoint
from twig.runs.reader import read_metrics, read_summary
from twig.runtime.lifeline import FAULT, LOOPBACK, STOPPED, Ended, Failure, Lifeline, Listener, connect
from twig.runtime.processes import ALONE, Processes, launched

HERE = Path(__file__).resolve().parents[1]
CLOSE = 1e-9


def start(scenario, folder, size, argument=None):
    """The exit statuses of `size` processes that run a scenario of workers.py, and what each said."""
    words = [sys.executable, str(HERE / "workers.py"), scenario, str(folder), str(size)]
    words += [] if argument is None else [json.dumps(argument)]
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, cwd=HERE, env=environ)
    said = [(folder / f"{rank}.txt").read_text() for rank in range(size)]
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), said


def assert_close(found, expected, where=""):
    """Equal, numbers to 1e-9, whatever is a clock's or the machine's left out."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            if not key.startswith(("time/", "memory/", "seconds", "peak_memory", "predicted_peak")):
                assert_close(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_close(one, other, f"{where}[{number}]")
    elif isinstance(expected, float) and not isinstance(found, bool):
        assert found == pytest.approx(expected, abs=CLOSE, rel=CLOSE), where
    else:
        assert found == expected, where


def assert_same_run(folder, expected, steps):
    """All that two runs left behind, the states of optimizer, data and replay included."""
    newest = [checkpoint.load(checkpoint.newest_valid(f / "checkpoints")[0]) for f in (folder, expected)]
    (tensors, state), (wanted, known) = newest
    for part in set(wanted) - {"random"}:  # what checks the types in tests draws from Python's numbers
        for name, tensor in wanted[part].items():
            torch.testing.assert_close(tensors[part][name], tensor, rtol=CLOSE, atol=CLOSE, msg=name)
            assert tensor.dtype == torch.float64 or name.endswith("|step")
    assert_close(state, known, "state")
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


def test_two_processes_equal_one(tmp_path):
    """Tokens, rewards, metrics, restarts and the adapter; three prompts on two processes, of which one may
    have no signal."""
    words = workers.ALGORITHMS["t-spmo with replay"]
    statuses, said = start("runs", tmp_path, 2, {"two": words})
    assert statuses == [0, 0], said
    workers.train(tmp_path / "base", tmp_path / "one", words)
    assert_same_run(tmp_path / "two", tmp_path / "one", 6)
    assert sum(row["replay/groups"] for row in rows_of_steps(tmp_path / "two")) > 0
    environment = json.loads((tmp_path / "two" / "environment.json").read_text())
    assert environment["processes"] == 2


def rows_of_steps(folder):
    return [row for row in read_metrics(folder) if "reward" in row]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_equal_one_after_20_steps(tmp_path, size):
    wanted = {name: [*words, "train.max_steps=20"] for name, words in workers.ALGORITHMS.items()}
    statuses, said = start("runs", tmp_path, size, wanted)
    assert statuses == [0] * size, said
    without_signal = 0
    for name, words in wanted.items():
        workers.train(tmp_path / "base", tmp_path / "one" / name, words)
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
    words = [*workers.ALGORITHMS["t-spmo with replay"], "eval.steps=0"]
    three = [*words, "train.max_steps=3"]
    statuses, said = start("runs", tmp_path, 2, {"from two": three})
    assert statuses == [0, 0], said
    base = tmp_path / "base"
    workers.train(base, tmp_path / "from one", three)
    statuses, said = start("runs", tmp_path, 3, {"from one": [*words, "resume"]})
    assert statuses == [0, 0, 0], said
    statuses, said = start("runs", tmp_path, 2, {"from two": [*words, "resume"]})
    assert statuses == [0, 0], said
    workers.train(base, tmp_path / "whole", words)
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
@pytest.mark.parametrize(
    "how, statuses, words",
    [
        ("raises", [2, 2], "process 1: reward function 'reward'.*ZeroDivisionError.*traceback.txt"),
        ("killed", [FAULT, -9], "process 1: ended without a word"),
        ("raises while another is stuck", [2, 2], "process 1: reward function 'reward'.*ZeroDivisionError"),
        ("killed while another is busy", [FAULT, -9], "process 1: ended without a word"),
    ],
)
def test_a_process_that_fails_ends_the_others(tmp_path, how, statuses, words):
    found, said = start("fault", tmp_path, 2, how)
    assert found == statuses, said
    assert re.search(words, said[0]), said[0]
    assert seconds_to_the_end(said) < 25
    if how == "raises":
        assert "no such reward" in (tmp_path / "run" / "traceback.txt").read_text()


def seconds_to_the_end(said):
    times = [float(word) for text in said for word in re.findall(r"^(?:at|ended) (\S+)$", text, re.M)]
    return max(times) - min(times)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_launcher_and_the_command_line(tmp_path, launcher):
    """One result on stdout; the first process's line, once, where a setting is wrong or a reward fails."""
    base = save_model(tmp_path / "base")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in workers.TRAIN * 2))
    (tmp_path / "rewards.py").write_text(
        "import os\n"
        "def length(completions, **columns):\n"
        "    return [len(text) / (1 - int(os.environ['RANK'])) for text in completions]\n"
        "def digits(completions, **columns):\n"
        "    return [float(sum(c.isdigit() for c in text)) for text in completions]\n"
    )
    module = [sys.executable, "-m"]
    if launcher == "torchrun":
        module += ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={workers.free_port()}"]
    else:
        module += ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
        module += [
            "--mixed_precision=no",
            "--dynamo_backend=no",
            f"--main_process_port={workers.free_port()}",
        ]
    words = [*module, "-m", "twig", "train", "custom", f"model.name={base}", "task.path=data.jsonl"]
    words += ["train.max_steps=2", "rollout.max_completion_length=6", "rollout.num_generations=2"]
    words += ["rollout.prompts_per_step=3", "model.dtype=float64", "task.reward_file=rewards.py:digits"]

    def run(*more):
        done = subprocess.run([*words, *more], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        said = [line for line in done.stderr.splitlines() if line.startswith("twig: ")]
        return done, said

    done, said = run("--output", "run")
    assert (done.returncode, said) == (0, []), done.stderr
    assert done.stdout.count("2 steps, finished") == 1
    done, said = run("--output", "bad", "task.reward_file=rewards.py:length")
    assert done.returncode != 0
    assert len(said) == 1 and re.search("process 1: reward function 'length'.*ZeroDivisionError", said[0])
    done, said = run("--output", "other", "train.max_step=3")
    assert len(said) == 1 and "train.max_step" in said[0], done.stderr
    done, said = run("--output", "other", "rollout.prompts_per_step=1")
    assert len(said) == 1 and "cannot be shared out among 2 processes" in said[0], done.stderr
    # A launcher may end the first process before it has tidied up: then what is left is no run yet.
    left = {path.name for path in (tmp_path / "other").glob("*")}
    assert left <= {"config.yaml", "environment.json", ".lock"}


# The line


@pytest.fixture
def line():
    """Three ends of the line, as they would be in three processes."""
    listener = Listener.open(LOOPBACK)
    made: dict[int, Lifeline] = {}

    def come(rank):
        made[rank] = connect(LOOPBACK, listener.port, listener.word, rank)

    stranger = socket.create_connection((LOOPBACK, listener.port))
    stranger.sendall(b"a word that is not known 1\n")
    threads = [threading.Thread(target=come, args=(rank,)) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    made[0] = listener.accept(3)
    for thread in threads:
        thread.join()
    assert stranger.recv(1) == b"", "a stranger is turned away"
    stranger.close()
    for lifeline in made.values():
        lifeline._interrupt = lambda: None  # the processes of these tests are threads of one
    yield made
    for lifeline in made.values():
        lifeline._left.set()
        for peer in lifeline.peers.values():
            peer.close()


def test_all_hear_of_a_failure(line):
    failure = Failure(2, 2, "no such column", "Traceback ...")
    teller = threading.Thread(target=line[2].tell, args=(failure,))
    teller.start()
    assert line[0].wait(5) == line[1].wait(5) == failure
    assert str(Ended(failure)) == "process 2: no such column"
    line[0].leave()
    teller.join(5)
    assert not teller.is_alive(), "the one that fails waits for the first to have heard"


def test_all_hear_of_a_failure_of_the_first(line):
    line[0].tell(Failure(0, STOPPED, "stopped"))
    assert [line[rank].wait(5).status for rank in (1, 2)] == [STOPPED, STOPPED]


@pytest.mark.parametrize("dead", [0, 1])
def test_a_death_is_heard_of(line, dead):
    line[dead]._left.set()  # the thread that listens for it does so no more
    for peer in line[dead].peers.values():
        peer.shutdown(socket.SHUT_RDWR)  # as the system does for a process that is gone
    others = {0, 1, 2} - {dead}
    found = [line[rank].wait(5) for rank in others]
    assert all(failure.rank == dead and "without a word" in failure.words for failure in found)


def test_to_leave_is_no_failure(line):
    threads = [threading.Thread(target=line[rank].leave) for rank in (1, 0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [lifeline.failure for lifeline in line.values()] == [None] * 3


def test_code_that_catches_exceptions_does_not_hold_an_end_up():
    assert not issubclass(Ended, Exception)


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
    assert (launched().rank, launched().size, launched().address) == (1, 2, "head")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launched().address == LOOPBACK, "all are on this machine"
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
    assert "twig eval: runs as one process" in capsys.readouterr().err
