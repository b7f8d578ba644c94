"""Tasks: data from everywhere, gold answers that score, prompts as a model sees them, faults in a line."""

import json
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from twig.common.errors import UserError
from twig.core.types import Example, Score
from twig.tasks.base import Task
from twig.tasks.load import load_task
from twig.tasks.prompts import encode_prompt, fill_template, render_prompt

SVAMP_ROW = {"Body": "Ann has 3 pens.", "Question": "How many pens?", "Answer": 3.0, "Type": "Sum"}


def settings(name: str, **values: Any) -> SimpleNamespace:
    """Settings with a task group, defaults as in the real ones."""
    task = {
        **dict.fromkeys(
            ("path", "revision", "subset", "prompt_template", "system_prompt", "train_split", "eval_split")
        ),
        **dict.fromkeys(
            (
                "train_size",
                "eval_size",
                "reward_file",
                "reward_weights",
                "reward_timeout",
                "reward_on_timeout",
            )
        ),
        **{"prompt_column": "prompt", "chat": "auto", "chat_template_kwargs": {}, "correct_at": 1.0},
    }
    return SimpleNamespace(task=SimpleNamespace(name=name, **{**task, **values}))


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def constant(completions: Any, **kwargs: Any) -> list[float]:
    return [0.0 for _ in completions]


def one_line(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the real data -----------------------------------------------------------------------------------------

FORMS = ["#### {}", "The answer is {}.", r"So it is \boxed{{{}}}.", "**Answer:** ${}", "<answer>{}</answer>"]


@pytest.mark.parametrize(("name", "sizes"), [("svamp", (700, 300)), ("gsm8k", (7473, 1319))])
def test_every_gold_answer_scores_and_its_neighbour_does_not(test_data: Path, name: str, sizes: Any) -> None:
    task = load_task(settings(name, path=str(test_data / name)))
    assert (len(task.train), len(task.eval)) == sizes
    assert task.score is not None
    for number, example in enumerate([*task.train, *task.eval]):
        gold = example.columns["answer"]
        form = FORMS[number % len(FORMS)] if name == "gsm8k" else None
        for written in [form] if form else FORMS:
            assert task.score(written.format(gold), example) == Score(True, True), (gold, written)
            assert task.score(written.format(f"{int(gold):,}"), example) == Score(True, True)
            assert task.score(written.format(int(gold) + 1), example) == Score(True, False)
        assert task.score(f"We see that {gold} is not it.", example) == Score(False, False)


def test_gsm8k_solutions_score_as_they_are_written(test_data: Path) -> None:
    task = load_task(settings("gsm8k", path=str(test_data / "gsm8k")))
    solutions = [example.columns["solution"] for example in task.eval]
    answers = [example.columns["answer"] for example in task.eval]
    assert sum(task.reward_funcs[0](completions=solutions, answer=answers)) == 1319


def test_svamp_columns(test_data: Path) -> None:
    first = load_task(settings("svamp", path=str(test_data / "svamp"))).train[0]
    assert first.columns["ID"] == "chal-777" and first.columns["answer"] == "145"
    assert first.prompt == first.columns["question"] == f"{first.columns['Body']} {first.columns['Question']}"


def test_prompts_with_the_real_qwen2_tokenizer(test_data: Path, qwen2_tokenizer) -> None:
    tokenizer = copy(qwen2_tokenizer)
    task = load_task(settings("svamp", path=str(test_data / "svamp"), chat="never"))
    text = render_prompt(task, task.train[0], tokenizer)
    assert text.startswith("Solve the problem.") and text.endswith("Solution:")
    ids = encode_prompt(task, task.train[0], tokenizer)
    assert ids.dtype == np.int64 and tokenizer.decode(ids) == text
    task = replace(task, chat="auto")
    chat = render_prompt(task, task.train[0], tokenizer)
    assert chat.endswith(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
    ids = encode_prompt(task, task.train[0], tokenizer)
    assert ids[0] == 151644 and tokenizer.decode(ids) == chat


# ---- where rows come from ----------------------------------------------------------------------------------


def test_svamp_as_the_hub_has_it() -> None:
    row = {**SVAMP_ROW, "Answer": "1,200", "question_concat": "Ann has 3 pens. How many pens?"}
    example = load_task(settings("svamp"), train_dataset=[row]).train[0]
    assert example.columns["answer"] == "1200" and example.columns["question_concat"] == example.prompt
    half = load_task(settings("svamp"), train_dataset=[{**SVAMP_ROW, "Answer": 2.5}])
    assert half.train[0].columns["answer"] == "2.5"
    assert half.score is not None and half.score("#### 5/2", half.train[0]) == Score(True, True)


def test_gsm8k_answers_may_be_numbers_alone() -> None:
    rows = [{"question": "q", "answer": "1,234", "level": 2}, {"question": "q", "answer": 7}]
    train = load_task(settings("gsm8k"), train_dataset=rows).train
    assert [example.columns["answer"] for example in train] == ["1234", "7"]
    assert train[0].columns["level"] == 2


ROWS = [{"prompt": f"p{n}", "gold": n} for n in range(10)]


@pytest.mark.parametrize("layout", ["train.jsonl", "data/train.jsonl", "main/train-00000-of-00002.jsonl"])
def test_folders(tmp_path: Path, layout: str) -> None:
    write_lines(tmp_path / layout, ROWS[:6])
    if "00002" in layout:
        write_lines(tmp_path / layout.replace("00000", "00001"), ROWS[6:8])
    write_lines((tmp_path / layout).with_name("test.jsonl"), ROWS[8:])
    write_lines((tmp_path / layout).with_name("notes.jsonl"), ["not a row"])
    task = load_task(settings("custom", path=str(tmp_path)), reward_funcs=constant)
    assert [e.prompt for e in task.train] == [
        row["prompt"] for row in (ROWS[:8] if "00002" in layout else ROWS[:6])
    ]
    assert [e.columns for e in task.eval] == [{"gold": 8}, {"gold": 9}]


def test_json_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    paths = [tmp_path / "a.json", tmp_path / "lines.json", tmp_path / "b.parquet"]
    paths[0].write_text("\ufeff" + json.dumps(ROWS), encoding="utf-8")
    write_lines(paths[1], ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), paths[2])
    tasks = [load_task(settings("custom", path=str(path)), reward_funcs=constant) for path in paths]
    assert tasks[0].train == tasks[1].train == tasks[2].train and len(tasks[0].train) == 8


def test_a_file_of_splits(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"train": ROWS[:7], "validation": ROWS[7:], "more": []}))
    task = load_task(settings("custom", path=str(path)), reward_funcs=constant)
    assert (len(task.train), len(task.eval)) == (7, 3)
    named = settings("custom", path=str(path), train_split="validation", eval_split="train", eval_size=2)
    task = load_task(named, reward_funcs=constant)
    assert (len(task.train), len(task.eval)) == (3, 2)
    line = one_line(lambda: load_task(settings("custom", path=str(path), eval_split="tset")))
    assert "task.eval_split" in line and "train, validation, more, or all" in line


