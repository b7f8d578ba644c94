"""Tiny random models of every family, and groups to train them on."""

import numerics
import numpy as np
import torch
import transformers
from numerics import Float64  # noqa: F401
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from twig.core.types import Completion, Example, Group
from twig.engine.base_policy import BasePolicy
from twig.engine.build import ENGINES
from twig.engine.lora import attach

VOCAB, END = 23, 1
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": END,
}
_WINDOW = 5  # shorter than the sequences of the tests
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": _WINDOW, "layer_types": _MIXED}
_GRANITE = {
    "embedding_multiplier": 6.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.4,
}
FAMILIES: dict[str, tuple[str, dict]] = {
    "qwen2": ("Qwen2Config", {}),
    "qwen2-tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": _WINDOW}),
    "gemma2": ("Gemma2Config", _GEMMA | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3TextConfig", _GEMMA),
    "granite": ("GraniteConfig", _GRANITE),
}
# Served as well, and compared with the model's own forward in fewer ways.
MORE_FAMILIES: dict[str, tuple[str, dict]] = {
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1, 0]}),
    "smollm3-window": (
        "SmolLM3Config",
        {"no_rope_layers": [0, 1, 0, 1], "use_sliding_window": True, "sliding_window": _WINDOW},
    ),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", {"partial_rotary_factor": 0.5}),
    "phi3-window": ("Phi3Config", {"sliding_window": _WINDOW}),
    "olmo": ("OlmoConfig", {"clip_qkv": 1.5}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", {"sliding_window": _WINDOW, "layer_types": _MIXED}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "cohere2": (
        "Cohere2Config",
        {"logit_scale": 0.25, "sliding_window": _WINDOW, "layer_types": _MIXED},
    ),
    "starcoder2": ("Starcoder2Config", {"sliding_window": _WINDOW}),
    "stablelm": ("StableLmConfig", {"partial_rotary_factor": 0.5}),
    "glm4": ("Glm4Config", {"head_dim": 8}),
}
# Layers that keep a state beside layers that attend, or in the same layer.
_STATES = ["linear_attention", "full_attention"] * 2
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "layer_types": _STATES}
_DELTA |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
_MAMBA |= {"mamba_chunk_size": 8}
HYBRIDS: dict[str, tuple[str, dict]] = {
    "lfm2": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    ),
    "qwen3_5": ("Qwen3_5TextConfig", {"head_dim": 8} | _DELTA),
    "qwen3_next": ("Qwen3NextConfig", {"head_dim": 8, "mlp_only_layers": [0, 1, 2, 3]} | _DELTA),
    "olmo_hybrid": ("OlmoHybridConfig", _DELTA),
    "bamba": ("BambaConfig", {"attn_layer_indices": [1, 3]} | _MAMBA),
    "falcon_h1": ("FalconH1Config", {"head_dim": 8, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5} | _MAMBA),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {"layer_types": _STATES, "num_local_experts": 0, "shared_intermediate_size": 48} | _MAMBA | _GRANITE,
    ),
}
# Layers without their own keys and values, and with an input of their own.
SHARING: dict[str, tuple[str, dict]] = {
    "gemma4": (
        "Gemma4TextConfig",
        {
            "head_dim": 8,
            "global_head_dim": 8,
            "layer_types": _MIXED,
            "sliding_window": _WINDOW,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
        },
    ),
    # and with several hidden states a token, of which each layer reads one
    "gemma3n": (
        "Gemma3nTextConfig",
        {
            "head_dim": 8,
            "intermediate_size": [48] * 4,
            "layer_types": _MIXED,
            "sliding_window": _WINDOW,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "laurel_rank": 4,
            "altup_num_inputs": 3,
            "activation_sparsity_pattern": [0.95, 0.5, 0.0, 0.0],
        },
    ),
}


def build_model(
    family: str = "qwen2", attention: str = "sdpa", dtype=None, seed: int = 0, **shape
) -> PreTrainedModel:
    """A random model of the family, with weights large enough that attention is not uniform; where and in
    what dtype the test runs."""
    dtype = dtype or numerics.now().dtype
    name, extra = (FAMILIES | MORE_FAMILIES | HYBRIDS | SHARING)[family]
    config = getattr(transformers, name)(**SHAPE | extra | shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    return model.to(numerics.place())


def build_policy(
    family: str = "qwen2", attention: str = "sdpa", dtype=None, layers="last_third", engine="trie", **kwargs
) -> BasePolicy:
    """A policy on a tiny model, its LoRA B matrices random: a fresh adapter hides every fault of the
    adapter."""
    kwargs = {"target_modules": ["q_proj", "v_proj"]} | kwargs
    options = {
        k: kwargs.pop(k)
        for k in (
            *("temperature", "suppress_tokens", "head_chunk", "checkpoint_layers", "decode"),
            *("kernels", "packed_weights"),
        )
        if k in kwargs
    }
    options = {"decode": "plain"} | options
    model = attach(build_model(family, attention, dtype), r=4, alpha=8.0, layers=layers, **kwargs)
    return ENGINES[engine](with_random_b(model), **options)


def with_random_b(model: PeftModel) -> PeftModel:
    """The model with random LoRA B matrices: the same ones on every device."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.empty(parameter.shape, dtype=parameter.dtype).normal_(std=0.2))
    return model


def has_sdpa(family: str) -> bool:
    return family != "gemma2"  # attention soft caps need eager attention


def random_group(
    rng: np.random.Generator, prompt_length: int = 4, size: int = 6, longest: int = 12, index: int = 0
) -> Group:
    """Completions from a small alphabet, so that they fork often; one is a duplicate, one a prefix of
    another."""
    completions = [rng.integers(3, 6, rng.integers(1, longest + 1)) for _ in range(size)]
    completions[1] = completions[0].copy()
    completions[2] = completions[0][: max(1, len(completions[0]) // 2)].copy()
    rewards = rng.choice([0.0, 0.0, 1.0, 0.3], size)
    rewards[:2] = 1.0, 0.0
    return make_group(rng.integers(3, VOCAB, prompt_length), completions, rewards, index)


def make_group(prompt, completions, rewards, index: int = 0) -> Group:
    made = [
        Completion(np.asarray(c, np.int64), np.zeros(len(c)), np.zeros(len(c)), True, "") for c in completions
    ]
    return Group(Example("", {}), index, np.asarray(prompt, np.int64), made, np.asarray(rewards, np.float64))
