"""How far to trust the members' disagreement: scaled on kernels that they never saw."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from sims.base import Spread, TrainingRows, centre
from sims.metrics import pairwise_accuracy


def calibrate(
    members: np.ndarray, rows: TrainingRows, counts: np.ndarray, level: float, reference: np.ndarray | float = 0.0
) -> tuple[Spread, float]:
    """The spread, scaled on kernels that at least two members never saw, and their pairwise accuracy there (NaN: none).

    members [M, N] log2 times of the rows, counts [M, K] how often a member drew a kernel, reference [M, N] from what a
    member's disagreement will be measured (0: from the mean of its kernel).
    scale = quantile_level(|error| / std) / z: then `level` of these rows lie within mean +- z * std.
    """
    centred = centre(members, rows.kernel)
    apart = centred if np.isscalar(reference) else members - reference
    unseen = (counts == 0)[:, rows.kernel]  # [M, N]
    usable = unseen.sum(axis=0) >= 2
    if not usable.any():
        return Spread(), float("nan")
    mean = np.ma.masked_array(centred, ~unseen)[:, usable].mean(axis=0).filled(0.0)
    variance = np.ma.masked_array(apart, ~unseen)[:, usable].var(axis=0, ddof=1).filled(0.0)
    truth, kernel = centre(rows.target, rows.kernel)[usable], rows.kernel[usable]
    typical = Spread(typical=float(variance.mean()))
    scale = scale_of(truth - mean, typical(variance, unseen.sum(axis=0)[usable]), level)
    return Spread(scale, typical.typical), pairwise_accuracy(mean, truth, kernel)


def scale_of(error: np.ndarray, std: np.ndarray, level: float) -> float:
    """The factor on std [N] for which a fraction `level` of the errors [N] lies within z standard deviations."""
    ratio = np.quantile(np.abs(error) / np.maximum(std, 1e-6), level)
    return float(ratio / NormalDist().inv_cdf(0.5 + level / 2))
