"""The algorithms by name, and the credit that one of them gives a group."""

from collections.abc import Sequence

import numpy as np

from twig.config.schema import Algorithm
from twig.core.algorithms.base import Credit, Rule
from twig.core.algorithms.dr_grpo import dr_grpo
from twig.core.algorithms.grpo import grpo
from twig.core.algorithms.lambda_grpo import lambda_grpo
from twig.core.algorithms.rloo import rloo
from twig.core.algorithms.s_grpo import s_grpo
from twig.core.algorithms.t_spmo import t_spmo
from twig.core.algorithms.tempo import tempo
from twig.core.trie import PrefixTrie

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
