"""Mistakes that a user can fix: nobody wraps them, and they are said once."""

import pickle
from importlib import import_module

import pytest
from project import MODULES

from twig.common.errors import UserError
from twig.config.load import Settings
from twig.core.algorithms.registry import load_algorithm

LEAST = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "multiplication"}}


def kinds(kind):
    return [kind, *(each for sub in kind.__subclasses__() for each in kinds(sub))]


def test_no_mistake_is_one_of_the_errors_that_libraries_raise():
    """Code that catches a library's ValueError, OSError or RuntimeError would wrap it and say it twice."""
    for name in ("common.python_files", "planner.model_shape", "tasks.reward_functions"):
        assert name in MODULES
        import_module(f"twig.{name}")
    every = kinds(UserError)
    assert len(every) >= 4
    for kind in every:
        builtin = [each for each in kind.__mro__ if each.__module__ == "builtins"]
        assert builtin == [Exception, BaseException, object], kind
    again = pickle.loads(pickle.dumps(UserError("key", "problem", "Fix")))
    assert (again.key, again.problem, again.fix) == ("key", "problem", "Fix")


@pytest.mark.parametrize(
    "values, key, more",
    [
        ({"train": {"max_time": "soon"}}, "train.max_time", False),
        ({"train": {"max_time": "soon"}, "eval": {"typo": 1}}, "eval.typo", True),
        ({"train": {"max_time": "soon"}, "memory": {"budget": "much"}}, "train.max_time", True),
        ({"train": {"warmup_steps": 3}}, "train.warmup_steps", False),
        ({"task": {"name": "custom", "reward_file": "x"}}, "task.reward_file", False),
        ({"algorithm": {"name": "s-grpo", "unbiased": True, "k": 1}}, "algorithm.k", False),
        ({"algorithm": {"name": "grpa"}}, "algorithm.name", False),
        ({"algorithm": {"file": "x"}}, "algorithm.file", False),
    ],
)
def test_a_value_that_a_check_refuses_is_said_once_with_its_origin(values, key, more):
    with pytest.raises(UserError) as refused:
        Settings.from_dict({**LEAST, **values}, label="mine.yaml")
    line = str(refused.value)
    assert line.startswith(f"mine.yaml: {key}: ") and line.count(f"{key}: ") == 1
    assert ("(and 1 more)" in line) == more


OWN = """
from typing import Self
from pydantic import model_validator
from twig import Algorithm
from twig.common.errors import UserError
from twig.core.algorithms.s_grpo import SGrpo
class Shipped(SGrpo):
    pass
class Own(Algorithm):
    @model_validator(mode="after")
    def _check(self) -> Self:
        raise UserError("algorithm.k", "it is odd", "Set algorithm.k=2")
"""


@pytest.mark.parametrize("name, values", [("Shipped", {"unbiased": True, "k": 1}), ("Own", {})])
def test_what_a_class_in_a_file_refuses_is_said_once(name, values, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    chosen = {"file": f"{tmp_path / 'own.py'}:{name}", **values}
    algorithm = Settings.from_dict({**LEAST, "algorithm": chosen}).algorithm
    with pytest.raises(UserError) as refused:
        load_algorithm(algorithm, lambda line: None)
    assert refused.value.key == "algorithm.k" and str(refused.value).count("algorithm.k: ") == 1
