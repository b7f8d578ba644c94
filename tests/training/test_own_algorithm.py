"""An algorithm in a file of the user's: trained, compared, drawn, shared and resumed."""

import json
import re
import shutil

import numpy as np
import pytest
from pages import examples
from project import ROOT
from saved import save_model
from small_runs import EVAL, STEPS, TRAIN, completions_of, digits, record, rows_of

import twig
from twig.cli.app import main
from twig.common.errors import UserError
from twig.config.load import load
from twig.core.algorithms.base import PASSED
from twig.report.credit_map import read_groups, saved_steps
from twig.runs.reader import read_summary

GIVEN = {"reward_funcs": digits, "train_dataset": TRAIN, "eval_dataset": EVAL}


def run_settings(settings, algorithm):
    """The settings with an object in place of the group `algorithm`."""
    return settings.model_copy(update={"algorithm": algorithm})


@pytest.fixture
def mine(tmp_path):
    """The file of the documentation's example, with its class `Shallow`."""
    (text,) = [
        code
        for code in examples((ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8"))
        if "class Shallow" in code
    ]
    path = tmp_path / "mine.py"
    path.write_text(text)
    return path


def test_it_trains_with_its_settings_and_its_weights_are_saved(run, mine):
    done = run("run", f"algorithm.file={mine}:Shallow", "algorithm.decay=0.5")
    settings = load(str(done.folder))
    assert settings.flat()["algorithm.decay"] == 0.5 and done.summary["algorithm"] == "Shallow"
    assert any(row["tokens/selected"] for row in rows_of(done.folder) if "tokens/selected" in row)
    for group in read_groups(2, saved_steps(done.folder)[2], settings):
        ids = [row["token_ids"] for row in group.rows]
        num_nodes = len({tuple(c[: t + 1]) for c in ids for t in range(len(c))})
        trie = twig.PrefixTrie.build(ids, group.rewards)
        step = np.append(0.0, trie.value[1:] - trie.value[trie.parent[1:]]) * 0.5**trie.depth
        credit = group.credit(settings)["Shallow"]
        assert len(trie) - 1 == num_nodes
        divisor = completions_of(done.folder, 2)[0]["divisor"]
        np.testing.assert_allclose(credit.plus + credit.minus, step / divisor, atol=1e-15)


def test_a_run_stopped_half_way_is_resumed_to_the_same_bits(run, mine, settings, tmp_path):
    words = [f"algorithm.file={mine}:Shallow"]
    whole = run("whole", *words)
    run("parts", *words, "train.max_steps=2")
    run("parts", *words, resume=True)
    for name in ("adapter", "tensors", "state", "completions"):
        assert record(tmp_path / "parts")[name] == record(whole.folder)[name], name
    mine.write_text(mine.read_text() + "\n# changed\n")
    with pytest.raises(UserError, match=r"^algorithm\.file: .*mine\.py has changed"):
        run("parts", *words, f"train.max_steps={STEPS + 2}", resume=True)


def test_an_object_trains_like_the_file(run, mine, settings, tmp_path, monkeypatch):
    filed = run("filed", f"algorithm.file={mine}:Shallow", "algorithm.decay=0.7")
    monkeypatch.syspath_prepend(str(tmp_path))
    import mine as module

    passed = run("passed", algorithm=module.Shallow(decay=0.7))
    for name in ("adapter", "tensors", "metrics", "completions"):
        assert record(passed.folder)[name] == record(filed.folder)[name], name
    assert load(str(passed.folder)).algorithm.file == f"{module.__file__}:Shallow", "it can be loaded again"

    inside = run_settings(settings(), module.Shallow(decay=0.7))
    placed = twig.train(inside, output=tmp_path / "inside", **GIVEN)
    assert record(placed.folder)["adapter"] == record(filed.folder)["adapter"]
    assert load(str(placed.folder)).algorithm.file == f"{module.__file__}:Shallow"

    class Local(module.Shallow):
        """Can be found in no file."""

    local = run("local", "train.max_steps=2", algorithm=Local())
    assert load(str(local.folder)).algorithm.file == PASSED
    with pytest.raises(UserError, match=r"^algorithm\.file: Local was passed from Python.* algorithm=\.\.\."):
        run("local", f"algorithm.file={PASSED}", "algorithm.name=Local", resume=True)
    assert run("local", resume=True, algorithm=Local()).summary["steps"] == STEPS


@pytest.mark.slow
def test_it_is_compared_with_another_drawn_and_shared(mine, tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "model")
    (tmp_path / "rewards.py").write_text(
        "def digits(completions, **columns):\n"
        "    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in completions]\n"
    )
    rows = [{"prompt": text, "answer": "2"} for text in ("12*3=", "9+8=", "abc?", "#=", "0,1,", "4*4=")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "base.yaml").write_text(
        f"model: {{name: {tmp_path / 'model'}}}\n"
        f"task:\n  name: custom\n  path: {tmp_path / 'data.jsonl'}\n"
        f"  reward_file: {tmp_path / 'rewards.py'}:digits\n"
        "rollout: {num_generations: 4, prompts_per_step: 2, max_completion_length: 7}\n"
        "train: {max_steps: 3}\n"
        "log: {completions_steps: 1}\n"
    )
    (tmp_path / "study.yaml").write_text(
        "base: base.yaml\nmax_tokens: 100\nseeds: [0]\n"
        "variants:\n"
        "  t-spmo: [algorithm.name=t-spmo]\n"
        f"  mine: ['algorithm.file={mine}:Shallow', algorithm.decay=0.5]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "study.yaml", "--output", "out"]) == 0, capsys.readouterr().out
    folders = sorted((tmp_path / "out" / "runs").iterdir())
    assert sorted(read_summary(folder)["algorithm"] for folder in folders) == ["Shallow", "t-spmo"]
    mine.unlink()  # reading a run runs no code
    assert main(["report", *map(str, folders), "--output", "report.html"]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data"[^>]*>(.*?)</script>', page, re.S)[1])
    drawn = {name for group in data["groups"] for name in group["credit"]}
    assert {"Shallow", "t-spmo", "grpo"} <= drawn
    own = next(folder for folder in folders if read_summary(folder)["algorithm"] == "Shallow")
    assert main(["export", str(own), "--output", "shared"]) == 0
    card = (tmp_path / "shared" / "README.md").read_text(encoding="utf-8")
    assert "Shallow" in card and str(tmp_path) not in card


@pytest.mark.parametrize(
    ("text", "words", "problem"),
    [
        ("class Other: ...", [], "has no class 'Shallow'"),
        ("Shallow = 3", [], "has no class 'Shallow'"),
        ("class Shallow: ...", [], "not a subclass of twig.Algorithm"),
        ("raise KeyError(5)", [], "mine.py:1: KeyError: 5"),
        (None, ["algorithm.dekay=1.0"], "algorithm.dekay: extra inputs are not permitted"),
        (None, ["algorithm.decay=x"], "algorithm.decay: input should be a valid number"),
        (None, ["algorithm.name=grpo"], "algorithm.name"),
        (None, ["algorithm.file=mine.py:Shallow,Shallow"], "names several classes"),
    ],
)
def test_what_is_wrong_with_it_is_one_line_before_anything_is_written(
    run, mine, tmp_path, text, words, problem
):
    if text is not None:
        mine.write_text(text)
    with pytest.raises(UserError, match=r"^algorithm|^override") as caught:
        run("run", f"algorithm.file={mine}:Shallow", *words)
    assert problem in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_failing_rule_stops_the_run_with_its_place(run, mine, tmp_path):
    mine.write_text(mine.read_text().replace("return twig.Credit", "return 1 / 0 or twig.Credit"))
    with pytest.raises(
        UserError, match=r"^algorithm Shallow: it raised at .*mine\.py:\d+: ZeroDivisionError"
    ):
        run("run", f"algorithm.file={mine}:Shallow")
    assert "ZeroDivisionError" in (tmp_path / "run" / "traceback.txt").read_text()
    shutil.rmtree(tmp_path / "run")
