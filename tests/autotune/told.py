"""A device that answers as it is told, and a tuner on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from test_never_worse import Adversary
from tiny import U2, add_one

from autotune.compiler import hand_coded, renderer_of
from autotune.kernel import Kernel, Schedule
from autotune.measuring.bench import PROTOCOL
from autotune.records import Records, Trial
from autotune.tuner import Tuner

CPU = renderer_of("CPU")
KERNEL = add_one()
HAND = hand_coded(KERNEL.ast, CPU)
FIRST, SECOND = (U2,), (U2, U2)
assert HAND not in (FIRST, SECOND, ())


class Told(Adversary):
    """An honest device on which hand-coded takes 1 s, FIRST half of that, SECOND three times as long. It may be told what
    becomes of hand-coded, how far its control is off, and how many accidents it has."""

    def __init__(self, hand: str = "ok", control: float = 1.0, accidents: int = 0):
        super().__init__(0, 0.0, 0.0)
        self.true = {(): 1.5, HAND: 1.0, FIRST: 0.5, SECOND: 3.0}
        self.hand, self.control, self.accidents = hand, control, accidents
        self.asked = self.prepared = self.duels = 0

    def baselines(self, kernel: Kernel) -> list[Trial]:
        self.prepared += 1
        plain, hand = super().baselines(kernel)
        return [plain, hand if self.hand == "ok" else replace(hand, verdict=self.hand, samples=(), detail="as told")]

    def measure(self, kernel: Kernel, schedules: Sequence[Schedule], cutoff: float | None,
                done: Callable | None = None) -> list[Trial]:  # fmt: skip
        self.asked += len(schedules)
        if self.accidents:
            self.accidents -= 1
            return [Trial(kernel.key, s, "timeout") for s in schedules]
        return super().measure(kernel, schedules, cutoff, done)

    def duel(self, kernel: Kernel, schedules: Sequence[Schedule], fresh: bool = True) -> list[tuple[float, ...]]:
        self.duels += 1
        *samples, control = super().duel(kernel, schedules, fresh)
        return [*samples, tuple(s * self.control for s in control)]


def tuner_of(records: Records, device: Told, **more) -> Tuner:
    return Tuner(records, device, CPU, progress=False, **{"trials": 4, "strategy": "random", **more})


def seen(records: Records, device: Told, schedule: Schedule, seconds: float) -> None:
    """A trial of which the device knows better."""
    records.add_trial(device.fingerprint, Trial(KERNEL.key, schedule, "ok", (seconds,)), PROTOCOL)


def accepted(records: Records, device: Told) -> Tuner:
    """A tuner that has accepted FIRST."""
    tuner = tuner_of(records, device)
    tuner.baselines(KERNEL)
    seen(records, device, FIRST, 0.5)
    final = tuner.winners.finish(KERNEL)
    assert final is not None and final.accepted and device.duels == 1
    return tuner
