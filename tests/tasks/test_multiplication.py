"""Multiplication: problems apart by split, worked answers true line by line, answers read strictly."""

import functools
import hashlib
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_groups import bounded
from worked_lines import assert_every_line_is_true

from twig.common.errors import UserError
from twig.config.load import Settings
from twig.core.types import Score
from twig.tasks import multiplication
from twig.tasks.load import load_task
from twig.tasks.multiplication import at_once, problems, product, prompt_text, read_answer, split_of, worked
from twig.tasks.prompts import render_prompt

SPLITS = ("pretrain", "train", "eval")
SHORT = "task.digits=[2, 2]"  # a tenth of the problems: quicker to list


@functools.cache
def all_of(split: str) -> list[tuple[int, int]]:
    """All problems of 3 x 2 digits of a split: they take a second to list."""
    return problems(split, (3, 2), 0)


def settings(*overrides: str) -> Settings:
    values = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "multiplication"}}
    return Settings.from_dict(values, overrides)


def one_line(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def in_any_order(pairs) -> set[tuple[int, int]]:
    return {(min(pair), max(pair)) for pair in pairs}


# ---- splits ------------------------------------------------------------------------------------------------


def test_the_splits_are_disjoint_and_together_all_problems():
    by_split = {split: all_of(split) for split in SPLITS}
    everything = [pair for pairs in by_split.values() for pair in pairs]
    assert len(everything) == len(set(everything)) == 900 * 90
    assert set(everything) == {(a, b) for a in range(100, 1000) for b in range(10, 100)}


def test_the_proportions_are_50_30_20():
    # 81,000 problems: the standard deviation of a share is below 0.0018.
    for split, share in zip(SPLITS, (0.5, 0.3, 0.2), strict=True):
        assert len(all_of(split)) / 81_000 == pytest.approx(share, abs=0.007)


@pytest.mark.parametrize("split", SPLITS)
def test_the_order_of_the_factors_changes_no_split(split):
    assert {(b, a) for a, b in problems(split, (1, 2), 0)} == set(problems(split, (2, 1), 0))
    assert all(split_of(b, a) == split for a, b in all_of(split)[:5000])
    same_length = set(problems(split, (2, 2), 0))
    assert same_length == {(b, a) for a, b in same_length}


def test_splits_stay_apart_where_both_orders_are_problems():
    splits = [in_any_order(problems(split, (2, 2), 0)) for split in SPLITS]
    assert sum(map(len, splits)) == len(set().union(*splits)) == 90 * 91 // 2


@given(st.integers(1, 10**9), st.integers(1, 10**9))
@bounded
def test_a_split_is_the_sha256_hash_of_the_factors(a, b):
    """The embedded model was trained on one of the splits: they must never move."""
    digest = hashlib.sha256(f"{min(a, b)}*{max(a, b)}".encode()).hexdigest()
    tenth = int(digest[:16], 16) * 10 // 2**64  # where the first 8 bytes are in their range
    split = (["pretrain"] * 5 + ["train"] * 3 + ["eval"] * 2)[tenth]
    assert split_of(a, b) == split_of(b, a) == split


# ---- problems ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [(2, 2), (4, 4)], ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_problems_are_different_seeded_and_of_their_split(split, digits):
    """Of 4 x 4 digits there are too many to list, so they are drawn."""
    first = problems(split, digits, 7, 300)
    assert len(first) == len(set(first)) == 300
    assert {tuple(map(len, map(str, pair))) for pair in first} == {digits}
    assert {split_of(*pair) for pair in first} == {split}
    assert problems(split, digits, 7, 300) == first
    assert problems(split, digits, 7, 200) == first[:200], "a smaller size is the beginning of a larger one"
    other = problems(split, digits, 8, 300)
    assert other[:5] != first[:5] and set(other) != set(first)


def test_an_order_is_not_that_of_the_factors():
    """A run trains on the first ones: they must be a fair sample."""
    pairs = problems("train", (2, 2), 0)
    assert sorted(pairs) == sorted(problems("train", (2, 2), 1))
    assert abs(sum(a for a, _ in pairs[:500]) / 500 - 54.5) < 3 * 26 / 500**0.5  # a factor's std is 26


def test_problems_follow_from_the_seed_and_nothing_else():
    random.seed(1)
    first = problems("eval", (4, 4), 3, 50)
    random.seed(2)
    assert problems("eval", (4, 4), 3, 50) == first


def cure(message: str) -> int:
    """The number that the message says to write."""
    return int(re.search(r"task\.\w+_size=(\d+)", message)[1])


@pytest.mark.parametrize("split", SPLITS)
def test_more_problems_than_there_are_is_one_line_with_a_number_that_works(split):
    there_are = len(problems(split, (2, 1), 0))
    assert len(problems(split, (2, 1), 0, there_are)) == there_are
    message = one_line(lambda: problems(split, (2, 1), 0, there_are + 1))
    assert message.startswith(f"task.{split}_size: {there_are + 1}, ")
    assert "2 x 1" in message and "task.digits" in message
    assert cure(message) == there_are


@pytest.mark.parametrize("size", [None, 10**17])
def test_too_many_problems_to_list_is_one_line_with_a_number_that_works(size):
    message = one_line(lambda: problems("train", (9, 9), 0, size))
    assert message.startswith(f"task.train_size: {'all' if size is None else size} ")
    assert len(problems("train", (9, 9), 0, cure(message))) == 10_000


def test_a_tenth_of_all_problems_can_be_drawn_and_no_more(monkeypatch):
    monkeypatch.setattr(multiplication, "_ENUMERATED", 100)
    for split in SPLITS:
        drawn = problems(split, (2, 1), 0, 81)
        assert len(set(drawn)) == 81 and {split_of(*pair) for pair in drawn} == {split}
        assert cure(one_line(lambda split=split: problems(split, (2, 1), 0, 82))) == 81


def test_both_ways_of_finding_problems_find_the_same_kind(monkeypatch):
    listed = set(all_of("eval"))
    monkeypatch.setattr(multiplication, "_ENUMERATED", 10)
    assert set(problems("eval", (3, 2), 0, 2000)) < listed


# ---- answers in both forms ---------------------------------------------------------------------------------

FACTORS = st.builds(
    lambda first, rest: int(first + rest), st.sampled_from("123456789"), st.text("00005719", max_size=8)
)


@given(FACTORS, FACTORS)
@bounded
def test_every_line_of_a_worked_answer_is_true(a, b):
    text = worked(a, b)
    assert_every_line_is_true(text, a, b)
    assert text.count("*") == sum(digit != "0" for digit in str(a)), "no line for a zero"
    assert at_once(a, b) == f"#{a * b}" == text[text.index("#") :]


@pytest.mark.parametrize(
    "a, b, text",
    [
        (347, 26, "300*26=7800,40*26=1040:8840,7*26=182:9022#9022"),
        (305, 40, "300*40=12000,5*40=200:12200#12200"),
        (120, 99, "100*99=9900,20*99=1980:11880#11880"),
        (100, 10, "100*10=1000#1000"),
        (7, 8, "7*8=56#56"),
    ],
)
def test_worked_by_hand(a, b, text):
    assert worked(a, b) == text
    assert_every_line_is_true(text, a, b)


def test_the_check_of_lines_sees_a_wrong_one():
    """Each number of a true text in turn is made one larger."""
    text = worked(347, 26)
    numbers = list(re.finditer(r"\d+", text))
    assert len(numbers) == 12
    for number in numbers:
        wrong = text[: number.start()] + str(int(number[0]) + 1) + text[number.end() :]
        with pytest.raises((AssertionError, AttributeError)):
            assert_every_line_is_true(wrong, 347, 26)


@given(FACTORS, FACTORS)
@bounded
def test_gold_scores_in_both_forms_and_its_neighbour_does_not(a, b):
    gold = str(a * b)
    texts = [at_once(a, b), worked(a, b), f"#{a * b + 1}", worked(a, b) + "0", gold]
    assert product(texts, [gold] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]


# ---- reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer",
    [
        ("#9022", 9022),
        ("#0", 0),
        ("3*4=13#9022", 9022),
        ("line\n#9022", 9022),
        ("##9022", 9022),
        ("#1#9022", 9022),
        ("#9022#1", 1),
        ("#" + "9" * 40, 10**40 - 1),
        # nothing after the last #
        ("", None),
        ("#", None),
        ("9022", None),
        ("9022#", None),
        ("#9022#", None),
        ("#1#2x", None),
        # anything but digits up to the end
        ("#9022 ", None),
        ("#9022\n", None),
        ("#9022\r\n", None),
        ("#9022\0", None),
        ("#9022<eos>", None),
        ("#9022.", None),
        ("#9022 or so", None),
        ("#9022\n#", None),
        ("# 9022", None),
        ("#\n9022", None),
        ("#9,022", None),
        ("#9_022", None),
        ("#9 022", None),
        ("#+9022", None),
        ("#-9022", None),
        ("#9022.0", None),
        ("#9e3", None),
        ("#0x233e", None),
        ("#(9022)", None),
        # leading zeros
        ("#09022", None),
        ("#00", None),
        # digits of other scripts, and the wide number sign
        ("#９０２２", None),
        ("#٩٠٢٢", None),
        ("#९०२२", None),
        ("#9٠22", None),
        ("#902２", None),
        ("#902²", None),
        ("#𝟗𝟎𝟐𝟐", None),
        ("＃9022", None),
        ("#9022\u200b", None),
        # more digits than any product of two factors
        ("#" + "9" * 41, None),
        ("#" + "9" * 100_000, None),
        ("9" * 100_000, None),
        ("#" * 100_000, None),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_read_answer(text, answer):
    assert read_answer(text) == answer
    gold = "9022"
    assert product([text], [gold]) == [float(answer == 9022)]
    assert product([[{"role": "assistant", "content": text}]], [gold]) == [float(answer == 9022)]


def test_every_product_of_the_longest_factors_can_be_read():
    longest = 10**9 - 1  # task.digits goes up to 9
    assert read_answer(worked(longest, longest)) == longest**2


def test_the_reward_takes_strings_and_chat_messages():
    messages = [
        [{"role": "assistant", "content": "#6"}],
        [{"role": "user", "content": "#6"}, {"role": "assistant", "content": "#7"}],
        [{"role": "assistant", "content": "#1"}, {"role": "assistant", "content": "2*3=6#6"}],
    ]
    assert product(messages, ["6"] * 3) == [1.0, 0.0, 1.0]
    assert product(["#6", "#7"], ["6", "7"], prompts=["2*3=", "1*7="], a=[2, 1], trainer_state=None) == [1, 1]
    assert product([], []) == []
    with pytest.raises(ValueError, match="zip"):
        product(["#6", "#7"], ["6"])


# ---- the task ----------------------------------------------------------------------------------------------


def test_the_task_trains_and_evaluates_on_its_own_splits():
    chosen = settings("task.train_size=500", "train.seed=3")
    task = load_task(chosen)
    assert [(e.columns["a"], e.columns["b"]) for e in task.train] == problems("train", (3, 2), 3, 500)
    assert [(e.columns["a"], e.columns["b"]) for e in task.eval] == all_of("eval")
    for example in (*task.train, *task.eval):
        a, b = example.columns["a"], example.columns["b"]
        assert example.prompt == prompt_text(a, b) == f"{a}*{b}="
        assert example.columns["answer"] == str(a * b)
    assert render_prompt(task, task.train[0], None) == task.train[0].prompt


def test_another_seed_trains_in_another_order_and_evaluates_in_the_same():
    one, two = (load_task(settings(SHORT, f"train.seed={seed}")) for seed in (0, 1))
    assert one.train != two.train
    assert one.eval == two.eval


def test_found_and_right_are_separate():
    task = load_task(settings(SHORT, "task.eval_size=200"))
    for example in task.eval:
        a, b, gold = (example.columns[name] for name in ("a", "b", "answer"))
        for text in (at_once(a, b), worked(a, b)):
            assert task.score(text, example) == Score(answered=True, right=True)
        assert task.score(f"#{int(gold) + 1}", example) == Score(answered=True, right=False)
        assert task.score("#0", example) == Score(answered=True, right=False)
        for text in ("", gold, f"#{gold} ", f"#{gold}#"):
            assert task.score(text, example) == Score(answered=False, right=False)


def test_a_template_of_ones_own_reads_the_answer_as_in_word_problems():
    chosen = settings(SHORT, "task.prompt_template=What is {a} times {b}?")
    task = load_task(chosen)
    example = task.eval[0]
    gold = example.columns["answer"]
    text = f"What is {example.columns['a']} times {example.columns['b']}?"
    assert render_prompt(task, example, None) == text
    assert task.score(f"It is easy.\n#### {gold}", example) == Score(True, True)
    assert task.reward_funcs[0]([f"#### {gold}", f"It is easy, {gold}"], [gold] * 2) == [1.0, 0.0]


@pytest.mark.parametrize(
    "override", ["task.path=data.jsonl", "task.train_split=test", "task.eval_split=train"]
)
def test_other_data_is_refused(override):
    key, _, value = override.partition("=")
    message = one_line(lambda: load_task(settings(override)))
    assert message.startswith(f"{key}: '{value}'") and f"Leave {key} out" in message


def test_its_own_splits_may_be_named():
    named = load_task(settings(SHORT, "task.train_split=train", "task.eval_split=eval"))
    assert named.train == load_task(settings(SHORT)).train


@pytest.mark.parametrize("size", ["train_size", "eval_size"])
def test_too_large_a_size_names_its_setting(size):
    assert one_line(lambda: load_task(settings(SHORT, f"task.{size}=70000"))).startswith(
        f"task.{size}: 70000, "
    )