def test_one_file_is_divided_and_the_parts_do_not_meet(tmp_path: Path) -> None:
    path = str(write_lines(tmp_path / "mine.jsonl", ROWS))
    tasks = [load_task(settings("custom", path=path), reward_funcs=constant) for _ in range(2)]
    assert tasks[0].eval == tasks[1].eval and len(tasks[0].eval) == 2
    prompts = [example.prompt for example in [*tasks[0].train, *tasks[0].eval]]
    assert sorted(prompts) == [row["prompt"] for row in ROWS]
    more = load_task(settings("custom", path=path, eval_size=5, train_size=3), reward_funcs=constant)
    assert (len(more.train), len(more.eval)) == (3, 5)
    whole = settings("custom", path=path, train_split="all", eval_split="all")
    task = load_task(whole, reward_funcs=constant)
    assert (len(task.train), len(task.eval)) == (10, 10)
    assert "task.eval_size" in one_line(lambda: load_task(settings("custom", path=path, eval_size=10)))


def test_data_from_python() -> None:
    from datasets import Dataset

    task = load_task(settings("custom"), Dataset.from_list(ROWS), reward_funcs=[constant, constant])
    assert len(task.train) == 10 and task.eval == [] and len(task.reward_funcs) == 2
    both = load_task(settings("custom"), ROWS[:4], ROWS[4:], constant)
    assert (len(both.train), len(both.eval)) == (4, 6)
    assert "one split" in one_line(lambda: load_task(settings("custom"), {"train": ROWS}))
    assert "row 0 is a str" in one_line(lambda: load_task(settings("custom"), ["p"]))
    assert "no rows" in one_line(lambda: load_task(settings("custom"), []))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"prompt": "p"}\n{"prompt": \n', "line 2 is not readable as JSON"),
        ('{"prompt": "p"}\n["p"]\n', "line 2 is not an object"),
        ("\n\n", "holds no rows"),
        ("\xff", "is not text in UTF-8"),
    ],
)
def test_faulty_files(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(text.encode("latin-1"))
    line = one_line(lambda: load_task(settings("custom", path=str(path)), reward_funcs=constant))
    assert problem in line and str(path) in line


def test_missing_data_ends_in_one_line_with_the_way_out(tmp_path: Path) -> None:
    assert "task.path=FOLDER" in one_line(lambda: load_task(settings("svamp")))
    assert "task.path=FOLDER" in one_line(lambda: load_task(settings("gsm8k", revision="main")))
    assert "task.path=FOLDER" in one_line(lambda: load_task(settings("custom", path="someone/some-data")))
    assert "task.path: not set" in one_line(lambda: load_task(settings("custom")))
    assert "does not exist" in one_line(lambda: load_task(settings("svamp", path=str(tmp_path / "none"))))
    assert "does not exist" in one_line(lambda: load_task(settings("svamp", path="data/none.jsonl")))
    assert "holds no .jsonl" in one_line(lambda: load_task(settings("svamp", path=str(tmp_path))))
    (tmp_path / "x.csv").write_text("a,b\n")
    assert "is none of" in one_line(lambda: load_task(settings("svamp", path=str(tmp_path / "x.csv"))))
    (tmp_path / "x.parquet").write_text("a,b\n")
    assert "as Parquet" in one_line(lambda: load_task(settings("svamp", path=str(tmp_path / "x.parquet"))))


def test_missing_columns_name_those_found() -> None:
    line = one_line(lambda: load_task(settings("svamp"), [{"Body": "b", "Answer": 1}]))
    assert "no column 'Question' (it has Body, Answer)" in line
    line = one_line(lambda: load_task(settings("custom"), [{"ask": "q", "gold": 1}]))
    assert "no column 'prompt' (it has ask, gold)" in line and "task.prompt_column" in line
    line = one_line(lambda: load_task(settings("gsm8k"), [{"question": "q", "answer": "#### none"}]))
    assert "data row 0: " in line and "none" in line
    assert "'none'" in one_line(lambda: load_task(settings("svamp"), [{**SVAMP_ROW, "Answer": "none"}]))


# ---- names, rewards, texts ---------------------------------------------------------------------------------


def test_unknown_names_get_the_nearest() -> None:
    assert "task.name=svamp" in one_line(lambda: load_task(settings("svmap")))
    assert "multiplication, svamp, gsm8k or custom" in one_line(lambda: load_task(settings("zzz")))


def test_multiplication_takes_no_data() -> None:
    assert "task.name=custom" in one_line(lambda: load_task(settings("multiplication"), ROWS))


def test_rewards_of_the_settings_replace_those_of_the_task(tmp_path: Path) -> None:
    file = tmp_path / "r.py"
    file.write_text("def a(**k): return [1.0]\ndef b(**k): return [2.0]\n")
    chosen = settings("svamp", reward_file=f"{file}:a,b", reward_weights=[1.0, 0.5], correct_at=2.0)
    task = load_task(chosen, [SVAMP_ROW])
    assert [function.__name__ for function in task.reward_funcs] == ["a", "b"]
    assert task.reward_weights == (1.0, 0.5) and task.correct_at == 2.0 and task.score is not None
    assert load_task(chosen, [SVAMP_ROW], reward_funcs=[constant, constant]).reward_funcs == (
        constant,
        constant,
    )
    chosen.task.reward_weights = [1.0]
    assert "1 weights for 2 reward functions (a, b)" in one_line(lambda: load_task(chosen, [SVAMP_ROW]))


def test_custom_needs_a_reward() -> None:
    assert "task custom: " in one_line(lambda: load_task(settings("custom"), ROWS))
    assert "task.reward_file=FILE.py:FUNCTION" in one_line(lambda: load_task(settings("custom"), ROWS))
    line = one_line(lambda: load_task(settings("custom"), ROWS, reward_funcs=["exact"]))
    assert "reward_funcs: 'exact'" in line


def test_custom_prompts() -> None:
    chat = [{"role": "user", "content": "hi"}]
    rows = [{"text": "p", "prompt": "other", "completion": "c"}, {"text": chat, "prompt": "other"}]
    task = load_task(settings("custom", prompt_column="text"), rows, reward_funcs=constant)
    assert task.train[0] == Example("p", {"prompt": "other"}) and task.train[1].prompt == chat
    for wrong in (3, [], ["hi"], [{"role": "user"}]):
        line = one_line(lambda wrong=wrong: load_task(settings("custom"), [{"prompt": wrong}]))
        assert line.startswith("data row 0: prompt")
    line = one_line(lambda: load_task(settings("custom"), [{"prompt": "p", "completions": 1}]))
    assert "column 'completions'" in line


def test_templates() -> None:
    assert fill_template(r"{{x}} {a} \boxed{} {", {"a": 1}) == r"{x} 1 \boxed{} {"
    line = one_line(lambda: fill_template("{b}", {"a": 1}))
    assert "task.prompt_template: {b} " in line and "{a}, or {{b}}" in line


class Letters:
    """A tokenizer of single letters that puts begin and end tokens around plain text, as some do."""

    bos_token, bos_token_id, eos_token, eos_token_id = "^", ord("^"), "$", ord("$")

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in (f"^{text}$" if add_special_tokens else text)]}

    def apply_chat_template(
        self, messages: Any, tokenize: bool, add_generation_prompt: bool, **kwargs: Any
    ) -> str:
        import jinja2

        assert not tokenize
        if any(message["role"] == "system" for message in messages) and self.chat_template == "no system":
            raise jinja2.TemplateError("System role not supported")
        parts = [f"<{message['role'][0]}>{message['content']}" for message in messages]
        return (
            "^" + "".join(parts) + ("<a>" if add_generation_prompt else "") + "".join(kwargs.get("end", []))
        )


