"""Answers read out of text: what counts as marked, what the last number is, exactness, and time."""

import json
import statistics
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from answer_cases import CASES
from fuzzed import fuzzed_text
from hypothesis import given
from hypothesis import strategies as st

from twig.core.types import Score
from twig.tasks.answers import read_number, same_number, score_answer, score_lenient

F = Fraction


def test_there_are_enough_cases_and_none_twice() -> None:
    assert len({text for text, _, _ in CASES}) == len(CASES) >= 300
    assert all(sum(case[i] is None for case in CASES) > 20 for i in (1, 2))
    assert sum(strict != lenient for _, strict, lenient in CASES) > 100


@pytest.mark.parametrize(("text", "strict", "lenient"), CASES, ids=[repr(case[0]) for case in CASES])
def test_readings(text: str, strict: object, lenient: object) -> None:
    assert read_number(text, strict=True) == strict
    assert read_number(text, strict=False) == lenient


def test_long_digit_strings_are_numbers_like_others() -> None:
    # int() refuses strings of more than 4,300 digits.
    nines = "9" * 5000
    number = read_number(f"#### {nines}", strict=True)
    assert isinstance(number, Decimal)
    assert same_number(number, read_number(f"{nines}.000", strict=False))
    assert not same_number(number, read_number(f"-{nines}", strict=False))
    assert not same_number(number, read_number(nines[:-1] + "8", strict=False))
    assert read_number("#### " + "0" * 5000 + "7." + "0" * 5000, strict=True) == 7
    assert read_number(f"#### 1/{nines}", strict=True) is None


def test_same_number_is_exact_and_never_true_of_nothing() -> None:
    assert same_number(F(1, 2), read_number("0.5", strict=False))
    assert not same_number(F(1, 3), read_number("0.3333333333333333", strict=False))
    assert not same_number(None, None)
    assert not same_number(F(1), None)


def test_found_and_right_are_separate() -> None:
    assert score_answer("#### 1,200", "1200") == Score(True, True)
    assert score_answer("#### 12", "13") == Score(True, False)
    assert score_answer("It is 12.", "12") == Score(False, False)
    assert score_answer("", "12") == Score(False, False)


def test_the_two_readings_are_scored_apart() -> None:
    assert score_lenient("It is 12.", "12") == Score(True, True)
    assert score_lenient("#### 12\nI took 3 steps.", "12") == Score(True, False)
    assert score_lenient("twelve", "12") == Score(False, False)
    assert score_lenient("", "12") == Score(False, False)


@pytest.mark.parametrize(
    "gold", ["1200", "1,200", "$1,200.00", "1200 dollars", "so 1,200.\n#### 1200", "1,2 of 1200"]
)
def test_gold_answers_are_read_as_answers_are(gold: str) -> None:
    assert score_answer("#### 1200", gold) == Score(True, True)
    assert score_answer("#### 1201", gold) == Score(True, False)


def test_a_gold_answer_without_a_number_is_never_right() -> None:
    assert score_answer("#### 12", "nobody knows") == Score(True, False)
    assert score_lenient("#### 12", "") == Score(True, False)


@given(st.fractions(max_denominator=1000), st.sampled_from(["#### {}", "the answer is {}.", r"\boxed{{{}}}"]))
def test_a_written_number_is_read_back(number: Fraction, form: str) -> None:
    assert read_number("We have 3 of 7.\n" + form.format(number), strict=True) == number
    assert read_number(form.format(number), strict=False) == number


@given(st.integers(), st.sampled_from(["#### {:,}", "Answer: {:,} apples", "the answer is ${:,}."]))
def test_commas_change_nothing(number: int, form: str) -> None:
    assert read_number(form.format(number), strict=True) == number


@given(st.text(alphabet="#answer is:0129.,-+/$\\boxed{}frac =%½١", max_size=80), st.booleans())
def test_any_text_is_read_without_an_error(text: str, strict: bool) -> None:
    number = read_number(text, strict)
    assert number is None or isinstance(number, (Fraction, Decimal))


