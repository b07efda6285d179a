"""What all simulators share: the contract, the typed error, checked training rows, feature scaling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:  # paths.py is built on this file
    from sims.paths import Paths

PRIOR_FREEDOM = 4  # as if five more members had shown the typical variance


class SimulatorError(ValueError):
    """The data or the saved state cannot be used; the message says why in one line."""


class Simulator(Protocol):
    """The contract of every simulator. Times are log2 seconds; predictions are comparable within one kernel
    only.
    """

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
        """Learn from features [N, D], log_time [N] and group [N], in which times can be compared: a kernel, on one device;
        returns training metrics. `unit` [N]: what must be held out together, the kernel whatever the device; the group
        where it is not given.
        """
        ...

    def predict(self, features: np.ndarray, group: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean [N] and spread [N], float32, of relative log2 time."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """All that was learned, as named arrays."""
        ...

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state()` gave. A SimulatorError (a name, a shape, a NaN) changes nothing."""
        ...


class Prediction(NamedTuple):
    """What a path simulator says of every prefix [N, L + 1] float32, log2 seconds; NaN beyond the end of a path."""

    relative: np.ndarray  # comparable within one kernel only
    absolute: np.ndarray
    spread: np.ndarray  # standard deviation of `relative`
    reachable: np.ndarray  # the best time that a schedule with this prefix may reach, on the scale of `relative`


