r"""Reads the answer in a model's text, and compares it with the gold answer.

There are two readings. The strict one takes only a marked answer: `#### 12`, `\boxed{12}`, "the answer is
12", "Answer: 12", `<answer>12`, or a final `#12`; the last marker that can be read counts. A text that is
only an answer ("12 apples.") needs no marker. The lenient reading takes the last number of the text.

Numbers are exact, nothing is evaluated, every pattern is linear in the text, and digit strings may have any
length. A marked answer that is an expression (`3\sqrt{2}`) is compared by `expressions.py`; numbers never
are. A plain sum (`5 + 8`) is no answer: it leaves the work to the reader. Simplifications: comma for
thousands, point for decimals; percent signs, currency and units are ignored ("12 %" is 12); scale words
("2 million") are not understood. Knows nothing about tasks or models.
"""

import functools
import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from twig.core.types import Score
from twig.tasks.expressions import MAX_LENGTH, allowed_expression, letters_of, same_expression

# A Decimal has more than _MAX_DIGITS digits: Python refuses to convert very long strings to integers.
Number = Fraction | Decimal
_MAX_DIGITS = 1000

# A run of digits with commas and points is matched whole and checked afterwards: "1,2,3" costs one match.
_RUN = r"(?:\d++(?:[.,]\d++)*+|(?<![\w.])\.\d++)"
_WELL_FORMED = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d+)(?:\.\d+)?|\.\d+")
_CURRENCY = r"(?:(?:\\?[$€£¥₹₩₽₺₦฿]|US\$|\b(?:USD|EUR|GBP|INR|Rs\.?))\s?)"
_VALUE = re.compile(
    rf"(?=[-+.\\\d$€£¥₹₩₽₺₦฿UEGIR])(?P<sign>[-+])?{_CURRENCY}?(?P<inner_sign>-)?"
    r"(?:(?:(?P<whole>\d{1,99})\s?)?\\[dtc]?frac"
    r"(?:\s?\{\s?(?P<top_sign>-)?(?P<top>\d+)\s?\}\s?\{\s?(?P<bottom>\d+)\s?\}|(?P<upper>\d)(?P<lower>\d))"
    r"|(?P<mixed>\d{1,99})\s(?P<mixed_top>\d{1,9})/(?P<mixed_bottom>\d{1,9})(?![\d/])"
    rf"|(?P<run>{_RUN})(?:[eE](?P<exponent>[-+]?\d{{1,3}})(?!\w))?(?:\s?/\s?(?P<over>{_RUN}))?)"
)

