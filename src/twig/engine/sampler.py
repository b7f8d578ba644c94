"""Sampling: prompts become completions, with log-probs, entropies and the boundary recorded on the way.

Each prompt is run once and its keys and values are expanded to its completions; finished rows are compacted
away; masks and rotary embeddings of all steps are made before the first. The token at a position follows from
its probabilities and one uniform number, a function of (seed, step, prompt, completion, position) and of
nothing else, so batch shape, waves, compaction and history cannot change what is sampled beyond rounding.

Knows nothing of rewards, tries or algorithms. Legend: B rows, P prompts, T positions, D hidden, V vocabulary,
C cells.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from twig.common.errors import UserError
from twig.core.rng import uniforms
from twig.core.types import Completion
from twig.engine.decode_graph import DecodeStep, DecodeSteps, NotCaptured, StepShape, prefill
from twig.engine.decoder import Context
from twig.engine.inverse_cdf import invert
from twig.engine.policy import Policy
from twig.engine.stop_rules import Ending
from twig.runtime.memory_use import give_back, out_of_memory

_COMPACT_BELOW = 0.75  # copy the cache once fewer than this share of its rows are unfinished
_STEPS_AT_ONCE = 8  # captured steps between two looks at whether any row goes on: a look waits for the device


@dataclass(frozen=True)
class Request:
    """Completions wanted for one prompt: `num` of them, each of at most `max_tokens` tokens.

    `slot` is the prompt's place in the step; it names the noise. The last `prefix_length` ids of the prompt
    are the kept part of an earlier completion: they belong to the completion's text. `expected` tokens are
    likely: waves are made of requests that are likely to end together.
    """

    prompt_ids: np.ndarray
    num: int
    max_tokens: int
    slot: int
    prefix_length: int = 0
    expected: float = 0.0

    @property
    def prefix(self) -> np.ndarray:
        return self.prompt_ids[len(self.prompt_ids) - self.prefix_length :]


@dataclass(frozen=True)
class Drawn:
    """Completion `number` of the request at place `request`."""

    request: int
    number: int
    completion: Completion


@dataclass(frozen=True)
class Sampled:
    """What `sample` returns: per request its completions and the boundary cells of its prompt, and the table
    they index.

    `boundary` is [C, D], one row per token that went through the trunk; None where none was recorded.
    `wave_size` is the one asked for, or the smaller one that memory had room for.
    """

    completions: list[list[Completion]]
    prompt_cells: list[np.ndarray]
    boundary: Tensor | None
    wave_size: int


@torch.inference_mode()
def sample(
    policy: Policy,
    requests: Sequence[Request],
    *,
    end_ids: Sequence[int],
    decode: Callable[[list[np.ndarray]], list[str]],
    seed: int = 0,
    step: int = 0,
    wave_size: int = 128,
    greedy: bool = False,
    record: bool = True,
    stop: Sequence[str] = (),
    on_tokens: Callable[[int], None] | None = None,
    on_wave: Callable[[list[Drawn]], None] | None = None,
) -> Sampled:
    """Samples all requests, `wave_size` completions at a time. `record` keeps the boundary for the update.

    A completion ends with the first of `end_ids`, or with the token that completes one of the texts `stop`;
    either is part of it. Else it is cut off at its length limit. `decode` turns lists of ids into texts. With
    `greedy`, the most probable token is taken and no noise is used. `on_tokens` hears of progress: the tokens
    sampled since the last call. `on_wave` gets the completions of each wave as soon as it is done.

    Where there are several waves, the requests that are expected to be long come first: a wave takes as many
    steps as its longest row.
    """
    order = range(len(requests))
    if sum(request.num for request in requests) > wave_size:
        order = sorted(order, key=lambda r: (-requests[r].expected, -len(requests[r].prompt_ids)))
    rows = [(r, c) for r in order for c in range(requests[r].num)]
    completions: list[list[Completion]] = [[] for _ in requests]
    # with adapters in the lowest layer there is no trunk to record
    recorded = record and not policy.plain and policy.cut > 0
    table = _Table.empty(policy, requests) if recorded else None
    start = 0
    while start < len(rows):
        wave = [(requests[r], c) for r, c in rows[start : start + wave_size]]
        ending = Ending(end_ids, stop, decode, [request.prefix for request, _ in wave])
        noise = None
        if not greedy:
            noise = [uniforms(seed, step, request.slot, c, request.max_tokens) for request, c in wave]
        recorder = _Recorder(policy, [request.max_tokens for request, _ in wave], noise, ending)
        size = _draw(policy, wave, recorder, table, stop, on_tokens)
        if size is not None:  # again, with the same noise
            recorder, wave_size = None, min(wave_size, size)
            policy.release()
            give_back()
            continue
        found = zip(rows[start:], recorder.completions(wave, decode, table), strict=False)
        drawn = [Drawn(*row, completion) for row, completion in found]
        for each in drawn:
            completions[each.request].append(each.completion)
        if on_wave is not None:
            on_wave(drawn)
        start += len(wave)
    if table is None:
        return Sampled(completions, [np.empty(0, np.int64) for _ in requests], None, wave_size)
    cells = [table.prompt_cells(request) for request in requests]
    return Sampled(completions, cells, table.rows, wave_size)


@dataclass(frozen=True)
class _Table:
    """The boundary of a whole call: first the cells of each prompt, then those of each completion, by slot.

    Made before the first wave, so that where a cell lies does not depend on waves and nothing is copied.
    """

    rows: Float[Tensor, "C D"]
    first: dict[int, int]

    @classmethod
    def empty(cls, policy: Policy, requests: Sequence[Request]) -> "_Table":
        sizes = [len(request.prompt_ids) + request.num * request.max_tokens for request in requests]
        first = {r.slot: sum(sizes[:i]) for i, r in enumerate(requests)}
        assert len(first) == len(requests), "slots name the requests"
        embedding = policy.decoder.embedding.weight
        return cls(embedding.new_zeros(sum(sizes), embedding.shape[1], dtype=policy.decoder.dtype), first)

    def prompt_cells(self, request: Request) -> np.ndarray:
        return self.first[request.slot] + np.arange(len(request.prompt_ids))

    def first_cell(self, request: Request, completion: int) -> int:
        """The cell of the completion's first token."""
        return self.first[request.slot] + len(request.prompt_ids) + completion * request.max_tokens


