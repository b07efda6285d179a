"""Schedules as paths of prefixes: the arrays that every path simulator learns from, in padded fixed shapes.

A path is one schedule, read from the un-optimized kernel (prefix 0) action by action. N paths of K kernels, at most L
actions of F numbers each, S numbers that sum up each of the L + 1 prefixes, C tokens of W numbers that tell what the
kernel and its device are. What stands beyond a path's end is padding, and never looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np

from sims.base import SimulatorError, TrainingRows


class Widths(NamedTuple):
    """The fixed sizes of a world of paths; a simulator is made for one of them."""

    tokens: int  # C
    token: int  # W
    steps: int  # L
    action: int  # F
    state: int  # S


@dataclass(frozen=True)
class Paths:
    """Schedules of many kernels; checked when made."""

    context: np.ndarray  # [K, C, W] float32: device, kernel, axes, buffers
    present: np.ndarray  # [K, C] bool: which tokens there are
    kernel: np.ndarray  # [N] int: a row of `context`
    actions: np.ndarray  # [N, L, F] float32: what each action does
    states: np.ndarray  # [N, L + 1, S] float32: summary of each prefix; 0: nothing applied
    length: np.ndarray  # [N] int: number of actions
    log_time: np.ndarray  # [N, L + 1] log2 seconds; NaN where not measured, or failed

    def __post_init__(self) -> None:
        for field in fields(self):  # frozen: this is how a dataclass sets what it checks
            object.__setattr__(self, field.name, np.asarray(getattr(self, field.name), _TYPES[field.name]))
        (K, C, W), (N, L, F), S = (
            _shape(self.context, "context"),
            _shape(self.actions, "actions"),
            self.states.shape[-1],
        )
        wanted = {"context": (K, C, W), "present": (K, C), "kernel": (N,), "actions": (N, L, F),
                  "states": (N, L + 1, S), "length": (N,), "log_time": (N, L + 1)}  # fmt: skip
        for name, shape in wanted.items():
            if getattr(self, name).shape != shape:
                raise SimulatorError(f"{name} has shape {list(getattr(self, name).shape)}, need {list(shape)}")
        for name in ("context", "actions", "states"):
            bad = ~np.isfinite(getattr(self, name)).all(axis=(1, 2))
            if bad.any():
                raise SimulatorError(
                    f"{name} holds NaN or infinity in {int(bad.sum())} of {len(bad)} rows, first at {int(bad.argmax())}"
                )
        for name, most in (("kernel", K - 1), ("length", L)):
            values = getattr(self, name)
            if N and (values.min() < 0 or values.max() > most):
                raise SimulatorError(f"{name} must lie in 0..{most}, got {values.min()}..{values.max()}")

    def __len__(self) -> int:
        return len(self.kernel)

    @property
    def widths(self) -> Widths:
        (_, C, W), (_, L, F), (_, _, S) = self.context.shape, self.actions.shape, self.states.shape
        return Widths(C, W, L, F, S)

    @property
    def reached(self) -> np.ndarray:
        """Which prefixes a path has [N, L + 1] bool; the others are padding."""
        return np.arange(self.states.shape[1]) <= self.length[:, None]

    @property
    def ends(self) -> np.ndarray:
        """The summary of each whole schedule [N, S]."""
        return self.states[np.arange(len(self)), self.length]

    @property
    def units(self) -> np.ndarray:
        """A number for each distinct context [K]: the same kernel timed on two devices has two rows of `context`, alike."""
        return np.unique(self.context.reshape(len(self.context), -1), axis=0, return_inverse=True)[1].reshape(-1)

    def take(self, rows: np.ndarray) -> Paths:
        """Some of the paths (indices or a mask); the contexts stay."""
        picked = {name: getattr(self, name)[rows] for name in ("kernel", "actions", "states", "length", "log_time")}
        return replace(self, **picked)

    def cut(self, at: int | np.ndarray) -> Paths:
        """Only the first `at` actions of each path; 0: the roots."""
        return replace(self, length=np.minimum(self.length, at))

    def split(self, fraction: float, rng: np.random.Generator) -> tuple[Paths, Paths]:
        """(rest, held out): about `fraction` of the kernels with all their paths; never single paths, which leak."""
        unit = self.units[self.kernel]
        units = np.unique(unit)
        out = np.isin(unit, rng.permutation(units)[: max(1, round(fraction * len(units)))])
        return self.take(~out), self.take(out)

    def prefixes(self) -> np.ndarray:
        """A number for each distinct prefix (same kernel, same actions) [N, L + 1] int; -1 beyond the end."""
        numbers: dict[tuple[int, bytes], int] = {}
        out = np.full(self.log_time.shape, -1, np.int64)
        for i, kernel in enumerate(self.kernel):
            parent = numbers.setdefault((-1 - int(kernel), b""), len(numbers))
            out[i, 0] = parent
            for t in range(self.length[i]):
                parent = numbers.setdefault((parent, self.actions[i, t].tobytes()), len(numbers))
                out[i, t + 1] = parent
        return out

    def best_below(self, prefixes: np.ndarray) -> np.ndarray:
        """The best log2 time on record at or below each prefix [N, L + 1]; NaN: none, or beyond the end.

        A prefix is worth the fastest schedule that begins with it (max-backup): dynamics and cost are deterministic up
        to noise.
        """
        times = np.where(self.reached & np.isfinite(self.log_time), self.log_time, np.inf)
        onward = np.minimum.accumulate(times[:, ::-1], axis=1)[:, ::-1]
        best = np.full(prefixes.max(initial=0) + 1, np.inf)
        np.minimum.at(best, prefixes[self.reached], onward[self.reached])
        out = np.where(self.reached, best[prefixes], np.nan)
        return np.where(np.isinf(out), np.nan, out)


_TYPES = {"context": np.float32, "present": bool, "kernel": np.int64, "actions": np.float32, "states": np.float32,
          "length": np.int64, "log_time": np.float64}  # fmt: skip


def _shape(array: np.ndarray, name: str) -> tuple[int, int, int]:
    if array.ndim != 3:
        raise SimulatorError(f"{name} must have three axes, got shape {list(array.shape)}")
    return array.shape


@dataclass(frozen=True)
class Points:
    """The measured prefixes of some paths, each once, as rows to learn from. Build with `Points.build`."""

    rows: TrainingRows  # features: the summaries [P, S]; centred on each kernel's median, from fast to slow
    path: np.ndarray  # [P] int: a path that goes through the point
    position: np.ndarray  # [P] int: after how many of its actions
    reach: np.ndarray  # [P, L + 1]: best on record below each prefix of that path, relative to the kernel; may be NaN
    level: np.ndarray  # [K] log2 seconds: the median of each kernel

    @staticmethod
    def build(paths: Paths, widths: Widths, least: int = 2) -> Points:
        """Raises SimulatorError: other widths, nothing measured, or fewer than `least` kernels with two timed prefixes."""
        check_widths(paths, widths)
        prefixes, L = paths.prefixes(), widths.steps
        measured = paths.reached & np.isfinite(paths.log_time)
        time = np.full(prefixes.max(initial=0) + 1, np.nan)
        time[prefixes[measured]] = paths.log_time[measured]
        wanted = measured | (np.arange(L + 1) == paths.length[:, None])  # an end without a time counts as dropped
        at = np.flatnonzero(wanted)[np.unique(prefixes[wanted], return_index=True)[1]]
        path, position = at // (L + 1), at % (L + 1)
        times = time[prefixes[path, position]]
        group = paths.kernel[path]
        rows = TrainingRows.build(paths.states[path, position], times, group, widths.state, least, paths.units[group])
        path, position = path[rows.index], position[rows.index]
        level = (times[rows.index] - rows.target)[rows.start[:-1]]
        reach = paths.best_below(prefixes)[path] - level[rows.kernel][:, None]
        reach[np.arange(L + 1) > position[:, None]] = np.nan
        return Points(rows, path, position, reach, level)


def check_widths(paths: Paths, widths: Widths) -> None:
    """Raises SimulatorError where the paths are of another world."""
    if paths.widths != widths:
        differ = [
            f"{n} {a} in place of {b}" for n, a, b in zip(Widths._fields, paths.widths, widths, strict=True) if a != b
        ]
        raise SimulatorError(f"these paths have other widths than the simulator: {', '.join(differ)}")
