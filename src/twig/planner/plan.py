"""How much memory a run needs, before it starts: what fits a budget, and what to change where nothing does.

`plan` is a function of a model's config.json, the settings and a number of bytes. No torch: knows nothing of
devices but their kind, nor of what was used in the end (`runtime/memory_use.py`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from twig.common.errors import UserError
from twig.common.text import parse_size
from twig.config.load import Settings
from twig.config.messages import write
from twig.config.sizes import SIZE_KEYS, Sizes, open_sizes, with_values
from twig.planner.layer_costs import Workload
from twig.planner.ledger import Phase
from twig.planner.model_shape import Shape, Unplannable, read_config
from twig.planner.phases import MEASURED, Footprint

PROMPT_TOKENS = 256  # assumed where nobody knows the prompts
# The sizes that are tried, the quickest first. More completions at once are hardly faster. On a CPU
# a larger pack's dense mask costs more than it shares; on a GPU every pack and chunk costs launches.
_MOST_COMPLETIONS, _MOST_QUESTIONS = 256, 128
_PACK = {"cpu": 1024, "mps": 1024, "cuda": 4096}
_HEAD_CHUNKS = (2**22, 2**20, 2**18, 2**16)
_CUDA_HEAD_CHUNK = 2**25
_USED = 0.95  # of the budget
_FASTER = 4  # a captured decode step is that many times as fast as a plain one, at least
_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Advice:
    """One more change beside all those before it: the settings to write, and the peak that follows, bytes."""

    changes: str
    peak: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a run computes at once, and the memory that it takes at most.

    `phases` are itemised, `budget` is in bytes. Where it does not fit, the sizes are the smallest there are,
    and `advice` says what to change, the cheapest first. `tensors_peak` is the peak without
    what is `phases.OUTSIDE`: what torch counts as allocated on a CUDA device. `decode` is what
    `rollout.decode` is to be, None as it is set.
    """

    sizes: Sizes
    phases: tuple[Phase, ...]
    budget: int
    tensors_peak: int
    advice: tuple[Advice, ...] = ()
    notes: tuple[str, ...] = ()
    decode: str | None = None

    @property
    def peak(self) -> int:
        """Bytes at the highest point of the run."""
        return max(phase.peak for phase in self.phases)

    @property
    def usable(self) -> int:
        """The bytes that are planned with: all but a twentieth, for no prediction was further off."""
        return int(self.budget * _USED)

    @property
    def fits(self) -> bool:
        """Whether the peak is within what can be planned with."""
        return self.peak <= self.usable

    @property
    def tight(self) -> bool:
        """Whether freed memory must be given back for the plan to hold: see `return_freed_memory`."""
        return self.peak > self.budget / 2


def plan(
    config: Mapping[str, Any] | str | Path,
    settings: Settings,
    budget: int,
    device_kind: str,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    questions: int | None = None,
    quantised: str | None = None,
) -> Plan:
    """The plan of a run: sizes that are None in `settings` are chosen so that all phases fit `budget` bytes.

    `config` is a model's config.json, as a mapping, a path or the model's name. `device_kind` is cpu, cuda or
    mps. `prompt_tokens` is the length of the longest prompt, `questions` the number of problems that an
    evaluation answers (None: as many as the settings allow). `quantised`: nf4 or int8, of the matrices of the
    layers. Raises Unplannable for a model whose memory cannot be told from its config.
    """
    if not isinstance(config, Mapping):
        config = read_config(str(config), settings.model.revision)
    shape = Shape.from_config(config)

    def chosen(changed: Settings) -> Plan:
        work = workload_of(shape, changed, device_kind, prompt_tokens, questions, quantised)
        found = _choose(work, changed, budget)
        if work.static_decode and changed.rollout.decode == "auto":
            plain = _choose(replace(work, static_decode=False), changed, budget)
            if not found.fits or (plain.fits and found.sizes.wave_size * _FASTER < plain.sizes.wave_size):
                return replace(plain, decode="plain")
        return found

    found = chosen(settings)
    advice = (
        () if found.fits else _advise(chosen, settings, found, _cheapest_first(settings, shape, device_kind))
    )
    return replace(found, advice=advice, notes=tuple(_notes(shape, settings, device_kind, found.decode)))


def budget_bytes(budget: str | float, free: int) -> int:
    """The bytes that `memory.budget` means where `free` bytes are free."""
    if budget == "auto":
        return free
    return round(budget * free) if isinstance(budget, float) else parse_size(budget) or 0


