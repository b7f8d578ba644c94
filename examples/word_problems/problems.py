"""Makes the data of the warm start: word problems with worked lines, and generated arithmetic.

    Problem: Tom had 87 stamps. He gave 30 of them to his sister. How many stamps does he have now?
    Solution: 87 - 30 = 57
    #### 57

The word problems are those of MAWPS, as they are and with other numbers. The generated ones are plain sums,
so that the model learns to compute and to copy numbers before it learns to choose an operation.

What the data resembles, counted in SVAMP's 700 training problems:

- numbers: 32 % have one digit, 54 % two, 13 % three;
- types: 53 % subtraction, 19 % addition, 17 % division, 11 % multiplication;
- shape: the body's last clause has no comma before the question ("... 30 pounds How much did ...").

No problem of SVAMP is in the data: what begins with the body of one, whatever its numbers, is left out.
Everything is a function of the seed. Needs no torch and knows nothing of models.
"""

import ast
import csv
import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from twig.common.errors import UserError
from twig.tasks.multiplication import Split
from twig.tasks.multiplication import problems as factors

# The prompt at training and at evaluation: also `task.prompt_template`, with `task.chat=never`.
PROMPT = "Problem: {question}\nSolution:"

COLUMNS = ("Question", "Numbers", "Equation", "Answer", "Body", "Ques_Statement")
# Bodies of SVAMP, masked, that problems of MAWPS begin with; a test looks for more.
IN_SVAMP = (
    "# children were riding on the bus at the bus stop some more children got on the bus then there were # "
    "children altogether on the bus",
    "in a school there are # girls and # boys",
    "jesse s room is # feet long and # feet wide",
    "kelly has # nintendo games",
    "mary is baking a cake the recipe calls for # cups of flour and # cups of sugar she already put in # "
    "cups of flour",
    "there were # parents in the program and # pupils too",
)
DIGITS = {1: 0.32, 2: 0.54, 3: 0.14}  # share of SVAMP's numbers with so many digits
TYPES = {"-": 0.53, "+": 0.19, "/": 0.17, "*": 0.11}  # share of SVAMP's problems with this last operation
LARGEST = 999
_TRIES = 200  # draws of numbers for one problem; each template that allows any has them after a few
_AS_THEY_ARE = 0.25  # of the word problems; the others have other numbers
_MORE_STEPS = 0.22  # of the others; as in SVAMP
_WITH_A_SENTENCE = 0.4  # of the others that have one step
_HELD_OUT = 25  # one wording in so many
_WINDOW = 32  # batches that are sorted by length together
DRILL = 10  # sums of a drill

_MARK = re.compile(r"number(\d+)")


@dataclass(frozen=True)
class Problem:
    """A question, its solution (what follows the prompt) and answer; `kind`: mawps, sum, drill or product."""

    question: str
    solution: str
    answer: str
    kind: str

    @property
    def trained(self) -> list[tuple[int, int]]:
        """Where the parts of the solution are that are trained, first and behind the last character.

        Everything, but of a drill the results alone: its numbers follow from nothing.
        """
        if self.kind != "drill":
            return [(0, len(self.solution))]
        return [match.span(1) for match in re.finditer(r"=( \S+\n?)", self.solution)]

    @property
    def prompt(self) -> str:
        return PROMPT.format(question=self.question)


@dataclass(frozen=True)
class Template:
    """A problem of MAWPS: text with `number0` ..., their values, and the equation in prefix form."""

    text: str
    numbers: tuple[Fraction, ...]
    equation: tuple[str, ...]
    answer: Fraction


@dataclass(frozen=True)
class Mawps:
    """The usable problems of MAWPS, and how many were left out: a wrong answer, or in SVAMP."""

    templates: list[Template]
    wrong: int
    in_svamp: int


# ---- reading MAWPS -----------------------------------------------------------------------------------------


