"""Writes docs/models.md from the lists that the tests of families run over.

python tests/models_page.py > docs/models.md
"""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import family_cases
import family_scan
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
    "gemma3n_text": "Gemma 3n (E2B and E4B, text)",
    "gemma4_text": "Gemma 4 (E2B and E4B, text)",
    "lfm2": "LFM2, LFM2.5",
    "qwen3_5_text": "Qwen3.5 (dense)",
    "qwen3_next": "Qwen3-Next",
    "olmo_hybrid": "OLMo Hybrid",
    "bamba": "Bamba",
    "falcon_h1": "Falcon H1",
    "granitemoehybrid": "Granite 4 (hybrid)",
}
# How each kind of layer runs a tree, what gets an adapter by default, and types that have it.
_PARTS = "in parts; its state is "
_MATRIX = f"{_PARTS}a matrix a head, and the last inputs of a convolution"
LAYERS = [
    ("attention", "by its mask", "`q_proj`, `v_proj`", "all"),
    ("short convolution", f"{_PARTS}the last inputs", "`in_proj`", "`lfm2`"),
    (
        "gated delta rule",
        _MATRIX,
        "`q_proj`, `v_proj`, or `in_proj_*`",
        "`qwen3_5_text`, `qwen3_next`, `olmo_hybrid`",
    ),
    ("state space (Mamba 2)", _MATRIX, "`in_proj`", "`bamba`, `falcon_h1`, `granitemoehybrid`"),
    (
        "attention with keys and values of another layer",
        "by its mask, with the pair of that layer",
        "`q_proj`",
        "`gemma3n_text`, `gemma4_text`",
    ),
]
MIXERS = """\

## Which layer serves which type

A layer is taken for what it is: what it takes, what it keeps in its cache, and what its config declares.
Layers that keep a state read a tree in parts without forks, each from the state in which its parent ended.

{rows}
If a layer above the frozen ones takes keys and values from one of these, sampling records that pair beside
what leaves the frozen layers, so an update need not run them again. `gemma3n_text` carries several hidden
states of each token from layer to layer (`altup_num_inputs`), and its boundary is as many times as wide.

For types with a state, the check before training also runs a tree of 141 tokens, longer than the pieces in
which such layers read a text, and compares the gradient of the adapter with that of the model's own forward
pass. The tests run parts of 1, 2, 3, 63, 64 and 65 tokens, with every adapter and several pack sizes. In
float32 such layers differ from themselves by up to 1e-5 of the logits if a text is read in other pieces; the
tests compute all of it in float64.
"""
START = """\
# Models

Twig trains any causal language model, from the Hub or a folder, that transformers loads with its own code and
that is stored as safetensors or as a GGUF file (`model.name=FILE.gguf`, or `model.gguf_file` in a folder or
repository; `pip install gguf`). A GGUF file's weights are held in `model.dtype`, so it takes the
memory of the whole model, and the run records the file's checksum. Model types differ in speed. The trie
engine, the fast one, calls the layers itself and supports the types below. For any other type, set
`model.engine=plain`, which uses the model's ordinary batched forward pass.

No list in the code decides this. Twig reads what a model needs from its config, as far as the config's class
declares it: windows by layer, rotary embeddings by layer type, scales of embeddings and logits, soft caps.
Before it trains, it runs a small tree through the layers and compares the result with the model's own forward
pass, on the weights that were loaded. Then it makes each length of the config short in turn, as a window of
thousands of tokens does nothing to a small tree, and compares again. If they differ, one error names the
model type and says to set `model.engine=plain`. Both engines check that the model predicts each token from
those before it. The plain engine uses the model's cache only if it gives what the whole text gives.

This page is made from the lists that the tests use: `python tests/models_page.py > docs/models.md`. A test
checks that it is current.

## Supported by the trie engine

Each row is a random model of four layers, two key-value heads and width 32, with the settings named, in
float64. The tests compare each with slow references. Log-probs and the gradients of all adapters equal
those of the model's own forward pass over each completion, within 1e-9 of the largest. This holds for
adapters whose lowest layer is the first, second, third or last, with every attention named. Sampling with
the cache draws the same tokens as a loop over whole texts.

| model type | models | settings of the config tested | attention | adapters tested on |
|---|---|---|---|---|
"""
REFUSED = """
## Only with the plain engine

The trie engine refuses these types for the reason shown. With `model.engine=plain` they train. The tests
check that the gradient equals that of a forward pass over each prefix, and that sampling with the model's
own cache draws the same tokens as a loop over whole texts.

| model type | why |
|---|---|
"""
SCANNED = """
## Every decoder type of transformers

`python scripts/scan_families.py` builds small random models of each type that transformers {version} has
a causal language model for, one with windows shorter than the texts and one with those of the class, puts
an adapter on them, and compares both engines with PEFT's own forward pass: the gradient of every adapter,
and the log-probs recorded while sampling. For each type called exact both agree within 1e-6 in float64,
or 2e-3 in float32 if its kernels have no float64. Of {all} types, {built} are decoders that build from
small sizes; {trie} of them are exact with the trie engine, {plain} with the plain one, and the others are
refused for the reason shown.

| model type | `model.engine=trie` | `model.engine=plain` |
|---|---|---|
"""
END = """
## Quantised bases

Set `model.quantization` to `nf4` or `int8` to hold the matrices of the layers in 4 or 8 bits. This needs
bitsandbytes: `pip install 'bitsandbytes>=0.49'`. Embeddings, norms and head keep `model.dtype`; adapter,
log-probs and loss are float32. Nothing is merged into the base, so its bytes never change.

`nf4` is 4-bit NormalFloat in blocks of 64 with quantised scales. `int8` is LLM.int8() with outliers above 6.
bitsandbytes has CPU kernels for both, and the tests use them: they sample, update, evaluate, save and resume,
and compare the gradient with the quantised model's own forward pass. None of this was run on CUDA.

With `int8`, log-probs and gradients of sampling and update agree only to some per cent
(`sampling/logp_gap`). The input of a layer is rounded to 127 levels, and a difference in the last bit of a
float can change the level.
"""


