"""What one step sampled: groups with their rewards, tries and credit; its gaps, and its rows in a file.

Knows nothing of sampling or of optimizers.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from twig.core.credit import Scored
from twig.core.objective import k3
from twig.core.types import Group
from twig.engine.update import NodeValues
from twig.runs.completions import texts_after
from twig.tasks.rewards import Rewards


@runtime_checkable
class Decodes(Protocol):
    """The part of a tokenizer that turns ids into text."""

    def decode(self, token_ids: Any, /) -> str:
        """Returns the text of token ids."""
        ...


@dataclass
class Batch:
    """What one step sampled. `scored` has one entry per group in which a completion has a reward.

    Completions to which every reward function answered None are in `groups` and not in those. `divisor` is
    what the weights were divided by. With several processes it is the same in all, except for `boundary`,
    which has the rows of the groups that were sampled here: those whose slots are in `own` (None: all).
    `answered` and `right` say of each completion whether an answer was found (None: the task cannot tell) and
    is right.
    """

    groups: list[Group]
    boundary: Tensor | None
    rewards: Rewards
    answered: np.ndarray | None
    right: np.ndarray
    scored: list[Scored] = field(default_factory=list)
    divisor: float = 1.0
    own: Sequence[int] | None = None

    @property
    def own_scored(self) -> list[Scored]:
        """The scored groups that were sampled here."""
        return [each for each in self.scored if self.own is None or each.slot in self.own]


@dataclass(frozen=True)
class Gaps:
    """How far apart log-probs of one process's weighted nodes are.

    `largest`: between recomputed and sampled; `kl`: the weighted sum of the KL to the base (nats),
    `kl_weight` the sum of its weights.
    """

    largest: float = 0.0
    kl: float = 0.0
    kl_weight: float = 0.0


def gaps(scored: Sequence[Scored], logps: NodeValues, ref: NodeValues | None) -> Gaps:
    """Returns the gaps of recomputed log-probs to those recorded while sampling, and to the base's."""
    largest, divergence, weight = 0.0, 0.0, 0.0
    for index, each in enumerate(scored):
        nodes = np.flatnonzero(each.credit.weighted)
        if not len(nodes):
            continue
        recomputed = logps.of_group(index)[nodes]
        recorded = np.concatenate([c.logps for c in each.group.completions])[each.trie.position(nodes)]
        largest = max(largest, float(np.abs(recomputed - recorded).max(initial=0.0)))
        if ref is not None:
            gap = k3(torch.from_numpy(recomputed), torch.from_numpy(ref.of_group(index)[nodes]))
            divergence += float((each.credit.kl[nodes] * gap.numpy()).sum())
            weight += float(each.credit.kl[nodes].sum())
    return Gaps(largest, divergence, weight)


def completion_rows(batch: Batch, tokenizer: Decodes) -> list[dict[str, Any]]:
    """Returns the step's completions as rows of the completions file, with the weight of each token's node.

    `weights` is `plus` + `minus`, all after division by `divisor`.
    """
    weights: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}  # plus and minus by slot and number
    for each in batch.scored:
        rewarded = np.flatnonzero(~np.isnan(batch.groups[each.slot].rewards)).tolist()
        for number, path in zip(rewarded, each.trie.paths, strict=True):
            weights[each.slot, number] = (each.credit.plus[path], each.credit.minus[path])
    rows = []
    for slot, group in enumerate(batch.groups):
        prompt, texts = tokenizer.decode(group.prompt_ids), texts_after(group.prompt_ids, tokenizer.decode)
        for number, completion in enumerate(group.completions):
            n, reward = len(rows), float(group.rewards[number])
            none = np.zeros(len(completion))
            plus, minus = weights.get((slot, number), (none, none))
            rows.append(
                {
                    "prompt_index": group.prompt_index,
                    "completion_index": number,
                    "prompt": prompt,
                    "completion": completion.text,
                    "prefix_length": group.prefix_length,
                    "token_ids": completion.ids.tolist(),
                    "tokens": texts(completion.ids.tolist()),
                    "logps": completion.logps.tolist(),
                    "entropies": completion.entropies.tolist(),
                    "weights": (plus + minus).tolist(),
                    "plus": plus.tolist(),
                    "minus": minus.tolist(),
                    "divisor": batch.divisor,
                    "finished": completion.finished,
                    "reward": None if np.isnan(reward) else reward,
                    "rewards": json.dumps({k: _number(v[n]) for k, v in batch.rewards.per_function.items()}),
                    "right": bool(batch.right[n]),
                }
            )
    return rows


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