_MARKER = re.compile(
    r"^(?:\#{1,6}[ ]|[*_]{2})[ ]?(?:(?:the|my|final)[ ])*answer[*_:]{0,4}[ ]*(?=\n)"  # a heading
    r"|(?P<hashes>(?<!\#)\#{4}(?!\#))"
    r"|\\boxed\s?\{|<answer>"
    r"|(?<![^\W_])answer(?:[ ](?:to|for)[ ](?:the|this|your)[ ](?:problem|question))?"
    r"(?:[ ]\([^()\n]{0,40}\))?"
    r"[*_\" ]{0,4}(?:\b(?:is|was|are|equals|(?:should|would|will|must)[ ]be)\b|[:=])[*_ :=]{0,6}"
    r"|(?<!\#)\#(?=[-+]?\d[\d.,]*\s*\Z)",
    re.IGNORECASE | re.MULTILINE,
)
# What may stand between a marker and its number: quotes, brackets, markup, a few words ...
_LEAD = re.compile(
    r"(?:[\s*_`'\"“”‘’~≈:=>({\[]|\\(?:left)?[(\[]|\\(?:approx|sim)\b|\\(?:text|mathrm|mathbf|textbf)\{"
    r"|\$(?=[\s$(*])"
    r"|(?:approximately|about|around|exactly|only|just|simply|therefore|thus|equal\ to|a\ total\ of)\b)*",
    re.IGNORECASE,
)
# ... and a sum with its result, as in "x = 5 + 8 = 13"; "x + 5 = 13" is none.
_SUM = re.compile(
    r"(?:(?:[ \t*$({]*[a-zA-Z](?=[ \t*$)}]*=))?"
    r"(?:[ \t\d.+*/×÷·()$€£%^{}-]|,(?=\d)|(?<=[\d ])[xX](?=[ ]?\d)|\\(?:times|div|cdot|\$|,))*=)*[\s*$]*"
)
_REACH = 200  # characters that the two may span
# What may not follow: more digits, an operator with an operand, a second answer ("12 or 13", "x = 1, y = 2").
_NO_ANSWER = re.compile(
    r"[.,:_^/'’]?\{?\d|[ ]\d|[eE][-+]?\d|[⁰¹²³⁴⁵⁶⁷⁸⁹]|\*\*[\d({]"
    r"|\$?[ ]?[-+*/×÷·^xX–][ ]?[-+/]?\\?[$€£]?[\d({\\]|[ ]?[<>≤≥][ ]?\d"
    r"|\s?(?:\\(?:times|cdot|div|pm|sqrt|pi)|[√π])"
    r"|,?\s?(?:\\text\{\s?)?(?:or|and|to)[\s}]\s?[^\w\n]{0,3}\d|\s?,\s?[-+$]?\d|;\d"
    r"|\$?,?[ ]?(?:(?:or|and)\s)?\$?[a-zA-Z][ ]?="
    r"|\s(?:plus|minus|times|over|divided by|multiplied by)\s[^\w\n]{0,3}\d|\s?\\?%\s?of\s[^\w\n]{0,3}\d"
    r"|!\s?[}$]|\s(?:hundred|thousand|million|billion|trillion|dozen)\b"
)
# "#### 2. Add them up" is a heading, "Answer:" above "1. 12" begins a list.
_HEADING = re.compile(r"[.)][ \t]+[A-Za-z]")
_ITEM = re.compile(r"[.)][ \t]+[-+$]?\d")
# What may stand around a text that is only an answer; a unit of one or two words may follow.
_ALONE = re.compile(r"[\s*_`(\[]*(?:\\[(\[]|\$(?=\d[^$\n]{0,99}\$))?\s*")
_ENDING = re.compile(
    r"(?:\s?\\?%|\s?[€£¥°])?(?:\s?(?!(?:is|are|was|or|and|not|plus|minus|times)\b)"
    r"[^\W\d_]{1,20}(?:/[^\W\d_]{1,9})?[²³]?){0,2}"
    r"[\s*_`.!)\]$]*+(?:\\[)\]][\s*_`.!]*+)?\Z"
)
# An expression in mathematics mode, or else the rest of its line.
_MATHS = re.compile(
    r"[\s*_:]*+(?:\$\$([^$]{1,200})\$\$|\$([^$]{1,200})\$|\\\((.{1,200}?)\\\)|\\\[(.{1,200}?)\\\])"
)
_LINE = re.compile(r"[ \t*_:`]*([^\n<]{1,240})")
_SECOND = re.compile(r"[\s,]*(?:or|and)\b|[ ]*[-+*/=^×÷,$\\\d]")  # what may not follow: see _NO_ANSWER
_UNIT = re.compile(r"\\(?:text|mathrm|textbf)\{[^{}]{0,40}\}(?:\^\{?\d\}?)?|\\?%|\^\{?\\circ\}?|°")
_BRACE = re.compile("[{}]")
_WORKED = re.compile(r"\\(?:sqrt|pi|sin|cos|tan|ln|log)|\^|(?<!\\)\b[A-Za-z]")  # more than an unfinished sum


@dataclass(frozen=True)
class Expression:
    """An answer that is not a number, as LaTeX that `expressions.py` allows."""

    latex: str


def read_number(text: str, strict: bool) -> Number | None:
    r"""Returns the number that a text answers with, exact, or None.

    >>> read_number("3 + 4 = 7, so\n#### 1,007", strict=True)
    Fraction(1007, 1)
    >>> print(read_number("Of the 12, a half or 6.5 are left.", strict=True))
    None
    >>> read_number("Of the 12, a half or 6.5 are left.", strict=False)
    Fraction(13, 2)
    """
    answer = read_answer(text) if strict else _last(_plain(text))
    return None if isinstance(answer, Expression) else answer


def read_answer(text: str, letters: str | None = "") -> Number | Expression | None:
    r"""Returns the strict reading: the number or expression that a text marks as its answer, or None.

    `letters` are the unknowns that an expression may have; None allows any.

    >>> read_answer(r"so $x = \boxed{3\sqrt2}$.")
    Expression(latex='3\\sqrt{2}')
    """
    text = _plain(text)
    for marker in reversed(list(_MARKER.finditer(text))):
        answer = _marked_number(text, marker)
        if answer is None:
            answer = _marked_expression(text, marker, letters)
        if answer is not None:
            return answer
    return _alone(text, letters)


