"""Chat prompts: what is continued, what is refused by name, and what the model sees of the rest."""

from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from saved import build_tokenizer
from small_runs import Heard, small_settings
from test_tasks import constant, one_line, settings

from twig.core.types import Example
from twig.engine.sampler import SamplingParams
from twig.tasks.base import Task
from twig.tasks.load import load_task
from twig.tasks.prompts import longest_prompt, render_prompt, written_twice

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = {"role": "user", "content": "what is 2+3?"}
TASK = Task("custom", (), (), (constant,))


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def load(*prompts: Any, column: Any = "prompt", **columns: Any) -> Task:
    rows = [{column: prompt, **columns} for prompt in prompts]
    return load_task(settings("custom", prompt_column=column), rows, reward_funcs=constant)


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


# ---- a turn that is continued


def test_a_prompt_that_ends_with_the_assistant_is_continued(tokenizer: Any) -> None:
    begun = load([USER, assistant("it is ")]).train[0]
    assert render_prompt(TASK, begun, tokenizer) == "[user]what is 2+3?<eos>[assistant]it is "
    between = load([USER, assistant("it is 5."), USER]).train[0]
    assert render_prompt(TASK, between, tokenizer).endswith("it is 5.<eos>[user]what is 2+3?<eos>[assistant]")


@pytest.mark.slow
@pytest.mark.parametrize("last", [[], [assistant("it is ")], [assistant("5"), USER]])
def test_chats_are_rendered_as_trl_does(tokenizer: Any, last: list[Any]) -> None:
    from trl.data_utils import apply_chat_template

    messages = [{"role": "system", "content": "be brief"}, USER, *last]
    expected = apply_chat_template({"prompt": messages}, tokenizer)["prompt"]
    assert render_prompt(TASK, Example(messages), tokenizer) == expected


def test_a_conversation_with_its_answer_is_refused() -> None:
    line = one_line(lambda: load([USER, assistant("it is 5.")], column="messages"))
    assert line.startswith("data row 0: messages ends with the assistant's answer")
    line = one_line(lambda: load_task(settings("custom"), [{"messages": [USER]}], reward_funcs=constant))
    assert "task.prompt_column=messages" in line
    assert load([USER], column="messages").train[0].prompt == [USER]


def test_what_follows_the_text_of_a_continued_turn_is_not_lost() -> None:
    calls = [{"function": {"name": "add", "arguments": {}}}]
    line = one_line(lambda: load([USER, assistant("let me see", tool_calls=calls)]))
    assert "tool_calls" in line
    assert load([USER, assistant("", tool_calls=calls), {"role": "tool", "content": "5"}]).train


# ---- what the model reads


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "message 1 (assistant) has null"),
        (
            [{"type": "text", "text": "see "}, {"type": "image"}],
            "a part of the type 'image'",
        ),
        (["text"], "a part of the type 'str'"),
        ([{"type": "text", "text": 5}], "a part of the type 'text'"),
        ([], "an empty list"),
        (5, "a int"),
    ],
)
def test_content_that_is_not_text_is_refused_by_name(content: Any, says: str) -> None:
    line = one_line(lambda: load([USER, assistant(content, tool_calls=[{"id": "1"}]), USER]))
    assert line.startswith("data row 0: prompt: ") and says in line


@pytest.mark.parametrize("column", ["image", "images"])
def test_columns_of_images_are_refused_by_name(column: str) -> None:
    assert f"column '{column}'" in one_line(lambda: load("what is this?", **{column: [b"png"]}))
    assert load("what is this?", **{column: None}).train


CONTENTS = st.one_of(
    st.text("abc <>", max_size=5),
    st.none(),
    st.integers(),
    st.lists(
        st.one_of(
            st.fixed_dictionaries({"type": st.just("text"), "text": st.text("xyz", max_size=4)}),
            st.sampled_from([{"type": "image"}, {"type": "text"}, {"text": "a"}, "a", None]),
        ),
        max_size=3,
    ),
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "odd"]), "content": CONTENTS},
    optional={"tool_calls": st.sampled_from([None, [], [{"id": "1"}]]), "name": st.just("n")},
)


