"""What simulators of several members have in common: each is trained on its own bootstrap of kernels, and how far they disagree,
scaled on kernels that they never saw, is the spread."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from sims.base import SimulatorError, Spread, TrainingRows, centre
from sims.calibration import calibrate

Deadline = Callable[[], bool]


class Bagged:
    """A simulator of M members (see `sims.base.Simulator`). A kind of them says how they `learn` and `predict_members`."""

    def __init__(self, input_dim: int, level: float):
        """`level`: the spread is scaled so that this fraction of out-of-bag rows lies inside. Raises SimulatorError."""
        if input_dim < 1:
            raise SimulatorError(f"input_dim must be at least 1, got {input_dim}")
        self.input_dim, self.level = input_dim, level
        self._spread = Spread()

    def learn(
        self, rows: TrainingRows, steps: int | None, deadline: Deadline | None
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Train all members from scratch: how often each drew each kernel [M, K] int64, and what is to be told of it."""
        raise NotImplementedError

    def predict_members(self, features: np.ndarray) -> np.ndarray:
        """features [N, D] -> each member's prediction [M, N] float32."""
        raise NotImplementedError

    def fit(
        self,
        features: np.ndarray,
        log_time: np.ndarray,
        group: np.ndarray,
        *,
        unit: np.ndarray | None = None,
        steps: int | None = None,
        deadline: Deadline | None = None,
    ) -> dict[str, float]:
        """Train from scratch on features [N, D], log_time [N] (log2 seconds; not finite: a failed trial, left
        out), group [N] and unit [N] (see `sims.base.Simulator`). Stops after `steps`, or after the step at which `deadline()`
        turns true.

        Returns steps, seconds, rows, kernels, dropped, spread_scale, what members say of kernels they never saw: oob_pairwise
        (NaN when every kernel was seen by all), and what `learn` tells.
        """
        began = time.perf_counter()
        if steps is not None and steps < 1:
            raise SimulatorError(f"fit needs at least one step, got {steps}")
        rows = TrainingRows.build(features, log_time, group, self.input_dim, unit=unit)
        counts, told = self.learn(rows, steps, deadline)
        self._spread, out_of_bag = calibrate(self.predict_members(rows.features), rows, counts, self.level)
        return told | {
            "seconds": time.perf_counter() - began,
            "rows": float(len(rows.target)),
            "kernels": float(rows.kernels),
            "dropped": float(rows.dropped),
            "oob_pairwise": out_of_bag,
            "spread_scale": self._spread.scale,
        }

    def predict(self, features: np.ndarray, group: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """features [N, D] -> mean [N], std [N], float32: log2 time relative to the kernel, comparable within
        it only.

        std is the members' standard deviation times the scale found on out-of-bag kernels. With `group` [N]
        each member is centred per kernel first: disagreement about a kernel's level is then no uncertainty.
        """
        members = self.predict_members(features)
        if group is not None:
            members = centre(members, group).astype(np.float32)
        variance = members.var(axis=0, ddof=1) if len(members) > 1 else np.zeros(members.shape[1])
        return members.mean(axis=0), self._spread(variance, len(members)).astype(np.float32)

    def _spread_state(self) -> np.ndarray:
        return np.array([self._spread.scale, self._spread.typical])

    def _load_spread(self, array: np.ndarray) -> None:
        self._spread = Spread(*map(float, array))
