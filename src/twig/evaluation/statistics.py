"""Statistics of evaluations: intervals, pass@k, the majority's answer, McNemar's test.

Numpy and plain Python: knows nothing of models or tasks.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
_RESAMPLES = 2000


def wilson(right: int, n: int) -> tuple[float, float]:
    """Returns the 95 % Wilson score interval of `right` successes in `n` trials.

    >>> [round(x, 4) for x in wilson(8, 10)]
    [0.4902, 0.9433]
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return (0.0 if right == 0 else centre - half), (1.0 if right == n else centre + half)


def pass_at_k(right: int, n: int, k: int) -> float:
    """Estimates the chance that one of `k` answers is right, without bias, from `right` of `n` answers.

    1 - C(n - right, k) / C(n, k), as a product. https://arxiv.org/abs/2107.03374, section 2.1.

    >>> round(pass_at_k(1, 4, 2), 12)
    0.5
    """
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, not from 1 to {n}")
    if n - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - right + 1, n + 1))


def majority(answers: Sequence[str | None]) -> str | None:
    """Returns the most frequent answer; of equally frequent ones the first; None does not vote.

    >>> majority(["7", None, "12", "12", "7"])
    '7'
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__) if votes else None


def bootstrap(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of `values` [problems], by resampling problems."""
    draw = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.quantile(values[draw].mean(1), [0.025, 0.975])
    return float(low), float(high)


def bootstrap_runs(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of `values` [runs, problems], by resampling runs and problems."""
    return _interval(_resampled([values], seed)[0])


def bootstrap_gap(first: np.ndarray, second: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of `first` minus that of `second`, each [runs, problems].

    The problems are the same and are resampled for both together, the runs of each separately.
    """
    ours, theirs = _resampled([first, second], seed)
    return _interval(ours - theirs)


def _resampled(samples: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Returns the mean of each sample [runs, problems] in every resample; all share the problems drawn."""
    rng, problems = np.random.default_rng(seed), samples[0].shape[1]
    drawn = rng.multinomial(problems, np.full(problems, 1 / problems), _RESAMPLES)
    means = []
    for sample in samples:
        runs = rng.multinomial(len(sample), np.full(len(sample), 1 / len(sample)), _RESAMPLES)
        means.append(((runs @ sample) * drawn).sum(1) / sample.size)
    return means


def _interval(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def permutation(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the exact two-sided p value of the difference of two means, by permutation.

    It is the share of all ways to divide the values between the samples whose difference is at least as
    large. With 5 values against 5 it is at least 2 / 252.

    >>> permutation([1.0, 2.0], [3.0, 4.0])
    0.3333333333333333
    """
    values = [*first, *second]
    total, size = math.fsum(values), len(first)
    other = len(values) - size
    observed = abs(math.fsum(first) / size - math.fsum(second) / other)
    gaps = [
        abs(math.fsum(part) / size - (total - math.fsum(part)) / other)
        for part in itertools.combinations(values, size)
    ]
    return sum(gap >= observed - 1e-12 for gap in gaps) / len(gaps)


@dataclass(frozen=True)
class Comparison:
    """Two evaluations on the same `n` problems.

    `difference` is in accuracy (first minus second), with its 95 % interval by resampling problems;
    `only_first` and `only_second` count the problems that only one got right. `p_value` is the exact
    two-sided one of McNemar's test: how likely so uneven a split of these problems is if both are equally
    good.
    """

    n: int
    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    p_value: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def mcnemar(first: np.ndarray, second: np.ndarray) -> Comparison:
    """Compares two evaluations, each [problems] of bool, on the same problems.

    >>> mcnemar(np.array([1, 1, 1, 1, 1, 0], bool), np.array([0, 0, 0, 0, 0, 0], bool)).p_value
    0.0625
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    apart = only_first + only_second
    tail = sum(math.comb(apart, i) for i in range(min(only_first, only_second) + 1))
    gaps = first.astype(float) - second.astype(float)
    # the two tails of the binomial with 1/2; if they overlap, their sum exceeds 1
    p_value = min(1.0, 2 * tail / 2**apart)
    return Comparison(len(first), float(gaps.mean()), *bootstrap(gaps), only_first, only_second, p_value)
