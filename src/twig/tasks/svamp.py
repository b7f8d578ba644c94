"""SVAMP: word problems of one step, written so that the words mislead (Patel and others, 2021).

    Body      Marco and his dad went strawberry picking. Marco's dad's strawberries weighed 11 pounds. If
              together their strawberries weighed 30 pounds.
    Question  How much did Marco's strawberries weigh?
    Answer    19.0

From the Hub (`ChilleD/SVAMP`: 700 to train on, 300 to test on) or from files with the same columns
(`task.path`). Rewards get `question` (body and question) and `answer` (the number as text) besides the
row's own columns.
"""

from fractions import Fraction
from typing import Any

from twig.common.errors import UserError
from twig.core.types import Example
from twig.tasks.answers import read_number
from twig.tasks.base import Task
from twig.tasks.data import Row, read_rows, require_columns, row_name
from twig.tasks.rewards import accuracy, score_last_number, score_number

HUB_NAME = "ChilleD/SVAMP"
PROMPT = """Solve the problem. Think step by step in a few short sentences.
Then write the answer on a line of its own: four hash signs and the number, such as #### 5.

Problem: {question}
Solution:"""


def load(settings: Any, train_dataset: Any = None, eval_dataset: Any = None) -> Task:
    """Loads SVAMP. Raises UserError if the data cannot be read or lacks a column."""
    rows = read_rows(settings.task, HUB_NAME, None, train_dataset, eval_dataset)
    return Task(
        "svamp",
        _examples(rows.train),
        _examples(rows.eval),
        (accuracy,),
        score=score_number,
        score_lenient=score_last_number,
        prompt_template=PROMPT,
    )


def _examples(rows: list[Row]) -> list[Example]:
    fix = "Set task.path to a file or folder with columns Body, Question and Answer"
    require_columns(rows, ("Body", "Question", "Answer"), fix, texts=("Body", "Question"))
    examples = []
    for number, row in enumerate(rows):
        gold = read_number(str(row["Answer"]), strict=False)
        if not isinstance(gold, Fraction):
            raise UserError(row_name(row, number), f"the Answer {row['Answer']!r} is not a number", fix)
        question = f"{row['Body'].strip()} {row['Question'].strip()}"
        answer = str(gold) if gold.denominator == 1 else str(row["Answer"])
        examples.append(Example(question, {**row, "question": question, "answer": answer}))
    return examples