def text_of(task: Task, example: Example, tokenizer: Letters, **values: Any) -> str:
    ids = encode_prompt(replace(task, **values), example, tokenizer)
    return "".join(map(chr, ids))


def make(template: str | None = None, system: str | None = None) -> Task:
    return Task("custom", (), (), (constant,), prompt_template=template, system_prompt=system)


def test_plain_prompts_have_one_begin_and_no_end() -> None:
    assert text_of(make(), Example("hi"), Letters()) == "^hi"
    assert text_of(make(), Example("^hi"), Letters()) == "^hi"
    assert text_of(make(), Example("cost: 5$"), Letters()) == "^cost: 5$$"  # the text's own end token stays
    assert text_of(make("Q: {question} {a}"), Example("hi", {"a": 1}), Letters()) == "^Q: hi 1"
    assert text_of(make("{prompt}", "Be kind."), Example("hi"), Letters()) == "^Be kind.\n\nhi"


def test_chat_prompts() -> None:
    tokenizer = Letters("a template")
    assert text_of(make(), Example("hi"), tokenizer) == "^<u>hi<a>"
    assert text_of(make(), Example("hi"), tokenizer, chat="never") == "^hi"
    assert text_of(make("Q: {question}", "Be kind."), Example("hi"), tokenizer) == "^<s>Be kind.<u>Q: hi<a>"
    assert text_of(make(), Example("hi"), tokenizer, chat_template_kwargs={"end": ["!"]}) == "^<u>hi<a>!"
    messages = [{"role": "system", "content": "own"}, {"role": "user", "content": "hi"}]
    assert text_of(make(), Example(messages), tokenizer, chat="never") == "^<s>own<u>hi<a>"
    assert text_of(make(None, "Be kind."), Example(messages), tokenizer) == "^<s>own<u>hi<a>"
    assert text_of(make(None, "Be kind."), Example(messages[1:]), tokenizer) == "^<s>Be kind.<u>hi<a>"


