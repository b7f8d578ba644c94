"""Checks a run's numbers for the conditions that `diagnosis.py` gives a meaning.

A condition returns a description of what it saw, or None. Knows the names of metrics; no torch.
"""

import numpy as np

from twig.report.history import History

_ENOUGH = 24  # steps, before anything is said about a trend
_LOW, _HIGH = 0.1, 0.9  # shares that count as hardly any and nearly all


# ---- conditions: completions and rewards ------------------------------------------------------------------


def truncated(run: History) -> str | None:
    share, limit = run.last("completions/clipped_ratio"), run.settings.rollout.max_completion_length
    if share >= _HIGH:
        return f"{_share(share)} of the completions were cut off at {limit} tokens"
    return None


def often_truncated(run: History) -> str | None:
    share, limit = run.last("completions/clipped_ratio"), run.settings.rollout.max_completion_length
    return f"{_share(share)} were cut off at {limit} tokens" if 0.25 <= share < _HIGH else None


def no_answer(run: History) -> str | None:
    share = run.last("answers/found")
    return f"an answer was found in {_share(share)} of the completions" if share < 0.05 else None


def not_marked(run: History) -> str | None:
    right, last_number = run.last("answers/right"), run.last("answers/right_lenient")
    if last_number - right > 0.2:
        return f"{_share(last_number)} end with the right number, {_share(right)} mark it as the answer"
    return None


def no_reward(run: History) -> str | None:
    share = float(np.isnan(run.column("reward")).mean())
    return f"in {_share(share)} of the steps no completion got a reward" if share >= 0.5 else None


def _function_names(run: History) -> list[str]:
    keys = {key for row in run.rows for key in row if key.startswith("rewards/") and key.endswith("/mean")}
    return sorted(key.removeprefix("rewards/").removesuffix("/mean") for key in keys)


def cancel(run: History) -> str | None:
    names = _function_names(run)
    weights = run.settings.task.reward_weights or [1.0] * len(names)
    if len(run) < _ENOUGH or len(names) < 2 or len(set(weights)) > 1:
        return None  # a weight belongs to a place in a list, and a metric has a name only
    columns = np.array([run.column(f"rewards/{name}/mean") for name in names])
    columns = columns[:, ~np.isnan(columns).any(0)]
    if columns.shape[1] < _ENOUGH or columns.sum(0).var() >= 0.25 * columns.var(1).sum():
        return None
    first, second = np.unravel_index(np.argmin(np.cov(columns)), (len(names), len(names)))
    return f"when {names[first]} rises {names[second]} falls, and their sum hardly moves"


def constant_function(run: History) -> str | None:
    names = _function_names(run)
    flat = [name for name in names if np.nanmax(run.column(f"rewards/{name}/std"), initial=0.0) == 0]
    if len(names) > 1 and flat and len(flat) < len(names):
        return f"{flat[0]} gave all completions of each step the same"
    return None


def constant_reward(run: History) -> str | None:
    if _task_can_tell(run) or len(_function_names(run)) != 1:
        return None
    (name,) = _function_names(run)
    means = run.column(f"rewards/{name}/mean")
    if np.isnan(means).any() or np.ptp(means) > 0 or np.nanmax(run.column(f"rewards/{name}/std")) > 0:
        return None
    return f"{name} gave each completion of {len(run)} steps the same, {means[0]:g}"


def _task_can_tell(run: History) -> bool:
    # Then a reward function of Twig's own scores answers, and only problems make its values equal.
    return bool((~np.isnan(run.column("answers/found"))).any())


# ---- conditions: signal -----------------------------------------------------------------------------------


def _without_signal(run: History) -> float:
    return run.last("frac_reward_zero_std")


def all_right(run: History) -> str | None:
    share = _without_signal(run)
    if constant_reward(run) is None and share >= _HIGH and run.last("answers/right") >= _HIGH:
        return f"in {_share(share)} of the groups all completions got one reward, nearly all of them right"
    return None


def all_wrong(run: History) -> str | None:
    share = _without_signal(run)
    if constant_reward(run) is None and share >= _HIGH and run.last("answers/right") <= _LOW:
        return f"in {_share(share)} of the groups all completions got one reward, nearly all of them wrong"
    return None


def all_alike(run: History) -> str | None:
    share, right = _without_signal(run), run.last("answers/right")
    if share >= _HIGH and _LOW < right < _HIGH:
        return f"{_share(share)} of the groups are all right or all wrong; {_share(right)} are right"
    return None


def skipped(run: History) -> str | None:
    share = float((run.column("grad_norm") == 0).mean())
    return f"{_share(share)} of the steps changed nothing" if share >= 0.25 else None


def no_replay(run: History) -> str | None:
    probability = run.settings.algorithm.restarts.probability
    if probability > 0 and len(run) >= _ENOUGH and not run.column("replay/groups").any():
        return f"no group restarted, with a probability of {probability:g}"
    return None


# ---- conditions: learning ---------------------------------------------------------------------------------


