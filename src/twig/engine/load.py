"""Loads a model and its tokenizer: the embedded one, a local folder or a Hugging Face repository.

What a model needs (end tokens, suppressed tokens) comes from its own files, never from a table of names. Only
safetensors weights are read. Knows nothing of adapters or training.
"""

from importlib.resources import files
from importlib.util import find_spec
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from twig.common.errors import UserError
from twig.common.hub import hub_or_cache, refusal
from twig.config.schema import Model

EMBEDDED = ("tiny-arithmetic",)


def load_model(wanted: Model | str, tokenizer: Any = None) -> tuple[PreTrainedModel, Any]:
    """The model (eval mode, on its device, in its dtype) and the tokenizer that `wanted` names.

    A text is `model.name`, with the defaults of every other setting; a `tokenizer` that is there already is
    not loaded again. Sets torch's number of threads for the whole process where `wanted.num_threads` says so.
    With `wanted.quantization`, the matrices of the layers are quantised while they are read; embeddings,
    norms and head are not.

    Raises UserError, one line, where it is missing, not a causal language model, not stored as safetensors,
    or cannot be quantised here.
    """
    wanted = Model(name=wanted) if isinstance(wanted, str) else wanted
    if wanted.num_threads is not None:
        torch.set_num_threads(wanted.num_threads)
    device = pick_device(wanted.device)
    dtype = pick_dtype(wanted.dtype, device)
    config, tokenizer = load_config(wanted), tokenizer or load_tokenizer(wanted)
    options = _quantised(wanted, config, device, dtype)
    if wanted.attn_implementation != "auto":
        options["attn_implementation"] = wanted.attn_implementation
    model, loaded = _read(
        AutoModelForCausalLM,
        wanted,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    if loaded["missing_keys"]:  # transformers would leave them random
        raise UserError(
            f"model.name: {wanted.name} lacks weights that its config.json speaks of "
            f"({min(loaded['missing_keys'])}); choose a model whose config and weights belong together"
        )
    if "device_map" not in options:  # a quantised model is on its device, and may not be moved
        model = model.to(device)
    for module in model.modules():
        # NOTE: else 4-bit layers in eval mode pack their weights anew on some processors, and their output
        # has no gradient from then on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval(), tokenizer


def remote_code_words(wanted: Model) -> str:
    """The warning that belongs before loading a model with `model.trust_remote_code`."""
    return (
        f"warning: {wanted.name} may run its own Python code on this machine (model.trust_remote_code=true)"
    )


def load_config(wanted: Model) -> PreTrainedConfig:
    """The shape of the model that `wanted` names, without its weights; raises UserError as `load_model`."""
    return _read(AutoConfig, wanted)


def load_tokenizer(wanted: Model) -> Any:
    """The tokenizer of the model that `wanted` names; raises UserError as `load_model`."""
    tokenizer = _read(AutoTokenizer, wanted)
    # Without its files some classes are made all the same, and know no token.
    if not tokenizer("347*26=", add_special_tokens=False)["input_ids"]:
        raise UserError(
            f"model.name: {wanted.name} has no tokenizer (tokenizer.json); save it to the folder too"
        )
    return tokenizer


def quantization_of(config: PreTrainedConfig) -> str | None:
    """How a model's layers are held, out of its config: nf4, int8, another method's name, or None."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    values = found if isinstance(found, dict) else found.to_dict()
    if values.get("load_in_8bit"):
        return "int8"
    if values.get("load_in_4bit"):
        return str(values.get("bnb_4bit_quant_type", "fp4"))
    method = values.get("quant_method", "unknown")
    return str(getattr(method, "value", method))


def _quantised(
    wanted: Model, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """What loading needs to be told where the base is quantised, now or in its files; raises UserError."""
    stored = quantization_of(config)
    if wanted.quantization is None and stored is None:
        return {}
    if wanted.quantization is None:
        return {"device_map": {"": device}}
    what = f"model.quantization: {wanted.quantization}"
    if stored is not None:
        raise UserError(
            f"model.quantization: {wanted.name} is quantised already ({stored}); leave model.quantization out"
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"{what} does not run on {device.type}; leave it out, or write model.device=cpu")
    if dtype == torch.float64:
        raise UserError(f"{what} has no float64; write model.dtype=float32")
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"{what} needs bitsandbytes, which is not installed; run: pip install 'twig-rl[quantization]'"
        )
    # It says at every call of an 8-bit layer that this computes in float16, and what it would like installed.
    getLogger("bitsandbytes").setLevel(ERROR)
    if wanted.quantization == "int8":
        chosen = BitsAndBytesConfig(load_in_8bit=True)
    else:
        chosen = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": chosen, "device_map": {"": device}}


def _read(kind: Any, wanted: Model, **options: Any) -> Any:
    place = place_of(wanted.name)
    if wanted.revision:
        options["revision"] = wanted.revision
    try:
        logging.disable_progress_bar()  # one line of ours is enough
        if Path(place).is_dir():
            return kind.from_pretrained(place, trust_remote_code=wanted.trust_remote_code, **options)
        with hub_or_cache():
            return kind.from_pretrained(place, trust_remote_code=wanted.trust_remote_code, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a broken config, damaged weights: each library has its own kinds
        raise UserError(_missing(wanted, error)) from error
    finally:
        logging.enable_progress_bar()


def place_of(name: str) -> str:
    """What transformers loads `name` from: a folder on this machine, else the id on the Hub that it is."""
    if name in EMBEDDED:
        return str(files("twig") / "assets" / name)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"model.name: {path} has no config.json; write the folder of a saved model, or a Hub id"
            )
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"model.name: {name} is not a folder; write the folder of a saved model, or a Hub id")
    return name


def _missing(wanted: Model, error: Exception) -> str:
    name, reason = wanted.name, " ".join(str(error).split())
    lowered = reason.lower()
    if isinstance(error, ValueError) and "attention implementation" in lowered:
        return (
            f"model.attn_implementation: {name} has no such attention; write model.attn_implementation=eager"
        )
    if "trust_remote_code" in lowered:
        return (
            f"model.name: {name} needs to run its own Python code; write model.trust_remote_code=true if you "
            "trust it, or choose another model"
        )
    if type(error).__name__ == "SafetensorError":
        return f"model.name: the weights of {name} are damaged ({reason[:200]}); copy or download them again"
    if "ignore_mismatched_sizes" in reason:
        return (
            f"model.name: {name} has weights of another shape than its config.json says; choose a model "
            "whose config and weights belong together"
        )
    why = None if Path(place_of(name)).is_dir() else refusal(error)
    if why == "gated":
        return (
            f"model.name: {name} needs its licence accepted: open https://huggingface.co/{name}, "
            "then `hf auth login`"
        )
    if why == "revision":
        return f"model.revision: {name} has no revision {wanted.revision}; write a branch, a tag or a commit"
    if why == "missing":
        return (
            f"model.name: {name} is not on the Hub, or private; check the name, `hf auth login` where it is "
            "yours, or write the folder of a saved model"
        )
    if why == "offline":
        return (
            f"model.name: {name} is neither a local folder nor reachable on the Hub; check the name and the "
            f"network, or write the folder of a saved model ('{EMBEDDED[0]}' needs no network)"
        )
    if "safetensors" in lowered:
        pickled = sorted(path.name for path in Path(place_of(name)).glob("*.bin"))
        has = f" (it has {pickled[0]})" if pickled else ""
        return (
            f"model.name: {name} has no safetensors weights{has}, and no other format is loaded; "
            "choose a model that has them"
        )
    if wanted.quantization is not None:
        return (
            f"model.quantization: {wanted.quantization} does not work here ({reason[:200]}); "
            "leave model.quantization out"
        )
    return f"model.name: {name} does not load ({reason[:300]}); choose a causal language model"


def pick_device(wanted: str) -> torch.device:
    """The device that `model.device` means here; raises UserError where there is none such."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"model.device: {wanted!r} is not usable here; write cpu or auto") from error
    return device


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of the base: float32 on a CPU; on a GPU bfloat16 from compute capability 8, else float16."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        return torch.float16
    return torch.bfloat16


def end_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The tokens that end a completion: those of the model's generation config, and the tokenizer's own."""
    found = getattr(model.generation_config, "eos_token_id", None)
    ends = [] if found is None else found if isinstance(found, list) else [found]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends = [*ends, tokenizer.eos_token_id]
    if not ends:
        raise UserError(
            "model.name: neither the model nor its tokenizer has an end token; set tokenizer.eos_token"
        )
    return [int(token) for token in ends]


def suppressed_ids(model: PreTrainedModel, wanted: list[int], vocab_size: int) -> list[int]:
    """Token ids that are never sampled: the model's own and those of `rollout.suppress_tokens`."""
    outside = [token for token in wanted if token >= vocab_size]
    if outside:
        raise UserError(
            f"rollout.suppress_tokens: {outside[0]} is not a token; write ids from 0 to {vocab_size - 1}"
        )
    own = getattr(model.generation_config, "suppress_tokens", None) or []
    return sorted({*own, *wanted})
