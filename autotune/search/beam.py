"""Beam search as tinygrad does it, on trials: the `width` fastest schedules of one depth are continued by every legal action.

Unlike tinygrad's own it verifies what it times, can be stopped at any trial, and hears of trials that others made. It ends,
like tinygrad's, at the first depth that brings nothing faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autotune.compiler import Renderer
from autotune.kernel import Kernel, Schedule
from autotune.records import Trial
from autotune.space import State, legal_mask, root_state, step

WIDTH = 4  # as in BEAM=4


class BeamSearch:
    """Level by level. The children of a level are asked for in random order, so that a search cut short is still fair."""

    def __init__(self, kernel: Kernel, renderer: Renderer, seed: int, width: int = WIDTH):
        self.rng, self.width = np.random.default_rng([seed, int(kernel.key[:8], 16)]), width
        self.times: dict[Schedule, float] = {}  # log2 seconds of all that was told; infinite where it failed
        self.best = math.inf  # of the levels that are done
        self.asked: set[Schedule] = set()
        self.level: dict[Schedule, State] = {}
        self._enter([root_state(kernel, renderer)])

    def ask(self, count: int) -> list[Schedule]:
        """Up to `count` new schedules of this level; none while trials of it are missing, or where the search has ended."""
        self._advance()
        new = [s for s in self.level if s not in self.asked and s not in self.times][:count]
        self.asked.update(new)
        return new

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take in what became of schedules, also of those that were never asked for."""
        self.times.update((t.schedule, math.inf if t.seconds is None else math.log2(t.seconds)) for t in trials)

    def _enter(self, beam: Sequence[State]) -> None:
        children = [step(s, int(a)) for s in beam for a in np.flatnonzero(legal_mask(s)[:-1])]
        self.level = {children[i].schedule: children[i] for i in self.rng.permutation(len(children))}

    def _advance(self) -> None:
        """On to the next level, as long as all of this one is known and has brought something faster."""
        while self.level and all(s in self.times for s in self.level):
            fastest = sorted(self.level, key=self.times.__getitem__)[: self.width]
            found = self.times[fastest[0]]
            beam = [self.level[s] for s in fastest if self.times[s] < math.inf] if found < self.best else []
            self.best = min(self.best, found)
            self._enter(beam)
