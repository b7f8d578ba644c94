"""Calls the layers of a Hugging Face decoder one by one, with any attention mask at any positions.

Slicing `model.layers` and calling the model is not the same: layer types, rotary embeddings per type,
embedding scales and sliding windows go wrong in silence. Here each layer is called as the model's own forward
calls it, with its own mask and rotary embedding, and `check` compares the result with the model's own forward
before anything relies on it. What a family adds is read from its config (windows, scales, soft caps), never
from its name, and only from keys that the config's class declares: transformers keeps every other key of a
config.json too, and the model does not read it.

Knows nothing of adapters, tries or algorithms. Legend: B rows, L columns (queries), S keys, D what layers
hand on, H hidden, V vocabulary.
"""

import copy
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NoReturn, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from twig.common.errors import UserError
from twig.engine.kv_cache import KeyValueCache, PrefixKV, StopForward, Trunk
from twig.engine.lm_head import Head, has_wide_products, head_product
from twig.engine.mixers.mixer import Own, mixer_of
from twig.engine.mixers.runs import Runs
from twig.runtime.memory_use import out_of_memory, trim_freed_memory

PLAIN = "Set model.engine=plain to train it with the plain batched forward"
_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
# The longest path of the check's tree, and what lengths are set to that no path of it would reach.
_LONGEST_PATH, _SHORT = 10, 3
_TRIMMED_FROM = 2**17  # numbers in a layer's output: the heap of smaller models is small
_TRIMMED_EVERY = 6  # layers of a backward pass
_USUAL, _INT8 = 1e-4, 0.2  # how far logits in float32 and of int8 layers may differ, as a share
_SIZES = 6, 4, 4  # tokens of the check's stem and of its two branches
_CAUSAL = 24  # tokens of the texts that are cut short
LONG = 70, 66, 5  # where layers keep a state: longer than the chunks in which these read a text
_SHARED, _INPUT = "shared_kv_states", "per_layer_input"  # what layers may take besides
_STREAMS = "altup_num_inputs"  # of hidden states from layer to layer; the first is made of the embedding
_NORMS = "norm", "final_layernorm", "embedding_norm"
_IS_LENGTH = re.compile("window|chunk|top_?k|span|local")
_IS_NO_LENGTH = re.compile("_ids?$|position|vocab")


@dataclass
class Context:
    """What the layers of one pass share: masks by window, rotary embeddings by layer type, positions.

    `runs` tells how layers that keep a state run, if the model has any. `inputs` [B, L, layers, D] are what
    each layer gets of the tokens, if the model has such. `shared` has the keys and values that layers without
    their own take from others, once those have run.
    """

    # By window: additive [B, 1, L, S] or None; `tree_attention.Chains`; in a wave `KeyPart`s.
    masks: dict[int | None, Any]
    rotary: dict[str | None, tuple[Tensor, Tensor]]
    positions: Tensor
    cache: KeyValueCache | PrefixKV | None = None
    runs: Runs | None = None
    inputs: Tensor | None = None
    shared: dict[str, Any] = field(default_factory=dict)

    def at(self, columns: Int[Tensor, "B R"], cache: PrefixKV) -> "Context":
        """Returns the context of some columns of each row, with another cache."""
        masks = {window: _mask_at(mask, columns) for window, mask in self.masks.items()}
        rotary = {kind: (take(cos, columns), take(sin, columns)) for kind, (cos, sin) in self.rotary.items()}
        inputs = None if self.inputs is None else take(self.inputs, columns)
        return Context(masks, rotary, take(self.positions, columns), cache, None, inputs, self.shared)


