"""The tasks by name, and `load_task`, which reads one with the settings' reward functions, sizes and texts.

A task is one small module here, imported when it is asked for. Knows no task's data or answers.
"""

import difflib
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

from twig.common.errors import UserError
from twig.tasks.base import Task
from twig.tasks.prompts import encode_prompt, fill_template, render_prompt
from twig.tasks.reward_calls import Limit
from twig.tasks.reward_functions import function_name, load_reward_file

__all__ = ["TASKS", "Task", "encode_prompt", "fill_template", "load_task", "render_prompt"]

TASKS = {
    "multiplication": "twig.tasks.multiplication",
    "svamp": "twig.tasks.svamp",
    "gsm8k": "twig.tasks.gsm8k",
    "custom": "twig.tasks.custom",
}
_MAKES_ITS_OWN_PROBLEMS = ("multiplication",)


def load_task(
    settings: Any,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    reward_funcs: Any = None,
    notice: Callable[[str], None] | None = None,
) -> Task:
    """The task that `settings.task` names.

    Data passed here (a Dataset, or a list of dicts) takes the place of the task's own; `reward_funcs` (one
    function or several), or else those of `task.reward_file`, take the place of its rewards. That file is
    run, after `notice` (None: the log) was told its path. Raises UserError for an unknown name, data that
    cannot be read, a missing column, or rewards and weights that do not match.
    """
    wanted = settings.task
    if wanted.name not in TASKS:
        near = difflib.get_close_matches(str(wanted.name), TASKS, 1)
        hint = f"did you mean {near[0]}?" if near else f"write one of {', '.join(TASKS)}"
        raise UserError(f"task.name: no task is called {wanted.name!r}; {hint}")
    module = import_module(TASKS[wanted.name])
    if train_dataset is None and eval_dataset is None:
        task = module.load(settings)
    elif wanted.name in _MAKES_ITS_OWN_PROBLEMS:
        raise UserError(
            f"task {wanted.name} makes its own problems and takes no data set; write task.name=custom"
        )
    else:
        task = module.load(settings, train_dataset, eval_dataset)
    return _with_rewards(_with_texts(task, wanted), wanted, reward_funcs, notice)


def _with_texts(task: Task, wanted: Any) -> Task:
    own = {
        "prompt_template": task.prompt_template if wanted.prompt_template is None else wanted.prompt_template,
        "system_prompt": task.system_prompt if wanted.system_prompt is None else wanted.system_prompt,
    }
    return replace(task, correct_at=wanted.correct_at, **own)


def _with_rewards(task: Task, wanted: Any, passed: Any, notice: Callable[[str], None] | None) -> Task:
    if passed is not None:
        functions = (passed,) if callable(passed) else tuple(passed)
    elif wanted.reward_file is not None:
        functions = load_reward_file(wanted.reward_file, notice)
    else:
        functions = task.reward_funcs
    if not functions:
        raise UserError(
            f"task {task.name} has no reward; write task.reward_file=FILE.py:FUNCTION, pass reward_funcs, or "
            "give each row a column answer with a number"
        )
    if wanted.name == "custom" and functions != task.reward_funcs:
        task = replace(task, score=None, score_lenient=None)  # its own rewards say what is right
    for function in functions:
        if not callable(function):
            raise UserError(f"reward_funcs: {function!r} is not a function; pass functions, not names")
    weights = wanted.reward_weights
    if weights is not None and len(weights) != len(functions):
        names = ", ".join(function_name(function) for function in functions)
        raise UserError(
            f"task.reward_weights: {len(weights)} weights for {len(functions)} reward functions ({names}); "
            "write one weight per function"
        )
    weights = None if weights is None else tuple(weights)
    limit = Limit(wanted.reward_timeout, wanted.reward_on_timeout)
    return replace(task, reward_funcs=functions, reward_weights=weights, reward_limit=limit)
