"""Plans the memory of a run before it starts: what fits a budget, and what to change if nothing does.

`plan` is a function of a model's config.json, the settings and a number of bytes. No torch: of devices it
knows only the kind, and the memory used in the end is not its subject (`runtime/memory_use.py`).
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from twig.common.text import parse_size
from twig.config.adapted import adapted_modules, layer_numbers
from twig.config.load import Settings
from twig.config.messages import write
from twig.config.sizes import SIZE_KEYS, Sizes, open_sizes, with_values
from twig.engine.loops import choose_loop, resolve_decode
from twig.engine.model_files import is_gguf
from twig.planner.layer_costs import Workload
from twig.planner.ledger import Phase
from twig.planner.model_shape import Shape, Unplannable, read_config
from twig.planner.phases import MEASURED, Footprint

PROMPT_TOKENS = 256  # assumed if the prompts are unknown
# The sizes to try, the quickest first. More completions at once are hardly faster. On a CPU a larger
# pack's dense mask costs more than the pack saves; on a GPU every pack and chunk costs launches.
_MOST_COMPLETIONS, _MOST_QUESTIONS = 256, 128
_PACK = {"cpu": 512, "mps": 1024, "cuda": 4096}
_FORKS_PACK = 256  # on a CPU for weights at forks only: few tokens are run, which seldom fill a larger one
_HEAD_CHUNKS = (2**22, 2**20, 2**18, 2**16)
_CUDA_HEAD_CHUNK = 2**25
_USED = 0.95  # of the budget
_FASTER = 4  # a captured decode step is at least this many times as fast as a plain one
_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Advice:
    """One more change on top of the ones before it: the settings to write, and the peak in bytes with it."""

    changes: str
    peak: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """How much a run computes at once, and the most memory it takes.

    `phases` are itemised, `budget` is in bytes. If the run does not fit, the sizes are the smallest ones, and
    `advice` lists what to change, the cheapest first. `tensors_peak` is the peak without the items in
    `phases.OUTSIDE`: the bytes that torch counts as allocated on a CUDA device. `decode` is a new value for
    `rollout.decode`; None keeps the one that is set.
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
        """The bytes to plan with: all but a twentieth, because no prediction was further off."""
        return int(self.budget * _USED)

    @property
    def fits(self) -> bool:
        """Whether the peak is within what can be planned with."""
        return self.peak <= self.usable

    @property
    def tight(self) -> bool:
        """Whether the plan holds only if freed memory is returned: see `return_freed_memory`."""
        return self.peak > self.budget / 2


def plan(
    config: Mapping[str, Any] | str | Path,
    settings: Settings,
    budget: int,
    device_kind: str,
    *,
    prompt_tokens: int | Sequence[int] = PROMPT_TOKENS,
    questions: int | Sequence[int] | None = None,
    quantised: str | None = None,
) -> Plan:
    """Plans a run: chooses the sizes that are None in `settings` so that all phases fit `budget` bytes.

    `config` is a model's config.json, as a mapping, a path or the model's name. `device_kind` is cpu, cuda or
    mps. `prompt_tokens` and `questions` are the lengths of the prompts of training and of an evaluation. If
    they are not known, `prompt_tokens` is the longest, and `questions` the number that an evaluation answers
    (None: as many as the settings allow). `quantised` is the form of the layers' matrices, nf4 or int8.
    Raises Unplannable if the config does not tell how much memory the model takes.
    """
    if not isinstance(config, Mapping):
        config = read_config(str(config), settings.model.revision)
    shape = Shape.from_config(config)

    def planned(settings: Settings) -> Plan:
        work = workload_of(shape, settings, device_kind, prompt_tokens, questions, quantised)
        captured = _choose(work, settings, budget)
        if work.static_decode and settings.rollout.decode == "auto":
            plain = _choose(replace(work, static_decode=False), settings, budget)
            slower = captured.sizes.wave_size * _FASTER < plain.sizes.wave_size
            if not captured.fits or (plain.fits and slower):
                return replace(plain, decode="plain")
        return captured

    first = planned(settings)
    stored = quantised is not None or bool(config.get("quantization_config"))
    advice = ()
    if not first.fits:
        advice = _advise(planned, settings, first, _cheapest_first(settings, shape, device_kind, stored))
    return replace(first, advice=advice, notes=tuple(_notes(shape, settings, device_kind, first.decode)))


