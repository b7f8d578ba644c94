"""What the benchmarks run on: models by shape with random weights, and groups of completions by shape.

No weights are downloaded: only shapes decide about time and memory.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORKS = Path(__file__).with_name("forks.json")
# Shapes of Qwen2 models; "0.5b" and "1.5b" are those of Qwen/Qwen2-0.5B and Qwen/Qwen2-1.5B.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {  # that of the embedded model
        "vocab_size": 20,
        "hidden_size": 160,
        "intermediate_size": 448,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "0.1b": {
        "vocab_size": 32000,
        "hidden_size": 640,
        "intermediate_size": 2560,
        "num_hidden_layers": 12,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
    },
    "0.5b": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}
# Shapes of other types: that of Qwen/Qwen3.5-0.8B, whose layers are three recurrences to one attention, and
# that of EleutherAI/pythia-160m, which only the plain engine serves.
OTHER_SHAPES: dict[str, dict[str, Any]] = {
    "qwen3.5-0.8b": {
        "model_type": "qwen3_5_text",
        "vocab_size": 248320,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
    },
    "pythia-160m": {
        "model_type": "gpt_neox",
        "vocab_size": 50304,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "tie_word_embeddings": False,
    },
}
LORA = {"r": 16, "target_modules": ["q_proj", "v_proj"]}
# What PEFT has to be told where Twig's default adapts other modules, or the model has no such names.
TARGETS = {
    "qwen3.5-0.8b": ["q_proj", "v_proj", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b"],
    "pythia-160m": ["query_key_value"],
}
ALPHA = 32.0


def size_of(shape: str) -> dict[str, Any]:
    return (SHAPES | OTHER_SHAPES)[shape]


def config_of(shape: str, **changes: Any) -> Any:
    """The config of a model of the shape."""
    from transformers import AutoConfig

    # Token 1 ends a completion, 0 pads: neither is in the random completions.
    options = {"tie_word_embeddings": True, "eos_token_id": 1, "pad_token_id": 0}
    return AutoConfig.for_model(**{"model_type": "qwen2"} | options | size_of(shape) | changes)


def build(shape: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of the shape."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(shape, **changes), dtype=dtype).eval()


def last_third(shape: str) -> list[int]:
    layers = size_of(shape)["num_hidden_layers"]
    return list(range(layers - -(-layers // 3), layers))


def randomise(parameters: dict[str, torch.Tensor]) -> None:
    """Fills the adapter with values that follow from its shape only: with B = 0 half of the gradient is 0."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in sorted(parameters):
            parameters[name].copy_(0.02 * torch.randn(parameters[name].shape, generator=draw))


def early_forks(generations: int) -> list[tuple[int, int]]:
    """Completions that part within their first four tokens: (which one each leaves, at which token)."""
    return [(i - 1, (i - 1) % 4) for i in range(1, generations)]


def recorded_forks(length: int) -> list[list[tuple[int, int]]]:
    """The same for each group of a small file: tries sampled from a model, stretched to `length`.

    A fork at `length` is a duplicate.
    """
    groups = json.loads(FORKS.read_text(encoding="utf-8"))["groups"]
    return [[(which, round(place * length)) for which, place in group] for group in groups]


def entropic_forks(generations: int, length: int, entropy: float, seed: int = 0) -> list[tuple[int, int]]:
    """The same for completions whose tokens are drawn independently with `entropy` nats each.

    At each prefix one token has most of the probability and ten others share the rest.
    """
    rare = _rare(entropy)
    draw = np.random.default_rng(seed)
    rows = np.where(draw.random((generations, length)) < rare, draw.integers(1, 11, (generations, length)), 0)
    found = []
    for i in range(1, generations):
        differs = rows[:i] != rows[i]
        common = np.where(differs.any(1), differs.argmax(1), length)
        found.append((int(common.argmax()), int(common.max())))
    return found


def _rare(entropy: float) -> float:
    """The probability that ten rare tokens share: -(1 - x) log(1 - x) - x log(x / 10) is the entropy."""
    low, high = 1e-9, 10 / 11
    for _ in range(60):
        x = (low + high) / 2
        here = -(1 - x) * np.log(1 - x) - x * np.log(x / 10)
        low, high = (x, high) if here < entropy else (low, x)
    return low


def completions(
    length: int, forks: list[tuple[int, int]], vocabulary: int, seed: int = 0
) -> list[np.ndarray]:
    """Random completions of `length` tokens; each but the first equals an earlier one up to its fork."""
    draw = np.random.default_rng(seed)
    rows = [draw.integers(2, vocabulary, length)]
    for which, at in forks:
        row = np.concatenate([rows[which][:at], draw.integers(2, vocabulary, length - at)])
        if at < length and row[at] == rows[which][at]:  # another token at the fork, whatever was drawn
            row[at] = 2 + (row[at] - 1) % (vocabulary - 2)
        rows.append(row)
    return rows
