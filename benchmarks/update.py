"""One update, Twig against TRL, at equal gradients: seconds and memory, fresh processes in turn.

    python benchmarks/update.py                        # every case; writes benchmarks/results/update.json
    python benchmarks/update.py --frontier             # seconds against memory; writes frontier.json
    python benchmarks/update.py --shape 0.1b           # a smaller model; writes update-0.1b.json
    python benchmarks/update.py --shape qwen3.5-0.8b   # a hybrid; writes update-qwen3.5-0.8b.json
    python benchmarks/update.py --shape pythia-160m    # the plain engine; writes update-pythia-160m.json
    python benchmarks/update.py --length 2048 --cases GRPO "GRPO, layers checkpointed" --rounds 1
    python benchmarks/update.py --columns "same kernel"            # without TRL as it comes
    python benchmarks/update.py --side twig --algorithm t-spmo     # one side, one process, one JSON line

A random Qwen2 of the 0.5B shape in float32, G = 8, prompt of 80 tokens, completions of 200, LoRA r=16 on
q_proj and v_proj of the last third with random matrices, temperature 1, beta 0. TRL computes full-token GRPO
(`loss_type="grpo"`) in micro-batches; its time is from the first `compute_loss` to the optimizer step. Where
both sides compute the same thing, the adapter gradients are compared in the same run. Twig's time is from
rewards to gradient: trie, credit, packs, forward and backward. Memory is the growth of resident memory, at
its peak, over what it was just before.

There are two columns: TRL as it comes, and TRL with every product with a frozen matrix on the kernel that
Twig takes (`products.trl_products`). In each, seconds are against the fastest TRL and memory is against the
smallest. Where Twig takes torch's kernel both are the same, and TRL is measured once. With shapes of other
types TRL also runs four completions at once.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import AS_IT_COMES, SAME_KERNEL, alternate, medians, peak_memory, ratio, trl_settings, write
from products import KERNELS, resolve, trl_products
from safetensors.torch import load_file, save_file
from shapes import (
    ALPHA,
    LORA,
    OTHER_SHAPES,
    SHAPES,
    TARGETS,
    build,
    completions,
    config_of,
    early_forks,
    last_third,
    randomise,
    recorded_forks,
    size_of,
)

PROMPT, LENGTH, GENERATIONS = 80, 200, 8  # tokens, tokens unless another --length is asked for
CHECKPOINTED = "--checkpoint-layers"
T_SPMO = ["--algorithm", "t-spmo", "--forks", "recorded"]
SMALL = ["--head-chunk", str(2**18)]
COLUMNS = (SAME_KERNEL, AS_IT_COMES)
REFERENCE = "GRPO, torch's kernel"
# Twig's cases by name. What TRL does is the same for all: it runs every token of every completion.
CASES: dict[str, list[str]] = {
    "GRPO": [],
    REFERENCE: ["--kernels", "torch"],
    "GRPO, trunk run again": ["--no-recorded"],
    "GRPO, layers checkpointed": [CHECKPOINTED, *SMALL],
    "S-GRPO, 30 % of the tokens": ["--algorithm", "s-grpo"],
    "S-GRPO, layers checkpointed": ["--algorithm", "s-grpo", CHECKPOINTED, *SMALL],
    "T-SPMO": T_SPMO,
    "T-SPMO, layers checkpointed": [*T_SPMO, CHECKPOINTED, *SMALL],
}
PLAIN = ["--engine", "plain", "--no-recorded"]
# As a run whose plan is tight: what is freed goes back to the system at once, which takes time.
RETURNED = {
    f"{name}, layers checkpointed, freed memory returned": [*words, CHECKPOINTED, *SMALL, "--return-freed"]
    for name, words in (("GRPO", []), ("T-SPMO", T_SPMO))
}
# The same of types that only the plain engine serves.
PLAIN_CASES = {
    f"GRPO, {rows} at once": [*PLAIN, "--pack-size", str(rows * (PROMPT + LENGTH))] for rows in (1, 4)
}
# The cases that are measured unless others are asked for.
DEFAULT_CASES = {
    "qwen3.5-0.8b": [
        *("GRPO", "GRPO, layers checkpointed", "T-SPMO", "T-SPMO, layers checkpointed"),
        *RETURNED,
    ],
    "pythia-160m": list(PLAIN_CASES),
}
TRL = {"TRL": ["--micro-batch", "1"], "TRL, checkpointing": ["--micro-batch", "1", "--checkpointing"]}
TRL_OTHER_SHAPES = TRL | {"TRL, 4 at once": ["--micro-batch", "4"]}
# What each side can trade between seconds and memory.
FRONTIER = {
    **{
        f"TRL, {size} at once{', checkpointing' * again}": [
            *("--side", "trl", "--micro-batch", str(size)),
            *["--checkpointing"] * again,
        ]
        for again in (False, True)
        for size in (8, 4, 2, 1)
    },
    **{
        f"Twig, packs of {paths} paths{', checkpointed' * again}": [
            *("--side", "twig", "--pack-size", str(paths * 200)),
            *(["--checkpoint-layers", *SMALL] if again else []),
        ]
        for again in (False, True)
        for paths in (8, 4, 2, 1)
    },
}
S_GRPO = {"alpha": 0, "p": 0.3}  # 30 % of the tokens, wherever they are


def groups_of(options: argparse.Namespace) -> list[tuple[list[int], list[np.ndarray], np.ndarray]]:
    """(prompt, completions, rewards) per update; every other completion is right."""
    vocabulary = size_of(options.shape)["vocab_size"]
    found = []
    forks = [early_forks(GENERATIONS)] if options.forks == "early" else recorded_forks(options.length)
    for number, each in enumerate(forks[: options.groups]):
        prompt = np.random.default_rng(1000 + number).integers(2, vocabulary, PROMPT).tolist()
        rows = completions(options.length, each, vocabulary, seed=number)
        found.append((prompt, rows, np.arange(GENERATIONS) % 2 * 1.0))
    return found


def twig_side(options: argparse.Namespace) -> dict[str, float]:
    from twig.common.progress import Progress
    from twig.config.sizes import Sizes
    from twig.core.algorithms.base import Objective
    from twig.core.algorithms.registry import algorithm
    from twig.core.credit import Scored, assign_one
    from twig.core.trie import PrefixTrie
    from twig.core.types import Completion, Example, Group
    from twig.engine.build import ENGINES
    from twig.engine.lora import attach
    from twig.engine.update import Passes
    from twig.runtime.memory_use import return_freed_memory

    if options.return_freed:
        return_freed_memory(2**18, for_good=True)
    model = build(options.shape)
    lora = LORA | ({"target_modules": TARGETS[options.shape]} if options.engine == "plain" else {})
    peft_model = attach(model, alpha=ALPHA, layers=last_third(options.shape), **lora)
    policy = ENGINES[options.engine](
        peft_model,
        checkpoint_layers=options.checkpoint_layers,
        head_chunk=options.head_chunk,
        kernels=resolve(options.kernels, model.config),
    )
    randomise(policy.parameters)
    extra = S_GRPO | {"k": options.length} if options.algorithm == "s-grpo" else {}
    rule = algorithm(options.algorithm, **extra)
    seconds, memory, targets, run = [], [], [], []
    for prompt, rows, rewards in groups_of(options):
        length = options.length
        offsets = len(prompt) + length * np.arange(GENERATIONS)
        made = [
            Completion(ids, np.zeros(length), np.zeros(length), True, "", start + np.arange(length))
            for ids, start in zip(rows, offsets, strict=True)
        ]
        cells = np.arange(len(prompt)) if options.recorded else np.empty(0, np.int64)
        group = Group(Example(""), 0, np.array(prompt), made, rewards, 0, cells)
        boundary = record(policy, prompt, rows) if options.recorded else None
        with peak_memory() as measured:
            began = time.perf_counter()
            trie = PrefixTrie.build(rows, rewards)
            credit = assign_one(rule, trie, np.random.default_rng(0))
            sizes = Sizes(
                0, options.pack_size or options.length, options.head_chunk, options.checkpoint_layers
            )
            passes = Passes(policy, sizes, Progress(), [Scored(group, trie, credit)], boundary)
            passes.backward(Objective())
            seconds.append(time.perf_counter() - began)
        memory.append(measured())
        targets.append(int(credit.weighted.sum()))
        run.append(passes.num_tokens)
        gradient = {n: p.grad.clone() for n, p in policy.parameters.items() if p.grad is not None}
        for parameter in policy.parameters.values():
            parameter.grad = None
    if options.gradient:
        save_file(gradient, options.gradient)
    return summary(seconds, memory) | {"trained": float(np.mean(targets)), "run": float(np.mean(run))}


def summary(seconds: list[float], memory: list[float]) -> dict[str, float]:
    return {"seconds": round(float(np.mean(seconds)), 3), "mib": round(max(memory), 1)}


@torch.no_grad()
def record(policy: Any, prompt: list[int], rows: list[np.ndarray]) -> torch.Tensor:
    """The boundary table that sampling would have recorded: the prompt's cells, then each completion's."""
    from twig.engine.kv_cache import StopForward

    table, reached = [], []

    def stop(layer: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        reached.append(arguments[0][0])
        raise StopForward

    hook = policy.decoder.layers[policy.cut].register_forward_pre_hook(stop)
    with policy.computing():
        for row in rows:
            with suppress(StopForward):
                policy.model(input_ids=torch.tensor([[*prompt, *row.tolist()]]), use_cache=False)
            hidden = reached.pop()
            table += [hidden[: len(prompt)]] * (not table) + [hidden[len(prompt) :]]
    hook.remove()
    return torch.cat(table)


def trl_side(options: argparse.Namespace) -> dict[str, float]:
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    disable_progress_bars()
    prompt, rows, rewards = groups_of(options)[0]
    began, seconds, memory, gradient = [], [], [], {}
    measuring = peak_memory()

    class Timed(GRPOTrainer):
        def compute_loss(self, *arguments: Any, **kwargs: Any) -> Any:
            if not began:
                memory.append(measuring.__enter__())
                began.append(time.perf_counter())
            return super().compute_loss(*arguments, **kwargs)

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any
        ) -> None:
            seconds.append(time.perf_counter() - began[0])
            memory.append(memory.pop()())
            gradient.update({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

    def rollout(prompts: list, trainer: Any) -> dict[str, list]:
        return {
            "prompt_ids": [prompt] * len(prompts),
            "completion_ids": [rows[i % GENERATIONS].tolist() for i in range(len(prompts))],
            "logprobs": None,
        }

    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model=build(options.shape),
            reward_funcs=lambda completion_ids, **columns: rewards.tolist(),
            processing_class=tokenizer(),
            train_dataset=Dataset.from_list([{"prompt": "a"}] * GENERATIONS),
            rollout_func=rollout,
            callbacks=[Watch()],
            peft_config=LoraConfig(
                task_type="CAUSAL_LM",
                lora_alpha=ALPHA,
                layers_to_transform=last_third(options.shape),
                **LORA | {"target_modules": TARGETS.get(options.shape, LORA["target_modules"])},
            ),
            args=trl_settings(
                folder,
                GENERATIONS,
                options.micro_batch,
                num_generations=GENERATIONS,
                max_completion_length=options.length,
                learning_rate=1e-6,
                max_grad_norm=0.0,
                max_steps=1,
                activation_checkpointing=options.checkpointing,
            ),
        )
        randomise({n: p for n, p in trainer.model.named_parameters() if p.requires_grad})
        with trl_products(trainer.model, options.kernels):
            trainer.train()
    if options.gradient:
        save_file(gradient, options.gradient)
    return summary(seconds, memory)


def tokenizer() -> Any:
    """TRL asks for one; the tokens come from `rollout`."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="a"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="a"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Seconds and memory of one update: Twig against TRL.")
    parser.add_argument("--cases", nargs="+", choices=CASES | RETURNED | PLAIN_CASES, metavar="CASE")
    parser.add_argument("--rounds", type=int, default=3, help="processes a side")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=COLUMNS, metavar="COLUMN")
    parser.add_argument(
        "--kernels",
        choices=KERNELS,
        default="auto",
        help="of Twig's products, as model.kernels; with --side trl: of TRL's, where auto is as it comes",
    )
    parser.add_argument("--frontier", action="store_true", help="each side at each of its sizes")
    parser.add_argument("--side", choices=("twig", "trl"), help="run one side in this process")
    parser.add_argument("--shape", choices=SHAPES | OTHER_SHAPES, default="0.5b")
    parser.add_argument("--engine", choices=("trie", "plain"), default="trie", help="of Twig's side")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a completion")
    parser.add_argument(
        "--algorithm", default="grpo", choices=("grpo", "s-grpo", "t-spmo"), help="of Twig's side"
    )
    parser.add_argument("--forks", choices=("early", "recorded"), default="early")
    parser.add_argument("--groups", type=int, default=10, help="updates, where forks are recorded")
    parser.add_argument(
        "--recorded", action=argparse.BooleanOptionalAction, default=True, help="the trunk's output"
    )
    parser.add_argument("--checkpoint-layers", action="store_true", help="Twig: run the upper layers again")
    parser.add_argument("--return-freed", action="store_true", help="Twig: return freed memory to the system")
    parser.add_argument("--pack-size", type=int, help="Twig's tokens a pack, by default a completion's")
    parser.add_argument("--head-chunk", type=int, default=2**22, help="Twig's logits at once")
    parser.add_argument("--micro-batch", type=int, default=1, help="TRL's completions per backward pass")
    parser.add_argument("--checkpointing", action="store_true", help="TRL: its activation checkpointing")
    parser.add_argument("--gradient", help="file for the adapter's gradient")
    options = parser.parse_args()
    options.cases = options.cases or DEFAULT_CASES.get(options.shape, list(CASES))
    return options


