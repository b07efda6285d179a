"""MuZero-like search in a simulator's latent space (`muzero`): to plan, the compiler's rules are asked only for where a plan begins.

The rows of one search share their kernel and differ in their Gumbel noise. Every plan that any of them looked at is then
read on the exact dynamics, up to its first illegal action, and joins the pool. What is measured is chosen from it as in
`mixed`, by what the same simulator says of these schedules.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autotune.compiler import Renderer
from autotune.errors import TRAIN, UsageError
from autotune.guide import Guide
from autotune.kernel import Kernel, Schedule
from autotune.paths import paths_of
from autotune.search.mixed import MixedSearch
from autotune.space import ACTIONS, MAX_STEPS, State, after, legal_mask, may_take, root_of, step
from sims import PathSimulator

ROWS, SIMULATIONS, CONSIDERED = 16, 64, 16  # of one search; a plan is looked at once it has ended, or as far as it goes
DRAWS = 5  # of a simulator's belief about a schedule: as many as an ensemble has members


class LatentSearch(MixedSearch):
    """`mixed`, with its pool grown by planning in `guide.world`. Raises UsageError where the guide has none."""

    directs = False  # all that is measured was planned, or bred

    def __init__(self, kernel: Kernel, renderer: Renderer, seed: int, guide: Guide, simulations: int = SIMULATIONS):
        super().__init__(kernel, renderer, seed, guide)
        if guide.world is None:
            raise UsageError(f"this checkpoint holds no world to plan in: train one with `{TRAIN}`")
        self.simulations, self.latent = simulations, guide.world.of(self.root)
        self.beliefs: dict[tuple[str, Schedule], np.ndarray] = {}  # by kernel and schedule: [DRAWS]

    def _grow(self) -> None:
        """One search from the root; another from the prefixes of the fastest schedules so far, where there are any."""
        self._plan([self.root])
        if prefixes := self._continued():
            self._plan([p for p in prefixes if len(p.schedule) <= MAX_STEPS])

    def _plan(self, starts: Sequence[State]) -> None:
        """Search from `starts` in turn; the pool keeps all that any search looked at, as far as it is legal."""
        states = [starts[i % len(starts)] for i in range(ROWS)]
        mask = np.stack([legal_mask(s) for s in states])
        noise = self.rng.gumbel(size=mask.shape)
        result = self.latent.plan(paths_of(states), mask, self.simulations, noise, CONSIDERED)
        for row, state in enumerate(states):
            for leaf in result.leaves(row):
                self._walk(state, leaf.path)

    def _walk(self, state: State, actions: Sequence[int]) -> None:
        """Into the pool goes every prefix, up to the first action that is not legal."""
        self._propose(state, "muzero")
        for action in actions:
            opt = ACTIONS[action]
            if opt is None or len(state.schedule) >= MAX_STEPS:
                return
            known = self.pool.get((*state.schedule, opt))
            if known is None and not may_take(state, action):
                return
            state = known or step(state, action)
            self._propose(state, "muzero")

    def _members(self, states: Sequence[State]) -> np.ndarray:
        """Draws from what the simulator believes of each schedule [DRAWS, N]: a normal of its mean and spread."""
        wanted = {key: s for s in states if (key := _key(s)) not in self.beliefs}
        if wanted:
            drawn = beliefs_of(self.latent.simulator, list(wanted.values()), self.rng)
            self.beliefs.update(zip(wanted, drawn.T, strict=True))
        return np.stack([self.beliefs[_key(s)] for s in states], axis=1)


def beliefs_of(simulator: PathSimulator, states: Sequence[State], rng: np.random.Generator) -> np.ndarray:
    """Draws from what a simulator believes of some schedules [DRAWS, N]: a normal of its mean and spread."""
    paths = paths_of([_short(s) for s in states])
    found, at = simulator.predict(paths), (np.arange(len(paths)), paths.length)
    draws = rng.standard_normal((DRAWS, len(paths)))
    # few draws must not hide the simulator's own mean and spread
    draws = (draws - draws.mean(0)) / draws.std(0)
    return found.relative[at] + draws * found.spread[at]


def _short(state: State) -> State:
    """What of a schedule fits a path: hand-coded ones may have more actions."""
    return state if len(state.schedule) <= MAX_STEPS else after(root_of(state), state.schedule[:MAX_STEPS])


def _key(state: State) -> tuple[str, Schedule]:
    return state.kernel.key, state.schedule
