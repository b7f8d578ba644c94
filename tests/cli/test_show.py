"""`twig show`: what a run sampled, whose credit, with colours and without, whatever the text is."""

import io
import json
import re
from pathlib import Path

import pytest
from hostile import HOSTILE
from pyarrow import parquet
from rich.console import Console
from run_folders import write_run

from twig.cli.app import main
from twig.common.errors import UserError
from twig.config.load import load
from twig.runs.completions import read_completions
from twig.runs.folder import RunLog

# Two problems of the data: an answer by hand with credit on its second and third token, and one cut off.
TOKENS = ["a", "b\n", "c", "<eos>"]


def row(problem: int, number: int, right: bool, weights: list[float] | None = None, **more) -> dict:
    values = weights or [0.0] * len(TOKENS)
    return {
        "prompt_index": problem,
        "completion_index": number,
        "prompt": f"What is {problem}?",
        "answer": "7",
        "completion": "".join(TOKENS),
        "prefix_length": 0,
        "token_ids": list(range(len(TOKENS))),
        "tokens": TOKENS,
        "weights": weights,
        "plus": weights and [max(value, 0.0) for value in values],
        "minus": weights and [min(value, 0.0) for value in values],
        "finished": True,
        "reward": float(right),
        "rewards": '{"exact": 1.0, "form": null}',
        "right": right,
    } | more


