"""One decode step over buffers that never move, so that a CUDA device can capture it once and replay it.

A step of the plain loop is hundreds of small launches, and the device waits for each. Here a step chooses a
token for every row, records it, runs it through all layers and leaves the next logits, with no shape, address
or decision that depends on a value: captured as a CUDA graph it is one launch, and nothing is synchronised
while it is replayed. A prompt's keys and values are held once for all of its rows, and a row holds its own
completion only.

The layers are called as in `decoder`, with an attention function of our own (registered in transformers'
interface while a step is captured): scores over the prompt are one product for all rows of a group, and one
softmax in float32 or better goes over both parts. `check` compares it with the model's own forward before
anything relies on it.

Knows nothing of rewards, tries or algorithms. Legend: P prompts, R rows a prompt, B = P * R rows, S slots of
a prompt, T slots of a completion, H heads, K heads of keys, D head size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from twig.engine.inverse_cdf import invert
from twig.engine.policy import Policy
from twig.engine.shared_attention import attending
from twig.engine.wave_cache import prefill
from twig.runtime.memory_use import out_of_memory

_ATTENTION = "twig_decode"  # its name in transformers' interface
_SLOTS = 64  # lengths of prompts and completions are rounded up to this, so that steps share one graph
# Copies of prompts that take less than this share of the weights, which every step reads, are cheaper than
# the launches that sharing takes.
_SHARE_FROM = 0.05
_WARM_UPS = 2  # before a capture: libraries allocate their workspaces in the first calls
# torch has products of half precision with float32 results from here on
_WIDE_PRODUCT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


class NotCaptured(Exception):
    """A step could not be compiled or captured on this machine; the message says why."""


@dataclass
class LayerCache:
    """Keys and values of one layer: each prompt's [P, K, S, D], and each row's own [B, K, T, D].

    If a prompt's are not shared (`prompt` is None), they are the first S of the row's own [B, K, S + T, D].
    Stands in for a cache of transformers: `update` writes the new token's pair at slot `at` of its own and
    returns both parts, which only `attend` can read.
    """

    prompt: tuple[Tensor, Tensor] | None
    own: tuple[Tensor, Tensor]
    at: Int[Tensor, " 1"]

    def update(self, keys: Tensor, values: Tensor, *args: object, **kwargs: object) -> tuple[tuple, tuple]:
        """Writes one token's keys and values [B, K, 1, D]; returns (prompt's or None, own) of both."""
        self.own[0].index_copy_(2, self.at, keys)
        self.own[1].index_copy_(2, self.at, values)
        before = self.prompt or (None, None)
        return (before[0], self.own[0]), (before[1], self.own[1])


def attend(
    module: nn.Module,
    query: Float[Tensor, "B H 1 D"],
    key: tuple[Tensor | None, Tensor],
    value: tuple[Tensor | None, Tensor],
    attention_mask: Float[Tensor, "P 1 R 1 S"],
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B 1 H D"], None]:
    """Attention of one query a row over its prompt's part and its own, as transformers calls it.

    softmax([q Kp^T; q Ko^T] * scaling + mask) [Vp; Vo], the soft cap before the mask. Raises TypeError for
    terms that it does not know, such as sinks.
    """
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise TypeError("attention with sinks or position biases")
    (rows, heads, length, size), prompts = key[1].shape, len(attention_mask)
    each, shared = rows // prompts, query.shape[1] // heads
    own = _wide_product(query.view(-1, shared, size), key[1].view(-1, length, size).transpose(1, 2))
    scores = own = own.view(prompts, each, heads, shared, length).transpose(1, 2)
    if key[0] is not None:  # a group's queries against its prompt are one product
        by_group = query.view(prompts, each, heads, shared, size).transpose(1, 2)
        by_group = by_group.reshape(-1, each * shared, size)
        before = _wide_product(by_group, key[0].view(len(by_group), -1, size).transpose(1, 2))
        scores = torch.cat([before.view(*own.shape[:4], -1), own], -1)
    scores = scores * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax(scores + attention_mask, -1).to(query.dtype)
    of_prompt, of_own = weights.split([weights.shape[-1] - length, length], -1)
    of_own = of_own.transpose(1, 2).reshape(-1, shared, length)
    attended = torch.bmm(of_own, value[1].view(len(of_own), length, -1))
    if value[0] is not None:
        of_prompt = of_prompt.reshape(prompts * heads, each * shared, -1)
        before = torch.bmm(of_prompt, value[0].view(len(of_prompt), of_prompt.shape[2], -1))
        attended = attended.view(prompts, each, heads, shared, -1)
        attended = attended + before.view(prompts, heads, each, shared, -1).transpose(1, 2)
    return attended.reshape(rows, 1, heads * shared, -1), None


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """A batched product in float32 or better."""
    if left.dtype in (torch.bfloat16, torch.float16):
        if left.is_cuda and _WIDE_PRODUCT:
            return torch.bmm(left, right, out_dtype=torch.float32)
        return torch.bmm(left, right).float()
    return torch.bmm(left, right)


def _run_layer(layer: nn.Module, hidden: Tensor, mask: Any, rotary: Any, at: Tensor, cache: Any) -> Tensor:
    return layer(
        hidden,
        attention_mask=mask,
        position_embeddings=rotary,
        position_ids=at,
        past_key_values=cache,
        use_cache=True,
    )


def _distribution(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities [B, V], log Z [B, 1] and entropies [B, 1] of rows of logits.

    A softmax of torch gives each row to one multiprocessor, which is slow for few long rows.
    """
    highest = logits.amax(-1, keepdim=True)
    weights = (logits - highest).exp()
    total = weights.sum(-1, keepdim=True)
    probabilities = weights / total
    return probabilities, highest + total.log(), torch.special.entr(probabilities).sum(-1, keepdim=True)


