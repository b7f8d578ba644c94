"""Twig: reinforcement learning for language models on small hardware.

`import twig` loads nothing heavy. The names below are fetched from their modules when first used, so the
command line starts quickly and credit assignment can be used where torch is not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twig.adapter import attach
    from twig.config import Settings
    from twig.config import load as load_settings
    from twig.credit import ALGORITHMS, Credit, assign
    from twig.evaluate import Evaluation, evaluate_policy
    from twig.export import Exported, export_run
    from twig.loop import train
    from twig.models import end_ids, load_model
    from twig.objective import Surrogate
    from twig.options import Algorithm
    from twig.pack import build_packs
    from twig.policy import Policy
    from twig.progress import Progress
    from twig.records import Completion, Example, Group, UserError
    from twig.rollout import Request, sample
    from twig.session import Run
    from twig.tasks import Task, load_task
    from twig.tasks.rewards import score_completions
    from twig.trie import PrefixTrie

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
    "Completion": "twig.records",
    "Example": "twig.records",
    "Group": "twig.records",
    "UserError": "twig.records",
    "Algorithm": "twig.options",
    "Settings": "twig.config",
    "load_settings": "twig.config:load",
    "Task": "twig.tasks",
    "load_task": "twig.tasks",
    "score_completions": "twig.tasks.rewards",
    "PrefixTrie": "twig.trie",
    "ALGORITHMS": "twig.credit",
    "Credit": "twig.credit",
    "assign": "twig.credit",
    "Surrogate": "twig.objective",
    "build_packs": "twig.pack",
    "end_ids": "twig.models",
    "load_model": "twig.models",
    "Policy": "twig.policy",
    "attach": "twig.adapter",
    "Request": "twig.rollout",
    "sample": "twig.rollout",
    "Progress": "twig.progress",
    "Evaluation": "twig.evaluate",
    "evaluate_policy": "twig.evaluate",
    "Run": "twig.session",
    "Exported": "twig.export",
    "export_run": "twig.export",
    "train": "twig.loop",
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
