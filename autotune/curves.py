"""How many trials a strategy needs: its best schedule after 1, 2, ... trials of a kernel, beside the best that anyone found.

All strategies share one file of trials: a schedule that one of them had measured is told to the others and not measured
again, though each is charged for it. So all see the same times, luck of the timer included, and a comparison that is run
again from the same file asks the device nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from autotune.compiler import Renderer
from autotune.guide import Guide
from autotune.kernel import Kernel, Schedule
from autotune.measuring.runner import Measurer, commit
from autotune.records import Records, Trial
from autotune.search import make_strategy
from autotune.statistics import bootstrap, improvement, iqm
from autotune.tuner import BATCH, CUTOFF

BUDGETS = (1, 2, 4, 8, 16, 32, 64)  # trials of a kernel at which strategies are held against each other
CLOSE = math.log2(1.05)  # "within 5% of the best known"


@dataclass(frozen=True)
class Curve:
    """One search of one kernel. Times are log2 seconds."""

    kernel: str  # key
    strategy: str
    seed: int
    hand_coded: float
    times: list[float | None]  # of each trial in turn; None where it failed
    seconds: list[float]  # wall-clock up to and including each trial: thinking, compiling, verifying, timing

    def best_after(self, trials: int) -> float:
        """What a user has after so many trials: the best of them, or hand-coded."""
        return min([self.hand_coded, *(t for t in self.times[:trials] if t is not None)])


class Shared:
    """Trials of one kernel, measured once whoever asks."""

    def __init__(self, kernel: Kernel, records: Records, measurer: Measurer):
        self.kernel, self.records, self.measurer = kernel, records, measurer
        history = records.history(kernel.key, measurer.fingerprint)
        if "hand_coded" not in history.baselines:
            commit(records, measurer, kernel, measurer.baselines(kernel))
            history = records.history(kernel.key, measurer.fingerprint)
        self.baselines = history.baselines
        self.known: dict[Schedule, Trial] = {t.schedule: t for t in history.trials if t.kind == "trial"}

    @property
    def hand_coded(self) -> float:
        """Log2 seconds of the schedule that tinygrad would take, or of the un-optimized kernel where that is all there is."""
        known = [self.baselines[kind].seconds for kind in ("hand_coded", "unoptimized") if kind in self.baselines]
        return min((math.log2(t) for t in known if t), default=math.nan)

    def trials(self, schedules: Sequence[Schedule]) -> list[Trial]:
        """What is on record of some schedules; those of which nothing is are measured, and committed."""
        missing = [s for s in dict.fromkeys(schedules) if s not in self.known]
        if missing:
            found = self.measurer.measure(self.kernel, missing, CUTOFF * 2.0**self.hand_coded)
            commit(self.records, self.measurer, self.kernel, found)
            self.known.update((t.schedule, t) for t in found)
        return [replace(self.known[s], kind="trial") for s in schedules]


def search(kernel: Kernel, shared: Shared, strategy: str, renderer: Renderer, seed: int, guide: Guide | None,
           budget: int) -> Curve:  # fmt: skip
    """One search from empty records; it is told the baselines, as in the tuner."""
    began = time.perf_counter()
    searching = make_strategy(strategy, kernel, renderer, seed, guide)
    searching.tell(list(shared.baselines.values()))
    spent = time.perf_counter() - began
    times: list[float | None] = []
    seconds: list[float] = []
    while len(times) < budget:
        began = time.perf_counter()
        asked = searching.ask(min(BATCH, budget - len(times)))
        spent += time.perf_counter() - began
        if not asked:
            break
        trials = shared.trials(asked)
        began = time.perf_counter()
        searching.tell(trials)
        spent += time.perf_counter() - began
        for trial in trials:
            spent += trial.compile_seconds + trial.verify_seconds + trial.timing_seconds
            times.append(None if trial.seconds is None else math.log2(trial.seconds))
            seconds.append(spent)
    return Curve(kernel.key, strategy, seed, shared.hand_coded, times, seconds)


def best_known(curves: Sequence[Curve]) -> dict[str, float]:
    """Log2 seconds of the fastest schedule that any search of a kernel met, hand-coded included."""
    best: dict[str, float] = {}
    for curve in curves:
        best[curve.kernel] = min(best.get(curve.kernel, math.inf), curve.best_after(len(curve.times)))
    return best


def needed(curve: Curve, best: float) -> tuple[float, float]:
    """(trials, seconds) until a search was within 5% of the best known; infinite where it never was. 0 trials: hand-coded is."""
    if curve.hand_coded <= best + CLOSE:
        return 0.0, 0.0
    for i, t in enumerate(curve.times):
        if t is not None and t <= best + CLOSE:
            return float(i + 1), curve.seconds[i]
    return math.inf, math.inf


def totals(curves: Sequence[Curve], calls: Mapping[str, int], trials: int | None = None) -> np.ndarray:
    """Seconds of all kernels and calls together over hand-coded, after so many trials of each kernel (None: all), by seed [S].

    `curves` are those of one strategy.
    """
    found = []
    for seed in sorted({c.seed for c in curves}):
        own = [c for c in curves if c.seed == seed]
        spent = [len(c.times) if trials is None else trials for c in own]
        best = sum(calls[c.kernel] * 2.0 ** c.best_after(n) for c, n in zip(own, spent, strict=True))
        found.append(best / sum(calls[c.kernel] * 2.0**c.hand_coded for c in own))
    return np.array(found)


def summarise(
    curves: Sequence[Curve], control: str = "random", calls: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """By strategy. `score`: best known time over own best after each budget, IQM with its interval; `over`: probability of
    improvement over the control there; `reached`: share of searches within 5% after each budget; `trials` and `seconds`
    until then: medians over searches (None: fewer than half ever were); `each_trial`: seconds a trial, thinking included;
    `total`: of all kernels together over hand-coded after each budget, mean over seeds, the kernels' `calls` counted (None:
    once each); `end`: the same at the end of its searches, with their trials and
    seconds, means over kernels and seeds."""
    calls = calls or {c.kernel: 1 for c in curves}
    best = best_known(curves)
    kernels, seeds = sorted(best), sorted({c.seed for c in curves})
    of = {(c.strategy, c.seed, c.kernel): c for c in curves}
    names = list(dict.fromkeys(c.strategy for c in curves))
    budgets = [b for b in BUDGETS if b <= max(len(c.times) for c in curves)]

    def scores(name: str, budget: int) -> np.ndarray:
        return np.array([[2.0 ** (best[k] - of[name, s, k].best_after(budget)) for k in kernels] for s in seeds])

    found: dict[str, Any] = {}
    for name in names:
        own = [of[name, s, k] for s in seeds for k in kernels]
        until = [needed(c, best[c.kernel]) for c in own]
        found[name] = {
            "score": {b: asdict(bootstrap(iqm, scores(name, b))) for b in budgets},
            "over": {b: asdict(bootstrap(improvement, scores(name, b), scores(control, b))) for b in budgets}
            if control in names else {},
            "reached": {b: float(np.mean([t <= b for t, _ in until])) for b in budgets},
            "trials": _finite(np.median([t for t, _ in until])), "seconds": _finite(np.median([s for _, s in until])),
            "each_trial": float(np.mean([c.seconds[-1] / len(c.times) for c in own if c.times])),
            "worst": {b: float(scores(name, b).min()) for b in budgets},
            "total": {b: float(totals(own, calls, b).mean()) for b in budgets},
            "end": {"total": float(totals(own, calls).mean()), "trials": float(np.mean([len(c.times) for c in own])),
                    "seconds": float(np.mean([max(c.seconds, default=0.0) for c in own]))},
        }  # fmt: skip
    return found


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def table(summary: dict[str, Any]) -> str:
    """For people: a line a strategy, the score after each budget."""
    budgets = list(next(iter(summary.values()))["score"])
    lines = [
        f"{'strategy':12}" + "".join(f"{b:>24}" for b in budgets) + f"{'trials to 5%':>14}{'seconds':>9}{'s/trial':>9}"
    ]  # fmt: skip
    for name, row in summary.items():
        cells = [f"{v['value']:.3f} ({v['low']:.3f}-{v['high']:.3f})" for v in row["score"].values()]
        until = [
            f"{'never' if row[key] is None else f'{row[key]:.1f}':>{width}}"
            for key, width in (("trials", 14), ("seconds", 9))
        ]
        lines.append(f"{name:12}" + "".join(f"{c:>24}" for c in cells) + "".join(until) + f"{row['each_trial']:9.2f}")
    return "\n".join(lines)
