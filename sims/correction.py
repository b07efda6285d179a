"""What trials say about schedules that were not measured: a Gaussian process on what a simulator got wrong.

Trials of a kernel correct what is believed of its other schedules, and so, less, do those of kernels like it: the kernels of a
program are often alike, and all of them run on a device that the simulator may never have seen. How alike two schedules are
the simulator's trees say: by the share of them in which both come to the same leaf (Breiman 2001, proximities). These trees
have learned which differences matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agents.checks import check_positive
from sims.base import SimulatorError, centre


@dataclass(frozen=True)
class CorrectionConfig:
    """Chosen on kernels of a network that is in no benchmark, and on validation kernels."""

    scale: float = 1.0  # log2 units: how wrong a simulator is from schedule to schedule
    level: float = 3.0  # log2 units: and about a kernel as a whole
    noise: float = 0.3  # log2 units: of one trial, and of what no tree tells apart
    near: float = 0.2  # distance over which what one kernel says of another falls to 1/e

    def __post_init__(self) -> None:
        check_positive(self, *vars(self), error=SimulatorError)


def alike(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The share of trees in which two schedules come to the same leaf: leaves [L, T] and [R, T] -> [L, R]."""
    other = np.ascontiguousarray(right.T)  # [T, R]: sums over trees are then of whole rows, three times as fast
    return np.stack([(row[:, None] == other).sum(0, dtype=np.uint16) for row in left]) / left.shape[1]


class Correction:
    """A Gaussian process on the residuals of M predictors, measured less predicted log2 time, each less the mean of its kernel
    (Rasmussen & Williams 2006, algorithm 2.1); that of a kernel without trials counts as 0:

        residual - mean ~ GP(0, k),  k((i, x), (j, y)) = scale^2 alike(x, y) exp(-distance_ij / near) + [i = j] level^2
    """

    def __init__(self, leaves: np.ndarray, kernel: np.ndarray, residual: np.ndarray, distance: np.ndarray,
                 config: CorrectionConfig = CorrectionConfig()):  # fmt: skip
        """Of K trials: leaves [K, T], kernel [K] (0 up to G - 1), and residual [K, M]; those that failed are NaN, and left out.
        distance [G, G] between the kernels. Raises SimulatorError for arrays that do not fit each other."""
        if residual.ndim != 2 or not len(leaves) == len(kernel) == len(residual):
            raise SimulatorError(
                f"leaves {list(leaves.shape)}, kernels {list(kernel.shape)} and residuals {list(residual.shape)} do not fit "
                "each other"
            )
        if kernel.size and not (kernel.min() >= 0 and kernel.max() < len(distance)):
            raise SimulatorError(f"a trial's kernel is none of the {len(distance)} whose distances are known")
        timed = np.isfinite(residual).all(axis=1)
        self.leaves, self.kernel, self.residual, self.config = leaves[timed], kernel[timed], residual[timed], config
        self.near = np.exp(-distance / config.near)
        if timed.any():
            wrong = centre(self.residual.T, self.kernel).T  # [K, M]
            covariance = config.scale**2 * alike(self.leaves, self.leaves) * self.near[self.kernel][:, self.kernel]
            same = self.kernel[:, None] == self.kernel
            covariance += config.level**2 * same + config.noise**2 * np.eye(len(same))
            self.weights = np.linalg.solve(covariance, wrong)  # [K, M]
            # mean of each kernel's residuals [G, M], 0 where there are none
            self.levels = np.zeros((len(distance), residual.shape[1]))
            for own in np.unique(self.kernel):
                self.levels[own] = self.residual[self.kernel == own].mean(axis=0)

    def __call__(self, asked: np.ndarray, kernel: int | np.ndarray = 0) -> np.ndarray:
        """What to add to the predictions [N, M] for schedules whose leaves are asked [N, T]: of one of the kernels, or of the one named
        for each [N]. Raises SimulatorError for leaves of other trees."""
        if asked.shape[1:] != self.leaves.shape[1:]:
            raise SimulatorError(
                f"asked {list(asked.shape)} and leaves {list(self.leaves.shape)} do not fit each other"
            )
        if not len(self.kernel):
            return np.zeros((len(asked), self.residual.shape[1]))
        of, config = np.atleast_1d(kernel), self.config  # [N] or [1]
        own = self.kernel[:, None] == of  # [K, N]
        cross = config.scale**2 * alike(self.leaves, asked) * self.near[self.kernel][:, of] + config.level**2 * own
        return self.levels[of] + cross.T @ self.weights