HARD = {
    "groups": "1,234," * 16_000,
    "digits": "9" * 100_000,
    "points": "1." * 50_000,
    "spaces": "#### " + " " * 100_000,
    "markers": "answer is " * 10_000,
    "hashes": "#" * 100_000,
    "hash numbers": "#1 " * 33_000,
    "fractions": "1/" * 50_000,
    "mixed": "1 " * 50_000,
    "boxes": "\\boxed{" * 14_000,
    "sums": "answer is 1=1=1 " * 6_000,
    "signs": "-" * 100_000,
    "exponents": "1e" * 50_000,
    "frac": "\\frac{" * 16_000,
    "digits of another script": "१," * 50_000,
    "nothing but an answer": "12 " + "apples " * 14_000,
    "an answer and spaces": "12" + " " * 100_000 + "x",
    "spaces and an answer": " " * 100_000 + "12 or",
    "an answer and stops": "12" + ".)" * 50_000 + "x",
    "boxed roots": "\\boxed{\\sqrt{2}" * 6_000,
    "boxed unknowns": "\\boxed{\\sqrt{x}}" * 6_000,
    "dollars": "answer is $" * 9_000,
    "marked dollars": "answer is $" + "$ $" * 33_000,
    "brackets": "answer is \\(" * 8_000,
    "answer tags": "<answer>" * 12_000,
    "marked lines": "#### x\n" * 14_000,
    "raised": "²" * 100_000,
    "nested": "#### " + "(" * 100_000,
    "unknowns": "answer is x " * 8_000,
    "equations": "answer is x=1 and y=" * 5_000,
    "headings": "## Answer\n" * 10_000,
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("score", [score_answer, score_lenient])
@pytest.mark.parametrize("gold", ["12", pytest.param(r"3\sqrt{2}", marks=pytest.mark.slow)])
def test_100_kilobytes_of_anything_take_linear_time(
    name: str, score: Callable[..., Score], gold: str
) -> None:
    # At most 0.1 s each; a quadratic pattern takes minutes.
    start = time.process_time()
    score(HARD[name], gold)
    assert time.process_time() - start < 2


@pytest.mark.slow
def test_ten_thousand_random_texts_of_up_to_100_kilobytes() -> None:
    """Each reading: under 10 ms in the median, never over 2 s; processor time, whatever else the machine
    does."""
    score_answer(r"\boxed{\sqrt{16}}", "4")  # starts the process that compares expressions
    seconds: dict[str, list[float]] = {"strict": [], "lenient": []}
    lengths = []
    for seed in range(10_000):
        text = fuzzed_text(seed)
        lengths.append(len(text))
        for name, score in (("strict", score_answer), ("lenient", score_lenient)):
            start = time.process_time()
            score(text, "12")
            seconds[name].append(time.process_time() - start)
    assert statistics.median(lengths) > 40_000 and max(lengths) > 99_000
    for name, values in seconds.items():
        worst = max(range(len(values)), key=values.__getitem__)
        assert statistics.median(values) < 0.010, name
        assert values[worst] < 2, (name, worst)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(35))
def test_one_line_of_a_megabyte(seed: int) -> None:
    text = fuzzed_text(seed).replace("\n", " ") or "12 "
    text = (text * (1_000_000 // len(text) + 1))[:1_000_000]
    # A pattern that backtracks takes hours; the limit has room for a slow machine with type checks.
    start = time.process_time()
    score_answer(text, "12")
    score_lenient(text, "12")
    assert time.process_time() - start < 60


FORMS = {
    "plain": "{n}",
    "commas": "#### {n:,}",
    "boxed": r"So it is $\boxed{{{n}}}$.",
    "####": "3 + 4 = 7, so\n#### {n}",
    "bold": "**{n}**",
    "unit": "#### {n} apples",
    "currency": "The answer is ${n}",
    "full stop": "{n}.",
    "restated": "The answer is {n}. Again:\n#### {n}",
    "sentence": "We add 3 and 4, so the answer is **{n} apples**.",
}


def _neighbours(number: int) -> list[int]:
    # One more, the sign turned, and the first two different digits swapped.
    digits = str(abs(number))
    swapped = [
        int(digits[:i] + digits[i + 1] + digits[i] + digits[i + 2 :])
        for i in range(len(digits) - 1)
        if digits[i] != digits[i + 1]
    ]
    return [number + 1] + [-number] * (number != 0) + swapped[:1]


@pytest.mark.parametrize("name", ["svamp", "gsm8k"])
def test_all_gold_answers_score_however_written_and_their_neighbours_never(
    test_data: Path, name: str
) -> None:
    rows = [
        json.loads(line)
        for split in ("train", "test")
        for line in (test_data / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(rows) == {"svamp": 1000, "gsm8k": 8792}[name]
    golds = [str(row["Answer"]) if name == "svamp" else row["answer"].rpartition("####")[2] for row in rows]
    for gold in set(golds):
        number = int(Fraction(gold.strip().replace(",", "")))
        for form in FORMS.values():
            text = form.format(n=number)
            assert score_answer(text, gold) == score_lenient(text, gold) == Score(True, True), (text, gold)
            for wrong in _neighbours(number):
                text = form.format(n=wrong)
                assert score_answer(text, gold) == score_lenient(text, gold) == Score(True, False), (
                    text,
                    gold,
                )
