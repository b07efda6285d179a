"""The kernels most like one that is searched, of which trials were made on this device: in its program, or before."""

from __future__ import annotations

import numpy as np

from autotune.errors import IllegalAction
from autotune.kernel import Schedule
from autotune.memory import Memory, Told, traits
from autotune.space import State, after

SIMILAR = 8  # kernels that are heard


class Relatives:
    """What is known of them, which grows while they are searched, too."""

    def __init__(self, root: State, memory: Memory | None):
        self.root, self.memory = root, memory
        # by kernel and schedule; None where one is not legal
        self._states: dict[tuple[str, Schedule], State | None] = {}

    def told(self) -> list[Told]:
        """At most SIMILAR kernels, most similar first."""
        return self.memory.relatives(self.root, SIMILAR) if self.memory is not None else []

    def trials(self, told: Told) -> tuple[list[State], list[float]]:
        """A kernel's measured states, and their log2 seconds."""
        found = [
            (state, time) for s, time in told.log_times.items() if (state := self._state(told.root, s)) is not None
        ]
        return [state for state, _ in found], [time for _, time in found]

    def distance(self, told: list[Told]) -> np.ndarray:
        """Between the kernel itself and these [1 + G, 1 + G]."""
        if self.memory is None:
            return np.zeros((1, 1))
        return self.memory.distance(np.stack([traits(self.root), *(own.traits for own in told)]))

    def _state(self, root: State, schedule: Schedule) -> State | None:
        key = root.kernel.key, schedule
        if key not in self._states:
            try:
                self._states[key] = after(root, schedule)
            except IllegalAction:  # recorded where more was legal
                self._states[key] = None
        return self._states[key]
