"""T-SPMO: the tokens at which the completions of a group fork get credit."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from twig.core.algorithms.base import Algorithm, Credit, Load, Step, value_steps
from twig.core.replay import Replay
from twig.core.trie import PrefixTrie


class TSpmo(Algorithm):
    """Each unique node n gets (V(n) - V(parent(n))) / |U|, once, however often it is visited.

    T-SPMO, arXiv 2504.20834. U is the set of unique nodes of the group, or, with `normalise: branches`
    (ours), of those with non-zero credit; with `normalise: step` (ours) it is that of all groups of the step.
    Nodes with the count of their parent get exactly 0: only forks have credit. The regulariser is the L2 norm
    of the adapter, so there are no KL weights. A node that only untrained completions pass gets nothing.
    """

    title: ClassVar = "T-SPMO"
    summary: ClassVar = (
        "a token gets credit where the completions of a prompt part: the mean reward of those that continue "
        "with it, less that of those that came so far"
    )
    in_credit_map: ClassVar = True

    name: Literal["t-spmo"] = "t-spmo"
    normalise: Literal["unique", "branches", "step"] = Field(
        default="unique",
        description="Divide by all unique nodes of a group, by those with credit only, or (`step`) by the "
        "unique nodes of all groups of the step.",
    )
    l2: float = Field(
        default=0.0, ge=0, description="Lambda, the weight of the adapter's squared L2 norm (decoupled)."
    )
    replay: Replay = Field(default_factory=Replay, description="Groups restarted from inside a completion.")

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Returns the step in value at each node, divided by |U| if U is that of the group."""
        weight = value_steps(trie)
        if self.normalise != "step":
            weight /= max(len(trie) - 1 if self.normalise == "unique" else np.count_nonzero(weight), 1)
        passed = np.zeros(len(trie), bool)
        for path, train in zip(trie.paths, trie.trained, strict=True):
            passed[path] |= train
        weight[~passed] = 0
        return Credit.signed(weight)

    def step_divisor(self, step: Step) -> float:
        """Returns the unique nodes of all groups under `normalise: step`, else the number of prompts."""
        return max(step.num_nodes, 1) if self.normalise == "step" else step.num_prompts

    @property
    def l2_weight(self) -> float:
        """The setting `l2`."""
        return self.l2

    @property
    def restarts(self) -> Replay:
        """The setting `replay`."""
        return self.replay

    def load(self, num_generations: int, length: int) -> Load:
        """Returns a load of weights at forks only.

        At most half of the completions need running to their end: two that share all but their last token.
        """
        return Load(num_generations // 2, forks_only=True)
