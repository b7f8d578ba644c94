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
from jaxtyping import Bool, Float, Int
from torch import Tensor

from twig.decoder import Context, KeyValueCache
from twig.policy import Policy
from twig.records import Completion

SAMPLING, CREDIT, REPLAY, DATA = range(4)  # streams of random numbers that never meet
_COMPACT_BELOW = 0.75  # copy the cache once fewer than this share of its rows are unfinished


@dataclass(frozen=True)
class Request:
    """Completions wanted for one prompt: `num` of them, each of at most `max_tokens` tokens.

    `slot` is the prompt's place in the step; it names the noise. The last `prefix_length` ids of the prompt
    are the kept part of an earlier completion: they belong to the completion's text.
    """

    prompt_ids: np.ndarray
    num: int
    max_tokens: int
    slot: int
    prefix_length: int = 0

    @property
    def prefix(self) -> np.ndarray:
        return self.prompt_ids[len(self.prompt_ids) - self.prefix_length :]


@dataclass(frozen=True)
class Sampled:
    """What `sample` returns: per request its completions and the boundary cells of its prompt, and the table
    they index.

    `boundary` is [C, D], one row per token that went through the trunk; None where none was recorded.
    """

    completions: list[list[Completion]]
    prompt_cells: list[np.ndarray]
    boundary: Tensor | None


def generator(seed: int, stream: int, *counter: int) -> np.random.Generator:
    """A random generator that is a function of its arguments only (at most three counters)."""
    words = [0, *counter, *[0] * (3 - len(counter))]
    return np.random.Generator(np.random.Philox(counter=words, key=[seed, stream]))


def uniforms(seed: int, step: int, slot: int, completion: int, length: int) -> np.ndarray:
    """The uniform numbers in [0, 1) behind the tokens of one completion: entry t is that of position t."""
    return generator(seed, SAMPLING, completion, slot, step).random(length)


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
) -> Sampled:
    """Samples all requests, `wave_size` completions at a time. `record` keeps the boundary for the update.

    A completion ends with the first of `end_ids`, or with the token that completes one of the texts `stop`;
    either is part of it. Else it is cut off at its length limit. `decode` turns lists of ids into texts. With
    `greedy`, the most probable token is taken and no noise is used. `on_tokens` hears of progress: the tokens
    sampled since the last call.
    """
    rows = [(r, c) for r, request in enumerate(requests) for c in range(request.num)]
    completions: list[list[Completion]] = [[] for _ in requests]
    prompt_cells = [np.empty(0, np.int64) for _ in requests]
    tables: list[Tensor] = []
    draw = _sample_plain if policy.plain else _sample_wave
    record = record and not policy.plain
    for start in range(0, len(rows), wave_size):
        wave = rows[start : start + wave_size]
        noise = (
            None
            if greedy
            else [uniforms(seed, step, requests[r].slot, c, requests[r].max_tokens) for r, c in wave]
        )
        used = sorted({r for r, _ in wave})
        ending = _Ending(end_ids, stop, decode, [requests[r].prefix for r, _ in wave])
        limits = np.array([requests[r].max_tokens for r, _ in wave])
        prompt_of = np.array([used.index(r) for r, _ in wave])
        drawn = draw(
            policy,
            [requests[r].prompt_ids for r in used],
            prompt_of,
            limits,
            noise,
            ending,
            record,
            on_tokens,
        )
        offset = sum(len(t) for t in tables)
        ids = [drawn.ids[row, :length] for row, length in enumerate(drawn.lengths)]
        texts = decode([np.concatenate([requests[r].prefix, i]) for (r, _), i in zip(wave, ids, strict=True)])
        for row, (r, _) in enumerate(wave):
            completions[r].append(drawn.completion(row, texts[row], offset if record else None))
        if record:
            tables.append(drawn.boundary)
            for i, r in enumerate(used):
                if not len(prompt_cells[r]):
                    first = offset + i * drawn.prompt_width
                    prompt_cells[r] = np.arange(first, first + len(requests[r].prompt_ids))
    return Sampled(completions, prompt_cells, torch.cat(tables) if tables else None)


