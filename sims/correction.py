"""What trials say about schedules that were not measured: a Gaussian process on what a simulator got wrong.

Trials of a kernel correct what is believed of its other schedules, and so, less, do those of kernels like it: the kernels of a
program are often alike, and all of them run on a device that the simulator may never have seen. How alike two schedules are
the simulator's trees say: by the share of them in which both come to the same leaf (Breiman 2001, proximities). These trees
have learned which differences matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sims.base import SimulatorError, centre


@dataclass(frozen=True)
class CorrectionConfig:
    """Chosen on kernels of a network that is in no benchmark, and on validation kernels."""

    scale: float = 1.0  # log2 units: how wrong a simulator is from schedule to schedule
    level: float = 3.0  # log2 units: and about a kernel as a whole
    noise: float = 0.3  # log2 units: of one trial, and of what no tree tells apart
    near: float = 0.2  # distance over which what one kernel says of another falls to 1/e

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise SimulatorError(f"CorrectionConfig.{name} must be above 0, got {value}")


def alike(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The share of trees in which two schedules come to the same leaf: leaves [L, T] and [R, T] -> [L, R]."""
    other = np.ascontiguousarray(right.T)  # [T, R]: sums over trees are then of whole rows, three times as fast
    return np.stack([(row[:, None] == other).sum(0, dtype=np.uint16) for row in left]) / left.shape[1]


def correction(leaves: np.ndarray, kernel: np.ndarray, residual: np.ndarray, asked: np.ndarray, distance: np.ndarray,
               config: CorrectionConfig = CorrectionConfig()) -> np.ndarray:  # fmt: skip
    """What to add to the predictions [N, M] of M predictors for schedules of kernel 0, whose leaves are asked [N, T].

    Of K trials: leaves [K, T], kernel [K] (0 up to G - 1), and residual [K, M], measured less predicted log2 time; those that
    failed are NaN, and left out. distance [G, G] between the kernels. residual ~ GP(0, k) (Rasmussen & Williams 2006,
    algorithm 2.1):

        k((i, x), (j, y)) = scale^2 alike(x, y) exp(-distance_ij / near) + [i = j] level^2

    Raises SimulatorError for arrays that do not fit each other."""
    K, N = len(leaves), len(asked)
    if residual.ndim != 2 or len(residual) != K or len(kernel) != K or asked.shape[1:] != leaves.shape[1:]:
        raise SimulatorError(
            f"leaves {list(leaves.shape)}, kernels {list(kernel.shape)}, residuals {list(residual.shape)} and asked "
            f"{list(asked.shape)} do not fit each other"
        )
    if kernel.size and not (kernel.min() >= 0 and kernel.max() < len(distance)):
        raise SimulatorError(f"a trial's kernel is none of the {len(distance)} whose distances are known")
    timed = np.isfinite(residual).all(axis=1)
    if not timed.any():
        return np.zeros((N, residual.shape[1]))
    leaves, kernel, residual = leaves[timed], kernel[timed], residual[timed]
    wrong = centre(residual.T, kernel).T  # [K, M]
    own, near = kernel == 0, np.exp(-distance / config.near)
    covariance = config.scale**2 * alike(leaves, leaves) * near[kernel][:, kernel]
    covariance += config.level**2 * (kernel[:, None] == kernel) + config.noise**2 * np.eye(len(kernel))
    cross = config.scale**2 * alike(leaves, asked) * near[kernel, 0][:, None] + config.level**2 * own[:, None]  # [K, N]
    level = residual[own].mean(axis=0) if own.any() else 0.0
    return level + cross.T @ np.linalg.solve(covariance, wrong)
