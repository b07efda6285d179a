"""Schedules that the trained PPO-LSTM chooses by itself (`policy`).

Complete episodes are sampled on the exact dynamics, which costs no trial. The greedy one is measured first, then samples in the
order drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autotune.compiler import Renderer
from autotune.episodes import Seen, sample_episodes
from autotune.guide import Guide
from autotune.kernel import Kernel, Schedule
from autotune.records import Trial
from autotune.space import State, root_state

DRY_ROUNDS = 4  # rounds of episodes without a new schedule before `policy` counts as exhausted


class PolicySearch:
    """Best policy: its greedy schedule first, then samples."""

    def __init__(self, kernel: Kernel, renderer: Renderer, seed: int, guide: Guide, root: State | None = None):
        """`root`: where the kernel's un-optimized state is at hand already."""
        self.guide, self.root = guide, root or root_state(kernel, renderer)
        self.rng = kernel.rng(seed)
        self.seen: set[Schedule] = {()}
        self.waiting: list[Schedule] = []
        self.greedy: Schedule | None = None  # what it thinks best; None: it was not asked yet
        self.looked: Seen = {}

    def ask(self, count: int) -> list[Schedule]:
        """Up to `count` new schedules; fewer, or none, where the policy has nothing new to say."""
        dry = 0
        while len(self.waiting) < count and dry < DRY_ROUNDS:
            temperature = 0.0 if self.greedy is None else 1.0 + dry
            fresh = [p[-1].schedule for p in self.episodes([self.root], temperature)]
            self.greedy = fresh[0] if self.greedy is None else self.greedy
            fresh = [s for s in dict.fromkeys(fresh) if s not in self.seen]
            dry = 0 if fresh else dry + 1
            self.seen.update(fresh)
            self.waiting += fresh
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        self.looked.clear()  # observations are large, and every kernel of a program has a search
        return taken

    def tell(self, trials: Sequence[Trial]) -> None:
        """Remember what was measured, so that it is not asked for again."""
        self.seen.update(t.schedule for t in trials)

    def episodes(self, starts: Sequence[State], temperature: float | np.ndarray) -> list[list[State]]:
        return sample_episodes(self.guide.agent, starts, self.rng, temperature, self.looked)
