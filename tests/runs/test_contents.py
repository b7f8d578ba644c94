"""A run resumes with the settings, code, data and weights that it began with, and says so if it cannot."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from run_folders import write_run
from saved import save_model
from small_runs import EVAL, TRAIN, Heard, small_settings, train_small

import twig
from twig.cli.app import main
from twig.common.errors import UserError
from twig.config.load import load
from twig.core.types import Example
from twig.evaluation.evaluate import problems_checksum
from twig.report.history import read_run
from twig.runs import checkpoint
from twig.runs.contents import load_to_resume, refuse_changed, settings_of
from twig.runs.folder import RunLog
from twig.runs.reader import read_summary
from twig.runs.resume import open_run
from twig.tasks.base import Task, data_checksums
from twig.training.state import RunState

STEPS = 2
SHORT = (f"train.max_steps={STEPS}", "rollout.max_completion_length=5", "train.save_steps=1")
REWARD = "def f(completions, **k):\n    return [float(len(text)) for text in completions]\n"


@pytest.fixture(scope="module")
def begun(base, shared):
    """The folder of a run that trained two steps on rows passed from Python."""
    return shared("begun", lambda path: train_small(small_settings(base, *SHORT), path))


@pytest.fixture
def folder(begun, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(begun, tmp_path / "run"))


@pytest.fixture
def go_on(base, folder):
    """Resumes that copy for a third step; keywords replace the data, words the settings."""

    def resume(*overrides, **given):
        words = [*SHORT, "train.max_steps=3", *overrides]
        return train_small(small_settings(base, *words), folder, resume=True, **given)

    return resume


def refused(action):
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- data


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"train_dataset": [{"prompt": "0*0=", "wanted": "0"}, *TRAIN]}, "the data to train on has changed"),
        ({"train_dataset": [TRAIN[0] | {"wanted": "4"}, *TRAIN[1:]]}, "the data to train on has changed"),
        ({"train_dataset": TRAIN[::-1]}, "the data to train on has changed"),
        ({"eval_dataset": EVAL[1:]}, "the data to evaluate on has changed"),
        ({"eval_dataset": None}, "the data to evaluate on has changed"),
    ],
)
def test_other_data_is_refused(go_on, folder, given, says):
    before = (folder / "metrics.jsonl").read_bytes()
    assert refused(lambda: go_on(**given)).startswith(f"task.path: {says}")
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_the_same_data_is_taken_and_every_checkpoint_has_its_checksums(go_on, base):
    done = go_on(train_dataset=[dict(row) for row in TRAIN])
    assert done.summary["steps"] == 3
    expected = data_checksums(
        Task("t", [Example(r["prompt"], {"wanted": r["wanted"]}) for r in TRAIN], [], ())
    )
    for path in checkpoint.checkpoints(done.folder / "checkpoints"):
        contents = checkpoint.load_state(path)["contents"]
        assert contents["train_data"] == expected["train_data"] != contents["eval_data"]
        assert len(contents["base"]) == 64


def test_values_that_json_has_no_kind_for_are_told_apart():
    import datetime

    def checksum(value):
        return data_checksums(Task("t", [Example("p", {"x": value})], [], ()))["train_data"]

    values = [b"a", b"b", datetime.date(2026, 1, 1), datetime.date(2026, 1, 2), {1, 2}, {1, 3}, 1j, 2j]
    assert len({checksum(value) for value in values}) == len(values)
    assert checksum(object()) == checksum(object())


# ---- the base


def test_another_base_is_refused_and_a_copy_of_the_same_is_taken(go_on, base, tmp_path):
    other = save_model(tmp_path / "other", seed=1)
    assert refused(lambda: go_on(f"model.name={other}")).startswith(
        "model.name: the weights of the base have"
    )
    copy = shutil.copytree(base, tmp_path / "copy")
    heard = Heard()
    done = go_on(f"model.name={copy}", progress=heard)
    assert done.summary["steps"] == 3 and heard.heard("^message model.name: .*copy from here on") == 1


def test_weights_that_are_not_known_prove_nothing():
    settings = load("quickstart")
    begun, commit = {"base": "0" * 64}, {"base": "1" * 40}
    refuse_changed(begun, {"base": None}, settings)
    refuse_changed({}, {"base": "2" * 64}, settings)
    assert refused(lambda: refuse_changed(begun, {"base": None}, settings, ["model.name"]))
    line = refused(lambda: refuse_changed(commit, {"base": "2" * 40}, settings))
    assert f"Set model.revision={'1' * 40}" in line


# ---- paths


@pytest.mark.slow
def test_a_run_is_resumed_and_evaluated_from_another_folder(base, tmp_path, monkeypatch, capsys):
    """The paths are written as seen from there; what they name is the same, so the adapter is too."""
    home, away = tmp_path / "home", tmp_path / "away"
    for place in (home, away):
        place.mkdir()
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*TRAIN, *EVAL]))
    (home / "reward.py").write_text(REWARD)
    shutil.copytree(base, home / "model")
    monkeypatch.chdir(home)
    words = ["task.path=rows.jsonl", "task.reward_file=reward.py:f", "model.name=./model"]
    for name, steps in (("run", 1), ("whole", 2)):
        settings = small_settings("x", *SHORT, *words, f"train.max_steps={steps}")
        twig.train(settings, output=name)
    monkeypatch.chdir(away)
    new = [f"task.path={home}/rows.jsonl", "task.reward_file=../home/reward.py:f", "model.name=../home/model"]
    command = ["train", "../home/run", "--resume", "train.max_steps=2", "log.progress=quiet", *new]
    assert main(command) == 0
    adapters = [home / name / "adapter" / "adapter_model.safetensors" for name in ("run", "whole")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert main(["eval", "../home/run", "log.progress=quiet"]) == 0
    (home / "reward.py").write_text(REWARD + "# changed\n")
    with pytest.raises(UserError, match=r"^task.reward_file: .*reward\.py has changed"):
        twig.train(load("../home/run", ["train.max_steps=3"]), output="../home/run", resume=True)


def test_only_the_place_of_a_function_may_be_written_differently(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    Path("reward.py").write_text(REWARD + "g = f\n")
    given = {"reward_funcs": None}
    settings = partial(small_settings, base, *SHORT, "train.max_steps=1", "eval.before=false")
    train_small(settings("task.reward_file=reward.py:f"), "run", **given)
    line = refused(
        lambda: train_small(settings("task.reward_file=./reward.py:g"), "run", resume=True, **given)
    )
    assert line.startswith("task.reward_file: './reward.py:g' here, but the run began with 'reward.py:f'")
    start = open_run(settings(f"task.reward_file={tmp_path}/reward.py:f"), "run", True, Heard())
    start.log.close()
    assert start.changed == ("task.reward_file",)


# ---- settings


def results(settings):
    return {key: value for key, value in settings.flat().items() if not key.startswith("log.")}


def test_a_config_that_is_cut_anywhere_is_refused_or_says_the_same(folder):
    """Where nothing but the display is lost, it may be read."""
    whole, path = (folder / "config.yaml").read_bytes(), folder / "config.yaml"
    expected = load(str(folder))
    for end in range(0, len(whole), 61):
        path.write_bytes(whole[:end])
        try:
            actual = load(str(folder))
        except UserError:
            continue
        assert results(actual) == results(expected), end
    path.write_bytes(whole[: whole.index(b"\ntrain:") + 1])
    assert "config.yaml: damaged: it has no group" in refused(lambda: load(str(folder)))


@pytest.mark.parametrize("content", [b"", b"\xff", b"train: [", b"model:\n  name: x\n"])
def test_the_checkpoint_stands_in_for_a_damaged_config(folder, caplog, content):
    expected = load(str(folder))
    (folder / "config.yaml").write_bytes(content)
    settings = load_to_resume(str(folder), ["train.max_steps=3"])
    assert settings.train.max_steps == 3
    assert results(settings) == results(expected) | {"train.max_steps": 3}
    assert len(caplog.messages) == 1 and "config.yaml" in caplog.text
    log = RunLog.open(folder)
    log.close()
    assert log.settings == expected == settings_of(folder)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("  seed: 0", "  seed: 3", "train.seed"),
        ("learning_rate: 0.05", "learning_rate: 0.5", "train.learning_rate"),
        ("  r: 16", "  r: 8", "lora.r"),
    ],
)
def test_an_edited_config_is_refused_where_it_changes_results(folder, old, new, key):
    path = folder / "config.yaml"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    line = refused(lambda: open_run(load_to_resume(str(folder)), folder, True, Heard()))
    assert line.startswith(f"{key}: ") and "but the run began with" in line


def test_an_edit_that_changes_no_result_is_said(folder):
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("max_steps: 2", "max_steps: 5"))
    heard = Heard()
    open_run(load_to_resume(str(folder)), folder, True, heard).log.close()
    assert heard.heard("^message train.max_steps: 5 from here on, it was 2") == 1


@pytest.mark.slow
def test_a_run_with_half_a_config_resumes_as_it_began(base, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path("reward.py").write_text(REWARD)
    Path("rows.json").write_text(json.dumps({"train": TRAIN, "test": EVAL}))
    words = [f"model.name={base}", "task.name=custom", "task.path=rows.json", "task.reward_file=reward.py:f"]
    words += [*SHORT, "rollout.num_generations=2", "rollout.prompts_per_step=2", "log.progress=quiet"]
    assert main(["train", "quickstart", "--output", "run", *words]) == 0
    config = Path("run/config.yaml")
    whole = config.read_bytes()
    config.write_bytes(whole[: len(whole) // 2])
    assert main(["train", "run", "--resume", "train.max_steps=4"]) == 0
    assert (read_summary(Path("run")) or {})["steps"] == 4
    assert load("run").with_overrides(["train.max_steps=2"]) == load_to_resume("run", ["train.max_steps=2"])
    assert "run/config.yaml: damaged" in caplog.text
    after = config.read_bytes()
    config.write_bytes(b"")  # of a run with nothing left to do
    assert main(["train", "run", "--resume"]) == 0
    assert config.read_bytes() == after


# ---- accuracies


def test_accuracies_over_other_problems_are_not_compared(go_on):
    done = go_on("eval.limit=2")
    assert done.summary["accuracy_before"] is None and done.summary["accuracy_after"]["n"] == 2
    assert done.summary["accuracy_best"]["n"] == 2


def test_the_best_is_the_best_of_the_same_problems():
    state = RunState()
    assert not state.add_evaluation({"value": 0.9, "n": 1000})
    state.step = 1
    assert state.add_evaluation({"value": 0.8, "n": 1000})
    assert state.before == {"value": 0.9, "n": 1000}
    state.step = 2
    assert state.add_evaluation({"value": 0.1, "n": 10})
    assert state.before is None and state.best == {"value": 0.1, "n": 10, "step": 2}


def test_a_report_leaves_out_points_of_other_problems(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("one", "two")]
    assert [row["step"] for row in read_run(folders[0]).evals] == [20]
    log = RunLog(folders[0], load("quickstart"))
    for step, problems in ((20, "sha256:1"), (40, "sha256:2")):
        log.save_evaluation(step, {"problems": problems, "right": "1", "answered": None})
    run = read_run(folders[0])
    assert run.evals == [] and run.problems == "sha256:2"


def test_what_a_problem_is_judged_by_is_part_of_it():
    rows = [{"prompt": "a", "rhyme": "ee"}, {"prompt": "a", "rhyme": "ar"}]
    assert len({problems_checksum([Example(row["prompt"], row)]) for row in rows}) == 2
    answers = [{"answer": "1", "note": "x"}, {"answer": "1", "note": "y"}]
    assert len({problems_checksum([Example("a", row)]) for row in answers}) == 1
