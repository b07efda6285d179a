"""A control with hardly anything learned: the roofline (Williams, Waterman & Patterson 2009).

log2 time = max over limits i of (c_i + sum of the columns of limit i): the flops over the peak rate, the bytes over the
bandwidth, the loads over what a core issues. Only the constants c_i are fitted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sims.base import SimulatorError, TrainingRows, check_features, check_state

Terms = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class RooflineConfig:
    terms: Terms  # for each limit, the columns of a summary whose sum is the log of its work
    unit: float = 8.0  # log2 units of one unit of a column
    rounds: int = 6  # of coordinate descent, each on a grid half as wide
    grid: int = 41  # values tried for each constant

    def __post_init__(self) -> None:
        if not self.terms or not all(self.terms) or self.rounds < 1 or self.grid < 3:
            raise SimulatorError(f"need terms, rounds >= 1 and grid >= 3, got {self}")


class Roofline:
    """Same contract as `Ensemble`; predictions are absolute, which is also comparable within a kernel."""

    def __init__(self, input_dim: int, config: RooflineConfig):
        if max(c for term in config.terms for c in term) >= input_dim:
            raise SimulatorError(f"a term names a column beyond the {input_dim} of a summary: {config.terms}")
        self.input_dim, self.config = input_dim, config
        self._constants: np.ndarray | None = None  # [limits]
        self._error = 0.0

    def fit(
        self,
        features: np.ndarray,
        log_time: np.ndarray,
        group: np.ndarray,
        *,
        unit: np.ndarray | None = None,
        steps: int | None = None,
        deadline: Callable[[], bool] | None = None,
    ) -> dict[str, float]:
        """The constants with the least mean absolute error, by coordinate descent. `unit`, `steps` and `deadline` are not needed."""
        rows = TrainingRows.build(features, log_time, group, self.input_dim)
        y, work = np.asarray(log_time, np.float64)[rows.index], self._work(rows.features)
        constants = np.median(y[:, None] - work, axis=0) - 1.0  # each alone would explain half of the rows
        width = 8.0
        for _ in range(self.config.rounds):
            for i in range(len(constants)):
                tried = constants[i] + np.linspace(-width, width, self.config.grid)
                others = np.delete(work + constants, i, axis=1).max(axis=1, initial=-np.inf)
                errors = [np.abs(np.maximum(others, work[:, i] + c) - y).mean() for c in tried]
                constants[i] = tried[int(np.argmin(errors))]
            width /= 2
        self._constants = constants
        self._error = float(np.abs(self.predict(rows.features)[0] - y).mean())
        return {
            "rows": float(len(y)),
            "kernels": float(rows.kernels),
            "dropped": float(rows.dropped),
            "error": self._error,
        }

    def predict(self, features: np.ndarray, group: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """features [N, D] -> log2 time [N], and as its deviation the mean error in training."""
        if self._constants is None:
            raise SimulatorError("predict before fit: the simulator has learned nothing yet")
        limits = self._work(check_features(features, self.input_dim)) + self._constants
        return limits.max(axis=1).astype(np.float32), np.full(len(limits), self._error, np.float32)

    def state(self) -> dict[str, np.ndarray]:
        if self._constants is None:
            raise SimulatorError("state before fit: the simulator has learned nothing yet")
        return {"constants": self._constants.copy(), "error": np.array([self._error])}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        arrays = check_state(state, {"constants": (len(self.config.terms),), "error": (1,)})
        self._constants, self._error = arrays["constants"], float(arrays["error"][0])

    def _work(self, features: np.ndarray) -> np.ndarray:
        """[N, limits] log2 of the work that each limit bounds."""
        return np.stack(
            [self.config.unit * features[:, list(t)].sum(axis=1, dtype=np.float64) for t in self.config.terms], 1
        )
