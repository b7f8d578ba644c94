"""Answers read out of text: what counts as marked, what the last number is, exactness, and time."""

import json
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twig.answers import read_number, same_number, score_answer, score_lenient
from twig.records import Score

F = Fraction

# text, strict reading, lenient reading
CASES = [
    # markers
    ("#### 12", 12, 12),
    ("####12", 12, 12),
    ("####\n12", 12, 12),
    ("3 + 4 = 7\n#### 7\n", 7, 7),
    (r"\boxed{12}", 12, 12),
    (r"so $\boxed{ 12 }$.", 12, 12),
    (r"\boxed{x = 5}", 5, 5),
    (r"\boxed{\text{12 apples}}", 12, 12),
    (r"\boxed{}", None, None),
    ("The answer is 12.", 12, 12),
    ("the final answer is: 12", 12, 12),
    ("So the answer is **12**.", 12, 12),
    ("The answer is $12$", 12, 12),
    (r"The answer is \(12\)", 12, 12),
    ("The answer to the problem is 7", 7, 7),
    ("The answer (in dollars) is 7", 7, 7),
    ("The answer should be 7", 7, 7),
    ("The answer is about 12", 12, 12),
    ("Answer: 12", 12, 12),
    ("**Answer:** 12", 12, 12),
    ("ANSWER = 12", 12, 12),
    ("<answer>12</answer>", 12, 12),
    ("347*26=9022#9022", 9022, 9022),
    ("#-12 \n", -12, -12),
    # no marker, or none that can be read
    ("", None, None),
    ("   \n", None, None),
    ("no number here", None, None),
    ("It is 12.", None, 12),
    ("She has 12 apples.", None, 12),
    ("####", None, None),
    ("<answer></answer>", None, None),
    ("The answer is twelve.", None, None),
    ("item #3 comes first", None, 3),
    ("### 3\nAdd them.", None, 3),
    ("##### 3", None, 3),
    ("#### 2. Add them up", None, 2),
    ("#### 5\n#### ", 5, 5),
    # nothing but an answer
    ("12", 12, 12),
    (" 12.\n", 12, 12),
    ("-12", -12, -12),
    ("**12**", 12, 12),
    ("**$1,234.50**.", F("1234.5"), F("1234.5")),
    ("12 apples", 12, 12),
    ("12 square feet.", 12, 12),
    ("12 m²", 12, 12),
    ("12 %", 12, 12),
    ("12 €", 12, 12),
    ("$12$", 12, 12),
    (r"\(12\)", 12, 12),
    ("١٢", 12, 12),
    ("12 13", None, 13),
    ("12 or 13", None, 13),
    ("12 is wrong", None, 12),
    ("12\n13", None, 13),
    ("1. Add 3", None, 3),
    ("12 apples and some pears", None, 12),
    # the gold answer in a wrong sentence
    ("The answer is not 12.", None, 12),
    ("It is not 12; the answer is 13.", 13, 13),
    ("12 is wrong. #### 13", 13, 13),
    # several numbers
    ("#### 12\nThe answer is 13.", 13, 13),
    ("The answer is 12 or 13.", None, 13),
    ("The answer is 12, 13", None, 13),
    ("#### 12 13", None, 13),
    ("The answer is 12 and 13", None, 13),
    ("The answer is 12, which is 3 more.", 12, 3),
    ("The answer is 12. 13 is wrong.", 12, 13),
    ("the answer is 5 + 8 = 13 apples", 13, 13),
    ("the answer is x = 12", 12, 12),
    (r"#### 5 \times 3 = 15", 15, 15),
    ("the answer is 5 + 8", None, 8),
    ("the answer is 5 - 8", None, 8),
    ("the answer is 5 x 8", None, 8),
    ("the answer is 12^2", None, 2),
    (r"the answer is 3\sqrt{2}", None, 2),
    ("the answer is 12:30", None, 30),
    ("the answer is 10-15", None, 15),
    # commas, points, zeros, exponents
    ("#### 1,234", 1234, 1234),
    ("#### 1,234,567.89", F("1234567.89"), F("1234567.89")),
    ("#### 12,34,567", 1234567, 1234567),
    ("#### 12,5", None, 5),
    ("#### 1,2,3", None, 3),
    ("#### 1,234,5678", None, 5678),
    (r"#### 1{,}234", 1234, 1234),
    (r"#### 1\,234", 1234, 1234),
    ("#### 1\u202f234", 1234, 1234),
    ("#### 1 234", None, 234),
    ("of 12,345, we", None, 12345),
    ("#### 12.", 12, 12),
    ("#### 12.50", F(25, 2), F(25, 2)),
    ("#### .5", F(1, 2), F(1, 2)),
    ("#### 12.0", 12, 12),
    ("#### 1.2.3", None, 3),
    ("#### 0012", 12, 12),
    ("#### 1e3", 1000, 1000),
    ("#### 2.5e-1", F(1, 4), F(1, 4)),
    # signs
    ("#### -12", -12, -12),
    ("#### +12", 12, 12),
    ("#### −12", -12, -12),
    ("#### -$12", -12, -12),
    ("#### $-12", -12, -12),
    ("5-3", None, 3),
    ("5 - 3", None, 3),
    ("it falls to -3", None, -3),
    ("x=-3", None, -3),
    ("(5)-3", None, 3),
    # fractions
    ("#### 3/4", F(3, 4), F(3, 4)),
    ("#### -3 / 4", F(-3, 4), F(-3, 4)),
    ("#### 1 1/2", F(3, 2), F(3, 2)),
    (r"\boxed{\frac{3}{4}}", F(3, 4), F(3, 4)),
    (r"\boxed{-\dfrac{3}{4}}", F(-3, 4), F(-3, 4)),
    (r"\boxed{2\frac{1}{2}}", F(5, 2), F(5, 2)),
    (r"\boxed{\frac{-3}{4}}", F(-3, 4), F(-3, 4)),
    (r"\boxed{-\frac{-3}{4}}", F(3, 4), F(3, 4)),
    (r"\boxed{\frac34}", F(3, 4), F(3, 4)),
    ("#### ½", F(1, 2), F(1, 2)),
    ("#### 2½", F(5, 2), F(5, 2)),
    ("#### 12/0", None, None),
    ("#### 1.5/2", F(3, 4), F(3, 4)),
    # units, currency, percent
    ("#### 12%", 12, 12),
    (r"#### 12\%", 12, 12),
    ("#### $12", 12, 12),
    (r"#### \$12.50", F(25, 2), F(25, 2)),
    ("#### 12 €", 12, 12),
    ("#### €12", 12, 12),
    ("#### Rs. 500", 500, 500),
    ("it costs Rs.500", None, 500),
    ("#### 12km", 12, 12),
    ("#### 90°", 90, 90),
    ("#### 12!", 12, 12),
    (r"\boxed{12!}", None, 12),
    ("#### 2 million", None, 2),
    ("#### 2 dozen eggs", None, 2),
    ("the area is 12 m²", None, 12),
    ("H2O", None, None),
    # other scripts
    ("#### ١٢", 12, 12),
    ("#### ١٢٫٥", F(25, 2), F(25, 2)),
    ("#### १२", 12, 12),
    ("#### １２", 12, 12),
    ("＃＃＃＃ －１２．５", F(-25, 2), F(-25, 2)),
    ("答案是12", None, 12),
    ("m²", None, None),
]


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
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("score", [score_answer, score_lenient])
@pytest.mark.parametrize("gold", ["12", r"3\sqrt{2}"])
def test_100_kilobytes_of_anything_take_linear_time(
    name: str, score: Callable[..., Score], gold: str
) -> None:
    # About 0.1 s each on one slow core; a quadratic pattern takes minutes.
    start = time.perf_counter()
    score(HARD[name], gold)
    assert time.perf_counter() - start < 2


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