def page() -> str:
    served = "".join(map(_served, tiny.FAMILIES | tiny.MORE_FAMILIES | tiny.HYBRIDS | tiny.SHARING))
    return START + served + _mixers() + REFUSED + _refused() + _scanned() + END


def _mixers() -> str:
    head = "| layer | how it runs a tree | adapted by default | types |\n|---|---|---|---|\n"
    return MIXERS.format(rows=head + "".join(f"| {' | '.join(row)} |\n" for row in LAYERS))


def _served(family: str) -> str:
    name, extra = (tiny.FAMILIES | tiny.MORE_FAMILIES | tiny.HYBRIDS | tiny.SHARING)[family]
    kind = getattr(transformers, name).model_type
    settings = ", ".join(f"`{key}`" for key in sorted(extra)) or "its defaults"
    attention = "sdpa, eager" if tiny.has_sdpa(family) else "eager"
    modules = ", ".join(f"`{m}`" for m in family_cases.MODULES.get(family, ["q_proj", "v_proj"]))
    return f"| `{kind}` | {NAMES[kind]} | {settings} | {attention} | {modules} |\n"


def _refused() -> str:
    kinds = family_cases.FAMILIES.items()
    return "".join(f"| {name.replace('_text', '')} | {family.why} |\n" for name, family in kinds)


def _scanned() -> str:
    rows = list(family_scan.written().values())
    built = [row for row in rows if not row.not_built]
    text = SCANNED.format(
        version=family_scan.VERSION,
        all=len(rows),
        built=len(built),
        trie=sum(row.trie == family_scan.EXACT for row in built),
        plain=sum(row.plain == family_scan.EXACT for row in built),
    )
    return text + "".join(f"| `{row.type}` | {row.trie} | {row.plain} |\n" for row in built)


if __name__ == "__main__":
    sys.stdout.write(page())
