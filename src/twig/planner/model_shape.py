"""Reads the shape of a language model from its config.json alone: layers, widths, numbers of weights.

What a family adds (biases, norms, tied embeddings) is a row of a table, because a config leaves out the
defaults of its class. Needs no torch and no weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from twig.common.errors import UserError
from twig.common.hub import reachable

_BIASES = ("attention_bias", "mlp_bias")
# What the families have beyond the plain Llama layer: two norms, no biases, an untied head. `biases` are the
# keys that their class knows; others count for nothing.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"biases": _BIASES},
    "mistral": {"windowed": True, "biases": (), "kv_heads": 8},
    "granite": {"biases": _BIASES},
    "qwen2": {"qkv_bias": True, "biases": (), "kv_heads": 32},
    "qwen3": {"qk_norm": True, "head_dim": 128, "biases": _BIASES[:1], "kv_heads": 32},
    "gemma2": {
        "biases": _BIASES[:1],
        "kv_heads": 4,
        "norms": 4,
        "tied": True,
        "head_dim": 256,
        "pattern": 2,
        "window": 4096,
        "softcaps": True,
    },
    "gemma3_text": {
        "biases": _BIASES[:1],
        "kv_heads": 4,
        "norms": 4,
        "qk_norm": True,
        "tied": True,
        "head_dim": 256,
        "pattern": 6,
        "window": 4096,
    },
}
_DENSE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
_ATTENTION = ("full_attention", "sliding_attention", "attention")  # types of layers
_MOST_LAYERS = 10_000


class Unplannable(UserError):
    """A model whose memory cannot be predicted from its config."""


@dataclass(frozen=True)
class Linear:
    """The size of one linear module: numbers that go in and come out."""

    inputs: int
    outputs: int

    @property
    def weights(self) -> int:
        """Numbers in its matrix."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Mixing:
    """Layers that keep a state: which ones, and whether they also attend.

    `weights` counts the numbers in a mixer's matrices, `linear` has the modules that an adapter can be on.
    `state` counts the numbers of a state, `kept` those that the backward pass needs of a token, about.
    """

    layers: tuple[bool, ...]
    attends: bool
    weights: int
    linear: tuple[tuple[str, Linear], ...]
    state: int
    kept: int


