"""Odd models with odd adapters: exact in both engines, or refused in one line.

The oracle is the model's own forward under PEFT over whole texts: log-probs of what was sampled, and the
gradient of every adapter. Small models in float64, so that nothing is off by rounding.
"""

import warnings
from typing import Any

import gradients
import numerics
import oracles
import tiny
import torch
import transformers
from hypothesis import strategies as st
from numerics import assert_same, assert_values
from peft import LoraConfig, get_peft_model

from twig.common.errors import UserError
from twig.core.algorithms.base import Objective
from twig.engine.plain_policy import PlainPolicy
from twig.engine.policy import Policy
from twig.engine.sampler import Request, SamplingParams, sample

CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "sliding_window": st.sampled_from([1, 3, 7, 100]),
        "use_sliding_window": st.booleans(),
        "max_window_layers": st.integers(0, 4),
        "layer_types": st.lists(
            st.sampled_from(["full_attention", "sliding_attention"]), min_size=4, max_size=4
        ),
        "logit_scale": st.sampled_from([0.25, 2.0]),
        "logits_scaling": st.sampled_from([0.5, 4.0]),
        "embedding_multiplier": st.sampled_from([0.5, 3.0]),
        "final_logit_softcapping": st.sampled_from([None, 2.0]),
        "keep_window_size": st.sampled_from([2, 50]),
        "tie_word_embeddings": st.booleans(),
        "rope_parameters": st.sampled_from(
            [
                {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
                {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0},
                {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0},
            ]
        ),
    },
)
_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_FORMS = {
    "lora_alpha": st.sampled_from([1, 8]),
    "use_rslora": st.booleans(),
    "use_dora": st.booleans(),
    "rank_pattern": st.just({"q_proj": 2, "down_proj": 1}),
}
_LAYERS = st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True)
ADAPTERS = st.one_of(
    st.fixed_dictionaries({"r": st.integers(1, 3), "target_modules": st.just("all-linear")}, optional=_FORMS),
    st.fixed_dictionaries(
        {
            "r": st.integers(1, 3),
            "target_modules": st.lists(st.sampled_from(_NAMES), min_size=1, max_size=4, unique=True),
        },
        optional=_FORMS | {"layers_to_transform": _LAYERS},
    ),
)
MODELS = {
    "family": st.sampled_from(["llama", "qwen2", "mistral", "gemma2", "granite", "qwen3"]),
    "values": CONFIGS,
    "adapter": ADAPTERS,
    "seed": st.integers(0, 99),
}
_NONE = 1e-9  # a gradient of rounding alone
_PROMPT = torch.arange(3, 15).numpy()


def check(family: str, values: dict[str, Any], adapter: dict[str, Any], seed: int) -> str:
    """Returns how it ended: `no config`, `refused`, `exact`; raises AssertionError if it is none of these."""
    name, extra = tiny.FAMILIES[family]
    try:
        getattr(transformers, name)(**tiny.SHAPE | extra | values)
    except Exception:
        return "no config"  # of that class
    ended = set()
    with numerics.casts():
        for engine in (Policy, PlainPolicy):
            model = tiny.build_model(family, "eager", **values)
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of patterns that match nothing
                torch.manual_seed(seed)
                peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **adapter))
            try:
                policy = engine(tiny.with_random_b(peft_model), temperature=0.8)
            except UserError as error:
                assert error.key.startswith("model.") and "\n" not in str(error)
                ended.add("refused")
                continue
            _assert_exact(policy, seed)
            ended.add("exact")
    return " and ".join(sorted(ended))


def _assert_exact(policy: Any, seed: int) -> None:
    params = SamplingParams([1], gradients.texts_of, seed=seed)
    (completions,) = sample(policy, [Request(_PROMPT, 2, 8, 0)], params).completions
    for completion in completions:
        assert_values(completion.logps, oracles.completion_logps(policy, _PROMPT, completion.ids).tolist())
    groups = gradients.groups_of(seed, count=1)
    tries, credits = gradients.credit_of(groups)
    ours = gradients.engine_gradient(policy, groups, tries, credits, Objective(), size=9)
    expected = gradients.oracle_gradient(policy, groups, tries, credits, Objective())
    if all(float(each.abs().max()) < _NONE for each in expected[1].values()):
        # in a window of one token queries and keys change nothing
        assert all(float(each.abs().max()) < _NONE for each in ours[1].values())
    else:
        assert_same(ours, expected)