def budget_bytes(budget: str | float, free: int) -> int:
    """Returns the bytes that `memory.budget` means if `free` bytes are free."""
    if budget == "auto":
        return free
    return parse_size(budget) or 0 if isinstance(budget, str) else round(budget * free)


def workload_of(
    shape: Shape,
    settings: Settings,
    device_kind: str,
    prompt_tokens: int | Sequence[int],
    questions: int | Sequence[int] | None = None,
    quantised: str | None = None,
) -> Workload:
    """Returns what the settings ask of a model of this shape; the arguments are those of `plan`.

    Raises Unplannable for adapters on unknown modules, UserError for layers that the model lacks.
    """
    lora, rollout, algorithm = settings.lora, settings.rollout, settings.algorithm
    element = _BYTES.get(settings.model.dtype) or (4 if device_kind == "cpu" else 2)
    asked = lora.target_modules if isinstance(lora.target_modules, list) else []
    if unknown := sorted({name.rpartition(".")[2] for name in asked} - set(shape.linear())):
        raise Unplannable(
            "lora.target_modules",
            f"the memory of an adapter on {unknown[0]} cannot be planned",
            f"Use some of {', '.join(shape.linear())}, or set all sizes yourself: {', '.join(SIZE_KEYS)}",
        )
    adapter = adapted_modules(lora, shape.layer_of(), shape.layers)
    longest = prompt_tokens if isinstance(prompt_tokens, int) else max(prompt_tokens, default=1)
    if questions is None:
        limits = [n for n in (settings.eval.limit, settings.task.eval_size) if n is not None]
        questions = min(limits, default=_MOST_QUESTIONS)
    if isinstance(questions, int):
        questions = (longest,) * questions
    return Workload(
        shape=shape,
        kind=device_kind,
        element=element,
        stored=_BYTES.get(shape.stored or "", element),
        wide=max(element, 4),
        eager=settings.model.attn_implementation == "eager" or shape.attention_softcap,
        plain=settings.model.engine == "plain",
        quantised=quantised or settings.model.quantization,
        rank=max(adapter.values()),
        modules=frozenset(name.rpartition(".")[2] for name in adapter),
        adapted=tuple(sorted({shape.layer_of()[name] for name in adapter})),
        adapter_numbers=shape.adapter_parameters(adapter, lora.use_dora),
        dora=lora.use_dora,
        moments=2 if settings.train.optim == "adamw_torch" else 0,
        load=algorithm.load(rollout.num_generations, rollout.max_completion_length),
        prompt=max(longest, 1),
        length=rollout.max_completion_length,
        generations=rollout.num_generations,
        prompts=rollout.prompts_per_step,
        restart=_longest_restart(settings, prompt_tokens),
        questions=tuple(sorted(questions)),
        evaluated_between=settings.eval.steps > 0,
        static_decode=_decodes_by_graph(settings, device_kind),
        packable=settings.model.kernels == "onednn"
        and (device_kind, element, quantised or settings.model.quantization) == ("cpu", 4, None),
    )