def workload_of(
    shape: Shape,
    settings: Settings,
    device_kind: str,
    prompt_tokens: int,
    questions: int | None = None,
    quantised: str | None = None,
) -> Workload:
    """What the settings ask of a model of that shape. Raises Unplannable for modules that are no linear ones
    of its layers, UserError for layers it lacks."""
    lora, rollout, algorithm = settings.lora, settings.rollout, settings.algorithm
    element = _BYTES.get(settings.model.dtype) or (4 if device_kind == "cpu" else 2)
    if unknown := sorted(set(lora.target_modules) - set(shape.linear())):
        raise Unplannable(
            f"lora.target_modules: the memory of an adapter on {unknown[0]} cannot be planned; write some of "
            f"{', '.join(shape.linear())}, or all sizes yourself: {', '.join(SIZE_KEYS)}"
        )
    if questions is None:
        asked = [n for n in (settings.eval.limit, settings.task.eval_size) if n is not None]
        questions = min(asked, default=_MOST_QUESTIONS)
    return Workload(
        shape=shape,
        kind=device_kind,
        element=element,
        stored=_BYTES.get(shape.stored or "", element),
        wide=max(element, 4),
        eager=settings.model.attn_implementation == "eager" or shape.attention_softcap,
        plain=settings.model.engine == "plain",
        quantised=quantised or settings.model.quantization,
        rank=lora.r,
        modules=frozenset(lora.target_modules),
        adapted=_adapted(lora.layers, shape.layers),
        moments=2 if settings.train.optim == "adamw_torch" else 0,
        algorithm=algorithm.name,
        kept_tokens=algorithm.k if algorithm.name == "s-grpo" else None,
        prompt=max(prompt_tokens, 1),
        length=rollout.max_completion_length,
        generations=rollout.num_generations,
        prompts=rollout.prompts_per_step,
        restarts=algorithm.replay.probability > 0,
        questions=questions,
        evaluated_between=settings.eval.steps > 0,
        static_decode=_decodes_by_graph(settings, device_kind),
    )


def _decodes_by_graph(settings: Settings, device_kind: str) -> bool:
    """Whether tokens are sampled by captured steps: `engine.policy.Policy` and `engine.sampler.sample` decide
    the same."""
    chosen = settings.rollout.decode
    if device_kind != "cuda" or settings.model.engine == "plain" or settings.rollout.stop:
        return False
    return chosen != "plain"


