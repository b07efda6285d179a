"""Do recorded schedules still hold? Each is compiled, verified and timed again on this machine."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from autotune.kernel import Kernel, Schedule
from autotune.measuring.bench import PROTOCOL
from autotune.measuring.runner import RETRIED, UNPREPARED, Measurer
from autotune.records import Records, Trial

# A time counts as moved beyond this ratio. Medians of one machine differ by some percent from day to day (clocks, memory
# layout, neighbours), and a process that has measured others before was seen to time 6 to 8 % slower than a fresh one.
SLOWER = 1.10
ENOUGH = 20  # claims to look at where nobody says how many, though fewer be served


@dataclass(frozen=True)
class Claim:
    """What the records say of one schedule."""

    kernel: Kernel
    schedule: Schedule
    seconds: float
    winner: bool  # accepted, and so served to programs

    @property
    def name(self) -> tuple[str, Schedule]:
        return self.kernel.key, self.schedule


@dataclass(frozen=True)
class Checked:
    """A claim, and the trial that it was put to now."""

    claim: Claim
    now: Trial

    @property
    def judged(self) -> bool:
        """Whether anything was learned of it: not where the kernel itself could not be prepared."""
        return not self.now.detail.startswith(UNPREPARED)

    @property
    def holds(self) -> bool:
        """Whether it still compiles and gives the right outputs, for all that is known."""
        return self.now.verdict == "ok" or not self.judged

    @property
    def ratio(self) -> float:
        """Time now over time on record; nan where there is none now."""
        return float("nan") if self.now.seconds is None else self.now.seconds / self.claim.seconds

    @property
    def slower(self) -> bool:
        return self.ratio > SLOWER


def choose(records: Records, fingerprint: str, count: int | None, seed: int) -> list[Claim]:
    """Up to `count` claims of a device, in random order: winners that are served first, then others that were right and
    were never refuted. None: all winners, and ENOUGH claims at least."""
    kernels = {k.key: k for k in records.kernels()}
    rng = random.Random(seed)
    winners = [Claim(kernels[key], f.schedule, statistics.median(f.tuned), True)
               for key, f in sorted(records.served(fingerprint, PROTOCOL).items()) if key in kernels]  # fmt: skip
    rng.shuffle(winners)
    seen = {c.name for c in winners}
    trials = [trial for _, trial in records.all_trials(fingerprint)]
    seen |= {(t.kernel, t.schedule) for t in trials if t.refutes}
    others: dict[tuple[str, Schedule], Claim] = {}
    for trial in trials:
        name = trial.kernel, trial.schedule
        if trial.seconds is not None and trial.kernel in kernels and name not in seen:
            others[name] = Claim(kernels[trial.kernel], trial.schedule, trial.seconds, False)
    rest = list(others.values())
    rng.shuffle(rest)
    return [*winners, *rest][: max(ENOUGH, len(winners)) if count is None else count]


def recheck(claims: list[Claim], measurer: Measurer, tell: Callable[[Checked], None]) -> None:
    """Measure each claim again, kernel by kernel, and `tell` of it as soon as it is known, so that what comes in between loses
    nothing. The trials are of kind "recheck". An accident is tried once more, and so is what did not compile: that may be one."""
    for key in dict.fromkeys(c.kernel.key for c in claims):
        own = [c for c in claims if c.kernel.key == key]
        _recheck(own[0].kernel, {c.schedule: c for c in own}, measurer, tell)


def _recheck(
    kernel: Kernel, waiting: dict[Schedule, Claim], measurer: Measurer, tell: Callable[[Checked], None]
) -> None:
    def known(now: Trial) -> None:
        tell(Checked(waiting.pop(now.schedule), replace(now, kind="recheck")))

    def done(now: Trial) -> None:
        if now.verdict not in RETRIED:
            known(now)

    measurer.measure(kernel, list(waiting), None, done)
    for schedule in list(waiting):
        (now,) = measurer.measure(kernel, [schedule], None)
        known(now)
