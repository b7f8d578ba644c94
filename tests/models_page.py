"""Writes docs/models.md from the lists that the tests of families run over.

python tests/models_page.py > docs/models.md
"""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import family_cases
import tiny
import transformers

# What people call the models of a type.
NAMES = {
    "qwen2": "Qwen2, Qwen2.5, QwQ, DeepSeek-R1-Distill-Qwen",
    "qwen3": "Qwen3 (dense)",
    "llama": "Llama 2 and 3, SmolLM, SmolLM2, TinyLlama, DeepSeek-R1-Distill-Llama",
    "mistral": "Mistral",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "granite": "Granite 3",
    "smollm3": "SmolLM3",
    "phi": "Phi-1, Phi-1.5, Phi-2",
    "phi3": "Phi-3, Phi-4 (but for those with longrope)",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "cohere2": "Command R7B",
    "starcoder2": "StarCoder2",
    "stablelm": "StableLM",
    "glm4": "GLM-4-0414",
}
START = """\
# Models

Made from the lists that the tests run over: `python tests/models_page.py > docs/models.md`; a test checks
that it is current. Any causal language model from the Hub, or a folder, that transformers reads with its own
code and that is stored as safetensors can be trained. What differs is how fast: the trie engine calls the
layers itself, and serves the types below; for any other there is `model.engine=plain`, the model's ordinary
batched forward.

No list decides. What a model needs is read from its config: windows by layer, rotary embeddings by layer
type, scales of embeddings and logits, soft caps. Before anything relies on it, a small tree is run through
the layers and compared with the model's own forward on the very weights that were loaded. A model that
differs is refused in one line that names its type and says `model.engine=plain`; nothing was trained then.

## Served by the trie engine

Each row is a random model of four layers, two key-value heads and width 32, with the settings named, in
float64. In each, log-probs and the gradients of all adapters equal those of the model's own forward over each
completion within 1e-9 of the largest, for adapters whose lowest layer is the first, second, third or
last, with every attention named; and sampling with the cache draws what a loop over whole texts draws.

| model type | models | settings of the config tested | attention | adapters tested on |
|---|---|---|---|---|
"""
REFUSED = """
Llama 4, mixtures of experts and models with images or sound are not among the tests.

## Refused by the trie engine, trained by the plain one

Each is tested the same way: refused with this reason, and under `model.engine=plain` the gradient equals a
forward over each prefix, and sampling with the model's own cache draws what a loop over whole texts draws.

| model type | why |
|---|---|
"""
END = """
## Quantised bases

`model.quantization: nf4` or `int8` holds the matrices of the layers in 4 or 8 bits, through bitsandbytes
(`pip install 'twig-rl[quantization]'`). Embeddings, norms and head keep `model.dtype`, and adapter, log-probs
and loss are float32. Nothing is merged into a base, so its bytes stay as they are. `nf4` is 4-bit NormalFloat
in blocks of 64 with quantised scales; `int8` is LLM.int8() with its outliers above 6. On a CPU bitsandbytes
has kernels for both, and the tests train on them: sampling, update, evaluation, saving and going on, and the
gradient against the quantised model's own forward. In int8 the input of a layer is rounded to 127 steps, so a
difference in a float's last bit, as between sampling and update, may become a step: there log-probs and
gradients agree to some per cent (`sampling/logp_gap`). Nothing of this was run on CUDA.
"""


def page() -> str:
    return START + "".join(map(_served, tiny.FAMILIES | tiny.MORE_FAMILIES)) + REFUSED + _refused() + END


def _served(family: str) -> str:
    name, extra = (tiny.FAMILIES | tiny.MORE_FAMILIES)[family]
    kind = getattr(transformers, name).model_type
    settings = ", ".join(f"`{key}`" for key in sorted(extra)) or "its defaults"
    attention = "sdpa, eager" if tiny.has_sdpa(family) else "eager"
    modules = ", ".join(f"`{m}`" for m in family_cases.MODULES.get(family, ["q_proj", "v_proj"]))
    return f"| `{kind}` | {NAMES[kind]} | {settings} | {attention} | {modules} |\n"


def _refused() -> str:
    kinds = family_cases.FAMILIES.items()
    return "".join(f"| {name.replace('_text', '')} | {family.why} |\n" for name, family in kinds)


if __name__ == "__main__":
    sys.stdout.write(page())
