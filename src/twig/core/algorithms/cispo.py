"""CISPO: the ratio is a clipped weight without a gradient, so that no token loses its own."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from twig.common.errors import UserError
from twig.core.algorithms.base import Credit, ScaledRewards, Step, arxiv_entry, on_tokens
from twig.core.trie import PrefixTrie


class Cispo(ScaledRewards):
    """Every token of completion i gets A_i min(r, 1 + epsilon_high) log pi / (trained tokens of the step).

    The ratio r is a number here, without a gradient. CISPO, arXiv 2506.13585, eq. 4 and 5; TRL's
    `loss_type="cispo"`, whose `epsilon_high` is our 1 + epsilon_high.
    """

    title: ClassVar = "CISPO"
    summary: ClassVar = (
        "a completion's reward, relative to those of its prompt, goes to all of its tokens, each weighted "
        "by its clipped ratio"
    )
    citation: ClassVar = arxiv_entry(
        "minimax2025m1",
        "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
        "{MiniMax} and others",
        "2506.13585",
    )
    objective_kind: ClassVar = "clipped weight"
    trl_losses: ClassVar = (("cispo", "token"),)

    name: Literal["cispo"] = "cispo"
    epsilon_high: float | None = Field(
        default=4.0, ge=0, description="The weight is clipped above at 1 + epsilon_high. null: epsilon."
    )

    @classmethod
    def of_trl(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the settings; TRL's bound is of the weight itself, not of its distance from 1."""
        bound = values["epsilon"] if values["epsilon_high"] is None else values["epsilon_high"]
        if bound < 1:
            problem = f"CISPO's weight would be {bound:g} for every token: set epsilon_high=5.0"
            raise UserError("epsilon_high", problem, "Set epsilon_high=5.0")
        return super().of_trl(values) | {"epsilon_high": bound - 1}

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Returns A_i at each token, summed over completions."""
        return on_tokens(trie, self.advantages(trie), [float(trie.num_completions)] * trie.num_completions)

    def step_divisor(self, step: Step) -> float:
        """Returns the trained tokens of the step, in place of its prompts."""
        return max(step.num_tokens, 1)
