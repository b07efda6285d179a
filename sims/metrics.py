"""How good is a simulator? Pure numpy. Each score is taken per kernel, then averaged over kernels
(macro-average).

Arguments, everywhere: `predicted` [N] and `measured` [N] are log2 times, `group` [N] names each row's kernel.
Predictions are relative: a constant per kernel may be added to them without changing any score. A kernel that
cannot be scored (one row, all times alike) is left out; when none can be scored the result is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from sims.base import PathSimulator, SimulatorError, per_group

if TYPE_CHECKING:
    from sims.paths import Paths


def pairwise_accuracy(predicted: np.ndarray, measured: np.ndarray, group: np.ndarray, gap: float = 0.10) -> float:
    """Of the pairs of one kernel whose times differ by more than `gap`, the fraction put in the right order.

    A tie in the prediction counts one half: a constant predictor scores 0.5.
    """
    least = math.log2(1.0 + gap)

    def score(p: np.ndarray, y: np.ndarray) -> float:
        slower = y[:, None] - y[None, :] > least
        return float((0.5 + 0.5 * np.sign(p[:, None] - p[None, :]))[slower].mean()) if slower.any() else math.nan

    return _macro(score, predicted, measured, group)


def spearman(
    predicted: np.ndarray,
    measured: np.ndarray,
    group: np.ndarray,
    average: Callable[[list[float]], float] = np.mean,
) -> float:
    """Pearson correlation of the ranks (ties get their mean rank); a constant prediction scores 0.

    `average` joins the kernels: np.mean, or np.median for the "median Spearman" of the literature.
    """

    def score(p: np.ndarray, y: np.ndarray) -> float:
        a, b = _ranks(p), _ranks(y)
        a, b = a - a.mean(), b - b.mean()
        if not b.any():
            return math.nan
        return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())) if a.any() else 0.0

    return _macro(score, predicted, measured, group, average)


def top_k(predicted: np.ndarray, measured: np.ndarray, group: np.ndarray, k: int) -> float:
    """Fastest time of the kernel / fastest time among the k schedules predicted fastest; 1 is perfect.

    Ties are taken against the simulator: among equal predictions the slowest schedules are chosen first.
    """
    if k < 1:
        raise SimulatorError(f"top_k needs k >= 1, got {k}")
    return _macro(lambda p, y: float(2.0 ** (y.min() - y[_choice(p, y)[:k]].min())), predicted, measured, group)


def coverage(
    predicted: np.ndarray, std: np.ndarray, measured: np.ndarray, group: np.ndarray, level: float = 0.80
) -> float:
    """Fraction of rows inside predicted +- z * std, z the two-sided normal quantile of `level` (1.2816 for
    0.80).

    Both sides are centred on the kernel's mean first, because predictions are relative.
    """
    z = NormalDist().inv_cdf(0.5 + level / 2)
    if np.shape(std) != np.shape(predicted):
        raise SimulatorError(f"std has shape {list(np.shape(std))}, predicted {list(np.shape(predicted))}")
    scores = []
    for rows, p, y in _kernels(predicted, measured, group):
        if len(rows) > 1:
            error = (y - y.mean()) - (p - p.mean())
            scores.append(float((np.abs(error) <= z * np.asarray(std, dtype=np.float64)[rows]).mean()))
    return float(np.mean(scores)) if scores else math.nan


def winners_optimism(predicted: np.ndarray, measured: np.ndarray, group: np.ndarray) -> float:
    """Mean of ln(measured / predicted) at the schedule predicted fastest, both relative to the kernel's mean
    log time.

    Above 0 the simulator promises more than the device keeps: the price of taking a minimum over noisy
    predictions.
    """

    def score(p: np.ndarray, y: np.ndarray) -> float:
        winner = _choice(p, y)[0]
        return float(math.log(2) * ((y[winner] - y.mean()) - (p[winner] - p.mean()))) if len(p) > 1 else math.nan

    return _macro(score, predicted, measured, group)


def mape(absolute: np.ndarray, measured: np.ndarray, group: np.ndarray) -> float:
    """Mean of |predicted / measured - 1| in seconds. The one score for which a kernel's level counts; `absolute` [N] are
    log2 seconds.
    """
    return _macro(lambda p, y: float(np.abs(2.0 ** (p - y) - 1.0).mean()), absolute, measured, group)


def roll_out_loss(simulator: PathSimulator, paths: Paths, depths: Sequence[int] = range(1, 9)) -> dict[int, float]:
    """For each depth d, how much Spearman is lost where the last d actions of a schedule are imagined: the score of
    predictions from the true last state, less that of predictions rolled out from the state d actions before.

    Of measured schedules with d actions or more; NaN where no kernel has two of them.
    """
    timed = paths.take(np.isfinite(paths.log_time[np.arange(len(paths)), paths.length]))
    losses: dict[int, float] = {}
    for depth in depths:
        deep = timed.take(timed.length >= depth)
        if not len(deep):
            losses[depth] = math.nan
            continue
        rows, start = np.arange(len(deep)), deep.length - depth
        measured = deep.log_time[rows, deep.length]
        embedding = simulator.embed(deep.cut(start))
        for step in range(depth):
            embedding = simulator.advance(embedding, deep.actions[rows, start + step])
        exact, latent = simulator.judge(simulator.embed(deep))[0], simulator.judge(embedding)[0]
        losses[depth] = spearman(exact, measured, deep.kernel) - spearman(latent, measured, deep.kernel)
    return losses


def noise_ceiling(sigma_true: float, sigma_noise: float) -> float:
    """The pairwise accuracy of a perfect model against noisy times: 1/2 + atan(sigma_true / sigma_noise) /
    pi.

    sigma_true: spread of the true log times of a kernel; sigma_noise: of one measurement (both normal, any
    log base). The sign of D + e agrees with the sign of D for independent normals with probability 1 -
    arccos(rho) / pi, rho their correlation (Sheppard 1899), which is this.
    """
    if sigma_true < 0 or sigma_noise < 0 or (sigma_true == 0 and sigma_noise == 0):
        raise SimulatorError(f"noise_ceiling needs sigmas >= 0, not both 0: got {sigma_true} and {sigma_noise}")
    return 0.5 + math.atan2(sigma_true, sigma_noise) / math.pi


def evaluate(predicted: np.ndarray, std: np.ndarray, measured: np.ndarray, group: np.ndarray) -> dict[str, float]:
    """All scores of one simulator on (held-out) kernels, by name."""
    return {
        "pairwise": pairwise_accuracy(predicted, measured, group),
        "spearman": spearman(predicted, measured, group),
        "spearman_median": spearman(predicted, measured, group, np.median),
        "top1": top_k(predicted, measured, group, 1),
        "top5": top_k(predicted, measured, group, 5),
        "coverage80": coverage(predicted, std, measured, group),
        "optimism": winners_optimism(predicted, measured, group),
    }


def _kernels(
    predicted: np.ndarray, measured: np.ndarray, group: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Check the arrays, then yield (rows, predicted, measured) of each kernel, float64."""
    p, y, g = np.asarray(predicted, np.float64), np.asarray(measured, np.float64), np.asarray(group)
    if not (p.ndim == 1 and p.shape == y.shape == g.shape):
        raise SimulatorError(f"predicted, measured and group must be [N] alike: got {p.shape}, {y.shape}, {g.shape}")
    if not (np.isfinite(p).all() and np.isfinite(y).all()):
        raise SimulatorError("predicted and measured must be finite: leave failed trials out")
    for rows in per_group(g):
        yield rows, p[rows], y[rows]


def _macro(
    score: Callable[[np.ndarray, np.ndarray], float],
    predicted: np.ndarray,
    measured: np.ndarray,
    group: np.ndarray,
    average: Callable[[list[float]], float] = np.mean,
) -> float:
    scores = [score(p, y) for _, p, y in _kernels(predicted, measured, group)]
    scores = [s for s in scores if not math.isnan(s)]
    return float(average(scores)) if scores else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks 0..n-1, ties at their mean: [n] -> [n] float64."""
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[inverse]


def _choice(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rows from predicted fastest to slowest; equal predictions from measured slowest to fastest."""
    return np.lexsort((-y, p))
