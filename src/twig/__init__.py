"""Twig: reinforcement learning for language models on small hardware.

`import twig` loads nothing heavy. The names below are stable and are fetched from their modules when first
used, so the command line starts quickly and credit can be computed if torch is not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, filterwarnings

if TYPE_CHECKING:
    from twig.common.errors import UserError
    from twig.common.progress import Progress
    from twig.config.load import Settings
    from twig.config.load import load as load_settings
    from twig.core.algorithms.base import Algorithm, Credit, Scale, Step
    from twig.core.algorithms.registry import algorithm
    from twig.core.trie import PrefixTrie
    from twig.engine.load import load_model
    from twig.evaluation.evaluate import measure_model as evaluate
    from twig.export.export import ExportOptions, export_run
    from twig.export.upload import Push
    from twig.training.run import Run
    from twig.training.train import train

__all__ = [
    "Algorithm",
    "Credit",
    "ExportOptions",
    "PrefixTrie",
    "Progress",
    "Push",
    "Run",
    "Scale",
    "Settings",
    "Step",
    "UserError",
    "__version__",
    "algorithm",
    "evaluate",
    "export_run",
    "load_model",
    "load_settings",
    "train",
]

# Public name -> its module, and its name there after a colon if it is another.
_EXPORTS = {
    "Algorithm": "twig.core.algorithms.base",
    "Credit": "twig.core.algorithms.base",
    "ExportOptions": "twig.export.export",
    "PrefixTrie": "twig.core.trie",
    "Progress": "twig.common.progress",
    "Push": "twig.export.upload",
    "Run": "twig.training.run",
    "Scale": "twig.core.algorithms.base",
    "Settings": "twig.config.load",
    "Step": "twig.core.algorithms.base",
    "UserError": "twig.common.errors",
    "algorithm": "twig.core.algorithms.registry",
    "evaluate": "twig.evaluation.evaluate:measure_model",
    "export_run": "twig.export.export",
    "load_model": "twig.engine.load",
    "load_settings": "twig.config.load:load",
    "train": "twig.training.train",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _EXPORTS:
        module, _, own_name = _EXPORTS[name].partition(":")
        with catch_warnings():  # tqdm's, in a notebook without ipywidgets: nothing here uses its bars
            filterwarnings("ignore", message="IProgress not found")
            return getattr(import_module(module), own_name or name)
    raise AttributeError(f"module 'twig' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """Returns the installed version; '0+unknown' if the source is on the path without being installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("twig-rl")
    except PackageNotFoundError:
        return "0+unknown"
