"""What one step sampled: groups with their rewards, tries and credits; and how far log-probs have moved.

Knows nothing of sampling or of optimizers.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from twig.credit import Credit
from twig.objective import k3
from twig.passes import NodeValues
from twig.records import Group
from twig.tasks.rewards import Rewards
from twig.trie import PrefixTrie


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
