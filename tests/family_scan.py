"""Scans the decoder types of transformers: each is exact, refused or not built.

A type is built from its config class with small sizes. `scan` compares what both engines compute with PEFT's
own forward on the same texts, longer than every window: log-probs, the gradient of every adapter, and the
log-probs recorded while sampling. `scripts/scan_families.py` writes the result of all types.
"""

import copy
import dataclasses
import json
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numerics
import oracles
import tiny
import torch
from gradients import credit_of, engine_gradient, groups_of, requests_of, texts_of
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from twig.common.errors import UserError
from twig.core.algorithms.base import Objective
from twig.engine.build import ENGINES
from twig.engine.lora import attach
from twig.engine.sampler import SamplingParams, sample

VERSION = "5.23"  # of transformers, with which the result was written
RESULT = Path(__file__).parent / "fixtures" / "families.json"
EXACT = "exact"
_WINDOW, _EXPERTS, _LARGEST = 5, 4, 7_000_000
# Small values for what configs call their sizes; a class gets those that it declares.
SIZES: dict[str, Any] = {
    **tiny.SHAPE,
    **dict.fromkeys(("n_embd", "d_model", "n_positions", "n_ctx", "max_seq_len"), None),
    **{"n_embd": 32, "d_model": 32, "embedding_size": 32, "word_embed_proj_dim": 32, "dim": 32},
    **{"n_layer": 4, "n_layers": 4, "num_layers": 4, "decoder_layers": 4, "encoder_layers": 4},
    **{"n_head": 4, "n_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4},
    **{"n_positions": 128, "n_ctx": 128, "max_seq_len": 128, "max_sequence_length": 128},
    **{"ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "n_inner": 48, "ffn_hidden_size": 48},
    **{"head_dim": 8, "attention_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
    **{"kv_lora_rank": 8, "q_lora_rank": 8, "query_pre_attn_scalar": 8, "rotary_dim": 4},
    **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "expert_ffn_hidden_size": 16},
    **{"num_experts": _EXPERTS, "num_local_experts": _EXPERTS, "n_routed_experts": _EXPERTS},
    **{"moe_num_experts": _EXPERTS, "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "moe_top_k": 2},
    **{"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8},
    **{"linear_value_head_dim": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    **{"mamba_d_state": 8, "mamba_expand": 2, "mamba_num_heads": 4, "mamba_head_dim": 16, "state_size": 8},
    **{"ssm_state_size": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 8, "chunk_size": 8, "n_groups": 1},
    **{"use_sliding_window": True, "max_window_layers": 2, "index_head_dim": 8, "index_n_heads": 2},
    **{"is_decoder": True, "lru_width": 32, "conv_kernel": 4, "first_k_dense_replace": 1},
}
# Shorter than the texts, and not all alike, as one may hide another. A second scan leaves them out: then they
# are as long as the class has them, and only the check of lengths sees them.
WINDOWS = {
    **{"sliding_window": _WINDOW, "attention_window_size": _WINDOW, "window_size": _WINDOW},
    **{"attention_chunk_size": _WINDOW, "keep_window_size": 3, "index_topk": 3},
}
# What a class needs besides.
_ALL_HEADS = ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text")
_ALL_HEADS += ("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu")
EXTRA: dict[str, dict[str, Any]] = {
    **dict.fromkeys(_ALL_HEADS, {"num_key_value_heads": 4}),
    **{f"{family}_text": extra for family, (_, extra) in tiny.SHARING.items()},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True)
class Row:
    """A type of models: what each engine makes of it ("exact", why it is refused, or a fault)."""

    type: str
    trie: str = ""
    plain: str = ""
    not_built: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether an engine ended with a traceback, or computes something else than the model."""
        return any(text.startswith("FAULT") or "off by" in text for text in (self.trie, self.plain))


def types() -> list[str]:
    """The model types that transformers has a causal language model for."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def written() -> dict[str, Row]:
    """What the script wrote."""
    return {row["type"]: Row(**row) for row in json.loads(RESULT.read_text(encoding="utf-8"))}


def write(rows: list[Row]) -> None:
    RESULT.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def scan(kind: str) -> Row:
    """Builds small models of the type and compares both engines with PEFT's own forward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dtype in (torch.float64, torch.float32):  # some kernels of transformers have no float64
            try:
                with precision(dtype):
                    model = build(small_config(kind), dtype)
                    modules, layers = modules_of(model)
                    model(input_ids=torch.arange(3, 12)[None], use_cache=False)
            except Exception as error:
                row = Row(kind, not_built=f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
                continue
            results = dict.fromkeys(ENGINES, EXACT)
            for engine in ENGINES:
                for windows in (WINDOWS, {}):
                    if results[engine] == EXACT:
                        with precision(dtype):
                            model = build(small_config(kind, windows), dtype)
                            results[engine] = compared(engine, model, modules, layers)
            return Row(kind, **results)
        return row


def precision(dtype: torch.dtype) -> AbstractContextManager:
    """Inside, float64 models compute all in float64."""
    return numerics.casts() if dtype is torch.float64 else nullcontext()


def compared(engine: str, model: Any, modules: list[str], layers: list[int]) -> str:
    """Returns "exact", why the engine refuses the model, or what is wrong."""
    try:
        return compare(engine, model, modules, layers)
    except UserError as error:
        return error.problem.partition("cannot be served: ")[2] or error.problem
    except Exception as error:
        return f"FAULT {type(error).__name__}: {' '.join(str(error).split())[:160]}"


def small_config(kind: str, windows: dict[str, int] = WINDOWS) -> Any:
    """A config of the type with small sizes; raises if it is none of a decoder by itself."""
    config_class = CONFIG_MAPPING[kind]
    own = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map or {})
    sizes = SIZES | windows
    config = config_class(**{k: v for k, v in sizes.items() if k in own} | EXTRA.get(kind, {}))
    if config.get_text_config(decoder=True) is not config:
        raise ValueError("a model of several parts")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("an encoder and a decoder")
    return config


def build(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    """A random model whose attention is not uniform; raises if it is not small."""
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
    if count > _LARGEST:
        raise ValueError(f"{count:,} weights with these sizes")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2 or not parameter.any():
                torch.nn.init.normal_(parameter, std=0.25)
    return model


def modules_of(model: Any) -> tuple[list[str], list[int]]:
    """Two kinds of linear modules of the layers, and the layers from the second on that have them."""
    stack = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    names: dict[str, list[int]] = {}
    for number, layer in enumerate(stack):
        for name, module in layer.named_modules():
            if isinstance(module, (torch.nn.Linear, Conv1D)):
                names.setdefault(name.rpartition(".")[2], []).append(number)
    usual = [name for name in ("q_proj", "v_proj") if name in names]
    usual = usual or [name for name in names if name != "out_proj"][:2]  # PEFT refuses that one of Mamba
    layers = sorted(set.intersection(*(set(names[name]) for name in usual)))
    return usual, layers[1:] or layers


def compare(engine: str, model: Any, modules: list[str], layers: list[int]) -> str:
    """Returns "exact", or how far the engine is from PEFT's own forward."""
    peft_model = attach(model, r=4, alpha=8.0, target_modules=modules, layers=layers)
    assert isinstance(peft_model, PeftModel)
    options: dict[str, Any] = {"temperature": 0.8, "suppress_tokens": [0, 20]}
    policy = ENGINES[engine](tiny.with_random_b(peft_model), decode="plain", **options)
    groups = groups_of(count=1)
    tries, credits = credit_of(groups)
    loss, _ = oracles.path_loss(policy, groups, tries, credits)
    theirs = torch.autograd.grad(loss, list(policy.parameters.values()))
    _, ours = engine_gradient(policy, groups, tries, credits, Objective(), 60)
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    gaps = {
        "gradient": max(
            float((a - b).abs().max()) / largest for a, b in zip(ours.values(), theirs, strict=True)
        )
    }
    requests = requests_of(num=1)
    drawn = sample(policy, requests, SamplingParams([5], texts_of, seed=3), step=2)
    gaps["sampled"] = max(
        float((torch.from_numpy(completion.logps) - own).abs().max())
        for request, completions in zip(requests, drawn.completions, strict=True)
        for completion in completions
        for own in [oracles.completion_logps(policy, request.prompt_ids, completion.ids).detach()]
    )
    bound = 1e-6 if policy.dtype is torch.float64 else 2e-3
    wrong = [f"{name} off by {gap:.1e}" for name, gap in gaps.items() if not gap < bound]
    return ", ".join(wrong) or EXACT
