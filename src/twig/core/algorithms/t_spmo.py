"""T-SPMO: the tokens at which the completions of a group fork get credit."""

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from twig.core.algorithms.base import Algorithm, Credit, Load, Step, value_steps
from twig.core.replay import Replay
from twig.core.trie import PrefixTrie


class TSpmo(Algorithm):
    """Each unique node n gets (V(n) - V(parent(n))) / |U|, once, however often it is visited.

    T-SPMO, arXiv 2504.20834. |U| (ours, as the paper's own divisor is not known to us) counts the unique
    nodes of all groups of the step: every fork of a step is pushed alike, also in a group that restarts from
    inside a completion and so has few nodes. Nodes with the count of their parent get exactly 0: only forks
    have credit. The regulariser is the L2 norm of the adapter, so there are no KL weights. A node that only
    untrained completions pass gets nothing.
    """

    title: ClassVar = "T-SPMO"
    summary: ClassVar = (
        "a token gets credit where the completions of a prompt part: the mean reward of those that continue "
        "with it, less that of those that came so far"
    )
    in_credit_map: ClassVar = True

    name: Literal["t-spmo"] = "t-spmo"
    normalise: Literal["step", "branches", "group"] = Field(
        default="step",
        description="Divide by the unique nodes of all groups of the step, by those of them with credit only "
        "(`branches`), or each group by its own unique nodes and the step by its prompts (`group`).",
    )

    @field_validator("normalise", mode="before")
    @classmethod
    def _has_its_name(cls, value: Any) -> Any:
        return "group" if value == "unique" else value  # its name in runs of earlier commits

    l2: float = Field(
        default=0.0, ge=0, description="Lambda, the weight of the adapter's squared L2 norm (decoupled)."
    )
    replay: Replay = Field(default_factory=Replay, description="Groups restarted from inside a completion.")

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Returns the step in value at each node, divided by the nodes of the group under `group`."""
        weight = value_steps(trie)
        if self.normalise == "group":
            weight /= max(len(trie) - 1, 1)
        passed = np.zeros(len(trie), bool)
        for path, train in zip(trie.paths, trie.trained, strict=True):
            passed[path] |= train
        weight[~passed] = 0
        return Credit.signed(weight)

    def step_divisor(self, step: Step) -> float:
        """Returns the nodes that are counted over all groups, or the number of prompts under `group`."""
        if self.normalise == "group":
            return step.num_prompts
        if self.normalise == "step":
            return max(step.num_nodes, 1)
        return max(sum(int(np.count_nonzero(value_steps(trie))) for trie in step.tries), 1)

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
