"""A whole training step of full-token GRPO, Twig against TRL, on the embedded model: fresh processes in turn.

    python benchmarks/step.py                  # the comparison; writes benchmarks/results/step.json
    python benchmarks/step.py --side twig      # one side, one process, one JSON line
    OMP_NUM_THREADS=1 python benchmarks/step.py          # one thread; writes step-one-thread.json

The same for both: 8 prompts x 16 completions of at most 64 tokens, LoRA r=16 on q_proj and v_proj of the last
third, float32, AdamW, one optimizer step per batch, beta 0, checkpointing off, no evaluation, no logging to
trackers. TRL gets the micro-batch that is fastest here (`--micro-batch`, default: the whole batch at once).
A step is timed from the end of the one before, so everything that a user waits for is in it.

Twig's products run on `--kernels`, by default what `model.kernels=auto` takes here. Where that is oneDNN, TRL
is measured with the same products too (`products.trl_products`); else TRL as it comes has them already.
"""

import argparse
import json
import math
import os
import resource
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from common import AS_IT_COMES, SAME_KERNEL, alternate, medians, ratio, trl_settings, write
from products import KERNELS, resolve, trl_products

PROMPTS, GENERATIONS, LENGTH, RATE = 8, 16, 64, 1e-3
WARMUP = 3


def embedded() -> str:
    """The folder of the embedded model."""
    return str(files("twig") / "assets" / "tiny-arithmetic")


