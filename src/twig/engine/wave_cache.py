"""The texts of a wave as its layers see them: keys and values of prompts and branches, masks, rotations.

A prompt's keys and values are held once, and once for all prompts what these begin with, if that is long: a
branch holds its own tokens only (`SharedPrompts`). Each branch gets a copy of its prompt's (`CopiedPrompts`)
where layers do not call transformers' attention interface, as they read whole rows, and behind short prompts,
as attention in parts then takes longer than it saves (a sixth of sampling with the embedded model).

Knows nothing of sampling. Legend: N branches, P prompts, W width, D hidden, C boundary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from twig.engine.decoder import Context, Decoder
from twig.engine.kv_cache import Buffers, KeyValueCache, PromptsKV, Trunk
from twig.engine.shared_attention import Groups, KeyPart, attending
from twig.runtime.memory_use import out_of_memory, trim_freed_memory

HELD_FROM = 16  # tokens of a wave's longest prompt from which prompts are held once
COMMON_FROM = 16  # tokens that all prompts begin with, from which these are run and held apart
# Tokens of prompts that the layers read at once on a CPU, so that their activations are small beside the keys
# and values. A GPU needs all to be busy.
READ_AT_ONCE = 2048
Pairs = list[tuple[Tensor, ...]]  # by layer keys and values, and states


@dataclass(frozen=True)
class Prefilled:
    """Prompts that were run: output of the last layer at each last token, boundary, keys and values."""

    hidden: Float[Tensor, "P D"]
    boundary: Float[Tensor, "P W C"]
    pairs: Pairs


def prefill(
    decoder: Decoder,
    trunk: Trunk,
    prompts: Sequence[np.ndarray],
    width: int,
    before: Pairs | None = None,
    start: int = 0,
) -> Prefilled:
    """Runs each prompt once, padded on the right to `width`; `before` has `start` tokens before all.

    No token of a prompt can see the padding.
    """
    together = max(READ_AT_ONCE // max(width, 1), 1) if decoder.device.type == "cpu" else len(prompts)
    buffers = Buffers(len(decoder.layers))
    cache = PromptsKV(pairs=dict(enumerate(before or [])), rows=len(prompts), buffers=buffers)
    hidden, boundary = _read(decoder, trunk, prompts[:together], width, cache, start)
    if together < len(prompts):
        hidden, boundary = (_begun(part, len(prompts)) for part in (hidden, boundary))
        for cache.first in range(together, len(prompts), together):
            here = slice(cache.first, cache.first + together)
            hidden[here], boundary[here] = _read(decoder, trunk, prompts[here], width, cache, start)
        trim_freed_memory()
    collected = cache.collected()
    return Prefilled(hidden, boundary, [collected.get(i, ()) for i in range(len(decoder.layers))])


def _begun(part: Tensor, rows: int) -> Tensor:
    """Returns a table of `rows` that begins with `part`."""
    table = part.new_empty(rows, *part.shape[1:])
    table[: len(part)] = part
    return table


def _read(
    decoder: Decoder, trunk: Trunk, prompts: Sequence[np.ndarray], width: int, cache: PromptsKV, start: int
) -> tuple[Float[Tensor, "P D"], Float[Tensor, "P W C"]]:
    """Runs the prompts from row `cache.first` on; returns their last hidden states and boundary."""
    device, count = decoder.device, len(prompts)
    ids = np.zeros((count, width), np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    keys = torch.arange(start + width, device=device).expand(count, -1)
    positions = keys[:, start:]
    visible = keys[:, None, :] <= positions[:, :, None]
    lengths = np.array([len(prompt) for prompt in prompts])
    ends = np.broadcast_to(lengths[:, None], ids.shape)
    runs = decoder.runs(ends, lengths, begun=bool(cache.pairs), ends_kept=True)
    masks, rotary = decoder.masks(visible, positions, keys), decoder.rotations(positions)
    tokens = torch.from_numpy(ids).to(device)
    context = Context(masks, rotary, positions, cache, runs, decoder.inputs(tokens))
    below = decoder.run(decoder.embed(tokens), 0, trunk.cut, context)
    hidden = decoder.run(below, trunk.cut, len(decoder.layers), context)
    last = torch.from_numpy(lengths - 1).to(device)
    here = slice(cache.first, cache.first + count)
    pairs = {layer: tuple(x[here] for x in pair) for layer, pair in cache.collected().items()}
    return hidden[torch.arange(count, device=device), last], trunk.joined(below, pairs)


class WaveCache(ABC):
    """The texts of a wave: prompts, run once, and branches of up to `longest` tokens behind them.

    There is room for `rows` branches at once.
    """

    def __init__(
        self, decoder: Decoder, trunk: Trunk, prompts: Sequence[np.ndarray], rows: int, longest: int
    ) -> None:
        self.decoder, self.longest, device = decoder, longest, decoder.device
        self.lengths = torch.tensor([len(p) for p in prompts], device=device)[:, None]
        self.width = max(map(len, prompts))
        self.padded = min(map(len, prompts)) < self.width
        self.positions = self.lengths + torch.arange(longest, device=device)
        self.rotary = decoder.rotations(self.positions)
        self.hidden, self.boundary, self.cache = self._open(trunk, prompts, rows)

    def forget_prompts(self) -> None:
        """Frees what is needed for the first token only."""
        del self.hidden, self.boundary

    def step(self, t: int, of_prompt: np.ndarray, ids: Int[Tensor, "N 1"]) -> Context:
        """Returns the context of token `t` of every branch; `of_prompt` [N] has the prompt of each."""
        here = torch.from_numpy(of_prompt).to(self.positions.device), slice(t, t + 1)
        rotary = {kind: (cos[here], sin[here]) for kind, (cos, sin) in self.rotary.items()}
        masks, inputs = self._masks(t, of_prompt), self.decoder.inputs(ids)
        return Context(masks, rotary, self.positions[here], self.cache, None, inputs)

    @abstractmethod
    def attending(self) -> Any:
        """Returns the context in which the layers are called."""

    @abstractmethod
    def _open(
        self, trunk: Trunk, prompts: Sequence[np.ndarray], rows: int
    ) -> tuple[Tensor, Tensor, KeyValueCache]:
        """Runs the prompts; returns their last hidden state and boundary, and the branches' cache."""

    @abstractmethod
    def _masks(self, t: int, of_prompt: np.ndarray) -> dict[int | None, Any]:
        """Returns what each kind of layer sees of the texts at token `t`."""


