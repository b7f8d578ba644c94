"""What one step sampled: groups with their rewards, tries and credit; its gaps, and its rows in a file.

Knows nothing of sampling or of optimizers.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from twig.core.credit import Scored
from twig.core.objective import k3
from twig.core.trie import without_rounding
from twig.core.types import Example, Group
from twig.engine.update import NodeValues
from twig.runs.completions import texts_after
from twig.tasks.base import right_answer
from twig.tasks.rewards import Rewards, joined


@runtime_checkable
class Decodes(Protocol):
    """The part of a tokenizer that turns ids into text."""

    def decode(self, token_ids: Any, /) -> str:
        """Returns the text of token ids."""
        ...


@dataclass(frozen=True)
class Outcomes:
    """Groups, and of each of their completions, in order, the rewards, `answered` and `right`.

    `answered` and `right` say whether an answer was found (None: the task cannot tell) and is right, `graded`
    that the rewards are more than right or wrong (`tasks.rewards.is_graded`).
    """

    groups: list[Group]
    rewards: Rewards
    answered: np.ndarray | None
    right: np.ndarray
    graded: bool = False

    @property
    def without_signal(self) -> list[int]:
        """The places of the groups whose rewards are all equal, or all missing."""
        rewards = [without_rounding(group.rewards[~np.isnan(group.rewards)]) for group in self.groups]
        return [place for place, each in enumerate(rewards) if len(np.unique(each)) <= 1]

    def at(self, places: Sequence[int]) -> "Outcomes":
        """Returns the groups at `places`; what functions logged per call stays whole."""
        size = len(self.right) // len(self.groups)
        numbers = np.concatenate([place * size + np.arange(size) for place in places])
        answered = None if self.answered is None else self.answered[numbers]
        groups = [self.groups[place] for place in places]
        return Outcomes(groups, self.rewards.at(numbers), answered, self.right[numbers], self.graded)

    @classmethod
    def joined(cls, parts: "Sequence[Outcomes]") -> "Outcomes":
        """Returns the groups of all parts, in their order."""
        answered = [part.answered for part in parts if part.answered is not None]
        return cls(
            [group for part in parts for group in part.groups],
            joined([part.rewards for part in parts]),
            np.concatenate(answered) if answered else None,
            np.concatenate([part.right for part in parts]),
            any(part.graded for part in parts),
        )


@dataclass
class Batch:
    """What one step trains on. `scored` has one entry per group in which a completion has a reward.

    Completions to which every reward function answered None are in `kept` and not in those. `divisor` is what
    the weights were divided by. With several processes it is the same in all, except for `boundary`, which
    has the rows of the groups that were sampled here: those whose slots are in `own` (None: all).
    `redrawn` are the groups that others took the place of.
    """

    kept: Outcomes
    boundary: Tensor | None
    scored: list[Scored] = field(default_factory=list)
    divisor: float = 1.0
    own: Sequence[int] | None = None
    redrawn: list[Outcomes] = field(default_factory=list)

    @property
    def groups(self) -> list[Group]:
        """The groups that the step trains on."""
        return self.kept.groups

    @property
    def sampled(self) -> Outcomes:
        """All that the step sampled, redrawn groups included."""
        return Outcomes.joined([self.kept, *self.redrawn]) if self.redrawn else self.kept

    @property
    def own_scored(self) -> list[Scored]:
        """The scored groups that were sampled here."""
        return [each for each in self.scored if self.own is None or each.slot in self.own]

    def without(self, places: Sequence[int]) -> "Batch":
        """Returns the batch with the groups at `places` redrawn: others are to take their place.

        What was recorded of them is let go.
        """
        staying = [place for place in range(len(self.groups)) if place not in places]
        own = [place for place in staying if self.own is None or place in self.own]
        groups, boundary = _recorded([self.groups[place] for place in own], self.boundary)
        moved = dict(zip(own, groups, strict=True))
        kept = replace(self.kept, groups=[moved.get(n, group) for n, group in enumerate(self.groups)])
        return replace(self, kept=kept, boundary=boundary, own=own, redrawn=[*self.redrawn, kept.at(places)])

    def with_groups(self, places: Sequence[int], fresh: "Batch") -> "Batch":
        """Returns the batch with the groups of `fresh` at `places`."""
        size = len(self.groups)
        order = [size + places.index(place) if place in places else place for place in range(size)]
        own = [places[n] for n in (range(len(places)) if fresh.own is None else fresh.own)]
        rows = 0 if self.boundary is None else len(self.boundary)
        groups = [_moved(group, rows) for group in fresh.groups]
        kept = Outcomes.joined([self.kept, replace(fresh.kept, groups=groups)]).at(order)
        tables = [each.boundary for each in (self, fresh) if each.boundary is not None]
        boundary = torch.cat(tables) if tables else None
        assert self.own is not None, "groups were let go"
        return replace(self, kept=kept, boundary=boundary, own=sorted([*self.own, *own]))


def _recorded(groups: Sequence[Group], boundary: Tensor | None) -> tuple[list[Group], Tensor | None]:
    """Returns the groups with a boundary that has their rows only."""
    if boundary is None:
        return list(groups), None
    moved, cells = [], [np.empty(0, np.int64)]
    for group in groups:
        first = sum(len(each) for each in cells)
        own = [group.prompt_cells, *(c.cells for c in group.completions)]
        ends = first + np.cumsum([len(each) for each in own])
        places = [np.arange(end - len(each), end) for each, end in zip(own, ends, strict=True)]
        completions = [replace(c, cells=at) for c, at in zip(group.completions, places[1:], strict=True)]
        moved.append(replace(group, prompt_cells=places[0], completions=completions))
        cells += own
    return moved, boundary[torch.from_numpy(np.concatenate(cells)).to(boundary.device)]


def _moved(group: Group, rows: int) -> Group:
    """Returns the group for a boundary with so many more rows in front."""
    completions = [replace(c, cells=c.cells + rows) for c in group.completions]
    return replace(group, prompt_cells=group.prompt_cells + rows, completions=completions)


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


def completion_rows(
    batch: Batch, tokenizer: Decodes, examples: Sequence[Example] = ()
) -> list[dict[str, Any]]:
    """Returns the step's completions as rows of the completions file, with the weight of each token's node.

    `examples` are the problems to train on: `answer` is that column's text or number, None without one.
    `weights` is `plus` + `minus`, all after division by `divisor`; `extra` has what functions passed to
    `log_extra`.
    """
    weights: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}  # plus and minus by slot and number
    for each in batch.scored:
        rewarded = np.flatnonzero(~np.isnan(batch.groups[each.slot].rewards)).tolist()
        for number, path in zip(rewarded, each.trie.paths, strict=True):
            weights[each.slot, number] = (each.credit.plus[path], each.credit.minus[path])
    rows, per_function, extra = [], batch.kept.rewards.per_function, batch.kept.rewards.extra
    for slot, group in enumerate(batch.groups):
        answer = right_answer(examples[group.prompt_index]) if len(examples) else None
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
                    "answer": answer,
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
                    "rewards": json.dumps({k: _number(v[n]) for k, v in per_function.items()}),
                    "extra": json.dumps({k: v[n] for k, v in extra.items()}),
                    "right": bool(batch.kept.right[n]),
                }
            )
    return rows


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