@dataclass(frozen=True)
class StepShape:
    """How much a decode step has room for; `record` keeps the trunk's output, `greedy` draws no noise."""

    prompts: int
    rows: int  # of each prompt
    slots: int  # of a prompt
    length: int  # of a completion
    record: bool = True
    greedy: bool = False
    shared: bool = True  # whether a prompt's keys and values are held once for all of its rows

    def rounded(self) -> "StepShape":
        """The shape with some more room, so that waves that are alike have the same one."""
        power = 1 << (self.prompts - 1).bit_length()
        prompts = next(n for n in (3 * power // 4, power) if n >= self.prompts)
        slots, length = (-(-n // _SLOTS) * _SLOTS for n in (self.slots, self.length))
        return replace(self, prompts=prompts, slots=slots, length=length)

    def covers(self, other: "StepShape") -> bool:
        """Whether a wave of the other shape has room in this one and uses half of its prompts or more."""
        mine, its = (replace(shape, prompts=0, slots=0, length=0) for shape in (self, other))
        room = self.slots >= other.slots and self.length >= other.length
        return mine == its and room and other.prompts <= self.prompts <= 2 * other.prompts


@dataclass
class DecodeStep:
    """The buffers of one shape, and the step over them.

    `load` begins a wave, each call advances every row by a token. `lengths`, `finished`, `going`, `ids`,
    `logps`, `entropies`, and `trunk` [B, T, hidden size] are what was sampled so far; a row that has ended
    runs along, and nothing of it is recorded any more but in slots behind its length.
    """

    policy: Policy
    shape: StepShape
    end_ids: Int[Tensor, " E"]
    compiled: bool = False
    replay: Callable[[], None] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        policy, shape, device = self.policy, self.shape, self.policy.device
        decoder = policy.decoder
        rows, wide = shape.prompts * shape.rows, torch.promote_types(policy.dtype, torch.float32)

        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        self.t = zeros(1, dtype=torch.long)
        # the slot of a row's own part that the token is written to
        self.at = self.t if shape.shared else torch.full_like(self.t, shape.slots)
        self.prompt_lengths = zeros(shape.prompts, dtype=torch.long)
        self.limits, self.lengths = zeros(rows, dtype=torch.long), zeros(rows, dtype=torch.long)
        self.finished, self.going = zeros(rows, dtype=torch.bool), zeros(rows, dtype=torch.bool)
        self.ids = zeros(rows, shape.length, dtype=torch.long)
        self.logps, self.entropies = (zeros(rows, shape.length, dtype=wide) for _ in range(2))
        self.noise = None if shape.greedy else zeros(rows, shape.length, dtype=wide)
        self.trunk = None
        if shape.record:
            self.trunk = zeros(rows, shape.length, policy.embeddings.shape[1], dtype=policy.dtype)
        self.logits = zeros(rows, policy.embeddings.shape[0], dtype=wide)
        self.slots = torch.arange(shape.slots + shape.length, device=device)
        positions = self.slots[None]
        self.rotary = {kind: (cos[0], sin[0]) for kind, (cos, sin) in decoder.rotations(positions).items()}
        self.caches: list[LayerCache] = []
        self.layer, self.distribution = _run_layer, _distribution
        if self.compiled:
            self.layer = torch.compile(_run_layer, dynamic=False)
            self.distribution = torch.compile(_distribution, dynamic=False)

    def _open_caches(self, pairs: Sequence[tuple[Tensor, ...]]) -> None:
        """Makes the caches, of the head sizes that `pairs` of the layers have."""
        shape = self.shape

        def room(pair: tuple[Tensor, ...], count: int, slots: int) -> tuple[Tensor, Tensor]:
            keys, values = (x.new_zeros(count, x.shape[1], slots, x.shape[3]) for x in pair)
            return keys, values

        for pair in pairs:
            prompt = room(pair, shape.prompts, shape.slots) if shape.shared else None
            slots = shape.length + (0 if shape.shared else shape.slots)
            self.caches.append(LayerCache(prompt, room(pair, shape.prompts * shape.rows, slots), self.at))

    def load(
        self,
        pairs: Sequence[tuple[Tensor, ...]],
        prompt_lengths: Int[Tensor, " P2"],
        logits: Float[Tensor, "P2 V"],
        limits: Int[Tensor, "P2 R"],
        noise: Float[Tensor, "P2 R N"] | None,
    ) -> None:
        """Begins a wave: `pairs` has each layer's keys and values [P2, K, W, D] of its prompts, P2 <= P.

        `limits` are the most tokens of each row, 0 where there is none. `noise` is not needed if `greedy`.
        Raises NotCaptured.
        """
        if not self.caches:
            self._open_caches(pairs)
        if self.replay is None:
            try:
                self.replay = self._captured()
            except Exception as error:
                if out_of_memory(error):
                    raise
                first = str(error).strip().partition("\n")[0]
                raise NotCaptured(f"{type(error).__name__}: {first}") from error
        count, each = len(prompt_lengths), self.shape.rows
        for cache, pair in zip(self.caches, pairs, strict=True):
            for buffer, values in zip(cache.prompt or cache.own, pair, strict=True):
                if cache.prompt is None:
                    values = values.repeat_interleave(each, 0)
                buffer[: len(values), :, : values.shape[2]] = values
        self.t.zero_()
        if not self.shape.shared:
            self.at.fill_(self.shape.slots)
        # a prompt that is not there sees one empty slot: no softmax is over nothing
        self.prompt_lengths.fill_(1)[:count] = prompt_lengths
        self.limits.zero_()[: count * each] = limits.flatten()
        self.lengths.zero_()
        self.finished.zero_()
        self.going.copy_(self.limits > 0)
        if self.noise is not None:
            assert noise is not None, "only greedy steps take no noise"
            self.noise.zero_()[: count * each, : noise.shape[2]] = noise.flatten(0, 1)
        self.logits.zero_()[: count * each] = logits.repeat_interleave(each, 0)

    def __call__(self) -> None:
        """Chooses a token for every row from `logits`, and runs it."""
        assert self.replay is not None, "`load` begins a wave"
        self.replay()

    def _captured(self) -> Callable[[], None]:
        """Captures the step as one launch, on a device that can."""
        if self.policy.device.type != "cuda":
            return self._step
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        # Each shape compiles the step again: at most a few, but more than dynamo expects.
        with torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=512):
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    self._step()
            here.wait_stream(side)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                self._step()
        return graph.replay

    def _step(self) -> None:
        tokens = self._choose()
        with attending(self.policy.decoder.config, _ATTENTION, attend):
            self._forward(tokens)
        self.advance()

    def advance(self) -> None:
        """Moves on to the next position."""
        self.t += 1
        if not self.shape.shared:
            self.at += 1

    def _choose(self) -> Int[Tensor, " B"]:
        """Chooses and records the tokens of position `t`, as `sampler._Recorder.choose` does."""
        t = self.t
        probabilities, normaliser, entropies = self.distribution(self.logits)
        if self.noise is None:
            tokens = self.logits.argmax(-1)
        else:
            tokens = invert(probabilities, self.noise.index_select(1, t)[:, 0])
        self.ids.index_copy_(1, t, tokens[:, None])
        self.logps.index_copy_(1, t, self.logits.gather(-1, tokens[:, None]) - normaliser)
        self.entropies.index_copy_(1, t, entropies)
        self.lengths += self.going
        ended = (tokens[:, None] == self.end_ids).any(-1)
        self.finished |= self.going & ended
        self.going &= ~ended & (self.limits > t + 1)
        return tokens

    def _forward(self, tokens: Int[Tensor, " B"]) -> None:
        """Runs one token a row; leaves the trunk's output and the next logits in their buffers."""
        policy, decoder = self.policy, self.policy.decoder
        masks = self._masks()
        now = (self.prompt_lengths + self.t).repeat_interleave(
            self.shape.rows, output_size=len(tokens)
        )  # the position of this token
        rotary = {kind: (cos[now][:, None], sin[now][:, None]) for kind, (cos, sin) in self.rotary.items()}
        hidden = decoder.embed(tokens[:, None])
        for number, layer in enumerate(decoder.layers):
            if number == policy.cut and self.trunk is not None:
                self.trunk.index_copy_(1, self.t, hidden)
            hidden = self.layer(
                layer,
                hidden,
                masks[decoder.windows[number]],
                rotary[decoder.rotary_types[number]],
                now[:, None],
                self.caches[number],
            )
        self.logits.copy_(policy.next_token_logits(hidden[:, 0]))

    def _masks(self) -> dict[int | None, Float[Tensor, "P 1 R 1 S"]]:
        """Additive masks over the slots of a prompt and of a completion, by sliding window.

        Slot s of a prompt is position s, slot s of a completion position length + s; the query is at
        length + t.
        """
        lengths, slots = self.prompt_lengths[:, None], self.shape.slots
        inside = self.slots < slots
        positions = torch.where(inside, self.slots, lengths + self.slots - slots)
        visible = torch.where(inside, positions < lengths, positions <= lengths + self.t)
        masks = {}
        for window in dict.fromkeys(self.policy.decoder.windows):
            seen = visible if window is None else visible & (lengths + self.t - positions < window)
            mask = torch.zeros(seen.shape, dtype=self.logits.dtype, device=seen.device)
            mask = mask.masked_fill_(~seen, float("-inf"))[:, None, None, None]
            masks[window] = mask.expand(-1, -1, self.shape.rows, -1, -1)
        return masks


class DecodeSteps:
    """The decode steps of a policy, by shape: made when they are first asked for, and kept for the next wave.

    What is kept takes memory until `clear`. Raises ValueError if such steps are not the model's own forward.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.steps: dict[tuple[StepShape, Any], DecodeStep] = {}
        self.weight_bytes = sum(p.numel() * p.element_size() for p in policy.model.parameters())
        self.bytes_per_slot = max(_check(policy, shared) for shared in (False, True))

    def get(self, shape: StepShape, end_ids: Int[Tensor, " E"]) -> DecodeStep:
        """The step with room for that shape; it decides itself whether prompts are shared."""
        shape = shape.rounded()
        copies = self.bytes_per_slot * shape.slots * shape.prompts * (shape.rows - 1)
        shape = replace(shape, shared=copies > _SHARE_FROM * self.weight_bytes)
        # an evaluation is over before a compiler has earned what it took
        compiled = self.policy.decode == "compiled" and not shape.greedy
        kind = (tuple(end_ids.tolist()), self.policy.adapter_is_on, compiled)
        for (kept, its_kind), step in self.steps.items():
            if its_kind == kind and kept.covers(shape):
                return step
        alike = [k for k in self.steps if k[0].greedy == shape.greedy and k[0].record == shape.record]
        # two: whole waves, and the shorter last one of a step; what the new one covers is not needed
        alike = [k for k in alike if not shape.covers(k[0])][-1:]
        self.steps = {k: self.steps[k] for k in alike}
        self.steps[shape, kind] = DecodeStep(self.policy, shape, end_ids, compiled)
        return self.steps[shape, kind]

    def clear(self) -> bool:
        """Frees the buffers; returns whether there were any."""
        kept, self.steps = bool(self.steps), {}
        return kept


@torch.no_grad()
def _check(policy: Policy, shared: bool) -> int:
    """Checks steps over such a cache against the model's own forward; returns the bytes a token takes in it.

    Raises ValueError if they differ.
    """
    decoder, device = policy.decoder, policy.device
    vocabulary = policy.embeddings.shape[0]
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, vocabulary, length) for length in (6, 4)]
    forced = torch.from_numpy(draw.integers(0, vocabulary, (4, 4))).to(device)  # of 2 rows each, 4 tokens
    done = prefill(decoder, policy.trunk, prompts, 6)
    step = DecodeStep(policy, StepShape(2, 2, 6, 4, False, True, shared), forced.new_zeros(1))
    step.replay = step._step
    lengths = torch.tensor([6, 4], device=device)
    pairs = done.pairs
    try:
        step.load(pairs, lengths, policy.next_token_logits(done.hidden), lengths.new_full((2, 2), 4), None)
        for t in range(4):
            with attending(decoder.config, _ATTENTION, attend):
                step._forward(forced[:, t])
            step.advance()
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ValueError(f"its layers cannot be called with such a cache ({error})") from error
    for row in range(4):
        ids = torch.cat([torch.from_numpy(prompts[row // 2]).to(device), forced[row]])
        own = policy.sampled_logits(policy.model(input_ids=ids[None], use_cache=False).logits[:, -1])[0]
        seen = own.isfinite()
        gap = (step.logits[row] - own)[seen].abs().max() / own[seen].abs().max().clamp(min=1e-6)
        if not gap <= decoder.tolerance:
            raise ValueError(f"its logits differ by {float(gap):.1e} of their size from its own forward")
    return sum(x[0, :, 0].numel() * x.element_size() for pair in pairs for x in pair)