class _Recorder:
    """Chooses each step's tokens and keeps what is known of them. Rows are those of the wave, before
    compaction."""

    def __init__(
        self, policy: Policy, limits: list[int], noise: list[np.ndarray] | None, ending: Ending
    ) -> None:
        size, longest = len(limits), max(limits)
        device = policy.device
        wide = torch.promote_types(policy.model.dtype, torch.float32)
        self.noise = None
        if noise is not None:
            table = np.zeros((size, longest))
            for row, numbers in zip(table, noise, strict=True):
                row[: len(numbers)] = numbers
            self.noise = torch.from_numpy(table).to(wide).to(device)
        self.limits = torch.tensor(limits, device=device)
        self.ending = ending
        self.end_ids = torch.tensor(ending.end_ids, dtype=torch.long, device=device)
        self.ids = torch.zeros(size, longest, dtype=torch.long, device=device)
        self.logps = torch.zeros(size, longest, dtype=wide, device=device)
        self.entropies = torch.zeros(size, longest, dtype=wide, device=device)
        self.lengths = torch.zeros(size, dtype=torch.long, device=device)
        self.finished = torch.zeros(size, dtype=torch.bool, device=device)
        self.going = torch.ones(size, dtype=torch.bool, device=device)

    def choose(self, logits: Float[Tensor, "B V"], alive: Int[Tensor, " B"], t: int) -> tuple[Tensor, Tensor]:
        """The tokens [B] of position t for the wave's rows `alive`, and which of them go on (True)."""
        logps = torch.log_softmax(logits, -1)
        probabilities = logps.exp()
        if self.noise is None:
            tokens = logits.argmax(-1)
        else:
            tokens = invert(probabilities, self.noise[alive, t])
        self.ids[alive, t] = tokens
        self.logps[alive, t] = logps.gather(-1, tokens[:, None])[:, 0]
        self.entropies[alive, t] = torch.special.entr(probabilities).sum(-1)
        going = self.going[alive]  # rows that ended earlier run along until the next compaction
        ended = torch.isin(tokens, self.end_ids)
        if self.ending.stop:
            ended |= self.ending.stopped(self.ids[alive, : t + 1], alive)
        self.lengths[alive] += going
        self.finished[alive] |= going & ended
        going = going & ~ended & (self.limits[alive] > t + 1)
        self.going[alive] = going
        return tokens, going

    def take(self, step: DecodeStep, rows: Int[Tensor, " B"]) -> None:
        """Takes over what a decode step recorded for its `rows`, which are the wave's."""
        longest = self.ids.shape[1]
        self.lengths, self.finished = step.lengths[rows], step.finished[rows]
        inside = torch.arange(longest, device=rows.device) < self.lengths[:, None]
        self.ids = step.ids[rows, :longest]
        # what a row that ended ran along with is not looked at, and need not be finite
        self.logps, self.entropies = (
            torch.where(inside, values[rows, :longest], 0.0) for values in (step.logps, step.entropies)
        )

    def completions(
        self,
        wave: list[tuple[Request, int]],
        decode: Callable[[list[np.ndarray]], list[str]],
        table: _Table | None,
    ) -> list[Completion]:
        """The finished rows, with their texts and cells. Raises UserError where probabilities are no
        numbers."""
        if not bool(torch.isfinite(self.logps).all()):
            raise UserError(
                "model.dtype: the model's probabilities are not finite, so there is nothing to sample from; "
                "write model.dtype=float32, or a smaller train.learning_rate from an earlier adapter on"
            )
        ids, logps, entropies, lengths, finished = (
            x.cpu().numpy() for x in (self.ids, self.logps, self.entropies, self.lengths, self.finished)
        )
        kept = [row[:length].copy() for row, length in zip(ids, lengths, strict=True)]
        texts = decode([np.concatenate([r.prefix, own]) for (r, _), own in zip(wave, kept, strict=True)])
        found = []
        for row, ((request, c), length) in enumerate(zip(wave, lengths, strict=True)):
            cells = np.empty(0, np.int64)
            if table is not None:
                cells = table.first_cell(request, c) + np.arange(length)
            values = (kept[row], logps[row, :length].copy(), entropies[row, :length].copy())
            found.append(Completion(*values, bool(finished[row]), texts[row], cells))
        return found


