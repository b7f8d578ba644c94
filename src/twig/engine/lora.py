"""LoRA adapters: a new one on chosen layers, or one that was saved, on this machine or on the Hub.

Knows nothing of what an adapter is trained for.
"""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from twig.common.errors import UserError
from twig.common.hub import hub_or_cache, refusal
from twig.common.text import message_of
from twig.config.schema import Lora

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def attach(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: float,
    target_modules: Sequence[str],
    layers: str | Sequence[int] = "last_third",
    seed: int = 0,
    adapter: str | Path | None = None,
) -> PeftModel:
    """Attaches a LoRA adapter to `target_modules` of `layers`: a new one, or the one saved in `adapter`.

    `layers` is "last_third" (a third, rounded up), "all" or a list of layer numbers. A saved adapter keeps
    its own rank, alpha, modules and layers. The adapter is float32 (float64 on a float64 base) whatever the
    base is. Raises UserError if a requested module is not in a requested layer, or a saved adapter does not
    fit.
    """
    model.requires_grad_(False)
    if adapter is not None:
        peft_model = load_adapter(model, adapter, trainable=True)
    else:
        stack = _layers_of(model)
        chosen = _layer_numbers(layers, len(stack))
        for i in chosen:
            _check_modules(stack[i], i, target_modules)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=r,
            lora_alpha=cast(int, alpha),  # PEFT divides by r: any number will do
            target_modules=list(target_modules),
            layers_to_transform=chosen,
            lora_dropout=0.0,
            bias="none",
            fan_in_fan_out=any(isinstance(m, Conv1D) for m in stack.modules()),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft_model = get_peft_model(model, config)
    wide = torch.promote_types(model.dtype, torch.float32)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(wide)
    return peft_model.eval()


def load_adapter(model: PreTrainedModel, adapter: str | Path, trainable: bool = False) -> PeftModel:
    """Loads the LoRA adapter saved in `adapter`, a folder or an id on the Hub, onto `model`.

    Raises UserError if there is none that fits, or none stored as safetensors.
    """
    folder = _adapter_folder(adapter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fields of another kind of adapter are refused below
            config = LoraConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig):
            raise ValueError(f"it is of the kind {config.peft_type}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        problem = f"{adapter} holds no LoRA adapter ({message_of(error)})"
        raise UserError("model.adapter", problem, "Set model.adapter= the folder of one") from error
    if not (folder / _ADAPTER_WEIGHTS).is_file():
        raise UserError(
            "model.adapter",
            f"{adapter} has no {_ADAPTER_WEIGHTS}, and no other format is loaded",
            "Set model.adapter= the folder of an adapter that has it",
        )
    for name in ("lora_dropout", "modules_to_save", "trainable_token_indices"):
        if getattr(config, name, None):
            problem = f"{name} in {adapter} is not supported"
            raise UserError("model.adapter", problem, "Train an adapter without it")
    if config.bias != "none":
        problem = f"bias='{config.bias}' in {adapter} is not supported"
        raise UserError("model.adapter", problem, "Train an adapter with bias='none'")
    try:
        with warnings.catch_warnings():
            # missing weights would stay random
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, folder, is_trainable=trainable, use_safetensors=True)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, UserWarning) as error:
        problem = f"{adapter} does not fit the model ({message_of(error)})"
        raise UserError("model.adapter", problem, "Set the model.name that it was trained on") from error


def _adapter_folder(adapter: str | Path) -> Path:
    """Returns the folder of an adapter; of one on the Hub, the two files are fetched."""
    folder, name = Path(adapter).expanduser(), str(adapter)
    if folder.is_dir() or not _HUB_ID.fullmatch(name):
        return folder
    from huggingface_hub import snapshot_download

    try:
        with hub_or_cache():
            return Path(snapshot_download(name, allow_patterns=["adapter_config.json", _ADAPTER_WEIGHTS]))
    except Exception as error:  # the library and those below it raise dozens of kinds; each ends in one line
        raise UserError("model.adapter", *_not_fetched(name, error)) from error


def _not_fetched(name: str, error: Exception) -> tuple[str, str]:
    """Returns the problem and the fix for an adapter that the Hub did not give."""
    login, folder = "run `hf auth login`", "set model.adapter= the folder of an adapter"
    match refusal(error):
        case "gated":
            fix = f"Open https://huggingface.co/{name}, then {login}"
            return f"{name} needs its licence accepted", fix
        case "missing":
            problem = f"{name} is no folder, and not on the Hub, or private"
            return problem, f"Check the name, {login}, or {folder}"
        case "offline":
            problem = f"{name} is neither a folder nor reachable on the Hub"
            return problem, f"Check the name and the network, or {folder}"
    return f"{name} does not load ({message_of(error)})", folder.capitalize()


def adapter_shape(peft_model: PeftModel) -> dict[str, Any]:
    """Returns an adapter's `r`, `alpha`, `target_modules` (names) and `layers` (numbers, or "all")."""
    config = peft_model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    layers = _layers_of(peft_model)
    numbers = adapted_layers(layers)
    inside = (name.split(".") for i in numbers for name, _ in layers[i].named_parameters())
    return {
        "r": config.r,
        "alpha": config.lora_alpha,
        "target_modules": sorted({parts[parts.index("lora_A") - 1] for parts in inside if "lora_A" in parts}),
        "layers": "all" if len(numbers) == len(layers) else numbers,
    }


def refuse_another_shape(settings: Any, has: dict[str, Any]) -> None:
    """Raises UserError if a setting asks for another shape than that of `model.adapter`.

    A setting at its default asks for nothing: it may not have been set explicitly.
    """
    for key, info in Lora.model_fields.items():
        value = getattr(settings.lora, key)
        normal = sorted(set(value)) if isinstance(value, list) else value
        if value != info.default and normal != has[key]:
            problem = f"{value} here, but {has[key]} in {settings.model.adapter}, which keeps its shape"
            raise UserError(f"lora.{key}", problem, f"Leave lora.{key} out")


def _layers_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    """Returns the decoder layers: the longest module list in the model."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return max(lists, key=len)


def _layer_numbers(layers: str | Sequence[int], count: int) -> list[int]:
    if layers == "all":
        return list(range(count))
    if layers == "last_third":
        return list(range(count - -(-count // 3), count))
    numbers = [int(i) for i in layers]
    outside = [i for i in numbers if not 0 <= i < count]
    if outside:
        problem = f"{outside[0]} is not a layer of this model"
        raise UserError("lora.layers", problem, f"Set numbers from 0 to {count - 1}")
    return sorted(set(numbers))


def _check_modules(layer: torch.nn.Module, number: int, target_modules: Sequence[str]) -> None:
    kinds = (torch.nn.Linear, Conv1D)  # GPT-2's Conv1D is a linear module too
    there = {n.rsplit(".", 1)[-1] for n, m in layer.named_modules() if isinstance(m, kinds)}
    for name in target_modules:
        if name not in there:
            fix = f"Set some of {', '.join(sorted(there))}" if there else "Leave that layer out"
            raise UserError("lora.target_modules", f"layer {number} has no linear module '{name}'", fix)


def adapted_layers(layers: torch.nn.ModuleList) -> list[int]:
    """Returns the numbers of the layers that have an adapter."""
    return [i for i, layer in enumerate(layers) if any(isinstance(m, LoraLayer) for m in layer.modules())]
