"""Sampling: prompts become completions, with log-probs, entropies and the boundary recorded on the way.

Completions of a prompt that have drawn the same tokens so far are one branch of their trie: it is run once,
and splits when they draw different ones (`branches`). The token at a position follows from its probabilities
and one uniform number, a function of (seed, step, prompt, completion, position) and of nothing else, so batch
shape, waves, branches and history cannot change what is sampled beyond rounding.

Knows nothing of rewards or algorithms. Legend: B rows (completions) of a wave, A unfinished ones, N branches,
P prompts, T positions, D hidden, V vocabulary, C cells.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from twig.common.errors import UserError
from twig.common.tokenizer import Tokenizer
from twig.config.load import Settings
from twig.core.branches import split
from twig.core.rng import uniforms
from twig.core.stop_rules import Decode, Ending
from twig.core.types import Completion
from twig.engine import wave_cache
from twig.engine.base_policy import BasePolicy
from twig.engine.decode_graph import DecodeStep, DecodeSteps, NotCaptured, StepShape
from twig.engine.inverse_cdf import invert
from twig.engine.loops import Loop
from twig.engine.plain_policy import PlainPolicy
from twig.engine.policy import Policy
from twig.engine.wave_cache import CopiedPrompts, SharedPrompts, prefill
from twig.runtime.memory_use import give_back, out_of_memory, return_freed_memory, trim_freed_memory

_LOGITS_AT_ONCE = 2**20  # on a CPU: what is made of so many logits stays in the processor's caches
# Small blocks of every size come out of all gaps that updates left in the heap, until all are resident.
_TRIMMED_FROM = 2**22  # bytes of logits: the heap of smaller models is small
_TRIMMED_EVERY = 2  # tokens; every token would cost 5 % of the time to sample, every fourth 2 %
_STEPS_AT_ONCE = 8  # captured steps between two looks at the unfinished rows: a look waits for the device


@dataclass(frozen=True)
class Request:
    """A prompt and the completions to sample for it: `num`, each of at most `max_tokens` tokens.

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
class SamplingParams:
    """How tokens are sampled, apart from what belongs to the policy (temperature, suppressed tokens).

    A completion ends with the first of `end_ids`, or with the token that completes one of the texts `stop`;
    either is part of it. `decode` turns lists of ids into texts. A request made by `request` is cut off at
    `max_completion_length`. With `greedy` the most probable token is taken and `seed` is not used.
    `wave_size` completions are sampled at once. `record` keeps the boundary for the update.
    """

    end_ids: Sequence[int]
    decode: Decode
    max_completion_length: int = 256
    stop: Sequence[str] = ()
    seed: int = 0
    greedy: bool = False
    wave_size: int = 128
    record: bool = True

    @classmethod
    def of(cls, settings: Settings, tokenizer: Tokenizer, end_ids: Sequence[int]) -> "SamplingParams":
        """Returns how a run with these settings samples; an open wave size gets the default."""
        rollout = settings.rollout
        return cls(
            end_ids,
            lambda rows: tokenizer.batch_decode(rows, skip_special_tokens=settings.task.skip_special_tokens),
            max_completion_length=rollout.max_completion_length,
            stop=rollout.stop,
            seed=settings.train.seed,
            wave_size=rollout.wave_size or cls.wave_size,
        )

    def request(
        self, prompt_ids: np.ndarray, num: int, slot: int, prefix_length: int = 0, expected: float = 0.0
    ) -> Request:
        """Returns a request whose completions, kept prefix included, have the longest length allowed."""
        left = self.max_completion_length - prefix_length
        return Request(prompt_ids, num, left, slot, prefix_length, expected)


@dataclass(frozen=True)
class Drawn:
    """Completion `number` of the request at place `request`."""

    request: int
    number: int
    completion: Completion


@dataclass(frozen=True)
class Sampled:
    """The result of `sample`: per request its completions and the boundary cells of its prompt.

    `boundary` [C, D] is the table that cells index, one row per token that went through the trunk; None if
    none was recorded. `wave_size` is the one asked for, or a smaller one if memory ran out.
    """

    completions: list[list[Completion]]
    prompt_cells: list[np.ndarray]
    boundary: Tensor | None
    wave_size: int