def read_mawps(source: str | Path) -> Mawps:
    """Reads MAWPS from a folder of CSV files, or from a data set on the Hub with the same columns.

    The folder's origin is data/cv_mawps of arkilpatel/SVAMP on GitHub: fold0.csv to fold4.csv, or as there,
    fold0/dev.csv to fold4/dev.csv. The Hub was not reachable when this was written, so that path is untested.
    Raises UserError if there is nothing to read.
    """
    templates, wrong, in_svamp = [], 0, 0
    for number, row in enumerate(_rows(source)):
        missing = [column for column in COLUMNS[:4] if not row.get(column)]
        if missing:
            fix = f"Pass data with the columns {', '.join(COLUMNS)}"
            raise UserError("--mawps", f"row {number} of {source} has no {missing[0]}", fix)
        template = _template(row)
        if is_in_svamp(fill(template, template.numbers)):
            in_svamp += 1
        elif not _is_right(template):
            wrong += 1
        else:
            templates.append(template)
    return Mawps(templates, wrong, in_svamp)


def _rows(source: str | Path) -> list[dict[str, Any]]:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
            return _hub_rows(str(source))
        raise UserError("--mawps", f"{source} is not a folder", "Pass the folder that holds fold0.csv")
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.csv")) or sorted(folder.glob("fold*/dev.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            rows += csv.DictReader(file)
    if not rows:
        raise UserError("--mawps", f"{folder} holds no CSV file", "Pass the folder that holds fold0.csv")
    return rows


def _hub_rows(name: str) -> list[dict[str, Any]]:
    import datasets

    try:
        data: Any = datasets.load_dataset(name)
    except Exception as error:  # the libraries raise dozens of kinds; each becomes one line
        problem = f"{name} is neither a folder nor readable on the Hub ({type(error).__name__})"
        raise UserError("--mawps", problem, "Pass the folder that holds fold0.csv") from error
    return [row for split in sorted(data) for row in data[split].to_list()]


def _template(row: dict[str, Any]) -> Template:
    body, question = str(row.get("Body") or ""), str(row.get("Ques_Statement") or "")
    if f"{body} {question}".split() == str(row["Question"]).split():
        body = tidy(body).rstrip(",").rstrip()
        question = tidy(question)
        text = f"{body} {question}"
    else:
        text = tidy(str(row["Question"]))
    numbers = tuple(Fraction(number) for number in str(row["Numbers"]).split())
    return Template(text, numbers, tuple(str(row["Equation"]).split()), Fraction(str(row["Answer"])))


def tidy(text: str) -> str:
    """Writes a text of MAWPS, whose words are split by spaces, as SVAMP writes it.

    >>> tidy("he did n't eat Sally ’ s number0 ice - creams . how many , then ?")
    "He didn't eat Sally's number0 ice-creams. How many, then?"
    """
    text = re.sub("[‘’`]", "'", text)
    text = re.sub("[“”]", '"', text)
    text = " ".join(text.split())
    text = re.sub(r"(\w) n't\b", r"\1n't", text)
    text = re.sub(r"(\w) ?' ?(s|t|d|m|re|ll|ve)\b", r"\1'\2", text)
    text = re.sub(r"s ' ", "s' ", text)
    text = re.sub(r"(\w) - (?=[A-Za-z])", r"\1-", text)
    text = re.sub(r" ([.,?!;:%])", r"\1", text)
    return re.sub(r"(?:^|(?<=[.?!] ))(?!number\d)[a-z]", lambda match: match[0].upper(), text)


def mask(text: str) -> str:
    """Returns the wording of a text: lower case, words only, each number a mark.

    >>> mask("Tom's 12 hens laid 1,204 eggs.")
    'tom s # hens laid # eggs'
    """
    return " ".join(re.findall("#|[a-z]+", re.sub(r"\d+(?:[.,]\d+)*", "#", text.lower())))


def is_in_svamp(question: str) -> bool:
    """Tells whether a question begins with the body of a problem of SVAMP, whatever its numbers."""
    return f"{mask(question)} ".startswith(tuple(f"{body} " for body in IN_SVAMP))


