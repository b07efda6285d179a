"""Which of a kernel's schedules is the fastest, and whether it beats hand-coded: single timings nominate, interleaved ones decide."""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from tqdm import tqdm

from autotune.kernel import Kernel, Schedule
from autotune.measuring.bench import PROTOCOL
from autotune.measuring.noise import floor_at
from autotune.measuring.runner import NOISE_FLOOR, Measurer, Refuted, Unprepared, commit, judge
from autotune.records import Final, History, Records, Trial

CLOSE, CONTENDERS = 1.1, 4  # schedules within this factor of the best are compared again, so many of them at most


def contenders(history: History, served: Schedule | None = None) -> list[Schedule]:
    """The fastest verified schedules, each binary once: those within CLOSE of the best, fastest first; then the one that is
    served, so that only what beats it side by side takes its place."""
    good = sorted(history.good, key=lambda t: t.seconds or 0.0)
    distinct = {t.code_hash or t.schedule: t for t in reversed(good)}
    close = [t for t in good if t in distinct.values() and (t.seconds or 0.0) <= CLOSE * (good[0].seconds or 0.0)]
    found = list(dict.fromkeys(t.schedule for t in close))[:CONTENDERS]
    if served is not None and served not in found and any(t.schedule == served for t in good):
        found.append(served)
    return found