def _longest_restart(settings: Settings, prompts: int | Sequence[int]) -> int:
    """Returns the tokens of the longest prompt that includes a part of a completion; 0 if there are none.

    If only the longest prompt is known, that with all but one token of a completion. Else the median of the
    longest, over runs in which each restart has one of the `prompts` and completions of full length, cut
    anywhere: a long run draws it again and again, a short one seldom comes near the bound.
    """
    rollout, train = settings.rollout, settings.train
    chance, cuts = settings.algorithm.restarts.probability, max(rollout.max_completion_length - 1, 1)
    if chance == 0:
        return 0
    if isinstance(prompts, int):
        return prompts + rollout.max_completion_length - 1
    steps = train.max_steps or train.num_train_epochs * len(prompts) / rollout.prompts_per_step
    restarts = chance * rollout.prompts_per_step * max(steps - 1, 0)
    if not restarts or not prompts:
        return 0

    def share(tokens: int) -> float:
        """Returns the share of restarts with at most so many tokens."""
        return sum(min(max(tokens - prompt, 0), cuts) for prompt in prompts) / (cuts * len(prompts))

    return bisect_left(range(max(prompts) + cuts), 0.5 ** (1 / restarts), key=share)


def _decodes_by_graph(settings: Settings, device_kind: str) -> bool:
    """Tells whether captured steps sample the tokens, as in a run."""
    rollout = settings.rollout
    loop = choose_loop(settings.model.engine, resolve_decode(rollout.decode, device_kind), rollout.stop)
    return device_kind == "cuda" and loop == "steps"


# ---- choosing --------------------------------------------------------------------------------------------


def _choose(work: Workload, settings: Settings, available: int) -> Plan:
    """Returns the first sizes that fit, phase by phase, or the last ones tried.

    The buffers of captured decode steps stay allocated during the update, so a wave then has to leave room
    for the update in its smallest pieces.
    """
    budget = int(available * _USED)

    def update_in(sizes: Sizes) -> Sizes:
        candidates = _update_sizes(work, settings, sizes)
        return _first(candidates, lambda sizes: Footprint(work, sizes).update().peak <= budget)

    def wave_fits(sizes: Sizes) -> bool:
        if Footprint(work, sizes).sampling().peak > budget:
            return False
        return not work.static_decode or Footprint(work, update_in(sizes)).update().peak <= budget

    smallest = Sizes(1, 1, _HEAD_CHUNKS[-1], True, 1)
    waves = _wave_sizes(work, settings.rollout.wave_size)
    sizes = update_in(_first((replace(smallest, wave_size=n) for n in waves), wave_fits))
    batches = _halved(max(min(len(work.questions), _MOST_QUESTIONS), 1), 1, settings.eval.batch_size)
    sizes = _first(
        (replace(sizes, eval_batch_size=n) for n in batches),
        lambda sizes: Footprint(work, sizes).evaluation().peak <= budget,
    )
    sizes = replace(sizes, packed_weights=_packs(work, settings.rollout.packed_weights, sizes, budget))
    tensors = max(phase.peak for phase in Footprint(work, sizes, tensors=True).phases())
    return Plan(sizes, Footprint(work, sizes).phases(), available, tensors)


def _packs(work: Workload, chosen: bool | None, sizes: Sizes, budget: int) -> bool:
    """Tells whether sampling packs the weights: as `chosen`, or if they are left open and there is room."""
    if not work.packable or chosen is not None:
        return bool(work.packable and chosen)
    packed = Footprint(work, replace(sizes, packed_weights=True))
    return max(packed.sampling().peak, packed.evaluation().peak) <= budget


def _first(candidates: Iterable[Sizes], fits: Callable[[Sizes], bool]) -> Sizes:
    """Returns the first sizes that fit, or the last ones."""
    last = None
    for sizes in candidates:
        if fits(sizes):
            return sizes
        last = sizes
    assert last is not None, "there is always a size to try"
    return last


