"""One whole step of Qwen2-1.5B's exact shape on a CPU, Twig against TRL: seconds and memory of each phase.

    python benchmarks/real_shape.py                     # all sides; writes benchmarks/results/real_shape.json
    python benchmarks/real_shape.py --sides grpo trl-1  # some of them
    python benchmarks/real_shape.py --shape tiny        # does it run?

Random bfloat16 weights (3 GB) are saved once as safetensors and loaded by every side in a fresh process. The
step is one prompt of 60 tokens, 4 completions of 64, LoRA r=16 on q_proj and v_proj of the last third, AdamW,
beta 0, temperature 1, rewards 0 and 1 in turn, no checkpointing of activations. Loading is all that comes
before the first sampled token: weights, adapters, trainer; in Twig its check of the engine too. Sampling is
prompt to completions. The update is what remains: rewards, credit, forward, backward, optimizer. Memory is
the peak of resident memory in each phase over what it was before loading (Linux); pages of the file of
weights that are mapped count too, on both sides. Seconds of processor time, over all threads, say more than
seconds where the machine has other work.

Completions of random weights part at their first token, which is the least that T-SPMO can have to do. The
side `t-spmo-late` has the most: after sampling, every second completion is made the one before it up to the
last token. What a trained model samples lies between the two.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, alternate, medians, trl_settings, write
from memory import Peaks, build, fork_late
from shapes import ALPHA, LORA, SHAPES, last_third

PROMPT, LENGTH, GENERATIONS = 60, 64, 4
PHASES = ("loading", "sampling", "update")
# side: Twig's algorithm, or TRL's completions in a micro-batch
SIDES: dict[str, str | int] = {
    "grpo": "grpo",
    "trl-1": 1,
    "t-spmo": "t-spmo",
    "trl-4": GENERATIONS,
    "t-spmo-late": "t-spmo",
}


class Clock:
    """Seconds, seconds of processor time and peak memory of one phase after another, from now on."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self.peaks, self.began = Peaks(), self._now()

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def note(self, phase: str) -> None:
        for kind, now, before in zip(("seconds", "cpu_seconds"), self._now(), self.began, strict=True):
            self.found[f"{phase}_{kind}"] = round(now - before, 3)
        self.peaks.note(phase)
        self.began = self._now()

    def figures(self) -> dict[str, float]:
        steps = {
            f"step_{kind}": round(self.found[f"sampling_{kind}"] + self.found[f"update_{kind}"], 3)
            for kind in ("seconds", "cpu_seconds")
        }
        memory = {f"{phase}_mib": self.peaks.found[phase] for phase in PHASES}
        return self.found | steps | memory | {"peak_mib": max(memory.values())}


def reward(completions: list[Any], **columns: Any) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


def twig_side(side: str, folder: str, shape: str) -> dict[str, float]:
    import twig.training.train  # noqa: F401  (with all that it imports)
    from twig.common.progress import Progress
    from twig.config.load import Settings
    from twig.config.sizes import DEFAULT_SIZES, with_sizes
    from twig.core.types import Example
    from twig.engine.load import end_ids, load_model
    from twig.engine.lora import attach
    from twig.engine.policy import Policy
    from twig.engine.sampler import SamplingParams
    from twig.tasks.base import Task
    from twig.training.trainer import Trainer

    settings = Settings.from_dict(
        {
            "model": {"name": folder, "dtype": "bfloat16", "device": "cpu"},
            "task": {"name": "custom", "path": "none.jsonl"},
            "algorithm": {"name": SIDES[side]},
            "rollout": {
                "prompts_per_step": 1,
                "num_generations": GENERATIONS,
                "max_completion_length": LENGTH,
                "suppress_tokens": [1],  # the end token: every completion has its full length
            },
            "train": {"max_steps": 1, "learning_rate": 1e-4},
        }
    )
    settings = with_sizes(settings, DEFAULT_SIZES.by_key())
    clock = Clock()
    model, tokenizer = load_model(settings.model)
    policy = Policy(
        attach(model, alpha=ALPHA, layers=last_third(shape), **LORA),
        suppress_tokens=settings.rollout.suppress_tokens,
        head_chunk=settings.train.head_chunk,
    )
    task = Task("benchmark", [Example("a" * PROMPT, {})], [], (reward,))
    sampling = SamplingParams.of(settings, tokenizer, end_ids(model, tokenizer))
    trainer = Trainer(settings, policy, tokenizer, task, sampling, Progress())
    clock.note("loading")
    batch = trainer.sample(1)
    clock.note("sampling")
    if side == "t-spmo-late":
        fork_late(batch)
    trainer.assign_credit(batch, 1)
    measured = trainer.update(batch, 1e-4)
    clock.note("update")
    assert measured["grad_norm"] > 0
    assert all(len(c.ids) == LENGTH for c in batch.groups[0].completions)
    trained = sum(int(each.credit.weighted.sum()) for each in batch.scored)
    return clock.figures() | {"trained_tokens": trained}


