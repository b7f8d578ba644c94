"""Predicted against measured peaks of memory: loading, sampling, update, evaluation; a fresh process a case.

    python benchmarks/memory.py                          # every case; writes benchmarks/results/memory.json
    python benchmarks/memory.py --cases "grpo, 0.5b"     # some of them

Random models are saved to a folder, trained for two steps and evaluated as `twig train` does, on prompts of
one length (of several in the cases of `SHORTEST`), with rewards that alternate.

Measured is the largest growth of resident memory over the process before the model is loaded (Linux), reset
for each phase. Predicted is `twig.planner.plan.plan` for the model's config.json and
the same settings. Completions are as long as they may be, and most packs are full of them; for T-SPMO two
each share all but their last token, the worst that the algorithm can meet.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from string import ascii_letters
from typing import Any

from common import ROOT, alternate, medians, write

# Qwen2-0.5B in width and vocabulary with fewer layers, and others in which weights matter less.
WIDE = {
    "config": "Qwen2Config",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 6,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SMALL = {
    "config": "LlamaConfig",
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
GEMMA = SMALL | {
    "config": "Gemma3TextConfig",
    "vocab_size": 65536,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
}
SMOLLM2 = {
    "config": "LlamaConfig",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
# Layers of other kinds: recurrences beside attention, short convolutions beside attention, and layers that
# take keys and values from others and have inputs of their own.
TWELVE = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
QWEN3_5 = TWELVE | {
    "config": "Qwen3_5TextConfig",
    "head_dim": 64,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
LFM2 = TWELVE | {
    "config": "Lfm2Config",
    "block_auto_adjust_ff_dim": False,
    "layer_types": ["conv", "conv", "full_attention"] * 4,
}
GEMMA4 = TWELVE | {
    "config": "Gemma4TextConfig",
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 4,
    "num_kv_shared_layers": 6,
    "hidden_size_per_layer_input": 64,
    "vocab_size_per_layer_input": 32000,
}
OTHER_LAYERS = (
    "rollout.num_generations=8 rollout.prompts_per_step=4 rollout.wave_size=32 "
    "rollout.max_completion_length=48 train.pack_size=1024"
)
ALL_MODULES = "lora.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"
# case: (model, prompt tokens, dtype on disk, settings)
CASES: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "grpo, 0.5b width": (
        WIDE,
        80,
        "float32",
        "algorithm.name=grpo rollout.num_generations=8 rollout.prompts_per_step=4 rollout.wave_size=32 "
        "rollout.max_completion_length=48 train.pack_size=456",
    ),
    "s-grpo, 0.5b width, oneDNN": (
        WIDE,
        80,
        "float32",
        "algorithm.name=s-grpo algorithm.alpha=0 algorithm.p=0.3 algorithm.k=16 rollout.num_generations=8 "
        "rollout.prompts_per_step=4 rollout.wave_size=32 rollout.max_completion_length=48 "
        "train.pack_size=456 model.kernels=onednn rollout.packed_weights=false",
    ),
    "grpo, 0.5b width, oneDNN, packed weights": (
        WIDE,
        80,
        "float32",
        "algorithm.name=grpo rollout.num_generations=8 rollout.prompts_per_step=4 rollout.wave_size=32 "
        "rollout.max_completion_length=48 train.pack_size=456 model.kernels=onednn "
        "rollout.packed_weights=true",
    ),
    "s-grpo, 0.5b width, stored in bfloat16": (
        WIDE,
        80,
        "bfloat16",
        "algorithm.name=s-grpo algorithm.alpha=0 algorithm.p=0.3 algorithm.k=16 rollout.num_generations=8 "
        "rollout.prompts_per_step=4 rollout.wave_size=32 rollout.max_completion_length=48 "
        "train.pack_size=456",
    ),
    "t-spmo, 0.5b width, 64 at once": (
        WIDE,
        64,
        "float32",
        "algorithm.name=t-spmo rollout.num_generations=16 rollout.prompts_per_step=4 rollout.wave_size=64 "
        "rollout.max_completion_length=32 train.pack_size=512",
    ),
    "grpo, 0.5b width in bfloat16": (
        WIDE,
        80,
        "bfloat16",
        "algorithm.name=grpo rollout.num_generations=8 rollout.prompts_per_step=2 rollout.wave_size=16 "
        "rollout.max_completion_length=24 train.pack_size=528 model.dtype=bfloat16",
    ),
    "grpo, wide pack, all layers": (
        SMALL,
        64,
        "float32",
        "algorithm.name=grpo rollout.num_generations=8 rollout.prompts_per_step=4 rollout.wave_size=32 "
        "rollout.max_completion_length=128 train.pack_size=2160 lora.layers=all",
    ),
    "grpo, wide pack, layers checkpointed": (
        SMALL,
        64,
        "float32",
        "algorithm.name=grpo rollout.num_generations=8 rollout.prompts_per_step=4 rollout.wave_size=32 "
        "rollout.max_completion_length=128 train.pack_size=2160 lora.layers=all "
        "train.checkpoint_layers=true",
    ),
    "grpo, wide pack, all modules": (
        SMALL,
        64,
        "float32",
        "algorithm.name=grpo rollout.num_generations=8 rollout.prompts_per_step=4 rollout.wave_size=32 "
        f"rollout.max_completion_length=128 train.pack_size=1080 {ALL_MODULES} lora.r=64",
    ),
    "s-grpo, wide pack, eager attention": (
        SMALL,
        64,
        "float32",
        "algorithm.name=s-grpo algorithm.alpha=0 algorithm.p=0.3 algorithm.k=32 rollout.num_generations=8 "
        "rollout.prompts_per_step=4 rollout.wave_size=32 rollout.max_completion_length=96 "
        "train.pack_size=768 model.attn_implementation=eager",
    ),
    "t-spmo, long cache": (
        SMALL,
        128,
        "float32",
        "algorithm.name=t-spmo rollout.num_generations=16 rollout.prompts_per_step=4 rollout.wave_size=64 "
        "rollout.max_completion_length=192 train.pack_size=1024",
    ),
    "t-spmo, windows": (
        GEMMA,
        128,
        "float32",
        "algorithm.name=t-spmo rollout.num_generations=8 rollout.prompts_per_step=8 rollout.wave_size=64 "
        "rollout.max_completion_length=128 train.pack_size=1024",
    ),
    "grpo, SmolLM2-135M's shape, 256 at once": (
        SMOLLM2,
        96,
        "bfloat16",
        "algorithm.name=grpo rollout.num_generations=16 rollout.prompts_per_step=16 rollout.wave_size=256 "
        f"rollout.max_completion_length=48 train.pack_size=848 lora.layers=all {ALL_MODULES} "
        "model.kernels=onednn rollout.packed_weights=true",
    ),
    "grpo, SmolLM2-135M's shape in bfloat16, all modules": (
        SMOLLM2,
        80,
        "bfloat16",
        "algorithm.name=grpo rollout.num_generations=16 rollout.prompts_per_step=8 rollout.wave_size=128 "
        f"rollout.max_completion_length=24 train.pack_size=896 lora.layers=all {ALL_MODULES} lora.r=16 "
        "model.dtype=bfloat16",
    ),
    "grpo, recurrences": (QWEN3_5, 96, "float32", f"algorithm.name=grpo {OTHER_LAYERS}"),
    "t-spmo, recurrences, checkpointed": (
        QWEN3_5,
        96,
        "float32",
        f"algorithm.name=t-spmo {OTHER_LAYERS} lora.layers=all train.checkpoint_layers=true",
    ),
    "grpo, short convolutions": (LFM2, 96, "float32", f"algorithm.name=grpo {OTHER_LAYERS}"),
    "grpo, short convolutions, all layers": (
        LFM2,
        96,
        "float32",
        f"algorithm.name=grpo {OTHER_LAYERS} lora.layers=all",
    ),
    "grpo, shared keys": (GEMMA4, 96, "float32", f"algorithm.name=grpo {OTHER_LAYERS}"),
}
# Tokens of the shortest prompt where lengths differ: as in a real task, so there are masks in every step.
SHORTEST = {"grpo, SmolLM2-135M's shape, 256 at once": 48}
QUESTIONS = 32


def build(model: dict[str, Any], dtype: str, folder: Path) -> None:
    """Writes a random model and a tokenizer of one token per byte."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    options = {key: value for key, value in model.items() if key != "config"}
    config = getattr(transformers, model["config"])(**options, eos_token_id=1, pad_token_id=0, bos_token_id=2)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def byte_tokenizer() -> Any:
    """A tokenizer of one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # A token per byte, in the form that the tokenizer classes of all these families read.
    words = ["<pad>", "<eos>", "<bos>", "a", *sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"a"})]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )


def settings_of(case: str, folder: str) -> Any:
    from twig.config.load import Settings
    from twig.config.sizes import DEFAULT_SIZES, with_sizes

    values = {"model": {"name": folder, "device": "cpu"}, "task": {"name": "custom", "path": "none.jsonl"}}
    values |= {"train": {"max_steps": 2}, "eval": {"batch_size": QUESTIONS, "limit": QUESTIONS}}
    return with_sizes(Settings.from_dict(values, CASES[case][3].split()), DEFAULT_SIZES.by_key())


class Peaks:
    """Growth of resident memory over what it was when this was made, at its peak in each phase, in MiB."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.start, self.found = self._status("VmRSS"), {}
        self.reset()

    def _status(self, key: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    def note(self, phase: str) -> None:
        grown = (self._status("VmHWM") - self.start) / 1024
        self.found[phase] = round(max(grown, self.found.get(phase, 0)), 1)
        self.reset()


def measure(case: str, folder: str) -> dict[str, float]:
    """The peaks of a run of two steps."""
    import numpy as np
    import torch

    from twig.common.progress import Progress
    from twig.core.types import Example
    from twig.engine.load import end_ids, load_model
    from twig.engine.lora import attach
    from twig.engine.policy import Policy
    from twig.engine.sampler import SamplingParams
    from twig.evaluation.evaluate import evaluate_policy
    from twig.runtime.memory_use import return_freed_memory
    from twig.tasks.base import Task
    from twig.training import train as loop  # noqa: F401  (with all that it imports)
    from twig.training.trainer import Trainer

    settings, prompt = settings_of(case, folder), CASES[case][1]
    shortest = SHORTEST.get(case, prompt)
    lengths = [prompt - n % 16 * (prompt - shortest) // 15 for n in range(64)]
    # no two of a batch begin alike: what prompts have in common is run once
    examples = [Example(ascii_letters[n % 52] + "a" * (length - 1), {}) for n, length in enumerate(lengths)]

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    return_freed_memory(2**18, for_good=True)  # as a run whose plan takes more than half of the memory
    peaks = Peaks()
    model, tokenizer = load_model(settings.model)
    lora = settings.lora
    peft_model = attach(
        model, r=lora.r, alpha=lora.alpha, target_modules=lora.target_modules, layers=lora.layers
    )
    policy = Policy(
        peft_model,
        head_chunk=settings.train.head_chunk,
        checkpoint_layers=settings.train.checkpoint_layers,
        kernels="onednn" if settings.model.kernels == "onednn" else "torch",  # the plan takes auto as torch
        packed_weights=bool(settings.rollout.packed_weights),
    )
    task = Task("memory", examples, examples[:QUESTIONS], (reward,))
    sampling = SamplingParams.of(settings, tokenizer, end_ids(model, tokenizer))
    trainer = Trainer(settings, policy, tokenizer, task, sampling, Progress())
    peaks.note("loading")
    for step in (1, 2):
        batch = trainer.sample(step)
        peaks.note("sampling")
        if settings.algorithm.name == "t-spmo":
            fork_late(batch)
        trainer.assign_credit(batch, step)
        trainer.update(batch, 1e-4)
        peaks.note("update")
        del batch
    evaluate_policy(policy, tokenizer, task, replace(sampling, wave_size=QUESTIONS))
    peaks.note("evaluation")
    assert np.isfinite(torch.cat([p.flatten() for p in policy.parameters.values()]).sum().item())
    return peaks.found


def fork_late(batch: Any) -> None:
    """Makes every other completion equal to the one before it, up to its last token."""
    for group in batch.groups:
        for left, right in zip(group.completions[::2], group.completions[1::2], strict=True):
            length = min(len(left), len(right))
            right.ids[:length] = left.ids[:length]
            right.ids[length - 1] = 3 if left.ids[length - 1] != 3 else 4


def predict(case: str, folder: str) -> dict[str, Any]:
    """The same by the planner: MiB of each phase, and what each is made of."""
    from twig.planner.plan import plan

    found = plan(folder, settings_of(case, folder), 2**40, "cpu", prompt_tokens=CASES[case][1])
    mib = 2**20
    return {
        "peaks": {phase.name: round(phase.peak / mib, 1) for phase in found.phases},
        "items": {p.name: {i.name: round(i.size / mib, 1) for i in p.items} for p in found.phases},
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Predicted against measured peaks of memory.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--rounds", type=int, default=1, help="processes a case")
    parser.add_argument("--side", choices=CASES, help="measure one case in this process")
    parser.add_argument("--build", choices=CASES, help="write a case's model to the folder")
    parser.add_argument("--folder", help="of the model")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.build:
        build(CASES[options.build][0], CASES[options.build][2], Path(options.folder))
        return
    if options.side:
        print(json.dumps(measure(options.side, options.folder)))
        return
    results: dict[str, Any] = {}
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--build", case, "--folder", folder]
            subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
            measured = alternate(__file__, {case: ["--folder", folder]}, options.rounds)[case]
            predicted = predict(case, folder)
        peaks = medians(measured)
        off = {name: round(100 * (predicted["peaks"][name] / peaks[name] - 1), 1) for name in peaks}
        results[case] = {
            "settings": CASES[case][3],
            "measured": peaks,
            "predicted": predicted["peaks"],
            "off_percent": off,
            "items": predicted["items"],
            "processes": measured,
        }
        print(f"{case}\n  measured  {peaks}\n  predicted {predicted['peaks']}\n  off by %  {off}", flush=True)
    print(f"written to {write('memory', {'cases': results})}")


if __name__ == "__main__":
    main()
