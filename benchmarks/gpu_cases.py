"""The cases of `gpu.py`, each measured in a process of its own: what `run` returns is one JSON object.

The model is Qwen2-1.5B's shape with random weights in a folder, with a new LoRA adapter on q_proj and v_proj
of the last third. A step is one prompt and a group of completions of the full length, for the end token is
suppressed; rewards are 0 and 1 in turn.
"""

import re
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from common import trl_settings
from gpu_meter import MIB, Meter, bandwidth, profiled, spread, weight_bytes
from memory import fork_late
from shapes import ALPHA, LORA, last_third

END = 1  # the end token, which is never sampled
RATE = 1e-4
# a step's metrics that the real model's case keeps
KEPT = ("reward", "answers/right", "loss", "grad_norm", "entropy", "sampling/logp_gap", "tokens/sampled")


@dataclass(frozen=True)
class Case:
    """One thing to measure: `kind` is twig, decode, generate, trl, profile, svamp or many.

    `micro` is TRL's completions in a micro-batch, `autocast` its default of mixed precision, `static` a
    compiled forward over a static cache in generate, `late` completions that part at their last token only,
    `budget` what `memory.budget` is set to. `steps` are the timed ones, 0: as many as the others. `limit` is
    the most seconds that the case may take.
    """

    kind: str
    generations: int = 8
    algorithm: str = "grpo"
    decode: str = "auto"
    quantization: str | None = None
    late: bool = False
    micro: int = 0
    autocast: bool = False
    static: bool = False
    budget: str | None = None
    steps: int = 0
    limit: int = 90


@dataclass(frozen=True)
class Options:
    """What all cases share: where the model lies, on which device, and how much is run."""

    folder: str
    shape: str
    device: str
    prompt: int
    length: int
    steps: int
    svamp: str | None = None
    svamp_data: str | None = None
    problems: int = 60
    svamp_steps: int = 4
    svamp_dtype: str = "float32"


def run(case: Case, options: Options, meter: Meter) -> dict[str, Any]:
    """Measures a case. `meter` was made before CUDA was used."""
    measure = {
        "twig": twig_step,
        "decode": twig_decode,
        "generate": generate,
        "trl": trl_step,
        "profile": profile_step,
        "svamp": svamp,
        "many": many_steps,
    }[case.kind]
    return measure(case, options, meter) | {"memory": dict(meter.memory), "peak": meter.peaks()}


def reward(completions: list[Any], **columns: Any) -> list[float]:
    """Gives 0 and 1 in turn."""
    return [float(i % 2) for i in range(len(completions))]


def answered(completions: list[Any], **columns: Any) -> list[float]:
    """Gives 1 for a completion with an answer in the form that SVAMP's prompt asks for."""
    return [float(re.search(r"####\s*-?\$?\d", text) is not None) for text in completions]


# ---- Twig -------------------------------------------------------------------------------------------------


def settings_of(case: Case, options: Options) -> Any:
    """The settings of a case, with the sizes that a run of it would have chosen, and the plan behind them."""
    from twig.config.load import Settings
    from twig.config.sizes import DEFAULT_SIZES, with_sizes
    from twig.planner.plan import budget_bytes, plan

    model = {"name": options.folder, "dtype": "bfloat16", "device": options.device}
    settings = Settings.from_dict(
        {
            "model": model | {"quantization": case.quantization},
            "task": {"name": "custom", "path": "none.jsonl"},
            "algorithm": {"name": case.algorithm},
            "rollout": {
                "prompts_per_step": 1,
                "num_generations": case.generations,
                "max_completion_length": options.length,
                "suppress_tokens": [END],
            },
            "train": {"max_steps": options.steps + 1, "learning_rate": RATE},
            "memory": {"budget": case.budget or "auto"},
        }
    )
    if options.device != "cuda":
        return with_sizes(settings, DEFAULT_SIZES.by_key()), None
    total = torch.cuda.get_device_properties(0).total_memory
    budget = budget_bytes(settings.memory.budget, total)
    found = plan(options.folder, settings, budget, "cuda", prompt_tokens=options.prompt)
    return with_sizes(settings, found.sizes.by_key()), found


def open_policy(case: Case, options: Options, settings: Any) -> tuple[Any, Any, list[int]]:
    """The policy, the tokenizer and the end tokens."""
    from twig.engine.load import end_ids, load_model
    from twig.engine.lora import attach
    from twig.engine.policy import Policy

    model, tokenizer = load_model(settings.model)
    policy = Policy(
        attach(model, alpha=ALPHA, layers=last_third(options.shape), **LORA),
        suppress_tokens=settings.rollout.suppress_tokens,
        head_chunk=settings.train.head_chunk,
        checkpoint_layers=settings.train.checkpoint_layers,
    )
    if hasattr(policy, "decode") and case.decode != "auto":
        policy.decode = case.decode
    return policy, tokenizer, end_ids(model, tokenizer)