def test_what_a_chat_template_cannot_do_is_one_line() -> None:
    messages = [{"role": "user", "content": "hi"}]
    line = one_line(lambda: text_of(make(), Example(messages), Letters()))
    assert "the tokenizer has no chat template" in line
    line = one_line(lambda: text_of(make(), Example("hi"), Letters(), chat="always"))
    assert "task.chat=auto" in line
    line = one_line(lambda: text_of(make("{prompt}"), Example(messages), Letters("a template")))
    assert "task.prompt_template" in line
    line = one_line(lambda: text_of(make(None, "Be kind."), Example("hi"), Letters("no system")))
    assert "System role not supported" in line and "task.system_prompt" in line


@pytest.mark.parametrize("size", [1, 15])
def test_a_row_is_named_by_its_number_in_the_file(tmp_path, size) -> None:
    """However many of the rows before it are held out."""
    rows: list[dict] = [{"prompt": str(n)} for n in range(18)] + [{"answer": "1"}, {"prompt": "x"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = one_line(lambda: load_task(settings("custom", path=str(tmp_path / "data.jsonl"), eval_size=size)))
    assert line.startswith("data row 18: ")


def test_an_empty_prompt_in_the_data_is_refused_before_training(tmp_path) -> None:
    rows = [{"prompt": text, "answer": "1"} for text in [*"abcd", "", *"efgh"]]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tmp_path / "data.jsonl")
    assert "data row 4: " in one_line(lambda: load_task(settings("custom", path=path)))
    assert load_task(settings("custom", path=path, prompt_template="Say {prompt}!")).train


def test_an_empty_prompt_is_refused() -> None:
    class Bare(Letters):
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": []}

    assert "a prompt is empty" in one_line(lambda: text_of(make(), Example(""), Bare()))


def test_the_longest_prompt_is_that_of_the_tokens_that_the_model_sees():
    from saved import build_tokenizer

    from twig.tasks.prompts import longest_prompt

    prompts = ["12", "a b c", "12*3=", ""]
    task = Task("t", [Example(text) for text in prompts[:3]], [], ())
    tokenizer = build_tokenizer()
    expected = max(len(encode_prompt(task, example, tokenizer)) for example in task.train)
    assert longest_prompt(task, task.train, tokenizer) == expected == 5
    assert longest_prompt(task, [], tokenizer) == 0