class PathSimulator(Protocol):
    """The contract of every simulator of paths. It predicts every prefix of a schedule; and it can go on without the
    compiler, from the embedding of one prefix to that of the next.
    """

    def fit(
        self, paths: Paths, *, steps: int | None = None, deadline: Callable[[], bool] | None = None
    ) -> dict[str, float]:
        """Learn from the measured prefixes; returns training metrics."""
        ...

    def predict(self, paths: Paths) -> Prediction:
        """Every prefix, from its true summary; `log_time` is not looked at."""
        ...

    def embed(self, paths: Paths) -> np.ndarray:
        """[N, E] float32: where each path ends. `embed(paths.cut(0))` embeds the un-optimized kernels."""
        ...

    def advance(self, embedding: np.ndarray, action: np.ndarray) -> np.ndarray:
        """The embedding [N, E] after one more action [N, F]."""
        ...

    def judge(self, embedding: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(relative, reachable, spread), each [N], as in `Prediction`, of embeddings [N, E]."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """All that was learned, as named arrays."""
        ...

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state()` gave. A SimulatorError (a name, a shape, a NaN) changes nothing."""
        ...


def check_learned(losses: np.ndarray, *learned: np.ndarray) -> None:
    """Raises SimulatorError where a training has diverged: a loss, or a parameter that was learned, is no number. The last step's loss is
    of the parameters before it."""
    if not all(np.isfinite(a).all() for a in (losses, *learned)):
        raise SimulatorError(f"training diverged: losses {losses[-1].tolist()} at step {len(losses)}")


def check_state(state: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Copies of the arrays, or a SimulatorError: other names or shapes than `shapes`, or numbers that are none."""
    if set(state) != set(shapes):
        raise SimulatorError(f"state has the wrong names: {sorted(set(state) ^ set(shapes))} missing or too many")
    arrays = {name: np.array(state[name]) for name in shapes}
    for name, array in arrays.items():
        if array.shape != shapes[name]:
            raise SimulatorError(f"state '{name}' has shape {list(array.shape)}, need {list(shapes[name])}")
        if not np.isfinite(array).all():
            raise SimulatorError(f"state '{name}' holds NaN or infinity")
    return arrays


def check_features(features: np.ndarray, width: int) -> np.ndarray:
    """The features as float32 [N, width], or a SimulatorError."""
    array = np.asarray(features, dtype=np.float32)
    if array.ndim != 2 or array.shape[1] != width:
        raise SimulatorError(f"features must have shape [N, {width}], got {list(array.shape)}")
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        raise SimulatorError(
            f"features hold NaN or infinity in {int(bad.sum())} of {len(array)} rows, first at row {int(bad.argmax())}"
        )
    return array


def per_group(group: np.ndarray) -> list[np.ndarray]:
    """Row indices of each distinct group: a list of int arrays, groups in ascending order, rows in given
    order.
    """
    order = np.argsort(group, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if len(order) else []


@dataclass(frozen=True)
class TrainingRows:
    """Usable rows, sorted by kernel, inside a kernel from fast to slow. Build with `TrainingRows.build`."""

    features: np.ndarray  # [N, D] float32
    target: np.ndarray  # [N] float32: log2 seconds minus the median of the row's kernel
    kernel: np.ndarray  # [N] int64: 0..K-1, ascending
    start: np.ndarray  # [K + 1] int64: kernel k owns rows start[k]:start[k + 1]
    unit: np.ndarray  # [K] int64: 0..U-1; kernels of one unit are the same kernel, timed elsewhere: held out together
    index: np.ndarray  # [N] int64: which of the rows given each of these is
    dropped: int  # rows left out: failed trials (time not finite), and kernels with a single usable row

    @property
    def kernels(self) -> int:
        return len(self.start) - 1

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.start)

    @staticmethod
    def build(
        features: np.ndarray, log_time: np.ndarray, group: np.ndarray, width: int, least: int = 2,
        unit: np.ndarray | None = None,
    ) -> TrainingRows:  # fmt: skip
        """Check, drop failed trials and lone rows, sort, centre each kernel on its median (a straggler does
        not move it). Arguments as in `Simulator.fit`; `least` kernels must be left."""
        x, y, g = check_features(features, width), np.asarray(log_time, dtype=np.float64), np.asarray(group)
        if y.shape != (len(x),) or g.shape != (len(x),):
            raise SimulatorError(
                f"{len(x)} feature rows need log_time and group of shape [{len(x)}], "
                f"got {list(y.shape)} and {list(g.shape)}"
            )
        if len(x) == 0:
            raise SimulatorError("no rows to learn from: the data set is empty")
        usable = np.flatnonzero(np.isfinite(y))
        if len(usable) == 0:
            raise SimulatorError(f"all {len(x)} rows are failed trials: there is no time to learn from")
        members = [usable[rows] for rows in per_group(g[usable])]
        members = [rows[np.argsort(y[rows], kind="stable")] for rows in members if len(rows) > 1]
        units, own = np.unique(
            (g if unit is None else np.asarray(unit))[np.array([rows[0] for rows in members], int)], return_inverse=True
        )
        if len(units) < least:
            needed = "two are" if least == 2 else "one is"
            raise SimulatorError(f"kernels with two or more timed rows: {len(units)}, but {needed} needed")
        order, sizes = np.concatenate(members), [len(rows) for rows in members]
        target = np.concatenate([y[rows] - np.median(y[rows]) for rows in members])
        return TrainingRows(
            x[order],
            target.astype(np.float32),
            np.repeat(np.arange(len(members)), sizes),
            np.concatenate([[0], np.cumsum(sizes)]),
            own,
            order,
            len(x) - len(order),
        )


@dataclass(frozen=True)
class Scaling:
    """z = clip((x - mean) * inverse, -limit, limit); a feature constant in training has inverse 0."""

    mean: np.ndarray  # [D] float32
    inverse: np.ndarray  # [D] float32: 1 / standard deviation
    limit: float  # in standard deviations

    @staticmethod
    def measure(features: np.ndarray, limit: float) -> Scaling:
        """Mean and standard deviation over the rows of features [N, D]."""
        mean, deviation = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
        varies = deviation > 1e-6 * np.maximum(np.abs(mean), 1.0)
        inverse = np.where(varies, 1.0 / np.where(varies, deviation, 1.0), 0.0)
        return Scaling(mean.astype(np.float32), inverse.astype(np.float32), limit)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return np.clip((features - self.mean) * self.inverse, -self.limit, self.limit).astype(np.float32)


def centre(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Subtract each group's mean along the last axis: values [..., N], group [N] -> [..., N]."""
    out = np.array(values, dtype=np.float64)
    for rows in per_group(np.asarray(group)):
        out[..., rows] -= out[..., rows].mean(axis=-1, keepdims=True)
    return out


@dataclass(frozen=True)
class Spread:
    """From the variance of a few members to a calibrated standard deviation:
    std^2 = scale^2 * (d0 * typical + (n - 1) * variance) / (d0 + n - 1).

    A variance of 2 to 5 values is itself noisy; it is drawn towards the typical one with d0 prior degrees of
    freedom (the inverse of the posterior mean of the precision, under a scaled inverse chi-square prior; Smyth 2004).
    """

    scale: float = 1.0  # found on out-of-bag kernels
    typical: float = 0.0  # mean variance of the members on out-of-bag rows, log2 units squared

    def __call__(self, variance: np.ndarray, count: int | np.ndarray) -> np.ndarray:
        """variance [N] with divisor count - 1, count () or [N] members -> std [N]."""
        if self.typical == 0.0:
            return self.scale * np.sqrt(variance)
        own = np.asarray(count) - 1
        mixed = (PRIOR_FREEDOM * self.typical + own * variance) / (PRIOR_FREEDOM + own)
        return self.scale * np.sqrt(mixed)
