"""Comparing what has noise: interquartile means with bootstrapped intervals, probabilities of improvement, and of chance.

Agarwal et al. 2021, Deep reinforcement learning at the edge of the statistical precipice. Scores are [seeds, tasks]: a row
is one training run, a column one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

REPETITIONS = 2000  # of a bootstrap
LEVEL = 0.95  # of its intervals
EXACT = 12  # differences of which all signs are tried


@dataclass(frozen=True)
class Estimate:
    """A statistic with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def iqm(scores: np.ndarray) -> float:
    """Mean of the middle half of all scores: what lies at the edge counts with the share of it that is inside."""
    ordered = np.sort(scores, axis=None)
    count = len(ordered)
    edges = np.arange(count + 1)
    inside = np.clip(np.minimum(edges[1:], 0.75 * count) - np.maximum(edges[:-1], 0.25 * count), 0, 1)
    return float((inside * ordered).sum() / inside.sum())


def improvement(x: np.ndarray, y: np.ndarray) -> float:
    """Mean over tasks of P(a run of x scores higher than one of y), ties count half (Mann and Whitney 1947).

    x [N, tasks], y [M, tasks].
    """
    difference = x[:, None] - y[None]  # [N, M, tasks]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def chance(differences: np.ndarray) -> float:
    """P that the mean of paired differences [N] is as high as it is where each might as well have had the other sign (Fisher 1935,
    the paired randomisation test): of all 2^N signs, or of REPETITIONS draws where they are many. Exact for few pairs, of which
    a percentile bootstrap's interval is too narrow. Raises ValueError where there are none."""
    if not (count := len(differences)):
        raise ValueError("no differences: there is nothing to compare")
    if count <= EXACT:
        signs = 1 - 2 * ((np.arange(1 << count)[:, None] >> np.arange(count)) & 1)  # [2^N, N]
    else:
        signs = np.random.default_rng(0).choice((-1, 1), (REPETITIONS, count))
        signs[0] = 1  # as they are: one of all
    means = (signs * np.abs(differences)).mean(1)
    return float((means >= differences.mean() - 1e-12).mean())


def bootstrap(statistic: Callable[..., float], *scores: np.ndarray, seed: int = 0) -> Estimate:
    """The statistic with a percentile interval of LEVEL, runs and tasks drawn anew with replacement.

    Tasks are drawn for all of `scores` alike, since the same kernels were given to all; runs for each apart. Raises
    ValueError where the numbers of tasks differ.
    """
    tasks = {s.shape[1] for s in scores}
    if len(tasks) != 1 or 0 in tasks:
        raise ValueError(f"scores of {sorted(tasks)} tasks cannot be compared")
    rng, n = np.random.default_rng(seed), tasks.pop()
    values = []
    for _ in range(REPETITIONS):
        columns = rng.integers(n, size=n)
        values.append(statistic(*[s[rng.integers(len(s), size=len(s))][:, columns] for s in scores]))
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(statistic(*scores), float(low), float(high))