@torch.inference_mode()
def sample(
    policy: BasePolicy,
    requests: Sequence[Request],
    params: SamplingParams,
    *,
    step: int = 0,
    on_finished: Callable[[int], None] | None = None,
    on_wave: Callable[[list[Drawn]], None] | None = None,
) -> Sampled:
    """Samples all requests, `params.wave_size` completions at a time.

    `on_finished` gets how many more completions are done; the numbers sum to the completions requested. While
    a wave is sampled, an unfinished completion counts for its share of the longest allowed. `on_wave` gets
    the completions of each wave once it is done. If there are several waves, the requests expected to be
    long come first: a wave takes as many steps as its longest row.
    """
    return_freed_memory()
    order, wave_size = range(len(requests)), params.wave_size
    if sum(request.num for request in requests) > wave_size:
        order = sorted(order, key=lambda r: (-requests[r].expected, -len(requests[r].prompt_ids)))
    rows = [_Row(requests[r], r, c) for r in order for c in range(requests[r].num)]
    completions: list[list[Completion]] = [[] for _ in requests]
    table = _Table.empty(policy, requests) if params.record and policy.boundary_width else None
    finished = _Finished(on_finished)
    try:
        while finished.rows < len(rows):
            wave = rows[finished.rows : finished.rows + wave_size]
            result = _draw(policy, _Wave(wave, params, step, table), finished)
            if isinstance(result, _Again):  # with the same noise
                wave_size = min(wave_size, result.wave_size or wave_size)
                policy.release()
                give_back()
                continue
            drawn = [Drawn(row.place, row.number, each) for row, each in zip(wave, result, strict=True)]
            for each in drawn:
                completions[each.request].append(each.completion)
            if on_wave is not None:
                on_wave(drawn)
            finished.end_wave(len(wave))
    finally:
        policy.free_packed()
        trim_freed_memory()
    if table is None:
        return Sampled(completions, [np.empty(0, np.int64) for _ in requests], None, wave_size)
    cells = [table.prompt_cells(request) for request in requests]
    return Sampled(completions, cells, table.rows, wave_size)


@dataclass(frozen=True)
class _Row:
    """Completion `number` of `request`, which is at `place` among the requests."""

    request: Request
    place: int
    number: int


class _Finished:
    """Counts rows that are done: `rows` of whole waves, and those that a wave under way has reported.

    A wave that is repeated reports some rows again; they are counted once.
    """

    def __init__(self, report: Callable[[int], None] | None) -> None:
        self.rows, self._reported, self._report = 0, 0, report

    def in_wave(self, finished: int, unfinished: int = 0, share: float = 0.0) -> None:
        """Takes how many rows of this wave are finished, and what `share` of the others is sampled."""
        new = self.rows + finished + int(unfinished * share) - self._reported
        if new > 0:
            self._reported += new
            if self._report is not None:
                self._report(new)

    def end_wave(self, size: int) -> None:
        """Takes a wave of `size` rows as done."""
        self.in_wave(size)
        self.rows += size


@dataclass(frozen=True)
class _Table:
    """The boundary of a whole call: by slot the cells of each prompt, then those of its completions.

    Made before the first wave, so that the place of a cell does not depend on waves and nothing is copied.
    """

    rows: Float[Tensor, "C D"]
    first: dict[int, int]

    @classmethod
    def empty(cls, policy: BasePolicy, requests: Sequence[Request]) -> "_Table":
        sizes = [len(request.prompt_ids) + request.num * request.max_tokens for request in requests]
        first = {r.slot: sum(sizes[:i]) for i, r in enumerate(requests)}
        assert len(first) == len(requests), "slots name the requests"
        return cls(policy.embeddings.new_zeros(sum(sizes), policy.boundary_width), first)

    def prompt_cells(self, request: Request) -> np.ndarray:
        return self.first[request.slot] + np.arange(len(request.prompt_ids))

    def first_cell(self, row: _Row) -> int:
        """Returns the cell of the first token of a row's completion."""
        request = row.request
        return self.first[request.slot] + len(request.prompt_ids) + row.number * request.max_tokens


@dataclass(frozen=True)
class _Wave:
    """Rows that are sampled together, and how."""

    rows: Sequence[_Row]
    params: SamplingParams
    step: int
    table: _Table | None

    def prompts(self) -> dict[int, Request]:
        """Returns one request per prompt, by slot, in the order of their first rows."""
        return {row.request.slot: row.request for row in self.rows}

    def places(self) -> np.ndarray:
        """Returns the place of each row's prompt in `prompts`."""
        place = {slot: i for i, slot in enumerate(self.prompts())}
        return np.array([place[row.request.slot] for row in self.rows])


