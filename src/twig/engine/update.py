"""Runs a batch's packs through the policy, retrying with smaller ones on out-of-memory.

A pass that fails leaves nothing behind, so it can be repeated in parts: the gradient is a sum over nodes, and
the cut changes it by rounding only. Knows nothing of prompts, rewards or optimizers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from twig.common.errors import UserError
from twig.common.progress import Progress
from twig.config.sizes import Sizes
from twig.core.algorithms.base import Objective
from twig.core.credit import Scored
from twig.core.objective import SequenceWeights, sequence_weights
from twig.engine.base_policy import BasePolicy, OpenStem
from twig.engine.pack import LEAST_SAVED, Pack, build_packs, halves
from twig.runtime.memory_use import give_back, out_of_memory, return_freed_memory, trim_freed_memory

_SMALLEST_HEAD_CHUNK = 2**16


class NodeValues:
    """One number per weighted node of a batch, whatever packs it comes from and goes to."""

    def __init__(self, scored: Sequence[Scored]) -> None:
        self.first = np.cumsum([0, *(len(each.trie) for each in scored)])
        self.values: Tensor | None = None

    def put(self, pack: Pack, values: Tensor) -> None:
        """Keeps `values`, one per target of the pack."""
        if self.values is None:
            self.values = values.new_full((int(self.first[-1]),), math.nan)
        self.values[self._at(pack, self.values)] = values

    def of(self, pack: Pack) -> Tensor:
        """Returns the values of the pack's targets."""
        assert self.values is not None, "put before it is read"
        return self.values[self._at(pack, self.values)]

    def of_group(self, index: int) -> np.ndarray:
        """Returns the values of one group's nodes, NaN if there is none."""
        assert self.values is not None, "put before it is read"
        return self.values[int(self.first[index]) : int(self.first[index + 1])].cpu().numpy()

    def _at(self, pack: Pack, values: Tensor) -> Tensor:
        at = self.first[pack.targets.group] + pack.targets.node
        return torch.from_numpy(at).to(values.device)


@dataclass(frozen=True)
class LogProbs:
    """Log-probs of weighted nodes that an objective needs before its backward pass (None: not needed).

    `old`: of the policy that sampled; `ref`: of the reference; `current`: of the policy as it stands.
    """

    old: NodeValues | None = None
    ref: NodeValues | None = None
    current: NodeValues | None = None