ROWS = [
    row(12, 0, True, [0.0, 0.5, -0.5, 0.0]),
    row(12, 1, False, [0.0, 0.0, 0.0, 0.0], plus=[0.0, 0.0, 0.0, 0.5], minus=[0.0, 0.0, 0.0, -0.5]),
    *(row(34, number, number == 3, finished=number != 2, reward=None) for number in range(6)),
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with the completions of steps 1 and 20."""
    monkeypatch.chdir(tmp_path)
    folder = write_run(Path("run"), saved=(1,), steps=20)
    RunLog(folder, load(str(folder))).save_completions(20, ROWS)
    return folder


def shown(*arguments: object, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["show", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def error(*arguments: object, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["show", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def completions(text: str) -> list[str]:
    return re.findall(r"^completion .*", text, re.MULTILINE)


def on_terminal(monkeypatch: pytest.MonkeyPatch, **options) -> io.StringIO:
    out = io.StringIO()
    options = {"force_terminal": True, "width": 60, "color_system": "standard"} | options
    monkeypatch.setattr("twig.cli.show.result_console", lambda: Console(file=out, **options))
    return out


# ---- which completions -------------------------------------------------------------------------------------


def test_without_a_step_the_newest_that_was_saved_is_shown(run, capsys) -> None:
    text = shown("run", capsys=capsys)
    assert text.startswith("step 20: 2 problems, 8 completions, 25.0 % right\n")
    assert shown("run", "--step", 1, capsys=capsys).startswith("step 1: 2 problems, 12 completions")


def test_four_completions_of_each_problem_and_all_of_one(run, capsys) -> None:
    text = shown("run", capsys=capsys)
    assert len(completions(text)) == 2 + 4 and "--limit 6" in text
    text = shown("run", "--problem", 34, capsys=capsys)
    assert len(completions(text)) == 6 and "What is 34?" in text and "What is 12?" not in text
    assert len(completions(shown("run", "--problem", 34, "--limit", 1, capsys=capsys))) == 1


def test_right_ones_and_wrong_ones(run, capsys) -> None:
    text = shown("run", "--right", "--limit", 9, capsys=capsys)
    assert [line.split(",")[0] for line in completions(text)] == ["completion 1", "completion 4"]
    text = shown("run", "--wrong", "--limit", 9, capsys=capsys)
    assert len(completions(text)) == 6 and all(", wrong, " in line for line in completions(text))


def test_a_problem_without_such_a_completion_says_so(run, capsys) -> None:
    RunLog(run, load(str(run))).save_completions(20, [row(1, 0, False)])
    text = shown("run", "--right", capsys=capsys)
    assert completions(text) == [] and "none of 1 completions is right" in text


# ---- what is said of one -----------------------------------------------------------------------------------


def test_prompt_answer_reward_length_and_credit(run, capsys) -> None:
    text = shown("run", capsys=capsys)
    assert "What is 12?\nright answer: 7\n" in text
    assert completions(text)[0] == (
        "completion 1, right, reward 1.000 (exact 1, form -), 4 tokens, 2 trained"
    )
    assert completions(text)[4] == "completion 3, wrong, no reward (exact 1, form -), 4 tokens, cut off"


def test_without_colours_signs_say_which_tokens_had_credit(run, capsys) -> None:
    lines = shown("run", "--problem", 12, capsys=capsys).splitlines()
    start = lines.index(next(line for line in lines if line.startswith("completion 1")))
    assert lines[start + 1 : start + 3] == ["a[+b\\n", "+][-c-]<eos>"]
    assert lines[-1] == "c[~<eos>~]", "both signs, which cancel"


def test_with_colours_there_are_no_signs(run, capsys, monkeypatch) -> None:
    out = on_terminal(monkeypatch)
    shown("run", "--problem", 12, capsys=capsys)
    assert "[+" not in out.getvalue()
    styled = re.findall(r"\x1b\[(1;\d+)m(b\\n|c|<eos>)", out.getvalue())
    assert [text for _, text in styled] == ["b\\n", "c", "<eos>"] and len({style for style, _ in styled}) == 3
    out = on_terminal(monkeypatch, no_color=True)
    shown("run", "--problem", 12, capsys=capsys)
    assert "[+" in out.getvalue()


@pytest.mark.parametrize("width", [60, 80])
def test_lines_are_wrapped_to_the_terminal(run, capsys, monkeypatch, width: int) -> None:
    long = "many words " * 30
    RunLog(run, load(str(run))).save_completions(20, [row(1, 0, True, prompt=long, completion=long)])
    out = on_terminal(monkeypatch, width=width, color_system=None)
    shown("run", capsys=capsys)
    lines = out.getvalue().splitlines()
    assert width - 20 < max(map(len, lines)) <= width
    assert all("many words" in line for line in lines if "many" in line), "and not inside of words"


def test_text_of_models_cannot_steer_the_terminal(run, capsys, monkeypatch) -> None:
    """Nor can names of functions; with weights, which are shown token by token, and without."""
    tokens = [*HOSTILE, "\x1b[31mred", "\x1b]0;title\x07"]
    text = "".join(tokens)
    more = {"prompt": text, "answer": text, "completion": text, "token_ids": [0] * len(tokens)}
    more |= {"tokens": tokens, "rewards": json.dumps({text: 1.0, "other": 0.0})}
    rows = [row(1, 0, True, [0.0, 1.0] * (len(tokens) // 2), **more), row(1, 1, True, **more)]
    RunLog(run, load(str(run))).save_completions(20, rows)
    plain = shown("run", capsys=capsys)
    assert plain.replace("\n", "").isprintable() and plain.count("\\x1b[31mred") >= 4
    out = on_terminal(monkeypatch)
    shown("run", capsys=capsys)
    codes = {"0", "1", "1;94", "1;33", "1;35"}
    assert set(re.findall(r"\x1b(.*?)m", out.getvalue())) <= {f"[{code}" for code in codes}


def test_a_very_long_completion_is_cut(run, capsys) -> None:
    tokens = ["x" * 100] * 1000
    more = {"tokens": tokens, "token_ids": [0] * 1000, "completion": "".join(tokens)}
    rows = [row(1, 0, True, [0.0, 1.0] * 500, **more), row(1, 1, True, **more)]
    RunLog(run, load(str(run))).save_completions(20, rows)
    assert len(shown("run", capsys=capsys)) < 50_000


# ---- older, foreign and damaged files ----------------------------------------------------------------------


def test_a_file_without_weights_says_so_and_one_without_tokens_has_the_texts(run, capsys) -> None:
    path = run / "completions" / "step-20.parquet"
    table = parquet.read_table(path)
    parquet.write_table(table.drop_columns(["weights", "plus", "minus", "answer", "tokens"]), path)
    text = shown("run", capsys=capsys)
    assert "is not in this file" in text and "right answer" not in text and "ab\nc<eos>" in text


def test_a_blanked_completion_is_shown_by_its_text(run, capsys) -> None:
    """As one is saved that had a secret in it: its tokens are empty."""
    rows = [row(1, 0, True, [0.0, 1.0, 0.0, 0.0], completion="(removed)", tokens=[""] * 4)]
    RunLog(run, load(str(run))).save_completions(20, rows)
    assert shown("run", capsys=capsys).endswith("\n(removed)\n")


def test_a_damaged_file_is_one_line(run, capsys) -> None:
    path = run / "completions" / "step-20.parquet"
    path.write_bytes(path.read_bytes()[:100])
    assert "step-20.parquet: damaged" in error("run", capsys=capsys)
    parquet.write_table(parquet.read_table(run / "completions" / "step-1.parquet").select(["prompt"]), path)
    with pytest.raises(UserError, match="damaged"):
        read_completions(path)


def test_what_is_not_there_is_said_with_what_is(run, capsys) -> None:
    assert "Set --step to 1 or 20" in error("run", "--step", 3, capsys=capsys)
    assert "Set --problem to 12 or 34" in error("run", "--problem", 3, capsys=capsys)
    assert "it holds no run" in error("nowhere", capsys=capsys)
    write_run(Path("none"), ["log.completions_steps=0"], saved=())
    assert "log.completions_steps is 0" in error("none", capsys=capsys)
    RunLog.create(Path("new"), load("quickstart")).close()
    assert "log.completions_steps=25" in error("new", capsys=capsys)
