"""As `twig.trl`, for scripts without `peft_config`: they train an adapter on every linear layer.

`from trl import GRPOTrainer` becomes `from twig.trl.with_lora import GRPOTrainer`.
"""

from typing import Any

from peft import LoraConfig

import twig.trl
from twig.trl.trainer import GRPOTrainer as _GRPOTrainer


class LoraTrainer(_GRPOTrainer):
    """`twig.trl.GRPOTrainer` that trains an adapter of rank 16 if no `peft_config` is passed."""

    adapter_if_none = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


GRPOTrainer = LoraTrainer  # by the name that scripts import


def __getattr__(name: str) -> Any:
    return getattr(twig.trl, name)