class SharedPrompts(WaveCache):
    """Prompts held once, and what they begin with once, if no layer has a window that ends there."""

    def _open(
        self, trunk: Trunk, prompts: Sequence[np.ndarray], rows: int
    ) -> tuple[Tensor, Tensor, KeyValueCache]:
        decoder = self.decoder
        self.common, parts, boundary = self._common(prompts), [], []
        before = None
        if self.common:
            first = prefill(decoder, trunk, [prompts[0][: self.common]], self.common)
            before = first.pairs
            parts, boundary = [before], [first.boundary.expand(len(prompts), -1, -1)]
        rests, width = [p[self.common :] for p in prompts], self.width - self.common
        rest = prefill(decoder, trunk, rests, width, before, self.common)
        parts.append(rest.pairs)
        cache = KeyValueCache(len(decoder.layers), self.longest, rows, parts)
        cache.begin_states(decoder.states(rest.pairs))
        return rest.hidden, torch.cat([*boundary, rest.boundary], 1), cache

    def _common(self, prompts: Sequence[np.ndarray]) -> int:
        """Returns how many tokens all prompts begin with, 0 if it is not worth while."""
        end = self.width + self.longest
        if len(prompts) == 1 or any(w is not None and w < end for w in self.decoder.windows):
            return 0
        shortest = min(map(len, prompts)) - 1  # each runs its last token
        table = np.stack([p[:shortest] for p in prompts])
        same = (table == table[0]).all(0)
        common = shortest if same.all() else int(same.argmin())
        return common if common >= COMMON_FROM else 0

    @contextmanager
    def attending(self) -> Iterator[None]:
        with attending(self.decoder.config):
            yield

    def _masks(self, t: int, of_prompt: np.ndarray) -> dict[int | None, Any]:
        device, now = self.positions.device, self.lengths + t
        groups = Groups.of(of_prompt, len(self.lengths), device)
        together = Groups.of(np.zeros_like(of_prompt), 1, device) if self.common else None
        slots = torch.arange(self.common, self.width, device=device)
        own = torch.arange(t + 1, device=device)[None]
        inside = slots < self.lengths if self.padded else None
        masks: dict[int | None, Any] = {}
        for window in dict.fromkeys(self.decoder.windows):
            seen, seen_own = inside, None
            if window is not None and window < self.width + self.longest:
                seen = (slots < self.lengths) & (now - slots < window)
                seen_own = t - own < window
            parts = [KeyPart(groups, self._mask(seen)), KeyPart(None, self._mask(seen_own))]
            if together:
                parts.insert(0, KeyPart(together, None))
            masks[window] = tuple(parts)
        return masks

    def _mask(self, seen: Tensor | None) -> Tensor | None:
        if seen is None:
            return None
        dtype = torch.promote_types(self.decoder.dtype, torch.float32)
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


