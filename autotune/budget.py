"""The one budget of a tuning run: trials, and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Budget:
    """The one counter. `trials` for all kernels together, `seconds` of wall time; None: no limit."""

    trials: int
    seconds: float | None = None
    clock: Callable[[], float] = time.monotonic
    started: float = field(default=0.0)
    # a replay stops at the counts that the recorded run had reached by its clock: of trials, and of kernels' single answers
    stop_after: int | None = None
    answers: int | None = None
    spent: int = 0
    answered: int = 0
    reserved: float = 0.0  # seconds kept back, for the final timing of winners
    over: bool = False  # time has ended the trials: for good, though what was kept back be given back, else no replay could repeat it

    def __post_init__(self) -> None:
        self.started = self.clock()

    def left(self, wanted: int) -> int:
        """How many of `wanted` trials may still be made."""
        if self.stop_after is not None:
            return max(0, min(wanted, self.stop_after - self.spent))
        self.over = self.over or not self.in_time()
        return 0 if self.over else max(0, min(wanted, self.trials - self.spent))

    def may_answer(self) -> bool:
        """Whether there is time for one more kernel's single answer, which is counted then."""
        may = self.in_time() if self.answers is None else self.answered < self.answers
        self.answered += may
        return may

    def in_time(self) -> bool:
        """Whether seconds are left, but those that are kept back."""
        return self.seconds is None or self.elapsed() + self.reserved < self.seconds

    def elapsed(self) -> float:
        return self.clock() - self.started
