"""Loads your own data with your own reward functions.

    {"prompt": "Write a word that rhymes with tree.", "rhyme": "ee"}
    {"prompt": [{"role": "user", "content": "Write a word that rhymes with star."}], "rhyme": "ar"}

A `prompt` column (`task.prompt_column`; a column `question` does as well) of texts or chat messages; every
other column reaches the reward functions by its name. The data comes from `task.path` (a JSON, JSONL or
Parquet file, a folder, a name on the Hub) or from Python, the rewards from `task.reward_file` or from Python.
A completion is right if its reward reaches `task.correct_at`.

A message holds text, or parts that are all text. If a prompt ends with a message of the assistant, the model
continues that message. Everything else that a chat may hold (images, calls of tools without text) is refused:
what the model does not read may not be trained on.

    {"question": "How many legs do 12 spiders have?", "answer": "96"}

Questions whose column `answer` holds a number or an expression need no reward function: a completion is right
if its marked answer is equal.
"""

from typing import Any

from twig.common.errors import UserError
from twig.common.user_code import repr_of
from twig.core.types import Example
from twig.tasks.answers import readable
from twig.tasks.base import Task
from twig.tasks.data import Row, read_rows, require_columns, row_name
from twig.tasks.prompts import text_of
from twig.tasks.rewards import accuracy, score_last_number, score_number

# Names of arguments that reward functions get from the rollout.
_RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# Columns that TRL shows to a model beside the prompt.
_SHOWN = ("image", "images")
# By TRL's names of data sets, the column of whole conversations: their last turn is the answer.
_CONVERSATIONS = "messages"
# What a message that the model continues may have: whatever a template writes after its text would be lost.
_CONTINUED = ("role", "content", "name", "reasoning_content")
_A_PROMPT = 'Write text, or [{"role": "user", "content": "..."}]'


def load(settings: Any, train_dataset: Any = None, eval_dataset: Any = None) -> Task:
    """Loads the data; `load_task` adds the rewards. Raises UserError if the data is unusable."""
    rows = read_rows(settings.task, None, None, train_dataset, eval_dataset)
    column = _prompt_column(settings.task.prompt_column, [*rows.train, *rows.eval])
    refuse_empty = settings.task.prompt_template is None
    train, evaluation = (_examples(each, column, refuse_empty) for each in (rows.train, rows.eval))
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


def _examples(rows: list[Row], prompt_column: str, refuse_empty: bool) -> list[Example]:
    fix = "Set task.prompt_column to the column that holds the prompt, or rename that column"
    if any(_CONVERSATIONS in row for row in rows):
        fix = f"Set task.prompt_column={_CONVERSATIONS}, and let each conversation end before the answer"
    require_columns(rows, (prompt_column,), fix)
    examples = []
    for place, row in enumerate(rows):
        prompt, where = row[prompt_column], row_name(row, place)
        if not isinstance(prompt, str):
            _refuse_unreadable(prompt, where, prompt_column)
        if prompt == "" and refuse_empty:  # a model with a begin token would answer it all the same
            unusable = "Remove the row, or write text in task.prompt_template"
            raise UserError(where, f"its {prompt_column} is empty", unusable)
        shown = next((column for column in _SHOWN if row.get(column) not in (None, [])), None)
        if shown is not None:
            problem = f"the column {shown!r}, which TRL shows to the model; Twig's models read only text"
            raise UserError(where, problem, "Rename it if it is for the rewards, or remove it")
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


def _refuse_unreadable(prompt: Any, where: str, column: str) -> None:
    """Raises UserError if a prompt is not a list of chat messages that a model can read to its end."""
    if not isinstance(prompt, list) or not prompt or not all(_has_a_role(message) for message in prompt):
        problem = f"{column} is neither text nor chat messages but {repr_of(prompt)}"
        raise UserError(where, problem, _A_PROMPT)
    for number, message in enumerate(prompt):
        content = message.get("content")
        if not isinstance(content, str) and text_of(content) is None:
            raise UserError(
                where,
                f"{column}: message {number} ({message['role']}) has {_described(content)} as content",
                'Write text there: "" if it only calls tools, and no images, which the model would not see',
            )
    if prompt[-1]["role"] != "assistant":
        return
    if column == _CONVERSATIONS:
        raise UserError(
            where,
            f"{column} ends with the assistant's answer, and the model is to write it",
            "Remove that message, or rename the column to prompt if the model is to continue it",
        )
    other = next((key for key, value in prompt[-1].items() if value and key not in _CONTINUED), None)
    if other is not None:
        problem = f"{column} ends with an assistant's message with {other}, which cannot be continued"
        raise UserError(where, problem, "End the prompt with the message of a user or a tool")


def _has_a_role(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)


def _described(content: Any) -> str:
    """Returns what a content is that is not text: the type of its first part that is none, or its own."""
    if content is None:
        return "null"
    if not isinstance(content, list):
        return f"a {type(content).__name__}"
    part = next((part for part in content if text_of([part]) is None), None)
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    return f"a part of the type {str(kind)[:40]!r}" if content else "an empty list"
