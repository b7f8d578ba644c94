"""TRL's `GRPOConfig`, made on any machine, and which of its fields were changed.

The only module that imports TRL.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from trl import GRPOConfig as TheirConfig  # pyright: ignore[reportPrivateImportUsage]
from trl import GRPOTrainer as TheirTrainer  # pyright: ignore[reportPrivateImportUsage]

# Set by TRL itself from others, so that a difference says nothing.
_DERIVED = ("accelerator_config", "local_rank", "dataloader_pin_memory")
# Compared with TRL's own default and not with what it made of it.
_ASKED = ("bf16", "fp16", "use_cpu")


class GRPOConfig(TheirConfig):
    """TRL's `GRPOConfig`; on a machine without bfloat16 it is off, where TRL raises an error."""

    def __post_init__(self) -> None:
        """Fills in the rest, as TRL does."""
        self.asked = {name: getattr(self, name) for name in _ASKED}
        if self.bf16 is not False and not (torch.cuda.is_available() and torch.cuda.is_bf16_supported()):
            self.bf16 = False
        with _without_own_warnings():
            super().__post_init__()


def changed_fields(args: Any) -> dict[str, Any]:
    """Returns the fields of a `GRPOConfig` that differ from their defaults, as TRL resolves those."""
    usual = GRPOConfig(output_dir=args.output_dir, use_cpu=True, report_to="none")
    changed = {
        field.name: getattr(args, field.name)
        for field in fields(args)
        if field.name not in (*_DERIVED, *_ASKED)
        and getattr(args, field.name) != getattr(usual, field.name, None)
    }
    defaults = {field.name: field.default for field in fields(TheirConfig)}
    asked = getattr(args, "asked", {name: getattr(args, name) for name in _ASKED})
    return changed | {name: value for name, value in asked.items() if value != defaults[name]}


@contextmanager
def _without_own_warnings() -> Iterator[None]:
    # TRL sets a field by default that transformers deprecates.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
        yield


def progress_callback(args: Any) -> type:
    """Returns the callback that shows progress, as TRL chooses it."""
    from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback if args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK


def trainer_methods() -> frozenset[str]:
    """Returns the names of the methods of TRL's `GRPOTrainer`."""
    return frozenset(name for name in dir(TheirTrainer) if not name.startswith("__"))


def default_config(output_dir: str) -> GRPOConfig:
    """Returns the `GRPOConfig` of a trainer that got none."""
    return GRPOConfig(output_dir=output_dir)
