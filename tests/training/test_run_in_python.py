"""Runs in Python and notebooks: progress is shown, a model may be a name, and a run shows itself."""

import re
import sys
import types
from html.parser import HTMLParser

import pytest
from hostile import HOSTILE
from peft import PeftModel
from run_folders import ACCURACY, metrics_row, write_run
from saved import build_tokenizer

from twig.common.errors import UserError
from twig.common.progress import Progress
from twig.config.load import load
from twig.evaluation.prepare import settings_for
from twig.report import notebook
from twig.report.notebook import NotebookProgress, curves_html
from twig.runs.reader import read_summary
from twig.training.run import Run


@pytest.fixture
def kernel(monkeypatch):
    """A stand-in for IPython inside a notebook's kernel; returns the HTML that was shown, newest last."""
    shown = []
    python, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    python.get_ipython = lambda: types.SimpleNamespace(kernel=None)
    display.HTML = str
    display.display = lambda html, display_id: (
        shown.append(html) or types.SimpleNamespace(update=shown.append)
    )
    monkeypatch.setitem(sys.modules, "IPython", python)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


class Text(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.parts, self.tags = [], set()
        self.feed(html)

    def handle_data(self, data):
        self.parts.append(data)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)


# ---- progress ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "options", "lines"),
    [
        (["log.progress=plain"], {}, ["step 1/2", "step 2/2", "before: "]),
        ([], {}, ["step 1/2"]),
        (["log.progress=quiet"], {}, []),
        (["log.progress=plain"], {"progress": Progress()}, []),
    ],
    ids=["plain", "auto", "quiet", "passed"],
)
def test_training_from_python_shows_what_is_asked_for(run, capsys, words, options, lines):
    run("run", "train.max_steps=2", *words, **options)
    captured = capsys.readouterr()
    assert all(line in captured.err for line in lines)
    assert bool(captured.err) == bool(lines) and not captured.out


def test_a_notebook_shows_a_table_and_curves_that_are_redrawn(run, kernel, capsys):
    run("run", "train.max_steps=2")
    last = Text(kernel[-1])
    text = " ".join(last.parts)
    assert "finished, 2 steps" in text and "before: " in text and "after: " in text
    assert {"table", "svg"} <= last.tags and len(kernel) > 3
    assert not capsys.readouterr().err


def test_a_step_of_a_notebook_is_what_was_measured(kernel):
    progress = NotebookProgress()
    progress.evaluation("before", ACCURACY)
    for step in range(1, 31):
        progress.step(step, 60, metrics_row(step))
    text = " ".join(Text(progress.html()).parts)
    assert "step 30 of 60" in text and "0:27 left" in text
    assert "45.0 % right of 1000" in text
    assert "76.8k tokens sampled, 1.9k trained (2.5 %)" in text
    assert len(re.findall("<tr>", progress.html())) == 1 + notebook._ROWS


def test_what_comes_from_outside_is_escaped(kernel):
    progress = NotebookProgress()
    for text in HOSTILE:
        progress.message(f"<script>{text}</script>")
        progress.evaluation(f"<b>{text}", ACCURACY)
    assert not Text(progress.html()).tags - {"div", "b"}
    assert "<script" not in progress.html()


def test_a_curve_has_one_point_a_step_and_its_mean_over_it():
    """Eleven steps of rewards 0 to 10, from the left bottom to the right top of 268 x 86.

    The mean is that of nine steps: at the first step of rewards 0 to 4, in the middle 1 to 9, at the last 6
    to 10; on the height 110 - 8.6 times it.
    """
    rows = [{"step": step, "reward": float(step - 1)} for step in range(1, 12)] + [{"step": 3, "other": 1.0}]
    html = curves_html(rows, ["reward", "answers/right"])
    assert html.count("<svg") == 1
    raw, smooth = re.findall(r'points="([^"]*)"', html)
    raw, smooth = ([tuple(map(float, spot.split(","))) for spot in line.split()] for line in (raw, smooth))
    assert [raw[i] for i in (0, 5, 10)] == [(54.0, 110.0), (188.0, 67.0), (322.0, 24.0)]
    assert [smooth[i] for i in (0, 5, 10)] == [(54.0, 92.8), (188.0, 67.0), (322.0, 41.2)]
    assert ">Reward: 8<" in html
    assert (
        curves_html([{"step": 1, "reward": None}, {"step": 2, "reward": float("nan")}], ["reward"]).count(
            "<svg"
        )
        == 0
    )


