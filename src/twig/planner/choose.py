"""Chooses how much a run computes at once: the plan decides the sizes that the settings leave open.

Knows the settings, the model's config, the prompts and the free memory. Imports torch only when a run begins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from twig.common.errors import UserError
from twig.common.text import format_size
from twig.config.load import Settings
from twig.config.sizes import DEFAULT_SIZES, open_sizes, with_sizes, with_values
from twig.core.rng import DATA, generator
from twig.core.types import Example
from twig.planner.model_shape import Shape, Unplannable
from twig.planner.phases import CUDA_OUTSIDE
from twig.planner.plan import Plan, budget_bytes, plan
from twig.runtime.machine import free_memory
from twig.runtime.memory_use import PeakMemory, return_freed_memory
from twig.tasks.base import Task
from twig.tasks.prompts import longest_prompt

_RETURNED_FROM = 2**18  # bytes of a freed block that goes back to the system if memory is tight
_COUNTS, _MOST_COUNTED = 200, 4000  # prompts counted one by one; problems of which each counts


@dataclass(frozen=True)
class Machine:
    """Where a run computes: `memory` measures its device, which `processes` share, this one included."""

    memory: PeakMemory
    processes: int = 1


@dataclass(frozen=True)
class Sized:
    """Settings with every size set, the plan behind them (None: there is none), and a warning.

    `peak` is the peak that `PeakMemory` will measure if the plan is right: every byte of the process on a
    CPU, torch's own on a CUDA device. `longest_prompt` is in tokens.
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
    machine: Machine,
    *,
    strict: bool,
    samples: int = 1,
) -> Sized:
    """Chooses the sizes of a run, before its model is loaded or for the `model` that was passed.

    Counts the tokens of the task's own prompts, and has freed memory returned if the plan needs that. On a
    CUDA device, an explicit `memory.budget` becomes the limit of `machine.memory`. `strict` is that of
    `choose_sizes`. `samples` is the number of answers that an evaluation asks of each problem.
    """
    import torch

    memory, kind = machine.memory, machine.memory.device.partition(":")[0]
    questions = list(task.eval[: settings.eval.limit])
    if kind != "cuda" and settings.rollout.decode in ("graph", "compiled"):
        raise UserError(
            "rollout.decode",
            f"{settings.rollout.decode} needs a CUDA device, and this run is on {kind}",
            "Set rollout.decode=auto",
        )
    given = _given_model(settings, model, memory.device)
    given = replace(given, settings=_with_kernels(given, kind))
    free = free_memory(memory.device, torch)
    # The plan counts the context of a CUDA device, which exists once free memory was asked for.
    free = free + memory.context() if kind == "cuda" else free // machine.processes
    free += given.weights
    context = (given.config.get("text_config") or given.config).get("max_position_embeddings")
    longest = longest_prompt(task, [*task.train, *questions], tokenizer, context)
    prompts, asked = _prompts(given.settings, task, tokenizer), _lengths(task, questions, tokenizer)
    sized = choose_sizes(
        given.settings,
        given.config,
        kind,
        free,
        prompt_tokens=prompts,
        questions=[length for length in asked for _ in range(samples)],
        strict=strict,
    )
    before = memory.now() - given.weights
    if kind == "cuda" and settings.memory.budget != "auto":
        memory.limit(before + _torch_share(settings.memory.budget, free))
    peak = None
    if sized.plan is not None:
        peak = before + (sized.plan.tensors_peak if kind == "cuda" else sized.plan.peak)
        if kind == "cpu" and sized.plan.tight:
            return_freed_memory(_RETURNED_FROM, for_good=True)
    chosen = with_sizes(settings, sized.settings.flat())
    decided = sized.settings
    values = {"rollout.decode": decided.rollout.decode, "model.kernels": decided.model.kernels}
    chosen = with_values(chosen, values)
    return replace(sized, settings=chosen, peak=peak, longest_prompt=longest)


def _prompts(settings: Settings, task: Task, tokenizer: Any) -> Sequence[int] | int:
    """Returns the lengths of the prompts that training reaches, or only the longest one's.

    A short run does not reach all problems: those come in an order that follows from the seed.
    """
    train, rollout = settings.train, settings.rollout
    reached = list(task.train)
    if train.max_steps:
        count = train.max_steps * rollout.prompts_per_step * (1 + rollout.redraw)
        order = generator(train.seed, DATA, 0).permutation(len(reached))
        reached = [reached[place] for place in order[:count]]
    if settings.algorithm.restarts.probability == 0:
        return longest_prompt(task, reached, tokenizer)
    return _lengths(task, reached, tokenizer)


