"""Prompts held once against prompts copied to their completions: bytes, seconds to begin, seconds to sample.

    python benchmarks/prompts.py                 # writes benchmarks/results/prompts.json
    python benchmarks/prompts.py --updates       # only updates: what prompts begin with run once, or by each

A random model of the 0.1B shape in float32, LoRA r=16 on q_proj and v_proj of its last third. Both ways run
in this process, in turn. Random models hardly draw a token twice, so completions share their prompt only.

An update has 16 groups, each with 8 completions of 64 tokens that fork as recorded ones, behind prompts of
400 tokens, 350 of them alike.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from common import peak_memory, write
from shapes import ALPHA, LORA, SHAPES, build, completions, last_third, randomise, recorded_forks

from twig.common.progress import Progress
from twig.config.sizes import DEFAULT_SIZES
from twig.core.algorithms.base import Objective
from twig.core.algorithms.registry import algorithm
from twig.core.credit import Scored, assign_one
from twig.core.trie import PrefixTrie
from twig.core.types import Completion, Example, Group
from twig.engine import pack
from twig.engine.lora import attach
from twig.engine.policy import Policy
from twig.engine.sampler import Request, SamplingParams, sample
from twig.engine.update import Passes
from twig.engine.wave_cache import CopiedPrompts, SharedPrompts

SHAPE = "0.1b"
# case: prompts, tokens of each, of these alike, completions of each, their tokens
CASES = {
    "8 x 32 completions of 64 tokens behind 400": (8, 400, 0, 32, 64),
    "16 prompts of 400 tokens, 350 alike": (16, 400, 350, 1, 1),
    "4 x 8 completions of 64 tokens behind 20": (4, 20, 0, 8, 64),
}

UPDATES = ("t-spmo", "grpo")


def prompts_of(count: int, length: int, alike: int) -> list[np.ndarray]:
    """Returns random prompts that begin with the same `alike` tokens."""
    draw, vocabulary = np.random.default_rng(0), SHAPES[SHAPE]["vocab_size"]
    common = draw.integers(2, vocabulary, alike)
    return [np.concatenate([common, draw.integers(2, vocabulary, length - alike)]) for _ in range(count)]


def cache_bytes(policy: Policy, shared: bool, prompts: list[np.ndarray], rows: int, longest: int) -> int:
    """Returns the bytes of keys and values that a wave has room for."""
    kind = SharedPrompts if shared else CopiedPrompts
    with torch.inference_mode():
        cache = kind(policy.decoder, policy.trunk, prompts, rows, longest).cache
    parts = [tensor for part in cache.before for pair in part for tensor in pair]
    if not any(buffer is not None for buffer in cache.keys):  # made at the first token
        heads = policy.decoder.config.num_key_value_heads
        size = parts[0].shape[-1] * parts[0].element_size()
        return sum(map(bytes_of, parts)) + 2 * policy.num_layers * rows * heads * longest * size
    return sum(map(bytes_of, [*parts, *cache.keys, *cache.values]))


def bytes_of(tensor: torch.Tensor | None) -> int:
    """Returns the bytes of a tensor's numbers."""
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


@contextmanager
def sharing(policy: Policy, shared: bool) -> Iterator[None]:
    """Inside, the policy holds prompts once, or copies them."""
    before, policy.sharing_refusal = policy.sharing_refusal, None if shared else "measured"
    try:
        yield
    finally:
        policy.sharing_refusal = before


