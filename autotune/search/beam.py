"""Beam search as tinygrad does it, on trials: the `width` fastest schedules of one depth are continued by every legal action.

As there, an action is one of BEAM's own (PADTO and NOLOCALS are not, unless an environment variable says so), a binary has one
place in the beam, however many schedules give it, and the search ends at the first depth that brings nothing faster. Unlike
tinygrad's own it verifies what it times, can be stopped at any trial, and hears of trials that others made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autotune.compiler import OptOps, Renderer
from autotune.kernel import Kernel, Schedule
from autotune.records import Trial
from autotune.space import ACTIONS, State, legal_mask, root_state, step

WIDTH = 4  # as in BEAM=4
OFFERED = np.array([a is not None and a.op not in (OptOps.PADTO, OptOps.NOLOCALS) for a in ACTIONS])  # [A]


class BeamSearch:
    """Level by level. The children of a level are asked for in random order, so that a search cut short is still fair."""

    def __init__(self, kernel: Kernel, renderer: Renderer, seed: int, width: int = WIDTH):
        self.rng, self.width = kernel.rng(seed), width
        self.times: dict[Schedule, float] = {}  # log2 seconds of all that was told; infinite where it failed
        self.codes: dict[Schedule, str] = {}  # hash of the binary
        self.taken: set[str] = set()  # those that were met in levels that are done
        self.best = math.inf  # of these levels
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
        self.codes.update((t.schedule, t.code_hash) for t in trials)

    def _enter(self, beam: Sequence[State]) -> None:
        children = [step(s, int(a)) for s in beam for a in np.flatnonzero(legal_mask(s) & OFFERED)]
        self.level = {children[i].schedule: children[i] for i in self.rng.permutation(len(children))}

    def _advance(self) -> None:
        """On to the next level, as long as all of this one is known and has brought something faster."""
        while self.level and all(s in self.times for s in self.level):
            fastest = self._new_binaries()
            found = self.times[fastest[0]] if fastest else math.inf
            self._enter([self.level[s] for s in fastest[: self.width]] if found < self.best else [])
            self.best = min(self.best, found)

    def _new_binaries(self) -> list[Schedule]:
        """This level's schedules that ran, fastest first; of those that give one binary the fastest, and none of a binary that
        an earlier level had."""
        found: dict[str, Schedule] = {}
        for schedule in sorted(self.level, key=self.times.__getitem__):
            if self.times[schedule] < math.inf and self.codes[schedule] not in self.taken:
                found.setdefault(self.codes[schedule] or str(schedule), schedule)
        self.taken.update(code for s in self.level if (code := self.codes[s]))
        return list(found.values())
