"""Turns PEFT's `LoraConfig` into the settings `lora`, for scripts that have one already.

Unsupported fields raise UserError. Knows nothing of models but the name of a family, for the modules that
PEFT gives an adapter if none are named.
"""

from collections.abc import Callable
from typing import Any

from twig.common.errors import UserError

# Fields with a setting of ours, and those that say nothing about the adapter's weights.
_SETTINGS = ("r", "lora_alpha", "target_modules", "layers_to_transform")
_ABOUT_THE_FILE = (
    "task_type",
    "peft_type",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "fan_in_fan_out",
    "runtime_config",
)
_INSTEAD = {
    "lora_dropout": "Set lora_dropout=0.0, so that what is sampled and what is trained are one distribution",
    "bias": 'Set bias="none"',
}


def lora_values(config: Any, family: Callable[[], str]) -> dict[str, Any]:
    """Returns the settings `lora` that a `LoraConfig` means.

    `family` returns the model's `model_type`; it is called if `target_modules` is None, and PEFT's own choice
    for the family is taken. No `layers_to_transform` means all layers, as in PEFT. Raises UserError for
    another kind of adapter and for a field that has no equal here.
    """
    kind = getattr(config, "peft_type", None)
    if getattr(kind, "value", kind) != "LORA":
        raise UserError("peft_config", f"{type(config).__name__} is no LoRA adapter", "Pass peft.LoraConfig")
    task = getattr(config.task_type, "value", config.task_type)
    if task not in (None, "CAUSAL_LM"):
        raise UserError("peft_config.task_type", f"{task!r} is not supported", 'Set it to "CAUSAL_LM"')
    for name, usual in vars(type(config)()).items():
        value = getattr(config, name)
        if name not in (*_SETTINGS, *_ABOUT_THE_FILE) and value != usual:
            fix = _INSTEAD.get(name, "Leave it out")
            raise UserError(f"peft_config.{name}", f"{value!r} is not supported", fix)
    layers = config.layers_to_transform
    return {
        "r": config.r,
        "alpha": config.lora_alpha,
        "target_modules": _modules(config.target_modules, family),
        "layers": "all" if layers is None else [layers] if isinstance(layers, int) else list(layers),
    }


def _modules(names: Any, family: Callable[[], str]) -> list[str]:
    key, fix = "peft_config.target_modules", 'List them, such as ["q_proj", "v_proj"]'
    if isinstance(names, str):
        raise UserError(key, f"{names!r} is not a list of names", fix)
    if names is not None:
        return sorted(names)  # PEFT keeps a set
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as by_family

    name = family()
    if name not in by_family:
        raise UserError(key, f"PEFT chooses none for the family {name}", fix)
    return sorted(by_family[name])
