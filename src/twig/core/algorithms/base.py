"""What every algorithm shares: `Credit`, advantages, and summing up weights per token on nodes.

An algorithm is a pure function of a trie (and a random generator), one file each in this folder. Its weights
say how much each token of the group is pushed up (`plus`), pushed down (`minus`) and held to the base model
(`kl`); everything else follows from them.

Notation: R_i the reward of completion i, |o_i| its tokens, G the completions of the group, V(n) the mean
reward of the completions through node n. Weights are per group; the caller divides by the prompts in the
optimizer step.

Lee & Tong, "Token-Efficient RL for LLM Reasoning", arXiv 2504.20834, fixes the rules of S-GRPO and T-SPMO.
The options marked "ours" are not in the paper. Their neighbours are weights on tokens too. Numpy only; knows
nothing of models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from twig.config.schema import Algorithm
from twig.core.trie import PrefixTrie


@dataclass(frozen=True)
class Credit:
    """Weights on the nodes of one trie, one entry per node, 0 at the root.

    `plus` sums the positive weights that the completions add to a node and `minus` the negative ones: under
    clipping their sum alone is not enough. `kl` weighs the node's KL term.
    """

    plus: np.ndarray
    minus: np.ndarray
    kl: np.ndarray

    @property
    def weighted(self) -> np.ndarray:
        """True at the nodes where any weight is non-zero; only these are needed for the update."""
        return (self.plus != 0) | (self.minus != 0) | (self.kl != 0)

    def divided_by(self, number: float) -> "Credit":
        return Credit(self.plus / number, self.minus / number, self.kl / number)


Rule = Callable[[PrefixTrie, Algorithm, np.random.Generator, np.ndarray], Credit]


def advantages(rewards: np.ndarray, scale_rewards: str) -> np.ndarray:
    """A_i = (R_i - mean) / (std + 1e-4), std with ddof 1; `scale_rewards: none` leaves the division out.

    Exactly 0 where all rewards are equal: the std of three times 0.1 is not 0 in floating point.

    >>> advantages(np.array([0.1, 0.1, 0.1]), "group").tolist()
    [0.0, 0.0, 0.0]
    >>> advantages(np.array([1.0, 0.0]), "none").tolist()
    [0.5, -0.5]
    """
    if rewards.min() == rewards.max():
        return np.zeros(len(rewards))
    return (rewards - rewards.mean()) / reward_deviation(rewards, scale_rewards)


def reward_deviation(rewards: np.ndarray, scale_rewards: str) -> float:
    return 1.0 if scale_rewards == "none" or len(rewards) == 1 else float(rewards.std(ddof=1)) + 1e-4


def on_tokens(
    trie: PrefixTrie,
    options: Algorithm,
    trained: np.ndarray,
    advantage: np.ndarray | list[np.ndarray],
    scale: list[float] | list[np.ndarray],
    chosen: list[np.ndarray] | None = None,
) -> Credit:
    """Sums over completions A_i * scale_i / G at their chosen tokens (None: all); scale_i / G as KL weight.

    A_i and scale_i are one number for the whole completion, or one for each of its tokens.
    """
    chosen = chosen or [np.ones(len(path), bool) for path in trie.paths]
    nodes = np.concatenate([path[keep] for path, keep in zip(trie.paths, chosen, strict=True)])

    def at_chosen(values: Sequence[float] | Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        return np.concatenate(
            [np.broadcast_to(v, keep.shape)[keep] for v, keep in zip(values, chosen, strict=True)]
        )

    share = at_chosen(scale) * at_chosen(trained) / trie.num_completions
    signed = share * at_chosen(advantage)

    def total(weights: np.ndarray) -> np.ndarray:
        return np.bincount(nodes, weights=weights, minlength=len(trie))

    return Credit(total(signed.clip(min=0)), total(signed.clip(max=0)), total(share) * (options.beta != 0))
