"""Predicted against measured memory on a CUDA device, phase by phase, and what the planner's constants are.

    python benchmarks/gpu_memory.py                      # all; writes benchmarks/results/gpu_memory.json
    python benchmarks/gpu_memory.py --budget 60          # no case begins after so many seconds
    python benchmarks/gpu_memory.py --shape tiny --device cpu   # does it run?

Each case is a process of its own, forked from one that has imported everything and never touched the device
(`--fresh`: started from nothing). Random weights are made on the device. Two steps are trained and some
problems answered, as `twig train` does, on prompts of 100 tokens and completions of 256 that never end early.
The file is written after each case; a case that fails has its `error` there.

Measured of each phase, in MiB: `allocated` and `reserved` by torch at the peak, and `outside`, what the
device has in use beside what torch reserved and what was in use before the process: the context, the code of
kernels, captured graphs; `graphs` is what of `reserved` belongs to these. Predicted: `tensors`, to be
compared with `allocated`, and `total`, with `reserved` and `outside` together.

The case `constants` has what `planner.phases.CUDA_WORKSPACE` is to be ("product", allocated); the largest
`outside` of the other cases is CUDA_CONTEXT and CUDA_GRAPH together. The case `budgets` trains under limits
around the predicted total and says where memory ran out: CUDA_RESERVE is large enough if it does not at 1.0.
"""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

# NOTE: before torch is imported. Else asking whether there is a device would make a context, which no forked
# process could use.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from common import RESULTS, write
from memory import byte_tokenizer, fork_late
from shapes import SHAPES

MIB = 2**20
PROMPT, QUESTIONS = 100, 16
_SIZES = "train.pack_size=1024 train.head_chunk=4194304"
# case: (shape, settings); 256 tokens, the last third of the layers and bfloat16 where nothing else is said
CASES: dict[str, tuple[str, str]] = {
    "constants": ("", ""),
    "grpo, 1.5b, G=8": (
        "1.5b",
        f"algorithm.name=grpo rollout.num_generations=8 rollout.prompts_per_step=1 {_SIZES}",
    ),
    "t-spmo, 1.5b, G=50": (
        "1.5b",
        f"algorithm.name=t-spmo rollout.num_generations=50 rollout.prompts_per_step=4 {_SIZES}",
    ),
    "budgets": (
        "1.5b",
        f"algorithm.name=grpo rollout.num_generations=8 rollout.prompts_per_step=4 {_SIZES}",
    ),
    "grpo, 1.5b in nf4, G=8": (
        "1.5b",
        f"algorithm.name=grpo rollout.num_generations=8 rollout.prompts_per_step=1 {_SIZES} "
        "model.quantization=nf4",
    ),
    "s-grpo, 0.5b in float32, G=16": (
        "0.5b",
        "algorithm.name=s-grpo algorithm.alpha=0 algorithm.p=0.3 algorithm.k=64 "
        f"rollout.num_generations=16 rollout.prompts_per_step=4 {_SIZES} model.dtype=float32",
    ),
    "grpo, 1.5b, G=50, layers checkpointed": (
        "1.5b",
        "algorithm.name=grpo rollout.num_generations=50 rollout.prompts_per_step=2 lora.layers=all "
        "train.pack_size=2048 train.head_chunk=4194304 train.checkpoint_layers=true",
    ),
}
# Of the predicted total; the last ones are too little for the sizes that are set, so the run has to recover.
BUDGETS = (1.0, 0.97, 0.94, 0.88)


_BAD_FORK = ("re-initialize CUDA", "initialization error")


# ---- what is measured --------------------------------------------------------------------------------------