# ---- the run -----------------------------------------------------------------------------------------------


@pytest.fixture
def done(tmp_path):
    folder = write_run(tmp_path / "run-1")
    return Run(folder, None, build_tokenizer(), read_summary(folder))


def test_a_run_is_one_line(done):
    assert (
        repr(done)
        == f"Run({str(done.folder)!r}: t-spmo on multiplication, 40 steps, finished, right 45.0 % -> 80.0 %)"
    )
    done.summary["accuracy_before"] = done.summary["accuracy_after"] = None
    assert "right" not in repr(done)


def test_a_run_shows_its_result_in_a_notebook(done):
    answer = {"text": "<script>no</script>", "right": True}
    row = {
        "kind": "random",
        "problem": 1,
        "prompt": "1+1=<b>",
        "answer": "2",
        "before": answer,
        "after": answer,
    }
    done.summary["answers"] = [row]
    shown = Text(done._repr_html_())
    text = " ".join(shown.parts)
    assert "t-spmo on multiplication" in text and "42.0 to 48.0 %" in text and "1+1=<b>" in text
    assert "script" not in shown.tags and "no problem stayed wrong" in text


def test_the_report_is_written_if_it_is_missing(done):
    assert not (done.folder / "report.html").exists()
    assert done.report.read_text(encoding="utf-8").startswith("<!")


def test_saved_completions_are_a_table(done):
    newest, first = done.completions(), done.completions(1)
    assert len(newest) == len(first) == 12
    assert list(first["prompt_index"]) == [0] * 6 + [1] * 6
    assert set(first["prompt"]) == {"1+2="} and first["num_tokens"].min() >= 3
    assert not newest.equals(first)
    with pytest.raises(UserError, match="step 3 are not saved. Pass one of 1, 20"):
        done.completions(3)


def test_a_plot_has_the_metrics_of_the_run(done, tmp_path):
    assert done.plot().html.count("<svg") == 4
    assert done.plot("entropy").html.count("<svg") == 1 and "Entropy" in done.plot("entropy").html
    with pytest.raises(UserError, match="no metric 'rewrd'. Pass one of reward"):
        done.plot("rewrd")
    assert done.plot().save(tmp_path / "plot.html").read_text(encoding="utf-8").count("<svg") == 4


# ---- the model ---------------------------------------------------------------------------------------------


def test_a_model_may_be_a_name_or_a_folder(run, base, tmp_path):
    first = run("first", "train.max_steps=1", "model.name=missing", model=base)
    assert load(str(first.folder)).model.name == str(base)
    second = run("second", "train.max_steps=1", "model.name=missing", model=str(first.adapter))
    settings = load(str(second.folder)).model
    assert (settings.name, settings.adapter) == (str(base), str(first.adapter))
    assert isinstance(second.model, PeftModel)


def test_a_name_completes_settings_that_have_none():
    given = {"task": {"name": "custom"}, "model": {"dtype": "float32"}}
    assert settings_for(given, "org/one")["model"] == {"dtype": "float32", "name": "org/one"}
    assert settings_for("quickstart", "org/one").model.name == "org/one"
    model = types.SimpleNamespace(config=types.SimpleNamespace(_name_or_path="org/two"))
    assert settings_for({"task": {}}, model)["model"] == {"name": "org/two"}
    assert settings_for(given | {"model": {"name": "kept"}}, model)["model"]["name"] == "kept"
