"""Defines the command `twig tasks`: lists the tasks, or shows one of them."""

import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.text import Text

from twig.cli.console import Overrides, quiet_libraries, result_console, show_row
from twig.cli.display import clean
from twig.common.errors import UserError
from twig.common.text import either, one_line
from twig.config.load import Settings, load, recipe_names
from twig.core.types import Example
from twig.tasks.base import Task, right_answer
from twig.tasks.load import TASKS, load_task
from twig.tasks.prompts import render_prompt
from twig.tasks.rewards import score_completions

# The settings need a model, but showing problems uses none.
_ANY_MODEL = "tiny-arithmetic"
_SCORED = 3  # problems whose answers are scored
# How a right answer may be marked: most tasks read the line after ####, multiplication the text after the
# last #, and a reward of the user's own may read the answer alone. The one with the highest reward is shown.
_FORMS = ("#### {}", "#{}", "{}")


def tasks_command(
    action: Annotated[str | None, typer.Argument(metavar="show", help="Show one task.")] = None,
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help="A recipe, a YAML file, a run folder, or a task's name."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """List the tasks; `show SOURCE`: a prompt as the model sees it, a right answer, and rewards."""
    if action is None:
        for task, module in TASKS.items():
            show_row(task, (import_module(module).__doc__ or "").partition("\n")[0])
    elif action != "show" or source is None:
        fix = (
            f"Run twig tasks, or twig tasks show SOURCE with {either(list(TASKS))}, or what twig train takes"
        )
        raise UserError(f"tasks {action}", "unknown action" if action != "show" else "no SOURCE", fix)
    else:
        _show_task(source, overrides or ())


def _show_task(source: str, overrides: Sequence[str]) -> None:
    if source in recipe_names() or Path(source).suffix in (".yaml", ".yml") or Path(source).exists():
        settings = load(source, overrides)
    else:
        settings = Settings.from_dict({"model": {"name": _ANY_MODEL}, "task": {"name": source}}, overrides)
    task = load_task(settings, notice=_notice)
    examples = task.eval or task.train
    if not examples:
        raise UserError(f"task {task.name}", "no problems to show", "Set task.path to another file")
    tokenizer = _tokenizer(settings, needed=any(each.startswith("model.") for each in overrides))
    example = examples[0]
    counts = f"{len(task.train)} problems to train on, {len(task.eval)} to evaluate on."
    _say(f"{counts} A prompt:\n")
    _say(clean(render_prompt(task, example, tokenizer)))
    _show_answers(task, examples[:_SCORED], tokenizer)


def _show_answers(task: Task, examples: Sequence[Example], tokenizer: Any) -> None:
    """Prints a right answer, and what the reward gives to right and to empty answers."""
    golds = [right_answer(example) for example in examples]
    if None in golds:
        _say("\nThe task's reward functions decide what is right: the data has no column answer.")
        (empty,) = _rewards(task, examples, [[""] * len(examples)], tokenizer)
        _say(f"Reward of empty answers: {_listed(empty)}")
        return
    forms = [form for form in _FORMS if task.score is None or _is_right(task, form, examples[0])] or _FORMS
    texts = [[form.format(gold) for gold in golds] for form in forms]
    *right, empty = _rewards(task, examples, [*texts, [""] * len(examples)], tokenizer)
    best = max(range(len(forms)), key=lambda n: np.nan_to_num(right[n], nan=-np.inf).mean())
    _say(f"\nA right answer ends with:\n\n{clean(texts[best][0])}\n")
    if task.score is not None:
        score = task.score(texts[best][0], examples[0])
        found = "found" if score.answered else "not found"
        _say(f"Its score: {float(score.right):g} (answer {found}, {'right' if score.right else 'wrong'})")
    _say(f"Reward of right answers, {len(examples)} of them: {_listed(right[best])}")
    _say(f"Reward of empty answers: {_listed(empty)}")
    for line in _advice(task, right[best], empty):
        _say(line)


def _is_right(task: Task, form: str, example: Example) -> bool:
    return task.score is not None and task.score(form.format(right_answer(example)), example).right


def _rewards(
    task: Task, examples: Sequence[Example], answers: Sequence[Sequence[str]], tokenizer: Any
) -> np.ndarray:
    """Returns the rewards [answers, examples] of lists of texts, each text an answer to its example."""
    texts = [text for each in answers for text in each]
    ids = [tokenizer.encode(text, add_special_tokens=False) if tokenizer else [] for text in texts]
    total = score_completions(task, [*examples] * len(answers), texts, ids).total
    return total.reshape(len(answers), len(examples))


def _advice(task: Task, right: np.ndarray, empty: np.ndarray) -> Iterator[str]:
    """Yields what to change before training, if right answers cannot be told from others."""
    if not (right > empty).any():
        yield "The reward gives empty answers as much: see that it reads answers in this form."
    elif task.score is None and not (right >= task.correct_at).any():
        most = np.nanmax(right)
        yield (
            f"None reaches task.correct_at={task.correct_at:g}, from which a completion counts as right. If "
            f"the form is what the reward expects, set task.correct_at={most:g}."
        )


def _listed(rewards: np.ndarray) -> str:
    return ", ".join("none" if np.isnan(reward) else f"{reward:g}" for reward in rewards)


def _tokenizer(settings: Settings, needed: bool) -> Any:
    """Returns the model's tokenizer, which may have a chat template; None if there is none to load.

    Raises UserError if it is `needed`: the user named the model.
    """
    if settings.model.name == _ANY_MODEL:
        return None
    from twig.engine.load import load_tokenizer

    quiet_libraries()
    try:
        return load_tokenizer(settings.model)
    except UserError as error:
        if needed:
            raise
        _notice(f"note: without the chat template of {settings.model.name}: {error}")
        return None


def _say(text: str) -> None:
    result_console().print(Text(text), soft_wrap=True)


def _notice(text: str) -> None:
    sys.stderr.write(f"{one_line(text)}\n")