def gap(*files: Path) -> float:
    """The largest difference of two gradients, relative to the largest entry of the second."""
    ours, theirs = map(load_file, files)
    assert ours.keys() == theirs.keys()
    largest = max(float(g.abs().max()) for g in theirs.values())
    return max(float((ours[n] - g).abs().max()) for n, g in theirs.items()) / largest


def columns_of(options: argparse.Namespace, kernels: str) -> dict[str, dict[str, list[str]]]:
    """TRL's sides in each column, by name, with their words."""
    trl = TRL_OTHER_SHAPES if options.shape in OTHER_SHAPES else TRL
    unchanged = {side: [*words, "--kernels", "torch"] for side, words in trl.items()}
    same = {f"{side}, same kernel": [*words, "--kernels", "onednn"] for side, words in trl.items()}
    columns = {SAME_KERNEL: same if kernels == "onednn" else unchanged, AS_IT_COMES: unchanged}
    return {column: columns[column] for column in options.columns}


def sides_of(options: argparse.Namespace, kernels: str) -> dict[str, list[str]]:
    """The words of each side: those of TRL that the columns need, and Twig's cases on `kernels`."""
    sides = {
        name: ["--side", "trl", *words]
        for trl in columns_of(options, kernels).values()
        for name, words in trl.items()
    }
    for case in options.cases:
        if case == REFERENCE and kernels == "torch":
            continue  # all of Twig's rows use it
        sides[case] = ["--side", "twig", *(CASES | RETURNED | PLAIN_CASES)[case]]
        if "--kernels" not in sides[case]:
            sides[case] += ["--kernels", kernels]
    of = ["--shape", options.shape, "--length", str(options.length)]
    return {name: [*words, *of] for name, words in sides.items()}


