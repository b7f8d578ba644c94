"""Slow, obvious twins of the fast paths: loops over prefixes, completions and tokens."""

import numpy as np
import torch

from twig.core.algorithms.base import Objective
from twig.core.branches import Split
from twig.core.objective import k3


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
    """Logits [..., T, V] of the sampled distribution after each of the T tokens.

    By the model's own forward on one text [T], or on a batch of texts [B, T].
    """
    rows = ids if ids.ndim == 2 else ids[None]
    logits = policy.model(input_ids=rows.to(policy.device), use_cache=False).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / policy.temperature
    for token in policy.suppressed.tolist():
        logits[..., token] = float("-inf")
    return logits if ids.ndim == 2 else logits[0]


def completion_logps(policy, prompt, completion) -> torch.Tensor:
    """Log-probs [|o|] of one completion's tokens, the whole text run as one row."""
    ids = torch.tensor([*prompt, *completion], device=policy.device)
    logp = torch.log_softmax(forward_logits(policy, ids), -1)
    at = torch.arange(len(prompt) - 1, len(ids) - 1, device=policy.device)
    return logp[at, ids[len(prompt) :]]


def prefix_logps(policy, prompt, prefixes) -> list[torch.Tensor]:
    """Log-prob of each prefix's last token, each prefix a text by itself.

    Those of one length are run as a batch, so nothing is padded.
    """
    logps: dict[int, torch.Tensor] = {}
    for length in {len(prefix) for prefix in prefixes}:
        numbers = [n for n, prefix in enumerate(prefixes) if len(prefix) == length]
        ids = torch.tensor([[*prompt, *prefixes[n]] for n in numbers], device=policy.device)
        logp = torch.log_softmax(forward_logits(policy, ids)[:, -2], -1)
        logps |= {n: logp[row, ids[row, -1]] for row, n in enumerate(numbers)}
    return [logps[n] for n in range(len(prefixes))]


def node_loss(policy, groups, tries, credits, surrogate: Objective, old=None) -> torch.Tensor:
    """The loss node by node: each weighted node's log-prob from a forward over its own prefix alone."""
    total = torch.zeros((), dtype=torch.float64, device=policy.device)
    for g, (group, trie, credit) in enumerate(zip(groups, tries, credits, strict=True)):
        nodes = [int(node) for node in np.flatnonzero(credit.weighted)]
        prefixes = [prefix_of(trie, node) for node in nodes]
        refs = [None] * len(nodes)
        if surrogate.beta:
            with torch.no_grad(), policy.base():
                refs = prefix_logps(policy, group.prompt_ids, prefixes)
        logps = prefix_logps(policy, group.prompt_ids, prefixes)
        for node, logp, ref in zip(nodes, logps, refs, strict=True):
            old_logp = logp.detach() if old is None else old[g][node]
            ratio = (logp - old_logp).exp()
            plus, minus = float(credit.plus[node]), float(credit.minus[node])
            if old is None:
                total = total - (plus + minus) * ratio
            else:
                total = total - plus * ratio.clamp(max=1 + surrogate.epsilon_high)
                total = total - minus * ratio.clamp(min=1 - surrogate.epsilon)
            if surrogate.beta:
                weight = ratio if surrogate.bias_correction else 1.0
                total = (
                    total + surrogate.beta * float(credit.kl[node]) * k3(logp[None], ref[None])[0] * weight
                )
    return total


def path_loss(policy, groups, tries, credits) -> tuple[torch.Tensor, list[dict[int, torch.Tensor]]]:
    """The unclipped loss with the model's own forward over each whole completion, and the nodes' log-probs.

    Faster than `node_loss`, and as far from a trie: nothing is shared.
    """
    total, actual = torch.zeros((), dtype=torch.float64, device=policy.device), []
    for group, trie, credit in zip(groups, tries, credits, strict=True):
        logp: dict[int, torch.Tensor] = {}
        for completion, path in zip(group.completions, trie.paths, strict=True):
            ours = completion_logps(policy, group.prompt_ids, completion.ids)
            logp |= {int(node): value for node, value in zip(path, ours, strict=True)}
        for node in np.flatnonzero(credit.weighted):
            weight = float(credit.plus[node]) + float(credit.minus[node])
            total = total - weight * (logp[int(node)] - logp[int(node)].detach()).exp()
        actual.append({node: value.detach() for node, value in logp.items()})
    return total, actual


@torch.no_grad()
def sample_one(
    policy, prompt, limit, end_ids, uniform=None, follow=None
) -> tuple[list[int], list[float], list[float]]:
    """One completion token by token, the whole text run again for each; greedy without `uniform`.

    `follow(t, logp)` may name another token for position t, None for no other.
    """
    ids, logps, entropies = list(prompt), [], []
    for t in range(limit):
        logp = torch.log_softmax(forward_logits(policy, torch.tensor(ids))[-1], -1)
        probability = logp.exp()
        if uniform is None:
            token = int(logp.argmax())
        else:
            cumulative = probability.cumsum(0)
            token = int((cumulative <= uniform[t] * cumulative[-1]).sum())
        other = None if follow is None else follow(t, logp)
        token = token if other is None else other
        ids.append(token)
        logps.append(float(logp[token]))
        entropies.append(float(-(probability * logp.clamp(min=-1e9)).sum()))
        if token in end_ids:
            break
    return ids[len(prompt) :], logps, entropies