# ---- equations ---------------------------------------------------------------------------------------------


def prefix(equation: str) -> list[str]:
    """Returns an equation of SVAMP in prefix form.

    >>> prefix("( ( 8.0 - 2.0 ) / 3.0 )")
    ['/', '-', '8.0', '2.0', '3.0']
    """
    signs = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}

    def tokens(node: ast.expr) -> list[str]:
        if isinstance(node, ast.BinOp):
            return [signs[type(node.op)], *tokens(node.left), *tokens(node.right)]
        return [str(ast.literal_eval(node))]

    return tokens(ast.parse(equation.strip(), mode="eval").body)


def work_out(equation: Sequence[str], numbers: Sequence[Fraction]) -> list[tuple[str, Fraction, Fraction]]:
    """Returns the steps of an equation in prefix form, each as (operation, left, right), the last one last.

    >>> work_out("/ - number0 number1 number2".split(), [Fraction(n) for n in (101, 47, 6)])
    [('-', Fraction(101, 1), Fraction(47, 1)), ('/', Fraction(54, 1), Fraction(6, 1))]

    Raises ZeroDivisionError for a division by 0.
    """
    steps: list[tuple[str, Fraction, Fraction]] = []

    def value(start: int) -> tuple[Fraction, int]:
        token = equation[start]
        if token in TYPES:
            left, after = value(start + 1)
            right, after = value(after)
            steps.append((token, left, right))
            return apply(token, left, right), after
        match = _MARK.fullmatch(token)
        return (numbers[int(match[1])] if match else Fraction(token)), start + 1

    _, end = value(0)
    assert end == len(equation), "a prefix equation ends with its last operand"
    return steps


def apply(operation: str, left: Fraction, right: Fraction) -> Fraction:
    match operation:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
    return left / right


def _is_right(template: Template) -> bool:
    steps = work_out(template.equation, template.numbers)
    return bool(steps) and abs(apply(*steps[-1]) - template.answer) <= Fraction(1, 1000)


def as_text(number: Fraction) -> str:
    """Writes a number that is an integer or has at most two decimals.

    >>> as_text(Fraction("14.50")), as_text(Fraction("57.0"))
    ('14.5', '57')
    """
    assert is_short(number), "more than two decimals"
    return str(number.numerator) if number.denominator == 1 else f"{float(number):.2f}".rstrip("0")


def is_short(number: Fraction) -> bool:
    return (number * 100).denominator == 1


def write_solution(steps: Iterable[tuple[str, Fraction, Fraction]]) -> tuple[str, str]:
    """Returns worked lines with the answer's line, as they follow the prompt, and the answer."""
    lines, answer = [], ""
    for operation, left, right in steps:
        answer = as_text(apply(operation, left, right))
        lines.append(f"{as_text(left)} {operation} {as_text(right)} = {answer}")
    return " " + "\n".join([*lines, f"#### {answer}"]), answer


def fill(template: Template, numbers: Sequence[Fraction]) -> str:
    """Puts numbers into a template's text; those with many decimals are cut short."""

    def put(match: re.Match[str]) -> str:
        number = numbers[int(match[1])]
        return as_text(number if is_short(number) else Fraction(round(number * 100), 100))

    return _MARK.sub(put, template.text)


def as_it_is(template: Template) -> Problem | None:
    """Returns the problem with its own numbers, or None if one of its lines has more than two decimals."""
    steps = work_out(template.equation, template.numbers)
    results = [apply(*step) for step in steps]
    if not all(map(is_short, [*template.numbers, *results, *(n for step in steps for n in step[1:])])):
        return None
    return Problem(fill(template, template.numbers), *write_solution(steps), "mawps")


# ---- other numbers -----------------------------------------------------------------------------------------