def _adapted(layers: str | list[int], count: int) -> tuple[int, ...]:
    if layers == "all":
        return tuple(range(count))
    if layers == "last_third":
        return tuple(range(count - -(-count // 3), count))
    if outside := [i for i in layers if i >= count]:
        raise UserError(
            f"lora.layers: {outside[0]} is not a layer of this model: write numbers from 0 to {count - 1}"
        )
    return tuple(sorted(set(layers)))


# ---- choosing --------------------------------------------------------------------------------------------


def _choose(work: Workload, settings: Settings, available: int) -> Plan:
    """The first sizes that fit, phase by phase; the last ones tried where none do.

    What captured decode steps keep is there in the update too: a wave then has to leave room for the update
    in its smallest pieces.
    """
    rollout, train, budget = settings.rollout, settings.train, int(available * _USED)
    sizes = Sizes(1, 1, _HEAD_CHUNKS[-1], True, 1)

    def update_in(sizes: Sizes) -> tuple[Sizes, Phase]:
        return _first(_update_sizes(work, train, sizes), lambda s: Footprint(work, s).update(), budget)

    for wave_size in _wave_sizes(work, rollout.wave_size):
        sizes = replace(sizes, wave_size=wave_size)
        sampling = Footprint(work, sizes).sampling()
        if sampling.peak <= budget and (not work.static_decode or update_in(sizes)[1].peak <= budget):
            break
    sizes, update = update_in(sizes)
    questions = max(min(work.questions, _MOST_QUESTIONS), 1)
    batches = _halved(questions, 1, settings.eval.batch_size)
    sizes, evaluation = _first(
        (replace(sizes, eval_batch_size=n) for n in batches),
        lambda s: Footprint(work, s).evaluation(),
        budget,
    )
    phases = (Footprint(work, sizes).loading(), sampling, update, evaluation)
    tensors = max(phase.peak for phase in Footprint(work, sizes, tensors=True).phases())
    return Plan(
        sizes,
        phases,
        available,
        tensors,
    )


def _wave_sizes(work: Workload, fixed: int | None) -> list[int]:
    """Completions at once, the most first.

    Captured steps have as many rows for each prompt of a wave: they get whole groups, in waves of like size,
    or equal parts of a group.
    """
    total, group = work.prompts * work.generations, work.generations
    if fixed is not None or not work.static_decode:
        return _halved(min(total, _MOST_COMPLETIONS), 1, fixed)
    groups = dict.fromkeys(-(-work.prompts // waves) for waves in range(1, work.prompts + 1))
    parts = [group // n for n in range(1, group + 1) if group % n == 0]
    sizes = dict.fromkeys([*(n * group for n in groups), *parts])
    return [size for size in sizes if size <= _MOST_COMPLETIONS]


def _first(
    candidates: Iterator[Sizes], phase_of: Callable[[Sizes], Phase], budget: int
) -> tuple[Sizes, Phase]:
    for sizes in candidates:
        phase = phase_of(sizes)
        if phase.peak <= budget:
            break
    return sizes, phase


def _halved(start: int, last: int, fixed: int | None) -> list[int]:
    """`fixed` alone where it is given, else `start` and its halves down to `last`."""
    if fixed is not None:
        return [fixed]
    found = [start]
    while found[-1] > last:
        found.append(max(found[-1] // 2, last))
    return found


def _update_sizes(work: Workload, train: Any, sizes: Sizes) -> Iterator[Sizes]:
    """Sizes of an update in order of cost: smaller packs, a smaller head chunk, then layers run twice."""
    least = work.path if work.plain else work.length  # a cut trie's prompt is run by itself
    packs = _halved(max(_PACK[work.kind], least), least, train.pack_size)
    chunks = [train.head_chunk] if train.head_chunk is not None else list(_HEAD_CHUNKS)
    for checkpointed in [False, True] if train.checkpoint_layers is None else [train.checkpoint_layers]:
        if work.kind == "cuda" and train.head_chunk is None:
            chunk = _CUDA_HEAD_CHUNK
            yield replace(sizes, pack_size=packs[0], head_chunk=chunk, checkpoint_layers=checkpointed)
        for number, chunk in enumerate(chunks):
            for pack in packs if number == 0 else packs[-1:]:
                yield replace(sizes, pack_size=pack, head_chunk=chunk, checkpoint_layers=checkpointed)


# ---- advice ----------------------------------------------------------------------------------------------


def _advise(
    chosen: Callable[[Settings], Plan], settings: Settings, found: Plan, tried: Iterator[dict[str, Any]]
) -> tuple[Advice, ...]:
    """Changes out of `tried`, each on top of those before it, up to the first that fits.

    One that lowers the peak by less than a hundredth is left out, or a twentieth where it changes results.
    """
    advice: dict[str, Advice] = {}
    for changes in tried:
        changed = with_values(settings, changes)
        after = chosen(changed)
        same = changes.keys() <= {*SIZE_KEYS, "rollout.decode"}
        if after.peak > (0.99 if same else 0.95) * found.peak and not after.fits:
            continue
        settings, found = changed, after
        words = " ".join(f"{key}={write(value).replace(' ', '')}" for key, value in changes.items())
        advice[" ".join(changes)] = Advice(words, after.peak, after.fits)
        if after.fits:
            break
    return tuple(advice.values())


def _cheapest_first(settings: Settings, shape: Shape, device_kind: str) -> Iterator[dict[str, Any]]:
    """What can be changed: first what leaves the results as they are, last what makes it another run."""
    rollout = settings.rollout
    if fixed := set(SIZE_KEYS) - set(open_sizes(settings)):
        yield {key: None for key in SIZE_KEYS if key in fixed}
    if settings.model.dtype in ("auto", "float32", "float64"):
        yield {"model.dtype": "bfloat16"}
    if _decodes_by_graph(settings, device_kind) and settings.rollout.decode != "auto":
        yield {"rollout.decode": "plain"}
    layers = _adapted(settings.lora.layers, shape.layers)
    if len(layers) > 2:
        yield {"lora.layers": list(layers[len(layers) // 2 :])}
    if rollout.prompts_per_step > 1:
        yield {"rollout.prompts_per_step": rollout.prompts_per_step // 2}
    lengths = _halved(rollout.max_completion_length, 64, None)[1:]
    yield from ({"rollout.max_completion_length": length} for length in lengths)
    if rollout.num_generations > 4:
        yield {"rollout.num_generations": rollout.num_generations // 2}


def _notes(shape: Shape, settings: Settings, kind: str, decode: str | None) -> Iterator[str]:
    if not shape.known:
        yield f"model type '{shape.family}' is not known to the planner: it is counted as a Llama"
    if kind not in MEASURED:
        yield "not measured: what the device's own libraries take"
    if decode is not None:
        yield f"captured decode steps leave too little room: rollout.decode={decode}"
    if settings.model.engine == "plain":
        yield "model.engine=plain is predicted roughly: a model's own forward may hold more"
