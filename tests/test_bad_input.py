"""Wrong input: exit status 2, one line that names the thing and what to write instead, files untouched."""

import os
import subprocess
import sys

import pytest
from saved import save_model

from twig.cli import main
from twig.config import load, recipe_text
from twig.runlog import RunLog

REWARDS = """
def good(completions, **kwargs):
    return [1.0] * len(completions)

def raises(completions, **kwargs):
    return [1 / 0 for text in completions]

def too_few(completions, **kwargs):
    return [1.0]

def words(completions, **kwargs):
    return ["good"] * len(completions)

not_a_function = 3
"""
FILES = {
    "dup.yaml": "model:\n  name: a\n  name: b\n",
    "list.yaml": "- model\n- task\n",
    "text.yaml": "tiny-arithmetic\n",
    "empty.yaml": "",
    "broken.yaml": "model: {name: tiny-arithmetic\n",
    "tab.yaml": "model:\n\tname: tiny-arithmetic\n",
    "two.yaml": "model: {name: x}\n---\nmodel: {name: y}\n",
    "tag.yaml": "model: !!python/object/apply:os.system [touch owned]\n",
    "dotted.yaml": "model.name: tiny-arithmetic\n",
    "scalar.yaml": "model: tiny-arithmetic\ntask: {name: multiplication}\n",
    "unknown.yaml": recipe_text("quickstart").replace("learning_rate", "learning_rat"),
    "group.yaml": recipe_text("quickstart") + "\nmemory:\n  budget: 4GiB\n",
    "number.yaml": recipe_text("quickstart") + "\n3: 4\n",
    "wrong.yaml": recipe_text("quickstart").replace("max_steps: 100", "max_steps: many"),
    "nomodel.yaml": "task: {name: multiplication}\n",
    "notask.yaml": "model: {name: tiny-arithmetic}\n",
    "rewards.py": REWARDS,
    "broken.py": "def good(completions, **kwargs:\n",
    "rhymes.jsonl": '{"prompt": "tree", "rhyme": "ee"}\n' * 20,
    "questions.jsonl": '{"ask": "tree", "rhyme": "ee"}\n' * 20,
    "half.jsonl": '{"prompt": "tree", "rhyme": "ee"}\n{"prompt": "st',
    "photos/cat.png": "cat",
    "nomodel/readme.txt": "no model here",
}

