"""Evolution of schedules (`evolution`): the control that learns from its trials, but has no model.

A random population first; then children of the fastest schedules measured so far. Parents are drawn by tournament, as in
regularised evolution (Real et al. 2019), from the fastest POPULATION (truncation, as evolution strategies do, where Real
et al. let the oldest die: there are too few trials here to forget a good one). Only the order of times counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from autotune.compiler import Renderer
from autotune.kernel import Kernel, Schedule
from autotune.records import Trial
from autotune.search.breeding import POPULATION, Breeder
from autotune.search.random import RandomSearch

CHILDREN = 4  # made in search of a new one; where all are known, a random schedule takes their place


class EvolutionSearch(RandomSearch):
    """RandomSearch, but that what it draws descends from the fastest, once as many as may be parents are measured."""

    def __init__(self, kernel: Kernel, renderer: Renderer, seed: int):
        super().__init__(kernel, renderer, seed)
        self.breeder = Breeder(self.root, self.rng)
        self.times: dict[Schedule, float] = {}  # seconds of all that was told; infinite where it failed

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take in what became of schedules, also of those that were never asked for."""
        super().tell(trials)
        self.times.update((t.schedule, math.inf if t.seconds is None else t.seconds) for t in trials)

    def _draw(self) -> Schedule:
        measured = [s for s, seconds in self.times.items() if seconds < math.inf]
        fastest = sorted(measured, key=self.times.__getitem__)[:POPULATION]
        if len(fastest) == POPULATION:
            for _ in range(CHILDREN):
                if (child := self.breeder.child(fastest).schedule) not in self.seen:
                    return child
        return super()._draw()
