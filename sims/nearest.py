"""The control: predict the mean of the most alike schedules seen in training. Whoever cannot beat this has
learned nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sims.base import Scaling, SimulatorError, TrainingRows, centre, check_features, check_state

_CHUNK = 256  # queries compared at a time: bounds memory at CHUNK * N distances


@dataclass(frozen=True)
class NearestConfig:
    neighbours: int = 5  # rows averaged: enough to damp timer noise, few enough to stay local
    clip: float = 5.0  # standard deviations: as in the ensemble, so that both see the same numbers


class NearestNeighbour:
    """k nearest rows by Euclidean distance of standardised features; same contract as `Ensemble`."""

    def __init__(self, input_dim: int, config: NearestConfig = NearestConfig()):
        if input_dim < 1 or config.neighbours < 1:
            raise SimulatorError(f"need input_dim >= 1 and neighbours >= 1, got {input_dim} and {config.neighbours}")
        self.input_dim, self.config = input_dim, config
        self._rows: tuple[Scaling, np.ndarray, np.ndarray] | None = None  # scaling, z [N, D], target [N]

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
        """Keep the rows: features [N, D], log_time [N] log2 seconds, group [N]. `unit`, `steps` and
        `deadline` are not needed.
        """
        rows = TrainingRows.build(features, log_time, group, self.input_dim)
        scaling = Scaling.measure(rows.features, self.config.clip)
        self._rows = (scaling, scaling(rows.features), rows.target)
        return {
            "rows": float(len(rows.target)),
            "kernels": float(rows.kernels),
            "dropped": float(rows.dropped),
        }

    def predict(self, features: np.ndarray, group: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """features [N, D] -> mean [N], standard deviation [N] of the neighbours' centred log2 times, float32.

        With `group` [N] the means are centred per kernel.
        """
        if self._rows is None:
            raise SimulatorError("predict before fit: the simulator has learned nothing yet")
        scaling, known, target = self._rows
        queries = scaling(check_features(features, self.input_dim))
        count = min(self.config.neighbours, len(known))
        mean, std = np.zeros(len(queries), np.float32), np.zeros(len(queries), np.float32)
        for at in range(0, len(queries), _CHUNK):
            part = queries[at : at + _CHUNK]
            distance = (known * known).sum(axis=1) - 2.0 * part @ known.T  # |q|^2 is the same for all rows
            near = target[np.argpartition(distance, count - 1, axis=1)[:, :count]]
            mean[at : at + _CHUNK], std[at : at + _CHUNK] = near.mean(axis=1), near.std(axis=1)
        return (mean if group is None else centre(mean, group).astype(np.float32)), std

    def state(self) -> dict[str, np.ndarray]:
        """The rows, and how they were scaled."""
        if self._rows is None:
            raise SimulatorError("state before fit: the simulator has learned nothing yet")
        scaling, known, target = self._rows
        return {"mean": scaling.mean, "inverse": scaling.inverse, "known": known.copy(), "target": target.copy()}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state()` gave, or raise a SimulatorError and change nothing."""
        N, D = len(state.get("target", ())), self.input_dim
        arrays = check_state(state, {"mean": (D,), "inverse": (D,), "known": (N, D), "target": (N,)})
        scaling = Scaling(arrays["mean"], arrays["inverse"], self.config.clip)
        self._rows = scaling, arrays["known"], arrays["target"]
