"""The command line: what each command shows, how a run stops and goes on, what a display says."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from rich.console import Console
from run_folders import write_run
from saved import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from twig.cli.app import main
from twig.cli.display import clean
from twig.common.progress import Progress
from twig.config.load import load
from twig.report.progress import LiveProgress, PlainProgress, showing
from twig.runs.folder import RunLog
from twig.runs.reader import read_metrics, read_summary
from twig.runtime.machine import gpu_warning, has_nvidia_gpu

SMALL = (
    "eval.limit=20 rollout.max_completion_length=8 rollout.num_generations=4 rollout.prompts_per_step=2 "
    "log.progress=plain"
).split()
EVALUATION = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 100}
METRICS = {
    "reward": 0.25,
    "answers/right": 0.5,
    "tokens/sampled": 2000,
    "tokens/selected": 50,
    "time/step": 0.5,
}
SUMMARY = {
    "schema_version": 1,
    "status": "finished",
    "algorithm": "t-spmo",
    "task": "multiplication",
    "steps": 100,
    "accuracy_before": EVALUATION,
    "accuracy_after": {"value": 0.96, "low": 0.94, "high": 0.97, "n": 1000},
    "tokens_sampled": 1_234_567,
    "tokens_selected": 12_345,
    "seconds": 58.2,
}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def twig(capsys):
    """Runs a command line; gives its exit status, stdout and stderr."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


# Commands that only show


def test_no_words_is_help(twig):
    assert twig() == twig("--help")
    status, shown, _ = twig("train", "--help")
    assert status == 0
    for word in ("RECIPE_OR_FILE", "[GROUP.KEY=VALUE]...", "--output", "--resume", "--dry-run"):
        assert word in shown


def test_version(twig):
    import twig as package

    assert twig("--version") == (0, f"twig {package.__version__}\n", "")


def test_a_dry_run_prints_settings_that_can_be_loaded(twig, tmp_path):
    status, shown, _ = twig("train", "quickstart", "--dry-run", "train.learning_rate=1e-5")
    (tmp_path / "mine.yaml").write_text(shown)
    assert status == 0
    assert load("mine.yaml") == load("quickstart", ["train.learning_rate=1e-5"])
    assert not (tmp_path / "runs").exists()


def test_recipes_and_tasks_are_listed(twig):
    status, shown, _ = twig("recipes")
    assert status == 0 and "\nquickstart " in shown
    status, shown, _ = twig("tasks")
    assert status == 0
    assert [line.split()[0] for line in shown.splitlines()] == ["multiplication", "svamp", "gsm8k", "custom"]


def test_a_task_is_shown_as_the_model_sees_it(twig):
    status, shown, _ = twig("tasks", "show", "multiplication")
    lines = shown.splitlines()
    prompt = next(line for line in lines if "*" in line)
    a, b = map(int, prompt.removesuffix("=").split("*"))
    assert status == 0
    assert f"#{a * b}" in lines
    assert "Its score: 1 (answer found, right)" in lines
    assert _rewards_shown(shown) == [["1"] * 3, ["0"] * 3]


def test_a_task_is_shown_through_a_models_tokenizer(twig, model):
    status, shown, _ = twig("tasks", "show", "multiplication", f"model.name={model}")
    assert status == 0 and "right" in shown


@pytest.mark.parametrize("name", ["svamp", "gsm8k"])
def test_a_task_with_data_is_shown(twig, test_data, name):
    status, shown, _ = twig("tasks", "show", name, f"task.path={test_data / name}")
    assert status == 0
    assert "\n#### " in shown and "Its score: 1 (answer found, right)\n" in shown
    assert _rewards_shown(shown) == [["1"] * 3, ["0"] * 3]


def test_a_task_that_cannot_tell_what_is_right_says_so(twig, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "rhyme with tree \\u001b[31m"}\n' * 5)
    (tmp_path / "rewards.py").write_text(
        "def one(completions, **kwargs):\n    return [1.0] * len(completions)\n"
    )
    arguments = ("task.path=data.jsonl", "task.reward_file=rewards.py:one")
    status, shown, _ = twig("tasks", "show", "custom", *arguments)
    assert status == 0
    assert "rhyme with tree \\x1b[31m" in shown
    assert "reward functions" in shown
    assert _rewards_shown(shown) == [["1"] * 1]