class Winners:
    """Settles what single timings leave open, and asks no comparison again that is on record."""

    def __init__(self, records: Records, measurer: Measurer):
        self.records, self.measurer = records, measurer

    def settle(self, kernel: Kernel) -> Schedule | None:
        """The fastest schedule, by sequential halving over those that single timings cannot tell apart; None without any, or where
        the kernel cannot be prepared."""
        while True:
            try:
                return self._halved(kernel, self._compare)
            except Refuted as refuted:
                commit(self.records, self.measurer, kernel, [refuted.trial])
            except Unprepared as why:
                return self._left(why)

    def _halved(
        self, kernel: Kernel, compare: Callable[[Kernel, Sequence[Schedule]], Sequence[Sequence[float]]]
    ) -> Schedule | None:
        rivals = self.rivals(kernel)
        while len(rivals) > 1:
            medians = dict(zip(rivals, map(statistics.median, compare(kernel, rivals)), strict=True))
            rivals = sorted(rivals, key=lambda s: medians[s])[: (len(rivals) + 1) // 2]
        return rivals[0] if rivals else None

    def rivals(self, kernel: Kernel) -> list[Schedule]:
        """What `settle` compares."""
        return contenders(self._history(kernel), self._served(kernel))

    def _served(self, kernel: Kernel) -> Schedule | None:
        served = self.records.served(self.measurer.fingerprint, PROTOCOL, kernel.key).get(kernel.key)
        return None if served is None else served.schedule

    def _compare(self, kernel: Kernel, rivals: Sequence[Schedule]) -> list[tuple[float, ...]]:
        times = self.records.duel(kernel.key, self.measurer.fingerprint, rivals)
        if times is None:
            times = self.measurer.duel(kernel, rivals, fresh=False)
            self.records.add_duel(kernel.key, self.measurer.fingerprint, rivals, times)
        return times

    def _recorded(self, kernel: Kernel, rivals: Sequence[Schedule]) -> list[tuple[float, ...]]:
        times = self.records.duel(kernel.key, self.measurer.fingerprint, rivals)
        if times is None:
            raise LookupError("never compared")
        return times

    def decided(self, kernel: Kernel) -> bool:
        """Whether `finish` would find all that it asks on record."""
        hand = self._history(kernel).hand_coded
        if hand is None:
            return True
        try:
            best = self._halved(kernel, self._recorded)
        except LookupError:
            return False
        if best == hand.schedule:
            return self._served(kernel) in (None, best)
        return best is None or self._verdict(kernel, best, hand) is not None

    def _verdict(self, kernel: Kernel, schedule: Schedule, hand: Trial) -> Final | None:
        """On record, and not to be looked at again: a refusal in a noisy minute is, and one beside another winner than the one that is
        served now. A refusal is judged by the noise floor that is known now, not by the one that was known then."""
        final = self.records.final(kernel.key, self.measurer.fingerprint, schedule)
        if final is None or final.protocol < PROTOCOL:
            return None
        if final.accepted:
            return final
        rivals = self._fresh_rivals(kernel, schedule, hand.schedule)
        times = self.records.duel(kernel.key, self.measurer.fingerprint, rivals)
        if final.noise > NOISE_FLOOR or times is None:
            return None
        again = self._judged(kernel, rivals, times, hand)
        return again if again.accepted else final

    def _fresh_rivals(self, kernel: Kernel, best: Schedule, hand: Schedule) -> list[Schedule]:
        """What is timed in a fresh process: the fastest, the winner that is served where that is another one, hand-coded twice."""
        served = self._served(kernel)
        return [best, *([served] if served not in (None, best, hand) else []), hand, hand]

    def _judged(
        self, kernel: Kernel, rivals: Sequence[Schedule], times: Sequence[tuple[float, ...]], hand: Trial
    ) -> Final:
        """Accepted only if it beats the one that is served, too: of two that are alike the one that is there stays."""
        floor = floor_at(self.records.noise(self.measurer.fingerprint), hand.seconds or 0.0)
        final = judge(kernel, rivals[0], (times[0], *times[-2:]), floor)
        tuned, *served = (statistics.median(t) for t in times[:-2])
        return replace(final, accepted=final.accepted and all(tuned < t * (1.0 - floor) for t in served))

    def finish(self, kernel: Kernel) -> Final | None:
        """Time the fastest against hand-coded in a fresh process, unless that was done for this very schedule. None where there is
        nothing to time, or the kernel cannot be prepared."""
        hand = self._history(kernel).hand_coded
        if hand is None:
            return None
        while (best := self.settle(kernel)) is not None:
            if best == hand.schedule:
                self._withdraw_slower(kernel, best)
                return None
            if (final := self._verdict(kernel, best, hand)) is not None:
                if final.accepted and self._served(kernel) != best:  # the newest is: a merge may bring others
                    self.records.add_final(self.measurer.fingerprint, final)
                return final
            rivals = self._fresh_rivals(kernel, best, hand.schedule)
            try:
                times = self.measurer.duel(kernel, rivals)
            except Refuted as refuted:
                commit(self.records, self.measurer, kernel, [refuted.trial])
                if refuted.trial.schedule == hand.schedule:
                    return None
                continue
            except Unprepared as why:
                return self._left(why)
            self.records.add_duel(kernel.key, self.measurer.fingerprint, rivals, times)
            final = self._judged(kernel, rivals, times, hand)
            self.records.add_final(self.measurer.fingerprint, final)
            beside = [
                statistics.median(t) for t in times[1:]
            ]  # the one that is served, if there is one, and hand-coded twice
            if not final.accepted and beside[0] > max(beside[-2:]):
                self._withdraw_slower(kernel, best)
            return final
        return None

    def _withdraw_slower(self, kernel: Kernel, best: Schedule) -> None:
        """Hold the schedule that is served against hand-coded, which was just seen to be faster: a file that was merged may say otherwise
        of another minute."""
        served = self._served(kernel)
        if served not in (None, best):
            with contextlib.suppress(Refuted):  # it is served no more then, either
                self.again(kernel, served)

    def again(self, kernel: Kernel, schedule: Schedule) -> Final | None:
        """Time a schedule that is served against hand-coded once more. One that does not beat it any more is served no longer, unless
        this is a noisy minute. None where that cannot be told. Raises Refuted where it fails, which is on record by then."""
        hand = self._history(kernel).hand_coded
        if hand is None:
            return None
        rivals = [schedule, hand.schedule, hand.schedule]
        try:
            times = self.measurer.duel(kernel, rivals)
        except Refuted as refuted:
            commit(self.records, self.measurer, kernel, [refuted.trial])
            if refuted.trial.schedule == schedule:
                raise
            return None
        except Unprepared as why:
            return self._left(why)
        final = self._judged(kernel, rivals, times, hand)
        if final.accepted or final.noise <= NOISE_FLOOR:
            self.records.add_duel(
                kernel.key, self.measurer.fingerprint, rivals, times
            )  # else the older one would speak for it
            self.records.add_final(self.measurer.fingerprint, final)
        return final

    @staticmethod
    def _left(why: Unprepared) -> None:
        tqdm.write(f"autotune: left as it was: {why}", file=sys.stderr)

    def _history(self, kernel: Kernel) -> History:
        return self.records.history(kernel.key, self.measurer.fingerprint)