def memory() -> float:
    """The peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def figures(ends: list[float], tokens: list[int], loaded: float) -> dict[str, float]:
    """What one process reports: the median step after the warm-up, and the tokens of those steps per second.

    `ends` are the times at which steps ended, `tokens` the tokens that each sampled.
    """
    seconds = [b - a for a, b in zip(ends[WARMUP - 1 :], ends[WARMUP:], strict=False)]
    return {
        "seconds_per_step": median(seconds),
        "tokens_per_second": sum(tokens[WARMUP:]) / sum(seconds),
        "tokens_per_step": sum(tokens[WARMUP:]) / len(seconds),
        "peak_mib": memory(),
        "above_loaded_mib": memory() - loaded,
    }


def twig_side(options: argparse.Namespace) -> dict[str, float]:
    import twig
    from twig.common.progress import Progress

    ends, tokens, loaded = [], [], []

    class Watch(Progress):
        def phase(self, name: str, total: int | None = None) -> None:
            if name == "sampling" and not loaded:
                loaded.append(memory())

        def step(self, step: int, total: int, metrics: dict) -> None:
            ends.append(time.perf_counter())
            tokens.append(metrics["tokens/sampled"])

    settings = {
        "model": {"name": "tiny-arithmetic", "kernels": options.kernels},
        "lora": {"r": 16, "alpha": 32, "target_modules": ["q_proj", "v_proj"], "layers": "last_third"},
        "task": {"name": "multiplication", "train_size": 2000, "eval_size": 1},
        "rollout": {
            "num_generations": GENERATIONS,
            "prompts_per_step": PROMPTS,
            "max_completion_length": LENGTH,
            "wave_size": PROMPTS * GENERATIONS,
        },
        "algorithm": {"name": options.algorithm},
        "train": {"learning_rate": RATE, "max_steps": options.steps, "seed": options.seed, "save_steps": 0},
        "eval": {"before": False},
    }
    with tempfile.TemporaryDirectory() as folder:
        twig.train(settings, output=Path(folder) / "run", progress=Watch())
    return figures(ends, tokens, loaded[0])


def trl_side(options: argparse.Namespace) -> dict[str, float]:
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    from twig.tasks.multiplication import problems, product, prompt_text

    disable_progress_bars()
    base = embedded()
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(base)
    layers = model.config.num_hidden_layers
    asked = problems("train", (3, 2), options.seed, 2000)
    data = Dataset.from_list([{"prompt": prompt_text(a, b), "answer": str(a * b)} for a, b in asked])
    ends, tokens, loaded = [], [], []

    def reward(completions: list[str], completion_ids: list[list[int]], **columns: list) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        return product(completions, **{"answer": columns["answer"]})

    class Watch(TrainerCallback):
        def on_train_begin(self, *arguments: object, **kwargs: object) -> None:
            loaded.append(memory())

        def on_step_end(self, *arguments: object, **kwargs: object) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            processing_class=tokenizer,
            train_dataset=data,
            callbacks=[Watch()],
            peft_config=LoraConfig(
                task_type="CAUSAL_LM",
                r=16,
                lora_alpha=32,
                target_modules=["q_proj", "v_proj"],
                layers_to_transform=list(range(layers - math.ceil(layers / 3), layers)),
            ),
            args=trl_settings(
                folder,
                PROMPTS * GENERATIONS,
                options.micro_batch,
                num_generations=GENERATIONS,
                max_completion_length=LENGTH,
                temperature=1.0,
                learning_rate=RATE,
                max_steps=options.steps,
                seed=options.seed,
            ),
        )
        with trl_products(trainer.model, options.kernels):
            trainer.train()
    return figures(ends, tokens, loaded[0])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Seconds per training step: Twig against TRL.")
    parser.add_argument("--side", choices=("twig", "trl"), help="run one side in this process")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5, help="processes a side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--algorithm", default="grpo", help="of Twig's side; TRL's is always GRPO")
    parser.add_argument(
        "--kernels",
        choices=KERNELS,
        default="auto",
        help="of Twig's products, as model.kernels; with --side trl: of TRL's, where auto is as it comes",
    )
    parser.add_argument(
        "--micro-batch", type=int, default=PROMPTS * GENERATIONS, help="TRL's completions per backward pass"
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.side:
        # what the libraries print must not get between us and the JSON line
        stdout, sys.stdout = sys.stdout, sys.stderr
        found = {"twig": twig_side, "trl": trl_side}[options.side](options)
        print(json.dumps({k: round(v, 5) for k, v in found.items()}), file=stdout)
        return
    result = compare(options)
    for side, row in result["medians"].items():
        print(
            f"{side:5} {row['seconds_per_step']:.3f} s/step  {row['tokens_per_second']:,.0f} tokens/s  "
            f"{row['peak_mib']:.0f} MiB peak, {row['above_loaded_mib']:.0f} above the loaded model"
        )
    for column, times in result["trl_over_twig_seconds"].items():
        print(f"TRL, {column}, takes {times['median']:.2f} times as long", end=" ")
        print(f"(from {times['low']:.2f} to {times['high']:.2f})")
    name = "step" if options.algorithm == "grpo" else f"step-{options.algorithm}"
    name += "-one-thread" if os.environ.get("OMP_NUM_THREADS") == "1" else ""
    print(f"written to {write(name, result)}")


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn: medians, and TRL's figures over Twig's in each column."""
    from transformers import AutoConfig

    kernels = resolve(options.kernels, AutoConfig.from_pretrained(embedded()))
    shared = ["--steps", options.steps, "--seed", options.seed, "--algorithm", options.algorithm]
    words = [str(word) for word in (*shared, "--micro-batch", options.micro_batch)]
    sides = {"twig": [*words, "--kernels", kernels], "trl": [*words, "--kernels", "torch"]}
    columns = {SAME_KERNEL: "trl", AS_IT_COMES: "trl"}
    if kernels == "onednn":
        columns[SAME_KERNEL] = "trl-same-kernel"
        sides["trl-same-kernel"] = ["--side", "trl", *words, "--kernels", "onednn"]
    processes = alternate(__file__, sides, options.rounds)
    twig, trl = processes["twig"], {column: processes[side] for column, side in columns.items()}
    return {
        "kernels": kernels,
        "medians": {side: medians(rows) for side, rows in processes.items()},
        "trl_sides": columns,
        "trl_over_twig_seconds": {c: ratio(twig, rows, "seconds_per_step") for c, rows in trl.items()},
        "twig_over_trl_tokens_per_second": {
            c: ratio(rows, twig, "tokens_per_second") for c, rows in trl.items()
        },
        "processes": processes,
    }


if __name__ == "__main__":
    main()
