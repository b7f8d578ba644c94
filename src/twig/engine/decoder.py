"""Calls the layers of a Hugging Face decoder one by one, with any attention mask at any positions.

Slicing `model.layers` and calling the model is not the same: layer types, rotary embeddings per type,
embedding scales and sliding windows go wrong in silence. Here each layer is called as the model's own forward
calls it, with its own mask and rotary embedding, and `check` compares the result with the model's own forward
before anything relies on it. What a family adds is read from its config (windows, scales, soft caps), never
from its name.

Knows nothing of adapters, tries or algorithms. Legend: B rows, L columns (queries), S keys, D hidden, V
vocabulary.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from twig.common.errors import UserError
from twig.engine.kv_cache import KeyValueCache, PrefixKV, StopForward
from twig.engine.lm_head import Head

PLAIN = "Set model.engine=plain to train it with the plain batched forward"
_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass
class Context:
    """What the layers of one pass share: masks by window, rotary embeddings by layer type, positions."""

    masks: dict[int | None, Tensor | None]
    rotary: dict[str | None, tuple[Tensor, Tensor]]
    positions: Tensor
    cache: KeyValueCache | PrefixKV | None = None

    def at(self, columns: Int[Tensor, "B R"], cache: PrefixKV) -> "Context":
        """Returns the context of some columns of each row, with another cache."""
        masks = {
            window: None if mask is None else take(mask[:, 0], columns)[:, None]
            for window, mask in self.masks.items()
        }
        rotary = {kind: (take(cos, columns), take(sin, columns)) for kind, (cos, sin) in self.rotary.items()}
        return Context(masks, rotary, take(self.positions, columns), cache)


def take(table: Tensor, columns: Int[Tensor, "B R"]) -> Tensor:
    """Returns the given columns of each row of `table` [B or 1, L, ...]: [B, R, ...]."""
    table = table.expand(len(columns), *table.shape[1:])
    return table[torch.arange(len(columns), device=columns.device)[:, None], columns]


@dataclass
class Decoder:
    """A causal language model taken apart: embedding, layers, final norm, head.

    Raises UserError, naming the model type, if a layer cannot be called by itself or cannot see a tree.
    """

    model: PreTrainedModel
    layers: nn.ModuleList = field(init=False)
    windows: list[int | None] = field(init=False)

    def __post_init__(self) -> None:
        self.config: Any = self.model.config.get_text_config()
        core = self.model.get_decoder()
        parts = {
            "layers": getattr(core, "layers", None),
            "norm": getattr(core, "norm", None) or getattr(core, "final_layernorm", None),
            "rotary_emb": getattr(core, "rotary_emb", None),
            "lm_head": self.model.get_output_embeddings(),
        }
        if missing := [name for name, part in parts.items() if part is None]:
            self._refuse(f"it has no {missing[0]}")
        self.layers = cast(nn.ModuleList, parts["layers"])
        self.norm, self.rotary = cast(nn.Module, parts["norm"]), cast(nn.Module, parts["rotary_emb"])
        self.head = cast(nn.Linear, parts["lm_head"])  # checked below
        self.embedding = cast(nn.Embedding, self.model.get_input_embeddings())
        self._refuse_unservable()
        types = getattr(self.config, "layer_types", None) or [None] * len(self.layers)
        window = getattr(self.config, "sliding_window", None)
        if types[0] is None and not getattr(self.config, "use_sliding_window", True):
            window = None
        self.windows = [window if t in (None, "sliding_attention") else None for t in types]
        per_type = "layer_type" in inspect.signature(self.rotary.forward).parameters
        self.rotary_types = [t if per_type else None for t in types]
        self.embedding_scale = getattr(self.config, "embedding_multiplier", None) or 1.0
        self.logit_scale = (getattr(self.config, "logit_scale", None) or 1.0) / (
            getattr(self.config, "logits_scaling", None) or 1.0
        )
        self.softcap = getattr(self.config, "final_logit_softcapping", None)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype  # a norm need not have a weight

    def _refuse(self, why: str) -> NoReturn:
        raise UserError(
            "model.engine=trie", f"model type '{self.config.model_type}' cannot be served: {why}", PLAIN
        )

    def _refuse_unservable(self) -> None:
        types = set(getattr(self.config, "layer_types", None) or []) - _KNOWN_LAYER_TYPES
        if types:
            self._refuse(f"its layers of type {sorted(types)} do not see tokens through an attention mask")
        if getattr(self.config, "num_kv_shared_layers", 0):
            self._refuse("its layers share keys and values")
        rope = getattr(self.config, "rope_parameters", None) or {}
        for entry in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
            if any(kind in str(entry.get("rope_type", "")) for kind in _LENGTH_DEPENDENT_ROPE):
                self._refuse(
                    f"its rotary embedding ('{entry['rope_type']}') depends on the length of the text"
                )
        if type(self.head) is not nn.Linear:
            self._refuse(f"its head is a {type(self.head).__name__}, not a linear layer")
        parameters = inspect.signature(self.layers[0].forward).parameters
        for name in ("attention_mask", "position_embeddings", "past_key_values"):
            if name not in parameters:
                self._refuse(f"its layers take no {name}")

    def embed(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """Returns the input of the first layer, the family's embedding scale applied."""
        hidden = self.embedding(ids)
        return hidden if self.embedding_scale == 1.0 else hidden * self.embedding_scale

    def rotations(self, positions: Int[Tensor, "B L"]) -> dict[str | None, tuple[Tensor, Tensor]]:
        """Returns rotary embeddings (cos, sin) at `positions`, for each layer type that has its own."""
        like = torch.empty(0, dtype=self.dtype, device=positions.device)
        return {
            t: self.rotary(like, positions) if t is None else self.rotary(like, positions, t)
            for t in dict.fromkeys(self.rotary_types)
        }

    def masks(
        self,
        visible: Bool[Tensor, "B L S"],
        positions: Int[Tensor, "B L"],
        key_positions: Int[Tensor, "B S"],
    ) -> dict[int | None, Tensor | None]:
        """Returns additive masks [B, 1, L, S] (0 or -inf), one per sliding window.

        A token sees what is `visible` and nearer than the window. Additive in the model's dtype for every
        attention implementation: eager attention silently adds a boolean mask as 0 and 1.
        """
        masks = {}
        for window in dict.fromkeys(self.windows):
            seen = visible
            if window is not None:
                seen = visible & (positions[:, :, None] - key_positions[:, None, :] < window)
            mask = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
            masks[window] = mask.masked_fill_(~seen, float("-inf"))[:, None]
        return masks

    def run(
        self, hidden: Float[Tensor, "B L D"], first: int, last: int, context: Context, recompute: bool = False
    ) -> Float[Tensor, "B L D"]:
        """Returns `hidden` after layers first .. last - 1.

        With `recompute`, each layer keeps its input only and runs again in the backward pass. The models' own
        switch would do that to every layer, frozen or not, and send gradients through all of them.
        """
        for i in range(first, last):
            hidden = _maybe_again(partial(self._layer, i, context), hidden, recompute)
        return hidden

    def run_at(
        self,
        hidden: Float[Tensor, "B L D"],
        layer: int,
        context: Context,
        columns: Int[Tensor, "B R"],
        recompute: bool = False,
    ) -> Float[Tensor, "B R D"]:
        """Returns what `run` gives for one layer, at some columns of each row only.

        Every column's keys and values are computed, the rest of the layer at `columns` only.
        """
        return _maybe_again(partial(self._layer_at, layer, context, columns), hidden, recompute)

    def keys_values(
        self, hidden: Float[Tensor, "B L D"], first: int, last: int, context: Context, recompute: bool = False
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Returns keys and values of `hidden` in layers first .. last - 1, each [B, heads, L, head size].

        The last layer runs only until its own are computed.
        """
        cache = PrefixKV()
        context = replace(context, cache=cache)
        hidden = self.run(hidden, first, last - 1, context, recompute)
        return cache.computed | {last - 1: self._own_pair(last - 1, context, hidden)}

    def _layer(self, number: int, context: Context, hidden: Tensor) -> Tensor:
        return self.layers[number](
            hidden,
            attention_mask=context.masks[self.windows[number]],
            position_embeddings=context.rotary[self.rotary_types[number]],
            position_ids=context.positions,
            past_key_values=context.cache,
            use_cache=context.cache is not None,
        )

    def _layer_at(self, number: int, context: Context, columns: Tensor, hidden: Tensor) -> Tensor:
        pair = self._own_pair(number, context, hidden)
        if context.cache is not None:
            pair = context.cache.update(*pair, number)
        context = context.at(columns, PrefixKV({number: pair}, own=False))
        return self._layer(number, context, take(hidden, columns))

    def _own_pair(self, number: int, context: Context, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Runs a layer only until its keys and values are computed; returns these."""
        cache = PrefixKV(stop_at=number)
        try:
            self._layer(number, replace(context, cache=cache), hidden)
        except StopForward:
            return cache.computed[number]
        raise TypeError("a layer keeps no keys and values in its cache")

    def logits(self, hidden: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
        """Returns next-token logits of rows of the last layer's output, in float32 or better."""
        logits = self.head(self.norm(hidden))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def open_head(self, temperature: float, suppressed: Tensor, chunk: int, onednn: bool = False) -> Head:
        """Returns the head at a temperature and without the `suppressed` tokens, for rows behind the norm."""
        bias = None if self.head.bias is None else self.head.bias.detach()
        return Head(
            self.head.weight.detach(),
            bias,
            self.logit_scale,
            self.softcap,
            temperature,
            suppressed if len(suppressed) else None,
            chunk,
            onednn,
        )

    @property
    def tolerance(self) -> float:
        """How far logits may differ from the model's own forward, relative to the largest."""
        if any(p.dtype is torch.int8 for p in self.layers.parameters()):
            # int8 layers round what goes in, so a last bit may become a step of 1/127; which columns they do
            # not round depends on the largest values of the whole batch
            return 0.2
        return 0.05 if self.dtype in (torch.bfloat16, torch.float16) else 1e-4

    @torch.no_grad()
    def check(self) -> None:
        """Refuses the model if a small tree differs from the model's own forward on its paths."""
        vocab = self.embedding.weight.shape[0]
        draw = torch.Generator().manual_seed(0)
        stem, left, right = (torch.randint(vocab, (n,), generator=draw) for n in (6, 4, 4))
        rows = torch.stack([torch.cat([stem, left]), torch.cat([stem, right])]).to(self.device)
        own = self.model(input_ids=rows, use_cache=False).logits
        tree = torch.cat([stem, left, right])[None].to(self.device)
        at = torch.arange(14, device=self.device)
        positions = torch.where(at < 10, at, at - 4)[None]
        ends = torch.where((at >= 6) & (at < 10), 10, 14)
        visible = tree_visible(ends[None])
        try:
            ours = self.logits(self._in_parts(tree, positions, visible)[0])
        except (TypeError, AttributeError, KeyError, IndexError, ValueError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            # a layer that takes more arguments than these
            self._refuse(f"its layers cannot be called one by one ({type(error).__name__}: {error})")
        paths = torch.stack([ours[:8], torch.cat([ours[:4], ours[8:]])])
        gap = float((paths - own[:, 2:]).abs().max() / own.abs().max().clamp(min=1e-6))
        if not gap <= self.tolerance:
            self._refuse(f"layer by layer its logits differ by {gap:.1e} of their size from its own forward")

    def _in_parts(self, ids: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Runs a tree as an update does and the model's own forward does not.

        The first two tokens are keys and values, the mask is a tree's, and the last layer runs at columns.
        """
        last, stem = len(self.layers), slice(0, 2)
        rotary = self.rotations(positions[:, stem])
        masks = self.masks(visible[:, stem, stem], positions[:, stem], positions[:, stem])
        pairs = self.keys_values(
            self.embed(ids[:, stem]), 0, last, Context(masks, rotary, positions[:, stem])
        )
        ids, here = ids[:, 2:], positions[:, 2:]
        context = Context(
            self.masks(visible[:, 2:], here, positions), self.rotations(here), here, PrefixKV(pairs)
        )
        hidden = self.run(self.embed(ids), 0, last - 1, context)
        return self.run_at(hidden, last - 1, context, torch.arange(ids.shape[1], device=self.device)[None])


def _maybe_again(layer: Callable[[Tensor], Tensor], hidden: Tensor, recompute: bool) -> Tensor:
    if recompute:
        return checkpoint(layer, hidden, use_reentrant=False, preserve_rng_state=False)
    return layer(hidden)


def tree_visible(ends: Int[Tensor, "B L"]) -> Bool[Tensor, "B L L"]:
    """Returns a mask, True where token q (second axis) sees token k (third): k <= q < end(k)."""
    at = torch.arange(ends.shape[1], device=ends.device)
    return (at[None, None, :] <= at[None, :, None]) & (at[None, :, None] < ends[:, None, :])