class Device:
    """What a device has in use, in MiB; on a CPU the process's resident memory stands for it."""

    def __init__(self, name: str, before: float) -> None:
        self.name, self.before, self.phases = name, before, {}
        self.on_cuda = name.startswith("cuda")

    def reset(self) -> None:
        import torch

        if self.on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    def now(self) -> dict[str, float]:
        """What is allocated, reserved and outside at this moment."""
        import torch

        if not self.on_cuda:
            return dict.fromkeys(("allocated", "reserved", "outside"), _status("VmRSS"))
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        outside = (total - free - reserved) / MIB - self.before
        return {
            "allocated": torch.cuda.memory_allocated() / MIB,
            "reserved": reserved / MIB,
            "outside": outside,
        }

    def note(self, phase: str) -> None:
        """Records the peaks of a phase, the larger ones where it was there before."""
        import torch

        now = self.now()
        found = {"allocated": _status("VmHWM"), "reserved": _status("VmHWM")}
        if self.on_cuda:
            found = {
                "allocated": torch.cuda.max_memory_allocated() / MIB,
                "reserved": torch.cuda.max_memory_reserved() / MIB,
            }
        found |= {"outside": now["outside"], "graphs": self.graphs()}
        known = self.phases.get(phase, {})
        self.phases[phase] = {key: round(max(value, known.get(key, 0)), 1) for key, value in found.items()}
        self.reset()

    def graphs(self) -> float:
        """What captured graphs have of their own, in MiB."""
        import torch

        if not self.on_cuda:
            return 0.0
        own = [s for s in torch.cuda.memory_snapshot() if tuple(s.get("segment_pool_id", (0, 0))) != (0, 0)]
        return sum(segment["total_size"] for segment in own) / MIB


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":"))


def used_before() -> float:
    """MiB in use on the first GPU, asked of its driver's tool: this process makes no context for it."""
    command = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
    try:
        return float(subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()[0])
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return 0.0