@dataclass(frozen=True)
class Shape:
    """A decoder of equal layers, but for those that keep a state (`mixing`).

    Widths are counts; `windows` has the sliding window of each layer or None. `norms` counts the norms of a
    layer that are as wide as the hidden state; with `qk_norm` queries and keys also have one of a head's
    width each. `stored` is the dtype of the weights on disk, if the config has it. The last `sharing` layers
    take keys and values from others; `streams` hidden states go from layer to layer; each layer gets `inputs`
    numbers of a token, beside the layer below. `more_weights` are those that only such layers have.
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
    mixing: Mixing | None = None
    sharing: int = 0
    streams: int = 1
    inputs: int = 0
    more_weights: int = 0

    @property
    def is_measured(self) -> bool:
        """Whether the family was compared with its real model; any other counts as a Llama."""
        return self.family in _FAMILIES

    @property
    def attending(self) -> int:
        """How many layers have keys and values."""
        if self.mixing is None or self.mixing.attends:
            return self.layers - self.sharing
        return self.layers - sum(self.mixing.layers)

    def keyed(self, first: int) -> int:
        """Counts the layers from `first` on whose keys and values an update computes."""
        return max(self.layers - self.sharing - first, 0)

    def boundary(self, cut: int) -> int:
        """Counts the numbers that sampling records of a token: what leaves the layers below `cut`.

        That is their output, and keys and values that layers above take: those of the last layer of a kind
        that has its own.
        """
        return self.streams * self.hidden + 2 * self.key * self.taken(cut)

    def taken(self, cut: int) -> int:
        """Counts the layers below `cut` whose keys and values layers above take."""
        own = self.layers - self.sharing
        last = {self.windows[i]: i for i in range(own)}
        taken = {last.get(self.windows[i], cut) for i in range(max(own, cut), self.layers)}
        return sum(layer < cut for layer in taken)

    @property
    def states(self) -> int:
        """Numbers in the states of all layers, for one text."""
        return 0 if self.mixing is None else sum(self.mixing.layers) * self.mixing.state

    @property
    def query(self) -> int:
        """Width of all queries, and of the attention's output."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of all keys, and of all values."""
        return self.kv_heads * self.head_dim

    def linear(self) -> dict[str, Linear]:
        """Returns the linear modules of the layers by name."""
        return dict(self.mixing.linear if self.mixing else ()) | {
            "q_proj": Linear(self.hidden, self.query),
            "k_proj": Linear(self.hidden, self.key),
            "v_proj": Linear(self.hidden, self.key),
            "o_proj": Linear(self.query, self.hidden),
            "gate_proj": Linear(self.hidden, self.intermediate),
            "up_proj": Linear(self.hidden, self.intermediate),
            "down_proj": Linear(self.intermediate, self.hidden),
        }

    def parameters(self) -> dict[str, int]:
        """Counts the weights by kind.

        `linear` are the matrices of the layers, `head` is 0 if it is the embedding, `other` are norms and
        biases.
        """
        linear = self.linear()
        attention = sum(linear[f"{name}_proj"].weights for name in "qo")
        keys = sum(linear[f"{name}_proj"].weights for name in "kv")
        mlp = sum(linear[f"{name}_proj"].weights for name in ("gate", "up", "down"))
        mixers = sum(self.mixing.layers) * self.mixing.weights if self.mixing else 0
        other = self.norms * self.hidden
        other += 2 * self.head_dim if self.qk_norm else 0
        other += self.query + 2 * self.key if self.qkv_bias else 0
        other += self.hidden if self.o_bias else 0
        other += 2 * self.intermediate + self.hidden if self.mlp_bias else 0
        embedding = self.vocabulary * self.hidden
        return {
            "linear": self.layers * mlp
            + (self.attending + self.sharing) * attention
            + self.attending * keys
            + mixers,
            "embedding": embedding,
            "head": 0 if self.tied else embedding,
            "other": self.layers * other + self.hidden + self.more_weights,
        }

    def weight_bytes(self, element: int, quantised: str | None = None) -> int:
        """Counts the bytes of the base at `element` bytes a number, its layers `quantised` (nf4 or int8).

        nf4: half a byte a weight, and a float32 scale for each 64 of them, itself stored in 8 bits with one
        float32 for each 256. int8: a byte a weight and a float32 for each output.
        """
        counts = self.parameters()
        rest = (counts["embedding"] + counts["head"] + counts["other"]) * element
        if quantised is None:
            return rest + counts["linear"] * element
        outputs = self.layers * sum(linear.outputs for linear in self.linear().values())
        if quantised == "int8":
            return rest + counts["linear"] + 4 * outputs
        assert quantised == "nf4", quantised
        blocks = counts["linear"] / 64
        return round(rest + counts["linear"] / 2 + blocks + 4 * blocks / 256)

    def layer_of(self) -> dict[str, int]:
        """Returns the layer of each linear module by its whole name."""
        asking, attention = ([f"self_attn.{name}_proj" for name in names] for names in ("qo", "qkvo"))
        mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
        mixer = [f"mixer.{name}" for name, _ in self.mixing.linear] if self.mixing else []
        result = {}
        for i in range(self.layers):
            mixes = self.mixing is not None and self.mixing.layers[i]
            attends = not mixes or (self.mixing is not None and self.mixing.attends)
            own = attention if i < self.layers - self.sharing else asking
            parts = own * attends + mixer * mixes + mlp
            result |= {f"model.layers.{i}.{part}": i for part in parts}
        return result

    def adapter_parameters(self, ranks: Mapping[str, int], dora: bool = False) -> int:
        """Counts the numbers of adapters, of a rank for each module: two matrices, with DoRA lengths too."""
        linear = self.linear()
        sizes = ((linear[name.rpartition(".")[2]], rank) for name, rank in ranks.items())
        return sum(rank * (size.inputs + size.outputs) + dora * size.outputs for size, rank in sizes)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Shape":
        """Reads a shape from a config.json; raises Unplannable unless it is a decoder of equal layers."""
        text = config.get("text_config") or {}
        read = _Reader({**config, **(text if isinstance(text, Mapping) else {})})
        config, family = read.config, read.family
        hidden, layers, heads, vocabulary = map(read.count, _DENSE)
        intermediate = read.count("intermediate_size", config.get("block_ff_dim"))
        if config.get("use_double_wide_mlp"):  # of the layers that share keys: about what is trained
            intermediate *= 2
        if config.get("block_auto_adjust_ff_dim"):
            multiple = read.count("block_multiple_of", 256)
            intermediate = -(-int(2 * intermediate / 3) // multiple) * multiple
        if layers > _MOST_LAYERS:
            raise _unplannable(family, f"its config has {layers} layers")
        if any(config.get(key) for key in _EXPERTS):
            raise _unplannable(family, "it has experts, and each token uses only some of them")
        traits = _FAMILIES.get(family, {})
        bias, mlp_bias = (
            key in traits.get("biases", _BIASES) and bool(config.get(key, False)) for key in _BIASES
        )
        softcaps = traits.get("softcaps", False)
        # null means as many as heads, a missing key what the class has
        kv_heads = heads if "num_key_value_heads" in config else traits.get("kv_heads", heads)
        stored = config.get("dtype") or config.get("torch_dtype")
        return cls(
            family=family,
            hidden=hidden,
            intermediate=intermediate,
            layers=layers,
            heads=heads,
            kv_heads=read.count("num_key_value_heads", kv_heads),
            head_dim=_head_dim(read, layers, traits.get("head_dim", hidden // heads)),
            vocabulary=vocabulary,
            tied=bool(config.get("tie_word_embeddings", traits.get("tied", False))),
            norms=traits.get("norms", 2),
            qk_norm=traits.get("qk_norm", False),
            qkv_bias=traits.get("qkv_bias", bias),
            o_bias=bias and "qkv_bias" not in traits,
            mlp_bias=mlp_bias,
            windows=_windows(read, layers, traits),
            attention_softcap=config.get("attn_logit_softcapping", 50.0 if softcaps else None) is not None,
            logit_softcap=config.get("final_logit_softcapping", 30.0 if softcaps else None) is not None,
            logit_scale=any((config.get(k) or 1) != 1 for k in ("logit_scale", "logits_scaling")),
            embedding_scale=(config.get("embedding_multiplier") or 1) != 1 or "pattern" in traits,
            per_type_rotary=family == "gemma3_text",
            stored=stored if isinstance(stored, str) else None,
            mixing=_mixing(read, hidden, layers),
            **_sharing(read, hidden, layers),
        )


@dataclass(frozen=True)
class _Reader:
    """Reads a config.json, in which any key may hold anything."""

    config: Mapping[str, Any]

    @property
    def family(self) -> str:
        return str(self.config.get("model_type", "?"))

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Returns a whole number of at least `least`; raises Unplannable for anything else."""
        value = self.config.get(key)
        if isinstance(value, list) and value and all(type(each) is int for each in value):
            value = max(value)  # one for each layer
        value = default if value is None else value
        if type(value) is not int or value < least:
            raise _unplannable(self.family, f"its config has no {key} of at least {least}")
        return value


def _head_dim(read: _Reader, layers: int, default: int) -> int:
    """Returns the width of a head, the mean over the layers if some have their own."""
    width, own = read.count("head_dim", default), read.config.get("per_layer_config")
    if not isinstance(own, Mapping):
        return width
    widths = [each.get("head_dim", width) if isinstance(each, Mapping) else width for each in own.values()]
    if not all(type(each) is int and each > 0 for each in widths) or len(widths) > layers:
        raise _unplannable(read.family, "its config has a per_layer_config with other heads")
    return -(-(sum(widths) + (layers - len(widths)) * width) // layers)


def _sharing(read: _Reader, hidden: int, layers: int) -> dict[str, int]:
    """Returns what a shape has of layers with inputs of their own, from the keys of their configs."""
    config = read.config
    if "hidden_size_per_layer_input" not in config:
        return {}
    sharing = min(read.count("num_kv_shared_layers", 0, least=0), layers - 1)
    inputs = read.count("hidden_size_per_layer_input", 0, least=0)
    streams = read.count("altup_num_inputs", 1)
    rows = read.count("vocab_size_per_layer_input", read.count("vocab_size"))
    more = inputs * layers * (rows + 3 * hidden)  # the table, and matrices from and to the hidden state
    if streams > 1:
        rank = read.count("laurel_rank", 64)
        more += 2 * (streams - 1) * hidden**2 + layers * hidden * (2 * rank + streams)
    return {"sharing": sharing, "inputs": inputs, "streams": streams, "more_weights": more}


def _mixing(read: _Reader, hidden: int, layers: int) -> Mixing | None:
    """Returns which layers keep a state, from the keys that a config has for such layers."""
    config = read.config
    if "conv_L_cache" in config:
        linear = {"in_proj": Linear(hidden, 3 * hidden), "out_proj": Linear(hidden, hidden)}
        weights, kept = 4 * hidden**2, 6 * hidden
        state = hidden * read.count("conv_L_cache")
    elif "linear_num_value_heads" in config:
        heads, size = read.count("linear_num_value_heads"), read.count("linear_value_head_dim", 128)
        of_key = read.count("linear_key_head_dim", 128)
        key, value = read.count("linear_num_key_heads", 16) * of_key, heads * size
        conv, kernel = 2 * key + value, read.count("linear_conv_kernel_dim", 4)
        if read.family == "qwen3_next":
            widths = {"in_proj_qkvz": conv + value, "in_proj_ba": 2 * heads}
        else:
            widths = {"in_proj_qkv": conv, "in_proj_z": value, "in_proj_a": heads, "in_proj_b": heads}
        linear = {name: Linear(hidden, width) for name, width in widths.items()}
        linear["out_proj"] = Linear(value, hidden)
        weights = hidden * (conv + 2 * value + 2 * heads)
        state = conv * kernel + heads * of_key * size
        # queries, keys, values in their forms, the matrices of a chunk of 64, a state for each chunk
        kept = heads * (8 * of_key + 6 * size + 5 * 64 + 3 * of_key * size // 64) + 3 * conv + 3 * value
    elif "mamba_d_state" in config:
        heads, states = read.count("mamba_n_heads", 128), read.count("mamba_d_state")
        expand = config.get("mamba_expand", 2)
        wide = config.get("mamba_d_ssm") or int((expand if type(expand) in (int, float) else 2) * hidden)
        conv = wide + 2 * read.count("mamba_n_groups", 1) * states
        linear = {"in_proj": Linear(hidden, wide + conv + heads), "out_proj": Linear(wide, hidden)}
        weights = sum(each.weights for each in linear.values())
        state = conv * read.count("mamba_d_conv", 4) + wide * states
        chunk = read.count("mamba_chunk_size", 256)
        kept = heads * (3 * chunk + 6 * states) + 8 * wide + 3 * conv + 2 * wide * states // chunk
    else:
        return None
    which, attends = _with_state(read, layers)
    return Mixing(which, attends, weights, tuple(linear.items()), state, kept)


def _with_state(read: _Reader, layers: int) -> tuple[tuple[bool, ...], bool]:
    """Returns which layers keep a state, and whether these also attend; all do if the config does not say."""
    config = read.config
    types = config.get("layer_types") or config.get("layers_block_type")
    for key in ("attn_layer_indices", "full_attn_idxs"):
        if isinstance(config.get(key), list):
            types = ["attention" if i in config[key] else "state" for i in range(layers)]
    if types is None and "full_attention_interval" in config:
        every = read.count("full_attention_interval")
        types = ["state" if (i + 1) % every else "attention" for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or "hybrid" in types:
        return (True,) * layers, True
    return tuple(kind not in _ATTENTION for kind in types), False


def _windows(read: _Reader, layers: int, traits: Mapping[str, Any]) -> tuple[int | None, ...]:
    config, window = read.config, None
    if config.get("sliding_window", traits.get("window")) is not None:
        window = read.count("sliding_window", traits.get("window"))
    types = config.get("layer_types")
    if types is None and "pattern" in traits:
        every = read.count("sliding_window_pattern", traits["pattern"])
        types = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    if types is None and config.get("use_sliding_window"):
        first = read.count("max_window_layers", layers, least=0)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if types is None:
        return (window if traits.get("windowed") else None,) * layers
    if not isinstance(types, list) or len(types) != layers:
        raise _unplannable(read.family, f"its config has no layer_types of {layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _unplannable(family: str, reason: str) -> Unplannable:
    return Unplannable(
        "model.name",
        f"the memory of model type '{family}' cannot be planned: {reason}",
        "Set rollout.wave_size, train.pack_size and train.head_chunk yourself",
    )


def find_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """Returns a file of the embedded model, of a folder, or of a Hub model in this machine's cache.

    `name` may be the path of a config.json: then the file beside it. None if there is no such file.
    """
    for place in (Path(str(files("twig") / "assets" / name)), Path(name).expanduser()):
        if place.is_file():
            place = place.parent
        if place.is_dir():
            return place / file if (place / file).is_file() else None
    if _is_path(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, file, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def read_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """Reads the config.json of the embedded model, a folder, a file, or a repository on the Hub.

    Raises UserError if there is none.
    """
    path = Path(name).expanduser()
    local = path if path.is_file() else find_file(name, "config.json", revision)
    if local is None and (path.is_dir() or _is_path(name)):
        fix = "Use the folder of a saved model, or a Hub id"
        if (path / "adapter_config.json").is_file():
            fix = f"It is an adapter: set model.adapter={name}, and model.name to its base"
        raise UserError("model.name", f"{name} has no config.json", fix)
    return _parse(local or _download(name, revision))


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, hf_hub_download

    try:
        if not constants.HF_HUB_OFFLINE and not reachable():  # its library would try for half a minute
            raise OSError("the Hub is not reachable")
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (OSError, ValueError) as error:
        raise UserError(
            "model.name",
            f"the config.json of {name} is neither on this machine nor reachable on the Hub",
            "Check the name and the network, or use the path of a folder or a config.json",
        ) from error


def _is_path(name: str) -> bool:
    """Tells whether a name cannot be one on the Hub."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def _parse(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            str(path), f"not readable as JSON ({error})", "Use the config.json of a model"
        ) from None
    if not isinstance(config, dict):
        raise UserError(str(path), "not a mapping", "Use the config.json of a model")
    return config
