"""What an update costs as one size grows and all others stay: one process a curve, medians.

    python benchmarks/scaling.py                         # writes benchmarks/results/scaling.json
    python benchmarks/scaling.py --side generations      # one curve, one process, one JSON line

A random Qwen2 of a small shape (below) in float32, LoRA r=16 on q_proj and v_proj of the last third, the
trunk's output recorded. Where a curve does not say otherwise: G = 16, prompt of 80 tokens, completions of 200
whose tokens have 0.35 nats of entropy, drawn independently (`shapes.entropic_forks`). Half of the completions
are right. Seconds are from rewards to gradient; beside them the tokens that were run and trained.
"""

import argparse
import json
import time
from statistics import median
from typing import Any

import numpy as np
import torch
from common import alternate, write
from shapes import ALPHA, LORA, completions, entropic_forks, randomise

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
STANDARD = {"generations": 16, "entropy": 0.35, "length": 200, "prompt": 80, "vocabulary": 4096}
GENERATIONS = (4, 8, 16, 32, 64, 128)
# curve: (what grows, its values, other sizes)
CURVES: dict[str, tuple[str, tuple, dict[str, float]]] = {
    "generations": ("generations", GENERATIONS, {}),
    "generations at 0.1 nats": ("generations", GENERATIONS, {"entropy": 0.1}),
    "generations at 1 nat": ("generations", GENERATIONS, {"entropy": 1.0}),
    "completion length": ("length", (50, 100, 200, 400), {}),
    "prompt length": ("prompt", (20, 80, 320, 1280), {}),
    "vocabulary": ("vocabulary", (1024, 4096, 16384, 65536), {}),
    "forks": ("entropy", (0.02, 0.05, 0.1, 0.2, 0.35, 0.7, 1.4), {}),
}
ALGORITHMS = ("grpo", "s-grpo", "t-spmo")
PACK = 1024


def curve(name: str, repeats: int) -> dict[str, Any]:
    """The points of one curve: for each value of what grows, each algorithm's seconds and tokens."""
    grows, values, others = CURVES[name]
    points = []
    for value in values:
        sizes = {**STANDARD, **others, grows: value}
        points.append({"value": value} | {a: point(a, sizes, repeats) for a in ALGORITHMS})
    return {"grows": grows, "points": points}


def point(name: str, sizes: dict[str, float], repeats: int) -> dict[str, float]:
    from transformers import AutoModelForCausalLM, Qwen2Config

    from twig.common.progress import Progress
    from twig.config.sizes import Sizes
    from twig.core.algorithms.base import Objective
    from twig.core.algorithms.registry import algorithm
    from twig.core.credit import Scored, assign_one
    from twig.core.trie import PrefixTrie
    from twig.core.types import Completion, Example, Group
    from twig.engine.lora import attach
    from twig.engine.policy import Policy
    from twig.engine.update import Passes

    torch.manual_seed(0)
    config = Qwen2Config(**SHAPE | {"vocab_size": sizes["vocabulary"], "tie_word_embeddings": True})
    policy = Policy(attach(AutoModelForCausalLM.from_config(config), alpha=ALPHA, **LORA))
    randomise(policy.parameters)
    length, generations, prompt = sizes["length"], sizes["generations"], sizes["prompt"]
    boundary = torch.randn(prompt + generations * length, SHAPE["hidden_size"])
    options = algorithm(name, **({"alpha": 0, "p": 0.3, "k": length} if name == "s-grpo" else {}))
    seconds, run, trained = [], [], []
    for seed in range(repeats):
        forks = entropic_forks(generations, length, sizes["entropy"], seed)
        rows = completions(length, forks, sizes["vocabulary"], seed)
        rewards = np.random.default_rng(seed).permutation(np.arange(generations) % 2) * 1.0
        made = [
            Completion(
                ids, np.zeros(length), np.zeros(length), True, "", prompt + i * length + np.arange(length)
            )
            for i, ids in enumerate(rows)
        ]
        group = Group(Example(""), 0, np.arange(2, prompt + 2), made, rewards, 0, np.arange(prompt))
        began = time.perf_counter()
        trie = PrefixTrie.build(rows, rewards)
        credit = assign_one(options, trie, np.random.default_rng(seed))
        passes = Passes(
            policy, Sizes(1, PACK, 2**20, False), Progress(), [Scored(group, trie, credit)], boundary
        )
        passes.backward(Objective())
        seconds.append(time.perf_counter() - began)
        run.append(passes.num_tokens)
        trained.append(int(credit.weighted.sum()))
    # the first one warms up
    return {
        "seconds": round(median(seconds[1:]), 4),
        "tokens_run": round(float(np.mean(run[1:])), 1),
        "tokens_trained": round(float(np.mean(trained[1:])), 1),
    }


def growth(found: dict[str, Any]) -> dict[str, float]:
    """How many times the seconds of G = 8 an update takes at G = 128, by algorithm."""
    at = {point["value"]: point for point in found["points"]}
    return {name: round(at[128][name]["seconds"] / at[8][name]["seconds"], 2) for name in ALGORITHMS}


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of an update as one size grows.")
    parser.add_argument("--side", choices=CURVES, metavar="CURVE", help="one curve in this process")
    parser.add_argument("--repeats", type=int, default=3, help="updates a point, of which the first warms up")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(curve(options.side, options.repeats)))
        return
    found = alternate(__file__, {name: ["--repeats", str(options.repeats)] for name in CURVES}, 1)
    curves = {name: rows[0] for name, rows in found.items()}
    grown = {name: growth(curves[name]) for name in CURVES if name.startswith("generations")}
    print(json.dumps(grown, indent=2))
    print(f"written to {write('scaling', {'curves': curves, 'from_8_to_128': grown})}")


if __name__ == "__main__":
    main()