def open_trainer(case: Case, options: Options, settings: Any) -> Any:
    """A trainer on prompts of the wanted length."""
    policy, tokenizer, ends = open_policy(case, options, settings)
    return trainer_on(policy, tokenizer, ends, options, settings)


def trainer_on(policy: Any, tokenizer: Any, ends: list[int], options: Options, settings: Any) -> Any:
    """The same with a policy that is loaded already."""
    from twig.common.progress import Progress
    from twig.core.types import Example
    from twig.engine.sampler import SamplingParams
    from twig.tasks.base import Task
    from twig.training.trainer import Trainer

    task = Task("benchmark", [Example("a" * options.prompt, {})], [], (reward,))
    sampling = SamplingParams.of(settings, tokenizer, ends)
    return Trainer(settings, policy, tokenizer, task, sampling, Progress())


def sampling_of(policy: Any) -> dict[str, Any]:
    """How a policy samples, and why not otherwise."""
    return {key: getattr(policy, key, None) for key in ("decode", "decode_refusal")}


def twig_step(case: Case, options: Options, meter: Meter) -> dict[str, Any]:
    """Whole steps of Twig after one for warming up: seconds, tokens per second, memory, the plan's word."""
    settings, plan = settings_of(case, options)
    trainer = open_trainer(case, options, settings)
    meter.note("loading")
    for number in range(options.steps + 1):
        batch = trainer.sample(number + 1)
        meter.note("sampling")
        if case.late:
            fork_late(batch)
        trainer.assign_credit(batch, number + 1)
        measured = trainer.update(batch, RATE)
        meter.note("update")
    assert measured["grad_norm"] > 0
    assert all(len(c.ids) == options.length for c in batch.groups[0].completions)
    return {
        **sampling_of(trainer.policy),
        "sizes": {key: value for key, value in vars(trainer.sizes).items()},
        "trained_tokens": measured["tokens/selected"],
        "run_tokens": measured["tokens/nodes_run"],
        "logp_gap": measured.get("sampling/logp_gap"),
        **step_figures(case.generations * options.length, meter),
        **predicted(plan, meter),
    }


def step_figures(tokens: int, meter: Meter) -> dict[str, Any]:
    """Seconds of loading, of the first step, and the spread of the others."""
    sampling, update = meter.seconds["sampling"], meter.seconds["update"]
    whole = [a + b for a, b in zip(sampling, update, strict=True)]
    return {
        "loading_seconds": round(sum(meter.seconds["loading"]), 3),
        "first": {"sampling_seconds": round(sampling[0], 3), "update_seconds": round(update[0], 3)},
        "sampling_seconds": spread(sampling[1:]),
        "update_seconds": spread(update[1:]),
        "step_seconds": spread(whole[1:]),
        "sampling_tokens_per_second": round(tokens / spread(sampling[1:])["median"], 1),
        "step_tokens_per_second": round(tokens / spread(whole[1:])["median"], 1),
    }


def predicted(plan: Any, meter: Meter) -> dict[str, Any]:
    """The plan's peaks in MiB beside the measured ones: tensors against torch's, all against the driver's."""
    if plan is None:
        return {}
    from twig.planner import phases

    outside = getattr(phases, "OUTSIDE", ("libraries",))
    phases = {phase.name: phase for phase in plan.phases if phase.name in meter.memory}
    peaks = {name: round(phase.peak / MIB, 1) for name, phase in phases.items()}
    tensors = {
        name: round(sum(item.size for item in phase.items if item.name not in outside) / MIB, 1)
        for name, phase in phases.items()
    }
    measured = meter.peaks()
    return {
        "predicted": {
            "peak": max(peaks.values()),
            "tensors": max(tensors.values()),
            "phases": peaks,
            "phases_tensors": tensors,
            "items": {
                name: {item.name: round(item.size / MIB, 1) for item in phase.items if item.size > MIB / 2}
                for name, phase in phases.items()
            },
        },
        "off_percent": {
            "peak": round(100 * (max(peaks.values()) / measured["device"] - 1), 2),
            "tensors": round(100 * (max(tensors.values()) / measured["allocated"] - 1), 2),
            "phases_tensors": {
                name: round(100 * (tensors[name] / meter.memory[name]["allocated"] - 1), 2) for name in phases
            },
        },
    }


