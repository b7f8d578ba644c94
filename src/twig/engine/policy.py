"""The policy: a frozen language model with LoRA adapters on its upper layers, and the log-probs of a pack
under it.

The layers below the lowest adapter (the trunk) never change, so their output (the boundary) is constant in
the adapter: it is recorded while sampling, or run once without gradient, and the update runs the upper layers
only. The head is applied to the rows that predict a weighted node and to no other. Log-probs and the loss are
float32 or better. The base is never merged into and always in eval mode, so the sampled and the trained
distribution are one.

Knows nothing of tries, rewards or algorithms. Legend: B rows, L columns, R head rows, N targets, D hidden, V
vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from twig.core.objective import Surrogate, loss
from twig.engine.decoder import Context, Decoder, tree_visible
from twig.engine.kv_cache import PrefixKV
from twig.engine.lora import adapted_layers
from twig.engine.pack import Pack, Stem, head_columns

# The last layer runs on the head rows alone where they are at most this share of the cells: every cell's keys
# and values are needed, and finding those first costs a little.
_FEW_ROWS = 0.75


@dataclass(frozen=True)
class OpenStem:
    """A stem that is being shared by its packs: its keys and values by layer, as leaves. The gradients of the
    packs add up in their `grad`."""

    stem: Stem
    pairs: dict[int, tuple[Tensor, Tensor]]

    def leaves(self) -> list[Tensor]:
        return [leaf for pair in self.pairs.values() for leaf in pair if leaf.requires_grad]


class Policy:
    """A model with a LoRA adapter, ready to sample from and to train.

    `cut` is the lowest adapted layer: the trunk is layers 0 .. cut - 1. `temperature` and `suppress_tokens`
    belong to the policy because the trained distribution must be the sampled one. `head_chunk` logits are
    computed at once in the update. With `checkpoint_layers` it keeps the inputs of the upper layers only and
    runs these again in the backward pass. With `plain`, the model is only called whole: slower, right for any
    architecture, and the last two change nothing. `decode` is how tokens are sampled: plain, graph or
    compiled, as in the settings.
    """

    def __init__(
        self,
        peft_model: PeftModel,
        *,
        temperature: float = 1.0,
        suppress_tokens: Sequence[int] = (),
        plain: bool = False,
        head_chunk: int = 2**22,
        checkpoint_layers: bool = False,
        decode: str = "auto",
    ) -> None:
        self.peft_model = peft_model.eval()
        self.model: PreTrainedModel = peft_model.get_base_model()
        self.temperature = temperature
        self.plain = plain
        self.head_chunk, self.checkpoint_layers = head_chunk, checkpoint_layers
        self.decoder = None if plain else Decoder(self.model)
        self.device = self.model.get_input_embeddings().weight.device
        self.suppressed = torch.tensor(sorted(suppress_tokens), dtype=torch.long, device=self.device)
        self.parameters = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
        self.decode = decode
        if decode == "auto":
            self.decode = "graph" if self.device.type == "cuda" else "plain"
        self.decode_steps: Any = None  # what sampling keeps on the device for its next wave
        self.decode_refusal: str | None = None  # why it is not sampled as asked
        self.adapter_is_on = True
        if not plain:
            self.decoder.check() if not _has_signal(self.parameters) else self._check_without_adapter()
            self.num_layers = len(self.decoder.layers)
            self.cut = min(adapted_layers(self.decoder.layers))

    @property
    def context_length(self) -> int | None:
        """Most tokens that the model was made for; None where it has no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _check_without_adapter(self) -> None:
        with self.base():
            self.decoder.check()

    @contextmanager
    def base(self) -> Iterator[None]:
        """Inside, the adapter is off: the model is the base, the reference of the KL term."""
        before, self.adapter_is_on = self.adapter_is_on, False
        try:
            with self.peft_model.disable_adapter():
                yield
        finally:
            self.adapter_is_on = before

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Inside, attention on a CUDA device leaves out the kernels of cuDNN.

        It plans for each shape that is new, which takes tens of milliseconds and more (docs/performance.md),
        and nearly every shape is: prompts, packs and, in the plain loop, each position.
        """
        if self.device.type != "cuda":
            yield
            return
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            yield

    def release(self) -> bool:
        """Gives up the buffers that sampling keeps for its next wave; returns whether there were any."""
        return self.decode_steps is not None and self.decode_steps.clear()

    def next_token_logits(self, hidden: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
        """Logits of the sampled distribution from rows of the last layer's output: softcap, temperature,
        suppression."""
        return self.sampled_logits(self.decoder.logits(hidden))

    def sampled_logits(self, logits: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if len(self.suppressed):
            logits = logits.index_fill(-1, self.suppressed, float("-inf"))
        return logits

    @torch.no_grad()
    def logps(
        self, pack: Pack, boundary: Float[Tensor, "C D"] | None = None, opened: OpenStem | None = None
    ) -> Float[Tensor, " N"]:
        """Log-probs of the pack's targets, without gradient. `boundary` is the table that `pack.cells`
        index."""
        return self._target_logps(pack, boundary, opened)

    def backward(
        self,
        pack: Pack,
        surrogate: Surrogate,
        boundary: Float[Tensor, "C D"] | None = None,
        old_logp: Float[Tensor, " N"] | None = None,
        ref_logp: Float[Tensor, " N"] | None = None,
        opened: OpenStem | None = None,
    ) -> tuple[Float[Tensor, " N"], float]:
        """Adds the gradient of the pack's loss to the adapter; returns the targets' log-probs and the loss.

        The gradient is added whole or, where this raises, not at all. With `opened`, the pack's stem is not
        run: what it owes to the gradient is added by `close_stem`, once for all packs.
        """
        logps = self._target_logps(pack, boundary, opened)
        targets = pack.targets
        weights = [self._tensor(w) for w in (targets.plus, targets.minus, targets.kl)]
        value = loss(surrogate, logps, *weights, old_logp, ref_logp)
        leaves = [*self.parameters.values(), *(opened.leaves() if opened else [])]
        _add(leaves, torch.autograd.grad(value, leaves, allow_unused=True))
        return logps.detach(), float(value.detach())

    @torch.no_grad()
    def open_stem(self, stem: Stem, boundary: Float[Tensor, "C D"] | None, gradient: bool) -> OpenStem:
        """Runs a stem once for all of its packs, which are then run with it `opened`; for the adapter as it
        stands. With `gradient` end with `close_stem`."""
        pairs = self._stem_pairs(stem, boundary)
        for layer, pair in pairs.items():
            for leaf in pair:
                leaf.requires_grad_(gradient and layer >= self.cut)
        return OpenStem(stem, pairs)

    def close_stem(self, opened: OpenStem, boundary: Float[Tensor, "C D"] | None) -> None:
        """Adds the stem's part of the gradient to the adapter: the stem is run again and the gradients that
        its packs left are sent through it. Whole or, where this raises, not at all."""
        pairs = self._stem_pairs(opened.stem, boundary)
        outputs, gradients = [], []
        for layer, pair in pairs.items():
            for output, leaf in zip(pair, opened.pairs[layer], strict=True):
                if output.requires_grad and leaf.grad is not None:
                    outputs.append(output)
                    gradients.append(leaf.grad)
        parameters = list(self.parameters.values())
        if outputs:
            _add(parameters, torch.autograd.grad(outputs, parameters, gradients, allow_unused=True))

    def update_flops(self, nodes: int, rows: int, backward: int = 1, forward: int = 0) -> int | None:
        """Multiplications and additions of an update's matrix products: `nodes` tokens through the layers
        from the lowest adapter upwards, of which `rows` go on behind the keys and values of the last layer
        and through the head, `backward` times with a gradient and `forward` times without; None where the
        model is called whole.

        A weight costs 2 a token forwards and, as it is frozen, 2 backwards, for the gradient of its input.
        Not in it: the adapter's own matrices, the products of queries with keys, padding, and what is run
        again. The lowest layer's inputs need no gradient: there it counts a little too much.
        """
        if self.decoder is None:
            return None
        kinds = (torch.nn.Linear, Conv1D)
        of_all, of_rows = 0, self.model.get_output_embeddings().weight.numel()
        for number in range(self.cut, self.num_layers):
            for name, module in self.decoder.layers[number].named_modules():
                if isinstance(module, kinds) and "lora_" not in name:
                    last = number == self.num_layers - 1
                    whole = not last or any(part in ("k_proj", "v_proj") for part in name.split("."))
                    of_all += module.weight.numel() * whole
                    of_rows += module.weight.numel() * (not whole)
        return (4 * backward + 2 * forward) * (nodes * of_all + rows * of_rows)

    def _tensor(self, array: np.ndarray) -> Tensor:
        """A numpy array on the device; floats in the precision of the loss."""
        tensor = torch.from_numpy(array)
        if tensor.is_floating_point():
            tensor = tensor.to(torch.promote_types(self.model.dtype, torch.float32))
        return tensor.to(self.device)

    def _target_logps(
        self, pack: Pack, boundary: Tensor | None, opened: OpenStem | None
    ) -> Float[Tensor, " N"]:
        """The targets' log-probs, differentiable in the adapter."""
        row, token = self._tensor(pack.targets.row), self._tensor(pack.targets.token)
        hidden = self._hidden(pack, boundary, opened)
        if self.plain:
            return torch.log_softmax(self.sampled_logits(hidden), -1)[row, token]
        head = self.decoder.open_head(self.temperature, self.suppressed, self.head_chunk)
        return head.logps(self.decoder.norm(hidden), row, token)

    def _hidden(self, pack: Pack, boundary: Tensor | None, opened: OpenStem | None) -> Float[Tensor, "R D"]:
        """The last layer's output at the pack's head rows (with `plain`: the model's own logits there)."""
        rows, ids = self._tensor(pack.rows), self._tensor(pack.ids)
        if self.plain:
            return self.model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[rows]
        decoder, last = self.decoder, self.num_layers - 1
        positions, visible = self._tensor(pack.positions), tree_visible(self._tensor(pack.ends))
        key_positions, cache = positions, None
        if pack.stem is not None:
            cache = PrefixKV(opened.pairs if opened else self._stem_pairs(pack.stem, boundary))
            before = torch.arange(len(pack.stem), device=self.device).expand(len(ids), -1)
            key_positions = torch.cat([before, positions], 1)
            visible = torch.cat([visible.new_ones(*ids.shape, len(pack.stem)), visible], 2)
        masks = decoder.masks(visible, positions, key_positions)
        context = Context(masks, decoder.rotations(positions), positions, cache)
        hidden = self._boundary(ids, pack.cells, boundary, context)
        hidden = decoder.run(hidden, self.cut, last, context, self._recompute)
        columns, place = map(self._tensor, head_columns(pack))
        if columns.numel() > _FEW_ROWS * ids.numel():
            return decoder.run(hidden, last, last + 1, context, self._recompute).flatten(0, 1)[rows]
        return decoder.run_at(hidden, last, context, columns, self._recompute).flatten(0, 1)[place]

    def _stem_pairs(self, stem: Stem, boundary: Tensor | None) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of a stem, by layer: of the upper ones, and of the trunk's where that was run."""
        ids, cells = self._tensor(stem.ids)[None], None if stem.cells is None else stem.cells[None]
        positions = torch.arange(len(stem), device=self.device)[None]
        visible = tree_visible(torch.full_like(positions, len(stem)))
        masks = self.decoder.masks(visible, positions, positions)
        trunk = PrefixKV()
        context = Context(masks, self.decoder.rotations(positions), positions, trunk)
        hidden = self._boundary(ids, cells, boundary, context)
        pairs = self.decoder.keys_values(hidden, self.cut, self.num_layers, context, self._recompute)
        return trunk.found | pairs

    def _boundary(
        self, ids: Tensor, cells: np.ndarray | None, boundary: Tensor | None, context: Context
    ) -> Float[Tensor, "B L D"]:
        """What leaves the trunk: as recorded, else run."""
        if boundary is not None and cells is not None:
            return boundary[self._tensor(cells)]
        with torch.no_grad():
            return self.decoder.run(self.decoder.embed(ids), 0, self.cut, context)

    @property
    def _recompute(self) -> bool:
        return self.checkpoint_layers and torch.is_grad_enabled()


def _add(leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def _has_signal(parameters: dict[str, Tensor]) -> bool:
    """Whether the adapter changes the model: a fresh LoRA has B = 0 and does not."""
    return any("lora_B" in name and bool(p.detach().any()) for name, p in parameters.items())
