"""Credit assignment: from a group's prefix trie to weights on its nodes. Start reading here.

An algorithm is a pure function of a trie (and a random generator). Its weights say how much each token of the
group is pushed up (`plus`), pushed down (`minus`) and held to the base model (`kl`); everything else follows
from them.

Notation: R_i the reward of completion i, |o_i| its tokens, G the completions of the group, V(n) the mean
reward of the completions through node n. Weights are per group; the caller divides by the prompts in the
optimizer step.

Lee & Tong, "Token-Efficient RL for LLM Reasoning", arXiv 2504.20834, fixes the rules of S-GRPO and T-SPMO.
The options marked "ours" are not in the paper. Below them are their neighbours, which are weights on tokens
too. Numpy only; knows nothing of models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from twig.options import Algorithm
from twig.trie import PrefixTrie


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


def grpo(trie: PrefixTrie, options: Algorithm, rng: np.random.Generator, trained: np.ndarray) -> Credit:
    """Every token of completion i gets A_i / (G |o_i|). GRPO, arXiv 2402.03300, eq. 3 and 4."""
    advantage = advantages(trie.rewards, options.scale_rewards)
    return _on_tokens(trie, options, trained, advantage, [1 / max(len(path), 1) for path in trie.paths])


def s_grpo(trie: PrefixTrie, options: Algorithm, rng: np.random.Generator, trained: np.ndarray) -> Credit:
    """The tokens T_i of completion i get A_i / (G |T_i|), the others nothing. S-GRPO, arXiv 2504.20834.

    T_i holds every position t < alpha and, after those, each position with probability p, left to right,
    until it holds k. With `unbiased` (the form of arXiv 2603.06619), m of the later positions are drawn
    without replacement and their weight A_i / (G |o_i|) is multiplied by (|o_i| - alpha) / m, so that the
    expected weights are those of `grpo`.
    """
    if options.unbiased:
        return _unbiased_s_grpo(trie, options, rng, trained)
    draws = rng.random((trie.num_completions, int(trie.lengths.max(initial=0))))
    chosen = []
    for path, draw in zip(trie.paths, draws, strict=True):
        keep = draw[: len(path)] < options.p
        keep[: options.alpha] = True
        chosen.append(keep & (np.cumsum(keep) <= max(options.k, options.alpha)))
    scale = [1 / max(int(keep.sum()), 1) for keep in chosen]
    return _on_tokens(trie, options, trained, advantages(trie.rewards, options.scale_rewards), scale, chosen)


def t_spmo(trie: PrefixTrie, options: Algorithm, rng: np.random.Generator, trained: np.ndarray) -> Credit:
    """Each unique node n gets (V(n) - V(parent(n))) / |U|, once, however often it is visited. T-SPMO, arXiv
    2504.20834.

    U is the set of unique nodes of the group, or, with `normalise: branches` (ours), of those with non-zero
    credit. Nodes with the count of their parent get exactly 0: only forks have credit. The regulariser is the
    L2 norm of the adapter (`objective.shrink`), so there are no KL weights. A node that only untrained
    completions pass gets nothing.
    """
    weight = np.zeros(len(trie))
    weight[1:] = trie.value[1:] - trie.value[trie.parent[1:]]
    size = len(trie) - 1 if options.normalise == "unique" else np.count_nonzero(weight)
    weight /= max(size, 1)
    passed = np.zeros(len(trie), bool)
    for path, train in zip(trie.paths, trained, strict=True):
        passed[path] |= train
    weight[~passed] = 0
    return Credit(weight.clip(min=0), weight.clip(max=0), np.zeros(len(trie)))


# ---- neighbours ------------------------------------------------------------------------------------------


def dr_grpo(trie: PrefixTrie, options: Algorithm, rng: np.random.Generator, trained: np.ndarray) -> Credit:
    """Every token of completion i gets (R_i - mean) / (G L), L the same for all. Dr. GRPO, arXiv 2503.20783.

    L is `divisor`, the longest length allowed: a long wrong completion is pushed down as much per token as a
    short one, and a group of nearly equal rewards as it is.
    """
    advantage = advantages(trie.rewards, "none")
    return _on_tokens(trie, options, trained, advantage, [1 / options.divisor] * trie.num_completions)


def rloo(trie: PrefixTrie, options: Algorithm, rng: np.random.Generator, trained: np.ndarray) -> Credit:
    """Every token of completion i gets (R_i - the mean of the other rewards) / G. RLOO, arXiv 2402.14740.

    A completion is one action: its log-prob is the sum over its tokens, so no length divides.
    """
    others = max(trie.num_completions - 1, 1)
    advantage = advantages(trie.rewards, "none") * trie.num_completions / others
    return _on_tokens(trie, options, trained, advantage, [1.0] * trie.num_completions)


def lambda_grpo(
    trie: PrefixTrie, options: Algorithm, rng: np.random.Generator, trained: np.ndarray
) -> Credit:
    """GRPO with each token's share divided by count(n), the completions through its node: A_i / (G |o_i|
    count(n)). lambda-GRPO, arXiv 2509.21154.

    GRPO counts what is common to many completions many times; here a node counts once, with their mean.
    """
    advantage = advantages(trie.rewards, options.scale_rewards)
    scale = [1 / (max(len(path), 1) * trie.count[path]) for path in trie.paths]
    return _on_tokens(trie, options, trained, advantage, scale)


def tempo(trie: PrefixTrie, options: Algorithm, rng: np.random.Generator, trained: np.ndarray) -> Credit:
    """GRPO with the step in value that the token makes added to the advantage: (R_i - mean + V(n) -
    V(parent(n))) / (std + 1e-4), over G |o_i|. TEMPO, arXiv 2509.18314.

    The step is 0 where completions do not part.
    """
    deviation = _deviation(trie.rewards, options.scale_rewards)
    step = np.append(0.0, trie.value[1:] - trie.value[trie.parent[1:]]) / deviation
    advantage = advantages(trie.rewards, options.scale_rewards)
    both = [a + step[path] for a, path in zip(advantage, trie.paths, strict=True)]
    return _on_tokens(trie, options, trained, both, [1 / max(len(path), 1) for path in trie.paths])


# ---- the table -------------------------------------------------------------------------------------------

Rule = Callable[[PrefixTrie, Algorithm, np.random.Generator, np.ndarray], Credit]
ALGORITHMS: dict[str, Rule] = {
    "grpo": grpo,
    "s-grpo": s_grpo,
    "t-spmo": t_spmo,
    "dr-grpo": dr_grpo,
    "rloo": rloo,
    "lambda-grpo": lambda_grpo,
    "tempo": tempo,
}


def assign(
    trie: PrefixTrie,
    options: Algorithm,
    rng: np.random.Generator,
    num_prompts: int,
    trained: np.ndarray | None = None,
    entropy_floor: float | None = None,
) -> Credit:
    """The credit of algorithm `options.name` on one group of a step with `num_prompts` groups.

    `trained[i]` False leaves completion i out of the loss (`mask_truncated_completions`): it counts in the
    mean, in the standard deviation and in every V(n), as in TRL, but brings no weight of its own. With
    `top_entropy_quantile` below 1 only nodes whose entropy is at least `entropy_floor` (None: that of this
    group alone) keep their policy weights; the KL weights stay, as in TRL.
    """
    if trained is None:
        trained = np.ones(trie.num_completions, bool)
    credit = ALGORITHMS[options.name](trie, options, rng, trained).divided_by(num_prompts)
    if options.top_entropy_quantile == 1:
        return credit
    if entropy_floor is None:
        entropy_floor = entropy_at_quantile([trie], [trained], options.top_entropy_quantile)
    keep = trie.entropy >= entropy_floor
    return Credit(credit.plus * keep, credit.minus * keep, credit.kl)


def entropy_at_quantile(tries: Sequence[PrefixTrie], trained: Sequence[np.ndarray], top: float) -> float:
    """The entropy that the share `top` of a step's trained tokens reaches: the quantile 1 - `top`, linear in
    between. "Beyond the 80/20 Rule", arXiv 2506.01939; TRL's `top_entropy_quantile`.

    A token counts as often as it was sampled. The tries have entropies.
    """
    found = [
        trie.entropy[path]
        for trie, kept in zip(tries, trained, strict=True)
        for path, train in zip(trie.paths, kept, strict=True)
        if train
    ]
    tokens = np.concatenate(found) if found else np.empty(0)
    return float(np.quantile(tokens, 1 - top)) if len(tokens) else np.inf


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
    return (rewards - rewards.mean()) / _deviation(rewards, scale_rewards)


def _deviation(rewards: np.ndarray, scale_rewards: str) -> float:
    return 1.0 if scale_rewards == "none" or len(rewards) == 1 else float(rewards.std(ddof=1)) + 1e-4


def _on_tokens(
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


def _unbiased_s_grpo(
    trie: PrefixTrie, options: Algorithm, rng: np.random.Generator, trained: np.ndarray
) -> Credit:
    draws = rng.random((trie.num_completions, int(trie.lengths.max(initial=0))))
    chosen, scale = [], []
    for path, draw in zip(trie.paths, draws, strict=True):
        later = len(path) - options.alpha
        keep, factor = np.ones(len(path), bool), np.ones(len(path))
        if later > 0:
            wanted = max(1, int(np.floor(options.p * later + 0.5)))
            m = min(options.k - options.alpha, wanted)
            keep[options.alpha :] = False
            keep[options.alpha + np.argsort(draw[options.alpha : len(path)], kind="stable")[:m]] = True
            factor[options.alpha :] = later / m
        chosen.append(keep)
        scale.append(factor / max(len(path), 1))
    return _on_tokens(trie, options, trained, advantages(trie.rewards, options.scale_rewards), scale, chosen)
