"""How many trials a strategy needs: its best schedule after 1, 2, ... trials of a kernel, beside the best that anyone found.

All strategies share one file of trials: a schedule that one of them had measured is not measured again when another asks for it,
but charged to that one all the same. So all see the same times, luck of the timer included, and a comparison that is run
again from the same file asks the device nothing.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from autotune.compiler import Renderer
from autotune.guide import Guide
from autotune.kernel import Kernel, Schedule
from autotune.measuring.runner import COMPILERS, CUTOFF, Measurer, commit, known_of
from autotune.records import Records, Trial
from autotune.search import Strategy, make_strategy, promise_of
from autotune.search.acquisition import BATCH
from autotune.space import root_state
from autotune.spending import Spending
from autotune.statistics import bootstrap, improvement, iqm

BUDGETS = (1, 2, 4, 8, 10, 16, 32, 64, 128, 256)  # trials of a kernel at which strategies are held against each other
Make = Callable[[str, Kernel, Renderer, int, Guide | None], Strategy]
CLOSE = math.log2(1.05)  # "within 5% of the best known"


@dataclass(frozen=True)
class Curve:
    """One search of one kernel. Times are log2 seconds."""

    kernel: str  # key
    strategy: str
    seed: int
    hand_coded: float
    times: list[float | None]  # of each trial in turn; None where it failed
    seconds: list[float]  # of wall time spent up to and including each trial: thinking, compiling, verifying, timing
    turns: list[float] | None = None  # where a program's kernels share their trials: its trials so far, a kernel
    floor: float | None = None  # of the un-optimized kernel, had without a trial, too; None where it has no time

    def made(self, trials: float) -> int:
        """How many trials this kernel had had when its program had had so many of each kernel, on average."""
        return bisect_right(self.turns or range(1, len(self.times) + 1), trials)

    def visits(self, kernels: int) -> list[int]:
        """For each trial how often the search had come to this kernel by then: once, or, where `kernels` share their trials, anew
        after those of others. At first it must be prepared."""
        turns = self.turns or []
        if not turns:
            return [1] * len(self.times)
        anew = [after - before > 1.5 / kernels for before, after in pairwise(turns)]
        return [1 + sum(anew[:i]) for i in range(len(turns))]

    def best_after(self, trials: float) -> float:
        """What a user has after so many trials: the best of them, or of the two baselines."""
        return min([self.without, *(t for t in self.times[: self.made(trials)] if t is not None)])

    @property
    def without(self) -> float:
        """What is had without a trial: the faster of both baselines."""
        return self.hand_coded if self.floor is None else min(self.hand_coded, self.floor)

    def spent_after(self, trials: float) -> float:
        """Seconds."""
        made = self.made(trials)
        return self.seconds[made - 1] if made else 0.0


class Shared:
    """Trials of one kernel, measured once whoever asks."""

    def __init__(self, kernel: Kernel, records: Records, measurer: Measurer):
        self.kernel, self.records, self.measurer = kernel, records, measurer
        history = known_of(records, measurer, kernel)
        self.baselines = history.baselines
        self.known: dict[Schedule, Trial] = {t.schedule: t for t in history.trials if t.kind == "trial"}

    @property
    def hand_coded(self) -> float:
        """Log2 seconds of the schedule that tinygrad would take; NaN where it has no time."""
        time = self.log_time("hand_coded")
        return math.nan if time is None else time

    def log_time(self, kind: str) -> float | None:
        """Log2 seconds of a baseline; None where it has no time."""
        seconds = self.baselines[kind].seconds if kind in self.baselines else None
        return None if seconds is None else math.log2(seconds)

    @property
    def fastest_baseline(self) -> float:
        """Seconds."""
        return min(t.seconds for t in self.baselines.values() if t.seconds is not None)

    def trials(self, schedules: Sequence[Schedule]) -> list[Trial]:
        """What is on record of some schedules; those of which nothing is are measured, and committed."""
        missing = [s for s in dict.fromkeys(schedules) if s not in self.known]
        if missing:
            self.measurer.measure(self.kernel, missing, CUTOFF * self.fastest_baseline, self._keep)
        return [replace(self.known[s], kind="trial") for s in schedules]

    def _keep(self, trial: Trial) -> None:
        commit(self.records, self.measurer, self.kernel, [trial])
        self.known[trial.schedule] = trial


class Search:
    """One search of one kernel from empty records; it is told the baselines, as in the tuner."""

    def __init__(self, shared: Shared, name: str, seed: int, make: Callable[[Kernel], Strategy]):
        began = time.perf_counter()
        self.shared, self.name, self.seed, self.strategy = shared, name, seed, make(shared.kernel)
        self.strategy.tell(list(shared.baselines.values()))
        self.spent = time.perf_counter() - began
        self.times: list[float | None] = []
        self.seconds: list[float] = []
        self.timed: list[tuple[Schedule, float]] = []  # with seconds; what failed is not among them

    @property
    def best(self) -> float:
        """Seconds of the fastest so far, hand-coded included."""
        return 2.0 ** self.curve().best_after(len(self.times))

    def visit(self, limit: int) -> int:
        """Up to `limit` trials; returns how many."""
        before = len(self.times)
        while (left := before + limit - len(self.times)) > 0:
            began = time.perf_counter()
            asked = self.strategy.ask(min(BATCH, left))
            self.spent += time.perf_counter() - began
            if not asked:
                break
            trials = self.shared.trials(asked)
            began = time.perf_counter()
            self.strategy.tell(trials)
            self.spent += time.perf_counter() - began + makespan([t.compile_seconds for t in trials])
            for trial in trials:
                self.spent += trial.verify_seconds + trial.timing_seconds
                self.times.append(None if trial.seconds is None else math.log2(trial.seconds))
                self.seconds.append(self.spent)
            self.timed += [(t.schedule, t.seconds) for t in trials if t.seconds is not None]
        return len(self.times) - before

    def promise(self, trials: int) -> float | None:
        """As `Spending` asks for it."""
        return promise_of(self.strategy, trials)

    def curve(self, turns: list[float] | None = None) -> Curve:
        hand = self.shared.hand_coded
        return Curve(self.shared.kernel.key, self.name, self.seed, hand, self.times, self.seconds, turns,
                     self.shared.log_time("unoptimized"))  # fmt: skip


def makespan(seconds: Sequence[float]) -> float:
    """Of a batch's compilations, which the runner does side by side: each goes to the compiler that is free first."""
    free = [0.0] * COMPILERS
    for own in seconds:
        at = free.index(min(free))
        free[at] += own
    return max(free)