def same_number(a: Number | None, b: Number | None) -> bool:
    """Tells whether both are numbers and exactly equal."""
    return a is not None and type(a) is type(b) and a == b


def score_answer(text: str, gold: str) -> Score:
    """Scores the strict reading of a completion: has it an answer, and is that the gold one.

    >>> score_answer("The answer is 12 apples.", "12")
    Score(answered=True, right=True)
    """
    expected = _gold(gold)
    letters = letters_of(expected.latex) if isinstance(expected, Expression) else ""
    answer = read_answer(text, letters)
    return Score(answer is not None, _same(answer, expected))


def score_lenient(text: str, gold: str) -> Score:
    """Scores the lenient reading of a completion; if the gold answer is an expression, first the strict one.

    >>> score_lenient("So 12 apples are left.", "12")
    Score(answered=True, right=True)
    """
    expected = _gold(gold)
    if isinstance(expected, Expression):
        strict = score_answer(text, gold)
        if strict.answered:
            return strict
    number = read_number(text, strict=False)
    return Score(number is not None, _same(number, expected))


def answer_text(text: str) -> str | None:
    """Returns the strict reading of a text in a form that equal numbers share, or None.

    >>> answer_text("#### 12.50") == answer_text("The answer is 25/2.")
    True
    """
    answer = read_answer(text, None)
    return None if answer is None else answer.latex if isinstance(answer, Expression) else str(answer)


def readable(gold: str) -> bool:
    """Tells whether a gold answer is a number or an expression that answers can be compared with."""
    return _gold(gold) is not None


@functools.lru_cache(maxsize=4096)
def _gold(text: str) -> Number | Expression | None:
    answer = read_answer(text, None)
    return read_number(text, strict=False) if answer is None else answer


def _same(answer: Number | Expression | None, gold: Number | Expression | None) -> bool:
    if answer is None or gold is None:
        return False
    if isinstance(answer, Expression) or isinstance(gold, Expression):
        expected, given = _as_latex(gold), _as_latex(answer)
        return expected is not None and given is not None and same_expression(expected, given)
    return same_number(answer, gold)


def _as_latex(side: Number | Expression) -> str | None:
    if isinstance(side, Expression):
        return side.latex
    # A number with more digits than an expression may have characters equals none.
    if isinstance(side, Decimal) or max(abs(side.numerator), side.denominator) >= 10**99:
        return None
    decimal = f"{Decimal(side.numerator) / side.denominator:f}"
    return decimal if Fraction(decimal) == side else str(side)  # 1/3 has no decimal form


def _marked_number(text: str, marker: re.Match[str]) -> Number | None:
    start = _skip(_LEAD, text, marker.end(), marker.end() + _REACH)
    start = _skip(_SUM, text, start, marker.end() + _REACH)
    value = _VALUE.match(text, start)
    if value is None or _NO_ANSWER.match(text, value.end()):
        return None
    if marker["hashes"] and _HEADING.match(text, value.end()):
        return None
    if _ITEM.match(text, value.end()) and "\n" in text[marker.end() : value.start()]:
        return None
    return _number(value)


def _skip(pattern: re.Pattern[str], text: str, start: int, stop: int) -> int:
    """Returns where the text goes on after a pattern that matches everywhere, if only the empty text."""
    match = pattern.match(text, start, stop)
    assert match is not None, "the pattern matches the empty text"
    return match.end()


def _marked_expression(text: str, marker: re.Match[str], letters: str | None) -> Expression | None:
    if marker[0].endswith("{"):
        inside = _braces(text, marker.end())
        return _expression(inside, letters) if inside else None
    if marker[0] == "#":
        return None
    maths = _MATHS.match(text, marker.end())
    if maths is not None:
        if _SECOND.match(text, maths.end()):
            return None
        return _expression(maths[maths.lastindex or 0], letters)
    line = _LINE.match(text, marker.end())
    return _expression(line[1].rstrip(" \t*_`."), letters) if line else None


def _alone(text: str, letters: str | None) -> Number | Expression | None:
    # A text that is only an answer.
    value = _VALUE.match(text, _skip(_ALONE, text, 0, len(text)))
    if value is not None and not _NO_ANSWER.match(text, value.end()) and _ENDING.match(text, value.end()):
        return _number(value)
    text = text.strip() if len(text) <= 2 * MAX_LENGTH else ""
    if not text or "\n" in text:
        return None
    maths = _MATHS.match(text)
    if maths is not None:
        whole = maths.end() >= len(text.rstrip(" *_."))
        return _expression(maths[maths.lastindex or 0], letters) if whole else None
    return _expression(text.rstrip("*_.").lstrip("*_"), letters)