READABLE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text("abc <>", max_size=5)}
)


@given(st.lists(READABLE, min_size=1, max_size=4) | st.lists(MESSAGES, min_size=1, max_size=4))
@example([USER, {"role": "assistant", "content": "it is "}])
def test_every_text_of_a_chat_that_is_taken_is_in_the_prompt(messages: list[Any]) -> None:
    """The oracle is written down here: texts in their order, and the last turn open."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    texts = [
        content if isinstance(content, str) else "".join(part["text"] for part in content)
        for content in (message["content"] for message in messages)
        if isinstance(content, str)
        or (content and isinstance(content, list) and all(is_text(part) for part in content))
    ]
    last = messages[-1]
    readable = len(texts) == len(messages) and not (last["role"] == "assistant" and last.get("tool_calls"))
    if not readable:
        one_line(lambda: load(messages))
        return
    turns = [f"[{message['role']}]{text}<eos>" for message, text in zip(messages, texts, strict=True)]
    expected = "".join(turns) + "[assistant]"
    if last["role"] == "assistant":
        expected = "".join(turns).removesuffix("<eos>")
    assert render_prompt(TASK, load(messages).train[0], tokenizer) == expected


def is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


@pytest.mark.parametrize(
    ("prompt", "chat", "marker"),
    [
        ("[user]2+3?<eos>[assistant]", "auto", "<eos>"),
        ([{"role": "user", "content": "a<eos>"}], "never", "<eos>"),
        ("[user]2+3?<eos>[assistant]", "never", None),
        ("a<pad>b", "auto", None),  # special, but not what this template writes
        ("2+3?", "auto", None),
    ],
)
def test_a_prompt_that_holds_the_markers_of_the_template(
    tokenizer: Any, prompt: Any, chat: str, marker: str | None
) -> None:
    task = replace(TASK, train=(Example("a"), Example(prompt)), chat=chat)
    assert written_twice(task, tokenizer) == marker
    assert written_twice(task, build_tokenizer()) is None


def test_such_a_prompt_warns_once(run: Any, tokenizer: Any) -> None:
    heard = Heard()
    rows = [{"prompt": "2+3?<eos>"}] * 3
    words = ["train.max_steps=2", "eval.before=false"]
    run("run", *words, train_dataset=rows, eval_dataset=None, tokenizer=tokenizer, progress=heard)
    assert heard.heard("^message warning: .*<eos>.*task.chat=never") == 1


# ---- long prompts, and the text that rewards read


class Counting:
    """A tokenizer of one token for `width` characters, which counts the characters that it was given."""

    chat_template = None

    def __init__(self, width: int) -> None:
        self.width, self.characters = width, 0

    def __call__(self, text: Any, add_special_tokens: bool) -> dict[str, Any]:
        texts = [text] if isinstance(text, str) else text
        self.characters += sum(map(len, texts))
        ids = [[1] * (len(each) // self.width) for each in texts]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}


@pytest.mark.parametrize("width", [1, 3, 20])
def test_a_prompt_of_any_length_is_refused_without_reading_it_all(width: int) -> None:
    """At most the first piece with twice the context's tokens is read; each piece is four times the last."""
    context, tokenizer = 100, Counting(width)
    task = replace(TASK, train=(Example("1" * 10_000_000),))
    line = one_line(lambda: longest_prompt(task, task.train, tokenizer, context))
    assert "over 200 tokens" in line
    assert tokenizer.characters <= (1 + 1 / 4 + 1 / 16) * max(8 * context, 4 * 2 * context * width)


def test_a_long_prompt_of_few_tokens_is_taken() -> None:
    task = replace(TASK, train=(Example("1" * 10_000),))
    assert longest_prompt(task, task.train, Counting(200), 100) == 50
    assert longest_prompt(task, task.train, Counting(1), None) == 10_000


