"""Trackers get the rows of metrics.jsonl; one that is missing or does not start is one line, at once."""

import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from saved import save_model

import twig
from twig.cli.app import main
from twig.common.errors import UserError
from twig.config.load import Settings, load
from twig.runs.reader import read_metrics
from twig.runs.trackers import reporting


def digits(completions, **kwargs):
    return [sum(c.isdigit() for c in text) for text in completions]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def settings(base):
    """Settings of two steps with an evaluation between them, reported to the trackers named."""

    def make(*names):
        values = {
            "model": {"name": str(base)},
            "task": {"name": "custom"},
            "rollout": {"num_generations": 2, "prompts_per_step": 1, "max_completion_length": 4},
            "train": {"max_steps": 2, "save_steps": 1},
            "eval": {"steps": 1},
            "log": {"report_to": list(names)},
        }
        return Settings.from_dict(values)

    return make


DATA = {"train_dataset": [{"prompt": "1+1="}], "eval_dataset": [{"prompt": "2+2="}], "reward_funcs": digits}


@pytest.fixture
def fake(monkeypatch):
    """Stands in for wandb and trackio; keeps what it was seen."""
    seen = SimpleNamespace(begun=[], rows=[], ended=0)

    class Run:
        def log(self, row, step):
            seen.rows.append((step, row))

        def finish(self):
            seen.ended += 1

    def init(**given):
        seen.begun.append(given)
        return Run()

    module = ModuleType("fake")
    module.init = init
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def expected_rows(folder):
    """The rows of metrics.jsonl as a tracker gets them: without the step, and without what is null."""
    rows = read_metrics(folder)
    assert any(value is None for row in rows for value in row.values()), "one is not a number"
    return [(row["step"], {k: v for k, v in row.items() if k != "step" and v is not None}) for row in rows]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_rows_of_metrics_jsonl(name, settings, fake, tmp_path):
    run = twig.train(settings(name), output=tmp_path / "my-run", **DATA)
    assert fake.rows == expected_rows(run.folder)
    assert [step for step, _ in fake.rows] == [1, 1, 2]
    (begun,) = fake.begun
    assert (begun["project"], begun["name"]) == ("twig", "my-run")
    assert begun["config"] == load(str(run.folder)).model_dump(), "sizes that were chosen included"
    assert fake.ended == 1


def test_trackers_are_closed_where_a_run_fails(settings, fake, tmp_path):
    def fails(completions, trainer_state, **kwargs):
        if trainer_state is not None and trainer_state.global_step == 1:
            raise ValueError("no")
        return digits(completions)

    with pytest.raises(UserError, match="ValueError.*no"):
        twig.train(settings("wandb", "trackio"), output=tmp_path / "run", **DATA | {"reward_funcs": fails})
    assert fake.ended == 2
    assert {step for step, _ in fake.rows} == {1}


def test_a_finished_run_opens_no_tracker(settings, fake, tmp_path):
    twig.train(settings("wandb"), output=tmp_path / "run", **DATA)
    twig.train(settings("wandb"), output=tmp_path / "run", resume=True, **DATA)
    assert len(fake.begun) == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_tracker_is_one_line_before_anything_is_made(name, settings, tmp_path, monkeypatch, capsys):
    for module in ("torch.utils.tensorboard", name):
        monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    with pytest.raises(UserError) as caught:
        twig.train(settings(name), output=tmp_path / "run", **DATA)
    assert caught.value.key == "log.report_to"
    assert f"{sys.executable} -m pip install {name}" in caught.value.fix
    assert not (tmp_path / "run").exists()
    monkeypatch.chdir(tmp_path)
    assert main(["train", "quickstart", f"log.report_to=[{name}]"]) == 2
    assert capsys.readouterr() == ("", f"twig: {caught.value}\n")
    assert not list(tmp_path.glob("runs/*"))


def test_a_tracker_that_does_not_start_is_one_line_and_the_folder_can_be_used(settings, fake, tmp_path):
    def offline(**given):
        raise ConnectionError("no\nnetwork")

    sys.modules["wandb"].init = offline
    with pytest.raises(UserError, match=r"^log.report_to: wandb .*ConnectionError: no network"):
        twig.train(settings("wandb"), output=tmp_path / "run", **DATA)
    (tmp_path / "run" / "wandb").mkdir()  # as wandb leaves it
    assert twig.train(settings(), output=tmp_path / "run", **DATA).summary["status"] == "finished"


def test_only_finite_numbers_are_reported(fake, tmp_path):
    row = {
        "a": 1,
        "b": np.float32(0.5),
        "c": np.int64(2),
        "d": None,
        "e": math.nan,
        "f": math.inf,
        "g": "text",
    }
    with reporting(["wandb"], tmp_path, {}) as report:
        report(3, row)
    assert fake.rows == [(3, {"a": 1, "b": 0.5, "c": 2})]


def test_without_trackers_nothing_is_imported_or_reported(tmp_path):
    with reporting([], tmp_path, {}) as report:
        report(1, {"a": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_tags_values_and_steps_and_forgets_what_a_resumed_run_repeats(tmp_path, monkeypatch):
    """With a writer that is not TensorBoard's own, which need not be installed."""
    written = []

    class Writer:
        def __init__(self, log_dir, purge_step):
            written.append((log_dir, purge_step))

        def add_scalar(self, tag, value, step):
            written.append((tag, value, step))

        def flush(self):
            pass

        def close(self):
            written.append("closed")

    module = ModuleType("tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with reporting(["tensorboard"], tmp_path, {}, step=4) as report:
        report(5, {"reward": 0.5, "kl": None})
    assert written == [(str(tmp_path / "tensorboard"), 5), ("reward", 0.5, 5), "closed"]


def test_the_real_tensorboard_reads_back_what_was_reported(settings, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = twig.train(settings("tensorboard"), output=tmp_path / "run", **DATA)
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    logged = {
        (event.step, tag): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)
    }
    expected = {(step, tag): value for step, row in expected_rows(run.folder) for tag, value in row.items()}
    assert logged == pytest.approx(expected, rel=1e-6)
