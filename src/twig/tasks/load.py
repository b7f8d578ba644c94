"""Loads a task by name, with the reward functions, sizes and texts of the settings.

A task is one small module here, imported when it is used. Knows nothing about any task's data or answers.
"""

import difflib
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

from twig.common.errors import UserError
from twig.common.python_files import load_names
from twig.common.text import either
from twig.common.user_code import repr_of
from twig.tasks.base import Task
from twig.tasks.prompts import encode_prompt, fill_template, render_prompt
from twig.tasks.reward_calls import Limit
from twig.tasks.reward_functions import function_name

__all__ = ["TASKS", "Task", "encode_prompt", "fill_template", "load_task", "render_prompt", "texts_of"]

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
    """Loads the task that `settings.task` names.

    Data passed here (a Dataset, or a list of dicts) replaces the task's own; `reward_funcs` (one function or
    several), or else those of `task.reward_file`, replace its rewards. `notice` (None: the log) gets a line
    before that file is run. Raises UserError for an unknown name, unreadable data, a missing column, or
    rewards and weights that do not match.
    """
    group = settings.task
    if group.name not in TASKS:
        near = difflib.get_close_matches(str(group.name), TASKS, 1)
        fix = f"Set task.name={near[0]}" if near else f"Set task.name to {either(list(TASKS))}"
        raise UserError("task.name", f"no task is called {group.name!r}", fix)
    module = import_module(TASKS[group.name])
    if train_dataset is None and eval_dataset is None:
        task = module.load(settings)
    elif group.name in _MAKES_ITS_OWN_PROBLEMS:
        raise UserError(
            "task.name", f"{group.name} makes its own problems and takes no data set", "Set task.name=custom"
        )
    else:
        task = module.load(settings, train_dataset, eval_dataset)
    return _with_rewards(_with_texts(task, group), group, reward_funcs, notice)


def texts_of(settings: Any) -> Task:
    """Returns a task without data and rewards: how it writes a prompt."""
    group = settings.task
    template = getattr(import_module(TASKS[group.name]), "PROMPT", None)
    return _with_texts(Task(group.name, (), (), (), prompt_template=template), group)


def _with_texts(task: Task, group: Any) -> Task:
    texts = {
        "prompt_template": task.prompt_template if group.prompt_template is None else group.prompt_template,
        "system_prompt": task.system_prompt if group.system_prompt is None else group.system_prompt,
        "chat": group.chat,
        "chat_template_kwargs": group.chat_template_kwargs,
    }
    return replace(task, correct_at=group.correct_at, **texts)


def _with_rewards(task: Task, group: Any, passed: Any, notice: Callable[[str], None] | None) -> Task:
    if passed is not None:
        functions = tuple(passed) if isinstance(passed, list | tuple) else (passed,)
    elif group.reward_file is not None:
        functions = load_names(group.reward_file, "task.reward_file", "function", notice)
    else:
        functions = task.reward_funcs
    if not functions:
        raise UserError(
            f"task {task.name}",
            "no reward function",
            "Set task.reward_file=FILE.py:FUNCTION, pass reward_funcs=, or give each row a column answer "
            "with a number",
        )
    if group.name == "custom" and functions != task.reward_funcs:
        task = replace(task, score=None, score_lenient=None)  # its own rewards decide what is right
    for function in functions:
        _refuse_no_function(function)
    weights = group.reward_weights
    if weights is not None and len(weights) != len(functions):
        names = ", ".join(function_name(function) for function in functions)
        raise UserError(
            "task.reward_weights",
            f"{len(weights)} weights for {len(functions)} reward functions ({names})",
            "Write one weight per function",
        )
    weights = None if weights is None else tuple(weights)
    limit = Limit(group.reward_timeout, group.reward_on_timeout)
    return replace(task, reward_funcs=functions, reward_weights=weights, reward_limit=limit)


def _refuse_no_function(function: Any) -> None:
    """Raises UserError for what TRL takes as a reward and Twig does not: the name of a model, or a model."""
    torch = sys.modules.get("torch")
    is_model = torch is not None and isinstance(function, torch.nn.Module)
    if isinstance(function, str) or is_model:
        what = repr_of(function) if isinstance(function, str) else f"a {type(function).__name__}"
        raise UserError(
            "reward_funcs",
            f"{what} is a reward model, and Twig calls functions only",
            "Pass a function that runs the model and returns one number per completion",
        )
    if not callable(function):
        problem = f"{repr_of(function)} is not a function"
        raise UserError("reward_funcs", problem, "Pass a function, or a list of functions")
