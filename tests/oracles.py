"""Slow, obvious twins of the fast paths: loops over prefixes, completions and tokens."""

import numpy as np
import torch

from twig.objective import Surrogate, k3


def all_prefixes(completions, rewards) -> dict[tuple[int, ...], list[float]]:
    """Rewards of the completions through each prefix; the empty prefix is the root."""
    through: dict[tuple[int, ...], list[float]] = {}
    for completion, reward in zip(completions, rewards, strict=True):
        for stop in range(len(completion) + 1):
            through.setdefault(tuple(int(t) for t in completion[:stop]), []).append(float(reward))
    return through


def prefix_of(trie, node: int) -> tuple[int, ...]:
    """The tokens from the root to `node`."""
    tokens: list[int] = []
    while node != 0:
        tokens.append(int(trie.token[node]))
        node = int(trie.parent[node])
    return tuple(reversed(tokens))


def forward_logits(policy, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of the sampled distribution after each of the T tokens, by the model's own forward on one
    text."""
    logits = policy.model(input_ids=ids[None], use_cache=False).logits[0]
    logits = logits / policy.temperature
    for token in policy.suppressed.tolist():
        logits[:, token] = float("-inf")
    return logits


def completion_logps(policy, prompt, completion) -> torch.Tensor:
    """Log-probs [|o|] of one completion's tokens, the whole text run as one row."""
    ids = torch.tensor([*prompt, *completion])
    logp = torch.log_softmax(forward_logits(policy, ids), -1)
    at = torch.arange(len(prompt) - 1, len(ids) - 1)
    return logp[at, ids[len(prompt) :]]


def node_loss(policy, groups, tries, credits, surrogate: Surrogate, old=None) -> torch.Tensor:
    """The loss node by node: each weighted node's log-prob from a forward over its own prefix alone."""
    total = torch.zeros((), dtype=torch.float64)
    for g, (group, trie, credit) in enumerate(zip(groups, tries, credits, strict=True)):
        for node in np.flatnonzero(credit.weighted):
            prefix = prefix_of(trie, int(node))
            logp = completion_logps(policy, group.prompt_ids, prefix)[-1]
            old_logp = logp.detach() if old is None else old[g][int(node)]
            ratio = (logp - old_logp).exp()
            plus, minus = float(credit.plus[node]), float(credit.minus[node])
            if old is None:
                total = total - (plus + minus) * ratio
            else:
                total = total - plus * ratio.clamp(max=1 + surrogate.epsilon_high)
                total = total - minus * ratio.clamp(min=1 - surrogate.epsilon)
            if surrogate.beta:
                with torch.no_grad(), policy.base():
                    ref = completion_logps(policy, group.prompt_ids, prefix)[-1]
                weight = ratio if surrogate.bias_correction else 1.0
                total = (
                    total + surrogate.beta * float(credit.kl[node]) * k3(logp[None], ref[None])[0] * weight
                )
    return total


@torch.no_grad()
def sample_one(policy, prompt, limit, end_ids, uniform=None) -> tuple[list[int], list[float], list[float]]:
    """One completion token by token, the whole text run again for each; greedy without `uniform`."""
    ids, logps, entropies = list(prompt), [], []
    for t in range(limit):
        logp = torch.log_softmax(forward_logits(policy, torch.tensor(ids))[-1], -1)
        probability = logp.exp()
        if uniform is None:
            token = int(logp.argmax())
        else:
            cumulative = probability.cumsum(0)
            token = int((cumulative <= uniform[t] * cumulative[-1]).sum())
        ids.append(token)
        logps.append(float(logp[token]))
        entropies.append(float(-(probability * logp.clamp(min=-1e9)).sum()))
        if token in end_ids:
            break
    return ids[len(prompt) :], logps, entropies
