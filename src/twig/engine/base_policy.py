"""What a policy is, whichever engine runs it: a frozen language model with a LoRA adapter.

`policy.Policy` runs packed tries layer by layer, `plain_policy.PlainPolicy` calls the model whole, one row
per completion. Updates, sampling, evaluation and training know only the base class here. Log-probs and the
loss are float32 or better. The base model is never merged into and always in eval mode, so the sampled and
the trained distribution are one.

Knows nothing of tries, rewards or algorithms. Legend: R head rows, N targets, C cells, D hidden, V
vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from twig.common.errors import UserError
from twig.common.text import message_of
from twig.core.algorithms.base import Objective
from twig.core.objective import loss
from twig.engine.kernels import Packed, onednn_products
from twig.engine.loops import Loop, choose_loop
from twig.engine.pack import Pack, Stem
from twig.runtime.memory_use import out_of_memory


@dataclass(frozen=True)
class OpenStem:
    """A stem shared by its packs: what it leaves in each layer (keys and values, states).

    As leaves, whose `grad` sums that of the packs.
    """

    stem: Stem
    pairs: dict[int, tuple[Tensor, ...]]

    def leaves(self) -> list[Tensor]:
        return [leaf for pair in self.pairs.values() for leaf in pair if leaf.requires_grad]


class BasePolicy(ABC):
    """A model with a LoRA adapter, ready to sample from and to train.

    `temperature` and `suppress_tokens` belong to the policy because the trained distribution must be the
    sampled one. `head_chunk` logits are computed at once in the update; with `checkpoint_layers` it keeps
    only the inputs of the upper layers and runs these again in the backward pass: both affect only an engine
    that `can_checkpoint`. `decode` is how tokens are sampled: plain, graph or compiled, as in the settings.
    `kernels` (onednn or torch) multiply by the frozen matrices, with `packed_weights` by packed copies of
    them while sampling.
    """

    engine: ClassVar[str]  # its value of `model.engine`
    sharing_refusal: str | None = None  # why sampling copies each prompt to its completions
    shares_prefixes: ClassVar[bool]  # whether completions of a pack share what they have in common
    can_checkpoint: ClassVar[bool]  # whether one path can be run with less memory

    def __init__(
        self,
        peft_model: PeftModel,
        *,
        temperature: float = 1.0,
        suppress_tokens: Sequence[int] = (),
        head_chunk: int = 2**22,
        checkpoint_layers: bool = False,
        decode: str = "auto",
        kernels: str = "torch",
        packed_weights: bool = False,
    ) -> None:
        self.peft_model = peft_model.eval()
        self.model = cast(PreTrainedModel, peft_model.get_base_model())
        self.temperature = temperature
        self.head_chunk, self.checkpoint_layers = head_chunk, checkpoint_layers
        self.device: torch.device = self.embeddings.device
        self.suppressed = torch.tensor(sorted(suppress_tokens), dtype=torch.long, device=self.device)
        self.parameters = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
        self.kernels, self.packed = kernels, Packed() if packed_weights else None
        base = (module for name, module in peft_model.named_modules() if "lora_" not in name)
        self._linear = [module for module in base if isinstance(module, nn.Linear | Conv1D)]
        self.decode = decode
        self.decode_refusal: str | None = None  # why sampling fell back to a slower loop
        self.adapter_is_on = True
        self._reference: dict[str, Tensor] | None = None
        self._refuse_what_does_not_run()
        self._set_up()

    def _refuse_what_does_not_run(self) -> None:
        """Raises UserError for a model whose own forward fails, perhaps as its config contradicts itself."""
        try:
            with torch.no_grad():
                self.model(input_ids=torch.arange(2, device=self.device)[None], use_cache=False)
        except Exception as error:  # whatever the model's code raises
            if out_of_memory(error):
                raise
            why = f"its own forward fails ({type(error).__name__}: {message_of(error)})"
            raise UserError("model.name", why, "Mend its config.json, or choose another model") from error

    def _refuse_unmoved(self, logits: Callable[[], Tensor], fix: str) -> None:
        """Raises UserError if a trained tensor gets no gradient from logits, as it would never move."""
        names, parameters = list(self.parameters), list(self.parameters.values())
        gradients: Sequence[Tensor | None] = [None] * len(parameters)
        with torch.enable_grad():
            value = logits().float().square().mean()
            if value.requires_grad:
                gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        unmoved = [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
        if unmoved or not names:
            what = f"{module_of(unmoved[0])} gets no gradient" if names else "it has no weights to train"
            raise UserError("model.adapter" if names else "lora", what, fix)

    @abstractmethod
    def _set_up(self) -> None:
        """Prepares what the engine needs beyond that; raises UserError if it does not serve the model."""

    @property
    def embeddings(self) -> Tensor:
        """The matrix of the input embeddings, on the model's device and in its dtype."""
        return cast(nn.Embedding, self.model.get_input_embeddings()).weight

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base model."""
        return cast(torch.dtype, self.model.dtype)

    @property
    def context_length(self) -> int | None:
        """The most tokens the model was made for; None if it has no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def boundary_width(self) -> int:
        """Numbers that sampling can record of a token for the update, from the frozen layers; 0: none."""
        return 0

    def loop(self, stop: Sequence[str]) -> Loop:
        """Returns the loop that samples from this policy."""
        return choose_loop(self.engine, self.decode, stop)

    def keep_reference(self) -> None:
        """Keeps the adapter as it is now for `reference`; it is small beside the base."""
        self._reference = {name: p.detach().clone() for name, p in self.parameters.items()}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Makes the model the reference of the KL term inside: the adapter that was kept, else the base."""
        if self._reference is None:
            with self.base():
                yield
            return
        trained = {name: p.data for name, p in self.parameters.items()}
        try:
            for name, kept in self._reference.items():
                self.parameters[name].data = kept
            yield
        finally:
            for name, tensor in trained.items():
                self.parameters[name].data = tensor

    @contextmanager
    def base(self) -> Iterator[None]:
        """Turns the adapter off inside: the model is the base."""
        before, self.adapter_is_on = self.adapter_is_on, False
        try:
            with self.peft_model.disable_adapter():
                yield
        finally:
            self.adapter_is_on = before

    @contextmanager
    def computing(self, decoding: bool = False) -> Iterator[None]:
        """Runs the model on the fastest kernels inside; packed weights serve only while `decoding`.

        Attention on a CUDA device stays off cuDNN, which plans for each new shape. That takes tens of
        milliseconds and more (docs/performance.md), and nearly every shape is new: prompts, packs and, in the
        plain loop, each position.
        """
        if self.device.type == "cuda":
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                yield
        elif self.kernels == "onednn":
            with onednn_products(self._linear, self.packed if decoding else None):
                yield
        else:
            yield

    def free_packed(self) -> bool:
        """Frees the packed weights until they are needed again; returns whether there were any."""
        return self.packed is not None and self.packed.clear()

    def fall_back(self, why: str) -> None:
        """Samples in a slower loop from here on; keeps why in `decode_refusal`."""
        raise AssertionError(f"this engine has no slower loop: {why}")

    def release(self) -> bool:
        """Frees the buffers that sampling keeps for its next wave; returns whether there were any."""
        return False

    def sampled_logits(self, logits: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        """Returns logits of the sampled distribution: temperature and suppressed tokens applied.

        They are written over those that are passed, unless a gradient goes through these.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if logits.requires_grad:
            logits = logits.clone()
        if self.temperature != 1.0:
            logits = logits.div_(self.temperature)
        if len(self.suppressed):
            logits = logits.index_fill_(-1, self.suppressed, float("-inf"))
        return logits

    @torch.no_grad()
    def logps(
        self, pack: Pack, boundary: Float[Tensor, "C D"] | None = None, opened: OpenStem | None = None
    ) -> Float[Tensor, " N"]:
        """Returns log-probs of the pack's targets, without gradient; `pack.cells` index `boundary`."""
        return self._target_logps(pack, boundary, opened)

    def backward(
        self,
        pack: Pack,
        objective: Objective,
        boundary: Float[Tensor, "C D"] | None = None,
        old_logp: Float[Tensor, " N"] | None = None,
        ref_logp: Float[Tensor, " N"] | None = None,
        opened: OpenStem | None = None,
    ) -> tuple[Float[Tensor, " N"], float]:
        """Adds the gradient of the pack's loss to the adapter; returns the targets' log-probs and the loss.

        The gradient is added whole or, if this raises, not at all. With `opened`, the pack's stem is not run:
        `close_stem` adds its part of the gradient, once for all packs.
        """
        logps = self._target_logps(pack, boundary, opened)
        targets = pack.targets
        plus, minus, kl = (self._tensor(w) for w in (targets.plus, targets.minus, targets.kl))
        value = loss(objective, logps, plus, minus, kl, old_logp, ref_logp)
        leaves = [*self.parameters.values(), *(opened.leaves() if opened else [])]
        add_gradients(leaves, torch.autograd.grad(value, leaves, allow_unused=True))
        return logps.detach(), float(value.detach())

    def open_stem(self, stem: Stem, boundary: Float[Tensor, "C D"] | None, gradient: bool) -> OpenStem:
        """Runs a stem once for all of its packs; only an engine that shares prefixes has stems."""
        raise AssertionError("packs of this engine have no stems")

    def close_stem(self, opened: OpenStem, boundary: Float[Tensor, "C D"] | None) -> None:
        """Adds the stem's part of the gradient to the adapter."""
        raise AssertionError("packs of this engine have no stems")

    def update_flops(self, nodes: int, rows: int, backward: int = 1, forward: int = 0) -> int | None:
        """Returns the operations of an update; None if the engine does not count them."""
        return None

    @abstractmethod
    def _target_logps(
        self, pack: Pack, boundary: Tensor | None, opened: OpenStem | None
    ) -> Float[Tensor, " N"]:
        """Returns the targets' log-probs, differentiable in the adapter."""

    def _tensor(self, array: np.ndarray) -> Tensor:
        """Moves a numpy array to the device; floats in the precision of the loss."""
        tensor = torch.from_numpy(array)
        if tensor.is_floating_point():
            tensor = tensor.to(torch.promote_types(self.dtype, torch.float32))
        return tensor.to(self.device)


def module_of(parameter: str) -> str:
    """Returns the name of the module that an adapter's tensor belongs to.

    >>> module_of("base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight")
    'model.layers.3.mlp.up_proj'
    """
    return parameter.removeprefix("base_model.model.").partition(".lora_")[0]


def add_gradients(leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Adds `gradients` to the `grad` of the leaves."""
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
