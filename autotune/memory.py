"""The fastest schedules of recorded kernels, what was measured of others just now, and which of them a new one is most like.

What was fastest on a similar kernel is seldom far from the best here (transfer tuning; Kernel Tuner and Ansor start warm from
such records, too). A schedule of another kernel may not be legal here: what is not is left out when it is replayed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from autotune.data import Dataset
from autotune.features import observe
from autotune.kernel import Schedule
from autotune.space import ACTION_INDEX, ACTIONS, STOP_INDEX, State, legal_mask, root_of

FASTEST = 3  # schedules of each kernel that are remembered
NONE = -1  # in place of an action
WORTH = 0.1  # log2 units: what is slower than the fastest by more is not


class Told(NamedTuple):
    """What was measured of one kernel on this device."""

    root: State
    traits: np.ndarray
    fastest: list[Schedule]  # the fastest first
    log_times: dict[Schedule, float]  # log2 seconds of all that have a time


class Memory:
    """`features` [K, D] float16 of kernels, and each one's fastest schedules, the fastest first."""

    def __init__(self, features: np.ndarray, schedules: list[list[Schedule]]):
        self.features, self.schedules = features.astype(np.float16), schedules
        self.scale = self.features.astype(np.float32).std(0) + 1e-3
        self.added: dict[str, Told] = {}  # by kernel key; not kept with the rest

    @staticmethod
    def learn(data: Dataset) -> Memory | None:
        """From the trials of a data set; of a kernel that was measured in several sources, those of the one that gained most over
        the un-optimized kernel. None where nothing was faster than that."""
        log_times, groups = data.arrays()
        found: dict[str, tuple[float, State, list[Schedule]]] = {}
        for group in np.unique(groups):
            rows = np.flatnonzero(groups == group)
            plain = [log_times[i] for i in rows if not data.states[i].schedule]
            rows = rows[np.argsort(log_times[rows], kind="stable")][:FASTEST]
            gain = float(plain[0] - log_times[rows[0]]) if plain else 0.0
            most = min([log_times[rows[0]] + WORTH, *plain])
            good = [data.states[i].schedule for i in rows if log_times[i] <= most]
            known = [s for s in good if s and all(opt in ACTION_INDEX for opt in s)]
            root = root_of(data.states[rows[0]])
            if known and (root.kernel.key not in found or gain > found[root.kernel.key][0]):
                found[root.kernel.key] = gain, root, known
        if not found:
            return None
        return Memory(np.stack([traits(root) for _, root, _ in found.values()]), [s for _, _, s in found.values()])

    def recall(self, root: State, count: int) -> list[Schedule]:
        """The fastest schedules of the `count` most similar kernels, most similar first: of each the fastest, then its others."""
        added = self._others(root)
        features = np.stack([*(own.traits for own in added), *self.features])  # [K, D]
        schedules = [*(own.fastest for own in added), *self.schedules]
        nearest = self._nearest(root, features)[:count]
        return list(
            dict.fromkeys(s for place in range(FASTEST) for k in nearest for s in schedules[k][place : place + 1])
        )

    def relatives(self, root: State, count: int) -> list[Told]:
        """What was added of the `count` most similar kernels, most similar first; not of the kernel itself."""
        added = self._others(root)
        return [added[k] for k in self._nearest(root, np.stack([own.traits for own in added]))[:count]] if added else []

    def add(self, root: State, trials: Iterable[tuple[Schedule, float]]) -> None:
        """What was measured of a kernel on this device just now: schedules and their seconds. Replaces what was added of it, by nothing
        where nothing but the un-optimized kernel has a time."""
        times = dict(trials)
        known = [(t, s) for s, t in times.items() if s and all(opt in ACTION_INDEX for opt in s)]
        known.sort(key=lambda pair: pair[0])
        good = [s for t, s in known if t <= known[0][0] * 2.0**WORTH][:FASTEST]
        if good:
            log_times = {s: math.log2(t) for s, t in times.items()}
            self.added[root.kernel.key] = Told(root, traits(root), good, log_times)
        else:
            self.added.pop(root.kernel.key, None)

    def distance(self, features: np.ndarray) -> np.ndarray:
        """Between kernels of these traits [G, D]: the mean squared difference, in standard deviations of those recorded [G, G]."""
        scaled = features.astype(np.float32) / self.scale
        return ((scaled[:, None] - scaled) ** 2).mean(-1)

    def _others(self, root: State) -> list[Told]:
        return [told for key, told in self.added.items() if key != root.kernel.key]

    def _nearest(self, root: State, features: np.ndarray) -> np.ndarray:
        """Which of some kernels' traits [K, D] are most like a kernel's, in that order."""
        distance = (((features.astype(np.float32) - traits(root)) / self.scale) ** 2).mean(1)
        return np.argsort(distance, kind="stable")

    def copy(self) -> Memory:
        """One of its own, for a search that adds to it."""
        other = Memory(self.features, self.schedules)
        other.added = dict(self.added)
        return other

    def state(self) -> dict[str, np.ndarray]:
        """Named arrays: the features, and each kernel's schedules as actions [K, FASTEST, L] int16, NONE after their ends."""
        length = max(len(s) for own in self.schedules for s in own)
        actions = np.full((len(self.schedules), FASTEST, length), NONE, np.int16)
        for k, own in enumerate(self.schedules):
            for place, schedule in enumerate(own):
                actions[k, place, : len(schedule)] = [ACTION_INDEX[opt] for opt in schedule]
        return {"features": self.features, "actions": actions}

    @staticmethod
    def load(arrays: Mapping[str, np.ndarray], width: int) -> Memory:
        """The opposite of `state`; `width` is that of `traits`. Raises KeyError or ValueError."""
        features, actions = arrays["features"], arrays["actions"]
        good = features.dtype == np.float16 and features.shape[1:] == (width,) and np.isfinite(features).all()
        known = actions.dtype == np.int16 and ((actions >= NONE) & (actions < STOP_INDEX)).all()
        if (
            not len(features)
            or not good
            or not known
            or actions.ndim != 3
            or actions.shape[:2] != (len(features), FASTEST)
        ):
            raise ValueError("the memory is damaged")
        schedules = [[tuple(ACTIONS[a] for a in row if a != NONE) for row in own] for own in actions]
        return Memory(features, [[s for s in own if s] for own in schedules])


def traits(root: State) -> np.ndarray:
    """What a kernel is compared by [D]: all that the policy sees of it before the first action. Computed once for each root."""
    key = "traits", root.schedule
    if key not in root.known:
        root.known[key] = observe(root, np.zeros_like(legal_mask(root)))[0]
        root.known[key].flags.writeable = False
    return root.known[key]