def trl_side(side: str, folder: str, shape: str) -> dict[str, float]:
    import torch
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOTrainer

    disable_progress_bars()
    lengths: list[int] = []

    class Timed(GRPOTrainer):
        def _generate(self, *arguments: Any, **kwargs: Any) -> Any:
            clock.note("loading")
            found = super()._generate(*arguments, **kwargs)
            clock.note("sampling")
            return found

    def scored(completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return reward(completions)

    with tempfile.TemporaryDirectory() as output:
        arguments = trl_settings(
            output,
            GENERATIONS,
            int(SIDES[side]),
            num_generations=GENERATIONS,
            max_completion_length=LENGTH,
            generation_kwargs={"suppress_tokens": [1]},
            learning_rate=1e-4,
            max_steps=1,
        )
        clock = Clock()
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
            reward_funcs=scored,
            processing_class=AutoTokenizer.from_pretrained(folder),
            train_dataset=Dataset.from_list([{"prompt": "a" * PROMPT}] * GENERATIONS),
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", lora_alpha=ALPHA, layers_to_transform=last_third(shape), **LORA
            ),
            args=arguments,
        )
        trainer.train()
        clock.note("update")
    model = trainer.model
    assert next(model.base_model.parameters()).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad), "as Twig's adapter"
    assert any(bool(p.any()) for n, p in model.named_parameters() if "lora_B" in n), "it was trained"
    assert lengths == [LENGTH] * GENERATIONS
    return clock.figures() | {"trained_tokens": GENERATIONS * LENGTH}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A step of Qwen2-1.5B's shape on a CPU: Twig against TRL.")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE")
    parser.add_argument("--rounds", type=int, default=1, help="processes a side")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--side", choices=SIDES, help="run one side in this process")
    parser.add_argument("--folder", help="of the model; built in a temporary one where this is left out")
    parser.add_argument("--build", action="store_true", help="write the model to --folder")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.build:
        shape = SHAPES[options.shape] | {"config": "Qwen2Config", "tie_word_embeddings": True}
        build(shape, "bfloat16", Path(options.folder))
        return
    if options.side:
        # what the libraries print must not get between us and the JSON line
        stdout, sys.stdout = sys.stdout, sys.stderr
        run = trl_side if options.side.startswith("trl") else twig_side
        print(json.dumps(run(options.side, options.folder, options.shape)), file=stdout)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or temporary
        if not (Path(folder) / "config.json").exists():
            command = [sys.executable, __file__, "--build", "--shape", options.shape, "--folder", folder]
            subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        words = ["--folder", folder, "--shape", options.shape]
        found = alternate(__file__, dict.fromkeys(options.sides, words), options.rounds)
    result = {side: medians(rows) for side, rows in found.items()}
    for side, row in result.items():
        print(f"{side:12}", end="")
        for phase in PHASES:
            print(f"  {phase} {row[f'{phase}_seconds']:.1f} s {row[f'{phase}_mib'] / 1024:.2f} GiB", end="")
        print(f"  step {row['step_seconds']:.1f} s, of processors {row['step_cpu_seconds']:.1f} s")
    name = "real_shape" if options.shape == "1.5b" else f"real_shape-{options.shape}"
    print(f"written to {write(name, {'shape': options.shape, 'medians': result, 'processes': found})}")


if __name__ == "__main__":
    main()