def _braces(text: str, start: int) -> str:
    # The text between the brace before `start` and the one that closes it; "" if none does.
    if text.find("}", start, start + MAX_LENGTH + 1) < 0:  # keeps texts of only open braces linear
        return ""
    depth = 1
    for brace in _BRACE.finditer(text, start, start + MAX_LENGTH + 1):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : brace.start()]
    return ""


def _expression(text: str, letters: str | None) -> Expression | None:
    text = _UNIT.sub("", text).strip(" $")
    latex = allowed_expression(text.rpartition("=")[2], letters)
    return Expression(latex) if latex and _WORKED.search(latex) else None


def _last(text: str) -> Number | None:
    for value in reversed(list(_VALUE.finditer(text))):
        before = text[max(value.start() - 2, 0) : value.start()]
        # "_12_" is marked up, "x_12" is a name; a number with a sign is not part of a word.
        if value["sign"] or not re.search(r"[A-Za-z]_?\Z|\d_\Z", before):
            is_operator = before[-1:].isalnum() or before[-1:] in (*")]}%",)
            # "5-3" ends with a 3, "= -3" and "5 -3" with a minus
            return _number(value, signed=not is_operator, lenient=True)
    return None


def _number(value: re.Match[str], signed: bool = True, lenient: bool = False) -> Number | None:
    # The exact value of a _VALUE match; None for a malformed run such as "1,2,3" (lenient: its last part), or
    # over 0.
    negative = signed and (value["sign"] == "-") != (value["inner_sign"] == "-")
    if value["top_sign"]:
        negative = not negative
    whole, top, bottom = value["whole"], value["top"] or value["upper"], value["bottom"] or value["lower"]
    if value["mixed"]:
        whole, top, bottom = value["mixed"], value["mixed_top"], value["mixed_bottom"]
    if top is not None:
        size = _quotient(_exact(whole or "0"), _exact(top), _exact(bottom))
    elif value["over"]:
        size = _quotient(Fraction(0), _exact(value["run"], value["exponent"]), _exact(value["over"]))
    else:
        run = value["run"]
        if lenient and not _WELL_FORMED.fullmatch(run):
            run = re.split("[.,]", run)[-1]
        return _exact(run, value["exponent"], "-" if negative else "")
    return -size if size is not None and negative else size


def _quotient(whole: Number | None, top: Number | None, bottom: Number | None) -> Fraction | None:
    if isinstance(whole, Fraction) and isinstance(top, Fraction) and isinstance(bottom, Fraction) and bottom:
        return whole + top / bottom
    return None


def _exact(run: str, exponent: str | None = None, sign: str = "") -> Number | None:
    if not _WELL_FORMED.fullmatch(run):
        return None
    whole, _, decimals = run.replace(",", "").partition(".")
    if len(whole) + len(decimals) > _MAX_DIGITS:  # zeros at either end carry nothing
        whole, decimals = whole.lstrip("0"), decimals.rstrip("0")
    text = f"{sign}{whole or '0'}.{decimals or '0'}"
    if len(whole) + len(decimals) > _MAX_DIGITS:
        return Decimal(text)
    return Fraction(f"{text}e{exponent or 0}")


def _plain(text: str) -> str:
    # Writes digits of all scripts, full-width signs, vulgar fractions and the minus sign in ASCII, and the
    # spaced commas and degrees of LaTeX as plain ones.
    if not text.isascii():
        text = re.sub("(?<=\\d)[\u00a0\u2009\u202f](?=\\d{3}(?!\\d))", ",", text)
        text = text.translate({ord(char): _ascii(char) for char in set(text) if not char.isascii()})
    for latex, plain in (("{,}", ","), ("\\,", ","), ("\\!", ""), ("^\\circ", "°"), ("^{\\circ}", "°")):
        text = text.replace(latex, plain)
    return text


def _ascii(char: str) -> str:
    decimal = unicodedata.decimal(char, None)
    if decimal is not None:
        return str(decimal)
    if "\uff01" <= char <= "\uff5e":  # the full-width forms of ! to ~
        return chr(ord(char) - 0xFEE0)
    if unicodedata.decomposition(char).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", char).replace("\u2044", "/")
    return {"−": "-", "﹣": "-", "٫": ".", "٬": ",", "⁄": "/", "∕": "/"}.get(char, char)
