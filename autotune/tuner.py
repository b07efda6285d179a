"""Tuning a set of kernels: one budget, most total time first, every trial committed at once, never worse at the end."""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from autotune.capture import Program
from autotune.compiler import Renderer, default_device, renderer_of
from autotune.errors import UsageError
from autotune.guide import Guide, find_checkpoint
from autotune.kernel import Kernel, Schedule, schedule_to_json
from autotune.measuring.bench import PROTOCOL
from autotune.measuring.noise import floor_at
from autotune.measuring.runner import ACCIDENTS, Measurer, Refuted, Runner, commit, judge
from autotune.records import Final, History, Records, Trial, default_path
from autotune.records.claims import share
from autotune.search import DEFAULT, NEEDS_GUIDE, STRATEGIES, make_strategy

BATCH = 4  # trials between two talks with the strategy: enough to compile in parallel, few enough to learn from
CLOSE, CONTENDERS = 1.1, 4  # schedules within this factor of the best are compared again, so many of them at most
CUTOFF = 4.0  # candidates slower than this many times the incumbent get two samples only


@dataclass
class Budget:
    """The one counter. `trials` for all kernels together, `seconds` of wall time; None: no limit."""

    trials: int
    seconds: float | None = None
    clock: Callable[[], float] = time.monotonic
    started: float = field(default=0.0)
    stop_after: int | None = None  # a replay stops at the count that the recorded run had reached by its clock
    spent: int = 0

    def __post_init__(self) -> None:
        self.started = self.clock()

    def left(self, wanted: int) -> int:
        """How many of `wanted` trials may still be made."""
        if self.stop_after is not None:
            return max(0, min(wanted, self.stop_after - self.spent))
        if self.seconds is not None and self.elapsed() >= self.seconds:
            return 0
        return max(0, min(wanted, self.trials - self.spent))

    def elapsed(self) -> float:
        return self.clock() - self.started


@dataclass
class KernelResult:
    """What tuning one kernel came to. Times in seconds; `tuned_seconds` is hand-coded's where no winner was accepted."""

    kernel: Kernel
    calls: int
    hand_coded_seconds: float
    tuned_seconds: float
    trials: int
    schedule: Schedule | None  # None: stays as tinygrad would run it
    verdicts: dict[str, int]

    @property
    def ratio(self) -> float:
        return self.tuned_seconds / self.hand_coded_seconds if self.hand_coded_seconds else 1.0


@dataclass
class Report:
    """The result of a tuning run; totals are weighted by calls."""

    device: str
    seconds: float
    compiled: int
    kernels: list[KernelResult]
    stopped: str = ""  # why not everything was done: "" or "seconds"

    @property
    def hand_coded_seconds(self) -> float:
        return sum(k.hand_coded_seconds * k.calls for k in self.kernels)

    @property
    def tuned_seconds(self) -> float:
        return sum(k.tuned_seconds * k.calls for k in self.kernels)

    def to_json(self) -> dict[str, Any]:
        """The contract of `tune --json`."""
        rows = [{"key": k.kernel.key, "name": k.kernel.name, "calls": k.calls, "hand_coded_ms": k.hand_coded_seconds * 1e3,
                 "tuned_ms": k.tuned_seconds * 1e3, "trials": k.trials,
                 "schedule": None if k.schedule is None else schedule_to_json(k.schedule), "verdicts": k.verdicts}
                for k in self.kernels]  # fmt: skip
        return {"device": self.device, "seconds": self.seconds, "compiled": self.compiled, "kernels": rows,
                "hand_coded_ms": self.hand_coded_seconds * 1e3, "tuned_ms": self.tuned_seconds * 1e3}  # fmt: skip

    def table(self) -> str:
        """For people: one line a kernel, the total below."""
        head = f"{'kernel':34} {'calls':>5} {'hand-coded':>11} {'tuned':>9} {'ratio':>6} {'trials':>6}  schedule"
        lines = [head, "-" * len(head)]
        for k in sorted(self.kernels, key=lambda k: -k.hand_coded_seconds * k.calls):
            schedule = (
                "as tinygrad"
                if k.schedule is None
                else " ".join(_short(o) for o in schedule_to_json(k.schedule)) or "plain"
            )
            lines.append(f"{k.kernel.name[:34]:34} {k.calls:5d} {k.hand_coded_seconds * 1e3:8.3f} ms {k.tuned_seconds * 1e3:6.3f} ms "
                         f"{k.ratio:6.2f} {k.trials:6d}  {schedule}")  # fmt: skip
        total = self.tuned_seconds / self.hand_coded_seconds if self.hand_coded_seconds else 1.0
        lines.append(f"{'sum over calls':34} {sum(k.calls for k in self.kernels):5d} {self.hand_coded_seconds * 1e3:8.3f} ms "
                     f"{self.tuned_seconds * 1e3:6.3f} ms {total:6.2f} {sum(k.trials for k in self.kernels):6d}")  # fmt: skip
        return "\n".join(lines)


