"""Takes TRL's own objects: change the import of a GRPO script, and Twig trains.

`from trl import GRPOConfig, GRPOTrainer` becomes `from twig.trl import GRPOConfig, GRPOTrainer`.
`GRPOTrainer` is Twig's; `GRPOConfig` is TRL's with what is wrong for the machine put right; every other name
is the one of TRL. Nothing of TRL is imported before one of its names is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twig.trl.arguments import GRPOConfig
    from twig.trl.trainer import GRPOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer"]

_OWN = {"GRPOConfig": "twig.trl.arguments", "GRPOTrainer": "twig.trl.trainer"}


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_OWN.get(name, "trl")), name)
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise ImportError(f"{name} needs TRL, which is not installed: pip install trl", name="trl") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
