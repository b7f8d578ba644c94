"""The trie engine: log-probs of a pack from the upper layers alone, every shared prefix run once.

The layers below the lowest adapter (the trunk) never change, so their output (the boundary) is constant in
the adapter: it is recorded while sampling, or run once without gradient, and the update runs the upper layers
only. The head is applied to the rows that predict a weighted node and to no other.

Knows nothing of tries, rewards or algorithms. Legend: B rows, L columns, R head rows, N targets, C cells, D
hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from twig.common.errors import UserError
from twig.engine.base_policy import BasePolicy, OpenStem, add_gradients, module_of
from twig.engine.decoder import LONG, PLAIN, Context, Decoder, tree_visible
from twig.engine.kv_cache import PrefixKV
from twig.engine.loops import resolve_decode
from twig.engine.lora import adapted_layers
from twig.engine.mixers.tree_attention import NAME as TREE
from twig.engine.mixers.tree_attention import Chains, attend_tree, is_long
from twig.engine.pack import Pack, Stem, head_columns
from twig.engine.shared_attention import attending
from twig.engine.wave_cache import why_not_shared
from twig.runtime.memory_use import out_of_memory

# The last layer runs on the head rows alone if they are at most this share of the cells: every cell's keys
# and values are needed, and computing those first costs a little.
_FEW_ROWS = 0.75


@runtime_checkable
class KeptBuffers(Protocol):
    """Buffers on the device that sampling keeps for its next wave."""

    def clear(self) -> bool:
        """Frees the buffers; returns whether there were any."""
        ...


class Policy(BasePolicy):
    """A policy whose update runs packed tries through the layers above `cut`, the lowest adapted one.

    The trunk is layers 0 .. cut - 1. Raises UserError for a model whose layers cannot be called one by one.
    """

    engine = "trie"
    shares_prefixes = True
    can_checkpoint = True

    def _set_up(self) -> None:
        self.decode = resolve_decode(self.decode, self.device.type)
        self._refuse_outside_layers()
        self.decoder = Decoder(self.model)
        self.decode_steps: KeptBuffers | None = None
        # As an adapter begins, so that a run and whoever loads its result decide alike: training makes the
        # rounding of half precision larger.
        with self.base() if _has_signal(self.parameters) else nullcontext():
            self.decoder.check()
            self.sharing_refusal = why_not_shared(self.decoder)
        self.num_layers = len(self.decoder.layers)
        self.cut = min(adapted_layers(self.decoder.layers))
        self.trunk = self.decoder.trunk(self.cut)
        self._refuse_unmoved(self.decoder.tree_logits, PLAIN)
        if any(self.decoder.mixers):
            self._refuse_other_gradients()
        if self.decode != "plain" and self.decoder.not_captured:
            self.decode_refusal, self.decode = self.decoder.not_captured, "plain"

    def _refuse_other_gradients(self) -> None:
        """Raises UserError if the gradient that passes through a layer's states is not the model's own."""
        parameters = list(self.parameters.values())

        @torch.enable_grad()
        def gradients_of(compute: Callable[..., Tensor]) -> tuple[Tensor | None, ...]:
            logits = compute(LONG)
            pull = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
            return torch.autograd.grad(logits, parameters, pull, allow_unused=True)

        # one after the other: texts this long take memory
        both = zip(*map(gradients_of, (self.decoder.path_logits, self.decoder.tree_logits)), strict=True)
        pairs = [(a, b) for a, b in both if a is not None and b is not None]
        largest = max(float(own.abs().max()) for own, _ in pairs)
        gap = max(float((own - ours).abs().max()) for own, ours in pairs) / max(largest, 1e-30)
        if not gap <= 10 * self.decoder.tolerance:
            problem = f"its gradients differ by {gap:.1e} of their size from those of its own forward"
            kind = self.model.config.model_type
            raise UserError("model.engine=trie", f"model type '{kind}' cannot be served: {problem}", PLAIN)

    def _refuse_outside_layers(self) -> None:
        """Raises UserError if an update would leave a trained tensor out: it trains those of the layers."""
        layers = getattr(self.model.get_decoder(), "layers", None)
        if isinstance(layers, torch.nn.ModuleList):
            inside = {id(parameter) for parameter in layers.parameters()}
            outside = [name for name, p in self.parameters.items() if id(p) not in inside]
            if outside:
                raise UserError(
                    "model.engine=trie",
                    f"the adapter on {module_of(outside[0])} is in no layer of the decoder",
                    PLAIN,
                )

    @property
    def boundary_width(self) -> int:
        return self.trunk.width if self.cut > 0 else 0

    def release(self) -> bool:
        return self.decode_steps is not None and self.decode_steps.clear()

    def fall_back(self, why: str) -> None:
        """Samples without a compiler from here on, or in the plain loop; keeps why in `decode_refusal`."""
        self.decode_refusal = why
        self.decode = "graph" if self.decode == "compiled" else "plain"

    def next_token_logits(self, hidden: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
        """Returns logits of the sampled distribution from rows of the last layer's output."""
        return self.sampled_logits(self.decoder.logits(hidden))

    @torch.no_grad()
    def open_stem(self, stem: Stem, boundary: Float[Tensor, "C D"] | None, gradient: bool) -> OpenStem:
        """Runs a stem once for all of its packs, which are then run with it `opened`.

        The result holds until the adapter changes. With `gradient`, end with `close_stem`.
        """
        pairs = self._stem_pairs(stem, boundary)
        for layer, pair in pairs.items():
            for leaf in pair:
                leaf.requires_grad_(gradient and layer >= self.cut)
        return OpenStem(stem, pairs)

    def close_stem(self, opened: OpenStem, boundary: Float[Tensor, "C D"] | None) -> None:
        """Adds the stem's part of the gradient to the adapter, whole or, if this raises, not at all.

        The stem is run again, and the gradients that its packs left are sent through it.
        """
        pairs = self._stem_pairs(opened.stem, boundary)
        outputs, gradients = [], []
        for layer, pair in pairs.items():
            for output, leaf in zip(pair, opened.pairs[layer], strict=True):
                if output.requires_grad and leaf.grad is not None:
                    outputs.append(output)
                    gradients.append(leaf.grad)
        parameters = list(self.parameters.values())
        if outputs:
            add_gradients(parameters, torch.autograd.grad(outputs, parameters, gradients, allow_unused=True))

    def update_flops(self, nodes: int, rows: int, backward: int = 1, forward: int = 0) -> int | None:
        """Returns the multiplications and additions of an update's matrix products.

        `nodes` tokens run through the layers from the lowest adapter upwards; `rows` of them also through
        what follows the keys and values of the last layer, and the head. `backward` runs have a gradient,
        `forward` runs have none. A weight costs 2 a token forwards and, as it is frozen, 2 backwards, for the
        gradient of its input. Not counted: the adapter's own matrices, the products of queries with keys,
        padding, and recomputed layers. The lowest layer's inputs need no gradient: there it counts a little
        too much.
        """
        return (4 * backward + 2 * forward) * (nodes * self._weights[0] + rows * self._weights[1])

    @cached_property
    def _weights(self) -> tuple[int, int]:
        """Numbers of frozen weights that every token of an update meets, and that only head rows meet."""
        last = self.num_layers - 1
        layers = [sum(map(_weights_of, _matrices(self.decoder.layers[i]))) for i in range(self.cut, last + 1)]
        of_keys = self._key_value_weights()
        return sum(layers[:-1]) + of_keys, layers[-1] - of_keys + self.decoder.head.weight.numel()

    @torch.enable_grad()
    def _key_value_weights(self) -> int:
        """Counts the weights of the last layer that its keys and values depend on.

        These are the outputs of its matrices with a gradient, as one matrix may compute queries as well, and
        two may compute keys one after the other.
        """
        decoder, last, draw = self.decoder, self.num_layers - 1, torch.Generator().manual_seed(0)
        if last in decoder.sharing:
            return 0
        outputs: list[tuple[int, Tensor]] = []  # of each matrix its inputs, and what came out of it
        hooks = [
            matrix.register_forward_hook(
                lambda _, args, out: outputs.append((args[0].shape[-1], cast(Tensor, out)))
            )
            for matrix in _matrices(decoder.layers[last])
        ]
        tokens = 16  # as of a clipped value there is no gradient
        positions = torch.arange(tokens, device=self.device)[None]
        masks = decoder.masks(tree_visible(torch.full_like(positions, tokens)), positions, positions)
        runs = decoder.runs(np.full((1, tokens), tokens), np.array([tokens]), ends_kept=True)
        context = Context(masks, decoder.rotations(positions), positions, runs=runs)
        hidden = torch.randn(1, tokens, decoder.width, generator=draw)
        hidden = hidden.to(self.device, self.dtype).requires_grad_()
        try:
            pair = decoder.keys_values(hidden, last, last + 1, context)[last]
        finally:
            for hook in hooks:
                hook.remove()
        pulls = [torch.randn(each.shape, generator=draw).to(each) for each in pair]
        gradients = torch.autograd.grad(pair, [out for _, out in outputs], pulls, allow_unused=True)
        return sum(
            inputs * int((gradient != 0).flatten(0, -2).any(0).sum())
            for (inputs, _), gradient in zip(outputs, gradients, strict=True)
            if gradient is not None
        )

    def _target_logps(
        self, pack: Pack, boundary: Tensor | None, opened: OpenStem | None
    ) -> Float[Tensor, " N"]:
        row, token = self._tensor(pack.targets.row), self._tensor(pack.targets.token)
        hidden = self._hidden(pack, boundary, opened)
        head = self.decoder.open_head(
            self.temperature, self.suppressed, self.head_chunk, self.kernels == "onednn"
        )
        return head.logps(self.decoder.norm(hidden), row, token)

    def _hidden(self, pack: Pack, boundary: Tensor | None, opened: OpenStem | None) -> Float[Tensor, "R D"]:
        """Returns the last layer's output at the pack's head rows."""
        rows, ids = self._tensor(pack.rows), self._tensor(pack.ids)
        decoder, last = self.decoder, self.num_layers - 1
        positions, cache = self._tensor(pack.positions), None
        if pack.stem is not None:
            cache = PrefixKV(opened.pairs if opened else self._stem_pairs(pack.stem, boundary))
        masks = self._masks(pack.ends, positions, len(pack.stem or ()))
        runs = decoder.runs(pack.ends, pack.used, begun=cache is not None)
        inputs = decoder.inputs(ids)
        context = Context(masks, decoder.rotations(positions), positions, cache, runs, inputs)
        hidden = self._boundary(ids, pack.cells, boundary, context)
        hidden = decoder.run(hidden, self.cut, last, context, self._recompute)
        columns, place = map(self._tensor, head_columns(pack))
        # The last layer is not checkpointed: its backward pass comes first, with nothing else alive.
        if columns.numel() > _FEW_ROWS * ids.numel():
            return decoder.run(hidden, last, last + 1, context).flatten(0, 1)[rows]
        return decoder.run_at(hidden, last, context, columns).flatten(0, 1)[place]

    def _stem_pairs(self, stem: Stem, boundary: Tensor | None) -> dict[int, tuple[Tensor, ...]]:
        """Returns what a stem leaves in each layer: the upper ones, and those of the trunk that are read."""
        ids, cells = self._tensor(stem.ids)[None], None if stem.cells is None else stem.cells[None]
        positions = torch.arange(len(stem), device=self.device)[None]
        masks = self._masks(np.full((1, len(stem)), len(stem)), positions, 0)
        below = PrefixKV()
        runs = self.decoder.runs(np.full((1, len(stem)), len(stem)), np.array([len(stem)]), ends_kept=True)
        rotary, inputs = self.decoder.rotations(positions), self.decoder.inputs(ids)
        context = Context(masks, rotary, positions, below, runs, inputs)
        hidden = self._boundary(ids, cells, boundary, context)
        pairs = self.decoder.keys_values(hidden, self.cut, self.num_layers, context, self._recompute)
        return below.collected() | pairs

    def _masks(self, ends: Int[np.ndarray, "B L"], positions: Tensor, stem: int) -> dict[int | None, Any]:
        """Returns who sees whom behind `stem` tokens, by window: as chains in a long pack, else as masks."""
        decoder = self.decoder
        if (
            decoder.config._attn_implementation == TREE
            and is_long(ends, stem)
            # the host waits for the device here: only where chains may serve, which is on a CPU
            and all(window is None or window > int(positions.max()) for window in decoder.windows)
            and self._serves_chains
        ):
            return dict.fromkeys(decoder.windows, Chains.of(ends[0], stem, self.dtype))
        visible, key_positions = tree_visible(self._tensor(ends)), positions
        if stem:
            before = torch.arange(stem, device=self.device).expand(len(ends), -1)
            key_positions = torch.cat([before, positions], 1)
            visible = torch.cat([visible.new_ones(*ends.shape, stem), visible], 2)
        return decoder.masks(visible, positions, key_positions)

    @cached_property
    def _serves_chains(self) -> bool:
        """Whether the layers give the same with chains as with masks, on two branches of a small tree."""
        ends, decoder = np.array([[8, 8, 8, 5, 5, 8, 8, 8]]), self.decoder
        positions = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5]])
        masks = decoder.masks(tree_visible(self._tensor(ends)), positions, positions)
        chains = dict.fromkeys(decoder.windows, Chains.of(ends[0], 0, self.dtype))
        results = []
        with torch.no_grad():
            for each in (masks, chains):
                runs = decoder.runs(ends, np.array([8]))
                rotary, inputs = decoder.rotations(positions), decoder.inputs(positions)
                context = Context(each, rotary, positions, None, runs, inputs)
                try:
                    results.append(decoder.run(decoder.embed(positions), 0, self.num_layers, context))
                except Exception as error:  # whatever a layer raises that takes no such mask
                    if out_of_memory(error):
                        raise
                    return False
        gap = (results[1] - results[0]).abs().max() / results[0].abs().max()
        return bool(gap <= decoder.tolerance)

    @contextmanager
    def computing(self, decoding: bool = False) -> Iterator[None]:
        config = self.decoder.config
        with super().computing(decoding), ExitStack() as stack:
            if self.device.type == "cpu" and config._attn_implementation == "sdpa" and not decoding:
                stack.enter_context(attending(config, TREE, attend_tree))
            yield

    def _boundary(
        self, ids: Tensor, cells: np.ndarray | None, boundary: Tensor | None, context: Context
    ) -> Float[Tensor, "B L D"]:
        """Returns what leaves the trunk: as recorded, or run without gradient."""
        if boundary is not None and cells is not None:
            hidden, pairs = self.trunk.split(boundary[self._tensor(cells)])
            self.decoder.give(pairs, context)
            return hidden
        with torch.no_grad():
            return self.decoder.run(self.decoder.embed(ids), 0, self.cut, context)

    @property
    def _recompute(self) -> bool:
        return self.checkpoint_layers and torch.is_grad_enabled()


def _matrices(layer: torch.nn.Module) -> Iterator[torch.nn.Linear | Conv1D]:
    """Yields the frozen matrices of a layer."""
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and "lora_" not in name:
            yield module


def _weights_of(matrix: torch.nn.Linear | Conv1D) -> int:
    """Counts the weights of a matrix; a quantised one holds several in one number."""
    if isinstance(matrix, torch.nn.Linear):
        return matrix.in_features * matrix.out_features
    return matrix.weight.numel()


def _has_signal(parameters: Mapping[str, Tensor]) -> bool:
    """Returns whether the adapter changes the model: a fresh LoRA has B = 0 and does not."""
    return any("lora_B" in name and bool(p.detach().any()) for name, p in parameters.items())
