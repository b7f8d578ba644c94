"""Arbitrary settings and data: taken, or refused in one printable line; never another exception.

A few examples by default; in the slow tier 2,000 of settings and 2,000 of data.
"""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pyarrow import parquet
from saved import build_tokenizer

from twig.common.errors import UserError
from twig.common.text import file_name, one_line, printable
from twig.config.load import Settings, load, parse_yaml, settings_with
from twig.config.messages import fields_of
from twig.core.algorithms.registry import shipped
from twig.runs.folder import RunLog
from twig.tasks.base import data_checksums, data_revision
from twig.tasks.load import load_task
from twig.tasks.prompts import encode_prompt
from twig.tasks.rewards import judge, score_completions


def tiers(number):
    """A few examples by default, `number` in the slow tier."""
    return pytest.mark.parametrize("number", [10, pytest.param(number, marks=pytest.mark.slow)])


ODD = [
    *[
        "\ud800",
        "a\udfffb",
        "\x00",
        "\x1b[31m\x1b]0;owned\x07",
        "\u202egnp",
        "\u2028",
        "\x85",
        "[/]",
        "[link=x]y",
    ],
    *[
        "<script>",
        "{prompt}",
        "{",
        "}}",
        "a: b",
        "- ",
        "!!python/object:os.system",
        "&a *a",
        "1e5",
        "4GiB",
        "~",
    ],
    *["x" * 2**20, "9" * 5000, "-1", "1e999", "\\frac{1}{0}", "#### 5", "<eos>", "../../etc", "\r\n", "\t"],
]
TEXT = st.sampled_from(ODD) | st.text(st.characters(), max_size=30)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
DOTTED = [*dict.fromkeys(key for kind in shipped().values() for key, _ in fields_of(settings_with(kind)))]
NAMES = sorted({part for key in DOTTED for part in key.split(".")})
COLUMNS = st.sampled_from(
    ["prompt", "answer", "question", "completion", "completions", "role", "content", "ids", "self", "text"]
)


def nested(keys):
    return st.recursive(
        PLAIN,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=8,
    )


def examples(number, *strategies):
    """Calls the function that it decorates on `number` examples of the strategies."""

    def run(function):
        how = hypothesis_settings(
            max_examples=number, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        how(given(*strategies)(function))()

    return run


def taken_or_refused(action):
    """What the action returns; None where it refuses, in one printable line."""
    try:
        return action()
    except UserError as error:
        words = str(error)
        assert words and words.isprintable() and len(words) <= 2000
        return None


# ---- settings


def groups():
    values = nested(st.sampled_from(NAMES) | TEXT)
    inner = st.dictionaries(st.sampled_from(NAMES) | TEXT, values, max_size=5)
    return st.dictionaries(st.sampled_from(list(Settings.model_fields)) | TEXT, inner | values, max_size=6)


@tiers(1000)
def test_settings_from_dicts(number):
    least = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "multiplication"}}

    @examples(number, groups(), st.booleans())
    def check(values, whole):
        values = {**least, **values} if whole else values
        actual = taken_or_refused(lambda: Settings.from_dict(values))
        if actual is not None:
            assert Settings.from_dict(parse_yaml(actual.to_yaml(), "test")) == actual


@tiers(500)
def test_settings_from_yaml_texts(number, tmp_path):
    file = tmp_path / "my.yaml"
    pieces = st.sampled_from(
        [f"{name}:" for name in NAMES] + ["\n", "\n  ", "- ", "[", "]", "{", "}", ", ", " "]
    )
    texts = st.lists(pieces | TEXT, max_size=20).map("".join)

    @examples(number, texts | groups().map(repr) | st.binary(max_size=50))
    def check(text):
        content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        file.write_bytes(content)
        taken_or_refused(lambda: load(str(file)))
        if isinstance(text, str):
            taken_or_refused(lambda: parse_yaml(text, text))


