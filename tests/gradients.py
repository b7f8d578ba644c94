"""Gradients of the engine and of its slow twin, and small groups to compare them on."""

import numerics
import numpy as np
import oracles
import tiny
import torch

from twig.core.algorithms.registry import algorithm
from twig.core.credit import Scored, assign
from twig.core.trie import PrefixTrie
from twig.engine.pack import build_packs
from twig.engine.sampler import Request


def credit_of(groups, name="grpo", beta=0.0, seed=0):
    options = {"alpha": 2, "p": 0.3, "k": 6} if name == "s-grpo" else {}
    rule = algorithm(name, **options, **({"beta": beta} if beta else {}))
    tries = [PrefixTrie.build([c.ids for c in g.completions], g.rewards) for g in groups]
    rng = np.random.default_rng(seed)
    return tries, assign(rule, tries, [rng] * len(tries), len(groups))[0]


def scored(groups, tries, credits):
    """The groups of a step as the engine takes them."""
    parts = enumerate(zip(groups, tries, credits, strict=True))
    return [Scored(group, trie, credit, slot) for slot, (group, trie, credit) in parts]


def groups_of(seed=0, count=3):
    rng = np.random.default_rng(seed)
    return [tiny.random_group(rng, prompt_length=3 + i, index=i) for i in range(count)]


def engine_gradient(policy, groups, tries, credits, surrogate, size=4096, boundary=None, old=None):
    for parameter in policy.parameters.values():
        parameter.grad = None
    total = 0.0
    packs = build_packs(scored(groups, tries, credits), size, share=policy.shares_prefixes)
    for pack in packs:
        ref = None
        if surrogate.beta:
            with policy.base():
                ref = policy.logps(pack, boundary)
        old_logp = None
        if old is not None:
            actual = [
                old[g][n]
                for g, n in zip(pack.targets.group.tolist(), pack.targets.node.tolist(), strict=True)
            ]
            old_logp = torch.tensor(actual, dtype=torch.float64, device=policy.device)
        total += policy.backward(pack, surrogate, boundary, old_logp, ref)[1]
    return total, {n: p.grad.clone() for n, p in policy.parameters.items()}


def oracle_gradient(policy, groups, tries, credits, surrogate, old=None):
    policy = numerics.exact(policy)
    for parameter in policy.parameters.values():
        parameter.grad = None
    loss = oracles.node_loss(policy, groups, tries, credits, surrogate, old)
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in policy.parameters.items()}


def text_of(ids):
    return " ".join(map(str, ids))


def texts_of(rows):
    return [text_of(ids) for ids in rows]


def requests_of(seed=0, num=5, limits=(9, 12, 7)):
    rng = np.random.default_rng(seed)
    return [
        Request(rng.integers(3, tiny.VOCAB, length), num, limit, slot)
        for slot, (length, limit) in enumerate(zip((4, 7, 3), limits, strict=True))
    ]
