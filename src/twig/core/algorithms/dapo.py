"""DAPO's loss: every token of the step counts the same, and the ratio may rise further than it may fall."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from twig.core.algorithms.base import (
    Credit,
    KlTerm,
    ScaledRewards,
    Step,
    TopEntropy,
    arxiv_entry,
    on_tokens,
)
from twig.core.trie import PrefixTrie


class Dapo(TopEntropy, ScaledRewards, KlTerm):
    """Every token of completion i gets A_i / (all trained tokens of the step). DAPO, arXiv 2503.14476, eq. 8.

    As TRL's `loss_type="dapo"`. The paper's other parts are the task's: it samples again until no group has
    equal rewards (here such groups have weight 0 and stay in the token count, as in TRL) and shapes the
    reward of long answers.
    """

    title: ClassVar = "DAPO"
    summary: ClassVar = (
        "a completion's reward, relative to those of its prompt, goes to all of its tokens, and every token "
        "of a step counts the same"
    )
    citation: ClassVar = arxiv_entry(
        "yu2025dapo",
        "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
        "Yu, Qiying and others",
        "2503.14476",
    )
    # bnpo: if its micro-batch is the whole step
    trl_losses: ClassVar = (("dapo", "token"), ("bnpo", "token"))

    name: Literal["dapo"] = "dapo"
    epsilon_high: float | None = Field(
        default=0.28, ge=0, description="The ratio is clipped above at 1 + epsilon_high. null: epsilon."
    )

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Returns A_i at each token, summed over completions."""
        share = [float(trie.num_completions)] * trie.num_completions
        return on_tokens(trie, self.advantages(trie), share, kl=self.beta != 0)

    def step_divisor(self, step: Step) -> float:
        """Returns the trained tokens of the step, in place of its prompts."""
        return max(step.num_tokens, 1)
