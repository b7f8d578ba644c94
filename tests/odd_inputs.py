"""Odd settings and odd config.json files, one of each per seed, and what must hold of every one.

They are taken, or refused in one line (UserError). Where they are taken, the numbers are right: settings are
read back as they were written, a plan adds up, and the weights that a plan counts are those of the model that
transformers builds from the same config. `scripts/scan_odd_inputs.py` checks many seeds, the tests a few.
"""

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from transformers import AutoModelForCausalLM

from twig.common.errors import UserError
from twig.config.load import Settings, load, parse_yaml, recipe_names, settings_with
from twig.config.messages import fields_of, write
from twig.config.schema import Model
from twig.config.sizes import SIZE_KEYS
from twig.core.algorithms.registry import shipped
from twig.engine.load import load_config, quantization_of
from twig.planner.model_shape import Shape
from twig.planner.plan import Plan, plan

GIB = 2**30
FIELDS = {key: info for kind in shipped().values() for key, info in fields_of(settings_with(kind))}
NUMBERS = (0, 1, 2, 3, 7, 64, 1000, 10**6, 2**31, 2**63, -1, 0.5, 1.5, 1e-300, 1e300, 1e-5, float("inf"))
TEXTS = (
    "",
    " ",
    "x",
    "auto",
    "all",
    "null",
    "1e5",
    "4GiB",
    "2h30m",
    "[1, 2]",
    "-",
    "\u202e",
    "\x00",
    "x" * 5000,
)
MOST = 1000  # in settings: the time of a plan grows with them
ODD: tuple[Any, ...] = (*NUMBERS, *TEXTS, None, True, False, [], {}, [0], [-1], ["x"], {"x": 1}, [[1]])

# Small models of the families that were measured, and of some that were not.
_SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}
FAMILIES = (
    "llama",
    "mistral",
    "granite",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "unknown",
)
_KEYS = (
    *_SHAPE,
    *(
        "head_dim",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "sliding_window",
        "use_sliding_window",
    ),
    *("max_window_layers", "layer_types", "sliding_window_pattern", "attn_logit_softcapping", "logit_scale"),
    *("final_logit_softcapping", "logits_scaling", "embedding_multiplier", "dtype", "torch_dtype"),
    *("num_experts", "n_routed_experts", "rope_scaling", "rope_parameters", "rope_theta", "hidden_act"),
    *("quantization_config", "text_config", "model_type", "architectures", "auto_map", "eos_token_id"),
    *("generation_config", "rms_norm_eps", "keep_window_size", "is_encoder_decoder"),
)
_LIKELY: dict[str, tuple[Any, ...]] = {
    "layer_types": (["full_attention"] * 3, ["sliding_attention"] * 3, ["full_attention"], ["chunked"] * 3),
    "rope_scaling": ({"rope_type": "linear", "factor": 2.0}, {"type": "dynamic"}, {"rope_type": "x"}),
    "quantization_config": ({"quant_method": "gptq", "bits": 4}, {"load_in_8bit": True}, {"quant_method": 1}),
    "text_config": ({"hidden_size": 8}, {"model_type": "llama"}),
    "dtype": ("bfloat16", "float8", "int8"),
    "num_hidden_layers": (1, 2, 5),
    "num_attention_heads": (1, 4, 3),
    "num_key_value_heads": (2, 3, 4),
    "hidden_size": (8, 17, 32),
    "head_dim": (4, 8, 5),
    "model_type": FAMILIES,
}