@pytest.mark.parametrize(
    "reward, right, empty, advice",
    [
        ("float(c == a)", "1", "0", ""),
        ("float(c == '#### ' + a)", "1", "0", ""),
        ("0.5 * (c == a)", "0.5", "0", "set task.correct_at=0.5"),
        ("float(len(c) > 99)", "0", "0", "see that it reads"),
        ("None if c else 1.0", "none", "1", "see that it reads"),
    ],
)
def test_a_task_is_shown_with_the_users_rewards(twig, tmp_path, reward, right, empty, advice):
    rows = [{"prompt": f"{n} letters", "answer": "x" * n} for n in range(2, 50)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    body = f"return [{reward} for c, a in zip(completions, answer)]"
    (tmp_path / "rewards.py").write_text(f"def one(completions, answer, **kwargs):\n    {body}\n")
    arguments = ("task.path=data.jsonl", "task.reward_file=rewards.py:one")
    status, shown, _ = twig("tasks", "show", "custom", *arguments)
    assert status == 0
    shown_right, shown_empty = _rewards_shown(shown)
    assert {*shown_right} == {right} and {*shown_empty} == {empty}
    assert advice in shown and ("task.correct_at" in shown) == ("correct_at" in advice)


def _rewards_shown(text):
    """Returns the numbers in each line of rewards."""
    lines = [line.rpartition(": ")[2] for line in text.splitlines() if line.startswith("Reward of ")]
    return [line.split(", ") for line in lines]


def test_the_prompt_that_is_trained_is_shown(twig, tmp_path, base):
    """From a recipe, from a YAML file, and from the folder of a run: what `twig train` takes."""
    row = {"question": "How many legs do 12 spiders have?", "answer": "96"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    status, shown, errors = twig("tasks", "show", "custom", "task.path=data.jsonl")
    assert status == 0 and f"{row['question']}\n\nThink step by step" in shown
    assert "without the chat template of Qwen/Qwen2.5-0.5B-Instruct" in errors
    settings = load(
        "custom", ["task.path=data.jsonl", f"model.name={base}", "task.prompt_template=Q {question} A"]
    )
    (tmp_path / "mine.yaml").write_text(settings.to_yaml())
    RunLog.create(tmp_path / "run", settings).close()
    for source in ("mine.yaml", "run"):
        status, shown, errors = twig("tasks", "show", source)
        assert status == 0 and f"Q {row['question']} A\n" in shown and not errors


def test_chat_data_over_a_template_says_the_way_out(twig, tmp_path, base):
    rows = [{"prompt": [{"role": "user", "content": f"{i}+1"}], "answer": str(i + 1)} for i in range(5)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ("tasks", "show", "custom", "task.path=data.jsonl", "model.name=model")
    status, _, errors = twig(*words)
    assert status == 2 and errors.endswith("Set task.prompt_template=null.\n")
    status, shown, _ = twig(*words, "task.prompt_template=null")
    assert status == 0 and "+1" in shown


def test_a_run_in_place_of_a_recipe_says_that_a_new_one_begins(twig, tmp_path, monkeypatch):
    from twig.cli import train

    write_run(tmp_path / "runs" / "quickstart-1")
    monkeypatch.setattr(train, "_train", lambda *_: {"status": "finished"})
    monkeypatch.setattr(train, "_show", lambda *_: None)
    status, _, errors = twig("train", "runs/quickstart-1")
    assert status == 0
    assert "a new run, runs/quickstart-1-1, with the settings of runs/quickstart-1" in errors
    assert "twig train runs/quickstart-1 --resume" in errors


def test_env_shows_versions_device_and_memory(twig):
    status, shown, _ = twig("env")
    assert status == 0
    for name in ("twig", "python", "torch", "transformers", "peft", "platform", "memory", "device"):
        assert f"\n{name} " in f"\n{shown}"


@pytest.mark.parametrize(
    "cuda, hip, usable, nvidia, expected",
    [
        (
            None,
            None,
            False,
            True,
            "CPU build; install a CUDA build: https://pytorch.org/get-started/locally/",
        ),
        ("12.6", None, False, True, "cannot use it"),
        ("12.6", None, True, True, None),
        (None, None, False, False, None),
        (None, "6.2", True, False, None),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_warned_of(cuda, hip, usable, nvidia, expected):
    warning = gpu_warning(cuda, hip, usable, nvidia)
    assert warning is None if expected is None else expected in warning


def test_a_driver_is_an_nvidia_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert has_nvidia_gpu(driver=tmp_path)
    assert not has_nvidia_gpu(driver=tmp_path / "none")


# A run


def test_a_run_from_start_to_evaluation(twig, model):
    status, shown, progress = twig("train", "quickstart", f"model.name={model}", "train.max_steps=3", *SMALL)
    assert (status, "Traceback" in progress) == (0, False)
    for line in ("before ", "after ", "tokens ", "seconds ", "folder ", "next "):
        assert f"\n{line}" in shown
    assert "step 3/3" in progress and "\nbefore: " in shown, "and answers before and after"
    summary = read_summary(RunLog.open("runs/quickstart-1").folder)
    assert (summary["status"], summary["steps"], summary["algorithm"]) == ("finished", 3, "t-spmo")
    assert summary["accuracy_after"]["n"] == 20 and summary["predicted_peak_bytes"] > 0

    again = twig("train", "quickstart", "--resume", f"model.name={model}", "train.max_steps=3", *SMALL)
    assert again == (0, shown, ""), "a finished run is shown again, without work"
    assert twig("train", "runs/quickstart-1", "--resume") == (0, shown, "")

    status, shown, _ = twig("eval", "runs/quickstart-1", "--limit", "5", "log.progress=quiet")
    assert status == 0 and shown.splitlines()[1].split()[-1] == "5"
    for arguments in (("runs/quickstart-1/adapter",), (model,)):
        arguments += ("--task", "multiplication", "--limit", "5", "rollout.max_completion_length=8")
        assert twig("eval", *arguments)[0] == 0


def test_a_finished_run_goes_on_where_more_steps_are_asked_for(twig, model):
    arguments = ("train", "quickstart", "--output", "run", f"model.name={model}", *SMALL)
    assert twig(*arguments, "train.max_steps=2")[0] == 0
    assert twig(*arguments, "--resume", "train.max_steps=4")[0] == 0
    assert read_summary(RunLog.open("run").folder)["steps"] == 4


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(twig, tmp_path):
    status, _, said = twig("train", "quickstart", "model.name=./nowhere", "log.progress=quiet")
    assert status == 2 and said.startswith("twig: ")
    assert not list(tmp_path.glob("runs/*"))


def test_the_task_of_a_run_may_be_replaced(twig, model, test_data):
    twig("train", "quickstart", "--output", "run", f"model.name={model}", "train.max_steps=1", *SMALL)
    arguments = ("--task", "svamp", f"task.path={test_data / 'svamp'}", "--limit", "2", "log.progress=quiet")
    status, shown, _ = twig("eval", "run", *arguments)
    assert status == 0 and shown.splitlines()[1].startswith("svamp ")


def command(*arguments):
    return [sys.executable, "-m", "twig", *map(str, arguments)]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send to one process")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stopped_run_is_saved_and_says_how_to_go_on(twig, model, name):
    arguments = (
        "train",
        "quickstart",
        "--output",
        "run",
        f"model.name={model}",
        "train.max_steps=1000000",
        *SMALL,
    )
    with subprocess.Popen(
        command(*arguments), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        for line in run.stderr:
            if line.startswith("step 1/"):
                break
        run.send_signal(getattr(signal, name))
        shown, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert said.splitlines()[-1].endswith("twig train run --resume")
    assert "stopped" in shown
    steps = read_summary(RunLog.open("run").folder)["steps"]
    status, _, said = twig("train", "run", "--resume", f"train.max_steps={steps + 2}")
    assert status == 0
    assert f"from step {steps}" in said
    assert [row["step"] for row in read_metrics(RunLog.open("run").folder)] == list(range(1, steps + 3))


def test_ctrl_c_before_the_first_step_leaves_no_folder(twig, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("twig.training.train.train", interrupt)
    assert twig("train", "quickstart") == (130, "", "twig: stopped before the first step\n")
    assert not list(tmp_path.glob("runs/*"))


def test_a_fault_of_ours_has_a_traceback_and_status_1(twig, monkeypatch):
    def break_down(*args, **kwargs):
        raise IndexError("list index out of range")

    monkeypatch.setattr("twig.training.train.train", break_down)
    status, _, said = twig("train", "quickstart")
    assert status == 1
    assert "Traceback" in said and said.splitlines()[-1].startswith("twig: this is a fault in Twig")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_a_reader_that_has_enough_is_no_fault():
    done = subprocess.run(
        f"{sys.executable} -m twig train quickstart --dry-run | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("model:\n", "")
    assert done.returncode in (0, 141)


# What a person sees


def test_the_result_shows_accuracy_tokens_time_and_the_next_step():
    from pathlib import Path

    from twig.cli.display import show_run

    out = io.StringIO()
    show_run(Console(file=out, width=80), Path("runs/my run"), SUMMARY)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[0].split() == ["right", "95", "%", "interval", "problems"]
    assert lines[1].split() == ["before", "50.0", "%", "40.0", "to", "60.0", "%", "100"]
    assert lines[2].split() == ["after", "96.0", "%", "94.0", "to", "97.0", "%", "1000"]
    assert "change   +46.0 points" in lines
    assert "tokens   1,234,567 sampled, 12,345 trained (1.0 %)" in lines
    assert lines[-1] == "next     twig eval 'runs/my run' --limit 100"


def drive(progress: Progress):
    progress.phase("loading")
    progress.phase("evaluating", 100)
    progress.advance(100)
    progress.evaluation("before", EVALUATION)
    for step in (1, 2):
        progress.phase("sampling", 128)
        progress.phase("updating", 3)
        progress.advance()
        progress.step(step, 2, METRICS)
    progress.message("a \x1b[31mred\nname [bold]")
    progress.done(SUMMARY)


def test_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    with showing("auto", Console(file=out)) as progress:
        assert isinstance(progress, PlainProgress)
        drive(progress)
    speed = "4.0k tokens/s, 0:00 left"
    assert out.getvalue().splitlines() == [
        "loading ...",
        "evaluating 100 problems ...",
        "before: 50.0 % right of 100 (95 % interval 40.0 to 60.0 %)",
        f"step 1/2, reward 0.250, right 50.0 %, 2.0k tokens sampled, 50 trained (2.5 %), {speed}",
        f"step 2/2, reward 0.250, right 50.0 %, 4.0k tokens sampled, 100 trained (2.5 %), {speed}",
        "a \\x1b[31mred name [bold]",
    ]


def test_a_live_display_on_a_terminal():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None, _environ={"TERM": "xterm"})
    with showing("auto", console) as progress:
        assert isinstance(progress, LiveProgress)
        drive(progress)
    shown = out.getvalue()
    for text in (
        "before: 50.0 % right of 100",
        "step 2/2",
        "0:00 left",
        "last evaluation 50.0 %",
        "4.0k tokens sampled, 100 trained (2.5 %), 4.0k tokens/s",
        "a \\x1b[31mred name [bold]",
    ):
        assert text in shown
    assert "\x1b[31m" not in shown, "text from outside never steers the terminal"


@pytest.mark.parametrize("kind", ["plain", "live"])
def test_after_a_resume_tokens_are_counted_on(kind):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None, _environ={"TERM": "xterm"})
    with showing(kind, console) as progress:
        progress.resumed({"tokens_sampled": 6000, "tokens_selected": 150, "nodes_run": 1, "seconds": 2.0})
        drive(progress)
    assert "10.0k tokens sampled, 250 trained (2.5 %)" in out.getvalue()


def test_a_dumb_terminal_gets_plain_lines():
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    with showing("auto", console) as progress:
        assert isinstance(progress, PlainProgress)


def test_quiet_says_nothing(capsys):
    with showing("quiet") as progress:
        drive(progress)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\tb\n", "a\tb\n"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\u202eabc", "\\u202eabc"),
        ("ä漢", "ä漢"),
    ],
)
def test_text_from_outside_is_cleaned(text, shown):
    assert clean(text) == shown


def test_a_summary_is_valid_json_for_other_programs(twig, model):
    twig("train", "quickstart", "--output", "run", f"model.name={model}", "train.max_steps=1", *SMALL)
    summary = json.loads((RunLog.open("run").folder / "summary.json").read_text())
    keys = set(SUMMARY) | {"nodes_run", "peak_memory_bytes", "predicted_peak_bytes"}
    assert keys <= set(summary)