def renumber(template: Template, rng: random.Random) -> Problem | None:
    """Returns the problem with numbers of SVAMP's size, or None if it allows no others or computes nothing.

    Every line's result is a positive integer, every division is exact. Numbers that were equal stay equal,
    for the equation may name either; a 1 stays 1, for its noun has no plural.
    """
    if len(template.equation) == 1 or any(number.denominator != 1 for number in template.numbers):
        return None
    for _ in range(_TRIES):
        drawn = {n: n if n == 1 else draw_number(rng) for n in sorted(set(template.numbers))}
        drawn = _make_exact(template, drawn, rng)
        numbers = [drawn[n] for n in template.numbers]
        fits = all(0 < number <= LARGEST and number.denominator == 1 for number in numbers)
        if not fits or len(set(drawn.values())) < len(drawn) or drawn.get(Fraction(1), 1) != 1:
            continue
        steps = work_out(template.equation, numbers)
        results = [apply(*step) for step in steps]
        small = all(a * b < 10_000 for operation, a, b in steps if operation == "*")
        whole = all(n.denominator == 1 for n in [*results, *(n for step in steps for n in step[1:])])
        if small and whole and min(results) > 0:
            return Problem(fill(template, numbers), *write_solution(steps), "mawps")
    return None


def draw_number(rng: random.Random) -> Fraction:
    """Draws a number from 2 to 999, its length as in SVAMP."""
    (digits,) = rng.choices(list(DIGITS), list(DIGITS.values()))
    return Fraction(rng.randrange(max(2, 10 ** (digits - 1)), 10**digits))


def _make_exact(
    template: Template, drawn: dict[Fraction, Fraction], rng: random.Random
) -> dict[Fraction, Fraction]:
    """Returns the drawn numbers with the leftmost number under each division set so that it is exact."""
    drawn, equation = dict(drawn), template.equation

    def numbers() -> list[Fraction]:
        return [drawn[n] for n in template.numbers]

    for start, token in enumerate(equation):
        if token != "/":
            continue
        left, right = _operands(equation, start)
        divisor = _value(right, numbers())
        if divisor <= 0:
            return drawn
        _set_leftmost(left, divisor * draw_number(rng), template, drawn, numbers)
    return drawn


def _operands(equation: Sequence[str], start: int) -> tuple[Sequence[str], Sequence[str]]:
    """Returns the two operands of the operation at `start`."""
    middle = _end(equation, start + 1)
    return equation[start + 1 : middle], equation[middle : _end(equation, middle)]


def _end(equation: Sequence[str], start: int) -> int:
    missing = 1
    while missing:
        missing += 1 if equation[start] in TYPES else -1
        start += 1
    return start


def _value(equation: Sequence[str], numbers: Sequence[Fraction]) -> Fraction:
    if len(equation) == 1:
        match = _MARK.fullmatch(equation[0])
        return numbers[int(match[1])] if match else Fraction(equation[0])
    try:
        return apply(*work_out(equation, numbers)[-1])
    except ZeroDivisionError:
        return Fraction(0)


def _set_leftmost(
    equation: Sequence[str],
    target: Fraction,
    template: Template,
    drawn: dict[Fraction, Fraction],
    numbers: Callable[[], list[Fraction]],
) -> None:
    """Sets the leftmost number of an equation so that its value is `target`, whatever that number is then."""
    while equation[0] in TYPES:
        left, right = _operands(equation, 0)
        other = _value(right, numbers())
        match equation[0]:
            case "+":
                target -= other
            case "-":
                target += other
            case "*":
                target = target / other if other else target
            case "/":
                target *= other
        equation = left
    name = _MARK.fullmatch(equation[0])
    if name:
        drawn[template.numbers[int(name[1])]] = target


# ---- sums --------------------------------------------------------------------------------------------------