def search(shared: Shared, strategy: str, renderer: Renderer, seed: int, guide: Guide | None, budget: int,
           make: Make = make_strategy) -> Curve:  # fmt: skip
    """`budget` trials of one kernel."""
    searching = Search(shared, strategy, seed, lambda kernel: make(strategy, kernel, renderer, seed, guide))
    searching.visit(budget)
    return searching.curve()


def pooled(kernels: Sequence[Shared], calls: Mapping[str, int], strategy: str, renderer: Renderer, seed: int,
           guide: Guide | None, budget: int, make: Make = make_strategy) -> list[Curve]:  # fmt: skip
    """Searches of all kernels, whose trials go where they pay most, as the tuner spends them: `budget` a kernel on average. What
    one has found the others may recall, and are corrected by. `make` gives each kernel its strategy."""
    own = copy(guide)
    if own is not None and own.memory is not None:
        own.memory = own.memory.copy()

    def begin(kernel: Kernel) -> Strategy:
        return make(strategy, kernel, renderer, seed, own)

    searches = {shared.kernel.key: Search(shared, strategy, seed, begin) for shared in kernels}
    turns: dict[str, list[float]] = {key: [] for key in searches}
    spending = Spending([shared.kernel for shared in kernels], calls, lambda k: searches[k.key].best,
                        lambda k, trials: searches[k.key].promise(trials), lambda k: len(searches[k.key].times))  # fmt: skip
    done, total = 0, budget * len(kernels)
    while done < total:
        began = time.perf_counter()
        if (kernel := spending.next()) is None:
            break
        # what choosing costs, all kernels' promises, is the chosen one's
        searches[kernel.key].spent += time.perf_counter() - began
        before = searches[kernel.key].best
        made = searches[kernel.key].visit(min(spending.size(kernel), total - done))
        turns[kernel.key] += [(done + 1 + i) / len(kernels) for i in range(made)]
        done += made
        spending.visited(kernel, before, made)
        if own is not None and own.memory is not None:
            own.memory.add(root_state(kernel, renderer), searches[kernel.key].timed)
    return [own.curve(turns[key]) for key, own in searches.items()]


