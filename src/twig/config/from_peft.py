"""Turns PEFT's `LoraConfig` into the settings `lora`, for scripts that have one already.

Unsupported fields raise UserError. Knows nothing of models but the name of a family, for the modules that
PEFT gives an adapter if none are named.
"""

from collections.abc import Callable
from typing import Any

from twig.common.errors import UserError
from twig.config.adapted import ALL_LINEAR

# Fields with a setting of ours, and those that say nothing about the adapter's weights.
_SAME = ("exclude_modules", "layers_pattern", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
_SETTINGS = ("r", "lora_alpha", "target_modules", "layers_to_transform", "lora_dropout", *_SAME)
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
_INSTEAD = {"bias": 'Set bias="none"'}


def lora_values(
    config: Any, family: Callable[[], str], message: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Returns the settings `lora` that a `LoraConfig` means.

    `family` returns the model's `model_type`; it is called if `target_modules` is None, and PEFT's own choice
    for the family is taken. No `layers_to_transform` means all layers, as in PEFT. Dropout is off, which
    `message` is told. Raises UserError for
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
    if config.lora_dropout:
        message(dropout_note("peft_config", config.lora_dropout))
    layers = config.layers_to_transform
    same = {name: getattr(config, name) for name in _SAME if getattr(config, name)}
    if isinstance(pattern := same.get("layers_pattern"), list | tuple):
        same["layers_pattern"] = _single(pattern)
    if isinstance(exclude := same.get("exclude_modules"), set | tuple):
        same["exclude_modules"] = sorted(exclude)
    return same | {
        "r": config.r,
        "alpha": config.lora_alpha,
        "target_modules": _modules(config.target_modules, family),
        "layers": "all" if layers is None else [layers] if isinstance(layers, int) else list(layers),
    }


def dropout_note(where: str, rate: float) -> str:
    """Returns the line that says why an adapter's dropout is not used."""
    return (
        f"note: {where} has lora_dropout={rate:g}; it is off here, so that what is sampled and what is "
        "trained are one distribution"
    )


def _single(patterns: Any) -> str:
    if len(patterns) != 1:
        fix = "Pass the one that holds the decoder layers"
        raise UserError("peft_config.layers_pattern", f"{patterns!r} is more than one name", fix)
    return patterns[0]


def _modules(names: Any, family: Callable[[], str]) -> str | list[str]:
    if isinstance(names, str):  # PEFT takes all-linear in capitals too
        return ALL_LINEAR if names.lower() == ALL_LINEAR else names
    if names is not None:
        return sorted(names)  # PEFT keeps a set
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as by_family

    name = family()
    if name not in by_family:
        fix = 'List them, such as ["q_proj", "v_proj"], or pass "all-linear"'
        raise UserError("peft_config.target_modules", f"PEFT chooses none for the family {name}", fix)
    return sorted(by_family[name])
