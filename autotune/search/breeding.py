"""Children of schedules: one action changed (a mutation), or two parents joined (a crossover).

What the rules of the space forbid in a child is left out, so every child is legal (so do Ansor, Zheng et al. 2020, and
Kernel Tuner, van Werkhoven 2019).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from autotune.compiler import Opt
from autotune.kernel import Schedule
from autotune.space import ACTION_INDEX, State, legal_mask, may_take, step

POPULATION = 8  # schedules that may be parents
TOURNAMENT = 2  # drawn for each parent; the fastest of them it is
CROSSOVER = 0.25  # share of children that have two parents
MUTATIONS = ("replace", "insert", "delete", "append")


class Breeder:
    """Draws children of a kernel's schedules, on the exact dynamics from its un-optimized state `root`."""

    def __init__(self, root: State, rng: np.random.Generator):
        self.root, self.rng = root, rng

    def child(self, fastest: Sequence[Schedule]) -> State:
        """Of one or two of these schedules, fastest first."""
        if self.rng.random() < CROSSOVER:
            return self.crossover(self.parent(fastest), self.parent(fastest))
        return self.mutation(self.parent(fastest), MUTATIONS[int(self.rng.integers(len(MUTATIONS)))])

    def parent(self, fastest: Sequence[Schedule]) -> Schedule:
        """The winner of a tournament: the first in order of those drawn."""
        return fastest[int(self.rng.integers(len(fastest), size=TOURNAMENT).min())]

    def mutation(self, parent: Schedule, kind: str) -> State:
        """One action replaced, inserted before another, deleted or appended; an empty schedule can only be appended to."""
        at = int(self.rng.integers(len(parent))) if parent and kind != "append" else len(parent)
        state = self.replay(self.root, parent[:at])
        if kind != "delete" or not parent:
            state = self._any_action(state)
        return self.replay(state, parent[at + (kind in ("replace", "delete")) :])

    def crossover(self, first: Schedule, second: Schedule) -> State:
        """A prefix of the first, then all actions of the second that it does not hold."""
        prefix = first[: int(self.rng.integers(len(first) + 1))]
        return self.replay(self.root, (*prefix, *(o for o in second if o not in prefix)))

    def replay(self, state: State, opts: Iterable[Opt]) -> State:
        """The state after those actions that are legal when their turn comes; the others are dropped."""
        for opt in opts:
            action = ACTION_INDEX.get(opt)  # None: of another vocabulary
            if action is not None and may_take(state, action):
                state = step(state, action)
        return state

    def _any_action(self, state: State) -> State:
        legal = np.flatnonzero(legal_mask(state)[:-1])
        return step(state, int(self.rng.choice(legal))) if len(legal) else state
