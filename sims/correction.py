"""What the trials of a kernel so far say about its other schedules: a Gaussian process on what a simulator got wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sims.base import Scaling, SimulatorError, check_features


@dataclass(frozen=True)
class CorrectionConfig:
    length: float = 1.0  # distance over which a trial speaks for its neighbours: root mean square of scaled differences
    scale: float = 0.5  # log2 units: how wrong a simulator is from schedule to schedule
    level: float = 3.0  # log2 units: and about the kernel as a whole
    noise: float = 0.1  # log2 units: of one measurement
    clip: float = 5.0  # standard deviations: of embeddings, against unseen extremes

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise SimulatorError(f"CorrectionConfig.{name} must be above 0, got {value}")


class Correction:
    """residual(z) ~ GP(0, k), k(z, z') = level^2 + scale^2 exp(-d^2 / (2 length^2)), d^2 the mean squared difference of
    scaled embeddings (Rasmussen & Williams 2006, algorithm 2.1). One for each kernel.
    """

    def __init__(self, reference: np.ndarray, config: CorrectionConfig = CorrectionConfig()):
        """reference [N, E]: embeddings of this kernel's schedules, such as all candidates; they set the scaling."""
        if np.ndim(reference) != 2 or len(reference) == 0:
            raise SimulatorError(f"reference embeddings must be [N, E] with N above 0, got {list(np.shape(reference))}")
        self.config = config
        self._width = np.shape(reference)[1]
        self._scaling = Scaling.measure(check_features(reference, self._width), config.clip)
        self._known = np.zeros((0, self._width), np.float32)
        self._residual: np.ndarray | None = None  # [K] or [K, M]

    def tell(self, embedding: np.ndarray, residual: np.ndarray) -> None:
        """Trials: embeddings [N, E], and measured less predicted log2 time [N], or [N, M] of M predictors; those that failed are
        NaN, and left out."""
        z, r = check_features(embedding, self._width), np.asarray(residual, np.float64)
        if r.ndim not in (1, 2) or len(r) != len(z):
            raise SimulatorError(
                f"{len(z)} embeddings need residuals of shape [{len(z)}] or [{len(z)}, M], got {list(r.shape)}"
            )
        timed = np.isfinite(r.reshape(len(z), -1)).all(axis=1)
        self._known = np.concatenate([self._known, self._scaling(z[timed])])
        self._residual = r[timed] if self._residual is None else np.concatenate([self._residual, r[timed]])

    def __call__(self, embedding: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What to add to the predictions of embeddings [N, E], [N] or [N, M] as it was told, and its standard deviation [N]."""
        z, c = self._scaling(check_features(embedding, self._width)), self.config
        prior = c.level**2 + c.scale**2
        if self._residual is None or not len(self._known):
            told = () if self._residual is None else self._residual.shape[1:]
            return np.zeros((len(z), *told)), np.full(len(z), np.sqrt(prior))
        covariance = self._kernel(self._known, self._known) + c.noise**2 * np.eye(len(self._known))
        lower = np.linalg.cholesky(covariance)
        half = np.linalg.solve(lower, self._kernel(self._known, z))  # [K, N]
        mean = half.T @ np.linalg.solve(lower, self._residual)
        return mean, np.sqrt(np.maximum(prior - (half * half).sum(axis=0), 0.0))

    def _kernel(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        distance = ((a * a).sum(1)[:, None] + (b * b).sum(1) - 2.0 * a @ b.T) / self._width
        c = self.config
        return c.level**2 + c.scale**2 * np.exp(-np.maximum(distance, 0.0) / (2.0 * c.length**2))
