"""The shape of a language model, read from its config.json alone: layers, widths, numbers of weights.

What a family adds (biases, norms, tied embeddings) is a row of a table, because a config leaves out what its
class has by default. Needs no torch and no weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from twig.common.errors import UserError
from twig.common.hub import reachable

# What the classes have beyond the plain Llama layer: two norms, no biases, an untied head.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"windowed": True},
    "granite": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 128},
    "gemma2": {"norms": 4, "tied": True, "head_dim": 256, "pattern": 2, "window": 4096, "softcaps": True},
    "gemma3_text": {
        "norms": 4,
        "qk_norm": True,
        "tied": True,
        "head_dim": 256,
        "pattern": 6,
        "window": 4096,
    },
}
_DENSE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


class Unplannable(UserError):
    """A model whose memory cannot be told from its config."""


@dataclass(frozen=True)
class Shape:
    """A decoder of equal layers. Widths in numbers; `windows` has the sliding window of each layer or None.

    `norms` are those of a layer that are as wide as the hidden state; with `qk_norm` queries and keys have
    one of a head's width each. `stored` is the dtype of the weights on disk, where the config says it.
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    norms: int
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]
    attention_softcap: bool
    logit_softcap: bool
    logit_scale: bool
    embedding_scale: bool
    per_type_rotary: bool
    stored: str | None

    @property
    def known(self) -> bool:
        """Whether the family is one that was compared with the real model; others are taken for a Llama."""
        return self.family in _FAMILIES

    @property
    def query(self) -> int:
        """Width of all queries, and of the attention's output."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of all keys, and of all values."""
        return self.kv_heads * self.head_dim

    def linear(self) -> dict[str, tuple[int, int]]:
        """Name to (inputs, outputs) of the linear modules of a layer."""
        return {
            "q_proj": (self.hidden, self.query),
            "k_proj": (self.hidden, self.key),
            "v_proj": (self.hidden, self.key),
            "o_proj": (self.query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    def parameters(self) -> dict[str, int]:
        """Numbers of weights: `linear` (the matrices of the layers), `embedding`, `head` (0 where it is the
        embedding) and `other` (norms and biases)."""
        layer = sum(inputs * outputs for inputs, outputs in self.linear().values())
        other = self.norms * self.hidden
        other += 2 * self.head_dim if self.qk_norm else 0
        other += self.query + 2 * self.key if self.qkv_bias else 0
        other += self.hidden if self.o_bias else 0
        other += 2 * self.intermediate + self.hidden if self.mlp_bias else 0
        embedding = self.vocabulary * self.hidden
        return {
            "linear": self.layers * layer,
            "embedding": embedding,
            "head": 0 if self.tied else embedding,
            "other": self.layers * other + self.hidden,
        }

    def weight_bytes(self, element: int, quantised: str | None = None) -> int:
        """Bytes of the base at `element` bytes a number; `quantised` (nf4, int8) is about the layers.

        nf4: half a byte a weight, and a float32 scale for each 64 of them, itself stored in 8 bits with one
        float32 for each 256. int8: a byte a weight and a float32 for each output.
        """
        counts = self.parameters()
        rest = (counts["embedding"] + counts["head"] + counts["other"]) * element
        if quantised is None:
            return rest + counts["linear"] * element
        outputs = self.layers * sum(outputs for _, outputs in self.linear().values())
        if quantised == "int8":
            return rest + counts["linear"] + 4 * outputs
        assert quantised == "nf4", quantised
        blocks = counts["linear"] / 64
        return round(rest + counts["linear"] / 2 + blocks + 4 * blocks / 256)

    def adapter_parameters(self, rank: int, modules: frozenset[str], adapted: int) -> int:
        """Numbers in the adapters of `adapted` layers: two matrices a module."""
        return adapted * sum(rank * sum(self.linear()[name]) for name in modules)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Shape":
        """The shape that a config.json describes; raises Unplannable for any but decoders of equal layers."""
        config = {**config, **config.get("text_config", {})}
        family = str(config.get("model_type", "?"))
        if wrong := [key for key in _DENSE if not isinstance(config.get(key), int) or config[key] < 1]:
            _refuse(family, f"its config has no {wrong[0]} of at least 1")
        if any(config.get(key) for key in _EXPERTS):
            _refuse(family, "it has experts, of which each token uses some")
        traits = _FAMILIES.get(family, {})
        heads = config["num_attention_heads"]
        per_head = config.get("head_dim") or traits.get("head_dim") or config["hidden_size"] // heads
        bias = bool(config.get("attention_bias", False))
        softcaps = traits.get("softcaps", False)
        return cls(
            family=family,
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=per_head,
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", traits.get("tied", False))),
            norms=traits.get("norms", 2),
            qk_norm=traits.get("qk_norm", False),
            qkv_bias=traits.get("qkv_bias", bias),
            o_bias=bias and "qkv_bias" not in traits,
            mlp_bias=bool(config.get("mlp_bias", False)),
            windows=_windows(config, traits),
            attention_softcap=config.get("attn_logit_softcapping", 50.0 if softcaps else None) is not None,
            logit_softcap=config.get("final_logit_softcapping", 30.0 if softcaps else None) is not None,
            logit_scale=any((config.get(k) or 1) != 1 for k in ("logit_scale", "logits_scaling")),
            embedding_scale=(config.get("embedding_multiplier") or 1) != 1 or "pattern" in traits,
            per_type_rotary=family == "gemma3_text",
            stored=config.get("dtype") or config.get("torch_dtype"),
        )


def _windows(config: Mapping[str, Any], traits: Mapping[str, Any]) -> tuple[int | None, ...]:
    layers = config["num_hidden_layers"]
    window = config.get("sliding_window", traits.get("window"))
    types = config.get("layer_types")
    if types is None and "pattern" in traits:
        every = config.get("sliding_window_pattern") or traits["pattern"]
        types = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    if types is None and config.get("use_sliding_window"):
        first = config.get("max_window_layers", layers)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if types is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    return (window if traits.get("windowed") else None,) * layers


def _refuse(family: str, why: str) -> None:
    raise Unplannable(
        f"model.name: the memory of model type '{family}' cannot be planned: {why}; "
        "write rollout.wave_size, train.pack_size and train.head_chunk yourself"
    )


def find_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of the embedded model, of a folder, or of a Hub model's copy on this machine; None without one.

    `name` may be the path of a config.json: then the file beside it.
    """
    for place in (Path(str(files("twig") / "assets" / name)), Path(name).expanduser()):
        if place.is_file():
            place = place.parent
        if place.is_dir():
            return place / file if (place / file).is_file() else None
    if _is_path(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def read_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """The config.json of the embedded model, a folder, a file, or a repository on the Hub.

    Raises UserError where there is none.
    """
    path = Path(name).expanduser()
    found = path if path.is_file() else find_file(name, "config.json", revision)
    if found is None and (path.is_dir() or _is_path(name)):
        raise UserError(f"model.name: {name} has no config.json; write the folder of a model, or a Hub id")
    return _parse(found or _download(name, revision))


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, hf_hub_download

    try:
        if not constants.HF_HUB_OFFLINE and not reachable():  # its library would try for half a minute
            raise OSError("the Hub is not reachable")
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.name: the config.json of {name} is neither here nor reachable on the Hub; check the "
            "name and the network, or write the path of a folder or a config.json"
        ) from error


def _is_path(name: str) -> bool:
    """Whether a name cannot be one on the Hub."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def _parse(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); write a model's config.json") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a mapping; write a model's config.json")
    return config
