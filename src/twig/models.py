"""Loads a model and its tokenizer: the embedded one, a local folder or a Hugging Face repository.

What a model needs (end tokens, suppressed tokens) comes from its own files, never from a table of names. Only
safetensors weights are read. Knows nothing of adapters or training.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from twig.records import UserError
from twig.settings import Model

EMBEDDED = ("tiny-arithmetic",)


def load_model(wanted: Model | str, tokenizer: Any = None) -> tuple[PreTrainedModel, Any]:
    """The model (eval mode, on its device, in its dtype) and the tokenizer that `wanted` names.

    A text is `model.name`, with the defaults of every other setting; a `tokenizer` that is there already is
    not loaded again. Sets torch's number of threads for the whole process where `wanted.num_threads` says so.

    Raises UserError, one line, where it is missing, not a causal language model, or not stored as
    safetensors.
    """
    wanted = Model(name=wanted) if isinstance(wanted, str) else wanted
    if wanted.num_threads is not None:
        torch.set_num_threads(wanted.num_threads)
    device = pick_device(wanted.device)
    dtype = pick_dtype(wanted.dtype, device)
    config, tokenizer = load_config(wanted), tokenizer or load_tokenizer(wanted)
    options = {}
    if wanted.attn_implementation != "auto":
        options["attn_implementation"] = wanted.attn_implementation
    model = _read(AutoModelForCausalLM, wanted, config=config, dtype=dtype, use_safetensors=True, **options)
    return model.to(device).eval(), tokenizer


def load_config(wanted: Model) -> PreTrainedConfig:
    """The shape of the model that `wanted` names, without its weights; raises UserError as `load_model`."""
    return _read(AutoConfig, wanted)


def load_tokenizer(wanted: Model) -> Any:
    """The tokenizer of the model that `wanted` names; raises UserError as `load_model`."""
    return _read(AutoTokenizer, wanted)


def _read(kind: Any, wanted: Model, **options: Any) -> Any:
    place = place_of(wanted.name)
    if wanted.revision:
        options["revision"] = wanted.revision
    try:
        logging.disable_progress_bar()  # one line of ours is enough
        return kind.from_pretrained(place, trust_remote_code=wanted.trust_remote_code, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(_missing(wanted.name, error)) from error
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


def _missing(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    lowered = reason.lower()
    if "gated" in lowered or "401" in lowered or "403" in lowered:
        return (
            f"model.name: {name} needs its licence accepted: open https://huggingface.co/{name}, "
            "then `hf auth login`"
        )
    if isinstance(error, ValueError) and "attention implementation" in lowered:
        return (
            f"model.attn_implementation: {name} has no such attention; write model.attn_implementation=eager"
        )
    if "safetensors" in lowered:
        return (
            f"model.name: {name} has no safetensors weights, and no other format is loaded; "
            "choose a model that has them"
        )
    if any(
        words in lowered
        for words in ("offline", "connect", "couldn't find", "not a local folder", "internet")
    ):
        return (
            f"model.name: {name} is neither a local folder nor reachable on the Hub; check the name and the "
            f"network, or write the folder of a saved model ('{EMBEDDED[0]}' needs no network)"
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
