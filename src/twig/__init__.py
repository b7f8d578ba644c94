"""Twig: reinforcement learning for language models on small hardware.

`import twig` loads nothing heavy. The names below are fetched from their modules when first used, so the
command line starts quickly and credit assignment can be used where torch is not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twig.loop import train

__all__ = ["__version__", "train"]

# Public name -> the module that defines it.
_EXPORTS = {
    "train": "twig.loop",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
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
