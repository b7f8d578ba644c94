"""Credit maps: groups of saved completions as tries, with the credit that each algorithm gives them.

Reads `completions/step-N.parquet` and builds the tries again. The run's own algorithm shows the very weights
that were trained, which are in the file; the others are computed with the same random numbers. No code of the
user's is run. No torch.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from twig.config.load import Settings
from twig.core.algorithms.base import Algorithm, Credit
from twig.core.algorithms.registry import Unloaded, shipped
from twig.core.credit import Lazy, StepCredit
from twig.core.rng import CREDIT, generator
from twig.core.trie import PrefixTrie
from twig.runs.reader import COMPLETIONS

SHOWN = 16  # completions of a group, at most
_COLUMNS = ("prompt_index", "completion_index", "prompt", "prefix_length", "token_ids", "tokens", "finished")
_COLUMNS += ("reward", "right", "entropies", "plus", "minus")


@dataclass(frozen=True)
class SavedGroup:
    """A group as its step saved it.

    `slot` is its place among the groups of the step; `rows` are those of its completions that have a reward.
    `step_credit` is that of each algorithm that a map compares, by name, and `place` the group's in it.
    """

    step: int
    slot: int
    rows: list[dict[str, Any]]
    mask_truncated: bool
    step_credit: dict[str, StepCredit] = field(default_factory=dict)
    place: int = 0

    @property
    def rewards(self) -> np.ndarray:
        return np.array([row["reward"] for row in self.rows], np.float64)

    @cached_property
    def trie(self) -> PrefixTrie:
        """The trie of the completions that have a reward."""
        ids = [row["token_ids"] for row in self.rows]
        entropies = [np.array(row.get("entropies") or np.zeros(len(row["token_ids"]))) for row in self.rows]
        finished = np.array([row["finished"] for row in self.rows], bool)
        return PrefixTrie.build(ids, self.rewards, entropies, finished if self.mask_truncated else None)

    def saved_credit(self) -> Credit | None:
        """Returns the policy weights that were trained, None if an older file has only their sums.

        KL weights are not saved; a map does not show them.
        """
        if any(row.get("plus") is None for row in self.rows):
            return None
        plus, minus = np.zeros(len(self.trie)), np.zeros(len(self.trie))
        for row, path in zip(self.rows, self.trie.paths, strict=True):
            plus[path], minus[path] = row["plus"], row["minus"]
        return Credit(plus, minus, np.zeros(len(plus)))

    def credit(self, settings: Settings) -> dict[str, Credit]:
        """Returns the credit by algorithm: as it was trained, and as the others would give it."""
        saved = self.saved_credit()
        return {
            name: saved
            if name == settings.algorithm.name and saved
            else self.step_credit[name].of(self.place)
            for name in compared(settings)
            if name in self.step_credit or (saved and name == settings.algorithm.name)
        }


def saved_steps(folder: Path) -> dict[int, Path]:
    """Returns step to file, for the steps of a run folder whose completions were saved, in order."""
    files = {}
    for path in (folder / COMPLETIONS).glob("step-*.parquet"):
        number = path.stem.removeprefix("step-")
        if number.isdigit():
            files[int(number)] = path
    return dict(sorted(files.items()))


def read_groups(step: int, path: Path, settings: Settings) -> list[SavedGroup]:
    """Returns the groups of a step's file in which a completion has a reward, the most instructive first.

    Those are the groups that are split most evenly into high and low rewards. `settings` are the run's.
    """
    from pyarrow import parquet

    have = set(parquet.read_schema(path).names)
    slots: list[list[dict[str, Any]]] = []
    for row in parquet.read_table(path, columns=[name for name in _COLUMNS if name in have]).to_pylist():
        if row["completion_index"] == 0 or not slots:
            slots.append([])
        slots[-1].append(row)
    mask = settings.algorithm.mask_truncated_completions
    groups = [
        SavedGroup(step, slot, rewarded, mask)
        for slot, rows in enumerate(slots)
        if (rewarded := [row for row in rows if row["reward"] is not None])
    ]
    credits = _step_credits(groups, settings, len(slots))
    groups = [replace(group, step_credit=credits, place=place) for place, group in enumerate(groups)]
    return sorted(groups, key=lambda group: -float(group.rewards.var()))


def _step_credits(groups: list[SavedGroup], settings: Settings, num_prompts: int) -> dict[str, StepCredit]:
    """Returns the credit of the step by algorithm, without those whose class is in a file of the user's."""
    tries = Lazy(len(groups), lambda place: groups[place].trie)
    rngs = [generator(settings.train.seed, CREDIT, group.slot, group.step) for group in groups]
    return {
        name: StepCredit(algorithm, tries, rngs, num_prompts)
        for name, algorithm in compared(settings).items()
        if not isinstance(algorithm, Unloaded)
    }