_PHRASES = {
    "+": ("What is {a} plus {b}?", "Add {a} and {b}.", "What is the sum of {a} and {b}?"),
    "-": (
        "What is {a} minus {b}?",
        "Subtract {b} from {a}.",
        "Take {b} away from {a}.",
        "What is the difference between {a} and {b}?",
    ),
    "*": ("What is {a} times {b}?", "Multiply {a} by {b}.", "What is the product of {a} and {b}?"),
    "/": ("What is {a} divided by {b}?", "Divide {a} by {b}.", "How many times does {b} go into {a}?"),
}
_PLAIN = ("What is {a} {o} {b}?", "{a} {o} {b} = ?", "Calculate {a} {o} {b}.")
_NAMES = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
_PLACES = ("first", "second", "third")


def make_sum(rng: random.Random) -> Problem:
    """Draws a sum of SVAMP's size, more of those that are hard.

    A fifth has a third number that is not needed ("Here are three numbers: 45, 532 and 87. What is the
    second minus the third?"), so that copying operands is practised too; a tenth has two operations.
    """
    if rng.random() < 0.1:
        return _chain(rng)
    (draw,) = rng.choices(list(_SUMS), list(_SUMS.values()))
    operation, a, b = draw(rng)
    style = rng.random()
    if style < 0.2:
        question = _with_a_third(operation, a, b, rng)
    else:
        phrase = rng.choice(_PLAIN if style < 0.6 else _PHRASES[operation])
        question = phrase.format(a=a, b=b, o=operation)
    return Problem(question, *write_solution([(operation, Fraction(a), Fraction(b))]), "sum")


def make_drill(rng: random.Random) -> Problem:
    """Draws many sums in one text: for the same work a model sees three times as many as one by one."""
    lines, answer = [], ""
    draws, shares = [_small, *_SUMS], [0.3, *(0.7 * share for share in _SUMS.values())]
    while len(lines) < DRILL:
        operation, a, b = rng.choices(draws, shares)[0](rng)
        if not is_held_out(Problem(f"{a} {operation} {b}", "", "", "sum")):
            answer = as_text(apply(operation, Fraction(a), Fraction(b)))
            lines.append(f"{a} {operation} {b} = {answer}")
    return Problem(f"Write down {DRILL} sums.", " " + "\n".join(lines), answer, "drill")


def _small(rng: random.Random) -> tuple[str, int, int]:
    # As in the tables that children learn.
    operation, a, b = rng.choice("+--*/"), rng.randrange(1, 21), rng.randrange(1, 21)
    if operation in "*/":
        a = rng.randrange(2, 13)
    return operation, {"-": a + b, "/": a * b}.get(operation, a), b


def _borrowing(rng: random.Random) -> tuple[str, int, int]:
    # Three digits, less two or three, with a borrowing somewhere.
    while True:
        a = rng.randrange(100, 1000)
        b = rng.randrange(11, a)
        if a % 10 < b % 10 or a // 10 % 10 < b // 10 % 10:
            return "-", a, b


def _subtraction(rng: random.Random) -> tuple[str, int, int]:
    a, b = sorted((int(draw_number(rng)), int(draw_number(rng))), reverse=True)
    return "-", a + (a == b), b


def _addition(rng: random.Random) -> tuple[str, int, int]:
    return "+", int(draw_number(rng)), int(draw_number(rng))


def _long_addition(rng: random.Random) -> tuple[str, int, int]:
    a, b = _either_way(rng.randrange(100, 1000), rng.randrange(10, 1000), rng)
    return "+", a, b


def _either_way(a: int, b: int, rng: random.Random) -> tuple[int, int]:
    return (a, b) if rng.random() < 0.5 else (b, a)


def _short_product(rng: random.Random) -> tuple[str, int, int]:
    a, b = _either_way(rng.randrange(2, 10), int(draw_number(rng)), rng)
    return "*", a, b


def _long_product(rng: random.Random) -> tuple[str, int, int]:
    return "*", rng.randrange(10, 100), rng.randrange(10, 100)


