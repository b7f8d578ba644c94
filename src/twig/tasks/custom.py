"""Loads your own data with your own reward functions.

    {"prompt": "Write a word that rhymes with tree.", "rhyme": "ee"}
    {"prompt": [{"role": "user", "content": "Write a word that rhymes with star."}], "rhyme": "ar"}

A `prompt` column (`task.prompt_column`; a column `question` does as well) of texts or chat messages; every
other column reaches the reward functions by its name. The data comes from `task.path` (a JSON, JSONL or
Parquet file, a folder, a name on the Hub) or from Python, the rewards from `task.reward_file` or from Python.
A completion is right if its reward reaches `task.correct_at`.

    {"question": "How many legs do 12 spiders have?", "answer": "96"}

Questions whose column `answer` holds a number or an expression need no reward function: a completion is right
if its marked answer is equal.
"""

from typing import Any

from twig.common.errors import UserError
from twig.core.types import Example
from twig.tasks.answers import readable
from twig.tasks.base import Task
from twig.tasks.data import Row, read_rows, require_columns
from twig.tasks.rewards import accuracy, score_last_number, score_number

# Names of arguments that reward functions get from the rollout.
_RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def load(settings: Any, train_dataset: Any = None, eval_dataset: Any = None) -> Task:
    """Loads the data; `load_task` adds the rewards. Raises UserError if the data is unusable."""
    rows = read_rows(settings.task, None, None, train_dataset, eval_dataset)
    column = _prompt_column(settings.task.prompt_column, [*rows.train, *rows.eval])
    train, evaluation = _examples(rows.train, column), _examples(rows.eval, column)
    if settings.task.reward_file is None and _have_answers([*train, *evaluation]):
        return Task(
            "custom", train, evaluation, (accuracy,), score=score_number, score_lenient=score_last_number
        )
    return Task("custom", train, evaluation, ())


def _prompt_column(name: str, rows: list[Row]) -> str:
    """Returns the column of the prompts: `question` if no row has the default, `prompt`."""
    if name != "prompt" or any("prompt" in row for row in rows):
        return name
    return "question" if any("question" in row for row in rows) else name


def _have_answers(examples: list[Example]) -> bool:
    """Tells whether each example has an answer that completions can be compared with."""
    return bool(examples) and all(readable(str(example.columns.get("answer", ""))) for example in examples)


def _examples(rows: list[Row], prompt_column: str) -> list[Example]:
    fix = "Set task.prompt_column to the column that holds the prompt, or rename that column"
    require_columns(rows, (prompt_column,), fix)
    examples = []
    for number, row in enumerate(rows):
        prompt = row[prompt_column]
        if not isinstance(prompt, str) and not _is_messages(prompt):
            raise UserError(
                f"data row {number}",
                f"{prompt_column} is neither text nor chat messages but {str(prompt)[:60]!r}",
                'Write text, or [{"role": "user", "content": "..."}]',
            )
        reserved = next((column for column in row if column in _RESERVED), None)
        if reserved is not None:
            raise UserError(
                "task.path",
                f"the data has a column {reserved!r}, a name that reward functions need",
                "Rename the column",
            )
        columns = {name: value for name, value in row.items() if name not in (prompt_column, "completion")}
        examples.append(Example(prompt, columns))
    return examples


def _is_messages(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and len(prompt) > 0
        and all(isinstance(part, dict) and isinstance(part.get("role"), str) for part in prompt)
        and all(isinstance(part.get("content"), str | list) for part in prompt)
    )
