"""What one step sampled: groups with their rewards, tries and credits; its gaps, and its rows in a file.

Knows nothing of sampling or of optimizers.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twig.core.algorithms.base import Credit
from twig.core.objective import k3
from twig.core.trie import PrefixTrie
from twig.core.types import Group
from twig.engine.update import NodeValues
from twig.runs.completions import texts_after
from twig.tasks.rewards import Rewards


@dataclass
class Batch:
    """What one step sampled. `tries`, `credits` and `rewarded` have one entry per group with any reward:
    completions to which every reward function answered None are in `groups` and not in those.

    With several processes it is the same in all, but for `boundary`, which has the rows of the groups that
    were sampled here: those `groups` whose slots are in `own` (None: all).
    """

    groups: list[Group]
    boundary: Tensor | None
    rewards: Rewards
    found: np.ndarray | None
    right: np.ndarray
    rewarded: list[Group] = field(default_factory=list)
    tries: list[PrefixTrie] = field(default_factory=list)
    credits: list[Credit] = field(default_factory=list)
    own: range | None = None
    slots: list[int] = field(default_factory=list)  # which of the groups the rewarded ones are

    def own_parts(self) -> tuple[list[Group], list[PrefixTrie], list[Credit]]:
        """The rewarded groups that were sampled here, with their tries and credits."""
        mine = [i for i, slot in enumerate(self.slots) if self.own is None or slot in self.own]
        return tuple([part[i] for i in mine] for part in (self.rewarded, self.tries, self.credits))


def gaps(
    groups: list[Group],
    tries: list[PrefixTrie],
    credits: list[Credit],
    logps: NodeValues,
    ref: NodeValues | None,
) -> tuple[float, float, float]:
    """How far recomputed log-probs are from those recorded while sampling; the weighted sum of the KL to the
    base (nats), and of its weights."""
    largest, divergence, weight = 0.0, 0.0, 0.0
    for index, (trie, group, credit) in enumerate(zip(tries, groups, credits, strict=True)):
        nodes = np.flatnonzero(credit.weighted)
        if not len(nodes):
            continue
        recomputed = logps.of_trie(index)
        recorded = np.concatenate([c.logps for c in group.completions])[trie.position(nodes)]
        largest = max(largest, float(np.abs(recomputed[nodes] - recorded).max(initial=0.0)))
        if ref is not None:
            gap = k3(torch.from_numpy(recomputed[nodes]), torch.from_numpy(ref.of_trie(index)[nodes]))
            divergence += float((credit.kl[nodes] * gap.numpy()).sum())
            weight += float(credit.kl[nodes].sum())
    return largest, divergence, weight


def completion_rows(batch: Batch, tokenizer: Any) -> list[dict[str, Any]]:
    """The step's completions as rows of the completions file, with the weight that each token's node got."""
    weights = {}
    for group, trie, credit in zip(batch.rewarded, batch.tries, batch.credits, strict=True):
        for completion, path in zip(group.completions, trie.paths, strict=True):
            weights[id(completion)] = (credit.plus + credit.minus)[path]
    rows, n = [], 0
    for group in batch.groups:
        prompt, texts = tokenizer.decode(group.prompt_ids), texts_after(group.prompt_ids, tokenizer.decode)
        for number, completion in enumerate(group.completions):
            reward = float(group.rewards[number])
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
                    "weights": weights.get(id(completion), np.zeros(len(completion))).tolist(),
                    "finished": completion.finished,
                    "reward": None if np.isnan(reward) else reward,
                    "rewards": json.dumps({k: _number(v[n]) for k, v in batch.rewards.per_function.items()}),
                    "right": bool(batch.right[n]),
                }
            )
            n += 1
    return rows


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
