"""GTPO (Group Token Policy Optimization): rewards that are shared among tokens by their entropy."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from twig.core.algorithms.base import Algorithm, Credit, arxiv_entry, on_tokens
from twig.core.trie import PrefixTrie

EPSILON = 1e-6  # keeps the shares defined where every entropy is 0


class GtpoToken(Algorithm):
    """Every token gets the reward of its completion, shaped by its entropy and normalised. arXiv 2508.04349.

    At position t a right completion has r+ = alpha_1 + alpha_2 d H / (sum of H), the sum being over the d
    right completions that have a token there (eq. 3), and a wrong one r- = - alpha_1 - alpha_2 h (1 / H) /
    (sum of 1 / H), over the h wrong ones (eq. 5). A token of a right completion gets (r+ - mean) / std, of a
    wrong one (r- - mean) / std (eq. 6), over the tokens of the group (eq. 7). Mean and std are over all
    tokens of the group, r+ being 0 in wrong completions and r- in right ones: with alpha_2 = 0 this is GRPO's
    advantage. Groups that are all right or all wrong are left out, as in DAPO.
    """

    title: ClassVar = "GTPO (token)"
    summary: ClassVar = (
        "right completions are pushed up, more at the tokens where the model was unsure, and wrong ones "
        "down, more at the tokens where it was sure"
    )
    citation: ClassVar = arxiv_entry(
        "tan2025gtpo",
        "GTPO and GRPO-S: Token and Sequence-Level Reward Shaping with Policy Entropy",
        "Tan, Hongze and others",
        "2508.04349",
    )

    name: Literal["gtpo-token"] = "gtpo-token"
    alpha_1: float = Field(default=0.9, ge=0, description="Part of a reward that all tokens get alike.")
    alpha_2: float = Field(default=0.1, ge=0, description="Part of a reward that is shared by entropy.")
    right_above: float = Field(
        default=0.5, description="A completion counts as right if its reward is above this."
    )

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Returns the normalised shaped rewards, summed over completions, / the tokens of the group."""
        right = trie.rewards > self.right_above
        there = np.arange(trie.lengths.max()) < trie.lengths[:, None]  # [completions, positions]
        entropy = np.zeros(there.shape)
        entropy[there] = np.concatenate([trie.recorded_entropy[path] for path in trie.paths])
        entropy += EPSILON
        signal = np.zeros(there.shape)
        if right.any() and not right.all() and there.any():
            for sign, side, weight in ((1, right, entropy), (-1, ~right, 1 / entropy)):
                shaped = self.shaped(sign, there, side, weight)
                tokens = shaped[there]
                normalised = (shaped - tokens.mean()) / (tokens.std() + EPSILON)
                signal += np.where(there & side[:, None], normalised, 0.0)
        share = trie.num_completions / max(int(trie.lengths.sum()), 1)
        rows = [signal[i, : len(path)] for i, path in enumerate(trie.paths)]
        return on_tokens(trie, rows, [share] * trie.num_completions)

    def shaped(self, sign: int, there: np.ndarray, side: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Returns r+ or r- per completion and position: 0 for completions that are not of the side."""
        active = there & side[:, None]
        held = np.where(active, weight, 0.0)
        mean_weight = held.sum(0) / active.sum(0).clip(min=1)  # the sum of H over d, or of 1 / H over h
        ratio = np.divide(held, mean_weight, out=np.zeros(there.shape), where=active)
        return sign * np.where(active, self.alpha_1 + self.alpha_2 * ratio, 0.0)