# (words, what the line says). {model} is the folder of a small model; run/ and photos/ are there already.
CASES = [
    # commands and flags
    ("trian quickstart", ["'trian'", "train"]),
    ("train", ["RECIPE_OR_FILE", "--help"]),
    ("train quickstart --outptu x", ["--outptu", "--output"]),
    ("train quickstart --output", ["--output", "argument"]),
    ("train quickstart --train.max_steps=3", ["--train.max_steps", "write train.max_steps=VALUE"]),
    ("train train.max_steps=3", ["train.max_steps=3", "write twig train quickstart train.max_steps=3"]),
    ("eval model.name=x", ["model.name=x", "write twig eval MODEL_OR_RUN"]),
    ("eval", ["MODEL_OR_RUN"]),
    ("eval tiny-arithmetic", ["--task", "multiplication, svamp, gsm8k or custom"]),
    ("eval tiny-arithmetic --task svmp", ["task.name", "'svmp'", "did you mean svamp?"]),
    ("eval tiny-arithmetic --task multiplication --limit many", ["--limit"]),
    ("eval tiny-arithmetic --task multiplication --limit 0", ["eval.limit", "whole number of at least 1"]),
    ("tasks list", ["tasks list", "twig tasks show NAME"]),
    ("tasks show", ["twig tasks show NAME", "multiplication"]),
    ("tasks show multiplicatoin", ["task.name", "did you mean multiplication?"]),
    ("recipes quickstart", ["quickstart"]),
    # recipes and files
    ("train quikstart", ["quikstart", "no such recipe or file", "did you mean quickstart?"]),
    ("train mine.yaml", ["mine.yaml", "no such recipe or file", "quickstart"]),
    ("train photos", ["photos", "a folder without config.yaml"]),
    ("train photos/cat.png", ["photos/cat.png", "not a mapping of groups"]),
    ("train binary.yaml", ["binary.yaml", "not text in UTF-8"]),
    ("train dup.yaml", ["dup.yaml, line 3", "name is set twice", "remove one"]),
    ("train list.yaml", ["list.yaml", "a list is not a mapping of groups", "write groups"]),
    ("train text.yaml", ["text.yaml", "'tiny-arithmetic' is not a mapping of groups"]),
    ("train empty.yaml", ["empty.yaml", "model.name: not set", "write model.name=tiny-arithmetic"]),
    ("train broken.yaml", ["broken.yaml", "not readable as YAML"]),
    ("train tab.yaml", ["tab.yaml, line 2", "not readable as YAML", "\\t"]),
    ("train two.yaml", ["two.yaml", "not readable as YAML", "another document"]),
    ("train tag.yaml", ["tag.yaml", "not readable as YAML", "constructor"]),
    ("train dotted.yaml", ["model.name: unknown setting", "write 'model:' and below it", "'name: ...'"]),
    ("train scalar.yaml", ["model: 'tiny-arithmetic' is not a group", "write for example model.name="]),
    ("train unknown.yaml", ["unknown.yaml", "train.learning_rat:", "did you mean train.learning_rate?"]),
    ("train group.yaml", ["group.yaml", "memory: unknown setting", "the groups are model, lora"]),
    ("train number.yaml", ["number.yaml", "3: unknown setting"]),
    ("train wrong.yaml", ["wrong.yaml", "train.max_steps: 'many'", "whole number", "train.max_steps=100"]),
    ("train nomodel.yaml", ["nomodel.yaml", "model.name: not set"]),
    ("train notask.yaml", ["notask.yaml", "task.name: not set", "task.name=multiplication"]),
    # overrides
    ("train quickstart max_steps", ["override max_steps", "not group.key=value"]),
    ("train quickstart max_steps=3", ["max_steps is not group.key", "write train.max_steps=..."]),
    ("train quickstart =3", ["override =3", "not group.key=value"]),
    ("train quickstart train=3", ["train is not group.key", "train.learning_rate=..."]),
    ("train quickstart train..seed=3", ["train..seed", "write train.seed=..."]),
    (
        "train quickstart train.learning_rat=1e-5",
        ["train.learning_rat:", "did you mean train.learning_rate?"],
    ),
    ("train quickstart train.max_steps.x=1", ["train.max_steps is a value", "write train.max_steps=..."]),
    ("train quickstart train.max_steps=[", ["train.max_steps=[", "not readable as YAML", "quotes"]),
    ("train quickstart train.learning_rate=fast", ["'fast' is not a number above 0"]),
    ("train quickstart train.learning_rate=-1", ["-1 is not a number above 0"]),
    ("train quickstart train.learning_rate=.nan", ["nan is not a number above 0"]),
    ("train quickstart train.max_steps=1e3", ["1000.0", "whole number", "train.max_steps=1000"]),
    ("train quickstart train.max_steps=true", ["true is not a whole number"]),
    ("train quickstart eval.before=yes", ["'yes' is not true or false"]),
    ("train quickstart lora.layers=top", ["lora.layers: 'top'", "last_third, all or a list"]),
    ("train quickstart lora.target_modules=[]", ["lora.target_modules: []", "one or more"]),
    ("train quickstart model.revision=1234", ["1234 is a number, not text", "quotes"]),
    ("train quickstart model.name=", ["model.name: null is not text"]),
    ("train quickstart rollout.num_generations=1", ["1 is not a whole number of at least 2"]),
    ("train quickstart algorithm.name=gspo", ["algorithm.name: 'gspo'", "did you mean grpo?"]),
    ("train quickstart algorithm.unbiased=true", ["algorithm.unbiased", "only by s-grpo"]),
    ("train quickstart task.digits=[3]", ["task.digits: [3]", "a list of 2 whole numbers"]),
    ("train quickstart task.reward_file=rewards.py", ["task.reward_file", "write FILE.py:FUNCTION"]),
    # folders
    ("train quickstart --output run", ["--output run", "holds another run", "--resume"]),
    ("train quickstart --output photos", ["--output photos", "not empty and not a run"]),
    ("train quickstart --output photos/cat.png", ["--output photos/cat.png", "a file, not a folder"]),
    ("train quickstart --output photos/cat.png/run", ["--output photos/cat.png/run"]),
    ("train quickstart --resume", ["--resume", "no run runs/quickstart-N", "write --output DIR"]),
    ("train quickstart --resume --output photos", ["--resume", "photos holds no run"]),
    ("train quickstart --resume --output run train.seed=7", ["train.seed: 7", "write train.seed=0"]),
    ("eval run", ["run", "no adapter yet", "twig train run --resume"]),
    # models
    (
        "train quickstart model.name=./nowhere",
        ["model.name", "./nowhere", "write the folder of a saved model"],
    ),
    ("train quickstart model.name=nomodel", ["model.name", "nomodel has no config.json"]),
    (
        "train quickstart model.name=nobody/nothing",
        ["model.name", "nobody/nothing", "check the name and the network"],
    ),
    ("eval nobody/nothing --task multiplication", ["model.name", "nobody/nothing"]),
    ("tasks show multiplication model.name=nobody/nothing", ["model.name", "nobody/nothing"]),
    ("train quickstart model.name={model} model.device=gpu9", ["model.device", "gpu9", "write cpu or auto"]),
    ("train quickstart model.name={model} lora.target_modules=[c_attn]", ["c_attn", "q_proj"]),
    ("train quickstart model.name={model} lora.layers=[7]", ["lora.layers: 7", "0 to 2"]),
    ("train quickstart model.name={model} rollout.suppress_tokens=[9999]", ["rollout.suppress_tokens: 9999"]),
    # tasks and their data
    ("train quickstart model.name={model} task.eval_size=99999", ["task.eval_size: 99999", "16116"]),
    ("train quickstart model.name={model} task.chat=always", ["task.chat", "no chat template"]),
    ("train quickstart model.name={model} task.prompt_template='{{x}}'", ["task.prompt_template", "{x}"]),
    ("train quickstart task.name=custom", ["task.path: not set", "write task.path=FILE.jsonl"]),
    ("{custom} task.path=nothing.jsonl", ["nothing.jsonl"]),
    ("{custom} task.path=questions.jsonl", ["'prompt'", "ask, rhyme", "task.prompt_column="]),
    ("{custom} task.path=half.jsonl", ["half.jsonl", "2"]),
    ("train quickstart task.name=custom task.path=rhymes.jsonl", ["task.reward_file=FILE.py:FUNCTION"]),
    # reward functions
    ("{custom} task.reward_file=nothing.py:good", ["nothing.py"]),
    ("{custom} task.reward_file=rewards.py:god", ["rewards.py", "god", "good"]),
    ("{custom} task.reward_file=rewards.py:not_a_function", ["not_a_function"]),
    ("{custom} task.reward_file=broken.py:good", ["broken.py", "1"]),
    ("{custom} task.reward_file=rewards.py:raises", ["rewards.py", "6", "ZeroDivisionError", "traceback"]),
    ("{custom} task.reward_file=rewards.py:too_few", ["rewards.py", "too_few", "1"]),
    ("{custom} task.reward_file=rewards.py:words", ["rewards.py", "words", "'good'"]),
    (
        "{custom} task.reward_weights=[1,2]",
        ["task.reward_weights", "2 weights for 1", "one weight per function"],
    ),
]
CUSTOM = (
    "train quickstart --output new model.name={model} task.name=custom task.path=rhymes.jsonl "
    "task.reward_file=rewards.py:good eval.limit=4 rollout.max_completion_length=4"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with FILES, a run and a file that is not text; the current one."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    RunLog.create("run", load("quickstart")).log(1, {"reward": 0.5})
    return tmp_path


def words_of(line, model):
    return [word.strip("'") for word in line.replace("{custom}", CUSTOM).format(model=model).split()]


def snapshot(folder):
    return {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".pyc" not in path.name
    }


def test_there_are_enough_cases_and_none_twice():
    assert len({line for line, _ in CASES}) == len(CASES) >= 90


@pytest.mark.parametrize("line, expected", CASES, ids=[line for line, _ in CASES])
def test_one_line_says_what_is_wrong_and_what_to_write(line, expected, place, model, capsys):
    before = snapshot(place)
    status = main(words_of(line, model))
    shown, said = capsys.readouterr()
    assert (status, shown) == (2, ""), said
    lines = [
        text for text in said.splitlines() if not text.endswith(" ...")
    ]  # less those of the progress display
    assert len(lines) == 1 and lines[0].startswith("twig: "), said
    for word in expected:
        assert word in said
    after = snapshot(place)
    assert {path: after.get(path) for path in before} == before
    new = {path.relative_to(place).as_posix() for path in set(after) - set(before)}
    # Only a reward function's own fault leaves something: the folder with its traceback.
    assert new == set() or "traceback" in said and "new/traceback.txt" in new
    assert not (place / "owned").exists()


def test_a_reward_functions_traceback_is_in_the_run_folder(place, model, capsys):
    words = words_of("{custom} task.reward_file=rewards.py:raises log.progress=quiet", model)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "rewards.py" in said and "line 6" in said or "rewards.py:6" in said
    text = (place / "new" / "traceback.txt").read_text()
    assert "ZeroDivisionError" in text and "1 / 0 for text in completions" in text
    assert main(words) == 2, "the folder does not stop the next try"
    assert "holds another run" not in capsys.readouterr().err


def test_several_unknown_settings_are_still_one_line(place, capsys):
    assert main(["train", "quickstart", "train.a=1", "train.b=2"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_hostile_name_neither_styles_nor_breaks_the_line(place, capsys):
    assert main(["train", "\x1b[31m\nred[bold].yaml"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "\x1b" not in said and "\\x1b[31m red[bold].yaml" in said


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs folders that cannot be written")
def test_a_folder_that_cannot_be_written(place, capsys):
    (place / "locked").mkdir(mode=0o500)
    assert main(["train", "quickstart", "--output", "locked/run"]) == 2
    assert "locked/run: cannot be written (Permission denied)" in capsys.readouterr().err


def test_a_full_disk_is_one_line(place, capsys, monkeypatch):
    def fill(*args, **kwargs):
        raise OSError(28, "No space left on device", "new/checkpoints/x")

    monkeypatch.setattr("twig.loop.train", fill)
    assert main(["train", "quickstart", "--output", "new", "log.progress=quiet"]) == 2
    said = capsys.readouterr().err
    assert "new/checkpoints/x: No space left on device" in said and "free the space" in said


@pytest.mark.parametrize(
    "line, expected",
    [
        ("train quickstart train.learning_rat=1e-5", "did you mean train.learning_rate?"),
        ("train dup.yaml", "name is set twice"),
        ("train quickstart --output run", "holds another run"),
        ("trian", "'train'"),
    ],
)
def test_the_same_from_a_shell(line, expected, place):
    command = [sys.executable, "-m", "twig", *line.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("twig: ") and done.stderr.count("\n") == 1
    assert expected in done.stderr
