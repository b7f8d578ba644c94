"""Writes a model or a LoRA adapter as a GGUF file, which llama.cpp, Ollama and LM Studio read.

Knows nothing of runs. The types of model are those whose files were compared with llama.cpp's own: for any
other, two commands of llama.cpp are named. Tensors are converted one after another, while they are written.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from twig.common.errors import UserError
from twig.common.tokenizer import Tokenizer

TYPES = ("llama", "qwen2", "qwen3")  # model types; llama.cpp has an architecture of the same name for each
FORMATS = ("f16", "q8_0")
# How a byte-level tokenizer cuts a text before it merges: the name that llama.cpp has for it.
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
# By the expression, and whether a whole piece that is a token is taken before any merge.
_SPLITS = {
    (_LLAMA3 + _SPACES, True): "llama-bpe",
    (_LLAMA3 + _SPACES, False): "dbrx",
    (_QWEN2 + _SPACES, False): "qwen2",
}
_ONE_CHARACTER = r"[\s\S]"
# Fields that say how a file is laid out, which the writer decides.
_LAYOUT = ("GGUF.", "split.", "general.architecture", "general.file_type", "general.alignment")
_LAYOUT += ("general.quantization_version",)
_LARGEST = 65504.0  # in float16


@dataclass(frozen=True)
class Origin:
    """What a file says of where it comes from: its name, and the base's id and licence if they are known."""

    name: str
    hub_id: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and the tokens that end a completion, or the GGUF file that already has them."""

    tokenizer: Tokenizer
    ends: list[int]
    file: str | None = None


def refuse_gguf(config: PreTrainedConfig, base: str, merged: bool) -> None:
    """Raises UserError if a model of this config cannot be written, with what to run instead."""
    if find_spec("gguf") is None:
        problem = "GGUF files need the package gguf, which is not installed"
        raise UserError("--gguf", problem, "Run pip install gguf")
    kind, rope = config.model_type, getattr(config, "rope_parameters", None) or {}
    scaled = rope.get("rope_type", "default")
    if kind not in TYPES:
        problem = f"{base} is of the type {kind}, and Twig writes {', '.join(TYPES)}"
    elif scaled != "default" and (kind, scaled) != ("llama", "llama3"):
        problem = f"{base} scales its positions ({scaled}), which Twig does not write"
    elif getattr(config, "use_sliding_window", False):
        problem = f"{base} has a sliding window, which llama.cpp does not have for {kind}"
    else:
        return
    raise UserError("--gguf", problem, _by_hand(base, merged))


def _by_hand(base: str, merged: bool) -> str:
    if merged:
        command = "python convert_hf_to_gguf.py exports/NAME --outtype f16"
        return f"Leave out --gguf, then run llama.cpp's {command}"
    command = f"python convert_lora_to_gguf.py exports/NAME --base FOLDER_OF_{Path(base).name}"
    return f"Leave out --gguf, then run llama.cpp's {command}"


# ---- the adapter -------------------------------------------------------------------------------------------


def write_adapter(path: Path, adapter: Path, config: PreTrainedConfig, origin: Origin) -> None:
    """Writes the adapter in the folder `adapter` (PEFT's format, on a base of `config`) as float32."""
    import gguf

    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if settings.get("rank_pattern") or settings.get("alpha_pattern"):
        problem = "its ranks or alphas differ from layer to layer, which GGUF cannot say"
        raise UserError("--gguf", problem, "Pass --merged too")
    rank = settings["r"]
    scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
    names = gguf.get_tensor_name_map(_architecture(config), config.num_hidden_layers)
    permuted = _permutation(config)
    with _writing(path, config.model_type) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scale * rank)
        _add_origin(writer, origin)
        for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
            stem, _, matrix = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
            ours = names.get_name(stem)
            if ours is None or matrix not in ("lora_A", "lora_B"):
                problem = f"llama.cpp has no place for {name}"
                raise UserError("--gguf", problem, "Pass --merged too")
            if matrix == "lora_B":  # its rows are those of the weight
                tensor = permuted(stem, tensor)
            values = np.ascontiguousarray(tensor.float().numpy())
            writer.add_tensor(f"{ours}.weight.{matrix.lower()}", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


# ---- the model ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: its name, shape and storage, and its values once they are asked for."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    values: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        """The size of the values in the file."""
        import gguf

        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * size


def write_model(path: Path, model: PreTrainedModel, form: str, texts: Vocabulary, origin: Origin) -> None:
    """Writes a model with its tokenizer: the matrices in `form` (f16 or q8_0), everything else as float32.

    If the base came from a GGUF file (`texts.file`), header and tokenizer are those of that file, and so is
    every tensor that the model does not have.
    """
    import gguf

    base = None if texts.file is None else gguf.GGUFReader(texts.file)
    with _writing(path, model.config.model_type) as writer:
        if base is None:
            _add_origin(writer, origin)
            _add_shape(writer, model.config)
            _add_tokenizer(writer, texts, model.config.vocab_size)
        else:
            _copy_header(writer, base)
        writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{form.upper()}"))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        entries = {each.name: each for each in _entries(model, form)}
        for each in [] if base is None else base.tensors:
            shape = tuple(map(int, reversed(each.shape)))  # the package has the reader's the other way round
            own = _Entry(each.name, shape, each.tensor_type, lambda each=each: each.data)
            entries.setdefault(each.name, own)
        for entry in entries.values():
            form_of = (entry.name, entry.shape, np.dtype(np.float32), entry.num_bytes)
            writer.add_tensor_info(*form_of, raw_dtype=entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries.values():
            writer.write_tensor_data(entry.values())


def _entries(model: PreTrainedModel, form: str) -> Iterator[_Entry]:
    """Yields the model's tensors as llama.cpp has them."""
    import gguf

    config, kinds = model.config, gguf.GGMLQuantizationType
    names = gguf.get_tensor_name_map(_architecture(config), config.num_hidden_layers)
    permuted = _permutation(config)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        ours = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if ours is None:
            problem = f"llama.cpp has no place for {name}"
            raise UserError("--gguf", problem, _by_hand(config.model_type, merged=True))
        kind = kinds.F32
        if tensor.ndim > 1:  # a row that is no whole number of blocks stays in float16
            block = gguf.GGML_QUANT_SIZES[kinds[form.upper()]][0]
            kind = kinds[form.upper()] if tensor.shape[-1] % block == 0 else kinds.F16

        def values(name: str = name, tensor: Tensor = tensor, kind: Any = kind) -> np.ndarray:
            return _stored(name, permuted(name.rpartition(".")[0], tensor.detach().float()), kind)

        yield _Entry(ours, tuple(tensor.shape), kind, values)
    if (factors := _rope_factors(model)) is not None:
        yield _Entry("rope_freqs.weight", factors.shape, kinds.F32, lambda: factors)


def _stored(name: str, tensor: Tensor, kind: Any) -> np.ndarray:
    """Returns the values as they are in the file."""
    import gguf

    values = np.ascontiguousarray(tensor.numpy())
    if kind == gguf.GGMLQuantizationType.F32:
        return values
    if np.abs(values).max(initial=0) > _LARGEST:
        raise UserError("--gguf", f"{name} leaves the range of float16", "Leave out --gguf")
    return gguf.quants.quantize(values, kind)


def _permutation(config: PreTrainedConfig) -> Callable[[str, Tensor], Tensor]:
    """Returns a function of a module's name and a tensor whose rows are that module's outputs.

    llama.cpp's llama rotates neighbours, transformers the two halves of a head: there, the rows of q and k
    are in another order. Its qwen2 and qwen3 rotate halves too.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def permuted(module: str, tensor: Tensor) -> Tensor:
        number = heads.get(module.rpartition(".")[2])
        if config.model_type != "llama" or number is None:
            return tensor
        halves = tensor.reshape(number, 2, tensor.shape[0] // number // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)

    return permuted


def _rope_factors(model: PreTrainedModel) -> np.ndarray | None:
    """Returns by how much each frequency of the positions is divided; None if by nothing."""
    rope = model.config.rope_parameters
    if rope.get("rope_type", "default") == "default":
        return None
    rotary: Any = model.get_decoder().rotary_emb
    frequencies = rotary.inv_freq
    powers = torch.arange(len(frequencies), dtype=torch.float32) / len(frequencies)
    return (rope["rope_theta"] ** -powers / frequencies.float()).numpy()


# ---- the header ------------------------------------------------------------------------------------------


@contextmanager
def _writing(path: Path, kind: str) -> Iterator[Any]:
    """Yields a writer of a file of this architecture, and closes it."""
    import gguf

    class Writer(gguf.GGUFWriter):
        def _pack_val(self, val: Any, *args: Any, **options: Any) -> bytes:
            # The package refuses to write a list without entries; a tokenizer may have no merges.
            if isinstance(val, list) and not val:
                return struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING, 0)
            return super()._pack_val(val, *args, **options)

    writer = Writer(path, kind)
    try:
        yield writer
    finally:
        writer.close()


def _architecture(config: PreTrainedConfig) -> Any:
    import gguf

    return gguf.MODEL_ARCH[config.model_type.upper()]


def _add_origin(writer: Any, origin: Origin) -> None:
    writer.add_name(origin.name)
    if origin.license is not None:
        writer.add_license(origin.license)
    if origin.hub_id is not None:
        owner, _, name = origin.hub_id.rpartition("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name)
        if owner:
            writer.add_base_model_organization(0, owner)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{origin.hub_id}")


def _add_shape(writer: Any, config: PreTrainedConfig) -> None:
    writer.add_type("model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)


def _copy_header(writer: Any, base: Any) -> None:
    """Copies every field but those that the writer decides."""
    for name, field in base.fields.items():
        if not name.startswith(_LAYOUT):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)


# ---- the tokenizer ---------------------------------------------------------------------------------------


def _add_tokenizer(writer: Any, texts: Vocabulary, size: int) -> None:
    """Adds a byte-level tokenizer, or one of single characters, and the special tokens."""
    import gguf

    tokenizer: Any = texts.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    layout = json.loads(backend.to_str()) if backend is not None else {}
    pre = _split(layout)
    if pre is None:
        problem = "llama.cpp's name for the way its tokenizer cuts a text is not known here"
        raise UserError("--gguf", problem, _by_hand("the base", merged=True))
    added = {each["id"]: each for each in layout["added_tokens"]}
    spelled = {number: token for token, number in tokenizer.get_vocab().items()}
    characters = layout["model"]["type"] == "WordLevel"
    tokens, kinds = [], []
    for number in range(size):
        token, kind = spelled.get(number, f"[PAD{number}]"), gguf.TokenType.NORMAL
        if number not in spelled:
            kind = gguf.TokenType.UNUSED
        elif number in added:
            special = added[number]["special"] or (token.startswith("<|") and token.endswith("|>"))
            kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
        elif characters:
            token = _as_bytes(token)
        tokens.append(token)
        kinds.append(kind)
    merges = layout["model"].get("merges", [])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = [each if isinstance(each, str) else " ".join(each) for each in merges]
    writer.add_key_value(gguf.Keys.Tokenizer.MERGES, merges, gguf.GGUFValueType.ARRAY)
    _add_special_tokens(writer, tokenizer, texts.ends)


def _add_special_tokens(writer: Any, tokenizer: Any, ends: list[int]) -> None:
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    writer.add_eos_token_id(end)
    for other in ends:
        if other != end:  # llama.cpp knows one more
            writer.add_eot_token_id(other)
            break
    for name in ("bos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(tokenizer("1")["input_ids"][0] == tokenizer.bos_token_id)
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _split(layout: Mapping[str, Any]) -> str | None:
    """Returns llama.cpp's name for how a tokenizer cuts a text into pieces; None for any other way."""
    model, before = layout.get("model", {}), layout.get("pre_tokenizer") or {}
    if model.get("type") == "WordLevel" and _expression(before) == _ONE_CHARACTER:
        single = all(len(_as_bytes(token)) == 1 for token in model["vocab"] if len(token) == 1)
        return "gpt-2" if single else None
    if model.get("type") != "BPE" or (layout.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        return None
    parts = before.get("pretokenizers", [before])
    bytes_, first = parts[-1], parts[0]
    if bytes_.get("type") != "ByteLevel" or bytes_["add_prefix_space"] or len(parts) > 2:
        return None
    if len(parts) == 1 and bytes_["use_regex"] and not model.get("ignore_merges"):
        return "gpt-2"
    if first["type"] == "Digits" and first["individual_digits"] and bytes_["use_regex"]:
        return "smollm"
    if bytes_["use_regex"]:
        return None
    return _SPLITS.get((_expression(first) or "", bool(model.get("ignore_merges"))))


def _expression(split: Mapping[str, Any]) -> str | None:
    """Returns the regular expression whose matches are the pieces; None if the text is cut otherwise."""
    if split.get("type") != "Split" or split["behavior"] != "Isolated" or split["invert"]:
        return None
    return split["pattern"].get("Regex")


def _as_bytes(text: str) -> str:
    """Returns the text with each byte as the character that stands for it in a byte-level vocabulary.

    >>> _as_bytes("a b")
    'aĠb'
    """
    return "".join(bytes_to_unicode()[byte] for byte in text.encode())
