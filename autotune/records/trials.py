"""What was measured of a kernel: trials, the final comparison of a winner, and all that is known of a kernel on one device."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from autotune.kernel import Schedule

BASELINES = ("unoptimized", "hand_coded")  # kinds of trials with which every kernel begins
BEAM, FINETUNE = "beam", "finetune"  # who made a trial that no budget counts: STRATEGY/beam, or finetune/STRATEGY


@dataclass(frozen=True)
class Trial:
    """One candidate schedule, compiled and, if that worked, verified and timed on one device."""

    kernel: str  # key
    schedule: Schedule
    verdict: str
    samples: tuple[float, ...] = ()  # seconds, all of them
    compile_seconds: float = 0.0
    code_hash: str = ""
    detail: str = ""
    kind: str = "trial"  # or "unoptimized", "hand_coded", "answer" (the strategy's, at zero trials): not counted
    strategy: str = ""
    seed: int = 0
    verify_seconds: float = 0.0  # spent on running it to compare its outputs
    timing_seconds: float = 0.0  # spent on timing it
    input_seed: int = 0  # of the inputs that it was verified on

    @property
    def seconds(self) -> float | None:
        """Median run time; None where there is none."""
        return statistics.median(self.samples) if self.verdict == "ok" else None

    @property
    def counted(self) -> bool:
        """Whether a tuning's budget counts it: no baseline, nor made by the beam that goes on where that ends, or to fine-tune."""
        beside = self.strategy.endswith(f"/{BEAM}") or self.strategy.startswith(f"{FINETUNE}/")
        return self.kind == "trial" and not beside

    @property
    def refutes(self) -> bool:
        """Whether its schedule is not to be used, whatever another trial said of it."""
        return self.verdict == "wrong_output" or (self.kind == "recheck" and self.verdict != "ok")


@dataclass(frozen=True)
class Final:
    """The winner timed again, interleaved with hand-coded and a second hand-coded (the A/A control), in a fresh process."""

    kernel: str
    schedule: Schedule
    tuned: tuple[float, ...]
    hand_coded: tuple[float, ...]
    control: tuple[float, ...]
    accepted: bool
    protocol: int = 1  # of the measurement; 1 where it was made before this was kept

    @property
    def ratio(self) -> float:
        """Median tuned time over median hand-coded time of the same interleaved run."""
        return statistics.median(self.tuned) / statistics.median(self.hand_coded)

    @property
    def noise(self) -> float:
        """By which share hand-coded and its control differ, though they are the same."""
        hand, control = statistics.median(self.hand_coded), statistics.median(self.control)
        return max(abs(hand / control - 1.0), abs(control / hand - 1.0))


@dataclass
class History:
    """What is known of one kernel on one device."""

    trials: list[Trial] = field(default_factory=list)

    @property
    def spent(self) -> int:
        """Trials that a budget counts."""
        return sum(t.counted for t in self.trials)

    @property
    def baselines(self) -> dict[str, Trial]:
        """The latest of each kind, whatever became of it."""
        return {t.kind: t for t in self.trials if t.kind in BASELINES}

    @property
    def hand_coded(self) -> Trial | None:
        """That baseline, where it has a time."""
        hand = self.baselines.get("hand_coded")
        return None if hand is None or hand.seconds is None else hand

    @property
    def runs(self) -> bool:
        """Whether the kernel could be timed at all, as one of its baselines."""
        return any(t.seconds is not None for t in self.baselines.values())

    @property
    def refuted(self) -> set[Schedule]:
        """Schedules not to be used: those that failed when they were looked at again, those that were ever wrong, and all that
        give the same binary as one of the latter. An accident is no property of a binary."""
        wrong = {t.schedule for t in self.trials if t.verdict == "wrong_output"}
        binaries = {t.code_hash for t in self.trials if t.schedule in wrong and t.code_hash}  # a recheck may have none
        return {t.schedule for t in self.trials if t.refutes or t.code_hash in binaries}

    @property
    def good(self) -> list[Trial]:
        """Timed trials and baselines of all schedules that are not refuted."""
        refuted = self.refuted
        return [t for t in self.trials if t.seconds is not None and t.kind != "recheck" and t.schedule not in refuted]

    @property
    def best(self) -> Trial | None:
        """The fastest verified schedule, baselines included: the incumbent."""
        return min(self.good, key=lambda t: t.seconds or 0.0, default=None)