def split_all(branch, tokens) -> Split:
    """A branch for every completion, whether or not another reads the same."""
    own = np.arange(len(branch))
    return Split(own, tokens, branch, branch, own)


def advantages(rewards, scale_rewards="group") -> list[float]:
    """GRPO's advantages by the formula, in plain Python; all equal rewards give 0."""
    mean = sum(rewards) / len(rewards)
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5
    return [(r - mean) / (std + 1e-4 if scale_rewards == "group" else 1.0) for r in rewards]


def s_grpo_positions(draw, length, alpha, p, k) -> list[int]:
    """The trained positions of one completion, left to right; `draw[t]` is position t's uniform number."""
    chosen: list[int] = []
    for t in range(length):
        if t < alpha or (len(chosen) < k and draw[t] < p):
            chosen.append(t)
    return chosen


def token_terms(completions, rewards, scales, scale_rewards="group", trained=None, advantage_of=None):
    """prefix -> [(A_i * scale / G, scale / G), ...]: a pair per completion that trains its last token.

    `scales[i]` maps the trained positions of completion i to their scale, such as 1 / |o_i|. A_i is GRPO's,
    or what `advantage_of(i, prefix)` returns.
    """
    terms: dict[tuple[int, ...], list[tuple[float, float]]] = {}
    by_completion = zip(completions, advantages(rewards, scale_rewards), scales, strict=True)
    for i, (completion, advantage, scale) in enumerate(by_completion):
        if trained is not None and not trained[i]:
            continue
        for t, s in scale.items():
            prefix = tuple(int(token) for token in completion[: t + 1])
            a = advantage if advantage_of is None else advantage_of(i, prefix)
            terms.setdefault(prefix, []).append((a * s / len(completions), s / len(completions)))
    return terms


def neighbour_terms(name, completions, rewards, scale_rewards="group", divisor=1, trained=None):
    """`token_terms` of the algorithm called `name`, from the formula in its paper."""
    size, through = len(completions), all_prefixes(completions, rewards)
    mean = sum(rewards) / size
    equal = max(rewards) == min(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / max(size - 1, 1)) ** 0.5
    divided = std + 1e-4 if scale_rewards == "group" and size > 1 else 1.0

    def value(prefix):
        values = through[prefix]
        return values[0] if min(values) == max(values) else sum(values) / len(values)

    def advantage(i, prefix):
        if equal:
            return 0.0
        if name == "dr-grpo":
            return rewards[i] - mean
        if name == "rloo":
            others = [r for j, r in enumerate(rewards) if j != i]
            return rewards[i] - sum(others) / len(others)
        if name == "tempo":
            return (rewards[i] - mean + value(prefix) - value(prefix[:-1])) / divided
        return (rewards[i] - mean) / divided

    def scale(completion, t):
        if name in ("dr-grpo", "rloo"):
            return {"dr-grpo": 1 / divisor, "rloo": 1.0}[name]
        shared = len(through[tuple(int(x) for x in completion[: t + 1])]) if name == "lambda-grpo" else 1
        return 1 / (len(completion) * shared)

    scales = [{t: scale(c, t) for t in range(len(c))} for c in completions]
    return token_terms(completions, rewards, scales, trained=trained, advantage_of=advantage)


def quantile(values, q) -> float:
    """The q-quantile, linear between neighbours in order of size."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def value_steps(completions, rewards) -> dict[tuple[int, ...], float]:
    """prefix -> V(prefix) - V(prefix without its last token), from the dictionary of all prefixes."""
    through = all_prefixes(completions, rewards)
    value = {prefix: sum(values) / len(values) for prefix, values in through.items()}
    gained = {prefix: value[prefix] - value[prefix[:-1]] for prefix in through if prefix}
    return {prefix: 0.0 if is_rounding(g, rewards) else g for prefix, g in gained.items()}


def is_rounding(difference, rewards) -> bool:
    """Whether a difference of rewards is below a relative 1e-9 of them."""
    return abs(difference) <= 1e-9 * max(map(abs, rewards))


def t_spmo_weights(groups, normalise="step") -> list[dict[tuple[int, ...], float]]:
    """The step in value of each prefix over |U|: of all groups, of those with a step, or of each group."""
    gained = [value_steps(*group) for group in groups]
    sizes = [sum(g != 0 or normalise != "branches" for g in each.values()) for each in gained]
    divisors = [size * len(groups) if normalise == "group" else sum(sizes) for size in sizes]
    return [
        {prefix: g / max(divisor, 1) for prefix, g in each.items()}
        for each, divisor in zip(gained, divisors, strict=True)
    ]


def clipped_sum(terms, logp, old_logp, epsilon, epsilon_high) -> torch.Tensor:
    """- sum over completions and positions of share * min(r A, clip(r) A), as GRPO writes it.

    `logp` and `old_logp` map prefixes to scalars; `terms` is what `token_terms` returns: its signed weights
    are share * A, and a share is positive.
    """
    total = torch.zeros((), dtype=torch.float64)
    for prefix, pairs in terms.items():
        ratio = (logp[prefix] - old_logp[prefix]).exp()
        for signed, _ in pairs:
            total = total - torch.min(ratio * signed, ratio.clamp(1 - epsilon, 1 + epsilon_high) * signed)
    return total