def compare(options: argparse.Namespace, kernels: str) -> dict[str, Any]:
    """Every case of Twig's against TRL's best seconds and TRL's smallest memory, in each column."""
    sides = sides_of(options, kernels)
    first = next(iter(sides))
    with tempfile.TemporaryDirectory() as folder:
        files = {
            name: Path(folder) / f"{name}.safetensors"
            for name, words in sides.items()
            if "--algorithm" not in words  # all of these compute the same gradient
        }
        for name, file in files.items():
            sides[name] += ["--gradient", str(file)]
        processes = alternate(__file__, sides, options.rounds)
        gaps = {name: gap(file, files[first]) for name, file in files.items() if name != first}
    middle = {name: medians(rows) for name, rows in processes.items()}
    result: dict[str, Any] = {"medians": middle, "gradient_gaps": gaps, "gradients_against": first}
    result |= {"trl_fastest": {}, "trl_smallest": {}, "trl_over_twig": {}}
    for column, trl in columns_of(options, kernels).items():
        fastest = min(trl, key=lambda name: middle[name]["seconds"])
        smallest = min(trl, key=lambda name: middle[name]["mib"])
        result["trl_fastest"][column], result["trl_smallest"][column] = fastest, smallest
        result["trl_over_twig"][column] = {
            name: {
                "seconds": ratio(rows, processes[fastest], "seconds"),
                "mib": ratio(rows, processes[smallest], "mib"),
            }
            for name, rows in processes.items()
            if name in options.cases and not (name == REFERENCE and column == SAME_KERNEL)
        }
    return result | {"processes": processes}


