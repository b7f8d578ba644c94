"""LoRA adapters: a new one on chosen layers, or one that was saved, on this machine or on the Hub.

Knows nothing of what an adapter is trained for.
"""

import copy
import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from twig.common.errors import UserError
from twig.common.hub import hub_or_cache, refusal
from twig.common.text import message_of
from twig.config.adapted import ALL_LINEAR, DEFAULT_MODULES, adapted_modules
from twig.config.schema import Lora
from twig.runtime.memory_use import out_of_memory

_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The fields of an adapter's config that are understood, the second half of them about the file only.
_FIELDS = {
    *("r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out", "init_lora_weights"),
    *("lora_dropout", "task_type", "peft_type", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "auto_mapping", "runtime_config"),
}
# How new weights may have been drawn. The other ways of PEFT also change the base's weights on loading.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def attach(
    model: PreTrainedModel, *, seed: int = 0, adapter: str | Path | None = None, **shape: Any
) -> PeftModel:
    """Attaches a LoRA adapter to `model`: a new one, or the one saved in `adapter`.

    `shape` are the settings `lora`. A saved adapter keeps its own. The adapter is float32 (float64 on a
    float64 base) whatever the base is. Raises UserError if a requested module is not in a requested layer, or
    a saved adapter does not fit.
    """
    model.requires_grad_(False)
    if adapter is not None:
        peft_model = load_adapter(model, adapter, trainable=True)
    else:
        config = _new_config(model, Lora.model_validate(shape, strict=False))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                with warnings.catch_warnings():  # PEFT asks transformers by a name that is deprecated
                    warnings.simplefilter("ignore", FutureWarning)
                    peft_model = get_peft_model(model, config)
            except ValueError as error:  # modules that PEFT knows not to work
                problem, fix = message_of(error), "Set other modules of these layers"
                raise UserError("lora.target_modules", problem, fix) from error
    wide = torch.promote_types(model.dtype, torch.float32)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(wide)
    return peft_model.eval()


def _new_config(model: PreTrainedModel, lora: Lora) -> LoraConfig:
    """Returns PEFT's config of a new adapter; raises UserError if the model lacks a module or a layer."""
    stack = _layers_of(model, lora.layers_pattern)
    layer_of = _linear_modules(model, stack)
    names = adapted_modules(lora, layer_of, len(stack))
    layers: list[int] | None = sorted({layer_of[name] for name in names})
    modules, exclude = lora.target_modules, lora.exclude_modules
    if modules == ALL_LINEAR or modules == DEFAULT_MODULES:
        modules = sorted({name.rpartition(".")[2] for name in names})
    elif isinstance(modules, str):  # PEFT takes no numbers of layers beside an expression
        layers = None
        if lora.layers != "all":
            modules, exclude = sorted(names), None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=cast(int, lora.alpha),  # PEFT divides by r: any number will do
        target_modules=modules,
        exclude_modules=exclude,
        layers_to_transform=layers,
        layers_pattern=lora.layers_pattern if layers is not None else None,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=cast(dict[str, int], dict(lora.alpha_pattern)),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in stack.modules()),
    )


def adopt(peft_model: PeftModel) -> PeftModel:
    """Makes the adapter of a PEFT model what is trained, and nothing else of it; raises UserError.

    The adapter is float32 (or wider), as every one that is trained.
    """
    if list(peft_model.peft_config) != ["default"]:
        names = ", ".join(peft_model.peft_config)
        fix = 'Pass a model with one, loaded with adapter_name="default"'
        raise UserError("model", f"it has the adapters {names}", fix)
    wide = torch.promote_types(peft_model.dtype, torch.float32)
    for name, parameter in peft_model.named_parameters():
        parameter.requires_grad_(_is_of_adapter(name))
        if parameter.requires_grad:
            parameter.data = parameter.data.to(wide)
    return peft_model.eval()


