"""A batch's packs through the policy, one after another, and smaller ones where memory runs out.

A pass that fails leaves nothing behind, so it can be repeated in parts: the gradient is a sum over nodes, and
the cut changes it by rounding only. Knows nothing of prompts, rewards or optimizers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from twig.common.errors import UserError
from twig.common.progress import Progress
from twig.config.sizes import Sizes
from twig.core.algorithms.base import Credit
from twig.core.objective import Surrogate
from twig.core.trie import PrefixTrie
from twig.core.types import Group
from twig.engine.pack import Pack, build_packs, halves
from twig.engine.policy import OpenStem, Policy
from twig.runtime.memory_use import give_back, out_of_memory

_SMALLEST_HEAD_CHUNK = 2**16


class NodeValues:
    """One number per weighted node of a batch, whatever packs it came from and goes to."""

    def __init__(self, tries: Sequence[PrefixTrie]) -> None:
        self.first = np.cumsum([0, *(len(trie) for trie in tries)])
        self.values: Tensor | None = None

    def put(self, pack: Pack, values: Tensor) -> None:
        """Keeps `values`, one per target of the pack."""
        if self.values is None:
            self.values = values.new_full((int(self.first[-1]),), math.nan)
        self.values[self._at(pack)] = values

    def of(self, pack: Pack) -> Tensor:
        """The values of the pack's targets."""
        return self.values[self._at(pack)]

    def of_trie(self, index: int) -> np.ndarray:
        """The values of one trie's nodes, NaN where there is none."""
        return self.values[int(self.first[index]) : int(self.first[index + 1])].cpu().numpy()

    def _at(self, pack: Pack) -> Tensor:
        at = self.first[pack.targets.group] + pack.targets.node
        return torch.from_numpy(at).to(self.values.device)


class Passes:
    """The packs of one batch. `sizes` become smaller, and the policy's, where memory asks for it."""

    def __init__(
        self,
        policy: Policy,
        sizes: Sizes,
        progress: Progress,
        groups: Sequence[Group],
        tries: Sequence[PrefixTrie],
        credits: Sequence[Credit],
        boundary: Tensor | None,
    ) -> None:
        self.policy, self.sizes, self.progress, self.boundary = policy, sizes, progress, boundary
        self.parts = (groups, tries, credits)
        self.packs = build_packs(*self.parts, sizes.pack_size, share=not policy.plain)

    @property
    def num_tokens(self) -> int:
        """Tokens run for one gradient; a stem counts once."""
        stems = {pack.stem.group: len(pack.stem) for pack in self.packs if pack.stem}
        return sum(pack.num_tokens for pack in self.packs) + sum(stems.values())

    @property
    def num_rows(self) -> int:
        """Rows of the head for one gradient."""
        return sum(len(pack.rows) for pack in self.packs)

    def logps(self) -> NodeValues:
        """The log-probs of all weighted nodes as the policy stands, without gradient."""
        found = NodeValues(self.parts[1])

        def run(pack: Pack, opened: OpenStem | None) -> Tensor:
            return self.policy.logps(pack, self.boundary, opened)

        self._each(run, found.put, gradient=False)
        return found

    def backward(
        self, surrogate: Surrogate, old: NodeValues | None = None, ref: NodeValues | None = None
    ) -> tuple[NodeValues, float]:
        """Adds the gradient of the batch's loss to the adapter; returns all log-probs and the loss."""
        logps, losses = NodeValues(self.parts[1]), []

        def run(pack: Pack, opened: OpenStem | None) -> tuple[Tensor, float]:
            known = [None if values is None else values.of(pack) for values in (old, ref)]
            return self.policy.backward(pack, surrogate, self.boundary, *known, opened)

        def keep(pack: Pack, found: tuple[Tensor, float]) -> None:
            logps.put(pack, found[0])
            losses.append(found[1])
            self.progress.advance()

        self._each(run, keep, gradient=True)
        return logps, float(sum(losses))

    def _each(
        self,
        run: Callable[[Pack, OpenStem | None], Any],
        keep: Callable[[Pack, Any], None],
        gradient: bool,
    ) -> None:
        """`keep(pack, run(pack))` for each pack; where memory runs out, for its parts.

        Packs of one stem follow each other, so one stem at a time is open.
        """
        with self.policy.attention():
            self.packs = self._run(run, keep, gradient)

    def _run(
        self,
        run: Callable[[Pack, OpenStem | None], Any],
        keep: Callable[[Pack, Any], None],
        gradient: bool,
    ) -> list[Pack]:
        waiting, done, opened = self.packs[::-1], [], None
        while waiting:
            pack, found = waiting.pop(), None
            if opened and (pack.stem is None or pack.stem.group != opened.stem.group):
                self._close(opened, gradient)
                opened = None
            try:
                if pack.stem and not opened:
                    opened = self.policy.open_stem(pack.stem, self.boundary, gradient)
                found = run(pack, opened)
            except Exception as error:
                if not out_of_memory(error):
                    raise
            if found is None:
                released = self.policy.release()
                give_back()
                # what sampling keeps for its next wave goes first
                waiting += [pack] if released else self._smaller(pack)[::-1]
            else:
                keep(pack, found)
                done.append(pack)
        self._close(opened, gradient)
        return done

    def _close(self, opened: OpenStem | None, gradient: bool) -> None:
        """Sends what a stem's packs left in it through the stem, with checkpointed layers where memory asks
        for it."""
        while opened and gradient:
            try:
                self.policy.close_stem(opened, self.boundary)
                return
            except Exception as error:
                if not out_of_memory(error):
                    raise
            released = self.policy.release()
            give_back()
            if not released:
                self._checkpoint(len(opened.stem))

    def _checkpoint(self, tokens: int) -> None:
        """Checkpoints layers from here on; refuses `tokens` where that was done already."""
        if self.sizes.checkpoint_layers:
            self._refuse(tokens)
        self.sizes = replace(self.sizes, checkpoint_layers=True)
        self.policy.checkpoint_layers = True
        self._say("train.checkpoint_layers=true")

    def _smaller(self, pack: Pack) -> list[Pack]:
        """What to run in place of a pack that memory had no room for; remembered for the packs to come."""
        policy, sizes = self.policy, self.sizes
        parts = halves(pack, *self.parts, share=not policy.plain)
        if len(parts) > 1:
            size = min(sizes.pack_size, max(part.ids.size for part in parts))
            self.sizes = replace(sizes, pack_size=size)
            self._say(f"train.pack_size={size}")
        elif policy.plain:
            self._refuse(pack.num_tokens)
        elif not sizes.checkpoint_layers:
            self._checkpoint(pack.num_tokens)
        elif sizes.head_chunk > _SMALLEST_HEAD_CHUNK:
            policy.head_chunk = max(sizes.head_chunk // 4, _SMALLEST_HEAD_CHUNK)
            self.sizes = replace(sizes, head_chunk=policy.head_chunk)
            self._say(f"train.head_chunk={policy.head_chunk}")
        else:
            self._refuse(pack.num_tokens)
        return parts

    def _say(self, what: str) -> None:
        self.progress.message(f"memory ran out in an update: going on with {what}; results stay the same")

    def _refuse(self, tokens: int) -> NoReturn:
        raise UserError(
            f"memory: {tokens} tokens, prompt and completion, do not fit; write a smaller "
            "rollout.max_completion_length, fewer lora.layers, or a smaller model"
        )
