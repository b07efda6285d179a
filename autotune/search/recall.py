"""What was fastest on the most similar of the recorded kernels (`recall`): a warm start, and no model but similarity."""

from __future__ import annotations

from collections.abc import Sequence

from autotune.compiler import Renderer
from autotune.guide import Guide
from autotune.kernel import Kernel, Schedule
from autotune.records import Trial
from autotune.search.breeding import Breeder
from autotune.space import State, root_state

SIMILAR = 64  # recorded kernels


class RecallSearch:
    """Their fastest schedules, most similar kernel first, as far as they are legal here; none where nothing is remembered."""

    def __init__(self, kernel: Kernel, renderer: Renderer, seed: int, guide: Guide, root: State | None = None):
        self.root, self.memory = root or root_state(kernel, renderer), guide.memory
        self.breeder = Breeder(self.root, kernel.rng(seed))
        self.replayed: dict[Schedule, State] = {}
        self.seen: set[Schedule] = {()}

    def states(self) -> list[State]:
        """What there is to ask for at present: the memory may have grown."""
        recalled = self.memory.recall(self.root, SIMILAR) if self.memory else []
        for schedule in recalled:
            if schedule not in self.replayed:
                self.replayed[schedule] = self.breeder.replay(self.root, schedule)
        return list({self.replayed[r].schedule: self.replayed[r] for r in recalled}.values())

    def ask(self, count: int) -> list[Schedule]:
        """Up to `count` new schedules; fewer, or none, where there are no more."""
        taken = [s.schedule for s in self.states() if s.schedule not in self.seen][:count]
        self.seen.update(taken)
        return taken

    def tell(self, trials: Sequence[Trial]) -> None:
        self.seen.update(t.schedule for t in trials)