def contenders(history: History) -> list[Schedule]:
    """The fastest verified schedules, each binary once: those within CLOSE of the best, fastest first."""
    good = sorted(history.good, key=lambda t: t.seconds or 0.0)
    distinct = {t.code_hash or t.schedule: t for t in reversed(good)}
    close = [t for t in good if t in distinct.values() and (t.seconds or 0.0) <= CLOSE * (good[0].seconds or 0.0)]
    return list(dict.fromkeys(t.schedule for t in close))[:CONTENDERS]


def _short(opt: Sequence[Any]) -> str:
    return f"{opt[0]}:{'' if opt[1] is None else opt[1]}:{'' if opt[2] is None else opt[2]}"


class Tuner:
    """Everything that a run shares: records, the measuring device, the strategy, the budget."""

    def __init__(self, records: Records, measurer: Measurer, renderer: Renderer, *, trials: int, strategy: str = DEFAULT,
                 guide: Guide | None = None, seed: int = 0, progress: bool = True):  # fmt: skip
        if strategy not in STRATEGIES:
            raise UsageError(f"unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
        if strategy in NEEDS_GUIDE and guide is None:
            raise UsageError(
                f"strategy {strategy!r} needs a checkpoint: run `make train`, or name one with --checkpoint"
            )
        self.records, self.measurer, self.renderer = records, measurer, renderer
        self.trials, self.strategy, self.guide, self.seed, self.progress = trials, strategy, guide, seed, progress

    def run(
        self, kernels: Sequence[Kernel], calls: Mapping[str, int], budget: Budget
    ) -> tuple[list[KernelResult], bool]:
        """(results, whether all was done). Baselines first, so that the kernels can be put in order of total time."""
        bar = tqdm(total=len(kernels) * (self.trials + 2), desc="tuning", unit="trial", disable=not self.progress)
        where = self.records.path, self.measurer.fingerprint
        with bar:

            def begin(kernel: Kernel) -> None:
                self.baselines(kernel)
                bar.update(2)

            def search(kernel: Kernel) -> None:
                bar.set_postfix_str(kernel.name)
                self.search(kernel, budget, bar.update)

            share(*where, kernels, begin)
            order = sorted(kernels, key=lambda k: -self.hand_coded_seconds(k) * calls[k.key])
            share(*where, order, search, lambda: budget.left(1) > 0)
        with tqdm(total=len(order), desc="final timing", disable=not self.progress) as bar:
            share(*where, order, lambda kernel: (self.finish(kernel), bar.update(1)))
        done = all(self.history_spent(k) >= self.trials for k in kernels) or budget.left(1) > 0
        return [self.result(k, calls[k.key]) for k in order], done

    def baselines(self, kernel: Kernel) -> None:
        known = self._history(kernel).baselines
        if "hand_coded" not in known or any(known[kind].verdict in ACCIDENTS for kind in ("unoptimized", "hand_coded")):
            commit(self.records, self.measurer, kernel, self.measurer.baselines(kernel))

    def search(self, kernel: Kernel, budget: Budget, tick: Callable[[int], Any] = lambda n: None) -> None:
        """Spend this kernel's trials; those that are on record already count as spent."""
        history = self._history(kernel)
        if history.best is None:  # not even un-optimized does it run here: it is left as it is
            tick(self.trials)
            return
        tick(min(history.spent, self.trials))
        strategy = make_strategy(self.strategy, kernel, self.renderer, self.seed, self.guide)
        strategy.tell(history.trials)
        if self.trials == 0 and self.guide is not None and "answer" not in history.baselines:
            self._answer(kernel)
        while (count := budget.left(min(BATCH, self.trials - history.spent))) > 0:
            asked = strategy.ask(count)
            if not asked:
                tick(self.trials - history.spent)
                break
            best = history.best
            cutoff = CUTOFF * best.seconds if best is not None and best.seconds is not None else None
            trials: list[Trial] = []

            def done(trial: Trial, kernel: Kernel = kernel, trials: list[Trial] = trials) -> None:
                trials.append(self._labelled(trial))
                commit(self.records, self.measurer, kernel, trials[-1:])
                budget.spent += 1
                tick(1)

            self.measurer.measure(kernel, asked, cutoff, done)
            history.trials += trials
            strategy.tell(trials)
        self.settle(kernel)  # now, while its buffers and binaries are at hand

    def _answer(self, kernel: Kernel) -> None:
        """Zero trials: the policy's single answer, compiled and verified, held against hand-coded like any winner."""
        policy = make_strategy("policy", kernel, self.renderer, self.seed, self.guide)
        for trial in self.measurer.measure(kernel, policy.ask(1), None):
            commit(self.records, self.measurer, kernel, [replace(self._labelled(trial), kind="answer")])

    def _labelled(self, trial: Trial) -> Trial:
        return replace(trial, strategy=self.strategy, seed=self.seed)

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
        """Time the winner against hand-coded in a fresh process, unless that was done for this very schedule."""
        hand = self._history(kernel).baselines.get("hand_coded")
        while (best := self.settle(kernel)) is not None:
            if hand is None or hand.seconds is None or best == hand.schedule:
                return None
            final = self.records.final(kernel.key, self.measurer.fingerprint)
            if final is not None and final.schedule == best and final.protocol >= PROTOCOL:
                return final
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

    def result(self, kernel: Kernel, calls: int) -> KernelResult:
        history = self._history(kernel)
        final = self.records.final(kernel.key, self.measurer.fingerprint)
        hand = self.hand_coded_seconds(kernel)
        tuned, schedule = hand, None
        if final is not None and final.protocol >= PROTOCOL:
            hand = statistics.median(final.hand_coded)
            tuned, schedule = (statistics.median(final.tuned), final.schedule) if final.accepted else (hand, None)
        verdicts = Counter(t.verdict for t in history.trials if t.kind == "trial")
        return KernelResult(kernel, calls, hand, tuned, history.spent, schedule, dict(verdicts))

    def hand_coded_seconds(self, kernel: Kernel) -> float:
        """Median of the hand-coded baseline; 0 where it could not be measured."""
        hand = self._history(kernel).baselines.get("hand_coded")
        return (hand.seconds or 0.0) if hand is not None else 0.0

    def history_spent(self, kernel: Kernel) -> int:
        return self._history(kernel).spent

    def _history(self, kernel: Kernel) -> History:
        return self.records.history(kernel.key, self.measurer.fingerprint)


def tune(
    kernels: Program | Sequence[Kernel], *, records: str | os.PathLike[str] | Records | None = None, trials: int = 16,
    seconds: float | None = None, strategy: str = DEFAULT, checkpoint: str | os.PathLike[str] | Guide | None = None,
    seed: int = 0, progress: bool = True,
) -> Report:  # fmt: skip
    """Tune kernels (those of `capture()`, or a list) on the device that DEV names, and return a Report.

    `trials` times the number of kernels is allowed in all, `seconds` bounds the wall time; what is on record already is
    not spent again. Without a checkpoint a learned strategy takes the newest of this backend, else one that ships. Raises AutotuneError subclasses only.
    """
    device = default_device()
    chosen = kernels.for_device(device) if isinstance(kernels, Program) else list(kernels)
    calls = kernels.calls if isinstance(kernels, Program) else {k.key: 1 for k in chosen}
    renderer = renderer_of(device)
    if isinstance(checkpoint, Guide):
        guide: Guide | None = checkpoint
    else:
        named = Path(checkpoint) if checkpoint else None
        guide = Guide.load(find_checkpoint(named, device)) if strategy in NEEDS_GUIDE else None
    opened = records if isinstance(records, Records) else Records(records or default_path())
    runner = Runner(device)
    try:
        opened.add_fingerprint(runner.fields)
        tuner = Tuner(
            opened, runner, renderer, trials=trials, strategy=strategy, guide=guide, seed=seed, progress=progress
        )
        budget = Budget(trials * len(chosen), seconds)
        results, done = tuner.run(chosen, calls, budget)
        return Report(device, budget.elapsed(), runner.compiled, results, "" if done else "seconds")
    finally:
        runner.close()
