"""GSM8K: school mathematics of two to eight steps (Cobbe and others, 2021).

    question  Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting.
              How much did she earn?
    answer    Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.
              Working 50 minutes, she earned 0.2 x 50 = $<<0.2*50=10>>10.
              #### 10

From the Hub (`openai/gsm8k`: 7,473 to train on, 1,319 to test on) or from files with the same columns
(`task.path`); there an answer may also be the number alone. Rewards get `question`, `answer` (the number as
text), `solution` (the row's whole answer) and the row's other columns.
"""

from typing import Any

from twig.common.errors import UserError
from twig.core.types import Example
from twig.tasks.answers import read_number
from twig.tasks.base import Task
from twig.tasks.data import Row, read_rows, require_columns, row_name
from twig.tasks.rewards import accuracy, score_last_number, score_number

HUB_NAME = "openai/gsm8k"
HUB_CONFIG = "main"
PROMPT = """Solve the problem step by step.
Then write the answer on a line of its own: four hash signs and the number, such as #### 5.

Problem: {question}
Solution:"""


def load(settings: Any, train_dataset: Any = None, eval_dataset: Any = None) -> Task:
    """Loads GSM8K. Raises UserError if the data cannot be read or lacks a column."""
    rows = read_rows(settings.task, HUB_NAME, HUB_CONFIG, train_dataset, eval_dataset)
    return Task(
        "gsm8k",
        _examples(rows.train),
        _examples(rows.eval),
        (accuracy,),
        score=score_number,
        score_lenient=score_last_number,
        prompt_template=PROMPT,
    )


def _examples(rows: list[Row]) -> list[Example]:
    fix = "Set task.path to a file or folder with columns question and answer"
    require_columns(rows, ("question", "answer"), fix, texts=("question",))
    examples = []
    for number, row in enumerate(rows):
        solution = str(row["answer"])
        answer = solution.rpartition("####")[2].strip().replace(",", "")
        if read_number(answer, strict=False) is None:
            raise UserError(row_name(row, number), f"no number after #### in {solution[-60:]!r}", fix)
        columns = {**row, "answer": answer, "solution": solution}
        examples.append(Example(row["question"], columns))
    return examples
