"""Slow, obvious twins of the fast paths: loops over prefixes, completions and tokens."""

import statistics

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


# ---- the algorithms that were added by name, from the formulas of their papers -----------------------------


def entropies_of(completions) -> list[np.ndarray]:
    """An entropy for each token that depends on its prefix alone, 0 to 1."""
    return [
        np.array([(7 * sum(int(x) for x in c[:t]) + 3 * t) % 11 / 10 for t in range(len(c))])
        for c in completions
    ]


def _segment(through, prefix) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(the first prefix of the segment that `prefix` is in, the prefix before it).

    Both are the root if all completions begin with `prefix`.
    """
    for length in range(len(prefix), -1, -1):
        if len(through[prefix[:length]]) > len(through[prefix]):
            return prefix[: length + 1], prefix[:length]
    return (), ()


def _value(through, prefix) -> float:
    values = through[prefix]
    return values[0] if min(values) == max(values) else sum(values) / len(values)


def tree_terms(name, completions, rewards, scale_rewards="group", trained=None):
    """`token_terms` of TreeRL, TreeAdv and TreeRPO."""
    through = all_prefixes(completions, rewards)
    root, each = _value(through, ()), advantages(rewards, scale_rewards)
    ids = [tuple(int(x) for x in c) for c in completions]

    def advantage(i, prefix):
        first, before = _segment(through, prefix)
        if name == "treeadv":
            sharing = [each[j] for j, c in enumerate(ids) if c[: len(prefix)] == prefix]
            return sum(sharing) / len(sharing)
        if name == "treerl":
            own = _value(through, prefix)
            return (own - root + own - _value(through, before)) / len(through[prefix]) ** 0.5
        siblings = {c[: len(first)] for c in ids if len(c) > len(before) and c[: len(before)] == before}
        if not first or len(siblings) < 2:
            return 0.0
        values = [(_value(through, s), s) for s in sorted(siblings) for _ in through[s]]
        among = advantages([value for value, _ in values], scale_rewards)
        return next(a for a, (_, sibling) in zip(among, values, strict=True) if sibling == first)

    scales = [{t: 1 / len(c) for t in range(len(c))} for c in completions]
    return token_terms(completions, rewards, scales, trained=trained, advantage_of=advantage)


def maxrl_terms(completions, rewards, trained=None):
    """The estimator with its control variate: r_i / K - 1 / G, for any rewards (sum of r_i / sum of r_j)."""
    total, size = sum(rewards), len(rewards)
    equal = max(rewards) == min(rewards)

    def advantage(i, prefix):
        return 0.0 if total <= 0 or equal else (rewards[i] / total - 1 / size) * size

    scales = [dict.fromkeys(range(len(c)), 1.0) for c in completions]
    return token_terms(completions, rewards, scales, trained=trained, advantage_of=advantage)


def mc_grpo_terms(completions, rewards, scale_rewards="mad", trained=None):
    """Differences from the median over the median of their sizes, with the group less one as divisor."""
    middle = statistics.median_low(rewards)
    deviation = statistics.median_low([abs(r - middle) for r in rewards])
    divided = deviation + 1e-3 if scale_rewards == "mad" else 1.0
    size = len(rewards)
    scales = [{t: size / (max(size - 1, 1) * len(c)) for t in range(len(c))} for c in completions]
    return token_terms(
        completions,
        rewards,
        scales,
        trained=trained,
        advantage_of=lambda i, prefix: (rewards[i] - middle) / divided,
    )


def reinforce_plus_plus_terms(step, baseline="group", trained=None):
    """Per group, prefix -> signed weights: advantages, normalised over all tokens of the step."""
    trained = trained or [[True] * len(rewards) for _, rewards in step]
    centred = [
        [r - (sum(rewards) / len(rewards) if baseline == "group" else 0.0) for r in rewards]
        for _, rewards in step
    ]
    every = [
        a
        for (completions, _), values, on in zip(step, centred, trained, strict=True)
        for c, a, keep in zip(completions, values, on, strict=True)
        for _ in c
        if keep
    ]
    if not every:
        return [{} for _ in step]
    mean = sum(every) / len(every)
    std = (sum((a - mean) ** 2 for a in every) / len(every)) ** 0.5
    largest = max(abs(r) for _, rewards in step for r in rewards)
    terms = []
    for (completions, _), values, on in zip(step, centred, trained, strict=True):
        own: dict[tuple[int, ...], list[tuple[float, float]]] = {}
        for c, a, keep in zip(completions, values, on, strict=True):
            weight = 0.0 if abs(a - mean) <= 1e-9 * largest else (a - mean) / (std + 1e-8) / len(every)
            for t in range(len(c) if keep else 0):
                own.setdefault(tuple(int(x) for x in c[: t + 1]), []).append((weight, 0.0))
        terms.append(own)
    return terms


def gtpo_token_terms(completions, rewards, entropies, alpha_1, alpha_2, right_above=0.5, trained=None):
    """Eq. 3, 5, 6 and 7 of GTPO (token), position by position; a group of one side has no weight."""
    right = [r > right_above for r in rewards]
    tokens = [(i, t) for i, c in enumerate(completions) for t in range(len(c))]
    epsilon = 1e-6
    shaped: dict[bool, dict[tuple[int, int], float]] = {True: {}, False: {}}
    for i, t in tokens:
        alike = [j for j, c in enumerate(completions) if len(c) > t and right[j] == right[i]]
        if right[i]:
            total = sum(float(entropies[j][t]) + epsilon for j in alike)
            own = alpha_1 + alpha_2 * (float(entropies[i][t]) + epsilon) / total * len(alike)
        else:
            total = sum(1 / (float(entropies[j][t]) + epsilon) for j in alike)
            own = -alpha_1 - alpha_2 / (float(entropies[i][t]) + epsilon) / total * len(alike)
        shaped[right[i]][i, t], shaped[not right[i]][i, t] = own, 0.0

    def advantage(i, prefix):
        values = shaped[right[i]]
        mean = sum(values.values()) / len(values)
        std = (sum((v - mean) ** 2 for v in values.values()) / len(values)) ** 0.5
        return (values[i, len(prefix) - 1] - mean) / (std + epsilon) if len(set(right)) == 2 else 0.0

    size = len(completions)
    scales = [dict.fromkeys(range(len(c)), size / max(len(tokens), 1)) for c in completions]
    return token_terms(completions, rewards, scales, trained=trained, advantage_of=advantage)


def gtpo_trajectory_terms(
    completions, rewards, entropies, conflict_weight, entropy_weight, max_entropy, trained=None
):
    """The rules of GTPO (trajectory), token by token."""
    each = advantages(rewards)
    ids = [[int(x) for x in c] for c in completions]

    def opposite(i, t, backwards):
        """Whether a completion of the other sign has the token of place t, from either end."""
        own = ids[i][::-1] if backwards else ids[i]
        return any(
            each[i] * each[j] < 0 and t < len(other) and (other[::-1] if backwards else other)[t] == own[t]
            for j, other in enumerate(ids)
        )

    def in_run(i, t, backwards):
        place = len(ids[i]) - 1 - t if backwards else t
        return all(opposite(i, s, backwards) for s in range(place + 1))

    def conflicts(i):
        return sum(in_run(i, t, False) or in_run(i, t, True) for t in range(len(ids[i])))

    def advantage(i, prefix):
        t, mean = len(prefix) - 1, float(np.mean(entropies[i]))
        if mean > max_entropy:
            return 0.0
        weight = 1.0
        for backwards in (False, True):
            if in_run(i, t, backwards):
                weight *= conflict_weight if each[i] > 0 else 0.0
        return (each[i] - entropy_weight * mean) * weight / max(conflicts(i), 1)

    scales = [{t: 1 / len(c) for t in range(len(c))} for c in completions]
    return token_terms(completions, rewards, scales, trained=trained, advantage_of=advantage)
