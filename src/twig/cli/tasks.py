"""Defines the command `twig tasks`: lists the tasks, or shows one of them."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer
from rich.text import Text

from twig.cli.console import Overrides, quiet_libraries, result_console, show_row
from twig.cli.display import clean
from twig.common.errors import UserError
from twig.common.text import either, one_line
from twig.config.load import Settings
from twig.tasks.load import TASKS, load_task
from twig.tasks.prompts import render_prompt

# The settings need a model, but showing problems uses none.
_ANY_MODEL = "tiny-arithmetic"


def tasks_command(
    action: Annotated[str | None, typer.Argument(metavar="show", help="Show one task.")] = None,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The task to show.")] = None,
    overrides: Overrides = None,
) -> None:
    """List the tasks; `show NAME`: a prompt as the model sees it, a right answer, and its score."""
    if action is None:
        for task, module in TASKS.items():
            show_row(task, (import_module(module).__doc__ or "").partition("\n")[0])
    elif action != "show" or name is None:
        fix = f"Run twig tasks, or twig tasks show NAME with {either(list(TASKS))}"
        raise UserError(f"tasks {action}", "unknown action" if action != "show" else "no NAME", fix)
    else:
        _show_task(name, overrides or ())


def _show_task(name: str, overrides: Sequence[str]) -> None:
    values = {"model": {"name": _ANY_MODEL}, "task": {"name": name}}
    settings = Settings.from_dict(values, overrides)
    task = load_task(settings, notice=_notice)
    examples = task.eval or task.train
    if not examples:
        raise UserError(f"task {name}", "no problems to show", "Set task.path to another file")
    tokenizer = None
    if settings.model.name != _ANY_MODEL:
        from twig.engine.load import load_tokenizer

        quiet_libraries()
        tokenizer = load_tokenizer(settings.model)
    example = examples[0]
    counts = f"{len(task.train)} problems to train on, {len(task.eval)} to evaluate on."
    _say(f"{counts} A prompt:\n")
    _say(clean(render_prompt(task, example, tokenizer)))
    if task.score is None or "answer" not in example.columns:
        _say("\nThe task's reward functions decide what is right.")
        return
    # Most tasks read the line after ####, multiplication the text after the last #.
    forms = [f"#### {example.columns['answer']}", f"#{example.columns['answer']}"]
    gold = next((form for form in forms if task.score(form, example).right), forms[0])
    score = task.score(gold, example)
    verdict = f"answer {'found' if score.answered else 'not found'}, {'right' if score.right else 'wrong'}"
    _say(f"\nA right answer ends with:\n\n{clean(gold)}\n\nIts score: {float(score.right):g} ({verdict})")


def _say(text: str) -> None:
    result_console().print(Text(text), soft_wrap=True)


def _notice(text: str) -> None:
    sys.stderr.write(f"{one_line(text)}\n")