def flat(run: History) -> str | None:
    rise = run.rise("reward")
    silent = _without_signal(run) >= _HIGH  # which says it better
    within_noise = abs(rise.difference) <= 2 * rise.error
    if len(run) < _ENOUGH or silent or run.last("answers/right") >= _HIGH or not within_noise:
        return None
    return (
        f"the mean reward went from {run.first('reward'):.3f} to {run.last('reward'):.3f}: within its noise"
    )


def lost(run: History) -> str | None:
    right = run.column("answers/right")
    width = max(5, len(run) // 10)
    if len(run) < _ENOUGH or np.isnan(right).any():
        return None
    means = np.convolve(right, np.ones(width) / width, "valid")
    best, end = int(means.argmax()), float(means[-1])
    if means[best] - end <= 0.2:
        return None
    return f"{_share(means[best])} were right around step {best + width // 2 + 1}, {_share(end)} at the end"


def entropy_gone(run: History) -> str | None:
    first, last = run.first("entropy"), run.last("entropy")
    if len(run) >= _ENOUGH and last < _LOW * first and run.last("answers/right") < 0.8:
        return f"the entropy fell from {first:.3g} to {last:.3g} nats a token"
    return None


def entropy_up(run: History) -> str | None:
    first, last, rise = run.first("entropy"), run.last("entropy"), run.rise("reward")
    rises = last > 1.5 * first and last - first > 0.3
    if len(run) >= _ENOUGH and rises and rise.difference < 2 * rise.error:
        return f"the entropy rose from {first:.3g} to {last:.3g} nats a token, and the reward did not"
    return None


def far_from_base(run: History) -> str | None:
    divergence = run.last("kl")
    return f"the KL divergence from the base is {divergence:.2g} nats a token" if divergence > 0.5 else None


def clipped(run: History) -> str | None:
    limit, norms = run.settings.train.max_grad_norm, run.column("grad_norm")
    norms = norms[norms > 0]
    if limit == 0 or len(norms) < _ENOUGH or (norms > limit).mean() < 0.5:
        return None
    shorter = f"longer than {limit:g} in {_share((norms > limit).mean())} of the steps"
    return f"the gradient was {shorter}, {np.median(norms):.2g} in the middle one"


def no_rate(run: History) -> str | None:
    rates = run.column("learning_rate")
    if len(run) >= _ENOUGH and run.last("learning_rate") < 0.02 * np.nanmax(rates):
        return f"the learning rate was {run.last('learning_rate'):.1g} in the last third of the steps"
    return None


# ---- conditions: results and machine ----------------------------------------------------------------------


def best_before(run: History) -> str | None:
    best, after = run.summary.get("accuracy_best"), run.summary.get("accuracy_after")
    if best and after and best["value"] > after["high"]:
        return f"{_share(best['value'])} at step {best['step']}, {_share(after['value'])} at the end"
    return None


def overfitting(run: History) -> str | None:
    after, right = run.summary.get("accuracy_after"), run.last("answers/right")
    if after and right > after["high"] + 0.1:
        return f"{_share(right)} right in training, {_share(after['value'])} on problems never trained on"
    return None


def uncertain(run: History) -> str | None:
    before, after = run.summary.get("accuracy_before"), run.summary.get("accuracy_after")
    if not before or not after or abs(after["value"] - before["value"]) < 0.02:
        return None
    if before["high"] < after["low"] or after["high"] < before["low"]:
        return None
    change = 100 * (after["value"] - before["value"])
    return f"a change of {change:+.1f} points on {after['n']} problems: the intervals overlap"


def gap(run: History) -> str | None:
    gaps = run.column("sampling/logp_gap")
    if _dtype(run) in ("float32", "float64"):
        largest = float(np.nanmax(gaps, initial=0.0))
        return f"a token's log-probability differed by {largest:.2g} nats" if largest > 1e-3 else None
    # In half precision rounding alone moves some unlikely token of a step by tenths, now and then by a nat.
    if not np.isfinite(gaps).any() or (usual := float(np.nanmedian(gaps))) <= 0.5:
        return None
    return f"in half of the steps a token's log-probability differed by {usual:.2g} nats or more"


def _dtype(run: History) -> str:
    # That of the base model as the run recorded it, else as its settings say.
    return (run.dtype or run.settings.model.dtype).removeprefix("torch.")


def mispredicted(run: History) -> str | None:
    predicted, measured = run.summary.get("predicted_peak_bytes"), run.summary.get("peak_memory_bytes")
    if not predicted or not measured or 0.3 <= measured / predicted <= 1.1:
        return None
    # What libraries take in a process varies by as much, whatever the model; it says nothing about the plan.
    if 0 < measured - predicted < 2**28:
        return None
    return f"{measured / 2**30:.2f} GiB were used and {predicted / 2**30:.2f} predicted"


def _share(share: float) -> str:
    return f"{100 * share:.0f} %" if 0.01 <= share <= 0.99 or share in (0, 1) else f"{100 * share:.1f} %"