def measure(policy: Policy, case: str, rounds: int) -> dict[str, Any]:
    """Returns bytes, peak and seconds of both ways, and their ratios."""
    count, length, alike, each, tokens = CASES[case]
    prompts = prompts_of(count, length, alike)
    requests = [Request(ids, each, tokens, slot) for slot, ids in enumerate(prompts)]
    params = SamplingParams([1], decode=lambda rows: [""] * len(rows), wave_size=count * each)
    rows: dict[str, dict[str, list[float]]] = {}
    run: Callable[[], Any] = lambda: sample(policy, requests, params)  # noqa: E731
    for number in range(rounds + 1):  # the first warms up
        for shared in (True, False):
            name = "held once" if shared else "copied"
            figures = rows.setdefault(name, {"seconds": [], "peak_mib": []})
            with sharing(policy, shared), peak_memory() as peak:
                began = time.perf_counter()
                run()
                seconds = time.perf_counter() - began
            if number:
                figures["seconds"].append(round(seconds, 4))
                figures["peak_mib"].append(round(peak(), 1))
    result: dict[str, Any] = {
        name: {key: median(values) for key, values in figures.items()} for name, figures in rows.items()
    }
    for name, figures in result.items():
        figures["cache_mib"] = cache_bytes(policy, name == "held once", prompts, count * each, tokens) / 2**20
    once, copied = result["held once"], result["copied"]
    result["copied over held once"] = {key: round(copied[key] / once[key], 2) for key in once}
    return result | {"rounds": rows}


def step_of(name: str) -> tuple[list[Scored], torch.Tensor]:
    """Returns the groups of an update with their credit, and a boundary table of random numbers."""
    scored, rows, length, forks = [], 0, 64, recorded_forks(64)
    for slot, prompt in enumerate(prompts_of(16, 400, 350)):
        paths = completions(length, forks[slot % len(forks)], SHAPES[SHAPE]["vocab_size"], seed=slot)
        cells, rewards, zeros = (
            rows + np.arange(len(prompt)),
            np.arange(len(paths)) % 2 * 1.0,
            np.zeros(length),
        )
        rows += len(prompt)
        made = [
            Completion(ids, zeros, zeros, True, "", rows + n * length + np.arange(length))
            for n, ids in enumerate(paths)
        ]
        rows += length * len(paths)
        trie = PrefixTrie.build(paths, rewards)
        credit = assign_one(algorithm(name), trie, np.random.default_rng(0))
        scored.append(Scored(Group(Example(""), slot, prompt, made, rewards, 0, cells), trie, credit, slot))
    return scored, torch.randn(rows, SHAPES[SHAPE]["hidden_size"])


def measure_update(policy: Policy, name: str, rounds: int) -> dict[str, Any]:
    """Returns seconds, peak and tokens of an update both ways, and their ratios."""
    scored, boundary = step_of(name)
    result: dict[str, dict[str, Any]] = {}
    for number in range(rounds + 1):  # the first warms up
        for least, way in ((pack.LEAST_SAVED["cpu"], "shared"), (sys.maxsize, "by each group")):
            figures = result.setdefault(way, {"seconds": [], "peak_mib": []})
            with patch.dict(pack.LEAST_SAVED, cpu=least), peak_memory() as peak:
                began = time.perf_counter()
                passes = Passes(policy, DEFAULT_SIZES, Progress(), scored, boundary)
                passes.backward(Objective())
                seconds = time.perf_counter() - began
            if number:
                figures["seconds"].append(round(seconds, 4))
                figures["peak_mib"].append(round(peak(), 1))
            figures["tokens"] = passes.num_tokens
    for figures in result.values():
        figures |= {key: median(figures[key]) for key in ("seconds", "peak_mib")}
    shared, each = result["shared"], result["by each group"]
    return result | {"each over shared": {key: round(each[key] / shared[key], 2) for key in shared}}


def main() -> None:
    """Measures every case and writes the results."""
    parser = argparse.ArgumentParser(description="Prompts held once against copied prompts.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", action="store_true", help="only updates")
    options = parser.parse_args()
    policy = Policy(attach(build(SHAPE), alpha=ALPHA, layers=last_third(SHAPE), **LORA))
    randomise(policy.parameters)
    results = {}
    for case in () if options.updates else CASES:
        results[case] = measure(policy, case, options.rounds)
        print(f"{case}: {results[case]['copied over held once']}", file=sys.stderr)
    for name in UPDATES:
        results[f"update, {name}"] = measure_update(policy, name, options.rounds)
        print(f"update, {name}: {results[f'update, {name}']}", file=sys.stderr)
    if not options.updates:
        print(f"written to {write('prompts', {'cases': results})}")


if __name__ == "__main__":
    main()
