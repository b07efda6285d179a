"""Which of a kernel's schedules is the fastest, and whether it beats hand-coded: single timings nominate, interleaved ones decide."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from autotune.kernel import Kernel, Schedule
from autotune.measuring.bench import PROTOCOL
from autotune.measuring.noise import floor_at
from autotune.measuring.runner import NOISE_FLOOR, Measurer, Refuted, commit, judge
from autotune.records import Final, History, Records

CLOSE, CONTENDERS = 1.1, 4  # schedules within this factor of the best are compared again, so many of them at most


def contenders(history: History) -> list[Schedule]:
    """The fastest verified schedules, each binary once: those within CLOSE of the best, fastest first."""
    good = sorted(history.good, key=lambda t: t.seconds or 0.0)
    distinct = {t.code_hash or t.schedule: t for t in reversed(good)}
    close = [t for t in good if t in distinct.values() and (t.seconds or 0.0) <= CLOSE * (good[0].seconds or 0.0)]
    return list(dict.fromkeys(t.schedule for t in close))[:CONTENDERS]


class Winners:
    """Settles what single timings leave open, and asks no comparison again that is on record."""

    def __init__(self, records: Records, measurer: Measurer):
        self.records, self.measurer = records, measurer

    def settle(self, kernel: Kernel) -> Schedule | None:
        """The fastest schedule, by sequential halving over those that single timings cannot tell apart; None without any."""
        while True:
            rivals = contenders(self._history(kernel))
            try:
                while len(rivals) > 1:
                    medians = dict(zip(rivals, map(statistics.median, self._compare(kernel, rivals)), strict=True))
                    rivals = sorted(rivals, key=lambda s: medians[s])[: (len(rivals) + 1) // 2]
                return rivals[0] if rivals else None
            except Refuted as refuted:
                commit(self.records, self.measurer, kernel, [refuted.trial])

    def _compare(self, kernel: Kernel, rivals: Sequence[Schedule]) -> list[tuple[float, ...]]:
        times = self.records.duel(kernel.key, self.measurer.fingerprint, rivals)
        if times is None:
            times = self.measurer.duel(kernel, rivals, fresh=False)
            self.records.add_duel(kernel.key, self.measurer.fingerprint, rivals, times)
        return times

    def finish(self, kernel: Kernel) -> Final | None:
        """Time the fastest against hand-coded in a fresh process, unless that was done for this very schedule."""
        hand = self._history(kernel).baselines.get("hand_coded")
        if hand is None or hand.seconds is None:
            return None
        while (best := self.settle(kernel)) is not None:
            if best == hand.schedule:
                return None
            final = self.records.final(kernel.key, self.measurer.fingerprint, best)
            if final is not None and final.protocol >= PROTOCOL and (final.accepted or final.noise <= NOISE_FLOOR):
                return final  # but a refusal in a noisy minute is looked at again
            rivals = [best, hand.schedule, hand.schedule]
            try:
                times = self.measurer.duel(kernel, rivals)
            except Refuted as refuted:
                commit(self.records, self.measurer, kernel, [refuted.trial])
                if refuted.trial.schedule == hand.schedule:
                    return None
                continue
            self.records.add_duel(kernel.key, self.measurer.fingerprint, rivals, times)
            floor = floor_at(self.records.noise(self.measurer.fingerprint), hand.seconds)
            final = judge(kernel, best, times, floor)
            self.records.add_final(self.measurer.fingerprint, final)
            return final
        return None

    def _history(self, kernel: Kernel) -> History:
        return self.records.history(kernel.key, self.measurer.fingerprint)
