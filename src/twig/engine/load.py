"""Loads a model and its tokenizer: the embedded one, a local folder or a Hugging Face repository.

What a model needs (end tokens, suppressed tokens) comes from its own files, never from a table of names. Only
safetensors and GGUF weights are read. Knows nothing of adapters or training.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
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
from twig.common.tokenizer import Tokenizer
from twig.config.schema import Model
from twig.engine.kernels import keep_few_products
from twig.engine.model_files import EMBEDDED, Source, is_gguf, refuse_unsafe_weights, source_of
from twig.runtime.memory_use import out_of_memory


def load_model(
    chosen: Model | str, tokenizer: Tokenizer | None = None, config: PreTrainedConfig | None = None
) -> tuple[PreTrainedModel, Tokenizer]:
    """Loads a model (eval mode, on its device, in its dtype) and its tokenizer.

    A text is `model.name`, with the defaults of every other setting; a `tokenizer` or `config` that is passed
    is not loaded again. `num_threads` sets torch's threads for the whole process. With `quantization`, the
    matrices of the layers are quantised while they are read; embeddings, norms and head are not.

    Raises UserError if the model is missing, not a causal language model, not stored as safetensors, or
    cannot be quantised here.
    """
    chosen = Model.model_validate({"name": chosen}) if isinstance(chosen, str) else chosen
    if chosen.num_threads is not None:
        torch.set_num_threads(chosen.num_threads)
    keep_few_products()
    device = pick_device(chosen.device)
    dtype = pick_dtype(chosen.dtype, device)
    config, tokenizer = config or load_config(chosen), tokenizer or load_tokenizer(chosen)
    refuse_unsafe_weights(chosen, config)
    options = _quantised(chosen, config, device, dtype)
    if source_of(chosen).gguf_file is not None:
        options |= _dequantised()
    if chosen.attn_implementation != "auto":
        options["attn_implementation"] = chosen.attn_implementation
    model, loaded = _read(
        AutoModelForCausalLM,
        chosen,
        config=config,
        dtype=dtype,
        use_safetensors=True,  # of a folder; a GGUF file is named by itself
        output_loading_info=True,
        **options,
    )
    if loaded["missing_keys"]:  # transformers would leave them random
        raise UserError(
            "model.name",
            f"{chosen.name} lacks weights that its config.json names ({min(loaded['missing_keys'])})",
            "Choose a model whose config and weights belong together",
        )
    if "device_map" not in options:  # a quantised model is on its device, and may not be moved
        try:
            model = model.to(device)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            raise _no_room(chosen) from error
    for module in model.modules():
        # NOTE: otherwise 4-bit layers in eval mode repack their weights on some processors, and their output
        # has no gradient from then on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval(), tokenizer


def remote_code_warning(chosen: Model) -> str:
    """Returns the warning to show before a model is loaded with `model.trust_remote_code`."""
    return (
        f"warning: {chosen.name} may run its own Python code on this machine (model.trust_remote_code=true)"
    )


def load_config(chosen: Model) -> PreTrainedConfig:
    """Loads the config of a model, without its weights; raises UserError as `load_model`."""
    return _read(AutoConfig, chosen)


def load_tokenizer(chosen: Model) -> Tokenizer:
    """Loads the tokenizer of a model; raises UserError as `load_model`."""
    tokenizer = _read(AutoTokenizer, chosen)
    # Some classes load without their files, and then know no token.
    if not tokenizer("347*26=", add_special_tokens=False)["input_ids"]:
        raise UserError(
            "model.name", f"{chosen.name} has no tokenizer (tokenizer.json)", "Save it to the folder too"
        )
    return tokenizer


def quantization_of(config: PreTrainedConfig) -> str | None:
    """Returns how a model's layers are stored, from its config: nf4, int8, another method's name, or None."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    values = stored if isinstance(stored, dict) else stored.to_dict()
    if values.get("load_in_8bit"):
        return "int8"
    if values.get("load_in_4bit"):
        return str(values.get("bnb_4bit_quant_type", "fp4"))
    method = values.get("quant_method", "unknown")
    return str(getattr(method, "value", method))


