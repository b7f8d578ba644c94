"""Where the time goes: each phase of an update and of sampling against what this device can do at most.

    python benchmarks/phases.py                # writes benchmarks/results/phases.json
    python benchmarks/phases.py --shape 0.1b   # a smaller model; writes phases-0.1b.json

The update is that of `update.py`: full-token GRPO on a random Qwen2 of the 0.5B shape in float32, G = 8, a
prompt of 80 tokens, completions of 200, a pack a path, with and without the trunk's recorded output. Sampling
is 8 completions of 32 tokens by the same model, and the embedded model's 8 x 16 answers.

Floating point operations are counted by torch as they are run (matrix products and attention). Bytes are the
weights alone, in float32, once for each time that a phase goes through them: the least that must be read. The
device's limits are measured in the same process: a product of two matrices of 2048 x 2048, by torch's library
and by oneDNN, of which the faster counts, and a copy of 256 MiB (bytes read and written). A phase's limit is
the longer of its two times. Products run on the kernel that `model.kernels=auto` takes for the model here.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from common import write
from products import KERNELS, counter, resolve
from sampling import CASES, prepare
from shapes import ALPHA, LORA, SHAPES, build, completions, config_of, early_forks, last_third, randomise
from torch.utils.flop_counter import FlopCounterMode
from update import GENERATIONS, LENGTH, PROMPT, record

from twig.common.progress import Progress
from twig.config.sizes import Sizes
from twig.core.algorithms.base import Objective
from twig.core.algorithms.registry import algorithm
from twig.core.credit import Scored, assign_one
from twig.core.trie import PrefixTrie
from twig.core.types import Completion, Example, Group
from twig.engine.decoder import Decoder
from twig.engine.kernels import linear, measure, obstacle
from twig.engine.lm_head import Head
from twig.engine.lora import attach
from twig.engine.policy import Policy
from twig.engine.sampler import Request, SamplingParams, sample
from twig.engine.update import Passes
from twig.planner.choose import matrices_of

SAMPLED = 32  # tokens of each completion of the large model


class Phases:
    """Seconds, operations and passes of each phase; one inside another counts for the inner one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops: dict[str, float] = defaultdict(float)
        self.passes: dict[str, int] = defaultdict(int)
        self.counter: FlopCounterMode | None = None
        self._open: list[list[Any]] = []

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), self.counter.get_total_flops() if self.counter else 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, inner = self._now(), [0.0, 0.0]
        self._open.append(inner)
        yield
        self._open.pop()
        seconds, flops = (now - then for now, then in zip(self._now(), before, strict=True))
        self.seconds[name] += seconds - inner[0]
        self.flops[name] += flops - inner[1]
        self.passes[name] += 1
        if self._open:
            self._open[-1][0] += seconds
            self._open[-1][1] += flops

    def wrap(self, owner: type, method: str, name: Callable[..., str]) -> Any:
        """A patch of `owner.method` that counts each call for the phase `name(*arguments)`."""
        inside = getattr(owner, method)

        def counted(*arguments: Any, **kwargs: Any) -> Any:
            with self.phase(name(*arguments)):
                return inside(*arguments, **kwargs)

        return patch.object(owner, method, counted)