def _sample_wave(
    policy: Policy,
    wave: list[tuple[Request, int]],
    recorder: _Recorder,
    table: _Table | None,
    on_tokens: Callable[[int], None] | None,
) -> None:
    decoder, device = policy.decoder, policy.device
    asked = list({request.slot: request for request, _ in wave}.values())
    place = {request.slot: i for i, request in enumerate(asked)}
    prompts = [request.prompt_ids for request in asked]
    width, longest = max(map(len, prompts)), recorder.ids.shape[1]
    hidden, trunk, cache = prefill(policy, prompts, width)
    rows = torch.tensor([place[request.slot] for request, _ in wave], device=device)
    logits = policy.next_token_logits(hidden)[rows]
    cache = cache.select(rows, width + longest)
    lengths = torch.tensor([len(p) for p in prompts], device=device)[rows]
    if table is not None:
        _record_prompts(table, asked, trunk)
        first_cell = torch.tensor([table.first_cell(request, c) for request, c in wave], device=device)
    del hidden, trunk

    # Slot s of the cache holds prompt position s below `width`, and completion position s - width from there
    # on.
    slots = torch.arange(width + longest, device=device)
    slot_positions = torch.where(slots < width, slots, lengths[:, None] + slots - width)
    filled = (slots < lengths[:, None]) | (slots >= width)
    positions = slot_positions[:, width:]
    rotary = decoder.rotations(positions)
    masked = bool((lengths < width).any()) or any(
        w is not None and w < width + longest for w in decoder.windows
    )

    current = torch.arange(len(wave), device=device)  # the wave's row of each row of the cache
    for t in range(longest):
        tokens, going = recorder.choose(logits, current, t)
        left = int(going.sum())
        if on_tokens is not None:
            on_tokens(left)
        if left == 0:
            break
        if left < _COMPACT_BELOW * len(current):
            keep = going.nonzero()[:, 0]
            cache.keep(keep)
            current, tokens, going = current[keep], tokens[keep], going[keep]
            filled, slot_positions, positions = filled[keep], slot_positions[keep], positions[keep]
            rotary = {kind: (cos[keep], sin[keep]) for kind, (cos, sin) in rotary.items()}
        now = positions[:, t : t + 1]
        masks = {w: None for w in decoder.windows}
        if masked:
            stop = width + t + 1
            masks = decoder.masks(filled[:, None, :stop], now, slot_positions[:, :stop])
        here = {kind: (cos[:, t : t + 1], sin[:, t : t + 1]) for kind, (cos, sin) in rotary.items()}
        context = Context(masks, here, now, cache)
        hidden = decoder.run(decoder.embed(tokens[:, None]), 0, policy.cut, context)
        if table is not None:
            # rows that ended run along until the next compaction, and have no cells behind their limit
            table.rows[(first_cell[current] + t)[going]] = hidden[:, 0][going]
        hidden = decoder.run(hidden, policy.cut, policy.num_layers, context)
        cache.filled += 1
        logits = policy.next_token_logits(hidden[:, 0])