# What `many_steps` runs: algorithm, completions, how they are sampled, and whether they part at their last
# token only.
MANY = (
    ("grpo", 8, "compiled", False),
    ("s-grpo", 8, "compiled", False),
    ("t-spmo", 8, "compiled", False),
    ("t-spmo", 8, "compiled", True),
    ("grpo", 50, "compiled", False),
    ("t-spmo", 50, "compiled", False),
    ("grpo", 16, "graph", False),
)
# Sizes of an update: tokens of a pack, logits of the head at once.
SIZES = ((1024, 2**22), (4096, 2**22), (4096, 2**24), (4096, 2**25), (4096, 2**26))


def many_steps(case: Case, options: Options, meter: Meter) -> dict[str, Any]:
    """Steps of several algorithms and group sizes on one loaded model, and updates in several sizes."""
    settings, _ = settings_of(case, options)
    policy, tokenizer, ends = open_policy(case, options, settings)
    meter.note("loading")
    found: dict[str, Any] = {}
    for algorithm, generations, decode, late in MANY:
        now = replace(case, algorithm=algorithm, generations=generations, late=late)
        policy.decode = decode
        trainer = trainer_on(policy, tokenizer, ends, options, settings_of(now, options)[0])
        own = Meter(options.device)
        for number in range(options.steps + 1):
            batch = trainer.sample(number + 1)
            own.note("sampling")
            if late:
                fork_late(batch)
            trainer.assign_credit(batch, number + 1)
            measured = trainer.update(batch, RATE)
            own.note("update")
        name = f"{algorithm}-{generations}{'-late' * late}"
        found[name] = {
            **sampling_of(policy),
            "trained_tokens": measured["tokens/selected"],
            "run_tokens": measured["tokens/nodes_run"],
            **step_figures(generations * options.length, own),
            "memory": dict(own.memory),
        }
        print(name, found[name], file=sys.stderr, flush=True)
        if (algorithm, generations) == ("grpo", 8):
            found[name]["update sizes"] = update_sizes(trainer, batch, options)
    return {"steps": found}


def update_sizes(trainer: Any, batch: Any, options: Options) -> list[dict[str, Any]]:
    """Seconds and memory of the same update by the tokens of a pack and the logits of the head at once."""
    found = []
    for pack_size, head_chunk in SIZES:
        trainer.sizes = replace(trainer.sizes, pack_size=pack_size, head_chunk=head_chunk)
        trainer.policy.head_chunk = head_chunk
        own = Meter(options.device)
        for _ in range(4):
            measured = trainer.update(batch, 0.0)
            own.note("update")
        figures = {
            "pack_size": pack_size,
            "head_chunk": head_chunk,
            "run_tokens": measured["tokens/nodes_run"],
        }
        found.append(
            {**figures, "seconds": spread(own.seconds["update"][1:]), "memory": own.memory["update"]}
        )
        print(found[-1], file=sys.stderr, flush=True)
    return found


def twig_decode(case: Case, options: Options, meter: Meter) -> dict[str, Any]:
    """Sampling alone: tokens per second, milliseconds a step, and the share of the memory's bandwidth."""
    from twig.engine.sampler import Request, SamplingParams, sample

    settings, _ = settings_of(case, options)
    policy, tokenizer, ends = open_policy(case, options, settings)
    prompt = tokenizer("a" * options.prompt, add_special_tokens=False)["input_ids"]
    meter.note("loading")

    def draw(length: int, step: int) -> Any:
        return sample(
            policy,
            [Request(np.array(prompt, np.int64), case.generations, length, 0, expected=length)],
            SamplingParams(ends, decode=lambda rows: ["" for _ in rows], wave_size=case.generations),
            step=step,
        )

    seconds = timed_lengths(draw, options, meter)
    ids = [c.ids for c in draw(options.length, 0).completions[0]]
    assert all(len(row) == options.length for row in ids)
    keys = policy.model.config
    head = getattr(keys, "head_dim", None) or keys.hidden_size // keys.num_attention_heads
    # read once a step: the prompt for all rows, and half of what each row has in the end
    cached = 4 * keys.num_hidden_layers * keys.num_key_value_heads * head
    cached *= options.prompt + case.generations * options.length / 2
    return {
        **sampling_of(policy),
        "ids_checksum": zlib.crc32(np.concatenate(ids).tobytes()),
        "cache_bytes": int(cached),
        **decode_figures(seconds, case, options, weight_bytes(policy.model)),
    }


