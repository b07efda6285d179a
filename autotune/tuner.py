"""Tuning a set of kernels: one budget, spent where it pays, every trial committed at once, never worse at the end."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tqdm import tqdm

from autotune.budget import Budget
from autotune.compiler import Renderer
from autotune.errors import TRAIN, UsageError
from autotune.guide import Guide
from autotune.kernel import Kernel, Schedule
from autotune.measuring.runner import Measurer, commit, cutoff_of, wants_baselines
from autotune.records import BASELINES, BEAM, History, Records, Trial
from autotune.records.claims import share
from autotune.report import KernelResult, result_of
from autotune.search import DEFAULT, NEEDS_GUIDE, POOLED, STRATEGIES, Strategy, make_strategy, origin_of, promise_of
from autotune.search.acquisition import BATCH
from autotune.search.beam import BeamSearch
from autotune.space import root_state
from autotune.spending import FROZEN, Spending
from autotune.strict import MAX_INT
from autotune.winners import Winners

FRESH = (
    2.0  # seconds that a final timing takes beyond the preparation of its kernel: a new process, and the duel itself
)


def _has_rival(history: History) -> bool:
    """Whether anything can be won: a kernel whose hand-coded form has no time cannot be shown to beat it."""
    return history.best is not None and history.hand_coded is not None


class Tuner:
    """Everything that a run shares: records, the measuring device, the strategy, the budget."""

    def __init__(self, records: Records, measurer: Measurer, renderer: Renderer, *, trials: int, strategy: str = DEFAULT,
                 guide: Guide | None = None, seed: int = 0, progress: bool = True, beam: int = 0):  # fmt: skip
        if strategy not in STRATEGIES:
            raise UsageError(f"unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
        if strategy in NEEDS_GUIDE and guide is None:
            raise UsageError(f"strategy {strategy!r} needs a checkpoint: run `{TRAIN}`, or name one")
        if beam < 0:
            raise UsageError(f"a beam cannot be {beam} wide")
        if trials < 0 or not 0 <= seed < MAX_INT:
            raise UsageError(
                f"neither {trials} trials nor seed {seed} may be negative, nor a seed have more than 63 bits"
            )
        self.records, self.measurer, self.renderer = records, measurer, renderer
        self.trials, self.strategy, self.guide, self.seed, self.progress = trials, strategy, guide, seed, progress
        self.winners = Winners(records, measurer)
        self.beam = beam  # width of the beam search that goes on where the trials end; 0: none
        self._final_seconds: dict[str, float] = {}  # that the final timing of a kernel may take
        self._waiting: dict[str, bool] = {}  # whether a kernel has one to come
        self._searches: dict[str, tuple[Strategy, set[Trial]]] = {}  # with what of its kernel's history each was told
        self._cut = False  # whether time ended a visit
        # trials of a budget that kernels share, other tuners' among them
        self._on_record: Callable[[], int] = lambda: 0

    def run(
        self, kernels: Sequence[Kernel], calls: Mapping[str, int], budget: Budget
    ) -> tuple[list[KernelResult], bool]:
        """(results, whether all was done). Baselines first, so that the kernels can be put in order of total time."""
        bar = tqdm(total=len(kernels) * (self.trials + 2), desc="tuning", unit="trial", disable=not self.progress)
        where = self.records.absolute, self.measurer.fingerprint
        finished = True  # the beams
        searched: set[str] = set()
        if self.guide is not None and self.guide.memory is not None:
            for kernel in self.records.kernels():  # tuned before, though it be in another program
                self._remember(kernel, self._history(kernel))
        with bar:

            def begin(kernel: Kernel) -> None:
                began = budget.elapsed()
                if self.baselines(kernel):
                    self._final_seconds[kernel.key] = budget.elapsed() - began + FRESH
                self._reserve(kernel, budget, self._has_winner(kernel))
                bar.update(2)

            def search(kernel: Kernel) -> None:
                bar.set_postfix_str(kernel.name)
                self.search(kernel, budget, bar.update)
                searched.add(kernel.key)

            def beam(kernel: Kernel) -> None:
                nonlocal finished
                bar.set_postfix_str(f"beam, {kernel.name}")
                finished &= self.continue_by_beam(kernel, budget)

            share(*where, kernels, begin, budget.in_time)
            order = sorted(kernels, key=lambda k: -self.hand_coded_seconds(k) * calls[k.key])
            if self.strategy == POOLED and self.trials:
                self.spend(order, calls, budget, bar)
            elif self._answers:
                share(*where, order, search, budget.in_time)
                # another tuner may have held some until time was over
                self._cut |= any(k.key not in searched for k in order)
            else:
                share(*where, order, search, lambda: budget.left(1) > 0)
            if self.beam:
                share(*where, order, beam, budget.in_time)
        tried = self._tried(kernels, budget)
        with tqdm(total=len(order), desc="final timing", disable=not self.progress) as bar:
            share(*where, order, lambda kernel: (self.winners.finish(kernel), bar.update(1)), budget.in_time)
        results = [result_of(self.records, self.measurer.fingerprint, k, calls[k.key]) for k in order]
        return results, tried and finished

    @property
    def _answers(self) -> bool:
        """Whether each kernel gets the strategy's single answer, and no trials."""
        return self.trials == 0 and self.guide is not None

    def left(self, kernels: Sequence[Kernel], budget: Budget) -> int:
        """Trials that are allowed and were not made. Under `auto` the budget counts what was on record, too; any other strategy
        gives each kernel trials of its own."""
        if self.strategy == POOLED:
            return max(0, budget.trials - budget.spent)
        return sum(max(0, self.trials - self.history_spent(k)) for k in kernels)

    def _tried(self, kernels: Sequence[Kernel], budget: Budget) -> bool:
        """Whether there is nothing left to try."""
        if self._cut:
            return False
        return budget.left(1) > 0 or budget.spent >= budget.trials or not self.left(kernels, budget)

    def baselines(self, kernel: Kernel) -> bool:
        """Measure both, where that is not on record; an accident once more, in a later run. Whether they were measured."""
        if wanted := wants_baselines(self._history(kernel)):
            commit(self.records, self.measurer, kernel, self.measurer.baselines(kernel))
        return wanted

    def search(self, kernel: Kernel, budget: Budget, tick: Callable[[int], Any] = lambda n: None) -> None:
        """Spend this kernel's trials; those that are on record already count as spent."""
        history = self._history(kernel)
        if not _has_rival(history):  # it is left as it is
            tick(self.trials)
            return
        tick(min(history.spent, self.trials))
        if self._answers:
            if budget.may_answer():
                self._answer(kernel, history)
            else:
                self._cut = True
        made = self.visit(kernel, self.trials - history.spent, budget, tick)
        if budget.left(1) > 0:
            tick(self.trials - history.spent - made)
        self._searches.pop(kernel.key, None)
        self.winners.settle(kernel)  # now, while its buffers and binaries are at hand
        self._remember(kernel, self._history(kernel))  # a comparison may have refuted what was fastest

    def spend(self, kernels: Sequence[Kernel], calls: Mapping[str, int], budget: Budget, bar: tqdm) -> None:
        """Spend the trials of all kernels where they pay most; those on record already count as spent."""
        spending = Spending(
            self._open_to(kernels, calls, budget), calls, self.best_seconds, self._promise, self.history_spent
        )
        bar.update(min(budget.spent, self.trials * len(kernels)))

        def visit(kernel: Kernel) -> None:
            bar.set_postfix_str(kernel.name)
            before = self.best_seconds(kernel)
            spending.visited(kernel, before, self.visit(kernel, spending.size(kernel), budget, bar.update))

        while self._left(budget, 1) > 0 and (kernel := spending.next()) is not None:
            share(self.records.absolute, self.measurer.fingerprint, [kernel], visit, lambda: self._left(budget, 1) > 0)

    def _made(self, keys: Iterable[str]) -> int:
        """Trials of kernels on record."""
        spent = self.records.spent(self.measurer.fingerprint)
        return sum(spent[key] for key in keys)

    def _left(self, budget: Budget, wanted: int) -> int:
        """How many of `wanted` trials may still be made; what other tuners made meanwhile is spent, too."""
        budget.spent = max(budget.spent, self._on_record())
        return budget.left(wanted)

    def _open_to(self, kernels: Sequence[Kernel], calls: Mapping[str, int], budget: Budget) -> Sequence[Kernel]:
        """Count what is on record as spent, and from now on what others add; returns the kernels on which the rest may go.

        What was made before all kernels of this program were known was made under another one. Kernels that had no trials
        by then, and take time, bring their own allowance: where the others had used up theirs, it is for these alone.
        """
        own = {k.key for k in kernels}
        made = [(at, t) for at, t in self.records.all_trials(self.measurer.fingerprint) if t.kernel in own]
        known = {t.kernel: at for at, t in reversed(made)}
        began = max((known.get(key, math.inf) for key in own), default=math.inf)
        before = Counter(t.kernel for at, t in made if at < began and t.counted)
        since = sum(at >= began and t.counted for at, t in made)
        seconds = {k.key: (self.best_seconds(k) or 0.0) * calls[k.key] for k in kernels}
        least = FROZEN * sum(seconds.values())
        new = [k for k in kernels if not before[k.key] and seconds[k.key] and seconds[k.key] >= least]
        allowed = self.trials * (len(kernels) - len(new))
        budget.spent += min(before.total(), allowed) + since
        elsewhere = before.total() + since - budget.spent  # under other programs, beyond what counts for this one
        self._on_record = lambda: self._made(own) - elsewhere
        return kernels if before.total() <= allowed else new

    def _promise(self, kernel: Kernel, trials: int) -> float | None:
        strategy = self._opened(kernel, self._history(kernel))
        return promise_of(strategy, trials)

    def _opened(self, kernel: Kernel, history: History) -> Strategy:
        """The kernel's search, which has been told everything on record."""
        if kernel.key not in self._searches:
            self._searches[kernel.key] = (
                make_strategy(self.strategy, kernel, self.renderer, self.seed, self.guide),
                set(),
            )
        strategy, told = self._searches[kernel.key]
        strategy.tell([t for t in history.trials if t not in told])  # a merge may have put some before others
        told.update(history.trials)
        return strategy

    def visit(self, kernel: Kernel, limit: int, budget: Budget, tick: Callable[[int], Any]) -> int:
        """Make up to `limit` trials of a kernel, as far as the budget and its strategy go; returns how many."""
        history, made = self._history(kernel), 0
        self._reserve(kernel, budget, True)  # it may find a winner
        while (count := self._left(budget, min(BATCH, limit - made))) > 0:
            began, strategy = budget.elapsed(), self._opened(kernel, history)
            asked = strategy.ask(count)
            if not asked:
                break
            trials = self._measure(
                kernel, history, asked, partial(origin_of, strategy), partial(self._spent, budget, tick)
            )
            made += len(trials)
            if kernel.key not in self._final_seconds:  # its baselines were on record
                preparing = budget.elapsed() - began - sum(t.verify_seconds + t.timing_seconds for t in trials)
                self._final_seconds[kernel.key] = preparing + FRESH
                self._reserve(kernel, budget, True)
        self._cut |= made < limit and budget.spent < budget.trials and not budget.in_time()
        self._opened(kernel, history)
        self._remember(kernel, history)
        self._reserve(kernel, budget, self._has_winner(kernel))
        return made

    def _remember(self, kernel: Kernel, history: History) -> None:
        """What was found of a kernel the searches of similar ones may recall; but no answer where answers are asked for, so
        that the same command again asks for the same."""
        if self.guide is not None and self.guide.memory is not None:
            untold = {*BASELINES, "answer"} if self._answers else BASELINES
            timed = [(t.schedule, t.seconds) for t in history.good if t.seconds is not None and t.kind not in untold]
            # where it has had no trial, it may be a kernel of another device, which has no state here
            if timed or kernel.key in self.guide.memory.added:
                self.guide.memory.add(root_state(kernel, self.renderer), timed)

    def continue_by_beam(self, kernel: Kernel, budget: Budget) -> bool:
        """Beam search, in as many trials as it takes beyond the budget's; only its seconds end it early. Whether it is done."""
        history, search = self._history(kernel), BeamSearch(kernel, self.renderer, self.seed, self.beam)
        search.tell(history.trials)
        self._reserve(kernel, budget, True)
        asked: Sequence[Schedule] = [()]
        while asked and _has_rival(history) and budget.in_time():
            if asked := search.ask(BATCH):
                search.tell(self._measure(kernel, history, asked, lambda _: BEAM, lambda: None))
        self._reserve(kernel, budget, self._has_winner(kernel))
        return not asked or not _has_rival(history)

    def _measure(self, kernel: Kernel, history: History, asked: Sequence[Schedule], origin: Callable[[Schedule], str],
                 tick: Callable[[], Any]) -> list[Trial]:  # fmt: skip
        """Trials of these schedules, each committed at once; `history` hears of them."""
        trials: list[Trial] = []

        def done(trial: Trial) -> None:
            trials.append(self._labelled(trial, origin(trial.schedule)))
            commit(self.records, self.measurer, kernel, trials[-1:])
            tick()

        self.measurer.measure(kernel, asked, cutoff_of(history), done)
        history.trials += trials
        return trials

    @staticmethod
    def _spent(budget: Budget, tick: Callable[[int], Any]) -> None:
        budget.spent += 1
        tick(1)

    def _has_winner(self, kernel: Kernel) -> bool:
        """Whether something on record is faster than hand-coded, though it be the un-optimized kernel, and not yet decided."""
        best = self.best_seconds(kernel)
        return best is not None and best < self.hand_coded_seconds(kernel) and not self.winners.decided(kernel)

    def _reserve(self, kernel: Kernel, budget: Budget, winner: bool) -> None:
        """Keep back what the final timing of a kernel will take, judged by what its baselines took, or its first trials; or
        other kernels', where it had none in this run."""
        self._waiting[kernel.key] = winner
        known = self._final_seconds
        other = statistics.mean(known.values()) if known else FRESH
        budget.reserved = sum(known.get(key, other) for key, waits in self._waiting.items() if waits)

    def _answer(self, kernel: Kernel, history: History) -> None:
        """Zero trials: the strategy's single answer, compiled and verified, held against hand-coded like any winner. It hears
        of no earlier answer, so the same guide and seed give the same one, which is on record then."""
        untold = History([t for t in history.trials if t.kind != "answer"])
        known = {t.schedule for t in history.trials}
        asked = [s for s in self._opened(kernel, untold).ask(1) if s not in known]
        for trial in self.measurer.measure(kernel, asked, None) if asked else ():
            commit(self.records, self.measurer, kernel, [replace(self._labelled(trial, "answer"), kind="answer")])

    def _labelled(self, trial: Trial, origin: str) -> Trial:
        return replace(trial, strategy=f"{self.strategy}/{origin}" if origin else self.strategy, seed=self.seed)

    def hand_coded_seconds(self, kernel: Kernel) -> float:
        """Median of the hand-coded baseline; 0 where it could not be measured."""
        hand = self._history(kernel).hand_coded
        return 0.0 if hand is None else hand.seconds or 0.0

    def best_seconds(self, kernel: Kernel) -> float | None:
        """Of the fastest verified schedule so far, baselines included; None where there is nothing to be won."""
        history = self._history(kernel)
        return history.best.seconds if history.best is not None and _has_rival(history) else None

    def history_spent(self, kernel: Kernel) -> int:
        return self._history(kernel).spent

    def _history(self, kernel: Kernel) -> History:
        return self.records.history(kernel.key, self.measurer.fingerprint)