@dataclass
class _Drawn:
    """The rows of one wave, padded: `ids`, `logps`, `entropies` [B, T], `lengths`, `finished` [B].

    `boundary` holds the prompts' cells first (`prompt_width` per prompt), then T per row.
    """

    ids: np.ndarray
    logps: np.ndarray
    entropies: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    prompt_width: int
    num_prompts: int
    boundary: Tensor | None

    def completion(self, row: int, text: str, offset: int | None) -> Completion:
        length = int(self.lengths[row])
        cells = np.empty(0, np.int64)
        if offset is not None:
            first = offset + self.num_prompts * self.prompt_width + row * self.ids.shape[1]
            cells = np.arange(first, first + length)
        ids, logps, entropies = (x[row, :length].copy() for x in (self.ids, self.logps, self.entropies))
        return Completion(ids, logps, entropies, bool(self.finished[row]), text, cells)


class _Ending:
    """Which rows of a wave end with their newest token: an end token, or one that completes a stop text."""

    def __init__(
        self,
        end_ids: Sequence[int],
        stop: Sequence[str],
        decode: Callable[[list[np.ndarray]], list[str]],
        prefixes: list[np.ndarray],
    ) -> None:
        self.end_ids, self.stop, self.decode, self.prefixes = list(end_ids), list(stop), decode, prefixes
        # A token is at least a byte of the text. The others are room for those that a decoder treats
        # differently at the beginning of a text.
        self.reach = max((len(text.encode()) for text in stop), default=0) + 4

    def stopped(self, ids: Int[Tensor, "A T"], rows: Int[Tensor, " A"]) -> Bool[Tensor, " A"]:
        """Whether the ids so far of the wave's `rows` have a stop text at their end."""
        tails = ids[:, -self.reach :].cpu().numpy()
        missing = self.reach - tails.shape[1]
        if missing:
            tails = [
                np.concatenate([self.prefixes[r][-missing:], tail])
                for r, tail in zip(rows, tails, strict=True)
            ]
        found = [any(text in tail for text in self.stop) for tail in self.decode(list(tails))]
        return torch.tensor(found, device=ids.device)


class _Recorder:
    """Chooses each step's tokens and keeps what is known of them. Rows are those of the wave, before
    compaction."""

    def __init__(
        self, policy: Policy, limits: np.ndarray, noise: list[np.ndarray] | None, ending: _Ending
    ) -> None:
        size, longest = len(limits), int(limits.max())
        device = policy.device
        wide = torch.promote_types(policy.model.dtype, torch.float32)
        self.noise = None
        if noise is not None:
            table = np.zeros((size, longest))
            for row, numbers in zip(table, noise, strict=True):
                row[: len(numbers)] = numbers
            self.noise = torch.from_numpy(table).to(wide).to(device)
        self.limits = torch.from_numpy(limits).to(device)
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

    def drawn(self, prompt_width: int, num_prompts: int, boundary: Tensor | None) -> _Drawn:
        arrays = [
            x.cpu().numpy() for x in (self.ids, self.logps, self.entropies, self.lengths, self.finished)
        ]
        return _Drawn(*arrays, prompt_width, num_prompts, boundary)


