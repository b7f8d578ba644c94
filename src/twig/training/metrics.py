"""The metrics of all that one step sampled; docs/metrics.md has a line for each."""

from typing import Any

import numpy as np

from twig.training.batch import Batch


def batch_metrics(batch: Batch) -> dict[str, Any]:
    """Returns the metrics of a step's completions and rewards by name."""
    sampled = batch.sampled
    completions = [c for g in sampled.groups for c in g.completions]
    lengths = np.array([len(c) for c in completions])
    rewards = [g.rewards[~np.isnan(g.rewards)] for g in sampled.groups]
    given = np.concatenate(rewards)
    deviations = [each.std(ddof=1) for each in rewards if len(each) > 1]
    metrics = {
        "reward": float(given.mean()) if len(given) else None,
        "reward_std": float(np.mean(deviations or [0.0])),
        **sampled.rewards.metrics,
        "frac_reward_zero_std": len(sampled.without_signal) / len(sampled.groups),
        "answers/right": None if sampled.graded else float(sampled.right.mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": int(lengths.min()),
        "completions/max_length": int(lengths.max()),
        "completions/clipped_ratio": float(np.mean([not c.finished for c in completions])),
        "entropy": float(np.concatenate([c.entropies for c in completions]).mean()),
        "tokens/sampled": int(lengths.sum()),
        "replay/groups": sum(g.prefix_length > 0 for g in sampled.groups),
        "redraw/groups": len(sampled.groups) - len(batch.groups),
    }
    if sampled.answered is not None:
        metrics["answers/found"] = float(sampled.answered.mean())
    return metrics