def compared(settings: Settings) -> dict[str, Algorithm]:
    """Returns the algorithms of a map by name: the run's own as it was set, the others with their defaults.

    What the run's algorithm and another one both have, and what decides which completions count, is as it was
    set.
    """
    own = settings.algorithm
    algorithms: dict[str, Algorithm] = {}
    for name, kind in shipped().items():
        if name == own.name:
            algorithms[name] = own
        elif kind.in_credit_map:
            shared = [key for key in _SHARED if key in kind.model_fields and hasattr(own, key)]
            algorithms[name] = kind.model_validate({key: getattr(own, key) for key in shared})
    return {**algorithms, own.name: own}


_SHARED = ("mask_truncated_completions", "scale_rewards")


class Strings:
    """A list of different texts, and the place of each in it."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def place(self, text: str) -> int:
        return self.places.setdefault(text, len(self.places))

    @property
    def texts(self) -> list[str]:
        return list(self.places)


def group_map(group: SavedGroup, settings: Settings, strings: Strings) -> dict[str, Any]:
    """A group as the page draws it: plain values only.

    `segments`, depth first: [parent segment or -1, depth of its first token, completions through it, their
    mean reward, token texts (places in `strings`), completions that end with it]. A segment is a stretch of
    tokens without a fork. `credit` has, by algorithm, `pairs` of (plus, minus) and per segment `runs`: how
    many tokens and which pair, in turns. Counts, values and credit are those of the whole group, also if
    it has more than SHOWN completions and only some of them are drawn.
    """
    trie = group.trie
    shown = _shown(trie, [row["right"] for row in group.rows])
    segments = _segments(trie, shown)
    texts = _node_texts(trie, group.rows, shown)
    parents = {int(nodes[-1]): number for number, nodes in enumerate(segments)}
    ends: dict[int, list[int]] = {}
    for number, row in enumerate(shown):
        ends.setdefault(int(trie.paths[row][-1]) if len(trie.paths[row]) else 0, []).append(number)
    credit = {name: _runs(each, segments) for name, each in group.credit(settings).items()}
    first = group.rows[0]
    return {
        "step": group.step,
        "problem": first["prompt_index"],
        "prompt": first["prompt"],
        "prefix": first["prefix_length"],
        "size": len(group.rows),
        "sampled": int(trie.lengths.sum()),
        "distinct": len(trie) - 1,
        "mean": float(trie.value[0]),
        "num_right": sum(row["right"] for row in group.rows),
        "completions": [
            [group.rows[i]["reward"], group.rows[i]["right"], group.rows[i]["finished"], len(trie.paths[i])]
            for i in shown
        ],
        "segments": [
            [
                parents.get(int(trie.parent[nodes[0]]), -1),
                int(trie.depth[nodes[0]]),
                int(trie.count[nodes[0]]),
                float(trie.value[nodes[0]]),
                [strings.place(texts[node]) for node in nodes.tolist()],
                ends.get(int(nodes[-1]), []),
            ]
            for nodes in segments
        ],
        "credit": credit,
    }


def _shown(trie: PrefixTrie, right: list[bool]) -> list[int]:
    # Which completions are drawn, in the order of the trie: of many, right and wrong ones in their shares.
    order = sorted(range(trie.num_completions), key=lambda i: trie.paths[i].tolist())
    if len(order) <= SHOWN:
        return order
    parts = [[i for i in order if right[i] == kind] for kind in (True, False)]
    most = round(SHOWN * len(parts[0]) / len(order))
    most = min(max(most, min(1, len(parts[0]))), SHOWN - min(1, len(parts[1])))
    chosen = set()
    for part, number in zip(parts, (most, SHOWN - most), strict=True):
        places = np.linspace(0, len(part) - 1, min(number, len(part))).round().astype(int)
        chosen |= {part[place] for place in places}
    return [i for i in order if i in chosen]


def _segments(trie: PrefixTrie, shown: list[int]) -> list[np.ndarray]:
    # The nodes of the drawn completions in stretches: a node belongs to its parent's if all continue there.
    nodes = np.unique(np.concatenate([trie.paths[i] for i in shown]))
    if not len(nodes):
        return []
    parent = trie.parent[nodes]
    goes_on = (parent == nodes - 1) & (parent != 0) & (trie.count[nodes] == trie.count[parent])
    return np.split(nodes, np.flatnonzero(~goes_on)[1:])


def _node_texts(trie: PrefixTrie, rows: list[dict[str, Any]], shown: list[int]) -> dict[int, str]:
    # Without texts (files of other programs) a token is its number.
    texts: dict[int, str] = {}
    for i in shown:
        tokens = rows[i].get("tokens") or [f"[{number}]" for number in rows[i]["token_ids"]]
        texts.update(zip(trie.paths[i].tolist(), tokens, strict=True))
    return texts


def _runs(credit: Credit, segments: list[np.ndarray]) -> dict[str, Any]:
    pairs: dict[tuple[float, float], int] = {(0.0, 0.0): 0}
    runs = []
    for nodes in segments:
        run: list[int] = []
        for plus, minus in zip(credit.plus[nodes].tolist(), credit.minus[nodes].tolist(), strict=True):
            pair = pairs.setdefault((plus, minus), len(pairs))
            if run and run[-1] == pair:
                run[-2] += 1
            else:
                run += [1, pair]
        runs.append(run)
    trained = int(((credit.plus != 0) | (credit.minus != 0)).sum())
    return {"trained": trained, "pairs": [list(pair) for pair in pairs], "runs": runs}


# ---- which groups -----------------------------------------------------------------------------------------


def choose(runs: Sequence[tuple[Path, Settings]], strings: Strings, budget: int) -> list[dict[str, Any]]:
    """Group maps of the runs (`run` is the place of the run in the list) that take up to `budget` bytes.

    The most instructive group of every saved step comes before the second of any; steps are taken from
    coarse to fine, so that what has room is spread over the run.
    """
    chosen, size, num_texts = [], 0, 0
    for number, group in _by_worth(runs):
        drawn = {"run": number, **group_map(group, runs[number][1], strings)}
        size += len(json.dumps(drawn, separators=(",", ":")))
        size += sum(len(json.dumps(text)) + 1 for text in strings.texts[num_texts:])
        num_texts = len(strings.places)
        if size > budget and chosen:
            break
        chosen.append(drawn)
    return sorted(chosen, key=lambda each: (each["run"], each["step"]))


def _by_worth(runs: Sequence[tuple[Path, Settings]]) -> Iterator[tuple[int, SavedGroup]]:
    files = [saved_steps(folder) for folder, _ in runs]
    orders = [_coarse_to_fine(list(steps)) for steps in files]
    groups: dict[tuple[int, int], list[SavedGroup]] = {}
    rank, left = 0, True
    while left:
        left = False
        for place in range(max(map(len, orders), default=0)):
            for number, order in enumerate(orders):
                if place < len(order):
                    key = number, order[place]
                    if key not in groups:
                        path = files[number][order[place]]
                        groups[key] = read_groups(order[place], path, runs[number][1])
                    if rank < len(groups[key]):
                        left = True
                        yield number, groups[key][rank]
        rank += 1


def _coarse_to_fine(steps: list[int]) -> list[int]:
    """The steps in an order whose every beginning is spread over them all.

    >>> _coarse_to_fine([1, 2, 3, 4, 5])
    [1, 5, 3, 2, 4]
    """
    order = dict.fromkeys(steps[:1] + steps[-1:])
    gap = 1.0
    while len(order) < len(steps):
        gap /= 2
        places = np.arange(gap, 1, gap) * (len(steps) - 1)
        order |= dict.fromkeys(steps[round(float(place))] for place in places)
    return list(order)
