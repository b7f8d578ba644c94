"""The families of models that tests run over."""

from dataclasses import dataclass, field

import numerics
import tiny
import torch
import transformers
from transformers import AutoModelForCausalLM

GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}


@dataclass(frozen=True)
class Family:
    """A config's class, what it needs besides tiny's shape, what gets the adapter, and why it is refused."""

    config: str
    why: str
    modules: tuple[str, ...]
    extra: dict = field(default_factory=dict)

    def build(self, dtype=None, **changes):
        dtype = dtype or numerics.now().dtype
        config = getattr(transformers, self.config)(**tiny.SHAPE | self.extra | changes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    torch.nn.init.normal_(parameter, std=0.25)
        return model.to(numerics.place())


FAMILIES = {
    "gpt_neox": Family("GPTNeoXConfig", "it has no norm", ("query_key_value",)),
    "opt": Family(
        "OPTConfig", "it has no norm", ("q_proj", "v_proj"), {"ffn_dim": 48, "word_embed_proj_dim": 32}
    ),
    "gptj": Family("GPTJConfig", "it has no layers", ("q_proj", "v_proj"), GPT | {"rotary_dim": 4}),
    "gpt2": Family("GPT2Config", "it has no layers", ("c_attn",), GPT),
    "bloom": Family("BloomConfig", "it has no layers", ("query_key_value",), {"n_layer": 4, "n_head": 4}),
    "mamba": Family("MambaConfig", "it has no norm", ("in_proj",), {"state_size": 4}),
    "recurrent_gemma": Family(
        "RecurrentGemmaConfig",
        "it has no norm",
        ("q_proj", "v_proj"),
        {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    ),
    "llama with dynamic rope": Family(
        "LlamaConfig",
        "its rotary embedding ('dynamic') depends on the length of the text",
        ("q_proj", "v_proj"),
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "phi3 with longrope": Family(
        "Phi3Config",
        "its rotary embedding ('longrope') depends on the length of the text",
        ("qkv_proj",),
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
            },
        },
    ),
}

MODULES = {"phi3": ["qkv_proj", "down_proj"], "phi3-window": ["qkv_proj", "o_proj"]}
MODULES |= {"gemma4": ["q_proj"], "gemma3n": ["q_proj", "linear_left", "prediction_coefs"]}