def constants(device: Device) -> dict[str, Any]:
    """What a device takes before and beside a model's tensors, in MiB."""
    import torch

    where, found = device.name, {}

    def grown(key: str, run: Any) -> None:
        before = device.now()
        run()
        after = device.now()
        found[key] = {name: round(after[name] - before[name], 2) for name in after}

    torch.empty(1, device=where)
    found["context, at first"] = round(device.now()["outside"], 1)
    like = {"device": where, "dtype": torch.bfloat16}
    left, bias = torch.ones(256, 256, **like), torch.ones(256, **like)
    grown("product", lambda: left @ left)
    grown("product with bias", lambda: torch.addmm(bias, left, left))
    grown("batched product", lambda: torch.bmm(left[None], left[None]))
    if device.on_cuda:
        side = torch.cuda.Stream()

        def on_side() -> None:
            with torch.cuda.stream(side):
                left @ left

        grown("product on another stream", on_side)
        grown("graph of one product", lambda: _captured(left))
        props = torch.cuda.get_device_properties(where)
        found["device"] = f"{props.name}, {props.total_memory / 2**30:.1f} GiB"
        found["allocator"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    weight = torch.ones(256, 256, **like, requires_grad=True)
    grown("backward", lambda: (left @ weight).sum().backward())
    found["context, at last"] = round(device.now()["outside"], 1)
    return found


_KEPT: list[Any] = []  # graphs that are to stay


def _captured(left: Any) -> None:
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = left @ left
    _KEPT.extend((graph, result))


# ---- a run -------------------------------------------------------------------------------------------------


def settings_of(case: str, options: argparse.Namespace, *more: str) -> Any:
    """The settings of a case, with the sizes that it leaves open at what the planner would take."""
    from twig.config.load import Settings

    words = CASES[case][1].split()
    on_cuda = options.device.startswith("cuda")
    values = {
        "model": {"name": "random", "device": options.device, "dtype": "bfloat16" if on_cuda else "float32"},
        "task": {"name": "custom", "path": "none.jsonl"},
        "rollout": {
            "max_completion_length": 256 if on_cuda else 24,
            "suppress_tokens": [1],  # no completion ends early
            "decode": "auto" if on_cuda else "graph",
        },
        "train": {"max_steps": 2, "checkpoint_layers": False},
        "eval": {"batch_size": QUESTIONS, "limit": QUESTIONS},
    }
    if options.device == "cpu":
        words = [word for word in words if "quantization" not in word and "dtype" not in word]
    if options.decode:
        words.append(f"rollout.decode={options.decode}")
    settings = Settings.from_dict(values, words)
    rollout = settings.rollout
    size = min(rollout.num_generations * rollout.prompts_per_step, 256)
    return Settings.from_dict(values, [*words, f"rollout.wave_size={size}", *more])


def config_of(case: str, options: argparse.Namespace) -> Any:
    from transformers import Qwen2Config

    shape = SHAPES[options.shape or CASES[case][0]]
    if options.shape == "tiny":
        shape = shape | {"vocab_size": 300}
    return Qwen2Config(**shape, tie_word_embeddings=True, eos_token_id=1, pad_token_id=0, bos_token_id=2)


def build(case: str, settings: Any, options: argparse.Namespace) -> Any:
    """A random model on the device, quantised there if the case asks for it."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    dtype = getattr(torch, settings.model.dtype)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config_of(case, options), dtype=dtype)
    model = model.to(options.device).eval().requires_grad_(False)
    if settings.model.quantization is not None:
        quantise(model, dtype)
    if options.device != "cpu":
        torch.cuda.empty_cache()
    return model


def quantise(model: Any, dtype: Any) -> None:
    """Makes the matrices of the layers 4-bit ones, one after another, as loading with nf4 does."""
    import bitsandbytes as bnb
    import torch

    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, module in list(parent.named_children()):
                if not isinstance(module, torch.nn.Linear):
                    continue
                bias = module.bias is not None
                made = bnb.nn.Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=bias,
                    compute_dtype=dtype,
                    compress_statistics=True,
                    quant_type="nf4",
                    device="meta",
                )
                weight = bnb.nn.Params4bit(
                    module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
                )
                made.support_avx512bf16_for_cpu = False  # as in models.load_model
                made.weight = weight.to(module.weight.device)
                if bias:
                    made.bias = torch.nn.Parameter(module.bias.data, requires_grad=False)
                setattr(parent, name, made)
    model.is_loaded_in_4bit = model.is_quantized = True


def trainer_of(case: str, settings: Any, options: argparse.Namespace, progress: Any = None) -> Any:
    """A trainer on a random model and its problems, whose rewards alternate."""
    from twig.common.progress import Progress
    from twig.core.types import Example
    from twig.engine.load import end_ids
    from twig.engine.lora import attach
    from twig.engine.policy import Policy
    from twig.engine.sampler import SamplingParams
    from twig.tasks.base import Task
    from twig.training.trainer import Trainer

    model, tokenizer, lora = build(case, settings, options), byte_tokenizer(), settings.lora
    if options.meter is not None:
        options.meter.reset()
    policy = Policy(
        attach(model, r=lora.r, alpha=lora.alpha, target_modules=lora.target_modules, layers=lora.layers),
        suppress_tokens=settings.rollout.suppress_tokens,
        head_chunk=settings.train.head_chunk,
        checkpoint_layers=settings.train.checkpoint_layers,
        decode=settings.rollout.decode,
    )

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    examples = [Example("a" * PROMPT, {}) for _ in range(64)]
    task = Task("memory", examples, examples[:QUESTIONS], (reward,))
    sampling = SamplingParams.of(settings, tokenizer, end_ids(model, tokenizer))
    return Trainer(settings, policy, tokenizer, task, sampling, progress or Progress())


def run(case: str, device: Device, options: argparse.Namespace) -> dict[str, Any]:
    """A case's peaks, measured and predicted."""
    from twig.evaluation.evaluate import evaluate_policy

    settings = settings_of(case, options)
    trainer = trainer_of(case, settings, options)
    policy = trainer.policy
    device.note("loading")
    for step in (1, 2):
        batch = trainer.sample(step)
        device.note("sampling")
        if settings.algorithm.name == "t-spmo":
            fork_late(batch)
        trainer.assign_credit(batch, step)
        done = trainer.update(batch, 1e-4)
        device.note("update")
        del batch
    evaluate_policy(policy, trainer.tokenizer, trainer.task, replace(trainer.sampling, wave_size=QUESTIONS))
    device.note("evaluation")
    assert done["grad_norm"] > 0
    predicted, measured = predict(case, settings, options), device.phases
    peak = max(m["reserved"] + m["outside"] for m in measured.values())
    return {
        "settings": CASES[case][1],
        "decode": [policy.decode, policy.decode_refusal],
        "measured": measured,
        "predicted": predicted,
        "off_percent": {
            phase: _off(predicted["tensors"][phase], found["allocated"]) for phase, found in measured.items()
        },
        "total": {"measured": round(peak, 1), "predicted": predicted["total"]},
        "off_percent_total": _off(predicted["total"], peak),
    }


def _off(predicted: float, measured: float) -> float:
    return round(100 * (predicted / max(measured, 1e-9) - 1), 1)


def predict(case: str, settings: Any, options: argparse.Namespace) -> dict[str, Any]:
    """What the planner says for the case, in MiB."""
    from twig.planner.model_shape import Shape
    from twig.planner.phases import Footprint
    from twig.planner.plan import plan, workload_of

    config = json.loads(config_of(case, options).to_json_string())
    of = {"prompt_tokens": PROMPT, "questions": QUESTIONS}
    found = plan(config, settings, 2**40, "cuda", **of)
    work = workload_of(Shape.from_config(config), settings, "cuda", PROMPT, QUESTIONS)
    tensors = Footprint(work, found.sizes, tensors=True).phases()
    return {
        "tensors": {phase.name: round(phase.peak / MIB, 1) for phase in tensors},
        "total": round(found.peak / MIB, 1),
        "trained": round(max(phase.peak for phase in found.phases[:3]) / MIB, 1),
        "items": {p.name: {i.name: round(i.size / MIB, 1) for i in p.items} for p in found.phases},
    }


def run_budgets(case: str, device: Device, options: argparse.Namespace) -> dict[str, Any]:
    """One model trained under several limits: which steps ran out of memory, and what was reserved."""
    import torch

    from twig.common.progress import Progress
    from twig.planner.phases import CUDA_OUTSIDE
    from twig.runtime.memory_use import PeakMemory

    heard: list[str] = []

    class Heard(Progress):
        def message(self, text: str) -> None:
            heard.append(text)

    settings = settings_of(case, options)
    total = predict(case, settings, options)["trained"]
    trainer, found = trainer_of(case, settings, options, Heard()), {}
    for number, share in enumerate(BUDGETS):
        trainer.policy.release()
        gc.collect()
        if device.on_cuda:
            torch.cuda.empty_cache()
        device.reset()
        heard.clear()
        before = replace(trainer.sizes)
        began = time.perf_counter()
        with PeakMemory(options.device) as memory:
            memory.limit(round(share * total * MIB) - CUDA_OUTSIDE)
            for step in (1, 2):  # the second one with what the first one keeps
                try:
                    batch = trainer.sample(step)
                    trainer.assign_credit(batch, step)
                    trainer.update(batch, 1e-4)
                except Exception as error:  # goes into the file
                    heard.append(f"{type(error).__name__}: {error}"[:300])
                    break
        device.note(f"budget {number}")
        found[f"{share:g}"] = {
            "limit": round(share * total),
            "seconds": round(time.perf_counter() - began, 2),
            "said": list(heard),
            "sizes": dict(vars(trainer.sizes)),
            **device.phases[f"budget {number}"],
        }
        batch = None
        trainer._use(before)
    return {"settings": CASES[case][1], "predicted": total, "budgets": found}


# ---- processes ---------------------------------------------------------------------------------------------


def measure(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """A case in this process."""
    device = Device(options.device, options.before)
    options.meter, began = device, time.perf_counter()
    try:
        device.reset()
        runs = {"constants": lambda: constants(device), "budgets": lambda: run_budgets(case, device, options)}
        found = runs.get(case, lambda: run(case, device, options))()
    except Exception as error:
        words = "".join(traceback.format_exception(error))
        found = {"error": words[-3000:], "measured": device.phases}
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def forked(case: str, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    """A case in a process that has what this one imported."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                Path(file.name).write_text(json.dumps(measure(case, options)), encoding="utf-8")
            finally:
                os._exit(0)
        ends = time.monotonic() + limit
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.monotonic() > ends:
                os.kill(child, 9)
                os.waitpid(child, 0)
                return {"error": f"stopped after {limit:.0f} seconds"}
            time.sleep(0.05)
        return json.loads(file.read() or '{"error": "ended without a word"}')


def started(case: str, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    """A case in a process started from nothing."""
    words = ["--side", case, "--device", options.device, "--before", str(options.before)]
    words += [w for key in ("shape", "decode") if (v := getattr(options, key)) for w in (f"--{key}", v)]
    try:
        done = subprocess.run(
            [sys.executable, os.path.abspath(__file__), *words], capture_output=True, text=True, timeout=limit
        )
        return json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {limit:.0f} seconds"}
    except (IndexError, ValueError):
        return {"error": done.stderr[-3000:]}


def import_everything() -> None:
    """Imports what the cases need and nothing that touches the device, as bitsandbytes does."""
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    import torch
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    import twig.evaluation.evaluate
    import twig.training.train  # noqa: F401

    assert not torch.cuda.is_initialized()


def save(options: argparse.Namespace, result: dict[str, Any]) -> Path:
    """Writes the results, with what is known of where they are from."""
    try:
        path = write(options.name, result)
    except Exception as error:  # without git or a package that is named there
        path = RESULTS / f"{options.name}.json"
        path.write_text(json.dumps({"about": f"unknown: {error}"} | result, indent=2), encoding="utf-8")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, options.out)
    return path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Predicted against measured memory on a CUDA device.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, help="of every case")
    parser.add_argument("--decode", help="rollout.decode of every case")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds")
    parser.add_argument("--fresh", action="store_true", help="start every process from nothing")
    parser.add_argument("--name", default="gpu_memory", help="of the file of results")
    parser.add_argument("--out", type=Path, help="a folder that gets a copy of the file after each case")
    parser.add_argument("--side", choices=CASES, help="measure one case in this process")
    parser.add_argument("--before", type=float, default=0.0, help="MiB in use on the device before")
    options = parser.parse_args()
    options.meter = None
    return options


def main() -> None:
    options, began = parse(), time.monotonic()
    if options.side:
        stdout, sys.stdout = sys.stdout, sys.stderr
        print(json.dumps(measure(options.side, options)), file=stdout)
        return
    if options.device != "cpu":
        options.before = used_before()
    if not options.fresh:
        import_everything()
    results: dict[str, Any] = {"before_mib": options.before}
    cases: dict[str, Any] = {}
    for case in options.cases:
        left = options.budget - (time.monotonic() - began)
        if left <= 0:
            cases[case] = {"error": "not begun: the seconds of --budget were over"}
            continue
        fresh = options.fresh or "nf4" in case
        cases[case] = (started if fresh else forked)(case, options, min(left + 20, 300))
        if not fresh and any(words in cases[case].get("error", "") for words in _BAD_FORK):
            options.fresh = True
            cases[case] = started(case, options, min(left + 20, 300))
        path = save(options, results | {"cases": cases})
        shown = {k: v for k, v in cases[case].items() if k not in ("settings", "predicted")}
        print(f"{case}: {json.dumps(shown)}", flush=True)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