@tiers(500)
def test_settings_from_overrides(number):
    values = st.one_of(TEXT, nested(TEXT).map(str), st.integers().map(str), st.floats().map(str))
    overrides = st.builds("{}={}".format, st.sampled_from(DOTTED) | TEXT, values) | TEXT

    @examples(number, st.lists(overrides, min_size=1, max_size=3))
    def check(words):
        taken_or_refused(lambda: load("quickstart", words))
        taken_or_refused(lambda: load(words[0]))


# ---- data


def rewarded(completions, **columns):
    return [0.5 for _ in completions]


def use(task, expected, tokenizer):
    """All that a run does with a task's problems before and after the model has its say."""
    for example in [*task.train, *task.eval]:
        ids = taken_or_refused(lambda example=example: encode_prompt(task, example, tokenizer))
        assert ids is None or len(ids) and ids.dtype == np.int64
    problems = [*task.train, *task.eval]
    texts = [str(example.columns.get("answer", "#### 5"))[:100] for example in problems]
    rewards = score_completions(task, problems, texts, [[1, 2] for _ in problems])
    judge(task, problems, texts, rewards.total)
    assert data_revision(data_checksums(task)).startswith("sha256:")


def task_settings(path, *overrides):
    return load("quickstart", ["task.name=custom", f"task.path={path}", *overrides])


@tiers(1500)
def test_rows_of_any_json(number, tmp_path):
    tokenizer, file = build_tokenizer(), tmp_path / "data.jsonl"
    rows = st.lists(
        st.dictionaries(COLUMNS | TEXT, nested(COLUMNS | TEXT), max_size=4) | nested(COLUMNS), max_size=4
    )
    likely = st.lists(st.fixed_dictionaries({"prompt": TEXT, "answer": PLAIN}), min_size=1, max_size=4)

    @examples(number, rows | likely, st.booleans(), st.none() | TEXT)
    def check(rows, own_reward, template):
        file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        expected = task_settings(file)
        if template:
            task = expected.task.model_copy(update={"prompt_template": template})
            expected = expected.model_copy(update={"task": task})
        functions = [rewarded] if own_reward else None
        for given_rows in (None, [row for row in rows if isinstance(row, dict)]):
            task = taken_or_refused(
                lambda given_rows=given_rows: load_task(expected, given_rows, None, functions)
            )
            if task is not None:
                taken_or_refused(lambda task=task: use(task, expected, tokenizer))


@tiers(500)
def test_files_of_any_bytes(number, tmp_path):
    lines = st.lists(TEXT | nested(COLUMNS).map(json.dumps), max_size=4).map("\n".join)
    content = st.binary(max_size=60) | lines.map(lambda text: text.encode("utf-8", "surrogatepass"))

    @examples(number, content, st.sampled_from([".jsonl", ".json", ".parquet", ".csv", ""]))
    def check(content, suffix):
        file = tmp_path / f"data{suffix}"
        file.write_bytes(content)
        taken_or_refused(lambda: load_task(task_settings(file), reward_funcs=[rewarded]))


# ---- what is shown and written


@tiers(500)
def test_any_text_can_be_shown_and_written(number, tmp_path):
    log = RunLog.create(tmp_path / "run", load("quickstart"))

    @examples(number, TEXT, TEXT)
    def check(first, second):
        line = one_line(first + second)
        assert line.isprintable() and len(line) <= 2000
        assert printable(first).replace("\n", "").replace("\t", "").isprintable()
        name = file_name(first)
        assert name.strip(".") and "/" not in name and name.isprintable() and name.encode()
        log.warn(first)
        log.save_traceback(second)
        log.log(1, {first: second, "reward": 0.5})
        log.save_summary({"task": first, second: [first, {first: second}]})
        row = {"completion": first, "prompt": second, "tokens": [first, second], "rewards": json.dumps(first)}
        (actual,) = parquet.read_table(log.save_completions(1, [row])).to_pylist()
        for text, kept in ((first, actual["completion"]), (second, actual["prompt"])):
            assert kept == text or any("\ud800" <= c <= "\udfff" for c in text)