def timed_lengths(draw: Any, options: Options, meter: Meter) -> dict[str, list[float]]:
    """Seconds of completions of the full length and of one token; the first of each apart."""
    found: dict[str, list[float]] = {}
    for name, length in (("sampling", options.length), ("one token", 1)):
        for number in range(options.steps + 1):
            draw(length, number)
            meter.note(name)
        found[name] = meter.seconds[name]
    return found


def decode_figures(
    seconds: dict[str, list[float]], case: Case, options: Options, weights: int
) -> dict[str, Any]:
    """Tokens per second, and a step's milliseconds against the time that reading the weights once takes."""
    whole, one = spread(seconds["sampling"][1:]), spread(seconds["one token"][1:])
    step = (whole["median"] - one["median"]) / (options.length - 1)
    found = {
        "first_seconds": round(seconds["sampling"][0], 3),
        "seconds": whole,
        "one_token_seconds": one,
        "tokens_per_second": round(case.generations * options.length / whole["median"], 1),
        "step_ms": round(1000 * step, 4),
        "weight_bytes": weights,
        "bytes_per_second": round(weights / step),
    }
    if options.device == "cuda":
        found["bandwidth"] = {k: round(v) if isinstance(v, float) else v for k, v in bandwidth().items()}
        rates = {k: v for k, v in found["bandwidth"].items() if isinstance(v, int)}
        found["limit_ms"] = {kind: round(1000 * weights / rate, 4) for kind, rate in rates.items()}
        found["share_of_bandwidth"] = {kind: round(weights / step / rate, 4) for kind, rate in rates.items()}
    return found


# ---- transformers and TRL ---------------------------------------------------------------------------------


def generate(case: Case, options: Options, meter: Meter) -> dict[str, Any]:
    """The same by `generate` of transformers: a growing cache, as TRL uses it, or a static compiled one."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.bfloat16).to(options.device)
    layers = last_third(options.shape)
    config = LoraConfig(task_type="CAUSAL_LM", lora_alpha=ALPHA, layers_to_transform=layers, **LORA)
    model = get_peft_model(model, config).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    prompt = tokenizer("a" * options.prompt, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt] * case.generations, device=options.device)
    meter.note("loading")
    cache = {"cache_implementation": "static"} if case.static else {"disable_compile": True}

    @torch.no_grad()
    def draw(length: int, step: int) -> Any:
        if case.static and length == 1:
            length = 2  # a length of its own would compile again
        how = GenerationConfig(
            max_new_tokens=length,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            suppress_tokens=[END],
            eos_token_id=END,
            pad_token_id=0,
            **cache,
        )
        found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
        assert found.shape == (case.generations, options.prompt + length)
        return found

    seconds = timed_lengths(draw, options, meter)
    return decode_figures(seconds, case, options, weight_bytes(model))


def trl_step(case: Case, options: Options, meter: Meter) -> dict[str, Any]:
    """Whole steps of TRL after one for warming up, timed the same way."""
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    disable_progress_bars()
    lengths: list[int] = []

    class Timed(GRPOTrainer):
        def _generate(self, *arguments: Any, **kwargs: Any) -> Any:
            meter.note("loading" if not meter.seconds["sampling"] else "between")
            found = super()._generate(*arguments, **kwargs)
            meter.note("sampling")
            return found

    class Ends(TrainerCallback):
        def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
            meter.note("update")

    def scored(completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return reward(completions)

    with tempfile.TemporaryDirectory() as output:
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.bfloat16),
            reward_funcs=scored,
            processing_class=AutoTokenizer.from_pretrained(options.folder),
            train_dataset=Dataset.from_list([{"prompt": "a" * options.prompt}] * 64),
            peft_config=LoraConfig(
                task_type="CAUSAL_LM",
                lora_alpha=ALPHA,
                layers_to_transform=last_third(options.shape),
                **LORA,
            ),
            args=trl_arguments(case, options, output),
            callbacks=[Ends()],
        )
        trainer.train()
    model = trainer.model
    assert next(model.base_model.parameters()).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad), "as Twig's adapter"
    assert any(bool(p.any()) for n, p in model.named_parameters() if "lora_B" in n), "it was trained"
    assert lengths == [options.length] * (case.generations * (options.steps + 1))
    figures = step_figures(case.generations * options.length, meter)
    between = spread(meter.seconds["between"]) if meter.seconds["between"] else None
    return {"micro_batch": case.micro, "autocast": case.autocast, **figures, "between_seconds": between}


def trl_arguments(case: Case, options: Options, output: str) -> Any:
    """TRL's settings: no checkpointing of activations, no logs, nothing else that takes time."""
    return trl_settings(
        output,
        case.generations,
        case.micro,
        num_generations=case.generations,
        max_completion_length=options.length,
        generation_kwargs={"suppress_tokens": [END]},
        learning_rate=RATE,
        max_steps=options.steps + 1,
        use_cpu=options.device == "cpu",
        bf16=case.autocast,
    )


