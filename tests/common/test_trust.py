"""What others wrote is never obeyed: hostile text on a terminal, whose code runs, and secrets."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pyarrow import parquet
from rich.console import Console
from saved import save_model

import twig
from twig.cli.app import main
from twig.cli.display import show_run
from twig.cli.train import _run_name
from twig.common.errors import UserError
from twig.common.redact import environment_secrets, hidden, without_secrets
from twig.config.load import load
from twig.report.progress import showing
from twig.runs.folder import RunLog

TITLE, BLINK, LINK, TURN = "\x1b]0;owned\x07", "\x1b[5m", "\x1b]8;;http://owned\x07", "\u202e"
HOSTILE = f"{TITLE}{BLINK}{LINK}{TURN}\x00\ud800[/][link=http://owned]x[/link]<b>y</b>\n\rend"
SECRETS = {
    "HF_TOKEN": "hf_thisisnotarealtokenatall",
    "WANDB_API_KEY": "0123456789abcdef0123",
    "AWS_ACCESS_KEY_ID": "AKIANOTAREALKEY12345",
    "AWS_SECRET_ACCESS_KEY": "not/a+real\"key'at=all",
    "MY_SERVICE": "ghp_alsonotarealtoken",
}


def is_harmless(text):
    """Whether nothing in what a terminal got steers it (rich's own colours and cursor moves are no harm)."""
    return not any(code in text for code in (TITLE, "\x1b]", BLINK, TURN, "\x00", "\x07", "\ud800"))


class Terminal:
    """A pseudo-terminal; `shown` is what was written to it."""

    def __enter__(self):
        self.master, slave = os.openpty()
        self.file, self.parts = os.fdopen(slave, "w"), []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        return self

    def _read(self):
        while True:
            try:
                part = os.read(self.master, 65536)
            except OSError:  # the other end is closed
                return
            if not part:
                return
            self.parts.append(part)

    def __exit__(self, *error):
        self.file.close()
        self.reader.join(10)
        os.close(self.master)
        self.shown = b"".join(self.parts).decode()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings_of(model, **task):
    return {
        "model": {"name": str(model)},
        "task": {"name": "custom", **task},
        "rollout": {"max_completion_length": 4, "prompts_per_step": 2, "num_generations": 2},
        "train": {"max_steps": 1},
        "log": {"completions_steps": 1},
    }


def rewarded(completions, **columns):
    return [float(number) for number, _ in enumerate(completions)]


# ---- the terminal


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("kind", ["live", "plain", "quiet"])
def test_hostile_text_does_nothing_to_a_terminal(kind):
    result = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    with Terminal() as terminal:
        console = Console(file=terminal.file, force_terminal=True, width=200)
        with showing(kind, console) as progress:
            progress.phase(HOSTILE, 10)
            progress.message(HOSTILE)
            progress.message("x" * 2**20 + TITLE)
            progress.notice(HOSTILE)
            progress.step(1, 2, {"reward": 0.5, "tokens/sampled": 3, "time/step": 0.1, HOSTILE: HOSTILE})
            progress.evaluation(HOSTILE, result)
        figures = dict.fromkeys(("tokens_sampled", "tokens_selected", "steps", "seconds"), 1)
        names = {"algorithm": HOSTILE, "task": HOSTILE, "status": HOSTILE, "accuracy_after": result}
        show_run(console, Path("runs") / TITLE, figures | names)
    assert is_harmless(terminal.shown)
    assert "\\x1b]0;owned\\x07" in terminal.shown
    assert "[/][link=http://owned]x[/link]<b>y</b>" in terminal.shown
    assert len(terminal.shown) < 100_000


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.slow
@pytest.mark.parametrize("progress", ["live", "plain"])
def test_a_whole_run_on_hostile_data_on_a_terminal(progress, model, place):
    rows = [{"prompt": HOSTILE, "note": HOSTILE}, {"prompt": "1 [/] " * 20, "note": "\x1b[2J"}] * 5
    Path("data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = f"\x1b[5m{TITLE}[b].yaml"
    settings = settings_of(model, path="data.jsonl", reward_file="rewards.py:good")
    Path(name).write_text(json.dumps(settings | {"log": {"completions_steps": 1, "progress": progress}}))
    for body, status in (
        ("return [0.0, 1.0] * (len(completions) // 2)", 0),
        ("raise ValueError(note[0])", 2),
    ):
        Path("rewards.py").write_text(f"def good(completions, note, **columns):\n    {body}\n")
        with Terminal() as terminal:
            command = [sys.executable, "-m", "twig", "train", name]
            done = subprocess.run(command, stdout=terminal.file, stderr=terminal.file, timeout=600)
        assert done.returncode == status, terminal.shown
        assert is_harmless(terminal.shown)
        assert "running the Python file" in terminal.shown
    assert "\\x1b]0;owned\\x07" in terminal.shown, "the reward's message, written out"
    assert all(path.name.isprintable() for path in Path("runs").rglob("*"))
    (file,) = Path("runs").rglob("step-1.parquet")
    assert len(parquet.read_table(file)) == 4


def test_a_run_is_named_without_control_characters(place):
    assert _run_name(f"{TITLE}x.yaml") == "0_owned_x"
    assert _run_name("../my run.yml") == "my_run"


def test_showing_a_task_of_hostile_text(place, capsys):
    rows = [{"prompt": HOSTILE, "answer": "5"}, {"prompt": HOSTILE + "x" * 2**20, "answer": "5"}]
    for row in rows:
        Path("data.jsonl").write_text(json.dumps(row) + "\n")
        assert main(["tasks", "show", "custom", "task.path=data.jsonl"]) == 0
        shown = capsys.readouterr().out
        assert (
            is_harmless(shown) and "\\x1b]0;owned" in shown and "[/][link=" in shown and len(shown) < 50_000
        )


# ---- whose code runs


def test_the_path_of_a_reward_file_is_shown_before_it_runs(model, place, capfd):
    Path("data.jsonl").write_text('{"prompt": "tree"}\n' * 5)
    code = "import sys\nprint('it runs', file=sys.stderr)\ndef good(completions, **columns):\n    return []\n"
    Path("rewards.py").write_text(code)
    task = ["task.path=data.jsonl", "task.reward_file=rewards.py:good"]
    for command in (
        ["train", "custom", "--output", "run", f"model.name={model}", "log.progress=quiet", *task],
        ["eval", str(model), "--task", "custom", "log.progress=plain", *task],
        ["tasks", "show", "custom", *task],
    ):
        main(command)
        said = capfd.readouterr().err
        path = str((place / "rewards.py").resolve())
        assert f"running the Python file {path}" in said, said
        assert said.index(path) < said.index("it runs")
    main(["plan", "quickstart", "task.name=custom", *task])
    assert "it runs" not in capfd.readouterr().err, "a plan needs no rewards"


def test_a_run_goes_on_only_with_the_reward_file_that_it_began_with(model, place, capfd):
    good = "def good(completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    Path("rewards.py").write_text(good)
    rows = [{"prompt": "tree"}] * 4
    settings = settings_of(model, reward_file="rewards.py:good")
    settings["log"]["progress"] = "quiet"
    twig.train(settings, train_dataset=rows, output="run")
    assert "running the Python file" in capfd.readouterr().err, "also where nobody watches"
    environment = json.loads(Path("run/environment.json").read_text())
    assert environment["reward_file_sha256"] == hashlib.sha256(good.encode()).hexdigest()
    settings["train"]["max_steps"] = 2
    Path("rewards.py").write_text(f"open('owned', 'w')\n{good}")
    with pytest.raises(UserError, match=r"^task.reward_file: .*rewards\.py has changed"):
        twig.train(settings, train_dataset=rows, output="run", resume=True)
    assert not Path("owned").exists()
    Path("rewards.py").write_text(good)
    assert twig.train(settings, train_dataset=rows, output="run", resume=True).summary["steps"] == 2


def test_a_model_that_may_run_its_own_code_is_announced(model, place, capsys):
    command = ["eval", str(model), "--task", "multiplication", "task.digits=[2,1]", "--limit", "1"]
    command += ["rollout.max_completion_length=2", "log.progress=quiet"]
    assert main(command) == 0
    assert "own Python code" not in capsys.readouterr().err
    assert main([*command, "model.trust_remote_code=true"]) == 0
    said = capsys.readouterr().err
    assert (
        said
        == f"warning: {model} may run its own Python code on this machine (model.trust_remote_code=true)\n"
    )


# ---- secrets


@pytest.fixture
def secrets(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return list(SECRETS.values())


def contents(folder):
    """Everything in a folder as text, the tables of Parquet files too."""
    texts = {}
    for path in folder.rglob("*"):
        if path.suffix == ".parquet":
            rows = parquet.read_table(path).to_pylist()
            texts[path] = repr(rows) + "".join(t for row in rows for t in row.get("tokens") or ())
        elif path.is_file():
            texts[path] = path.read_bytes().decode("utf-8", "replace")
    return texts


def test_what_is_a_secret(secrets, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "not-a-secret")
    monkeypatch.setenv("MY_TOKEN", "short")
    assert set(SECRETS) <= set(environment_secrets())
    assert {"TOKENIZERS_PARALLELISM", "MY_TOKEN", "HOME", "PATH"}.isdisjoint(environment_secrets())
    for value in secrets:
        assert value not in str(without_secrets({value: [value, {"a": f"x{value}y"}]}))
    assert hidden("for sk-0123456789abcdefgh") == "for (removed)"
    token = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl"
    for text in ("Bearer {}", "a.b12345678.{}", "key={}", "(session-{})"):
        assert token not in hidden(text.format(token)) and "eyJ" not in hidden(text.format(token))
    assert hidden("eyJustAWord.and another") == "eyJustAWord.and another"


@pytest.mark.parametrize(
    "text", ["eyJ-", "eyJ-abcdefgh", "eyJabcdefgh.", "eyJ-abcdefgh.", "sk-", "://", "/a"]
)
def test_hiding_takes_time_in_proportion_to_the_text(text):
    """Of 16 times as much text: in proportion it takes 16 times as long, and a square would be 256 times."""

    def seconds(number):
        began = time.process_time()
        hidden(text * number)
        return time.process_time() - began

    short, long = (min(seconds(number) for _ in range(5)) for number in (2_000, 32_000))
    assert long < 100 * max(short, 1e-4)


def test_no_secret_of_the_environment_is_in_a_run_folder(model, place, secrets):
    rows = [{"prompt": f"say {value} please", "token": value} for value in secrets]

    def careless(completions, token, log_metric, **columns):
        log_metric(token[0], 1.0)
        return rewarded(completions)

    settings = settings_of(model)
    settings["rollout"]["prompts_per_step"] = len(rows)
    twig.train(settings, reward_funcs=careless, train_dataset=rows, output="run")
    log = RunLog.open("run")
    log.warn(f"refused: {' '.join(secrets)}")
    row = {"prompt": secrets[0], "completion": f"it is {secrets[1]}", "token_ids": [7, 8]}
    log.save_completions(2, [row | {"tokens": ["it is ", secrets[1]]}])
    texts = contents(place / "run")
    assert len(texts) >= 8
    assert "it is (removed)" in texts[place / "run" / "completions" / "step-2.parquet"]
    assert "(removed)" in texts[place / "run" / "metrics.jsonl"], "the name of a metric"
    for value in secrets:
        assert [path for path, text in texts.items() if value in text] == []


def test_no_secret_is_in_the_traceback_of_a_reward(model, place, secrets, capsys):
    Path("data.jsonl").write_text('{"prompt": "tree"}\n' * 5)
    code = "import os\ndef bad(completions, **columns):\n"
    code += f"    raise ValueError(' '.join(os.environ[name] for name in {list(SECRETS)}))\n"
    Path("rewards.py").write_text(code)
    Path("my.yaml").write_text(
        json.dumps(settings_of(model, path="data.jsonl", reward_file="rewards.py:bad"))
    )
    assert main(["train", "my.yaml", "--output", "run", "log.progress=quiet", "eval.before=false"]) == 2
    said = capsys.readouterr().err
    assert "(removed)" in said and "(removed)" in Path("run/traceback.txt").read_text()
    for value in secrets:
        assert value not in said
        assert [path for path, text in contents(place / "run").items() if value in text] == []


def test_a_setting_that_holds_a_secret_is_refused(place, secrets):
    settings = load("quickstart", [f"task.system_prompt=use {SECRETS['HF_TOKEN']} here"])
    with pytest.raises(UserError, match="^task.system_prompt: .*HF_TOKEN"):
        RunLog.create("run", settings)
    assert not Path("run").exists()
