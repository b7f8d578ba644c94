"""Writes more problems to train on than SVAMP has: its own with other numbers, and those of MAWPS.

    python more_problems.py --svamp SVAMP --mawps cv_mawps --output more
    twig train svamp-smollm2-135m task.path=more

The folder gets train.jsonl and test.jsonl. The latter are SVAMP's test problems, or with `--held-out N` the N
training problems that `task.path=SVAMP/train.jsonl task.eval_size=N` evaluates on. No other numbers are made
of those.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from problems import Template, as_it_is, prefix, read_mawps, renumber

from twig.common.errors import UserError
from twig.common.files import write_whole
from twig.config.load import load
from twig.core.types import Example
from twig.tasks.load import load_task

RECIPE = "svamp-smollm2-135m"
# Two parts that make the whole again with a space between them: to the last comma or full stop, and the rest.
_PARTS = re.compile(r"(.*[.,?!]|\S+) (.+)", re.DOTALL)
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the folder; returns 2 after an error of one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--svamp", type=Path, required=True, help="SVAMP: a folder with train.jsonl")
    parser.add_argument("--mawps", help="folder of MAWPS's CSV files; none without")
    parser.add_argument("--copies", type=int, default=2, help="of each problem with other numbers (2)")
    parser.add_argument(
        "--held-out", type=int, default=0, metavar="N", help="evaluate on N training problems"
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the other numbers (0)")
    options = parser.parse_args(argv)
    try:
        train, test = more(options.svamp, options.mawps, options.copies, options.held_out, options.seed)
        write(options.output, train, test)
    except UserError as error:
        print(f"more_problems: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {len(train)} problems to train on, {len(test)} to evaluate on")
    return 0


def more(
    svamp: Path, mawps: str | None, copies: int, held_out: int, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Returns rows to train and to evaluate on, with SVAMP's columns Body, Question and Answer."""
    path = svamp / "train.jsonl" if held_out else svamp
    chosen = [f"task.eval_size={held_out}"] if held_out else []
    task = load_task(load(RECIPE, [f"task.path={path}", *chosen]))
    rng = random.Random(f"more {seed}")
    train = [_row(example.columns["question"], example.columns["answer"]) for example in task.train]
    for template in map(template_of, task.train):
        others = {problem for _ in range(copies) if (problem := renumber(template, rng)) is not None}
        train += [
            _row(problem.question, problem.answer) for problem in sorted(others, key=lambda p: p.question)
        ]
    for template in read_mawps(mawps).templates if mawps else []:
        if (problem := as_it_is(template)) is not None:
            train.append(_row(problem.question, problem.answer))
    return train, [_row(example.columns["question"], example.columns["answer"]) for example in task.eval]


def write(folder: Path, train: list[dict[str, str]], test: list[dict[str, str]]) -> None:
    """Writes both files; raises UserError if the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (("train", train), ("test", test)):
            write_whole(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise UserError(
            "--output", f"{folder} cannot be written ({error.strerror})", "Name a folder"
        ) from error


def template_of(example: Example) -> Template:
    """Returns a problem of SVAMP with marks in place of its numbers; raises UserError without an equation.

    >>> row = {"question": "Tom had 8 hens, sold 3 and fed 8. How many has he?"}
    >>> row |= {"Equation": "( 8.0 - 3.0 )", "answer": "5"}
    >>> template = template_of(Example(row["question"], row))
    >>> template.text, template.equation
    ('Tom had number0 hens, sold number1 and fed number2. How many has he?', ('-', 'number0', 'number1'))
    """
    numbers = [Fraction(text.replace(",", "")) for text in _NUMBER.findall(example.columns["question"])]
    marks = iter(range(len(numbers)))
    text = _NUMBER.sub(lambda _: f"number{next(marks)}", example.columns["question"])
    written = example.columns.get("Equation")
    try:
        equation = [
            f"number{numbers.index(Fraction(token))}"
            if token not in "+-*/" and Fraction(token) in numbers
            else token
            for token in prefix(str(written))
        ]
    except (SyntaxError, ValueError, KeyError) as error:
        fix = "Pass SVAMP with its column Equation, such as ( 8.0 - 3.0 )"
        raise UserError("--svamp", f"a problem has the equation {written!r}", fix) from error
    return Template(text, tuple(numbers), tuple(equation), Fraction(example.columns["answer"]))


def _row(question: str, answer: str) -> dict[str, str]:
    parts = _PARTS.fullmatch(question.strip())
    assert parts is not None, "a problem has two words"
    return {"Body": parts[1], "Question": parts[2], "Answer": answer}


if __name__ == "__main__":
    sys.exit(main())