@pytest.mark.parametrize(("skip", "text"), [("true", "02"), ("false", "0<pad>2<eos>")])
def test_rewards_read_special_tokens_if_they_are_kept(base: Any, skip: str, text: str) -> None:
    tokenizer: Any = build_tokenizer()
    assert tokenizer.convert_ids_to_tokens([3, 0, 5, 1]) == ["0", "<pad>", "2", "<eos>"]
    chosen = small_settings(base, f"task.skip_special_tokens={skip}")
    params = SamplingParams.of(chosen, tokenizer, [1])
    assert params.decode([np.array([3, 0, 5, 1])]) == [text]


# ---- data without an end, and data sets with configurations


def test_of_a_stream_only_the_rows_asked_for_are_read() -> None:
    numbers = count()
    stream = ({"prompt": str(number)} for number in numbers)
    task = load_task(settings("custom", train_size=16), stream, reward_funcs=constant)
    assert [example.prompt for example in task.train] == [str(number) for number in range(16)]
    assert next(numbers) == 16


def test_an_endless_data_set_is_sliced() -> None:
    from datasets import IterableDataset

    def rows() -> Any:
        for number in count():
            yield {"prompt": str(number)}

    stream = IterableDataset.from_generator(rows)
    for sizes, name in (({"train_size": 4}, "eval_dataset"), ({"eval_size": 4}, "train_dataset")):
        line = one_line(lambda sizes=sizes: load_task(settings("custom", **sizes), stream, stream, constant))
        assert line.startswith(f"{name}: has no length") and "task." in line
    both = settings("custom", train_size=4, eval_size=3)
    task = load_task(both, stream, stream, constant)
    assert (len(task.train), len(task.eval)) == (4, 3)


def test_a_stream_that_breaks_off_is_one_line() -> None:
    def rows() -> Any:
        yield {"prompt": "1"}
        raise ConnectionError("the other end is gone")

    line = one_line(lambda: load_task(settings("custom", train_size=4), rows(), reward_funcs=constant))
    assert line.startswith("train_dataset: row 1 cannot be read (ConnectionError: the other end is gone)")
    line = one_line(lambda: load_task(settings("custom", train_size=4), 5, None, constant))
    assert line.startswith("train_dataset: ")
    endless: list[Any] = []
    endless.append(endless)
    assert "holds itself" in one_line(lambda: load([USER], more=endless))


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("custom", {"path": "someone/data", "subset": "hard"}, ("someone/data", "hard")),
        ("custom", {"path": "someone/data"}, ("someone/data", None)),
        ("gsm8k", {"subset": "socratic"}, ("openai/gsm8k", "socratic")),
        ("gsm8k", {}, ("openai/gsm8k", "main")),
    ],
)
def test_a_configuration_is_named(monkeypatch: Any, name: str, values: Any, expected: Any) -> None:
    asked: list[Any] = []
    row = {"prompt": "p", "question": "q", "answer": "1"}

    def load_dataset(*arguments: Any, revision: Any) -> Any:
        asked.append(arguments)
        return {"train": SimpleNamespace(to_list=lambda: [row] * 5)}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_task(settings(name, **values), reward_funcs=constant).train
    assert asked == [expected]


@pytest.mark.parametrize(
    "problem",
    [
        "Config name is missing.\nPlease pick one among the available configs: ['hard', 'easy']",
        "BuilderConfig 'x' not found. Available: ['hard', 'easy']",
    ],
)
def test_a_configuration_that_is_missing_is_one_line(monkeypatch: Any, tmp_path: Any, problem: str) -> None:
    def load_dataset(*arguments: Any, revision: Any) -> Any:
        raise ValueError(problem)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    line = one_line(lambda: load_task(settings("custom", path="someone/data"), reward_funcs=constant))
    assert line.startswith("task.subset: ") and "'hard', 'easy'" in line
    here = settings("custom", path=str(tmp_path), subset="hard")
    assert one_line(lambda: load_task(here, reward_funcs=constant)).startswith("task.subset: ")
