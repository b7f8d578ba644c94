"""Your own data with your own reward functions.

    {"prompt": "Write a word that rhymes with tree.", "rhyme": "ee"}
    {"prompt": [{"role": "user", "content": "Write a word that rhymes with star."}], "rhyme": "ar"}

A `prompt` column (`task.prompt_column`; a column `question` does as well) of texts or chat messages; every
other column reaches the reward functions by its name. The data comes from `task.path` (a JSON, JSONL or
Parquet file, a folder, a name on the Hub) or from Python, the rewards from `task.reward_file` or from Python.
A completion is right when its reward reaches `task.correct_at`.

    {"question": "How many legs do 12 spiders have?", "answer": "96"}

Questions whose column `answer` holds a number or an expression need no reward function: a completion is right
when its marked answer is the same.
"""

from typing import Any

from twig.common.errors import UserError
from twig.core.types import Example
from twig.tasks.answers import readable
from twig.tasks.base import Task
from twig.tasks.data import Row, read_rows, require_columns
from twig.tasks.rewards import accuracy, score_last_number, score_number

# What a reward function is given under these names comes from the rollout.
_TAKEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def load(settings: Any, train_dataset: Any = None, eval_dataset: Any = None) -> Task:
    """A task without rewards, for `load_task` to add them. Raises UserError where the data cannot serve."""
    rows = read_rows(settings.task, None, None, train_dataset, eval_dataset)
    column = _prompt_column(settings.task, [row for part in rows for row in part])
    train, evaluation = (_examples(part, column) for part in rows)
    if settings.task.reward_file is None and _have_answers([*train, *evaluation]):
        return Task(
            "custom", train, evaluation, (accuracy,), score=score_number, score_lenient=score_last_number
        )
    return Task("custom", train, evaluation, ())


def _prompt_column(wanted: Any, rows: list[Row]) -> str:
    has = [any(name in row for row in rows) for name in (wanted.prompt_column, "question")]
    return "question" if has == [False, True] and wanted.prompt_column == "prompt" else wanted.prompt_column


def _have_answers(examples: list[Example]) -> bool:
    """Whether each example has an answer that can be compared with a completion's."""
    return bool(examples) and all(readable(str(example.columns.get("answer", ""))) for example in examples)


def _examples(rows: list[Row], prompt_column: str) -> list[Example]:
    require_columns(
        rows, (prompt_column,), "write task.prompt_column= the one that holds the prompt, or rename it"
    )
    examples = []
    for number, row in enumerate(rows):
        prompt = row[prompt_column]
        if not isinstance(prompt, str) and not _is_messages(prompt):
            raise UserError(
                f"data row {number}: {prompt_column} is not text or chat messages but {str(prompt)[:60]!r}; "
                'write text, or [{"role": "user", "content": "..."}]'
            )
        taken = [column for column in row if column in _TAKEN]
        if taken:
            raise UserError(
                f"the data has a column {taken[0]!r}, a name that reward functions need; rename it"
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