def _division(rng: random.Random) -> tuple[str, int, int]:
    divisor = rng.randrange(2, 10) if rng.random() < 0.7 else rng.randrange(10, 100)
    return "/", divisor * rng.randrange(2, max(3, LARGEST // divisor + 1)), divisor


_SUMS: dict[Callable[[random.Random], tuple[str, int, int]], float] = {
    _borrowing: 0.28,
    _subtraction: 0.18,
    _addition: 0.10,
    _long_addition: 0.10,
    _short_product: 0.08,
    _long_product: 0.11,
    _division: 0.15,
}


def _with_a_third(operation: str, a: int, b: int, rng: random.Random) -> str:
    numbers = [a, b, int(draw_number(rng))]
    order = rng.sample(range(3), 3)
    shown, places = [numbers[i] for i in order], [order.index(0), order.index(1)]
    name = _NAMES[operation]
    if rng.random() < 0.5:
        x, y = (_PLACES[place] for place in places)
        return (
            f"Here are three numbers: {shown[0]}, {shown[1]} and {shown[2]}. What is the {x} {name} the {y}?"
        )
    letters = rng.choice(("ABC", "XYZ", "PQR"))
    x, y = (letters[place] for place in places)
    given = [f"{letter} is {number}" for letter, number in zip(letters, shown, strict=True)]
    return f"{given[0]}, {given[1]} and {given[2]}. What is {x} {name} {y}?"


def _chain(rng: random.Random) -> Problem:
    while True:
        a, b, c = (draw_number(rng) for _ in range(3))
        first, second = rng.choice(("++", "+-", "-+", "--", "*+", "*-"))
        middle, style = apply(first, a, b), rng.random()
        if style < 0.35:
            question, last = f"What is ({a} {first} {b}) {second} {c}?", (second, middle, c)
        elif style < 0.7:
            question = f"Start with {a}, {_DO[first]} {b}, then {_DO[second]} {c}. What is the result?"
            last = second, middle, c
        else:
            question, last = f"What is {c} - ({a} {first} {b})?", ("-", c, middle)
        if 0 < middle < 10_000 and apply(*last) > 0:
            return Problem(question, *write_solution([(first, a, b), last]), "sum")


_DO = {"+": "add", "-": "subtract", "*": "multiply by"}


# ---- products ----------------------------------------------------------------------------------------------


def products(size: int, seed: int, split: Split = "pretrain") -> list[Problem]:
    """Returns products of two numbers of two digits, half of them worked out and half answered at once.

    A model of both kinds is often wrong at once and mostly right when it works: what reinforcement learning
    can find out. The split `pretrain` has none of the problems of the task `multiplication`.

    >>> [each.solution for each in (multiply(34, 27, True), multiply(34, 27, False))]
    [' 34 * 20 = 680\\n34 * 7 = 238\\n680 + 238 = 918\\n#### 918', ' #### 918']
    """
    rng, pairs = random.Random(f"products {seed}"), factors(split, (2, 2), seed)
    return [multiply(*rng.choice(pairs), rng.random() < 0.5) for _ in range(size)]


def multiply(a: int, b: int, worked: bool) -> Problem:
    """Returns one product, worked out over the digits of its second factor or answered at once."""
    parts = [Fraction(part) for part in (b - b % 10, b % 10) if part]
    steps = [("*", Fraction(a), part) for part in parts]
    if len(parts) == 2:
        steps.append(("+", a * parts[0], a * parts[1]))
    solution, answer = write_solution(steps)
    return Problem(f"{a} * {b}", solution if worked else f" #### {answer}", answer, "product")


# ---- the whole ---------------------------------------------------------------------------------------------


def is_held_out(problem: Problem) -> bool:
    """Tells whether a problem is never trained on: by its wording, and of a sum by its text."""
    wording = problem.question if problem.kind == "sum" else mask(problem.question)
    return int.from_bytes(hashlib.sha256(wording.encode()).digest()[:4], "big") % _HELD_OUT == 0


def training_problems(
    templates: Sequence[Template], size: int, word_share: float, seed: int, drills: int = 0
) -> list[Problem]:
    """Returns `drills` drills and `size` problems in the order of training; `word_share` are word problems.

    That share rises evenly, from half of `word_share` to one and a half: sums first.
    """
    drill_rng, rng = random.Random(f"drills {seed}"), random.Random(f"training {seed}")
    first = [make_drill(drill_rng) for _ in range(drills)]
    word_problems = _word_problems(templates, rng)
    problems: list[Problem] = []
    while len(problems) < size:
        if rng.random() < word_share * (0.5 + len(problems) / size):
            problems.append(next(word_problems))
        elif not is_held_out(problem := make_sum(rng)):
            problems.append(problem)
    return first + problems


def held_out_problems(templates: Sequence[Template], size: int, seed: int) -> list[Problem]:
    """Returns problems that are never trained on, `size` sums and at most as many word problems."""
    rng = random.Random(f"held out {seed}")
    of_words = {p.question: p for p in map(as_it_is, templates) if p is not None and is_held_out(p)}
    sums: dict[str, Problem] = {}
    while len(sums) < size:
        problem = make_sum(rng)
        if is_held_out(problem):
            sums[problem.question] = problem
    return [*sums.values(), *list(of_words.values())[:size]]


def _word_problems(templates: Sequence[Template], rng: random.Random) -> Iterator[Problem]:
    """Yields word problems without end: a quarter as in MAWPS, the others with other numbers.

    Of the others, the last operations are as often as SVAMP's, and so is more than one step; every wording
    counts once. A problem of MAWPS nearly always needs all its numbers, half of SVAMP's do not: a share of
    those of one step begins with a sentence of another problem, whose number is not needed.
    """
    originals = [problem for problem in map(as_it_is, templates) if problem is not None]
    shapes: dict[tuple[str, bool], list[Template]] = {}
    for template in {mask(template.text): template for template in templates}.values():
        shapes.setdefault((template.equation[0], len(template.equation) > 3), []).append(template)
    weights = [TYPES[kind] * (_MORE_STEPS if more else 1 - _MORE_STEPS) for kind, more in shapes]
    sentences = _sentences(templates)
    if not originals:
        raise UserError("--mawps", "no problem that can be used", "Pass the folder that holds fold0.csv")
    while True:
        if rng.random() < _AS_THEY_ARE:
            problem, plain = rng.choice(originals), True
        else:
            ((kind, more),) = rng.choices(list(shapes), weights)
            problem, plain = renumber(rng.choice(shapes[kind, more]), rng), more
        if problem is None or is_held_out(problem):
            continue
        if not plain and sentences and rng.random() < _WITH_A_SENTENCE:
            sentence = _MARK.sub(str(draw_number(rng)), rng.choice(sentences))
            problem = replace(problem, question=f"{sentence} {problem.question}")
        yield problem


def _sentences(templates: Sequence[Template]) -> list[str]:
    """Returns the first sentences of problems that are short and have one number."""
    firsts = [template.text.partition(". ")[0] + "." for template in templates if ". " in template.text]
    short = [first for first in firsts if len(first.split()) <= 12 and len(_MARK.findall(first)) == 1]
    return sorted({first for first in short if not re.search(r"\bMrs?\.$", first)})


def arrange(problems: Sequence[Problem], batch_size: int, seed: int) -> list[Problem]:
    """Returns the problems so that each batch has similar lengths, and is little more than its own tokens.

    Problems move only within a window of some batches, so sums still come first.
    """
    rng = random.Random(f"arrange {seed}")
    arranged: list[Problem] = []
    for start in range(0, len(problems), batch_size * _WINDOW):
        window = sorted(problems[start : start + batch_size * _WINDOW], key=_length)
        batches = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        short = [batches.pop()] if len(batches[-1]) < batch_size else []
        rng.shuffle(batches)
        arranged += [problem for batch in [*batches, *short] for problem in batch]
    return arranged


def _length(problem: Problem) -> int:
    # About the number of tokens: digits are tokens of their own.
    return len(re.findall(r"\d|[^\W\d]+|[^\w\s]", problem.question + problem.solution))
