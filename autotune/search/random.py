"""Random schedules: the control that every learned strategy must beat at equal trials."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autotune.compiler import Renderer
from autotune.kernel import Kernel, Schedule
from autotune.records import Trial
from autotune.space import State, legal_mask, root_state, step

MAX_ACTIONS = 6
ATTEMPTS = 50  # draws without anything new before the space counts as exhausted


class RandomSearch:
    """1 to 6 legal actions drawn evenly, no schedule twice."""

    def __init__(self, kernel: Kernel, renderer: Renderer, seed: int):
        self.root = root_state(kernel, renderer)
        self.rng = kernel.rng(seed)
        self.seen: set[Schedule] = {()}  # the un-optimized kernel is a baseline
        self.told: set[Schedule] = set()  # of them those of earlier runs, which drew with the same seed

    def ask(self, count: int) -> list[Schedule]:
        """Up to `count` new schedules; fewer, or none, where the space is exhausted."""
        found: list[Schedule] = []
        failures = 0
        while len(found) < count and failures < ATTEMPTS:
            schedule = self._draw()
            if schedule in self.told:  # this draw was made before: the search goes on from there
                self.told.discard(schedule)
                continue
            if schedule in self.seen:
                failures += 1
                continue
            self.seen.add(schedule)
            found.append(schedule)
        return found

    def tell(self, trials: Sequence[Trial]) -> None:
        """Remember what was measured, so that it is not asked for again."""
        self.told.update(t.schedule for t in trials if t.schedule not in self.seen)
        self.seen.update(t.schedule for t in trials)

    def _draw(self) -> Schedule:
        return random_path(self.root, self.rng)[-1].schedule


def random_path(start: State, rng: np.random.Generator) -> list[State]:
    """1 to 6 legal actions drawn evenly: the states passed through, the start first. Shorter where nothing is legal any more."""
    path = [start]
    for _ in range(int(rng.integers(1, MAX_ACTIONS + 1))):
        legal = np.flatnonzero(legal_mask(path[-1])[:-1])
        if not len(legal):
            break
        path.append(step(path[-1], int(rng.choice(legal))))
    return path
