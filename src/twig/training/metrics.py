"""The metrics of what one step sampled; docs/metrics.md has a line for each."""

from typing import Any

import numpy as np

from twig.core.trie import without_rounding
from twig.training.batch import Batch


def batch_metrics(batch: Batch) -> dict[str, Any]:
    """Returns the metrics of a step's completions and rewards by name."""
    completions = [c for g in batch.groups for c in g.completions]
    lengths = np.array([len(c) for c in completions])
    rewards = np.array([g.rewards for g in batch.groups])
    given = rewards[~np.isnan(rewards)]
    equal = [len(np.unique(without_rounding(row[~np.isnan(row)]))) <= 1 for row in rewards]
    deviations = [each.group.rewards.std(ddof=1) for each in batch.scored if len(each.group.rewards) > 1]
    metrics = {
        "reward": float(given.mean()) if len(given) else None,
        "reward_std": float(np.mean(deviations or [0.0])),
        **batch.rewards.metrics,
        "frac_reward_zero_std": float(np.mean(equal)),
        "answers/right": float(batch.right.mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": int(lengths.min()),
        "completions/max_length": int(lengths.max()),
        "completions/clipped_ratio": float(np.mean([not c.finished for c in completions])),
        "entropy": float(np.concatenate([c.entropies for c in completions]).mean()),
        "tokens/sampled": int(lengths.sum()),
        "replay/groups": sum(g.prefix_length > 0 for g in batch.groups),
    }
    if batch.answered is not None:
        metrics["answers/found"] = float(batch.answered.mean())
    return metrics