class CopiedPrompts(WaveCache):
    """Every branch has a copy of its prompt, padded on the right; its own tokens follow the padding."""

    def _open(
        self, trunk: Trunk, prompts: Sequence[np.ndarray], rows: int
    ) -> tuple[Tensor, Tensor, KeyValueCache]:
        done = prefill(self.decoder, trunk, prompts, self.width)
        slots = torch.arange(self.width + self.longest, device=self.lengths.device)
        self.slot_positions = torch.where(slots < self.width, slots, self.lengths + slots - self.width)
        self.filled = (slots < self.lengths) | (slots >= self.width)
        self.masked = self.padded or any(w is not None and w < len(slots) for w in self.decoder.windows)
        states = self.decoder.states(done.pairs)
        pairs = [pair[: len(pair) - len(states.get(layer, ()))] for layer, pair in enumerate(done.pairs)]
        cache = KeyValueCache.begun(pairs, rows, len(slots))
        cache.begin_states(states)
        return done.hidden, done.boundary, cache

    @contextmanager
    def attending(self) -> Iterator[None]:
        yield

    def _masks(self, t: int, of_prompt: np.ndarray) -> dict[int | None, Any]:
        if not self.masked:
            return {w: None for w in self.decoder.windows}
        stop = self.width + t + 1
        masks = self.decoder.masks(
            self.filled[:, None, :stop], self.positions[:, t : t + 1], self.slot_positions[:, :stop]
        )
        prompt = torch.from_numpy(of_prompt).to(self.positions.device)
        return {w: None if mask is None else mask[prompt] for w, mask in masks.items()}


@torch.no_grad()
def why_not_shared(decoder: Decoder) -> str | None:
    """Returns why a model's layers cannot share prompts, None if they can: compared with its own forward."""
    draw, device = np.random.default_rng(0), decoder.device
    vocabulary = decoder.embedding.num_embeddings
    prompts = [draw.integers(0, vocabulary, COMMON_FROM + n) for n in (6, 4)]
    prompts[1][:COMMON_FROM] = prompts[0][:COMMON_FROM]
    own = draw.integers(0, vocabulary, (3, 4))  # two branches of the first prompt
    of_prompt = np.array([0, 1, 0])
    try:
        texts = SharedPrompts(decoder, Trunk(0, decoder.width), prompts, 3, 4)
        texts.cache.copy_rows(*(torch.tensor([row], device=device) for row in (0, 2)))
        for t in range(4):
            with texts.attending():
                ids = torch.from_numpy(own[:, t : t + 1]).to(device)
                context = texts.step(t, of_prompt, ids)
                hidden = decoder.run(decoder.embed(ids), 0, len(decoder.layers), context)
            texts.cache.filled += 1
        ours = decoder.logits(hidden[:, 0])
    except Exception as error:
        if out_of_memory(error):
            raise
        return f"its layers cannot be called with such a cache ({type(error).__name__}: {error})"
    for branch, place in enumerate(of_prompt):
        ids = torch.from_numpy(np.concatenate([prompts[place], own[branch]]))[None].to(device)
        expected = decoder.model(input_ids=ids, use_cache=False).logits[0, -1]
        gap = float((ours[branch] - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        if not gap <= decoder.tolerance:
            return f"its logits differ by {gap:.1e} of their size from its own forward"
    return None
