"""S-GRPO: a sample of a completion's tokens gets the completion's advantage."""

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from twig.common.errors import UserError, as_validator
from twig.core.algorithms.base import Credit, KlTerm, Load, ScaledRewards, on_tokens
from twig.core.trie import PrefixTrie


class SGrpo(ScaledRewards, KlTerm):
    """The tokens T_i of completion i get A_i / (G |T_i|), the others nothing. S-GRPO, arXiv 2504.20834.

    T_i holds every position t < alpha and, after those, each position with probability p, left to right,
    until it holds k. With `unbiased` (the form of arXiv 2603.06619), m of the later positions are drawn
    without replacement and their weight A_i / (G |o_i|) is multiplied by (|o_i| - alpha) / m, so that the
    expected weights are those of GRPO.
    """

    title: ClassVar = "S-GRPO"
    summary: ClassVar = (
        "a completion's reward, relative to those of its prompt, goes to a sample of its tokens"
    )
    in_credit_map: ClassVar = True

    name: Literal["s-grpo"] = "s-grpo"
    alpha: int = Field(default=50, ge=0, description="The first alpha tokens are always trained.")
    p: float = Field(default=0.3, ge=0, le=1, description="Chance that a later token is trained.")
    k: int = Field(default=100, ge=1, description="Most tokens trained per completion.")
    unbiased: bool = Field(
        default=False, description="Draw the later tokens so that the expected gradient is that of GRPO."
    )

    @model_validator(mode="after")
    @as_validator
    def _draws_something(self) -> Self:
        if self.unbiased and self.k <= self.alpha:
            raise UserError(
                "algorithm.k",
                f"{self.k} is not above algorithm.alpha={self.alpha}, as algorithm.unbiased needs",
                f"Set algorithm.k={self.alpha + 50} or a smaller algorithm.alpha",
            )
        return self

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Returns A_i / |T_i| at the chosen tokens, summed over completions, / G."""
        draws = rng.random((trie.num_completions, int(trie.lengths.max(initial=0))))
        choose = self._choose_unbiased if self.unbiased else self._choose
        pairs = [choose(len(path), draw[: len(path)]) for path, draw in zip(trie.paths, draws, strict=True)]
        chosen, share = [keep for keep, _ in pairs], [share for _, share in pairs]
        return on_tokens(trie, self.advantages(trie), share, chosen, kl=self.beta != 0)

    def _choose(self, length: int, draw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns which tokens of a completion are trained, and the share of each token."""
        keep = draw < self.p
        keep[: self.alpha] = True
        keep &= np.cumsum(keep) <= max(self.k, self.alpha)
        return keep, np.full(length, 1 / max(int(keep.sum()), 1))

    def _choose_unbiased(self, length: int, draw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        later, keep, factor = length - self.alpha, np.ones(length, bool), np.ones(length)
        if later > 0:
            m = min(self.k - self.alpha, max(1, int(np.floor(self.p * later + 0.5))))
            keep[self.alpha :] = False
            keep[self.alpha + np.argsort(draw[self.alpha :], kind="stable")[:m]] = True
            factor[self.alpha :] = later / m
        return keep, factor / max(length, 1)

    def load(self, num_generations: int, length: int) -> Load:
        """Returns a load of at most k weighted tokens per completion."""
        return Load(num_generations, tokens_per_path=self.k)

    def describe(self) -> str:
        """Returns how the trained tokens are chosen."""
        late = "drawn without bias" if self.unbiased else f"each with p={self.p:g}"
        return f"the first alpha={self.alpha} tokens, later ones {late}, up to k={self.k}"
