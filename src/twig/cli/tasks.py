"""Defines the command `twig tasks`: lists the tasks, or shows one of them."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from twig.cli.console import Overrides, quiet_libraries, result_console, show_row
from twig.cli.display import clean
from twig.common.errors import UserError
from twig.common.text import either, one_line
from twig.config.load import Settings, load, recipe_names
from twig.tasks.load import TASKS, load_task
from twig.tasks.prompts import render_prompt

# The settings need a model, but showing problems uses none.
_ANY_MODEL = "tiny-arithmetic"


def tasks_command(
    action: Annotated[str | None, typer.Argument(metavar="show", help="Show one task.")] = None,
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help="A recipe, a YAML file, a run folder, or a task's name."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """List the tasks; `show SOURCE`: a prompt as the model sees it, a right answer, and its score."""
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
    if task.score is None or "answer" not in example.columns:
        _say("\nThe task's reward functions decide what is right.")
        return
    # Most tasks read the line after ####, multiplication the text after the last #.
    forms = [f"#### {example.columns['answer']}", f"#{example.columns['answer']}"]
    gold = next((form for form in forms if task.score(form, example).right), forms[0])
    score = task.score(gold, example)
    verdict = f"answer {'found' if score.answered else 'not found'}, {'right' if score.right else 'wrong'}"
    _say(f"\nA right answer ends with:\n\n{clean(gold)}\n\nIts score: {float(score.right):g} ({verdict})")


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