def taken(action: Callable[[], Any]) -> Any:
    """What the action returns; None if it refuses in one printable line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return action()
    except UserError as error:
        line = str(error)
        assert line and line.isprintable() and len(line) <= 2000, line
        return None


# ---- settings


def odd_overrides(seed: int) -> list[str]:
    """One to three overrides; most of them with a value that is likely."""
    draw = random.Random(seed)
    return [f"{key}={_near(draw, key)}" for key in draw.sample(sorted(FIELDS), draw.randint(1, 3))]


def _near(draw: random.Random, key: str) -> str:
    info = FIELDS[key]
    kinds = [kind for kind in (info.annotation, *get_args(info.annotation)) if get_origin(kind) is Literal]
    likely = [choice for kind in kinds for choice in get_args(kind)] + list(info.examples or [])
    likely += [] if info.is_required() or info.default is None else [info.default]
    if not any(isinstance(value, str | bool) for value in likely):
        likely += [True, False] if info.annotation is bool else [*NUMBERS[1:9], 0.25, 0.5]
    values = likely if draw.random() < 0.85 else ODD
    value = draw.choice([each for each in values if not isinstance(each, int) or each <= MOST])
    return value if isinstance(value, str) else write(value)


def check_settings(seed: int) -> str:
    """Checks the settings of that seed; returns what became of them."""
    draw, overrides = random.Random(-seed), odd_overrides(seed)
    settings = taken(lambda: load(draw.choice(recipe_names()), overrides))
    if settings is None:
        return "settings refused"
    again = Settings.from_dict(parse_yaml(settings.to_yaml(), "again"))
    assert again == settings and again.flat() == settings.flat()
    budget, kind = draw.choice([2**20, GIB, 80 * GIB]), draw.choice(["cpu", "cuda", "mps"])
    config = {"model_type": "qwen2", **_SHAPE, "num_hidden_layers": 12}
    planned = taken(lambda: plan(config, settings, budget, kind))
    if planned is None:
        return "settings taken, not planned"
    check_plan(planned)
    chosen, values = planned.sizes.by_key(), settings.flat()
    assert all(values[key] in (None, chosen[key]) for key in SIZE_KEYS), "what is set is not chosen"
    return "settings taken and planned"


def check_plan(planned: Plan) -> None:
    """Checks that a plan adds up."""
    for phase in planned.phases:
        assert phase.peak == sum(item.size for item in phase.items)
        assert all(item.size > 0 for item in phase.items)
    assert planned.fits == all(phase.peak <= planned.usable for phase in planned.phases)
    assert min(planned.sizes.wave_size, planned.sizes.pack_size, planned.sizes.head_chunk) > 0


# ---- models


def odd_config(seed: int) -> dict[str, Any]:
    """The config.json of a small model with up to three keys changed, added or left out."""
    draw = random.Random(seed)
    config: dict[str, Any] = {"model_type": draw.choice(FAMILIES), **_SHAPE}
    for key in draw.sample(_KEYS, draw.randint(0, 3)):
        how = draw.random()
        if how < 0.2:
            config.pop(key, None)
        else:
            config[key] = draw.choice(_LIKELY[key] if key in _LIKELY and how < 0.7 else ODD)
    return config


def check_config(seed: int, folder: Path) -> str:
    """Checks the config.json of that seed, which is written to `folder`; returns what became of it."""
    config = odd_config(seed)
    (folder / "config.json").write_text(json.dumps(config))
    settings = Settings.from_dict({"model": {"name": str(folder)}, "task": {"name": "multiplication"}})
    planned = taken(lambda: plan(folder / "config.json", settings, GIB, "cpu"))
    if planned is not None:
        check_plan(planned)
    loaded = taken(lambda: load_config(Model(name=str(folder))))
    if loaded is None:
        return "config refused"
    taken(lambda: quantization_of(loaded))
    if planned is None:
        return "config loaded, not planned"
    shape, actual = Shape.from_config(config), count_weights(loaded)
    if actual is None or not shape.is_measured:
        return "config planned"
    assert sum(shape.parameters().values()) == actual, (seed, config, shape, actual)
    return "config planned and counted"


def count_weights(config: Any) -> int | None:
    """The weights of the model that transformers builds from a config; None if it cannot."""
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # whatever is odd about it: there is nothing to compare with
        return None
    return sum(parameter.numel() for parameter in model.parameters())