def limits() -> dict[str, Any]:
    """GFLOP/s of a large matrix product and GB/s of a large copy, the best of several."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    libraries = {"torch": torch.nn.functional.linear} | ({} if obstacle() else {"onednn": linear})
    source = torch.ones(2**26)
    target = torch.empty_like(source)

    def best(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(7):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return min(times)

    products = {name: 2 * 2048**3 / best(partial(run, a, b)) / 1e9 for name, run in libraries.items()}
    return {
        "gflops": max(products.values()),
        "products": products,
        "gbytes": 2 * source.numel() * 4 / best(lambda: target.copy_(source)) / 1e9,
    }


def weights(policy: Policy) -> dict[str, int]:
    """Bytes of the weights that a phase goes through once, by phase."""

    def size(modules: Any) -> int:
        return sum(p.numel() * 4 for m in modules for n, p in m.named_parameters() if "lora_" not in n)

    layers = policy.decoder.layers
    head = policy.model.get_output_embeddings().weight.numel() * 4
    upper, trunk = size(layers[policy.cut :]), size(layers[: policy.cut])
    return {"trunk": trunk, "layers": upper, "head": head, "whole": trunk + upper + head}


def update_phases(policy: Policy, shape: str, recorded: bool, rounds: int) -> list[dict[str, Any]]:
    """The phases of one update: medians over `rounds`, after one whose operations are counted."""
    vocabulary = SHAPES[shape]["vocab_size"]
    prompt = np.random.default_rng(1000).integers(2, vocabulary, PROMPT).tolist()
    rows = completions(LENGTH, early_forks(GENERATIONS), vocabulary)
    rewards = np.arange(GENERATIONS) % 2 * 1.0
    boundary = record(policy, prompt, rows) if recorded else None
    starts = PROMPT + LENGTH * np.arange(GENERATIONS)
    made = [
        Completion(ids, np.zeros(LENGTH), np.zeros(LENGTH), True, "", start + np.arange(LENGTH))
        for ids, start in zip(rows, starts, strict=True)
    ]
    cells = np.arange(PROMPT) if recorded else np.empty(0, np.int64)
    group = Group(Example(""), 0, np.array(prompt), made, rewards, 0, cells)
    cut = policy.cut

    def layers(decoder: Decoder, hidden: Any, start: int, *rest: Any) -> str:
        return "trunk" if start < cut else "layers, forward"

    def once() -> Phases:
        found = Phases()
        with ExitStack() as stack:
            if counting:
                found.counter = stack.enter_context(counter())
            stack.enter_context(found.wrap(Decoder, "run", layers))
            stack.enter_context(found.wrap(Decoder, "run_at", lambda *_: "layers, forward"))
            stack.enter_context(found.wrap(Head, "logps", lambda *_: "head, forward and gradient"))
            stack.enter_context(found.wrap(Policy, "open_stem", lambda *_: "prompt, once"))
            stack.enter_context(found.wrap(Policy, "close_stem", lambda *_: "prompt, once"))
            stack.enter_context(found.wrap(Policy, "backward", lambda *_: "layers, backward"))
            with found.phase("trie, credit, packs"):
                trie = PrefixTrie.build(rows, rewards)
                credit = assign_one(algorithm("grpo"), trie, np.random.default_rng(0))
                sizes = Sizes(0, LENGTH, policy.head_chunk, policy.checkpoint_layers)
                passes = Passes(policy, sizes, Progress(), [Scored(group, trie, credit)], boundary)
                passes.backward(Objective())
        for parameter in policy.parameters.values():
            parameter.grad = None
        return found

    counting = True
    counted = once()
    counting = False
    timed = [once() for _ in range(rounds)]
    read = weights(policy)
    packs = counted.passes["layers, backward"]
    passed = {
        "trunk": (packs + 1) * read["trunk"],
        "layers, forward": packs * read["layers"],
        "layers, backward": packs * read["layers"],
        "head, forward and gradient": 2 * packs * read["head"],
        "prompt, once": 3 * read["layers"],
    }
    return [
        line(name, median(each.seconds[name] for each in timed), counted.flops[name], passed.get(name, 0))
        for name in counted.seconds
    ]


def line(name: str, seconds: float, flops: float, read: float) -> dict[str, Any]:
    return {"phase": name, "seconds": seconds, "gflop": flops / 1e9, "gbytes": read / 1e9}


def sampling_phase(name: str, policy: Policy, requests: list, ends: list[int], rounds: int) -> dict[str, Any]:
    """Sampling as a whole."""
    steps = 0

    def once(step: int) -> float:
        nonlocal steps
        began = time.perf_counter()
        drawn = sample(
            policy,
            requests,
            SamplingParams(ends, decode=lambda rows: [""] * len(rows), wave_size=256),
            step=step,
        )
        steps = max(len(c) for found in drawn.completions for c in found)
        return time.perf_counter() - began

    with counter() as counted:
        once(0)
    seconds = median(once(0) for _ in range(rounds))
    found = line(name, seconds, counted.get_total_flops(), steps * weights(policy)["whole"])
    return found | {"steps": steps}


def sampling_phases(model: Any, shape: str, kernels: str, rounds: int) -> list[dict[str, Any]]:
    """Sampling by the large model, with packed matrices too if its kernel has them, and by the embedded."""
    prompt = np.random.default_rng(0).integers(2, SHAPES[shape]["vocab_size"], PROMPT)
    request = [Request(prompt, GENERATIONS, SAMPLED, 0)]
    name = f"{GENERATIONS} completions of {SAMPLED} tokens, {shape.upper()} shape"
    lines = [sampling_phase(name, Policy(model, kernels=kernels), request, [-1], rounds)]
    if kernels == "onednn":
        packed = Policy(model, kernels=kernels, packed_weights=True)
        lines.append(sampling_phase(f"{name}, packed", packed, request, [-1], rounds))
    model, prompts, ends = prepare("embedded")
    requests = [Request(np.array(ids), CASES["embedded"][2], 64, i) for i, ids in enumerate(prompts)]
    policy = Policy(model, kernels=resolve("auto", model.get_base_model().config))
    return [*lines, sampling_phase("8 x 16 answers, embedded model", policy, requests, ends, rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Each phase's time against the device's limits.")
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help="as model.kernels, of the shape")
    options = parser.parse_args()
    config = config_of(options.shape)
    device, kernels = limits(), resolve(options.kernels, config)
    at_load = None if obstacle() else asdict(measure(matrices_of(config.to_dict())))
    model = attach(build(options.shape), alpha=ALPHA, layers=last_third(options.shape), **LORA)
    policy = Policy(model, kernels=kernels)
    randomise(policy.parameters)
    updates = {
        name: update_phases(policy, options.shape, recorded, options.rounds)
        for name, recorded in (("trunk recorded", True), ("trunk run again", False))
    }
    sampled = sampling_phases(model, options.shape, kernels, options.rounds)
    for row in [row for rows in (*updates.values(), sampled) for row in rows]:
        row["limit"] = max(row["gflop"] / device["gflops"], row["gbytes"] / device["gbytes"])
        print(f"{row['phase']:50} {row['seconds']:8.3f} s, at least {row['limit']:8.3f}")
    result = {
        "shape": options.shape,
        "kernels": kernels,
        "limits": device,
        "measured_at_load": at_load,
        "updates": updates,
        "sampling": sampled,
    }
    path = write("phases" if options.shape == "0.5b" else f"phases-{options.shape}", result)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
