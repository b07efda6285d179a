"""The linear simulator: summaries projected to a few numbers, and everything else ridge regression in closed form.

Fits in about a second. What it cannot say, a larger simulator must earn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sims.base import Scaling, SimulatorError, centre, check_state
from sims.flat import Arrays, StateSimulator
from sims.metrics import pairwise_accuracy
from sims.paths import Paths, Points, Widths
from sims.ridge import principal, ridge


@dataclass(frozen=True)
class LinearConfig:
    size: int = 64  # E: principal components kept of the scaled summary; partial least squares did no better
    products: int = 24  # of the leading ones, all products help to tell the time: interactions, such as tile x stride
    anchor: float = 0.3  # how much of a kernel's mean is left when it is centred: little, for it is never compared
    clip: float = 5.0  # standard deviations: unseen extremes must not explode

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.products <= self.size or not self.clip > 0:
            raise SimulatorError(f"need size >= 1, 0 <= products <= size and clip > 0, got {self}")


class Linear(StateSimulator):
    """z = V' scaled(summary), V the principal axes; time = w . [z, z_i z_j]; next z by `ridge.Dynamics`."""

    def __init__(self, widths: Widths, config: LinearConfig = LinearConfig()):
        super().__init__(widths, config.size)
        self.config = config
        self._own: Arrays = {}
        self._pairs = np.triu_indices(config.products)

    def _fit_encoder(self, states: np.ndarray) -> None:
        scaling = Scaling.measure(states, self.config.clip)
        mean, axes = principal(scaling(states), self.config.size)
        self._own = {"mean": scaling.mean, "inverse": scaling.inverse, "origin": mean, "axes": axes}

    def _learn(
        self, paths: Paths, points: Points, steps: int | None, deadline: Callable[[], bool] | None
    ) -> dict[str, float]:
        """Time is regressed on both sides centred per kernel: what no schedule changes explains nothing."""
        began, rows = time.perf_counter(), points.rows
        terms = self._terms(self._encode(rows.features))
        middle = terms.mean(axis=0)
        within, target = self._within(terms - middle, rows.kernel), centre(rows.target, rows.kernel)
        weights, error = ridge(within, target[:, None], rows.unit[rows.kernel])
        fitted = within @ weights[:, 0]
        bias = rows.target.mean() - middle @ weights[:, 0]
        self._own |= {"weights": np.append(weights[:, 0], bias), "spread": np.array([np.sqrt(error)])}
        return {
            "seconds": time.perf_counter() - began,
            "rows": float(len(target)),
            "kernels": float(rows.kernels),
            "dropped": float(rows.dropped),
            "pairwise": pairwise_accuracy(fitted, target, rows.kernel),
        }

    def _within(self, terms: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        """Centred per kernel, but for a part `anchor` of the kernel's mean [N, D]."""
        within = centre(terms.T, kernel).T
        return within + self.config.anchor * (terms - within)

    def _encode(self, states: np.ndarray) -> np.ndarray:
        own = self._own
        scaled = Scaling(own["mean"], own["inverse"], self.config.clip)(states)
        return ((scaled - own["origin"]) @ own["axes"]).astype(np.float32)

    def _terms(self, z: np.ndarray) -> np.ndarray:
        """[N, E] -> [N, E + products (products + 1) / 2]."""
        i, j = self._pairs
        return np.concatenate([z, z[:, i] * z[:, j]], axis=1).astype(np.float64)

    def _time(self, embedding: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights = self._own["weights"]
        return self._terms(embedding) @ weights[:-1] + weights[-1], np.full(len(embedding), self._own["spread"][0])

    def _own_state(self) -> Arrays:
        return {f"own.{name}": array.copy() for name, array in self._own.items()}

    def _load_own(self, state: Arrays) -> None:
        S, E = self.widths.state, self.size
        shapes: dict[str, tuple[int, ...]] = {"mean": (S,), "inverse": (S,), "origin": (S,), "axes": (S, E),
                                              "weights": (E + len(self._pairs[0]) + 1,), "spread": (1,)}  # fmt: skip
        own = check_state(state, {f"own.{name}": shape for name, shape in shapes.items()})
        self._own = {name: own[f"own.{name}"] for name in shapes}
