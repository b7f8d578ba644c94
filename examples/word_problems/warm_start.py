"""Teaches a small language model arithmetic and word problems, as the base of reinforcement learning.

    python warm_start.py train --base BASE --mawps MAWPS --output warm        # resumes if it was stopped
    python warm_start.py choose --base BASE --checkpoints warm --svamp SVAMP  # which checkpoint to take
    python warm_start.py pack --base BASE --checkpoint warm/checkpoint-1500 --output adapter
    python warm_start.py merge --base BASE --adapter adapter --output base

BASE is a GGUF file, a folder or an id on the Hub. `train` is TRL's SFTTrainer with a PEFT LoRA adapter on all
linear modules. `merge` needs only the small adapter that `pack` writes, and gives the same bytes
on every machine. Nothing here is part of the package.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from problems import (
    PROMPT,
    Problem,
    arrange,
    held_out_problems,
    multiply,
    products,
    read_mawps,
    training_problems,
)

from twig.common.errors import UserError
from twig.common.files import put_folder, write_whole

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # of the base on the Hub
LARGEST = 15_000_000  # bytes of a packed adapter
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CHECKSUMS, CARD, MERGED = "CHECKSUMS.json", "README.md", "model.safetensors"
ARGUMENTS, STATE, CHOICE = "arguments.json", "trainer_state.json", "choice.json"
FIRST_TOKENS = 8  # of an answer: its first operands and operation
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# What an adapter may not have: the merge would need more than B A alpha / r.
_UNSUPPORTED = (
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "fan_in_fan_out",
)


# ---- train -------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    """Trains an adapter; resumes from the last whole checkpoint if the output folder has one."""
    output = Path(args.output)
    _keep_arguments(output, args)
    checkpoint = last_checkpoint(output)
    if checkpoint is not None and _step_of(checkpoint) >= args.steps:
        print(f"{checkpoint} is there: nothing to train")
        return
    data = _products(args) if args.problems == "products" else _words(args)
    # PEFT looks for the base's config beside a GGUF file; TRL uses older names of transformers' settings.
    warnings.filterwarnings("ignore", message="Could not find a config file", category=UserWarning)
    warnings.filterwarnings(
        "ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning
    )
    trainer = trainer_of(args, *data)
    if checkpoint is not None:
        print(f"resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    print(f"done: {output / f'checkpoint-{args.steps}'}")


def _words(args: argparse.Namespace) -> tuple[list[Problem], list[Problem]]:
    """Returns word problems and sums to train on, in their order, and some that are held out."""
    if args.mawps is None:
        raise UserError("--mawps", "word problems are made from MAWPS", "Pass the folder of its CSV files")
    mawps = read_mawps(args.mawps)
    templates = mawps.templates
    print(f"MAWPS: {len(templates)} problems; left out: {mawps.wrong} wrong, {mawps.in_svamp} in SVAMP")
    drills = args.drill_steps * args.batch_size
    problems = training_problems(
        templates, args.steps * args.batch_size - drills, args.word_share, args.seed, drills
    )
    problems = problems[:drills] + arrange(problems[drills:], args.batch_size, args.seed)
    return problems, held_out_problems(templates, 100, args.seed)


def _products(args: argparse.Namespace) -> tuple[list[Problem], list[Problem]]:
    """Returns products to train on, and some that are held out."""
    return products(args.steps * args.batch_size, args.seed), products(100, args.seed, split="train")


def trainer_of(
    args: argparse.Namespace,
    problems: Sequence[Problem],
    held_out: Sequence[Problem],
    adapter: Mapping[str, Any] = MappingProxyType({"target_modules": "all-linear"}),
) -> Any:
    """Returns TRL's trainer of an adapter on `problems`, in their order; `adapter`: where PEFT puts it."""
    import datasets
    from peft import LoraConfig
    from transformers import PrinterCallback, set_seed
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from twig.config.schema import Model
    from twig.engine.load import load_model

    datasets.disable_progress_bars()
    set_seed(args.seed)  # the adapter's first weights
    model, tokenizer = load_model(Model(name=args.base, dtype="float32"))
    config = SFTConfig(
        output_dir=str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.schedule,
        warmup_steps=args.warmup_steps,
        max_grad_norm=1.0,
        logging_steps=args.log_steps,
        save_steps=args.save_steps,
        eval_strategy="steps",
        eval_steps=args.save_steps,
        bf16=_has_bfloat16(model.device.type),
        use_cpu=model.device.type == "cpu",
        max_length=None,
        # The rows are in order: a resumed run skips those that it has seen.
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        seed=args.seed,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, bias="none", **adapter)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list([_tokens(p, tokenizer) for p in problems]),
        eval_dataset=datasets.Dataset.from_list([_tokens(p, tokenizer) for p in held_out]),
        processing_class=cast(Any, tokenizer),
        peft_config=lora,
        callbacks=[_progress()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _tokens(problem: Problem, tokenizer: Any) -> dict[str, list[int]]:
    """Returns a problem's tokens, and as labels those that are trained, the end token among them."""
    prompt, text = problem.prompt, problem.prompt + problem.solution
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    parts = [(len(prompt) + start, len(prompt) + stop) for start, stop in problem.trained]
    labels = [
        token if any(start < high and low < stop for start, stop in parts) else -100
        for token, (low, high) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    end = tokenizer.eos_token_id
    return {"input_ids": [*encoded["input_ids"], end], "labels": [*labels, end]}


def _progress() -> Any:
    """Returns a callback that prints a line per report, and keeps the seconds in the checkpoints."""
    from transformers import TrainerCallback

    class Lines(TrainerCallback):
        before = first = start = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.before = max((row.get("seconds", 0.0) for row in state.log_history), default=0.0)
            self.start, self.first = time.monotonic(), state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            row, passed = state.log_history[-1], time.monotonic() - self.start
            row["seconds"] = round(self.before + passed, 1)
            loss = row.get("loss", row.get("eval_loss"))
            if loss is None:
                return
            kind, accuracy = ("train", "mean_token_accuracy")
            if "eval_loss" in row:
                kind, accuracy = "held out", "eval_mean_token_accuracy"
            each = passed / max(state.global_step - self.first, 1)
            left = (state.max_steps - state.global_step) * each / 60
            print(
                f"step {state.global_step}/{state.max_steps}, {kind} loss {loss:.3f}, "
                f"tokens right {100 * row.get(accuracy, 0.0):.1f} %, {each:.2f} s/step, {left:.0f} min left",
                flush=True,
            )

    return Lines()


def _has_bfloat16(device: str) -> bool:
    """Tells whether a device multiplies bfloat16 in hardware."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, bool)()) for check in checks)


def _keep_arguments(output: Path, args: argparse.Namespace) -> None:
    """Writes what decides the result to the output folder; raises UserError if a run there differs."""
    names = ("steps", "drill_steps", "batch_size", "learning_rate", "schedule", "warmup_steps", "rank")
    names += ("word_share", "seed", "problems")
    arguments = {"base": _name_of(args.base)} | {name: getattr(args, name) for name in names}
    file = output / ARGUMENTS
    if file.is_file():
        before = _read_json(file)
        if before != arguments:
            name = next(n for n in {**arguments, **before} if before.get(n) != arguments.get(n))
            problem = f"{output} was begun with {before.get(name)}"
            raise UserError(f"--{name.replace('_', '-')}", problem, "Pass another --output, or that value")
    else:
        output.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(arguments, indent=2) + "\n")


def _checkpoints(folder: Path) -> list[Path]:
    """Returns the whole checkpoints in a folder, the oldest first."""
    paths = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit() and _is_whole(path)]
    return sorted(paths, key=_step_of)


def last_checkpoint(output: Path) -> Path | None:
    """Returns the newest whole checkpoint; those that a killed process left unfinished are removed."""
    for path in output.glob("checkpoint-*"):
        if not _is_whole(path):
            shutil.rmtree(path)
    return next(reversed(_checkpoints(output)), None)


def _is_whole(checkpoint: Path) -> bool:
    # The trainer writes its state last.
    try:
        return "global_step" in json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


# ---- choose ------------------------------------------------------------------------------------------------


def choose(args: argparse.Namespace) -> None:
    """Measures every checkpoint on SVAMP's training problems; those that are measured already are kept."""
    folder = Path(args.checkpoints)
    paths = _checkpoints(folder)
    if not paths:
        raise UserError("--checkpoints", f"{folder} has no checkpoint", "Run warm_start.py train first")
    file = folder / CHOICE
    asked = {"base": _name_of(args.base), "limit": args.limit, "samples": args.samples, "seed": args.seed}
    before = _read_json(file) if file.is_file() else {}
    rows = before.get("checkpoints", []) if before.get("asked") == asked else []
    measured = {row["adapter_sha256"]: row for row in rows}
    record: dict[str, Any] = {"asked": asked, "least": args.least, "chosen": None, "checkpoints": []}
    for path in paths:
        checksum = _sha256(path / WEIGHTS)
        row = measured.get(checksum) or _measure(args, path) | {"adapter_sha256": checksum}
        record["checkpoints"].append(row)
        record["chosen"] = _best(record["checkpoints"], args.least)
        write_whole(file, json.dumps(record, indent=2) + "\n")
        print(_line(row), flush=True)
    print(f"\n{_table(record['checkpoints'], args.samples)}\n")
    chosen = record["chosen"]
    least = f"greedy accuracy is at least {100 * args.least:g} %"
    print(
        f"none: nowhere {least}"
        if chosen is None
        else f"chosen: {folder / chosen} (largest gap where {least})"
    )


def _best(rows: list[dict[str, Any]], least: float) -> str | None:
    able = [row for row in rows if row["greedy"]["value"] >= least]
    return max(able, key=lambda row: row["gap"])["checkpoint"] if able else None


def _measure(args: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """Measures one checkpoint with Twig's evaluation: greedy answers and sampled ones."""
    import numpy as np

    from twig.common.progress import Progress
    from twig.common.tokenizer import Tokenizer
    from twig.config.load import Settings
    from twig.config.sizes import Sizes
    from twig.engine.load import pick_device
    from twig.evaluation.evaluate import evaluate_policy, sample_policy
    from twig.evaluation.prepare import Given, prepare
    from twig.planner.choose import Machine, Sized, size_run
    from twig.runtime.memory_use import PeakMemory
    from twig.tasks.base import Task

    task = {"name": "svamp", "path": args.svamp, "eval_split": "train", "prompt_template": PROMPT}
    values = {
        "model": {"name": args.base, "adapter": str(checkpoint), "dtype": _fast_dtype()},
        "task": task | {"chat": "never"},
        "rollout": {"max_completion_length": 64},
        "train": {"seed": args.seed},
    }
    start = time.monotonic()
    with PeakMemory(str(pick_device("auto"))) as memory:

        def size(settings: Settings, task: Task, tokenizer: Tokenizer, model: Any) -> Sized:
            return size_run(
                settings, task, tokenizer, model, Machine(memory), strict=False, samples=args.samples
            )

        settings = Settings.from_dict(values, [f"eval.limit={args.limit}"])
        parts = prepare(settings, Given(), size, Progress())
        params = replace(parts.sampling, wave_size=Sizes.of(parts.settings).eval_batch_size)
        of = parts.policy, parts.tokenizer, parts.task, params
        greedy, _ = evaluate_policy(*of, limit=args.limit)
        sampled, groups = sample_policy(*of, samples=args.samples, limit=args.limit)
    entropies = [completion.entropies for group in groups for completion in group]
    best = sampled.pass_at[args.samples]
    return {
        "checkpoint": checkpoint.name,
        "greedy": greedy.as_dict(),
        "mean": sampled.mean,
        f"pass_at_{args.samples}": best,
        "gap": best[0] - greedy.value,
        "entropy": float(np.mean(np.concatenate(entropies))),
        "entropy_of_first_tokens": float(np.mean(np.concatenate([e[:FIRST_TOKENS] for e in entropies]))),
        "seconds": round(time.monotonic() - start, 1),
    }


def _fast_dtype() -> str:
    """Returns the number type that this machine multiplies fastest: the merged base is bfloat16 too."""
    from twig.engine.load import pick_device

    return "bfloat16" if _has_bfloat16(pick_device("auto").type) else "auto"


def _line(row: dict[str, Any]) -> str:
    return f"{row['checkpoint']}: greedy {100 * row['greedy']['value']:.1f} %, {row['seconds']:.0f} s"


def _table(rows: list[dict[str, Any]], samples: int) -> str:
    head = (
        "checkpoint",
        "greedy",
        "sampled",
        f"pass@{samples}",
        "minus greedy",
        "entropy",
        "of first tokens",
    )
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        shares = row["greedy"]["value"], row["mean"][0], row[f"pass_at_{samples}"][0], row["gap"]
        cells = [f"{100 * share:.1f} %" for share in shares]
        cells += [f"{row[key]:.3f}" for key in ("entropy", "entropy_of_first_tokens")]
        lines.append(" | ".join([row["checkpoint"], *cells]))
    return "\n".join(f"| {line} |" for line in lines)


# ---- pack and merge ----------------------------------------------------------------------------------------


def pack(args: argparse.Namespace) -> None:
    """Writes a checkpoint as a small adapter with its card, and the checksums of what is merged from it."""
    checkpoint, output = Path(args.checkpoint), Path(args.output)
    config = _adapter_config(checkpoint, "--checkpoint")
    name = args.name or (NAME if _is_local(args.base) else args.base)
    config |= {"base_model_name_or_path": name, "revision": None, "inference_mode": True}
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
    with _drafted(output, may_hold=(CONFIG, WEIGHTS, CHECKSUMS, CARD)) as draft:
        _write_small(checkpoint / WEIGHTS, draft / WEIGHTS)
        write_whole(draft / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        merged = draft / "merged"
        merged.mkdir()
        _write_merged(args.base, draft, merged)
        checksums = {
            WEIGHTS: _sha256(draft / WEIGHTS),
            "base": {"name": _name_of(args.base), "sha256": _base_checksum(args.base)},
            "merged": {MERGED: _sha256(merged / MERGED)},
        }
        shutil.rmtree(merged)
        write_whole(draft / CHECKSUMS, json.dumps(checksums, indent=2) + "\n")
        write_whole(draft / CARD, _card(checkpoint, name, checksums))
        size = (draft / WEIGHTS).stat().st_size
    print(f"{output}: {size / 1e6:.1f} MB, sha256 {checksums[WEIGHTS]}")


def _write_small(source: Path, target: Path) -> None:
    """Writes an adapter's weights as float16; raises UserError if the file is larger than allowed.

    NOTE: float16 and not bfloat16: sums of products of float16 numbers are exact in float64 (see `_delta`).
    """
    import torch
    from safetensors.torch import load_file, save_file

    small = {key: tensor.to(torch.float16).contiguous() for key, tensor in load_file(source).items()}
    if not all(bool(tensor.isfinite().all()) for tensor in small.values()):
        raise UserError("--checkpoint", f"{source} leaves the range of float16", "Train with a smaller rate")
    save_file(small, target, metadata={"format": "pt"})
    size = target.stat().st_size
    if size > LARGEST:
        problem = f"the adapter would have {size / 1e6:.1f} MB, more than {LARGEST / 1e6:g}"
        raise UserError("--checkpoint", problem, "Train with a smaller --rank")


def merge(args: argparse.Namespace) -> None:
    """Writes the base with the adapter added as an ordinary model folder, and compares its checksum."""
    adapter, output = Path(args.adapter), Path(args.output)
    _adapter_config(adapter, "--adapter")
    checksums = _read_json(adapter / CHECKSUMS) if (adapter / CHECKSUMS).is_file() else {}
    expected = checksums.get("merged", {}).get(MERGED)
    if checksums and _sha256(adapter / WEIGHTS) != checksums.get(WEIGHTS):
        problem = f"{adapter / WEIGHTS} is not the file that {CHECKSUMS} names"
        raise UserError("--adapter", problem, "Copy the adapter again")
    with _drafted(output) as draft:
        _write_merged(args.base, adapter, draft)
        actual = _sha256(draft / MERGED)
        if expected is not None and actual != expected and not args.unchecked:
            recorded = checksums.get("base", {})
            same = recorded.get("sha256") == _base_checksum(args.base)
            reason = "though the base file is the same" if same else f"the base was {recorded.get('name')}"
            problem = f"the result's sha256 is {actual[:12]}..., not {expected[:12]}... ({reason})"
            fix = "Pass the base that the adapter was packed with, or --unchecked to write another one"
            raise UserError("--base", problem, fix)
    if expected is None:
        verdict = f"not compared: {adapter} has no {CHECKSUMS}"
    else:
        verdict = "as it should be" if actual == expected else f"NOT the {expected} of {CHECKSUMS}"
    print(f"{output / MERGED}: sha256 {actual}, {verdict}")


def _write_merged(base: str, adapter: Path, folder: Path) -> None:
    """Writes base and adapter as one model: weights, configs with the end token, tokenizer."""
    from transformers.utils import logging

    from twig.config.schema import Model
    from twig.engine.load import end_ids, load_model

    model, tokenizer = load_model(Model(name=base, dtype="float32", device="cpu"))
    add_adapter(model, adapter)
    ends = end_ids(model, tokenizer)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = ends
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)


def add_adapter(model: "PreTrainedModel", adapter: Path) -> None:
    """Adds an adapter to a float32 model in float64, and rounds every weight once, to bfloat16."""
    import torch
    from safetensors.torch import load_file

    config, pairs = _adapter_config(adapter, "--adapter"), {}
    for key, tensor in load_file(adapter / WEIGHTS).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UserError("--adapter", f"{key} in {adapter} is no LoRA matrix", "Pass a LoRA adapter")
        pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
    scale = config["lora_alpha"] / config["r"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = parameter.data.to(torch.float64)
            if name in pairs:
                weight = weight + _delta(pairs.pop(name), weight, scale, name)
            parameter.data = round_once(weight)
    if pairs:
        problem = f"{adapter} has {min(pairs)}, which the base has not"
        raise UserError("--base", problem, "Pass the base that the adapter was trained on")
    model.config.dtype = torch.bfloat16


def _delta(
    pair: "dict[str, torch.Tensor]", weight: "torch.Tensor", scale: float, name: str
) -> "torch.Tensor":
    """Returns scale B A in float64.

    NOTE: exact for float16 matrices, in whatever order a machine adds: products are multiples of 2^-48, so
    sums below 32 have at most 53 bits. This is why the bytes are the same everywhere.
    """
    import torch

    if set(pair) != {"A", "B"} or (pair["B"].shape[0], pair["A"].shape[1]) != weight.shape:
        raise UserError("--base", f"{name} has another shape than the adapter", "Pass the adapter's own base")
    return scale * (pair["B"].to(torch.float64) @ pair["A"].to(torch.float64))


def round_once(weight: "torch.Tensor") -> "torch.Tensor":
    """Rounds float64 to the nearest bfloat16, ties to even; torch would round to float32 in between."""
    import torch

    bits = weight.contiguous().view(torch.int64)
    dropped = 52 - 7  # bits of the two mantissas
    bits = bits + (2 ** (dropped - 1) - 1) + ((bits >> dropped) & 1)
    return ((bits >> dropped) << dropped).view(torch.float64).to(torch.bfloat16)


def _adapter_config(folder: Path, option: str) -> dict[str, Any]:
    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        raise UserError(option, f"{folder} holds no adapter ({CONFIG}, {WEIGHTS})", "Pass the folder of one")
    config = _read_json(folder / CONFIG)
    has = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or has:
        problem = f"{folder} is no plain LoRA adapter ({has[0] if has else 'its kind or bias'})"
        raise UserError(option, problem, "Pass an adapter that warm_start.py trained")
    return config


# ---- files -------------------------------------------------------------------------------------------------


@contextmanager
def _drafted(target: Path, may_hold: Sequence[str] = ()) -> Iterator[Path]:
    """Yields a folder to write to, and renames it to `target` if all went well, else removes it.

    An older `target` is replaced if it holds nothing but the files `may_hold`.
    """
    if target.exists():
        other = sorted(path.name for path in target.iterdir()) if target.is_dir() else [target.name]
        if set(other) - set(may_hold):
            problem = f"{target} is there already, and holds {min(set(other) - set(may_hold))}"
            raise UserError("--output", problem, "Pass another folder, or remove that one first")
    draft = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        yield draft
        for path in draft.iterdir():  # some libraries write files that only their owner may read
            path.chmod(draft.stat().st_mode & 0o666)
        put_folder(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"cannot be read ({error})", "Remove it, or copy it again") from error
    if not isinstance(value, dict):
        raise UserError(str(path), "is no JSON object", "Remove it, or copy it again")
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_local(base: str) -> bool:
    return Path(base).expanduser().exists()


def _name_of(base: str) -> str:
    """Returns the name of a base without the folders that it lies in on this machine."""
    path = Path(base).expanduser()
    return (path.name or path.resolve().name) if _is_local(base) else base


def _base_checksum(base: str) -> str | None:
    from twig.config.schema import Model
    from twig.engine.model_files import source_of

    return source_of(Model(name=base)).checksum()


def _card(checkpoint: Path, name: str, checksums: dict[str, Any]) -> str:
    """Returns the model card of a packed adapter."""
    arguments = _read_json(checkpoint.parent / ARGUMENTS)
    history = _read_json(checkpoint / STATE)["log_history"]
    losses = [row["eval_loss"] for row in history if "eval_loss" in row]
    seconds = max((row.get("seconds", 0.0) for row in history), default=0.0)
    options = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in arguments.items() if k != "base")
    step, steps, batch = _step_of(checkpoint), arguments["steps"], arguments["batch_size"]
    base, merged = checksums["base"], checksums["merged"][MERGED]
    words = arguments.get("problems", "words") == "words"
    data = "MAWPS (MIT licence), also with other numbers, and generated sums"
    source = " --mawps MAWPS" if words else ""
    facts = {
        "base": f"{name} (SmolLM2's licence is Apache-2.0), weights of {base['name']}",
        "data": data if words else "generated products, half of them worked out",
        **({"share of word problems": arguments["word_share"]} if words else {}),
        "training": f"{step} of {steps} steps of {batch} problems, {seconds:.0f} seconds",
        "loss on problems held out": f"{losses[-1]:.3f}" if losses else "not measured",
        "command": f"`python warm_start.py train --base BASE{source} --output DIR {options}`",
        f"sha256 of {WEIGHTS}": f"`{checksums[WEIGHTS]}`",
        f"sha256 of {base['name']}": f"`{base['sha256']}`",
        f"sha256 of the merged {MERGED}": f"`{merged}`",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    question = "Tom had 87 stamps. He gave 30 of them to his sister. How many stamps does he have now?"
    shown = f"{PROMPT.format(question=question)} 87 - 30 = 57\n#### 57"
    title, taught = "word problems", "compute,\nand to answer word problems in worked lines"
    form = "worked lines and the answer"
    if not words:
        product = multiply(34, 27, worked=True)
        title, taught, shown = (
            "products",
            "multiply,\nworked out or at once",
            product.prompt + product.solution,
        )
        form = "worked lines and the answer, or the answer alone"
    return f"""---
base_model: {name}
library_name: peft
license: apache-2.0
---

# A warm start on {title}

A LoRA adapter (r={arguments["rank"]}, all linear modules, float16) that teaches {name} to {taught}.
It is meant as the base of reinforcement learning: `python warm_start.py merge` makes a model of both.
No problem of SVAMP was in its data.

The prompt is plain text, without the chat template; the model answers with {form}:

```text
{shown}
```

| | |
| --- | --- |
{table}
"""


# ---- command line ------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="warm_start.py", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(run: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            run.__name__, help=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.add_argument("--base", required=True, help="the model: a GGUF file, a folder or an id on the Hub")
        sub.set_defaults(run=run)
        return sub

    sub = command(train, "train an adapter, or resume")
    sub.add_argument("--problems", choices=("words", "products"), default="words", help="what it learns from")
    sub.add_argument("--mawps", help="folder of MAWPS's CSV files, or an id on the Hub; products need none")
    sub.add_argument("--output", required=True, help="folder of the checkpoints")
    sub.add_argument("--steps", type=int, default=1500, help="optimizer steps")
    sub.add_argument("--drill-steps", type=int, default=0, help="the first ones: many sums in a text")
    sub.add_argument("--batch-size", type=int, default=16, help="problems of a step")
    sub.add_argument("--learning-rate", type=float, default=1e-3, help="highest learning rate")
    sub.add_argument("--schedule", choices=("cosine", "linear"), default="cosine", help="how the rate falls")
    sub.add_argument("--warmup-steps", type=int, default=50, help="steps over which the rate rises")
    sub.add_argument("--rank", type=int, default=24, help="rank of the adapter")
    sub.add_argument(
        "--word-share", type=float, default=0.3, help="share of word problems; the rest are sums"
    )
    sub.add_argument("--save-steps", type=int, default=250, help="a checkpoint every so many steps")
    sub.add_argument("--log-steps", type=int, default=10, help="a line every so many steps")
    sub.add_argument("--seed", type=int, default=0, help="seed of data and adapter")

    sub = command(choose, "measure the checkpoints on SVAMP's training problems")
    sub.add_argument("--checkpoints", required=True, help="the folder that train wrote")
    sub.add_argument("--svamp", required=True, help="SVAMP: a folder with train.jsonl, or an id on the Hub")
    sub.add_argument("--limit", type=int, default=200, help="problems")
    sub.add_argument("--samples", type=int, default=8, help="sampled answers to each")
    sub.add_argument("--least", type=float, default=0.15, help="greedy accuracy that a base must have")
    sub.add_argument("--seed", type=int, default=0, help="seed of the sampling")

    sub = command(pack, "write a checkpoint as a small adapter")
    sub.add_argument("--checkpoint", required=True, help="the checkpoint")
    sub.add_argument("--output", required=True, help="folder of the adapter")
    sub.add_argument("--name", help=f"the base's name on the Hub, of a local base {NAME}")

    sub = command(merge, "write base and adapter as one model")
    sub.add_argument("--adapter", required=True, help="the packed adapter")
    sub.add_argument("--output", required=True, help="folder of the model")
    sub.add_argument("--unchecked", action="store_true", help="write it though its checksum is another one")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns 2 after an error of one line."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
