"""How much a run computes at once: what its settings leave open is chosen by the plan, before it begins.

Knows the settings, the model's config, the prompts and the bytes that are free. No torch until a run begins.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from twig.common.errors import UserError
from twig.common.text import format_size
from twig.config.load import Settings
from twig.config.sizes import DEFAULT_SIZES, open_sizes, with_sizes, with_values
from twig.planner.model_shape import Unplannable
from twig.planner.phases import CUDA_OUTSIDE
from twig.planner.plan import Plan, budget_bytes, plan
from twig.runtime.machine import free_memory
from twig.runtime.memory_use import PeakMemory, return_freed_memory
from twig.tasks.base import Task
from twig.tasks.prompts import longest_prompt


@dataclass(frozen=True)
class Sized:
    """`settings` without an open size, the plan that they came from (None: there is none), and a warning.

    `peak` is what `PeakMemory` will have measured in the end if the plan is right: every byte of the process
    on a CPU, torch's own on a CUDA device. `longest_prompt` is in tokens.
    """

    settings: Settings
    plan: Plan | None
    warning: str | None = None
    peak: int | None = None
    longest_prompt: int = 0


def size_run(
    settings: Settings,
    task: Task,
    tokenizer: Any,
    model: Any,
    memory: PeakMemory,
    *,
    begins: bool,
    beside: int = 1,
    samples: int = 1,
) -> Sized:
    """The sizes of a run on the device of `memory`, before its model is loaded, or with one that is passed.

    Looks at the true prompts, and has freed memory returned where the plan needs that. On a CUDA device, a
    `memory.budget` that somebody wrote is made the limit of `memory`. `begins`: as `choose_sizes`, whose
    errors are raised. `beside`: how many processes share
    the machine's memory, this one included. `samples`: how many answers an evaluation asks of each problem.
    """
    import torch

    from twig.engine.load import load_config

    asked, questions, held = settings, task.eval[: settings.eval.limit], 0
    kind, free = memory.device.partition(":")[0], free_memory(memory.device, torch)
    if kind != "cuda" and settings.rollout.decode in ("graph", "compiled"):
        raise UserError(
            f"rollout.decode: {settings.rollout.decode} needs a CUDA device, and this run is on {kind}; "
            "write rollout.decode=auto"
        )
    # the plan counts the context of a CUDA device, which asking has made
    free = free + memory.context() if kind == "cuda" else free // beside
    if model is None:
        config = load_config(settings.model).to_dict()
    else:  # its weights are in the plan, and there already
        config = model.config.to_dict()
        held = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        free += held
        its = {"dtype": str(model.dtype).removeprefix("torch."), "device": memory.device}
        its["attn_implementation"] = model.config._attn_implementation
        asked = with_values(settings, {f"model.{name}": value for name, value in its.items()})
    prompt = longest_prompt(task, [*task.train, *questions], tokenizer, settings.task)
    options = {"prompt_tokens": prompt, "questions": samples * len(questions), "begins": begins}
    found = choose_sizes(asked, config, kind, free, **options)
    there = memory.now() - held  # and not the run's
    if kind == "cuda" and settings.memory.budget != "auto":
        memory.limit(there + _for_torch(settings.memory.budget, free))
    if found.plan is None:
        peak = None
    else:
        peak = there + (found.plan.tensors_peak if kind == "cuda" else found.plan.peak)
        if kind == "cpu" and found.plan.tight:
            return_freed_memory()
    chosen = with_sizes(settings, found.settings.flat())
    chosen = with_values(chosen, {"rollout.decode": found.settings.rollout.decode})
    return replace(found, settings=chosen, peak=peak, longest_prompt=prompt)


def _for_torch(budget: str | float, free: int) -> int:
    """The bytes of `memory.budget` that are left for torch on a CUDA device; raises UserError if none are."""
    left = budget_bytes(budget, free) - CUDA_OUTSIDE
    if left <= 0:
        raise UserError(
            f"memory.budget: {budget} is less than CUDA itself takes, {format_size(CUDA_OUTSIDE)}; "
            "write for example memory.budget=6GiB"
        )
    return left


def choose_sizes(
    settings: Settings,
    config: Mapping[str, Any],
    device_kind: str,
    free: int,
    *,
    prompt_tokens: int,
    questions: int | None = None,
    begins: bool = True,
) -> Sized:
    """The settings with their open sizes chosen, so that the run fits `memory.budget` of `free` bytes.

    `config` is the model's config.json, the other arguments are those of `plan.plan`. Where nothing fits, a
    budget that somebody wrote is kept: UserError, one line, says what to change, the cheapest first. With
    `auto`, or for a run that goes on (`begins` False), the same words are a warning. A model whose memory
    cannot be planned gets `config.sizes.DEFAULT_SIZES`, and a warning too.
    """
    budget = settings.memory.budget
    try:
        found = plan(
            config,
            settings,
            budget_bytes(budget, free),
            device_kind,
            prompt_tokens=prompt_tokens,
            questions=questions,
        )
    except Unplannable as error:
        if budget != "auto" and begins:
            raise UserError(f"memory.budget: {budget} cannot be promised; leave it out ({error})") from None
        chosen = with_sizes(settings, DEFAULT_SIZES.by_key())
        taken = " ".join(f"{key}={DEFAULT_SIZES.by_key()[key]}".lower() for key in open_sizes(settings))
        return Sized(chosen, None, f"{error} (now {taken})" if taken else None)
    warning = None
    if not found.fits:
        if budget != "auto" and begins:
            raise UserError(f"memory.budget: {budget} is too little: {too_little(found)}")
        warning = f"memory may run out: {too_little(found)}"
    chosen = with_sizes(settings, found.sizes.by_key())
    if found.decode is not None:
        chosen = with_values(chosen, {"rollout.decode": found.decode})
    return Sized(chosen, found, warning)


def too_little(found: Plan) -> str:
    """What a plan that does not fit lacks, and what to change, on one line."""
    words = (
        f"the run takes up to {format_size(found.peak)}, and {format_size(found.usable)} can be planned with"
    )
    steps = [f"{each.changes} ({format_size(each.peak)})" for each in found.advice]
    if not steps:
        return f"{words}; choose a smaller model"
    enough = "" if found.advice[-1].fits else ", and a smaller model"
    return f"{words}; change, the cheapest first: {', then '.join(steps)}{enough}"