def frontier(options: argparse.Namespace, kernels: str) -> dict[str, Any]:
    """Seconds and memory of each side at each of its sizes, both on `kernels`."""
    sides = {
        name: [*words, "--shape", options.shape, "--kernels", kernels] for name, words in FRONTIER.items()
    }
    processes = alternate(__file__, sides, options.rounds)
    return {"medians": {name: medians(rows) for name, rows in processes.items()}, "processes": processes}


def main() -> None:
    options = parse()
    if options.side:
        # what the libraries print must not get between us and the JSON line
        stdout, sys.stdout = sys.stdout, sys.stderr
        print(json.dumps((twig_side if options.side == "twig" else trl_side)(options)), file=stdout)
        return
    kernels = resolve(options.kernels, config_of(options.shape))
    result = (frontier if options.frontier else compare)(options, kernels)
    for column, cases in result.get("trl_over_twig", {}).items():
        for name, more in cases.items():
            print(f"{name}: TRL, {column}, takes {more['seconds']['median']:.2f} times as long", end=", ")
            print(f"{more['mib']['median']:.2f} times the memory")
    name = "frontier" if options.frontier else "update"
    name += "" if options.shape == "0.5b" else f"-{options.shape}"
    name += "" if options.length == LENGTH else f"-{options.length}"
    head = {"shape": options.shape, "length": options.length, "kernels": kernels}
    print(f"written to {write(name, head | result)}")


if __name__ == "__main__":
    main()