class Passes:
    """The packs of one batch. On out-of-memory `sizes`, and the policy's, become smaller."""

    def __init__(
        self,
        policy: BasePolicy,
        sizes: Sizes,
        progress: Progress,
        scored: Sequence[Scored],
        boundary: Tensor | None,
    ) -> None:
        self.policy, self.sizes, self.progress, self.boundary = policy, sizes, progress, boundary
        self.scored = scored
        least_saved = LEAST_SAVED.get(policy.device.type, LEAST_SAVED["cuda"])
        self.packs = build_packs(scored, sizes.pack_size, policy.shares_prefixes, least_saved)

    @property
    def num_tokens(self) -> int:
        """Tokens run for one gradient; a stem counts once."""
        stems = {pack.stem.name: len(pack.stem) for pack in self.packs if pack.stem}
        return sum(pack.num_tokens for pack in self.packs) + sum(stems.values())

    @property
    def num_rows(self) -> int:
        """Rows of the head for one gradient."""
        return sum(len(pack.rows) for pack in self.packs)

    def logps(self) -> NodeValues:
        """Returns the log-probs of all weighted nodes as the policy stands, without gradient."""
        values = NodeValues(self.scored)

        def run(pack: Pack, opened: OpenStem | None) -> Tensor:
            return self.policy.logps(pack, self.boundary, opened)

        self._each(run, values.put, gradient=False)
        return values

    def backward(self, objective: Objective, given: LogProbs = LogProbs()) -> tuple[NodeValues, float]:
        """Adds the gradient of the batch's loss to the adapter; returns all log-probs and the loss."""
        logps, losses, old, weights = NodeValues(self.scored), [], given.old, None
        if objective.kind == "sequence ratio":
            weights, old = self._sequence_weights(objective, given), None
            losses.append(-sum(each.constant for each in weights))

        def run(pack: Pack, opened: OpenStem | None) -> tuple[Tensor, float]:
            old_logp, ref_logp = (values and values.of(pack) for values in (old, given.ref))
            weighted = pack if weights is None else _with_weights(pack, weights)
            return self.policy.backward(weighted, objective, self.boundary, old_logp, ref_logp, opened)

        def keep(pack: Pack, result: tuple[Tensor, float]) -> None:
            logps.put(pack, result[0])
            losses.append(result[1])
            self.progress.advance()

        self._each(run, keep, gradient=True)
        return logps, float(sum(losses))

    def _sequence_weights(self, objective: Objective, given: LogProbs) -> list[SequenceWeights]:
        """Returns the weights of each group under a ratio per completion."""
        weights = []
        for index, each in enumerate(self.scored):
            pair = (None, None)
            if given.current is not None and given.old is not None:
                pair = given.current.of_group(index), given.old.of_group(index)
            weights.append(sequence_weights(objective, each.trie, each.credit, *pair))
        return weights

    def _each(
        self,
        run: Callable[[Pack, OpenStem | None], Any],
        keep: Callable[[Pack, Any], None],
        gradient: bool,
    ) -> None:
        """Calls `keep(pack, run(pack))` for each pack; on out-of-memory for its parts.

        Packs of one stem follow each other, so one stem at a time is open.
        """
        return_freed_memory()
        with self.policy.computing():
            self.packs = self._run(run, keep, gradient)
        trim_freed_memory()

    def _run(
        self,
        run: Callable[[Pack, OpenStem | None], Any],
        keep: Callable[[Pack, Any], None],
        gradient: bool,
    ) -> list[Pack]:
        waiting, done, opened = self.packs[::-1], [], None
        while waiting:
            pack, result = waiting.pop(), None
            if opened and (pack.stem is None or pack.stem.name != opened.stem.name):
                self._close(opened, gradient)
                opened = None
            try:
                if pack.stem and not opened:
                    opened = self.policy.open_stem(pack.stem, self.boundary, gradient)
                result = run(pack, opened)
            except Exception as error:
                if not out_of_memory(error):
                    raise
            if result is None:
                released = self.policy.release()
                give_back()
                # what sampling keeps for its next wave goes first
                waiting += [pack] if released else self._smaller(pack)[::-1]
            else:
                keep(pack, result)
                done.append(pack)
        self._close(opened, gradient)
        return done

    def _close(self, opened: OpenStem | None, gradient: bool) -> None:
        """Sends a stem's gradients through the stem, with checkpointed layers on out-of-memory."""
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
        """Checkpoints layers from here on; raises UserError for `tokens` if that is done already."""
        if self.sizes.checkpoint_layers:
            self._refuse(tokens)
        self.sizes = replace(self.sizes, checkpoint_layers=True)
        self.policy.checkpoint_layers = True
        self._say("train.checkpoint_layers=true")

    def _smaller(self, pack: Pack) -> list[Pack]:
        """Returns smaller packs for one that did not fit in memory; the size is kept for later packs."""
        policy, sizes = self.policy, self.sizes
        parts = halves(pack, self.scored, share=policy.shares_prefixes)
        if len(parts) > 1:
            size = min(sizes.pack_size, max(part.size for part in parts))
            self.sizes = replace(sizes, pack_size=size)
            self._say(f"train.pack_size={size}")
        elif not policy.can_checkpoint:
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

    def _say(self, setting: str) -> None:
        self.progress.message(f"out of memory in an update: continuing with {setting}; results stay the same")

    def _refuse(self, tokens: int) -> NoReturn:
        raise UserError(
            "memory",
            f"{tokens} tokens, prompt and completion, do not fit",
            "Set a smaller rollout.max_completion_length, fewer lora.layers, or a smaller model",
        )


def _with_weights(pack: Pack, weights: Sequence[SequenceWeights]) -> Pack:
    """Returns the pack with other policy weights on its targets."""
    places = list(zip(pack.targets.group.tolist(), pack.targets.node.tolist(), strict=True))
    plus = np.array([weights[group].plus[node] for group, node in places], np.float64)
    minus = np.array([weights[group].minus[node] for group, node in places], np.float64)
    return replace(pack, targets=replace(pack.targets, plus=plus, minus=minus))
