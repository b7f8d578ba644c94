"""Answers before and after training in the terminal, the report and the model card: there, and harmless."""

import io
import json
import re
from pathlib import Path

import pytest
from hostile import HOSTILE
from rich.console import Console
from run_folders import write_run

from twig.cli.display import show_answers
from twig.config.load import load
from twig.export.card import Base, Subject, model_card
from twig.report.history import read_run
from twig.report.page import page_of
from twig.runs.reader import read_summary


def answers(text: str = "=9022", kinds: tuple[str, ...] = ("became_right", "random")) -> list[dict]:
    return [
        {
            "kind": kind,
            "problem": number,
            "prompt": f"prompt {number} {text}",
            "answer": text if number else None,
            "before": {"text": f"before {number} {text}", "right": False},
            "after": {"text": f"after {number} {text}", "right": True},
        }
        for number, kind in enumerate(kinds)
    ]


def run_with(folder: Path, rows: list[dict], *overrides: str) -> Path:
    run = write_run(folder, list(overrides), saved=())
    summary = (read_summary(run) or {}) | {"answers": rows}
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def on_terminal(rows: list[dict], width: int = 80) -> str:
    out = io.StringIO()
    show_answers(Console(file=out, width=width, force_terminal=True, color_system=None), rows)
    return out.getvalue()


# ---- the terminal ------------------------------------------------------------------------------------------


def test_both_answers_stand_side_by_side() -> None:
    lines = on_terminal(answers()).splitlines()
    assert any(re.match(r"before 0 =9022 +after 0 =9022", line) for line in lines)
    assert any(re.match(r"before: wrong +after: right", line) for line in lines)
    assert any(line.split() == ["right", "answer", "=9022"] for line in lines)
    assert lines[-1] == "no problem stayed wrong"


@pytest.mark.parametrize("width", [60, 80])
def test_long_answers_fit_and_lose_their_middle(width: int) -> None:
    text = on_terminal(answers("word " * 2000), width)
    assert len(text) < 12_000 and "..." in text
    for line in text.splitlines():
        assert len(line) <= width or line.startswith(("became right", "at random", "right answer"))


def test_answers_cannot_steer_the_terminal() -> None:
    text = on_terminal(answers("".join([*HOSTILE, "\x1b[31mred", "\x1b]0;title\x07"])))
    assert text.replace("\n", "").isprintable() and "\\x1b[31mred" in re.sub(r"\s", "", text)


# ---- the report --------------------------------------------------------------------------------------------


def test_the_report_has_them_and_says_what_does_not_exist(tmp_path: Path) -> None:
    page = page_of([read_run(run_with(tmp_path / "a", answers()))])
    for text in ("became right", "at random", "before 1 =9022", "after 1 =9022", "No problem stayed wrong."):
        assert text in page
    assert 'href="#answers"' in page


def test_a_report_of_a_run_without_them_has_no_such_section(tmp_path: Path) -> None:
    page = page_of([read_run(run_with(tmp_path / "a", []))])
    assert 'id="answers"' not in page and 'href="#answers"' not in page


def test_several_runs_are_named(tmp_path: Path) -> None:
    runs = [
        run_with(tmp_path / "a", answers("A")),
        run_with(tmp_path / "b", answers("B"), "algorithm.name=grpo"),
    ]
    page = page_of([read_run(run) for run in runs])
    assert (
        page.index("<h3>a</h3>")
        < page.index("after 0 A")
        < page.index("<h3>b</h3>")
        < page.index("after 0 B")
    )


def test_answers_are_only_text_in_the_report(tmp_path: Path) -> None:
    page = page_of([read_run(run_with(tmp_path / "a", answers("".join(HOSTILE))))])
    assert page.count("<script") == page.count("</script>") == 2
    assert not re.search("<img|<!--|<style>\\*|\u202e|\x00", page) and "alert(1)" in page


# ---- the model card ----------------------------------------------------------------------------------------


def card(folder: Path, *overrides: str, rows: list[dict] | None = None, **given) -> str:
    run = run_with(folder, answers() if rows is None else rows, *overrides)
    summary = read_summary(run) or {}
    about = {
        "name": "ann/better",
        "settings": load(str(run)),
        "summary": summary,
        "environment": {},
        "adapter": {},
        "base": Base("tiny-arithmetic", embedded=True),
        "best": False,
        "prompt": "347*26=",
        "chat": False,
    }
    return model_card(Subject(**about | given))


def test_the_card_has_them_in_blocks_of_code(tmp_path: Path) -> None:
    text = card(tmp_path / "a")
    assert "\n```text\nbefore 1 =9022\n```\n" in text and "After training, right:" in text
    assert "No problem stayed wrong." in text


def test_a_card_shows_no_data_that_may_be_somebodys_own(tmp_path: Path) -> None:
    own = ["task.name=custom", "task.path=problems.jsonl", "task.reward_file=rewards.py:one"]
    assert "=9022" not in card(tmp_path / "a", *own)
    assert "=9022" not in card(tmp_path / "b", "task.name=svamp", "task.path=mine.jsonl")
    assert "=9022" not in card(tmp_path / "c", environment={"passed": "model, eval_dataset"})
    assert "=9022" in card(tmp_path / "d", environment={"passed": "reward_funcs"})


def test_a_card_of_the_best_adapter_shows_no_answers_of_another(tmp_path: Path) -> None:
    assert "=9022" in card(tmp_path / "a", best=True), "the last step's is the best"
    run = run_with(tmp_path / "b", answers())
    summary = read_summary(run) or {}
    best = summary["accuracy_best"] | {"step": 20}
    assert "=9022" not in card(tmp_path / "c", best=True, summary=summary | {"accuracy_best": best})


def test_answers_cannot_leave_their_block_in_the_card(tmp_path: Path) -> None:
    text = card(tmp_path / "a", rows=answers("```\n# Title\n/home/ann/secret\x1b[31m hf_abcdefghijklmnop"))
    assert "hf_abc" not in text and "/home/ann" not in text and "\x1b" not in text
    block = re.search(r"^(`{4,})text\nafter 0 ```\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE)
    assert block and "# Title" in block[2]