def _mask_at(mask: Any, columns: Int[Tensor, "B R"]) -> Tensor | None:
    if mask is None:
        return None
    return take(mask[:, 0], columns)[:, None] if isinstance(mask, Tensor) else mask.at(columns)


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
            "norm": next((part for name in _NORMS if (part := getattr(core, name, None))), None),
            "rotary_emb": getattr(core, "rotary_emb", None),
            "lm_head": self.model.get_output_embeddings(),
        }
        self.mixers = [mixer_of(layer) for layer in parts["layers"] or ()]
        if any(self.mixers) and hasattr(core, "rotary_emb") and core.rotary_emb is None:
            del parts["rotary_emb"]  # states know the order of the tokens
        if missing := [name for name, part in parts.items() if part is None]:
            self._refuse(f"it has no {missing[0]}")
        self.layers = cast(nn.ModuleList, parts["layers"])
        self.last_norm, self.rotary = cast(nn.Module, parts["norm"]), parts.get("rotary_emb")
        self.streams = self._value(_STREAMS)
        self.head = cast(nn.Linear, parts["lm_head"])  # checked below
        self.embedding = cast(nn.Embedding, self.model.get_input_embeddings())
        self._refuse_unservable()
        self.windows = self._windows()
        per_type = (
            self.rotary is not None and "layer_type" in inspect.signature(self.rotary.forward).parameters
        )
        self.rotary_types = [t if per_type else None for t in self._layer_types()]
        self.embedding_scale = self._value("embedding_multiplier") or 1.0
        self.logit_scale, self.softcap = head_terms(self.config)

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

    def _value(self, name: str) -> Any:
        return _value(self.config, name)

    def _attending(self, values: Sequence[Any]) -> list[Any]:
        """Returns the values of the layers that attend, of one for each layer."""
        pairs = zip(values, self.mixers, strict=True)
        return [value for value, mixer in pairs if mixer is None or mixer.attends]

    def _layer_types(self) -> list[str | None]:
        return list(self._value("layer_types") or [None] * len(self.layers))

    def _windows(self) -> list[int | None]:
        """Returns the sliding window of each layer, as the config has it now."""
        types, window = self._layer_types(), self._value("sliding_window")
        if types[0] is None and _declares(self.config, "use_sliding_window"):
            window = window if self.config.use_sliding_window else None
        return [window if t in (None, "sliding_attention") else None for t in types]

    def _refuse_unservable(self) -> None:
        kinds = zip(self._layer_types(), self.mixers, strict=False)
        types = {str(t) for t, mixer in kinds if t is not None and mixer is None} - _KNOWN_LAYER_TYPES
        if types:
            self._refuse(f"its layers of type {sorted(types)} do not see tokens through an attention mask")
        if type(self.head) is not nn.Linear:
            self._refuse(f"its head is a {type(self.head).__name__}, not a linear layer")
        parameters = inspect.signature(self.layers[0].forward).parameters
        for name in ("attention_mask", "position_embeddings", "past_key_values"):
            if name not in parameters:
                self._refuse(f"its layers take no {name}")
        self.takes = set(parameters)
        count = self._value("num_kv_shared_layers") or 0
        if count and _SHARED not in self.takes:
            self._refuse("its layers share keys and values")
        self.sharing = range(len(self.layers) - count, len(self.layers))

    def embed(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """Returns the input of the first layer: the scaled embedding, and the streams made of it, if any."""
        hidden = self._embedded(ids)
        if self.streams is None:
            return hidden
        core: Any = self.model.get_decoder()
        others = (_as_large(make(hidden), hidden) for make in core.altup_projections)
        return torch.cat([hidden, *others], -1)

    def norm(self, hidden: Float[Tensor, "R D"]) -> Float[Tensor, "R H"]:
        """Returns what the head reads of the last layer's output: its streams, if any, as one, normed."""
        if self.streams is not None:
            core: Any = self.model.get_decoder()
            first, *others = hidden.unflatten(-1, (self.streams, -1)).unbind(-2)
            made = zip(core.altup_unembed_projections, others, strict=True)
            hidden = torch.stack([first, *(_as_large(make(x), first) for make, x in made)]).mean(0)
        return self.last_norm(hidden)

    def _embedded(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L H"]:
        hidden = self.embedding(ids)
        return hidden if self.embedding_scale == 1.0 else hidden * self.embedding_scale

    def inputs(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L N D"] | None:
        """Returns what each layer gets of the tokens beside the layer below; None if they get nothing."""
        core: Any = self.model.get_decoder()
        if _INPUT not in self.takes or not self._value("hidden_size_per_layer_input"):
            return None
        return core.project_per_layer_inputs(self._embedded(ids), core.get_per_layer_inputs(ids))

    @property
    def width(self) -> int:
        """Numbers that a layer hands to the next one, a token."""
        return self.embedding.weight.shape[1] * (self.streams or 1)

    @property
    def not_captured(self) -> str | None:
        """Why a decode step cannot be captured, None if it can be tried."""
        if any(self.mixers) or self.sharing or self.streams:
            return "layers that keep a state, share keys or carry several streams are not captured"
        return None

    def _given(self) -> dict[str, int]:
        """Returns the layers whose keys and values others take, by the name under which these take them."""
        types = self._layer_types()
        own = {types[i]: i for i in range(self.sharing.start)}  # the last of each type
        return {str(types[i]): own[types[i]] for i in self.sharing}

    @torch.no_grad()
    def trunk(self, cut: int) -> Trunk:
        """Returns the layers below `cut` and what layers above take from them; raises UserError.

        Two tokens are run through them to see the sizes, and that the layers hand over what they are taken
        to hand over: `give` does it in their place.
        """
        types, given = self._layer_types(), self._given()
        names = {str(types[i]) for i in self.sharing if i >= cut}
        names = {name: given[name] for name in sorted(names) if given[name] < cut}
        if not names:
            return Trunk(cut, self.width)
        positions, cache = torch.arange(2, device=self.device)[None], PrefixKV()
        masks = self.masks(tree_visible(torch.full_like(positions, 2)), positions, positions)
        runs = self.runs(np.full((1, 2), 2), np.array([2]))
        inputs = self.inputs(positions)
        context = Context(masks, self.rotations(positions), positions, cache, runs, inputs)
        self.run(self.embed(positions), 0, cut, context)
        pairs, handed = cache.computed, context.shared
        for name, layer in names.items():
            both = handed.get(name, ()), pairs.get(layer, ())
            if not (all(both) and all(map(torch.equal, *both))):
                self._refuse(f"its layers share keys and values, but not those of layer {layer} as '{name}'")
        sizes = {layer: [x.shape for x in pairs[layer]] for layer in sorted(names.values())}
        return Trunk(cut, self.width, {layer: (k[1], k[3], v[3]) for layer, (k, v) in sizes.items()})

    def give(self, pairs: Mapping[int, tuple[Tensor, Tensor]], context: Context) -> None:
        """Hands recorded keys and values of the trunk to the layers that take them."""
        names = {layer: name for name, layer in self._given().items()}
        for layer, pair in pairs.items():
            if context.cache is not None:
                pair = context.cache.update(pair[0], pair[1], layer)
            context.shared[names[layer]] = pair

    def rotations(self, positions: Int[Tensor, "B L"]) -> dict[str | None, tuple[Tensor, Tensor]]:
        """Returns rotary embeddings (cos, sin) at `positions`, for each layer type that has its own."""
        if self.rotary is None:
            return {}
        like = torch.empty(0, dtype=self.dtype, device=positions.device)
        return {
            t: self.rotary(like, positions) if t is None else self.rotary(like, positions, t)
            for t in dict.fromkeys(self._attending(self.rotary_types))
        }

    def runs(
        self, ends: np.ndarray, used: np.ndarray, begun: bool = False, ends_kept: bool = False
    ) -> Runs | None:
        """Returns how layers that keep a state run a table of trees, as `Runs.of`; None if there are none."""
        return Runs.of(ends, used, self.device, begun, ends_kept) if any(self.mixers) else None

    def states(self, pairs: Sequence[tuple[Tensor, ...]]) -> dict[int, tuple[Tensor, ...]]:
        """Returns the states by layer in what `keys_values` gives."""
        mixers = {layer: mixer for layer, mixer in enumerate(self.mixers) if mixer}
        return {layer: pairs[layer][2 if mixer.attends else 0 :] for layer, mixer in mixers.items()}

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
            if hidden.requires_grad:
                _trim_behind(hidden, last - i)
        return hidden

    def run_at(
        self,
        hidden: Float[Tensor, "B L D"],
        layer: int,
        context: Context,
        columns: Int[Tensor, "B R"],
    ) -> Float[Tensor, "B R D"]:
        """Returns what `run` gives for one layer, at some columns of each row only.

        Every column's keys and values are computed, the rest of the layer at `columns` only. A layer that
        keeps a state runs whole.
        """
        if self.mixers[layer]:
            return take(self._layer(layer, context, hidden), columns)
        if layer in self.sharing:
            return self._layer(layer, context.at(columns, PrefixKV()), take(hidden, columns))
        pair = self._own_pair(layer, context, hidden)
        if context.cache is not None:
            pair = context.cache.update(pair[0], pair[1], layer)
        context = context.at(columns, PrefixKV({layer: pair}, own=False))
        return self._layer(layer, context, take(hidden, columns))

    def keys_values(
        self, hidden: Float[Tensor, "B L D"], first: int, last: int, context: Context, recompute: bool = False
    ) -> dict[int, tuple[Tensor, ...]]:
        """Returns keys and values of `hidden` in layers first .. last - 1, each [B, heads, L, head size].

        Behind these, or instead of them, the states of a layer that keeps any. The last layer runs only
        until its own are computed.
        """
        cache = PrefixKV()
        context = replace(context, cache=cache)
        last = min(last, self.sharing.start)
        if last <= first:
            return {}
        hidden = self.run(hidden, first, last - 1, context, recompute)
        return cache.collected() | {last - 1: self._own_pair(last - 1, context, hidden)}

    def _layer(self, number: int, context: Context, hidden: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        if _SHARED in self.takes:
            options[_SHARED] = context.shared
        if _INPUT in self.takes and context.inputs is not None:
            options[_INPUT] = context.inputs[:, :, number]
        if self.streams is not None:  # such layers take one behind the other
            hidden = hidden.unflatten(-1, (self.streams, -1)).movedim(-2, 0)
        with self._in_parts_if_mixed(number, context):
            output = self.layers[number](
                hidden,
                attention_mask=context.masks[self.windows[number]],
                position_embeddings=context.rotary.get(self.rotary_types[number]),
                position_ids=context.positions,
                past_key_values=context.cache,
                use_cache=context.cache is not None,
                **options,
            )
        output = output[0] if isinstance(output, tuple) else output
        return output if self.streams is None else output.movedim(0, -2).flatten(-2)

    def _in_parts_if_mixed(self, number: int, context: Context) -> AbstractContextManager[None]:
        """Inside, the layer's mixer, if it has one, runs as the context says."""
        mixer, cache = self.mixers[number], context.cache or PrefixKV()
        if mixer is None:
            return nullcontext()

        def forward(own: Own, hidden: Tensor) -> Tensor:
            return cache.mix(mixer, own, number, hidden, context.runs)

        return mixer.replaced(forward)

    def _own_pair(self, number: int, context: Context, hidden: Tensor) -> tuple[Tensor, ...]:
        """Runs a layer only until its keys, values and states are computed; returns these."""
        mixer = self.mixers[number]
        cache = PrefixKV(stop_at=None if mixer and mixer.attends else number)
        try:
            self._layer(number, replace(context, cache=cache), hidden)
        except StopForward:
            pass
        if number not in cache.collected():
            raise TypeError("a layer keeps no keys and values in its cache")
        return cache.collected()[number]

    def logits(self, hidden: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
        """Returns next-token logits of rows of the last layer's output, in float32 or better."""
        hidden = self.norm(hidden)
        if has_wide_products(self.head.weight) and not torch.is_grad_enabled():
            logits = head_product(hidden, self.head.weight, self.head.bias)
        else:
            logits = self.head(hidden)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.logit_scale != 1.0:
            logits = logits.mul_(self.logit_scale)
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

    @cached_property
    def tolerance(self) -> float:
        """How far logits may differ from the model's own forward, relative to the largest.

        Farther than usual if the model makes so much of a last bit: some times as far as its own logits move
        if the embeddings are rounded otherwise.
        """
        usual = logit_tolerance(self.model)
        if usual == _INT8:
            return usual
        times, most = (10, 1e-3) if usual == _USUAL else (3, 0.2)
        return min(max(usual, times * self._moved_by_rounding()), most)

    @torch.no_grad()
    def _moved_by_rounding(self) -> float:
        own, draw = self._own_logits(), torch.Generator().manual_seed(0)

        def round_otherwise(module: nn.Module, args: object, hidden: Tensor) -> Tensor:
            step = torch.finfo(hidden.dtype).eps * torch.randn(hidden.shape, generator=draw)
            return hidden * (1 + step.to(hidden))

        hook = self.embedding.register_forward_hook(round_otherwise)
        try:
            moved = self._own_logits()
        finally:
            hook.remove()
        return float((moved - own).abs().max() / own.abs().max().clamp(min=1e-6))

    @torch.no_grad()
    def check(self) -> None:
        """Refuses the model if it is not causal, or a small tree differs from its own forward on the paths.

        Lengths that such a tree does not reach, windows among them, are then made short one by one, and the
        layers compared again.
        """
        self._refuse_rotary()
        with self._first_of_each_kind():
            self._refuse_not_causal()
        gap = self._gap(self._own_logits())
        if any(self.mixers) and gap <= self.tolerance:
            gap = self._gap(self._own_logits(LONG), LONG)
        if not gap <= self.tolerance:
            self._refuse(f"layer by layer its logits differ by {gap:.1e} of their size from its own forward")
        self._check_lengths()

    def tree_logits(self, sizes: tuple[int, int, int] = _SIZES) -> Float[Tensor, "R V"]:
        """Returns logits of the check's tree as an update computes them, differentiable in what is trained.

        The tree is a stem, of which the first two tokens are run before and have no logits here, and two
        branches, of `sizes` tokens.
        """
        stem, left, right = sizes
        count, fork = sum(sizes), stem + left
        paths = self._paths(sizes)
        ids = torch.cat([paths[0, :fork], paths[1, stem : stem + right]])[None]
        at = np.arange(count)
        positions = torch.from_numpy(np.where(at < fork, at, at - left)).to(self.device)[None]
        ends = np.where((at >= stem) & (at < fork), fork, count)[None]
        return self.logits(self._in_parts(ids, positions, ends)[0])

    def path_logits(self, sizes: tuple[int, int, int] = _SIZES) -> Float[Tensor, "R V"]:
        """Returns the logits of `tree_logits` as the model's own forward over each path gives them."""
        return self._of_tree(self._own_logits(sizes), sizes)

    def _of_tree(self, own: Float[Tensor, "2 L V"], sizes: tuple[int, int, int]) -> Float[Tensor, "R V"]:
        stem, left, right = sizes
        second = own.shape[1] + stem
        # as one table: backwards, two parts would take two more of them
        return own.flatten(0, 1)[[*range(2, stem + left), *range(second, second + right)]]

    def _paths(self, sizes: tuple[int, int, int] = _SIZES) -> Int[Tensor, "2 L"]:
        """Returns the two paths of the check's tree; behind a shorter one are other tokens."""
        vocab, draw = self.embedding.weight.shape[0], torch.Generator().manual_seed(0)
        stem, left, right = (torch.randint(vocab, (n,), generator=draw) for n in sizes)
        longest = max(len(left), len(right))
        behind = torch.zeros(longest, dtype=torch.long)
        rows = [torch.cat([stem, branch, behind])[: len(stem) + longest] for branch in (left, right)]
        return torch.stack(rows).to(self.device)

    def _own_logits(self, sizes: tuple[int, int, int] = _SIZES) -> Float[Tensor, "2 L V"]:
        return self.model(input_ids=self._paths(sizes), use_cache=False).logits

    def _refuse_not_causal(self, where: str = "") -> None:
        """Refuses a model whose logits of a text depend on what comes after: a tree has many ends.

        The text is longer than the check's tree: layers that choose keys by what these say need some to
        choose from.
        """
        vocab, draw = self.embedding.weight.shape[0], torch.Generator().manual_seed(0)
        ids = torch.randint(vocab, (2, _CAUSAL), generator=draw).to(self.device)
        whole = self.model(input_ids=ids, use_cache=False).logits
        most = self.tolerance * max(float(whole.abs().max()), 1e-6)
        for length in range(2, _CAUSAL, 3):  # one after another: a wide vocabulary's logits are large
            part = self.model(input_ids=ids[:, :length], use_cache=False).logits
            if float(part.sub_(whole[:, :length]).abs_().max()) > most:
                self._refuse(f"{where}it predicts a token from those behind it")
            del part

    def _gap(self, own: Float[Tensor, "2 L V"], sizes: tuple[int, int, int] = _SIZES) -> float:
        """Returns how far the tree's logits are from its paths', relative to the largest."""
        try:
            ours = self.tree_logits(sizes)
        except (TypeError, AttributeError, KeyError, IndexError, ValueError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            # a layer that takes more arguments than these
            self._refuse(f"its layers cannot be called one by one ({type(error).__name__}: {error})")
        return float((ours - self._of_tree(own, sizes)).abs().max() / own.abs().max().clamp(min=1e-6))

    def _refuse_rotary(self) -> None:
        """Refuses rotary embeddings that depend on more than the token's own position.

        A tree has paths of several lengths, and a text is sampled before its length is known.
        """
        near = torch.arange(4, device=self.device)[None]
        longest = int(self._value("max_position_embeddings") or 0)
        before, self.rotary = self.rotary, copy.deepcopy(self.rotary)  # some keep the longest text so far
        try:
            alone = self.rotations(near)
            beside = self.rotations(torch.cat([near, near[:, -1:] + 2 * longest + 2**16], 1))
        except (TypeError, AttributeError, KeyError, IndexError, ValueError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            self._refuse(f"its rotary embedding cannot be called ({type(error).__name__}: {error})")
        finally:
            self.rotary = before
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in alone.values()):
            self._refuse("its rotary embedding is not a cosine and a sine")
        same = all(
            torch.equal(one, other[:, :4])
            for kind in alone
            for one, other in zip(alone[kind], beside[kind], strict=True)
        )
        if not same:
            rope = self._value("rope_parameters") or {}
            entries = [rope, *(v for v in rope.values() if isinstance(v, dict))]
            kinds = sorted({str(entry["rope_type"]) for entry in entries if "rope_type" in entry})
            name = f" ('{', '.join(kinds)}')" if kinds else ""
            self._refuse(f"its rotary embedding{name} depends on the length of the text")

    def _check_lengths(self) -> None:
        """Compares again with each length that the check's tree does not reach set to a short one.

        A window of thousands of tokens does nothing to a text of ten. A text that is longer would take long,
        but code reads a window as a number: if layers and model agree at a short one, on the same weights,
        they agree at the real one. Any whole number of the config counts that is not a size of a weight, as
        it may be a length under any name. The first layers of each kind will do.
        """
        with self._first_of_each_kind():
            before = self._own_logits()
            for name, places in lengths_of(self.model).items():
                with set_to(places):
                    try:
                        own = self._own_logits()
                    except Exception as error:  # the model cannot be built with this number: it is a size
                        if out_of_memory(error):
                            raise
                        continue
                    if before.isfinite().all() and not own.isfinite().all():
                        continue
                    self._refuse_not_causal(f"beyond its {name} ")
                    windows, self.windows = self.windows, self._windows()
                    try:
                        gap = self._gap(own)
                    finally:
                        self.windows = windows
                if not gap <= self.tolerance:
                    self._refuse(f"beyond its {name} its layers differ from its own forward")

    @contextmanager
    def _first_of_each_kind(self) -> Iterator[None]:
        """Takes the layers behind the first few away inside, if each kind of layer is among these."""
        kinds = [
            (type(layer), window, kind, str(layer_type), mixer is None)
            for layer, window, kind, layer_type, mixer in zip(
                self.layers, self.windows, self.rotary_types, self._layer_types(), self.mixers, strict=True
            )
        ]
        count = max(map(kinds.index, dict.fromkeys(kinds))) + 2
        core, layers = self.model.get_decoder(), self.layers
        configs = {id(c): c for c in (self.config, core.config) if vars(c).get("num_hidden_layers")}
        places = [(config, "num_hidden_layers") for config in configs.values()]
        if count >= len(layers) or self.sharing or _INPUT in self.takes:
            yield
            return
        try:
            core.layers = self.layers = layers[:count]
            with set_to(places, count):
                yield
        finally:
            core.layers = self.layers = layers

    def _in_parts(self, ids: Tensor, positions: Tensor, ends: np.ndarray) -> Tensor:
        """Runs a tree as an update does and the model's own forward does not.

        The first two tokens are keys and values, the mask is a tree's, and the last layer runs at columns.
        """
        last, stem = len(self.layers), slice(0, 2)
        visible = tree_visible(torch.from_numpy(ends).to(self.device))
        rotary = self.rotations(positions[:, stem])
        masks = self.masks(visible[:, stem, stem], positions[:, stem], positions[:, stem])
        runs = self.runs(np.full((1, 2), 2), np.array([2]), ends_kept=True)
        context = Context(masks, rotary, positions[:, stem], None, runs, self.inputs(ids[:, stem]))
        pairs = self.keys_values(self.embed(ids[:, stem]), 0, last, context)
        ids, here = ids[:, 2:], positions[:, 2:]
        context = Context(
            self.masks(visible[:, 2:], here, positions),
            self.rotations(here),
            here,
            PrefixKV(pairs),
            self.runs(ends[:, 2:] - 2, np.array([ids.shape[1]]), begun=True),
            self.inputs(ids),
        )
        hidden = self.run(self.embed(ids), 0, last - 1, context)
        return self.run_at(hidden, last - 1, context, torch.arange(ids.shape[1], device=self.device)[None])


def _as_large(new: Tensor, like: Tensor) -> Tensor:
    """Returns hidden states scaled to the root mean square of others."""
    size = new.square().mean(-1, keepdim=True).clamp(min=1e-5).sqrt()
    return new * like.square().mean(-1, keepdim=True).sqrt() / size


def _maybe_again(layer: Callable[[Tensor], Tensor], hidden: Tensor, recompute: bool) -> Tensor:
    if recompute:
        return checkpoint(layer, hidden, use_reentrant=False, preserve_rng_state=False)
    return layer(hidden)


def _trim_behind(hidden: Tensor, above: int) -> None:
    """Returns to the system what a layer's forward pass freed in the C library's heap, on a CPU.

    What the backward pass needs lies between it, in the way of larger blocks. In the backward pass, which
    fills such gaps again, once in some layers is enough.
    """
    if hidden.device.type == "cpu" and hidden.numel() >= _TRIMMED_FROM:
        trim_freed_memory()
        if above % _TRIMMED_EVERY == 0:
            hidden.register_hook(lambda _: trim_freed_memory())


def logit_tolerance(model: PreTrainedModel) -> float:
    """Returns how far logits of a model may differ between two ways to compute them, as a share."""
    if any(p.dtype is torch.int8 for p in model.parameters()):
        # int8 layers round what goes in, so a last bit may become a step of 1/127; which columns they do
        # not round depends on the largest values of the whole batch
        return _INT8
    return 0.05 if model.dtype in (torch.bfloat16, torch.float16) else _USUAL


def head_terms(config: Any) -> tuple[float, float | None]:
    """Returns what a model multiplies its logits by, and their soft cap, as its config has them."""
    scale = (_value(config, "logit_scale") or 1.0) * (_value(config, "lm_head_multiplier") or 1.0)
    return scale / (_value(config, "logits_scaling") or 1.0), _value(config, "final_logit_softcapping")


def _value(config: Any, name: str) -> Any:
    """Returns a value of a config; None if its class does not declare it."""
    return getattr(config, name) if _declares(config, name) else None


def _declares(config: Any, name: str) -> bool:
    """Tells whether a config's class knows a key, as a field, an argument, a property or another name."""
    kind = type(config)
    fields = {each.name for each in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    arguments = (inspect.signature(each.__init__).parameters for each in kind.__mro__ if each is not object)
    known = fields.union(*arguments, getattr(config, "attribute_map", None) or {})
    return (name in known or hasattr(kind, name)) and hasattr(config, name)


def lengths_of(model: PreTrainedModel) -> dict[str, list[tuple[Any, str]]]:
    """Returns the whole numbers of a config that may be lengths beyond a text of the checks, by name.

    Each with the objects that hold it: configs, and the modules that copied it when they were built.
    """
    core, config = model.get_decoder(), model.config.get_text_config()
    sizes = {size for weight in model.parameters() for size in weight.shape}
    sizes |= {len(m) for m in model.modules() if isinstance(m, nn.ModuleList)}
    modules = [m for m in model.modules() if not type(m).__module__.startswith(("torch.", "peft."))]
    configs = {id(each): each for each in (config, model.config, getattr(core, "config", config))}
    lengths: dict[str, list[tuple[Any, str]]] = {}
    for name, value in vars(config).items():
        if type(value) is not int or value < _LONGEST_PATH or _IS_NO_LENGTH.search(name):
            continue
        if value in sizes and not _IS_LENGTH.search(name):
            continue
        lengths[name] = [(each, name) for each in configs.values() if vars(each).get(name) == value]
        for module in modules:
            for own, number in vars(module).items():
                alike = own == name or (value not in sizes and not _IS_NO_LENGTH.search(own))
                if type(number) is int and number == value and alike:
                    lengths[name].append((module, own))
    return lengths


@contextmanager
def set_to(places: list[tuple[Any, str]], value: int = _SHORT) -> Iterator[None]:
    """Sets attributes of objects inside, whatever their classes check: by default to a short length."""
    before = [(vars(each), name, vars(each)[name]) for each, name in places]
    try:
        for values, name, _ in before:
            values[name] = value
        yield
    finally:
        for values, name, old in before:
            values[name] = old


def tree_visible(ends: Int[Tensor, "B L"]) -> Bool[Tensor, "B L L"]:
    """Returns a mask, True where token q (second axis) sees token k (third): k <= q < end(k)."""
    at = torch.arange(ends.shape[1], device=ends.device)
    return (at[None, None, :] <= at[None, :, None]) & (at[None, :, None] < ends[:, None, :])