def _quantised(
    chosen: Model, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Returns options to load a base that is quantised, now or in its files; raises UserError."""
    stored = quantization_of(config)
    if chosen.quantization is None and stored is None:
        return {}
    if chosen.quantization is None:
        return {"device_map": {"": device}}
    key, kind = "model.quantization", chosen.quantization
    if stored is not None:
        raise UserError(key, f"{chosen.name} is quantised already ({stored})", f"Leave {key} out")
    if device.type not in ("cpu", "cuda"):
        raise UserError(key, f"{kind} does not run on {device.type}", "Leave it out, or set model.device=cpu")
    if dtype == torch.float64:
        raise UserError(key, f"{kind} has no float64", "Set model.dtype=float32")
    if find_spec("bitsandbytes") is None:
        raise UserError(
            key,
            f"{kind} needs bitsandbytes, which is not installed",
            "Run pip install bitsandbytes",
        )
    # It logs at every call of an 8-bit layer that this computes in float16, and what to install.
    getLogger("bitsandbytes").setLevel(ERROR)
    if chosen.quantization == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": quantization, "device_map": {"": device}}


def _dequantised() -> dict[str, Any]:
    """Returns options to hold the weights of a GGUF file as ordinary matrices."""
    # Newer versions of transformers could leave them in blocks, which have no gradient.
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _read(kind: Any, chosen: Model, **options: Any) -> Any:
    source = source_of(chosen)
    options["trust_remote_code"] = chosen.trust_remote_code
    if chosen.revision:
        options["revision"] = chosen.revision
    try:
        local = source.fetched(chosen.revision)
        if local.gguf_file is not None:
            options["gguf_file"] = local.gguf_file
        with _without_bars(local), nullcontext() if local.is_local else hub_or_cache():
            return kind.from_pretrained(local.place, **options)
    except UserError:
        raise
    except Exception as error:  # a broken config, damaged weights: each library has its own kinds
        if _is_out_of_memory(error):
            raise _no_room(chosen) from error
        raise _refusal(chosen, source, error) from error


@contextmanager
def _without_bars(source: Source) -> Iterator[None]:
    """Inside, transformers draws no progress bars: one line of ours is enough."""
    reader: Any = None
    if source.gguf_file is not None:  # its reader has a bar that no switch turns off
        from transformers import modeling_gguf_pytorch_utils as reader
    bar = getattr(reader, "tqdm", None)
    logging.disable_progress_bar()
    try:
        if bar is not None:
            reader.tqdm = lambda tensors, **options: tensors
        yield
    finally:
        if bar is not None:
            reader.tqdm = bar
        logging.enable_progress_bar()


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Tells whether an error or what led to it is a lack of memory, whichever library says so."""
    while error is not None:
        lack = isinstance(error, OSError) and error.errno == errno.ENOMEM
        if lack or out_of_memory(error) or "cannot allocate memory" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def _no_room(chosen: Model) -> UserError:
    smaller = [] if chosen.quantization is not None or is_gguf(chosen) else ["model.quantization=nf4"]
    smaller += ["model.dtype=bfloat16"] if chosen.dtype in ("auto", "float32", "float64") else []
    fix = "Choose a smaller model" + (f", or set {' or '.join(smaller)}" if smaller else "")
    return UserError("memory", f"{chosen.name} does not fit while it is loaded", fix)


def _refusal(chosen: Model, source: Source, error: Exception) -> UserError:
    """Returns the error for a model that does not load, from what the libraries raised."""
    name, reason = chosen.name, " ".join(str(error).split())
    lowered = reason.lower()
    if isinstance(error, ValueError) and "attention implementation" in lowered:
        key = "model.attn_implementation"
        return UserError(key, f"{name} has no such attention", f"Set {key}=eager")
    if "trust_remote_code" in lowered:
        return UserError(
            "model.name",
            f"{name} needs to run its own Python code",
            "Set model.trust_remote_code=true if you trust it, or choose another model",
        )
    if type(error).__name__ == "SafetensorError":
        problem = f"the weights of {name} are damaged ({reason[:200]})"
        return UserError("model.name", problem, "Copy or download them again")
    if "ignore_mismatched_sizes" in reason:
        return UserError(
            "model.name",
            f"{name} has weights of another shape than its config.json says",
            "Choose a model whose config and weights belong together",
        )
    hub = None if source.is_local else _hub_refusal(chosen, error)
    if hub is not None:
        return hub
    if source.gguf_file is not None:
        file = Path(source.gguf_file).name
        problem = f"{file} does not load ({reason[:200]})"
        return UserError("model.name", problem, "Copy it again, or use the model as safetensors")
    if "safetensors" in lowered:
        pickled = sorted(path.name for path in Path(source.place).glob("*.bin"))
        has = f" (it has {pickled[0]})" if pickled else ""
        return UserError(
            "model.name",
            f"{name} has no safetensors weights{has}, and no other format is loaded",
            "Choose a model that has them",
        )
    if chosen.quantization is not None:
        key = "model.quantization"
        return UserError(
            key, f"{chosen.quantization} does not work here ({reason[:200]})", f"Leave {key} out"
        )
    return UserError("model.name", f"{name} does not load ({reason[:300]})", "Choose a causal language model")


def _hub_refusal(chosen: Model, error: Exception) -> UserError | None:
    """Returns the error if the Hub refused the model or could not be reached."""
    name = chosen.name
    match refusal(error):
        case "gated":
            fix = f"Open https://huggingface.co/{name}, then run `hf auth login`"
            return UserError("model.name", f"{name} needs its licence accepted", fix)
        case "revision":
            problem = f"{name} has no revision {chosen.revision}"
            return UserError("model.revision", problem, "Set model.revision= a branch, a tag or a commit")
        case "missing":
            return UserError(
                "model.name",
                f"{name} is not on the Hub, or private",
                "Check the name, run `hf auth login` if it is yours, or set model.name= a folder",
            )
        case "offline":
            return UserError(
                "model.name",
                f"{name} is neither a local folder nor reachable on the Hub",
                "Check the name and the network, or set model.name= the folder of a saved model "
                f"('{EMBEDDED[0]}' needs no network)",
            )
    return None


def pick_device(chosen: str) -> torch.device:
    """Returns the device that `model.device` means here; raises UserError if this machine has none."""
    if chosen == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(chosen)
        if device.type not in ("cpu", "cuda", "mps"):  # what memory plan and kernels know
            raise NotImplementedError(device.type)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            "model.device", f"{chosen!r} is not usable here", "Set model.device=cpu or auto"
        ) from error
    return device


