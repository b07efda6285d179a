"""What was fastest on the most similar of the recorded kernels (`recall`): a warm start, and no model but similarity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autotune.compiler import Renderer
from autotune.guide import Guide
from autotune.kernel import Kernel, Schedule
from autotune.records import Trial
from autotune.search.breeding import Breeder
from autotune.space import State, root_state

SIMILAR = 64  # recorded kernels


class RecallSearch:
    """Their fastest schedules, most similar kernel first, as far as they are legal here; none where nothing is remembered."""

    def __init__(self, kernel: Kernel, renderer: Renderer, seed: int, guide: Guide):
        root, memory = root_state(kernel, renderer), guide.memory
        breeder = Breeder(root, np.random.default_rng([seed, int(kernel.key[:8], 16)]))
        recalled = memory.recall(root, SIMILAR) if memory else []
        self.states: dict[Schedule, State] = {s.schedule: s for r in recalled for s in [breeder.replay(root, r)]}
        self.seen: set[Schedule] = {()}

    def ask(self, count: int) -> list[Schedule]:
        """Up to `count` new schedules; fewer, or none, where there are no more."""
        taken = [s for s in self.states if s not in self.seen][:count]
        self.seen.update(taken)
        return taken

    def tell(self, trials: Sequence[Trial]) -> None:
        self.seen.update(t.schedule for t in trials)
