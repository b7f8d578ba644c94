"""Finds what keeps a state in a layer, and runs it over trees and over the next tokens of texts.

A mixer is a module that takes a cache and updates a state in it, as its code says. States are handed over as
values, so autograd follows them; transformers' cache copies them in place. Only the mixer runs in parts, the
rest of its layer sees the whole pack.

Knows nothing of models, adapters or algorithms. Legend: B rows, L columns, S parts, T tokens of a part, D
hidden.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twig.engine.mixers.runs import Runs

State = tuple[Tensor, ...]  # of one mixer, each [S, ...], in the order of `Mixer.names`
Own = Callable[..., Tensor]  # a mixer's own forward, with hidden states and a cache
_UPDATES = {"update_conv_state", "update_recurrent_state"}
_CACHES = ("past_key_values", "cache_params")


class StateCache:
    """A cache as a mixer calls it: `before` has the states that it starts from, `after` those it leaves."""

    def __init__(self, before: dict[tuple[str, int], Tensor]) -> None:
        self.before, self.after = before, dict(before)

    def has_previous_state(self, *args: object, **kwargs: object) -> bool:
        return bool(self.before)

    def is_recording_past(self, *args: object, **kwargs: object) -> bool:
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.before.get(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.before.get(("recurrent", state_idx))

    def update_conv_state(
        self,
        new: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Returns a convolution's inputs behind those before; keeps the last of them."""
        size, before = conv_kernel_size or new.shape[-1], self.get_conv_state(layer_idx, state_idx)
        if before is not None:
            # times one: its gradient is then a tensor of its own, not a view that keeps that of all inputs
            new, size = torch.cat([before * 1, new], -1), before.shape[-1]
        elif new.shape[-1] < size:
            new = nn.functional.pad(new, (size - new.shape[-1], 0))
        self.after["conv", state_idx] = new[..., -size:]
        return new

    def update_recurrent_state(
        self, new: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: object
    ) -> Tensor:
        self.after["recurrent", state_idx] = new
        return new


@dataclass
class Mixer:
    """A module of a layer that keeps a state; `attends` if another of the layer keeps keys and values.

    `names` are its states, in the order in which it is given and returns them.
    """

    module: nn.Module
    cache_name: str
    attends: bool
    names: list[tuple[str, int]] = field(default_factory=list)

    def over_tree(
        self, own: Own, runs: Runs, before: State, hidden: Float[Tensor, "B L D"]
    ) -> tuple[Tensor, State]:
        """Returns the mixer's output over a table of trees, and the last states of its rows if kept.

        `before` is what every row starts from, one row or as many as there are, or nothing.
        """
        flat, outputs, places = hidden.flatten(0, 1), [], []
        above: State = ()
        for level in runs.levels:
            saved: list[State] = []
            for batch in level:
                starts: State = ()
                if batch.starts is not None:
                    starts = tuple(state[batch.starts] for state in above)
                elif before:
                    count = len(batch.cells)
                    starts = tuple(state.expand(count, *state.shape[1:]).clone() for state in before)
                output, ended = self.call(own, flat[batch.cells], starts)
                outputs.append(output.flatten(0, 1)[batch.kept])
                places.append(batch.places)
                if batch.saves:
                    saved.append(ended)
            if saved:
                above = tuple(torch.cat(states) for states in zip(*saved, strict=True))
        whole = flat.new_zeros(len(flat), outputs[0].shape[-1]).to(outputs[0].dtype)
        whole = whole.index_copy(0, torch.cat(places), torch.cat(outputs))
        ended = () if runs.last is None else tuple(state[runs.last] for state in above)
        return whole.unflatten(0, hidden.shape[:2]), ended

    def call(self, own: Own, hidden: Float[Tensor, "S T D"], before: State) -> tuple[Tensor, State]:
        """Returns the mixer's output and the states it ends in; `before` may be written into."""
        cache = StateCache(dict(zip(self.names, before, strict=True)) if before else {})
        output = own(hidden, **{self.cache_name: cache})
        self.names = sorted(cache.after)
        return output, tuple(cache.after[name] for name in self.names)

    @contextmanager
    def replaced(self, forward: Callable[[Own, Tensor], Tensor]) -> Iterator[None]:
        """Inside, the module is `forward(its own forward, hidden states)`."""
        own = self.module.forward

        def called(hidden_states: Tensor, **options: Any) -> Tensor:
            return forward(own, hidden_states)

        self.module.forward = called
        try:
            yield
        finally:
            del self.module.forward


def mixer_of(layer: nn.Module) -> Mixer | None:
    """Returns the mixer of a layer that keeps a state, None if no module of it does."""
    mixers, attends = [], False
    for module in layer.modules():
        own = inspect.unwrap(type(module).forward)
        code = getattr(own, "__code__", None)
        name = next((n for n in _CACHES if n in inspect.signature(own).parameters), None)
        if code is None or name is None:
            continue
        if _UPDATES & set(code.co_names):
            mixers.append((module, name))
        elif "update" in code.co_names:
            attends = True
    if len(mixers) != 1:
        return None
    module, name = mixers[0]
    return Mixer(module, name, attends)