def pick_dtype(chosen: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of the base.

    `auto` is float32 on a CPU, on a GPU bfloat16 from compute capability 8 and float16 below.
    """
    if chosen != "auto":
        return getattr(torch, chosen)
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        return torch.float16
    return torch.bfloat16


def end_ids(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens that end a completion: the generation config's, and the tokenizer's own.

    Raises UserError if there is none, or one that the model cannot predict: no completion would end.
    """
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = [] if own is None else own if isinstance(own, list) else [own]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends = [*ends, tokenizer.eos_token_id]
    if not ends:
        raise UserError(
            "model.name", "neither the model nor its tokenizer has an end token", "Set tokenizer.eos_token"
        )
    rows = vocabulary_of(model)
    if outside := [token for token in ends if not 0 <= token < rows]:
        raise UserError(
            "model.name",
            f"the end token {outside[0]} is beyond the {rows} tokens of the model",
            "Correct eos_token_id in its generation_config.json, or eos_token of its tokenizer",
        )
    return [int(token) for token in ends]


def vocabulary_of(model: PreTrainedModel) -> int:
    """Returns how many tokens a model can both read and predict."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return min(len(cast(nn.Linear, part).weight) for part in (head, embedding) if part is not None)


def suppressed_ids(model: PreTrainedModel, chosen: list[int], vocab_size: int) -> list[int]:
    """Returns token ids that are never sampled: the model's own and those of `rollout.suppress_tokens`."""
    outside = [token for token in chosen if token >= vocab_size]
    if outside:
        raise UserError(
            "rollout.suppress_tokens", f"{outside[0]} is not a token", f"Set ids from 0 to {vocab_size - 1}"
        )
    own = getattr(model.generation_config, "suppress_tokens", None) or []
    if outside := [token for token in own if not 0 <= token < vocab_size]:
        raise UserError(
            "model.name",
            f"its generation config suppresses {outside[0]}, and its tokens are 0 to {vocab_size - 1}",
            "Correct suppress_tokens in its generation_config.json",
        )
    return sorted({*own, *chosen})