def _wave_sizes(work: Workload, fixed: int | None) -> list[int]:
    """Returns the numbers of completions at once to try, the largest first.

    Captured steps have the same number of rows for each prompt of a wave, so they get whole groups, in waves
    of similar size, or equal parts of a group.
    """
    total, group = work.prompts * work.generations, work.generations
    if fixed is not None or not work.static_decode:
        return _halved(min(total, _MOST_COMPLETIONS), 1, fixed)
    groups = dict.fromkeys(-(-work.prompts // waves) for waves in range(1, work.prompts + 1))
    parts = [group // n for n in range(1, group + 1) if group % n == 0]
    sizes = dict.fromkeys([*(n * group for n in groups), *parts])
    return [size for size in sizes if size <= _MOST_COMPLETIONS]


def _halved(start: int, last: int, fixed: int | None) -> list[int]:
    """Returns only `fixed` if it is given, else `start` and its halves down to `last`."""
    if fixed is not None:
        return [fixed]
    sizes = [start]
    while sizes[-1] > last:
        sizes.append(max(sizes[-1] // 2, last))
    return sizes


def _update_sizes(work: Workload, settings: Settings, sizes: Sizes) -> Iterator[Sizes]:
    """Yields sizes of an update by cost: smaller packs, smaller head chunks, then layers run twice."""
    train = settings.train
    least = work.path if work.plain else work.length  # a divided trie's prompt runs by itself
    largest = _FORKS_PACK if work.kind == "cpu" and work.load.forks_only else _PACK[work.kind]
    packs = _halved(max(largest, least), least, train.pack_size)
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
    planned: Callable[[Settings], Plan], settings: Settings, before: Plan, options: Iterator[dict[str, Any]]
) -> tuple[Advice, ...]:
    """Returns changes out of `options`, each on top of the ones before it, up to the first that fits.

    Leaves out a change that lowers the peak by less than a hundredth, or a twentieth if it changes results.
    """
    advice: dict[str, Advice] = {}
    for changes in options:
        changed = with_values(settings, changes)
        after = planned(changed)
        same_results = changes.keys() <= {*SIZE_KEYS, "rollout.decode"}
        if after.peak > (0.99 if same_results else 0.95) * before.peak and not after.fits:
            continue
        settings, before = changed, after
        text = " ".join(f"{key}={write(value).replace(' ', '')}" for key, value in changes.items())
        advice[" ".join(changes)] = Advice(text, after.peak, after.fits)
        if after.fits:
            break
    return tuple(advice.values())


def _cheapest_first(
    settings: Settings, shape: Shape, device_kind: str, stored_quantised: bool
) -> Iterator[dict[str, Any]]:
    """Yields possible changes: first those that keep the results, last those that make it another run."""
    rollout, still_open = settings.rollout, open_sizes(settings)
    if fixed := [key for key in SIZE_KEYS if key not in still_open]:
        yield dict.fromkeys(fixed)
    if settings.model.dtype in ("auto", "float32", "float64"):
        yield {"model.dtype": "bfloat16"}
    if _decodes_by_graph(settings, device_kind) and settings.rollout.decode != "auto":
        yield {"rollout.decode": "plain"}
    layers = layer_numbers(settings.lora.layers, shape.layers)
    if len(layers) > 2:
        yield {"lora.layers": layers[len(layers) // 2 :]}
    if rollout.prompts_per_step > 1:
        yield {"rollout.prompts_per_step": rollout.prompts_per_step // 2}
    lengths = _halved(rollout.max_completion_length, 64, None)[1:]
    yield from ({"rollout.max_completion_length": length} for length in lengths)
    if rollout.num_generations > 4:
        yield {"rollout.num_generations": rollout.num_generations // 2}
    # what loading refuses is no advice
    quantisable = device_kind in ("cpu", "cuda") and not stored_quantised
    if settings.model.quantization is None and not is_gguf(settings.model) and quantisable:
        yield {"model.quantization": "nf4"}


def _notes(shape: Shape, settings: Settings, kind: str, decode: str | None) -> Iterator[str]:
    if not shape.is_measured:
        yield f"model type '{shape.family}' is unknown to the planner and counted as a Llama"
    if kind not in MEASURED:
        yield "the memory of the device's own libraries is a guess: it was never measured"
    if decode is not None:
        yield f"captured decode steps leave too little room: rollout.decode={decode}"
    if shape.mixing is not None:
        yield "layers that keep a state are predicted roughly: their kernels may hold more"
    if settings.model.engine == "plain":
        yield "model.engine=plain is predicted roughly: a model's own forward may hold more"