def _draw(
    policy: Policy,
    wave: list[tuple[Request, int]],
    recorder: _Recorder,
    table: _Table | None,
    stop: Sequence[str],
    on_tokens: Callable[[int], None] | None,
) -> int | None:
    """Samples a wave; returns how many rows to try at once if memory ran out or a step was not captured.

    It returns before anybody tries again, as the frames of an error hold the tensors that are in the way.
    """
    draw = _way(policy, stop)
    try:
        with policy.attention():
            draw(policy, wave, recorder, table, on_tokens)
        return None
    except NotCaptured as error:
        _fall_back(policy, str(error))
        return len(wave)
    except Exception as error:
        if not out_of_memory(error) or (len(wave) == 1 and draw is not _sample_steps):
            raise
        if len(wave) == 1:
            _fall_back(policy, "memory ran out")
        return max(len(wave) // 2, 1)


def _way(policy: Policy, stop: Sequence[str]) -> Callable[..., None]:
    """How a wave of the policy is sampled: whole texts, the plain loop, or steps that are replayed."""
    if policy.plain:
        return _sample_plain
    if policy.decode != "plain" and policy.decode_steps is None:
        try:
            policy.decode_steps = DecodeSteps(policy)
        except ValueError as error:
            _fall_back(policy, str(error))
    # a stop text is looked for after each token
    return _sample_wave if stop or policy.decode == "plain" else _sample_steps


def _fall_back(policy: Policy, why: str) -> None:
    """Goes on without a compiler, or in the plain loop, and keeps why in `policy.decode_refusal`."""
    policy.decode_refusal = why
    policy.decode = "graph" if policy.decode == "compiled" else "plain"


def _sample_steps(
    policy: Policy,
    wave: list[tuple[Request, int]],
    recorder: _Recorder,
    table: _Table | None,
    on_tokens: Callable[[int], None] | None,
) -> None:
    """The same as `_sample_wave` in steps that are captured once and replayed.

    Rows that ended run along to the end of the wave: on a GPU a step takes the same time for few rows.
    """
    asked = list({request.slot: request for request, _ in wave}.values())
    place = {request.slot: i for i, request in enumerate(asked)}
    prompts, longest = [request.prompt_ids for request in asked], recorder.ids.shape[1]
    group = np.array([place[request.slot] for request, _ in wave])
    number = np.array([int((group[:i] == g).sum()) for i, g in enumerate(group)])
    each, width = int(number.max()) + 1, max(map(len, prompts))
    shape = StepShape(len(asked), each, width, longest, table is not None, recorder.noise is None)
    step = policy.decode_steps.get(shape, recorder.end_ids)
    hidden, trunk, cache = prefill(policy, prompts, width)
    if table is not None:
        _record_prompts(table, asked, trunk)
    step.load(
        list(zip(cache.keys, cache.values, strict=True)),
        torch.tensor([len(p) for p in prompts], device=policy.device),
        policy.next_token_logits(hidden),
        _by_prompt(recorder.limits, group, number),
        None if recorder.noise is None else _by_prompt(recorder.noise, group, number),
    )
    del hidden, trunk, cache
    rows = torch.from_numpy(group * each + number).to(policy.device)
    sampled = 0
    for t in range(longest):
        step()
        if (t + 1) % _STEPS_AT_ONCE and t + 1 < longest:
            continue
        if on_tokens is not None:
            sampled, before = int(step.lengths.sum()), sampled
            on_tokens(sampled - before)
        if not bool(step.going.any()):
            break
    recorder.take(step, rows)
    if table is not None:
        first = torch.tensor([table.first_cell(request, c) for request, c in wave], device=policy.device)
        # the last token of a completion is only predicted, never run
        slots = torch.arange(longest, device=policy.device)
        there = slots < recorder.lengths[:, None] - 1
        table.rows[(first[:, None] + slots)[there]] = step.trunk[rows, :longest][there]


def _record_prompts(table: _Table, asked: list[Request], trunk: Float[Tensor, "P W D"]) -> None:
    for request, output in zip(asked, trunk, strict=True):
        cells = table.prompt_cells(request)
        table.rows[cells[0] : cells[-1] + 1] = output[: len(cells)]


def _by_prompt(values: Tensor, group: np.ndarray, number: np.ndarray) -> Tensor:
    """Values of the wave's rows as a table of prompts and their rows, 0 where there is no row."""
    table = values.new_zeros(int(group.max()) + 1, int(number.max()) + 1, *values.shape[1:])
    table[torch.from_numpy(group), torch.from_numpy(number)] = values
    return table


def _sample_plain(
    policy: Policy,
    wave: list[tuple[Request, int]],
    recorder: _Recorder,
    table: None,
    on_tokens: Callable[[int], None] | None,
) -> None:
    """The same with the model's own forward and cache, one prompt at a time, for any architecture."""
    slots = np.array([request.slot for request, _ in wave])
    prompts = {request.slot: request.prompt_ids for request, _ in wave}
    for slot, prompt in prompts.items():
        alive = torch.from_numpy(np.flatnonzero(slots == slot)).to(policy.device)
        ids = torch.from_numpy(prompt).to(policy.device).expand(len(alive), -1)
        cache = None
        for t in range(recorder.ids.shape[1]):
            out = policy.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = getattr(out, "past_key_values", None)
            tokens, going = recorder.choose(policy.sampled_logits(out.logits[:, -1]), alive, t)
            if on_tokens is not None:
                on_tokens(int(going.sum()))
            if not going.any():
                break
            # without a cache of the usual name, the whole text is run again
            ids = tokens[:, None] if cache is not None else torch.cat([ids, tokens[:, None]], 1)