class _Recorder:
    """Chooses each step's tokens and records them.

    Tokens and ends are on the host, log-probs and entropies on the device: a step waits for it once.
    """

    def __init__(self, policy: BasePolicy, wave: _Wave) -> None:
        limits = [row.request.max_tokens for row in wave.rows]
        size, longest, params = len(limits), max(limits), wave.params
        device = policy.device
        wide = torch.promote_types(policy.dtype, torch.float32)
        self.noise = None
        if not params.greedy:
            self.noise = np.zeros((size, longest))
            for noise, row in zip(self.noise, wave.rows, strict=True):
                limit = row.request.max_tokens
                noise[:limit] = uniforms(params.seed, wave.step, row.request.slot, row.number, limit)
        self.limits = np.array(limits)
        self.ending = Ending(
            params.end_ids, params.stop, params.decode, [row.request.prefix for row in wave.rows]
        )
        self.ids = np.zeros((size, longest), np.int64)
        self.lengths = np.zeros(size, np.int64)
        self.finished = np.zeros(size, bool)
        self.logps = torch.zeros(size, longest, dtype=wide, device=device)
        self.entropies = torch.zeros(size, longest, dtype=wide, device=device)

    def choose(
        self, logits: Float[Tensor, "N V"], rows: np.ndarray, branch: np.ndarray, t: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens [A] of position t for the wave's unfinished `rows`, and which go on.

        Row i of the logits is that of branch i; `branch` [A] has that of each row.
        """
        on_cpu = logits.device.type == "cpu"
        if on_cpu and t % _TRIMMED_EVERY == 0 and logits.nbytes >= _TRIMMED_FROM:
            trim_freed_memory()
        step = max(_LOGITS_AT_ONCE // logits.shape[1], 1) if on_cpu else len(logits)
        noise = None if self.noise is None else self.noise[rows, t]
        ids = self.ids[rows, t]
        for first in range(0, len(logits), step):
            here = np.flatnonzero((branch >= first) & (branch < first + step))
            part = logits[first : first + step], branch[here] - first
            ids[here] = self._draw(part, rows[here], None if noise is None else noise[here], t)
        self.ids[rows, t] = ids
        self.lengths[rows] = t + 1
        ended = (ids[:, None] == self.ending.end_ids).any(1)
        if self.ending.stop:
            ended |= self.ending.stopped(self.ids[rows, : t + 1], rows)
        self.finished[rows] = ended
        return ids, ~ended & (self.limits[rows] > t + 1)

    def _draw(
        self, part: tuple[Tensor, np.ndarray], rows: np.ndarray, noise: np.ndarray | None, t: int
    ) -> np.ndarray:
        """Draws and records a token for each row; `part` is logits, and which of them is each row's."""
        logits, place = part[0], torch.from_numpy(part[1]).to(part[0].device)
        logps = torch.log_softmax(logits, -1)
        probabilities = logps.exp()
        if noise is None:
            tokens = logits.argmax(-1)[place]
        else:
            # Every row of logits is that of one completion, in their order.
            in_order = np.array_equal(part[1], np.arange(len(logits)))
            tokens = invert(probabilities, torch.from_numpy(noise).to(logits), None if in_order else place)
        at = torch.from_numpy(rows).to(logits.device), t
        self.logps[at] = logps[place, tokens]
        # a token of probability 0 adds nothing
        entropies = -torch.linalg.vecdot(probabilities, logps.clamp_(min=torch.finfo(logps.dtype).min))
        self.entropies[at] = entropies[place]
        return tokens.cpu().numpy()

    def take(self, step: DecodeStep, rows: Int[Tensor, " B"]) -> None:
        """Copies what a decode step recorded for its `rows`, which are the wave's."""
        longest = self.ids.shape[1]
        self.ids, self.lengths, self.finished = (
            x[rows].cpu().numpy() for x in (step.ids[:, :longest], step.lengths, step.finished)
        )
        inside = torch.from_numpy(np.arange(longest) < self.lengths[:, None]).to(rows.device)
        # values behind the end of a row are not used, and need not be finite
        self.logps, self.entropies = (
            torch.where(inside, values[rows, :longest], 0.0) for values in (step.logps, step.entropies)
        )

    def completions(self, wave: _Wave) -> list[Completion]:
        """Returns the rows with texts and cells; raises UserError if a probability is not finite."""
        if not bool(torch.isfinite(self.logps).all()):
            raise UserError(
                "model.dtype",
                "the model's probabilities are not finite, so there is nothing to sample from",
                "Set model.dtype=float32, or a smaller train.learning_rate from an earlier adapter on",
            )
        logps, entropies = self.logps.cpu().numpy(), self.entropies.cpu().numpy()
        kept = [row[:length].copy() for row, length in zip(self.ids, self.lengths, strict=True)]
        texts = wave.params.decode(
            [np.concatenate([row.request.prefix, own]) for row, own in zip(wave.rows, kept, strict=True)]
        )
        completions = []
        for i, (row, length) in enumerate(zip(wave.rows, self.lengths, strict=True)):
            cells = np.empty(0, np.int64)
            if wave.table is not None:
                cells = wave.table.first_cell(row) + np.arange(length)
            values = (kept[i], logps[i, :length].copy(), entropies[i, :length].copy())
            completions.append(Completion(*values, bool(self.finished[i]), texts[i], cells))
        return completions


@dataclass(frozen=True)
class _Again:
    """A wave is to be sampled again, with at most `wave_size` rows at once (None: as many)."""

    wave_size: int | None = None


def _draw(policy: BasePolicy, wave: _Wave, finished: _Finished) -> list[Completion] | _Again:
    """Samples a wave; tells how to try again if memory ran out or a step was not captured.

    It returns before anybody tries again, as the frames of an error hold the tensors that are in the way.
    """
    loop = _open_loop(policy, wave.params.stop)
    try:
        recorder = _Recorder(policy, wave)
        with policy.computing(decoding=True):
            _LOOPS[loop](policy, wave, recorder, finished)
        return recorder.completions(wave)
    except NotCaptured as error:
        policy.fall_back(str(error))
        return _Again()
    except Exception as error:
        if not out_of_memory(error):
            raise
        if policy.packed is not None:
            policy.packed = None
            return _Again()
        if len(wave.rows) == 1 and loop != "steps":
            raise
        if len(wave.rows) == 1:
            policy.fall_back("memory ran out")
        return _Again(max(len(wave.rows) // 2, 1))


def _open_loop(policy: BasePolicy, stop: Sequence[str]) -> Loop:
    """Returns the policy's loop, its decode steps open if it needs them and they can be opened."""
    if isinstance(policy, Policy) and policy.decode != "plain" and policy.decode_steps is None:
        try:
            policy.decode_steps = DecodeSteps(policy)
        except ValueError as error:
            policy.fall_back(str(error))
    return policy.loop(stop)


def take_fallback(policy: BasePolicy) -> str | None:
    """Returns a line that says why sampling fell back to a slower loop, once; None if it did not."""
    why, policy.decode_refusal = policy.decode_refusal, None
    return None if why is None else f"sampling falls back to rollout.decode={policy.decode}: {why}"


def _sample_layers(policy: Policy, wave: _Wave, recorder: _Recorder, finished: _Finished) -> None:
    """Samples a wave by calling the layers one by one, every branch once."""
    decoder, device = policy.decoder, policy.device
    prompts = [request.prompt_ids for request in wave.prompts().values()]
    longest = recorder.ids.shape[1]
    short = max(map(len, prompts)) < wave_cache.HELD_FROM
    kind = CopiedPrompts if policy.sharing_refusal or short else SharedPrompts
    texts = kind(decoder, policy.trunk, prompts, len(wave.rows), longest)
    ends = texts.hidden
    cells = _record_prompts(wave, texts.boundary)
    texts.forget_prompts()
    rows, branch, of_prompt = np.arange(len(wave.rows)), wave.places(), np.arange(len(prompts))
    for t in range(longest):
        # logits are gone before the layers run: they may take more than all activations
        tokens, going = recorder.choose(policy.next_token_logits(ends), rows, branch, t)
        rows = rows[going]
        finished.in_wave(len(wave.rows) - len(rows), len(rows), (t + 1) / longest)
        if len(rows) == 0:
            break
        now = split(branch[going], tokens[going])
        branch, of_prompt = now.branch, of_prompt[now.parents]
        texts.cache.copy_rows(*(torch.from_numpy(x).to(device) for x in (now.sources, now.targets)))
        ids = torch.from_numpy(now.tokens).to(device)[:, None]
        context = texts.step(t, of_prompt, ids)
        with texts.attending():
            hidden = decoder.run(decoder.embed(ids), 0, policy.cut, context)
            if wave.table is not None:
                taken = {layer: texts.cache.newest(layer, len(ids)) for layer in policy.trunk.taken}
                recorded = policy.trunk.joined(hidden, taken)[branch, 0]
                wave.table.rows[torch.from_numpy(cells[rows] + t).to(device)] = recorded
            hidden = decoder.run(hidden, policy.cut, policy.num_layers, context)
        texts.cache.filled += 1
        ends = hidden[:, 0]


def _sample_steps(policy: Policy, wave: _Wave, recorder: _Recorder, finished: _Finished) -> None:
    """Samples a wave in steps that are captured once and replayed.

    Rows that ended run along to the end of the wave: on a GPU a step takes the same time for few rows.
    """
    prompts, longest = [request.prompt_ids for request in wave.prompts().values()], recorder.ids.shape[1]
    group = wave.places()
    number = np.array([int((group[:i] == g).sum()) for i, g in enumerate(group)])
    each, width = int(number.max()) + 1, max(map(len, prompts))
    shape = StepShape(len(prompts), each, width, longest, wave.table is not None, recorder.noise is None)
    assert isinstance(policy.decode_steps, DecodeSteps)
    end_ids = torch.tensor(recorder.ending.end_ids, dtype=torch.long, device=policy.device)
    step = policy.decode_steps.get(shape, end_ids)
    done = prefill(policy.decoder, policy.trunk, prompts, width)
    cells = _record_prompts(wave, done.boundary)
    noise = None if recorder.noise is None else torch.from_numpy(recorder.noise).to(recorder.logps.dtype)
    step.load(
        done.pairs,
        torch.tensor([len(p) for p in prompts], device=policy.device),
        policy.next_token_logits(done.hidden),
        _by_prompt(torch.from_numpy(recorder.limits), group, number).to(policy.device),
        None if noise is None else _by_prompt(noise, group, number).to(policy.device),
    )
    del done
    rows = torch.from_numpy(group * each + number).to(policy.device)
    for t in range(longest):
        step()
        if (t + 1) % _STEPS_AT_ONCE and t + 1 < longest:
            continue
        left = int(step.going.sum())
        finished.in_wave(len(wave.rows) - left, left, (t + 1) / longest)
        if left == 0:
            break
    recorder.take(step, rows)
    if wave.table is not None:
        # the last token of a completion is only predicted, never run
        slots = np.arange(longest)
        there = slots < recorder.lengths[:, None] - 1
        assert step.trunk is not None
        own, there = (torch.from_numpy(x).to(policy.device) for x in ((cells[:, None] + slots)[there], there))
        wave.table.rows[own] = step.trunk[rows, :longest][there]


def _record_prompts(wave: _Wave, boundary: Float[Tensor, "P W D"]) -> Int[np.ndarray, " B"]:
    """Records the prompts' boundary; returns each row's first cell (0 if nothing is recorded)."""
    if wave.table is None:
        return np.zeros(len(wave.rows), np.int64)
    for request, output in zip(wave.prompts().values(), boundary, strict=True):
        cells = wave.table.prompt_cells(request)
        wave.table.rows[cells[0] : cells[-1] + 1] = output[: len(cells)]
    return np.array([wave.table.first_cell(row) for row in wave.rows])


def _by_prompt(values: Tensor, group: np.ndarray, number: np.ndarray) -> Tensor:
    """Returns values of the wave's rows as a table of prompts and their rows, 0 if there is no row."""
    table = values.new_zeros(int(group.max()) + 1, int(number.max()) + 1, *values.shape[1:])
    table[torch.from_numpy(group), torch.from_numpy(number)] = values
    return table


def _sample_model(policy: PlainPolicy, wave: _Wave, recorder: _Recorder, finished: _Finished) -> None:
    """Samples a wave with the model's own forward and cache, for any architecture, every branch once."""
    places, longest = wave.places(), recorder.ids.shape[1]
    prompts = [request.prompt_ids for request in wave.prompts().values()]
    ended = 0
    for batch in policy.batches([len(prompt) for prompt in prompts]):
        texts = policy.read([prompts[i] for i in batch])
        rows = np.flatnonzero(np.isin(places, batch))
        branch, size = np.searchsorted(batch, places[rows]), len(rows)
        for t in range(longest):
            logits = policy.sampled_logits(texts.logits)
            tokens, going = recorder.choose(logits, rows, branch, t)
            rows = rows[going]
            finished.in_wave(ended + size - len(rows), len(rows), (t + 1) / longest)
            if len(rows) == 0:
                break
            now = split(branch[going], tokens[going])
            branch = now.branch
            texts.extend(now.parents, now.tokens)
        ended += size


_LOOPS: dict[Loop, Callable[..., None]] = {
    "model": _sample_model,
    "layers": _sample_layers,
    "steps": _sample_steps,
}
