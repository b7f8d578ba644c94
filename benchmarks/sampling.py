"""Sampling, Twig against transformers' generate: tokens per second, fresh processes in turn.

    python benchmarks/sampling.py                # writes benchmarks/results/sampling.json
    python benchmarks/sampling.py --side twig    # one side, one process, one JSON line

The embedded model with a LoRA adapter r=16 on q_proj and v_proj of its last third, in float32, answers 8
prompts 16 times each, at temperature 1 from the whole distribution, with at most 64 tokens. Counted are the
tokens up to and with the end token. Twig records log-probs, entropies and the trunk's output on the way;
generate records nothing. A random model of the 0.1B shape, which has a real vocabulary and never ends, is the
second case: 4 prompts of 80 tokens, 8 times each, 64 tokens; and the third in bfloat16. Its completions share
nothing but their prompt, those of the embedded model also what they begin with.

Twig's products run on what `model.kernels=auto` takes here, by packed copies where it is oneDNN. There
generate is measured with oneDNN's products too (`kernels.onednn_products`).
"""

import argparse
import json
import sys
import time
from contextlib import nullcontext
from statistics import median
from typing import Any

import numpy as np
import torch
from common import AS_IT_COMES, SAME_KERNEL, alternate, medians, ratio, write
from products import KERNELS, resolve
from shapes import ALPHA, LORA, SHAPES, build, config_of

# case: (shape, prompts, completions each, tokens, number type)
CASES = {
    "embedded": ("embedded", 8, 16, 64, torch.float32),
    "0.1b": ("0.1b", 4, 8, 64, torch.float32),
    "0.1b, bfloat16": ("0.1b", 4, 8, 64, torch.bfloat16),
}


def prepare(case: str) -> tuple[Any, list[list[int]], list[int]]:
    """(model with adapter, prompts, end tokens) of a case."""
    from twig.config.schema import Model
    from twig.engine.load import end_ids, load_model
    from twig.engine.lora import attach
    from twig.tasks.multiplication import problems, prompt_text

    shape, count, _, _, dtype = CASES[case]
    if shape == "embedded":
        model, tokenizer = load_model(Model(name="tiny-arithmetic"))
        asked = problems("train", (3, 2), 0, count)
        prompts = [tokenizer(prompt_text(a, b)).input_ids for a, b in asked]
        return attach(model, alpha=ALPHA, **LORA), prompts, end_ids(model, tokenizer)
    draw = np.random.default_rng(0)
    prompts = draw.integers(2, SHAPES[shape]["vocab_size"], (count, 80)).tolist()
    return attach(build(shape, dtype), alpha=ALPHA, **LORA), prompts, [1]


def kernels_of(case: str) -> str:
    """What `model.kernels=auto` stands for in a case."""
    shape, *_, dtype = CASES[case]
    # the embedded model's matrices are too small to gain
    return "torch" if shape == "embedded" or dtype is not torch.float32 else resolve("auto", config_of(shape))


def twig_side(case: str, repeats: int, kernels: str) -> dict[str, float]:
    from twig.engine.policy import Policy
    from twig.engine.sampler import Request, SamplingParams, sample

    _, _, each, limit, _ = CASES[case]
    model, prompts, ends = prepare(case)
    policy = Policy(model, kernels=kernels, packed_weights=kernels == "onednn")
    requests = [Request(np.array(ids), each, limit, slot) for slot, ids in enumerate(prompts)]

    def run(step: int) -> int:
        drawn = sample(
            policy,
            requests,
            SamplingParams(ends, decode=lambda rows: [""] * len(rows), wave_size=256),
            step=step,
        )
        return sum(len(c) for completions in drawn.completions for c in completions)

    return timed(run, repeats)


def generate_side(case: str, repeats: int, kernels: str) -> dict[str, float]:
    from twig.engine.kernels import onednn_products

    _, _, each, limit, _ = CASES[case]
    model, prompts, ends = prepare(case)
    ids = torch.tensor(prompts).repeat_interleave(each, 0)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}

    @torch.inference_mode()
    def run(step: int) -> int:
        torch.manual_seed(step)
        rows = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=limit,
            eos_token_id=ends,
            **options,
        )[:, ids.shape[1] :]
        ended = torch.isin(rows, torch.tensor(ends))
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, rows.shape[1])
        return int(lengths.sum())

    with onednn_products(model.modules()) if kernels == "onednn" else nullcontext():
        return timed(run, repeats)


def timed(run: Any, repeats: int) -> dict[str, float]:
    """The median over `repeats` calls, after one that warms up."""
    run(0)
    speeds, tokens = [], []
    for step in range(1, repeats + 1):
        began = time.perf_counter()
        tokens.append(run(step))
        speeds.append(tokens[-1] / (time.perf_counter() - began))
    return {"tokens_per_second": round(median(speeds), 1), "tokens": round(float(np.mean(tokens)), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Sampled tokens per second: Twig against generate.")
    parser.add_argument("--side", choices=("twig", "generate"), help="run one side in this process")
    parser.add_argument("--case", choices=CASES, default="embedded")
    parser.add_argument(
        "--kernels", choices=KERNELS[1:], default="torch", help="with --side: of the products"
    )
    parser.add_argument("--repeats", type=int, default=5, help="calls in a process")
    parser.add_argument("--rounds", type=int, default=5, help="processes a side")
    options = parser.parse_args()
    if options.side:
        side = twig_side if options.side == "twig" else generate_side
        print(json.dumps(side(options.case, options.repeats, options.kernels)))
        return
    results: dict[str, Any] = {}
    for case in CASES:
        words = ["--case", case, "--repeats", str(options.repeats)]
        kernels = kernels_of(case)
        sides = {"twig": [*words, "--kernels", kernels], "generate": words}
        columns = {SAME_KERNEL: "generate", AS_IT_COMES: "generate"}
        if kernels == "onednn":
            columns[SAME_KERNEL] = "generate-same-kernel"
            sides["generate-same-kernel"] = ["--side", "generate", *words, "--kernels", kernels]
        found = alternate(__file__, sides, options.rounds)
        results[case] = {
            "kernels": kernels,
            "medians": {side: medians(rows) for side, rows in found.items()},
            "twig_over_generate": {
                column: ratio(found[side], found["twig"], "tokens_per_second")
                for column, side in columns.items()
            },
            "processes": found,
        }
        for column, more in results[case]["twig_over_generate"].items():
            print(f"{case}: {more['median']:.2f} times generate's tokens a second, {column}", file=sys.stderr)
    print(f"written to {write('sampling', {'cases': results})}")


if __name__ == "__main__":
    main()
