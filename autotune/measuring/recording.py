"""Records in place of a device: measurements are answered from what was measured before, and nothing else may be asked."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

from autotune.errors import ReplayError
from autotune.kernel import Kernel, Schedule, schedule_to_json
from autotune.measuring.runner import Done, Refuted
from autotune.records import BASELINES, Records, Trial


class Recording:
    """A Measurer over records files. A schedule that was measured more than once gives its trials in their order."""

    def __init__(self, files: Sequence[Records], fingerprint: str):
        self.fingerprint, self.compiled = fingerprint, 0
        self.trials: dict[tuple[str, Schedule], deque[Trial]] = defaultdict(deque)
        self.refuted: dict[tuple[str, Schedule], Trial] = {}
        self.base: dict[str, deque[Trial]] = defaultdict(deque)
        self.duels: dict[tuple[str, tuple[Schedule, ...]], deque[list[tuple[float, ...]]]] = defaultdict(deque)
        for _, trial in sorted((row for f in files for row in f.all_trials(fingerprint)), key=lambda row: row[0]):
            if trial.kind == "recheck":
                self.refuted[trial.kernel, trial.schedule] = trial
            elif trial.kind in BASELINES:
                self.base[trial.kernel].append(trial)
            else:
                self.trials[trial.kernel, trial.schedule].append(trial)
        for _, key, schedules, samples in sorted(
            (row for f in files for row in f.all_duels(fingerprint)), key=lambda r: r[0]
        ):
            self.duels[key, schedules].append(samples)

    def baselines(self, kernel: Kernel) -> list[Trial]:
        """The next recorded pair. Raises ReplayError where there is none."""
        found = self.base[kernel.key]
        if len(found) < 2:
            raise ReplayError(f"{kernel.name} ({kernel.key}) has no recorded baselines; use --live")
        pair = [found[0], found[1]]
        if len(found) >= 4:  # the last pair stays for good
            found.popleft()
            found.popleft()
        return pair

    def measure(
        self, kernel: Kernel, schedules: Sequence[Schedule], cutoff: float | None, done: Done | None = None
    ) -> list[Trial]:
        """The next recorded trial of each schedule, whatever its cutoff was. Raises ReplayError for one that was never measured."""
        for schedule in schedules:
            if (kernel.key, schedule) not in self.trials:
                raise ReplayError(
                    f"{kernel.name}: schedule {schedule_to_json(schedule)} was never measured; use --live"
                )
        self.compiled += len(schedules)
        trials = [_next(self.trials[kernel.key, s]) for s in schedules]
        if done is not None:
            for trial in trials:
                done(trial)
        return trials

    def duel(self, kernel: Kernel, schedules: Sequence[Schedule], fresh: bool = True) -> list[tuple[float, ...]]:
        """The next recorded samples of these very schedules. Raises Refuted where the recorded duel did, else ReplayError."""
        if (kernel.key, tuple(schedules)) not in self.duels:
            for schedule in schedules:
                if (kernel.key, schedule) in self.refuted:
                    raise Refuted(self.refuted[kernel.key, schedule])
            raise ReplayError(
                f"{kernel.name}: no recorded comparison with {schedule_to_json(schedules[0])}; use --live"
            )
        return _next(self.duels[kernel.key, tuple(schedules)])

    def close(self) -> None:
        """Nothing is held: the files are the caller's."""
        return None


def _next(queue: deque[Any]) -> Any:
    """The next of a queue; its last one stays for good, so that an environment may ask again and again."""
    return queue.popleft() if len(queue) > 1 else queue[0]