# ---- where the time goes, and the real model --------------------------------------------------------------


def profile_step(case: Case, options: Options, meter: Meter) -> dict[str, Any]:
    """Kernels of sampling, of one decode step, of the update and of the whole step, after a warm-up."""
    settings, _ = settings_of(case, options)
    trainer = open_trainer(case, options, settings)
    meter.note("loading")
    for number in (1, 2):
        batch = trainer.sample(number)
        meter.note("sampling")
        trainer.assign_credit(batch, number)
        trainer.update(batch, RATE)
        meter.note("update")

    def update() -> None:
        trainer.assign_credit(batch, 3)
        trainer.update(batch, RATE)

    kept = []
    sampling = profiled(lambda: kept.append(trainer.sample(3)))
    batch = kept.pop()
    whole = {"sampling": sampling, "update": profiled(update)}
    whole["step"] = profiled(lambda: trainer.step(4))
    unprofiled = {key: round(1000 * meter.seconds[key][-1], 2) for key in ("sampling", "update")}
    return {
        **sampling_of(trainer.policy),
        "unprofiled_ms": unprofiled,
        # the prompt is in it too, with less than a hundredth
        "decode_step": {
            "kernels": round(sampling["kernels"] / options.length, 1),
            "device_ms": round(sampling["device_ms"] / options.length, 4),
            "busy_ms": round(sampling["busy_ms"] / options.length, 4),
            "ms": round(unprofiled["sampling"] / options.length, 4),
            "kinds": {
                kind: {k: round(v / options.length, 4) for k, v in entry.items() if k != "share"}
                | {"share": entry["share"]}
                for kind, entry in sampling["kinds"].items()
            },
        },
        "profiles": whole,
    }


def svamp(case: Case, options: Options, meter: Meter) -> dict[str, Any]:
    """A real model on SVAMP: greedy answers, a few T-SPMO steps, and the answers after them.

    So small a model is hardly ever right, so its answers' form is rewarded, which it learns in a few steps.
    """
    from twig.common.progress import Progress
    from twig.config.load import load
    from twig.config.sizes import DEFAULT_SIZES, with_sizes
    from twig.engine.load import end_ids, load_model
    from twig.engine.lora import attach
    from twig.engine.policy import Policy
    from twig.engine.sampler import SamplingParams
    from twig.evaluation.evaluate import evaluate_policy
    from twig.tasks.load import load_task
    from twig.training.trainer import Trainer

    words = f"model.name={options.svamp} model.dtype={options.svamp_dtype} model.device={options.device} "
    words += f"task.path={options.svamp_data} rollout.num_generations=8 rollout.prompts_per_step=4 "
    words += f"rollout.max_completion_length=96 train.max_steps={options.svamp_steps} train.warmup_steps=0 "
    words += "train.learning_rate=1e-3 algorithm.replay.probability=0"
    settings = with_sizes(load("svamp-qwen2.5-0.5b-instruct", words.split()), DEFAULT_SIZES.by_key())
    model, tokenizer = load_model(settings.model)
    policy = Policy(attach(model, **dict(settings.lora)))
    if hasattr(policy, "decode") and case.decode != "auto":
        policy.decode = case.decode
    task, ends = load_task(settings, reward_funcs=[answered]), end_ids(model, tokenizer)
    sampling = SamplingParams.of(settings, tokenizer, ends)
    trainer = Trainer(settings, policy, tokenizer, task, sampling, Progress())
    meter.note("loading")

    def evaluate() -> dict[str, Any]:
        found, _ = evaluate_policy(
            policy, tokenizer, task, replace(sampling, wave_size=options.problems), limit=options.problems
        )
        meter.note("evaluation")
        return found.as_dict() | found.each()

    before, steps = evaluate(), []
    for step in range(1, options.svamp_steps + 1):
        began = time.perf_counter()
        _, metrics = trainer.step(step)
        meter.note("step")
        figures = {key: metrics.get(key) for key in KEPT}
        steps.append({**figures, "seconds": round(time.perf_counter() - began, 2)})
    return {
        **sampling_of(policy),
        "dtype": options.svamp_dtype,
        "before": before,
        "after": evaluate(),
        "steps": steps,
        "evaluation_seconds": [round(s, 2) for s in meter.seconds["evaluation"]],
    }