def best_known(curves: Sequence[Curve]) -> dict[str, float]:
    """Log2 seconds of the fastest schedule that any search of a kernel met, hand-coded included."""
    best: dict[str, float] = {}
    for curve in curves:
        best[curve.kernel] = min(best.get(curve.kernel, math.inf), curve.best_after(math.inf))
    return best


def needed(curve: Curve, best: float) -> tuple[float, float]:
    """(trials, seconds) until a search was within 5% of the best known; infinite where it never was. 0 trials: a baseline is."""
    if curve.without <= best + CLOSE:
        return 0.0, 0.0
    for i, t in enumerate(curve.times):
        if t is not None and t <= best + CLOSE:
            return float(i + 1) if curve.turns is None else curve.turns[i], curve.seconds[i]
    return math.inf, math.inf


def profile(curves: Sequence[Curve], strategy: str, trials: float, ratio: float) -> float:
    """Share of a strategy's searches whose best after so many trials takes at most `ratio` times the best known of its kernel:
    one point of its performance profile (Dolan & More, Benchmarking optimization software with performance profiles, 2002)."""
    best = best_known(curves)
    over = [c.best_after(trials) - best[c.kernel] for c in curves if c.strategy == strategy]
    return float(np.mean([o <= math.log2(ratio) for o in over]))


def totals(curves: Sequence[Curve], calls: Mapping[str, int], trials: int | None = None) -> np.ndarray:
    """Seconds of all kernels and calls together over hand-coded, after so many trials of each kernel (None: all), by seed [S].

    `curves` are those of one strategy.
    """
    found = []
    for seed in sorted({c.seed for c in curves}):
        own = [c for c in curves if c.seed == seed]
        best = sum(calls[c.kernel] * 2.0 ** c.best_after(math.inf if trials is None else trials) for c in own)
        found.append(best / sum(calls[c.kernel] * 2.0**c.hand_coded for c in own))
    return np.array(found)


def summarise(
    curves: Sequence[Curve], control: str = "random", calls: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """By strategy. `score`: best known time over own best after each budget, IQM with its interval; `over`: probability of
    improvement over the control there; `reached`: share of searches within 5% after each budget; `trials` and `seconds`
    until then: medians over searches (None: at most half ever were); `each_trial`: seconds a trial, thinking included;
    `worst`: the lowest score of all searches there; `total`: seconds of all kernels together over hand-coded after each
    budget, by seed, the kernels' `calls` counted (None: once each); `spent`: wall-clock until there, mean a kernel; `end`:
    the last two at the end of its searches, with their trials, means over seeds and a kernel. Strategies may have been given
    different numbers of seeds."""
    calls = calls or {c.kernel: 1 for c in curves}
    best = best_known(curves)
    kernels = sorted(best)
    of = {(c.strategy, c.seed, c.kernel): c for c in curves}
    seeds = {
        name: sorted({c.seed for c in curves if c.strategy == name})
        for name in dict.fromkeys(c.strategy for c in curves)
    }
    longest = max((c.turns or [len(c.times)])[-1] for c in curves)
    budgets = [b for b in BUDGETS if b <= longest]

    def scores(name: str, budget: int) -> np.ndarray:
        return np.array([[2.0 ** (best[k] - of[name, s, k].best_after(budget)) for k in kernels] for s in seeds[name]])

    found: dict[str, Any] = {}
    for name in seeds:
        own = [of[name, s, k] for s in seeds[name] for k in kernels]
        until = [needed(c, best[c.kernel]) for c in own]
        found[name] = {
            "score": {b: asdict(bootstrap(iqm, scores(name, b))) for b in budgets},
            "over": {b: asdict(bootstrap(improvement, scores(name, b), scores(control, b))) for b in budgets}
            if control in seeds else {},
            "reached": {b: float(np.mean([t <= b for t, _ in until])) for b in budgets},
            "trials": _finite(np.median([t for t, _ in until])), "seconds": _finite(np.median([s for _, s in until])),
            "each_trial": float(np.mean([c.seconds[-1] / len(c.times) for c in own if c.times])),
            "worst": {b: float(scores(name, b).min()) for b in budgets},
            "total": {b: totals(own, calls, b).tolist() for b in budgets},
            "spent": {b: {"seconds": float(np.mean([c.spent_after(b) for c in own]))} for b in budgets},
            "end": {"total": float(totals(own, calls).mean()), "trials": float(np.mean([len(c.times) for c in own])),
                    "seconds": float(np.mean([c.spent_after(math.inf) for c in own]))},
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
