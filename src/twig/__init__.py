"""Twig: reinforcement learning for language models on small hardware.

`import twig` loads nothing heavy. The names below are fetched from their modules when first used, so the
command line starts quickly and credit assignment can be used where torch is not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twig.common.errors import UserError
    from twig.common.progress import Progress
    from twig.config.load import Settings
    from twig.config.load import load as load_settings
    from twig.config.schema import Algorithm
    from twig.core.algorithms.assign import ALGORITHMS, assign
    from twig.core.algorithms.base import Credit
    from twig.core.objective import Surrogate
    from twig.core.trie import PrefixTrie
    from twig.core.types import Completion, Example, Group
    from twig.engine.load import end_ids, load_model
    from twig.engine.lora import attach
    from twig.engine.pack import build_packs
    from twig.engine.policy import Policy
    from twig.engine.sampler import Request, sample
    from twig.evaluation.evaluate import Evaluation, evaluate_policy
    from twig.export.export import Exported, export_run
    from twig.tasks.base import Task
    from twig.tasks.load import load_task
    from twig.tasks.rewards import score_completions
    from twig.training.session import Run
    from twig.training.train import train

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Completion",
    "Credit",
    "Evaluation",
    "Example",
    "Exported",
    "Group",
    "Policy",
    "PrefixTrie",
    "Progress",
    "Request",
    "Run",
    "Settings",
    "Surrogate",
    "Task",
    "UserError",
    "__version__",
    "assign",
    "attach",
    "build_packs",
    "end_ids",
    "evaluate_policy",
    "export_run",
    "load_model",
    "load_settings",
    "load_task",
    "sample",
    "score_completions",
    "train",
]

# Public name -> the module that defines it, and after a colon its name there where that is another.
_EXPORTS = {
    "Completion": "twig.core.types",
    "Example": "twig.core.types",
    "Group": "twig.core.types",
    "UserError": "twig.common.errors",
    "Algorithm": "twig.config.schema",
    "Settings": "twig.config.load",
    "load_settings": "twig.config.load:load",
    "Task": "twig.tasks.base",
    "load_task": "twig.tasks.load",
    "score_completions": "twig.tasks.rewards",
    "PrefixTrie": "twig.core.trie",
    "ALGORITHMS": "twig.core.algorithms.assign",
    "Credit": "twig.core.algorithms.base",
    "assign": "twig.core.algorithms.assign",
    "Surrogate": "twig.core.objective",
    "build_packs": "twig.engine.pack",
    "end_ids": "twig.engine.load",
    "load_model": "twig.engine.load",
    "Policy": "twig.engine.policy",
    "attach": "twig.engine.lora",
    "Request": "twig.engine.sampler",
    "sample": "twig.engine.sampler",
    "Progress": "twig.common.progress",
    "Evaluation": "twig.evaluation.evaluate",
    "evaluate_policy": "twig.evaluation.evaluate",
    "Run": "twig.training.session",
    "Exported": "twig.export.export",
    "export_run": "twig.export.export",
    "train": "twig.training.train",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _EXPORTS:
        module, _, own_name = _EXPORTS[name].partition(":")
        return getattr(import_module(module), own_name or name)
    raise AttributeError(f"module 'twig' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """The installed version; '0+unknown' where the source is on the path without having been installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("twig-rl")
    except PackageNotFoundError:
        return "0+unknown"
