"""What simulators share that judge a prefix by its summary alone: dynamics, level, and what is within reach.

A subclass says what the embedding of a summary is and how fast a schedule there. The rest is regression in closed form:
the next embedding (`ridge.Dynamics`), the level of a kernel from its root, the best time within reach.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sims.base import Prediction, Scaling, Simulator, SimulatorError, check_features, check_state
from sims.paths import Paths, Points, Widths, check_widths
from sims.ridge import Dynamics, ridge

CLIP = 5.0  # standard deviations: unseen extremes must not explode
PRODUCTS = (16, 12)  # leading components of embedding and action whose products the dynamics may use
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Affine:
    """y = w . scaled(x) + b, by ridge regression."""

    mean: np.ndarray  # [D]
    inverse: np.ndarray  # [D] 1 / standard deviation
    weights: np.ndarray  # [D + 1]

    @staticmethod
    def fit(x: np.ndarray, y: np.ndarray, group: np.ndarray) -> Affine:
        """x [N, D], y [N], group [N] 0..K-1."""
        scaling = Scaling.measure(x, CLIP)
        z = scaling(x).astype(np.float64)
        w = ridge(z - z.mean(axis=0), (y - y.mean())[:, None], group)[0][:, 0]
        return Affine(scaling.mean, scaling.inverse, np.append(w, y.mean() - z.mean(axis=0) @ w))

    @staticmethod
    def shapes(D: int) -> dict[str, tuple[int, ...]]:
        return {"mean": (D,), "inverse": (D,), "weights": (D + 1,)}

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return Scaling(self.mean, self.inverse, CLIP)(x) @ self.weights[:-1] + self.weights[-1]


def offset_of(points: Points, relative: np.ndarray) -> np.ndarray:
    """By how much predictions of the points [P] lie above their targets in each kernel [K]: they are comparable within one only."""
    rows = points.rows
    return np.bincount(rows.kernel, relative - rows.target) / rows.sizes


def fit_level(paths: Paths, points: Points, relative: np.ndarray) -> Affine:
    """From the root's summary to what must be added to predictions of the points [P] so that they are absolute: a constant
    that they have in each kernel is the level's to mend.
    """
    rows = points.rows
    level = points.level - offset_of(points, relative)
    return Affine.fit(paths.states[points.path[rows.start[:-1]], 0], level, rows.unit)


def transitions(paths: Paths) -> tuple[np.ndarray, np.ndarray]:
    """(path [T], step [T]): each distinct step once; step t leads from prefix t to t + 1."""
    children = np.where(paths.reached, paths.prefixes(), -1)[:, 1:]
    at = np.flatnonzero(children >= 0)
    at = at[np.unique(children.reshape(-1)[at], return_index=True)[1]]
    return at // children.shape[1], at % children.shape[1]


class StateSimulator:
    """A path simulator whose embedding [E] is a function of the summary [S]."""

    def __init__(self, widths: Widths, size: int):
        if min(widths) < 1:
            raise SimulatorError(f"every width must be at least 1, got {widths}")
        self.widths, self.size = widths, size
        self._parts: dict[str, Affine | Dynamics] = {}

    # *** what a subclass says ***

    def _fit_encoder(self, states: np.ndarray) -> None:
        """Measure what `_encode` needs, from the summaries [P, S] of the measured prefixes."""

    def _learn(
        self, paths: Paths, points: Points, steps: int | None, deadline: Callable[[], bool] | None
    ) -> dict[str, float]:
        """Learn times; encoder and dynamics are there already."""
        raise NotImplementedError

    def _encode(self, states: np.ndarray) -> np.ndarray:
        """Summaries [N, S] -> embeddings [N, E]."""
        return states

    def _time(self, embedding: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings [N, E] -> relative log2 time [N] and its standard deviation [N]."""
        raise NotImplementedError

    def _own_state(self) -> Arrays:
        raise NotImplementedError

    def _load_own(self, state: Arrays) -> None:
        raise NotImplementedError

    # *** the contract of sims.base.PathSimulator ***

    def fit(
        self, paths: Paths, *, steps: int | None = None, deadline: Callable[[], bool] | None = None
    ) -> dict[str, float]:
        """Learn from the measured prefixes; returns training metrics. What was learned before stays where it raises."""
        before = vars(self).copy()
        try:
            return self._fit(paths, steps, deadline)
        except SimulatorError:
            vars(self).update(before)
            raise

    def _fit(self, paths: Paths, steps: int | None, deadline: Callable[[], bool] | None) -> dict[str, float]:
        points = Points.build(paths, self.widths)
        rows, (row, step) = points.rows, transitions(paths)
        self._fit_encoder(rows.features)
        before, after = (self._encode(paths.states[row, step + i]) for i in range(2))
        dynamics = Dynamics.fit(before, paths.actions[row, step], after, paths.units[paths.kernel[row]], *PRODUCTS)
        self._parts = {"dynamics": dynamics}
        metrics = self._learn(paths, points, steps, deadline)
        path, at = np.nonzero(np.isfinite(points.reach))
        below, relative = self._encode(paths.states[points.path[path], at]), self._time(self._encode(rows.features))[0]
        reach = points.reach[path, at] + offset_of(points, relative)[rows.kernel[path]]  # on the scale of `relative`
        self._parts |= {
            "level": fit_level(paths, points, relative),
            "reach": Affine.fit(below, reach, rows.unit[rows.kernel[path]]),
        }
        return metrics

    def predict(self, paths: Paths) -> Prediction:
        """Every prefix, from its true summary."""
        self._check_fitted()
        check_widths(paths, self.widths)
        reached = paths.reached
        found = self._judge(self._encode(paths.states[reached]))
        relative, reachable, spread = (np.full(reached.shape, np.nan, np.float32) for _ in range(3))
        relative[reached], reachable[reached], spread[reached] = found
        level = self._parts["level"](paths.states[:, 0])  # type: ignore[call-arg]
        return Prediction(relative, (relative + level[:, None]).astype(np.float32), spread, reachable)

    def embed(self, paths: Paths) -> np.ndarray:
        self._check_fitted()
        check_widths(paths, self.widths)
        return self._encode(paths.ends).astype(np.float32)

    def advance(self, embedding: np.ndarray, action: np.ndarray) -> np.ndarray:
        self._check_fitted()
        z, a = check_features(embedding, self.size), check_features(action, self.widths.action)
        return self._parts["dynamics"](z, a)  # type: ignore[call-arg]

    def judge(self, embedding: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._check_fitted()
        return self._judge(check_features(embedding, self.size))

    def state(self) -> Arrays:
        self._check_fitted()
        shared = {f"{name}.{key}": np.array(value) for name, p in self._parts.items() for key, value in vars(p).items()}
        return shared | self._own_state()

    def load_state(self, state: Arrays) -> None:
        E = self.size
        shapes: dict[str, tuple[int, ...]] = {}
        for name, part in {"dynamics": Dynamics.shapes(E, self.widths.action, *PRODUCTS),
                           "level": Affine.shapes(self.widths.state), "reach": Affine.shapes(E)}.items():  # fmt: skip
            shapes |= {f"{name}.{key}": shape for key, shape in part.items()}
        shared = check_state({k: v for k, v in state.items() if k in shapes}, shapes)
        self._load_own({k: v for k, v in state.items() if k not in shapes})
        self._parts = {
            name: kind(**{key: shared[f"{name}.{key}"] for key in kind.__dataclass_fields__})
            for name, kind in (("dynamics", Dynamics), ("level", Affine), ("reach", Affine))
        }

    def _judge(self, embedding: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(relative, reachable, spread). To stop here is within reach, so reachable is never above relative."""
        relative, spread = self._time(embedding)
        reachable = np.minimum(relative, self._parts["reach"](embedding))  # type: ignore[call-arg]
        return relative.astype(np.float32), reachable.astype(np.float32), spread.astype(np.float32)

    def _check_fitted(self) -> None:
        if "reach" not in self._parts:
            raise SimulatorError("used before fit: the simulator has learned nothing yet")


class Flat(StateSimulator):
    """A simulator of single summaries (`Committee`, `Ensemble`, `NearestNeighbour`, `Roofline`, `Trees`) as a simulator of paths."""

    def __init__(self, widths: Widths, simulator: Simulator):
        super().__init__(widths, widths.state)
        self.simulator = simulator

    def _learn(
        self, paths: Paths, points: Points, steps: int | None, deadline: Callable[[], bool] | None
    ) -> dict[str, float]:
        rows = points.rows
        log_time = rows.target + points.level[rows.kernel]
        unit = rows.unit[rows.kernel]
        return self.simulator.fit(rows.features, log_time, rows.kernel, unit=unit, steps=steps, deadline=deadline)

    def _time(self, embedding: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.simulator.predict(embedding)

    def _own_state(self) -> Arrays:
        return self.simulator.state()

    def _load_own(self, state: Arrays) -> None:
        self.simulator.load_state(state)
