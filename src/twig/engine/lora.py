"""LoRA adapters: a new one on chosen layers, or one that was saved, on this machine or on the Hub.

Knows nothing of what an adapter is trained for.
"""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    """`model` with a LoRA adapter on `target_modules` of `layers`: a new one, or the one saved in `adapter`.

    `layers` is "last_third" (ours: ceil of a third), "all" or a list of layer numbers. A saved adapter keeps
    its own rank, alpha, modules and layers. The adapter is float32 (float64 on a float64 base) whatever the
    base is. Raises UserError where a requested module is not in a requested layer, or a saved adapter does
    not fit.
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
            lora_alpha=alpha,
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
    """`model` with the LoRA adapter saved in `adapter`, a folder or an id on the Hub.

    Raises UserError where there is none that fits, or none stored as safetensors.
    """
    folder = _adapter_folder(adapter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what another kind of adapter has beside is said below
            config = LoraConfig.from_pretrained(folder)
        if not isinstance(config, LoraConfig):
            raise ValueError(f"it is of the kind {config.peft_type}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"model.adapter: {adapter} holds no LoRA adapter ({message_of(error)}); write the folder of one"
        ) from error
    if not (folder / _ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"model.adapter: {adapter} has no {_ADAPTER_WEIGHTS}, and no other format is loaded; "
            "write the folder of an adapter that has it"
        )
    for name in ("lora_dropout", "modules_to_save", "trainable_token_indices"):
        if getattr(config, name, None):
            raise UserError(
                f"model.adapter: {name} in {adapter} is not supported: train an adapter without it"
            )
    if config.bias != "none":
        raise UserError(
            f"model.adapter: bias='{config.bias}' in {adapter} is not supported: train one with bias='none'"
        )
    try:
        with warnings.catch_warnings():
            # What is missing would stay random.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, folder, is_trainable=trainable, use_safetensors=True)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, UserWarning) as error:
        raise UserError(
            f"model.adapter: {adapter} does not fit the model ({message_of(error)}); "
            "write the model.name that it was trained on"
        ) from error


def _adapter_folder(adapter: str | Path) -> Path:
    """Where an adapter lies on this machine; one on the Hub is fetched, its two files only."""
    folder, name = Path(adapter).expanduser(), str(adapter)
    if folder.is_dir() or not _HUB_ID.fullmatch(name):
        return folder
    from huggingface_hub import snapshot_download

    try:
        with hub_or_cache():
            return Path(snapshot_download(name, allow_patterns=["adapter_config.json", _ADAPTER_WEIGHTS]))
    except Exception as error:  # the library and those below it raise dozens of kinds; each ends in one line
        raise UserError(f"model.adapter: {name} {_not_fetched(name, error)}") from error


def _not_fetched(name: str, error: Exception) -> str:
    login, folder = "`hf auth login`", "write the folder of an adapter"
    match refusal(error):
        case "gated":
            return f"needs its licence accepted: open https://huggingface.co/{name}, then {login}"
        case "missing":
            return f"is no folder, and not on the Hub, or private; check the name, {login}, or {folder}"
        case "offline":
            return (
                f"is neither a folder nor reachable on the Hub; check the name and the network, or {folder}"
            )
    return f"does not load ({message_of(error)}); {folder}"


def adapter_shape(peft_model: PeftModel) -> dict[str, Any]:
    """What an adapter is: `r`, `alpha`, `target_modules` (names) and `layers` (numbers, or "all")."""
    config = peft_model.peft_config["default"]
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
    """Raises UserError where a setting asks for a shape that the adapter gone on with has not.

    A setting that has its default asks for nothing: whether somebody wrote it cannot be told.
    """
    for key, info in Lora.model_fields.items():
        value = getattr(settings.lora, key)
        wanted = sorted(set(value)) if isinstance(value, list) else value
        if value != info.default and wanted != has[key]:
            raise UserError(
                f"lora.{key}: {value} here, but {has[key]} in {settings.model.adapter}, which keeps its "
                f"shape; leave lora.{key} out"
            )


def _layers_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The decoder layers: the longest module list in the model."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return max(lists, key=len)


def _layer_numbers(layers: str | Sequence[int], count: int) -> list[int]:
    if layers == "all":
        return list(range(count))
    if layers == "last_third":
        return list(range(count - -(-count // 3), count))
    outside = [i for i in layers if not 0 <= i < count]
    if outside:
        raise UserError(
            f"lora.layers: {outside[0]} is not a layer of this model: write numbers from 0 to {count - 1}"
        )
    return sorted(set(layers))


def _check_modules(layer: torch.nn.Module, number: int, target_modules: Sequence[str]) -> None:
    kinds = (torch.nn.Linear, Conv1D)  # GPT-2's Conv1D is a linear module too
    there = {n.rsplit(".", 1)[-1] for n, m in layer.named_modules() if isinstance(m, kinds)}
    for name in target_modules:
        if name not in there:
            instead = f"write some of {', '.join(sorted(there))}" if there else "leave that layer out"
            raise UserError(f"lora.target_modules: layer {number} has no linear module '{name}'; {instead}")


def adapted_layers(layers: torch.nn.ModuleList) -> list[int]:
    """The numbers of the layers that have an adapter."""
    return [i for i, layer in enumerate(layers) if any(isinstance(m, LoraLayer) for m in layer.modules())]