def trained_config(peft_model: PeftModel) -> LoraConfig:
    """Returns the config of a PEFT model's adapter; raises UserError if its start changed the base."""
    config = copy.copy(next(iter(peft_model.peft_config.values())))
    start = getattr(config, "init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        problem = f"the adapter began with init_lora_weights={start!r}, which changes the base"
        raise UserError("model", problem, "Pass a plain adapter (path_initial_model_for_weight_conversion)")
    config.init_lora_weights = True  # pyright: ignore[reportAttributeAccessIssue]  # other kinds are refused
    return cast(LoraConfig, config)


def adapter_checksum(peft_model: PeftModel) -> str:
    """Returns the sha256 of an adapter's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(get_peft_model_state_dict(peft_model, save_embedding_layers=False).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_adapter(model: PreTrainedModel, adapter: str | Path, trainable: bool = False) -> PeftModel:
    """Loads the LoRA adapter saved in `adapter`, a folder or an id on the Hub, onto `model`.

    Dropout that it was trained with is off: what is sampled and what is trained are one distribution. Raises
    UserError if there is none that fits, or none stored as safetensors, if it needs more than LoRA matrices,
    or if it would change the base.
    """
    folder = _adapter_folder(adapter)
    config = _adapter_config(adapter, folder)
    if not (folder / _ADAPTER_WEIGHTS).is_file():
        raise UserError(
            "model.adapter",
            f"{adapter} has no {_ADAPTER_WEIGHTS}, and no other format is loaded",
            "Set model.adapter= the folder of an adapter that has it",
        )
    try:
        _refuse_other_base(model, adapter, folder / _ADAPTER_WEIGHTS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # missing weights would stay random
            warnings.filterwarnings("error", message="Found missing adapter keys")
            loaded = PeftModel.from_pretrained(
                model, folder, config=config, is_trainable=trainable, use_safetensors=True
            )
        _refuse_unused(loaded, adapter, folder / _ADAPTER_WEIGHTS)
        return loaded
    except UserError:
        raise
    except Exception as error:  # somebody else's file: PEFT, torch and safetensors have dozens of kinds
        if out_of_memory(error):
            raise
        problem = f"{adapter} does not fit the model ({message_of(error)})"
        raise UserError("model.adapter", problem, "Set the model.name that it was trained on") from error


def base_of_adapter(folder: Path) -> str:
    """Returns the name of the model that a saved adapter was trained on; raises UserError if it has none."""
    name = _read_config(folder, folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError("model.adapter", f"{folder} does not name its base", "Set model.name too")
    return name


def saved_dropout(adapter: str | Path) -> float:
    """Returns the dropout that a saved adapter was trained with; raises UserError as `load_adapter`."""
    value = _read_config(adapter, _adapter_folder(adapter)).get("lora_dropout", 0.0)
    if type(value) not in (int, float) or not 0 <= value < 1:
        problem = message_of(f"lora_dropout={value!r} in {adapter} is not a share")
        raise UserError("model.adapter", problem, "Write the one that it was trained with, such as 0.0")
    return float(value)


def _adapter_config(adapter: str | Path, folder: Path) -> LoraConfig:
    """Reads the config of a saved adapter; raises UserError for every field that is not understood.

    PEFT would drop a field that it does not know, and build what the adapter was not trained as.
    """
    saved_dropout(adapter)  # refused unless it is a share
    normal = LoraConfig()
    for name, value in _read_config(adapter, folder).items():
        if name in _FIELDS or not value or value == getattr(normal, name, None):
            continue
        shown = f"{name}={value!r}" if isinstance(value, str) else name
        problem = f"{message_of(shown)} in {adapter} is not supported"
        raise UserError("model.adapter", problem, "Train an adapter without it")
    try:
        config = cast(LoraConfig, LoraConfig.from_pretrained(str(folder)))
    except Exception as error:  # values of any kind
        raise _no_adapter(adapter, error) from error
    if config.init_lora_weights not in _PLAIN_STARTS:
        problem = f"init_lora_weights={config.init_lora_weights!r} in {adapter} changes the base"
        fix = "Save it as a plain adapter (PEFT's path_initial_model_for_weight_conversion)"
        raise UserError("model.adapter", message_of(problem), fix)
    config.lora_dropout = 0.0
    return config


def _read_config(adapter: str | Path, folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{_ADAPTER_CONFIG} is not a JSON object")
        if values.get("peft_type") != "LORA":
            raise ValueError(f"it is of the kind {values.get('peft_type')}")
        return values
    except (OSError, ValueError, RecursionError) as error:
        raise _no_adapter(adapter, error) from error


def _no_adapter(adapter: str | Path, error: Exception) -> UserError:
    problem = f"{adapter} holds no LoRA adapter ({message_of(error)})"
    return UserError("model.adapter", problem, "Set model.adapter= the folder of one")


def _refuse_other_base(model: PreTrainedModel, adapter: str | Path, weights: Path) -> None:
    """Raises UserError if an adapter's file holds weights of the base that are not the model's.

    PEFT saves the embeddings beside an adapter on them, and writes them over the base's on loading.
    """
    base = dict(model.named_parameters(remove_duplicate=False))
    with safe_open(weights, "pt") as file:
        for key in file.keys():
            if _is_of_adapter(key):
                continue
            own = base.get(key.removeprefix("base_model.model.").replace(".base_layer.", "."))
            saved = file.get_tensor(key)
            if own is None or own.shape != saved.shape or not torch.equal(saved.to(own), own):
                problem = f"{adapter} also holds other weights of the base ({message_of(key)})"
                fix = "Save it again with save_embedding_layers=False, or set the model.name it was made with"
                raise UserError("model.adapter", problem, fix)


def _refuse_unused(loaded: PeftModel, adapter: str | Path, weights: Path) -> None:
    """Raises UserError if the model has no place for a tensor of the adapter's file."""
    places = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    with safe_open(weights, "pt") as file:
        unused = sorted(key for key in file.keys() if _is_of_adapter(key) and key not in places)
    if unused:
        problem = f"{adapter} does not fit the model (it has no place for {message_of(unused[0])})"
        raise UserError("model.adapter", problem, "Set the model.name that it was trained on")


def _is_of_adapter(key: str) -> bool:
    return any(part.startswith("lora_") for part in key.split("."))


def _adapter_folder(adapter: str | Path) -> Path:
    """Returns the folder of an adapter; of one on the Hub, the two files are fetched."""
    folder, name = Path(adapter).expanduser(), str(adapter)
    if folder.is_dir() or not _HUB_ID.fullmatch(name):
        return folder
    from huggingface_hub import snapshot_download

    try:
        with hub_or_cache():
            return Path(snapshot_download(name, allow_patterns=[_ADAPTER_CONFIG, _ADAPTER_WEIGHTS]))
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
    """Returns what an adapter has in place of the settings `lora`: its module names and layers as lists."""
    config = peft_model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    layers = _layers_of(peft_model)
    numbers = adapted_layers(layers)
    inside = (name.split(".") for i in numbers for name, _ in layers[i].named_parameters())
    return {name: getattr(config, name, None) for name in Lora.model_fields} | {
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


def _layers_of(model: torch.nn.Module, pattern: str | None = None) -> torch.nn.ModuleList:
    """Returns the decoder layers: the longest module list that lies in no other one.

    With a `pattern`, the longest of that name.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}
    chosen = [m for n, m in outer.items() if pattern is None or f".{n}".endswith(f".{pattern}")]
    if not chosen:
        names = ", ".join(sorted({n.rpartition(".")[2] for n in outer}))
        raise UserError("lora.layers_pattern", f"the model has no module list {pattern!r}", f"Set {names}")
    return max(chosen, key=len)


def _linear_modules(model: torch.nn.Module, stack: torch.nn.ModuleList) -> dict[str, int]:
    """Returns the layer of each linear module in a layer, by the module's whole name."""
    kinds = (torch.nn.Linear, Conv1D)  # GPT-2's Conv1D is a linear module too
    (prefix,) = (name for name, module in model.named_modules() if module is stack)
    return {
        f"{prefix}.{i}.{name}": i
        for i, layer in enumerate(stack)
        for name, module in layer.named_modules()
        if isinstance(module, kinds)
    }


def adapted_layers(layers: torch.nn.ModuleList) -> list[int]:
    """Returns the numbers of the layers that have an adapter."""
    return [i for i, layer in enumerate(layers) if any(isinstance(m, LoraLayer) for m in layer.modules())]