def _lengths(task: Task, examples: Sequence[Example], tokenizer: Any) -> list[int]:
    """Counts the tokens of the prompts: of a few with similar numbers of characters, those of the longest.

    So as many texts go to the tokenizer at once as it can use. Of very many only the longest is counted.
    """
    few = len(examples) if len(examples) > _MOST_COUNTED else -(-len(examples) // _COUNTS)
    ordered = sorted(examples, key=lambda example: len(str(example.prompt)))
    parts = [ordered[start : start + few] for start in range(0, len(ordered), max(few, 1))]
    return [length for part in parts for length in [longest_prompt(task, part, tokenizer)] * len(part)]


@dataclass(frozen=True)
class _Given:
    """What the plan reads: settings and config of the model, and the bytes of weights already in memory."""

    settings: Settings
    config: Mapping[str, Any]
    weights: int = 0


def _given_model(settings: Settings, model: Any, device: str) -> _Given:
    """Describes the model to plan for; one that was passed has its own dtype, device and attention."""
    if model is None:
        from twig.engine.load import load_config

        return _Given(settings, load_config(settings.model).to_dict())
    values = {
        "model.dtype": str(model.dtype).removeprefix("torch."),
        "model.device": device,
        "model.attn_implementation": model.config._attn_implementation,
    }
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return _Given(with_values(settings, values), model.config.to_dict(), weights)


def with_kernels(settings: Settings) -> Settings:
    """Returns the settings with what `model.kernels` stands for here, to use it in several runs."""
    from twig.engine.load import pick_device

    return _with_kernels(_given_model(settings, None, ""), pick_device(settings.model.device).type)


def _with_kernels(given: _Given, kind: str) -> Settings:
    """Returns the settings with what `model.kernels` stands for.

    Raises UserError if this machine lacks what is set.
    """
    import torch

    from twig.engine.kernels import choose_kernels

    model = given.settings.model
    if model.num_threads is not None:
        torch.set_num_threads(model.num_threads)  # as when the model is loaded
    dtype = "float32" if (model.dtype, kind) == ("auto", "cpu") else model.dtype
    if model.quantization is not None:
        dtype = model.quantization
    choice = choose_kernels(model.kernels, kind, dtype, matrices_of(given.config))
    return with_values(given.settings, {"model.kernels": choice.kernels})


def matrices_of(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Returns inputs and outputs of the linear modules of a layer; of a family that is not known, a guess."""
    try:
        shape = Shape.from_config(config)
    except Unplannable:
        hidden = config.get("hidden_size") or 0
        return [(hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)]
    return [(linear.inputs, linear.outputs) for linear in shape.linear().values()]


def _torch_share(budget: str | float, free: int) -> int:
    """Returns the bytes of `memory.budget` left for torch on a CUDA device; raises UserError if none are."""
    left = budget_bytes(budget, free) - CUDA_OUTSIDE
    if left <= 0:
        raise UserError(
            "memory.budget",
            f"{budget} is less than CUDA itself takes, {format_size(CUDA_OUTSIDE)}",
            "Set for example memory.budget=6GiB",
        )
    return left


def choose_sizes(
    settings: Settings,
    config: Mapping[str, Any],
    device_kind: str,
    free: int,
    *,
    prompt_tokens: int | Sequence[int],
    questions: int | Sequence[int] | None = None,
    strict: bool = True,
) -> Sized:
    """Chooses the open sizes so that the run fits `memory.budget` of `free` bytes.

    `config` is the model's config.json, the other arguments are those of `plan.plan`. If nothing fits an
    explicit budget, raises UserError with the changes that help, the cheapest first. With `auto`, or not
    `strict` (a resumed run, an evaluation), that is only a warning. A model whose memory cannot be planned
    gets `config.sizes.DEFAULT_SIZES` and a warning.
    """
    budget = settings.memory.budget
    refuses = strict and budget != "auto"
    try:
        planned = plan(
            config,
            settings,
            budget_bytes(budget, free),
            device_kind,
            prompt_tokens=prompt_tokens,
            questions=questions,
        )
    except Unplannable as error:
        if refuses:
            problem = f"{budget} cannot be guaranteed ({error.problem})"
            raise UserError("memory.budget", problem, "Leave memory.budget out") from None
        chosen = with_sizes(settings, DEFAULT_SIZES.by_key())
        defaults = " ".join(f"{key}={DEFAULT_SIZES.by_key()[key]}".lower() for key in open_sizes(settings))
        return Sized(chosen, None, f"{error} Now {defaults}." if defaults else None)
    warning = None
    if not planned.fits:
        if refuses:
            problem = f"{budget} is too little: {_shortage(planned)}"
            raise UserError("memory.budget", problem, _remedy(planned))
        warning = f"memory may run out: {_shortage(planned)}. {_remedy(planned)}."
    chosen = with_sizes(settings, planned.sizes.by_key())
    if planned.decode is not None:
        chosen = with_values(chosen, {"rollout.decode": planned.decode})
    return Sized(chosen, planned, warning)


def _shortage(planned: Plan) -> str:
    peak, usable = format_size(planned.peak), format_size(planned.usable)
    return f"the run takes up to {peak}, and {usable} can be planned with"


def _remedy(planned: Plan) -> str:
    """Returns the changes that make a plan fit, the cheapest first."""
    steps = [f"{each.changes} ({format_size(each.peak)})" for each in planned.advice]
    if not steps:
        return "Choose a smaller model"
    smaller = "" if planned.advice[-1].fits else ", and choose a smaller model"
    return f"Set, the cheapest first: {', then '.join(steps)}{smaller}"