def invert(probabilities: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The token at which the cumulative distribution first exceeds `uniform`: never one of probability 0.

    The last sum stands for 1, so rounding in a large vocabulary cannot fall off the end.
    """
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1]
    below = torch.minimum(uniform * total, total * (1 - torch.finfo(total.dtype).eps))
    return torch.searchsorted(cumulative, below[:, None], right=True)[:, 0]


def _sample_wave(
    policy: Policy,
    prompts: list[np.ndarray],
    prompt_of: np.ndarray,
    limits: np.ndarray,
    noise: list[np.ndarray] | None,
    ending: _Ending,
    record: bool,
    on_tokens: Callable[[int], None] | None,
) -> _Drawn:
    decoder, device = policy.decoder, policy.device
    width, longest = max(map(len, prompts)), int(limits.max())
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    recorder = _Recorder(policy, limits, noise, ending)
    hidden, trunk, cache = _prefill(policy, prompts, width)
    rows = torch.from_numpy(prompt_of).to(device)
    logits = policy.next_token_logits(hidden)[rows]
    cache = cache.select(rows, width + longest)
    lengths = lengths[rows]

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

    boundary = None
    if record:
        boundary = trunk.new_zeros(len(prompts) * width + len(limits) * longest, trunk.shape[-1])
        boundary[: len(prompts) * width] = trunk.flatten(0, 1)
    alive = torch.arange(len(limits), device=device)
    current = alive  # the cache's row of each alive row is its place here
    first_cell = len(prompts) * width + alive * longest
    for t in range(longest):
        tokens, going = recorder.choose(logits, current, t)
        left = int(going.sum())
        if on_tokens is not None:
            on_tokens(left)
        if left == 0:
            break
        if left < _COMPACT_BELOW * len(current):
            keep = going.nonzero()[:, 0]
            cache, current, tokens = cache.select(keep), current[keep], tokens[keep]
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
        if boundary is not None:
            boundary[first_cell[current] + t] = hidden[:, 0]
        hidden = decoder.run(hidden, policy.cut, policy.num_layers, context)
        cache.filled += 1
        logits = policy.next_token_logits(hidden[:, 0])
    return recorder.drawn(width, len(prompts), boundary)


def _prefill(policy: Policy, prompts: list[np.ndarray], width: int) -> tuple[Tensor, Tensor, KeyValueCache]:
    """Runs each prompt once: the last layer's output at its last token [P, D], the boundary [P, width, D],
    the cache.

    Prompts are padded on the right, where no token of the prompt can see the padding.
    """
    decoder, device = policy.decoder, policy.device
    ids = np.zeros((len(prompts), width), np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    positions = torch.arange(width, device=device).expand(len(prompts), -1)
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril().expand(len(prompts), -1, -1)
    cache = KeyValueCache(policy.num_layers, width)
    context = Context(
        decoder.masks(causal, positions, positions), decoder.rotations(positions), positions, cache
    )
    trunk = decoder.run(decoder.embed(torch.from_numpy(ids).to(device)), 0, policy.cut, context)
    hidden = decoder.run(trunk, policy.cut, policy.num_layers, context)
    cache.filled = width
    last = torch.tensor([len(p) - 1 for p in prompts], device=device)
    return hidden[torch.arange(len(prompts), device=device), last], trunk, cache


def _sample_plain(
    policy: Policy,
    prompts: list[np.ndarray],
    prompt_of: np.ndarray,
    limits: np.ndarray,
    noise: list[np.ndarray] | None,
    ending: _Ending,
    record: bool,
    on_tokens: Callable[[int], None] | None,
) -> _Drawn:
    """The same with the model's own forward and cache, one prompt at a time, for any architecture."""
    recorder = _Recorder(policy, limits, noise, ending)
    for i, prompt in enumerate(prompts):
        alive = torch.from_numpy(np.flatnonzero(prompt_of == i)).to(policy.device)
        ids = torch.from_numpy(prompt).to(policy.device).expand(len(alive), -1)
        cache = None
        for t in range(int(limits.max())):
            out = policy.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = getattr(out, "past_key_values", None)
            tokens, going = recorder.choose(policy.sampled_logits(out.logits[:, -1]), alive, t)
            if on_tokens is not None:
                on_tokens(int(going.sum()))
            if not going.any():
                break
            # without a cache of the usual name, the whole text is run again
            ids = tokens[:, None] if cache is not None else torch.cat([ids, tokens[:, None]], 1)
    return recorder.drawn(0, len(prompts), None)
