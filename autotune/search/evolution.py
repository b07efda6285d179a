"""Evolution of schedules (`evolution`): the control that learns from its trials, but has no model.

A random population first; then children of the fastest schedules measured so far. Parents are drawn by tournament, as in
regularised evolution (Real et al. 2019), from the fastest POPULATION (truncation, as evolution strategies do, where Real
et al. let the oldest die: there are too few trials here to forget a good one). Only the order of times counts. A child
is a mutation of one parent or a crossover of two; what the rules of the space forbid in it is left out (so do Ansor,
Zheng et al. 2020, and Kernel Tuner, van Werkhoven 2019).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from autotune.compiler import Opt, Renderer
from autotune.kernel import Kernel, Schedule
from autotune.records import Trial
from autotune.search.random import RandomSearch
from autotune.space import ACTION_INDEX, State, legal_mask, step

POPULATION = 8  # schedules that may be parents, and random ones measured before the first child
TOURNAMENT = 2  # drawn for each parent; the fastest of them it is
CROSSOVER = 0.25  # share of children that have two parents
CHILDREN = 4  # made in search of a new one; where all are known, a random schedule takes their place
MUTATIONS = ("replace", "insert", "delete", "append")


class EvolutionSearch(RandomSearch):
    """RandomSearch, but that what it draws descends from the fastest, once enough are measured."""

    def __init__(self, kernel: Kernel, renderer: Renderer, seed: int):
        super().__init__(kernel, renderer, seed)
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
                if (child := self._child(fastest)) not in self.seen:
                    return child
        return super()._draw()

    def _child(self, fastest: Sequence[Schedule]) -> Schedule:
        if self.rng.random() < CROSSOVER:
            return self._crossover(self._parent(fastest), self._parent(fastest))
        return self._mutation(self._parent(fastest), MUTATIONS[int(self.rng.integers(len(MUTATIONS)))])

    def _parent(self, fastest: Sequence[Schedule]) -> Schedule:
        """The winner of a tournament: the first in order of those drawn."""
        return fastest[int(self.rng.integers(len(fastest), size=TOURNAMENT).min())]

    def _mutation(self, parent: Schedule, kind: str) -> Schedule:
        """One action replaced, inserted before another, deleted or appended; an empty schedule can only be appended to."""
        at = int(self.rng.integers(len(parent))) if parent and kind != "append" else len(parent)
        state = self._replay(self.root, parent[:at])
        if kind != "delete" or not parent:
            state = self._any_action(state)
        return self._replay(state, parent[at + (kind in ("replace", "delete")) :]).schedule

    def _crossover(self, first: Schedule, second: Schedule) -> Schedule:
        """A prefix of the first, then all actions of the second that it does not hold."""
        prefix = first[: int(self.rng.integers(len(first) + 1))]
        return self._replay(self.root, (*prefix, *(o for o in second if o not in prefix))).schedule

    def _any_action(self, state: State) -> State:
        legal = np.flatnonzero(legal_mask(state)[:-1])
        return step(state, int(self.rng.choice(legal))) if len(legal) else state

    def _replay(self, state: State, opts: Iterable[Opt]) -> State:
        """The state after those actions that are legal when their turn comes; the others are dropped."""
        for opt in opts:
            action = ACTION_INDEX.get(opt)  # None: of another vocabulary
            if action is not None and legal_mask(state)[action]:
                state = step(state, action)
        return state
