"""The command `twig tasks`: what tasks there are, and one of them to look at."""

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

# Any model does where only the problems are asked for.
_ANY_MODEL = "tiny-arithmetic"


def tasks_command(
    action: Annotated[str | None, typer.Argument(metavar="show", help="Show one task.")] = None,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The task to show.")] = None,
    overrides: Overrides = None,
) -> None:
    """List the tasks; `show NAME`: a prompt as the model sees it, a right answer, and its score."""
    if action is None:
        for known, module in TASKS.items():
            show_row(known, (import_module(module).__doc__ or "").partition("\n")[0])
    elif action != "show" or name is None:
        raise UserError(
            f"tasks {action}: write twig tasks, or twig tasks show NAME with {either(list(TASKS))}"
        )
    else:
        _show_task(name, overrides or ())


def _show_task(name: str, overrides: Sequence[str]) -> None:
    values = {"model": {"name": _ANY_MODEL}, "task": {"name": name}}
    settings = Settings.from_dict(values, overrides)
    task = load_task(settings, notice=_notice)
    examples = task.eval or task.train
    if not examples:
        raise UserError(f"task {name}: there are no problems to show; write task.path= another file")
    tokenizer = None
    if settings.model.name != _ANY_MODEL:
        from twig.engine.load import load_tokenizer

        quiet_libraries()
        tokenizer = load_tokenizer(settings.model)
    example = examples[0]
    console = result_console()
    console.print(
        Text(f"{len(task.train)} problems to train on, {len(task.eval)} to evaluate on. A prompt:\n"),
        soft_wrap=True,
    )
    console.print(Text(clean(render_prompt(task, example, tokenizer, settings.task))), soft_wrap=True)
    if task.score is None or "answer" not in example.columns:
        console.print(Text("\nThe task's reward functions say what is right."), soft_wrap=True)
        return
    # The form that the task reads: most read the line after ####, multiplication what follows the last #.
    forms = [f"#### {example.columns['answer']}", f"#{example.columns['answer']}"]
    gold = next((form for form in forms if task.score(form, example).right), forms[0])
    score = task.score(gold, example)
    words = f"answer {'found' if score.found else 'not found'}, {'right' if score.right else 'wrong'}"
    console.print(
        Text(f"\nA right answer ends with:\n\n{clean(gold)}\n\nIts score: {float(score.right):g} ({words})"),
        soft_wrap=True,
    )


def _notice(text: str) -> None:
    sys.stderr.write(f"{one_line(text)}\n")
