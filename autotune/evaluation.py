"""Holding strategies against each other on kernels that were never trained on: equal trials, one interleaved final timing."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from autotune.collect import commit_one
from autotune.compiler import Renderer
from autotune.guide import Guide
from autotune.kernel import Kernel, Schedule, schedule_to_json
from autotune.measuring.runner import ACCIDENTS, Measurer, Refuted, Unprepared, commit, cutoff_of, judge, known_of
from autotune.records import History, Records, Trial
from autotune.search import POOLED, STRATEGIES, make_strategy
from autotune.search.acquisition import BATCH

# what searches a kernel by itself, as is done here; `auto` would be `mixed`
ALONE = tuple(name for name in STRATEGIES if name != POOLED)


@dataclass(frozen=True)
class Comparison:
    """One kernel under several strategies. `seconds[name]` is the final median, hand-coded where its winner was not accepted."""

    kernel: Kernel
    calls: int
    hand_coded: float
    seconds: dict[str, float]
    schedules: dict[str, Schedule]
    accepted: dict[str, bool]
    trials: dict[str, int]


class Evaluator:
    """Each strategy searches from empty records (`records[name]`); the winners meet in one fresh process. `others`: guides that
    lead a search of `mixed` each, under their names."""

    def __init__(self, records: Callable[[str], Records], measurer: Measurer, renderer: Renderer, guide: Guide | None,
                 strategies: Sequence[str], trials: int, seed: int, others: Mapping[str, Guide] | None = None):  # fmt: skip
        self.others = dict(others or {})
        self.strategies, self.trials, self.seed = [*strategies, *self.others], trials, seed
        self.files = {name: records(name) for name in (*self.strategies, "final")}
        self.measurer, self.renderer, self.guide = measurer, renderer, guide

    def compare(self, kernel: Kernel, calls: int = 1) -> Comparison:
        """Search with every strategy, then one duel of all winners with hand-coded."""
        final = self.files["final"]
        base = known_of(final, self.measurer, kernel)
        if base.hand_coded is None:
            raise Unprepared(f"its hand-coded schedule could not be timed: {base.baselines['hand_coded'].detail}")
        histories = {name: self._search(name, kernel, base) for name in self.strategies}
        best, samples = self._meet(kernel, base, histories)
        medians = [statistics.median(s) for s in samples]
        finals = {
            n: judge(kernel, s, [samples[i + 2], samples[0], samples[1]]) for i, (n, s) in enumerate(best.items())
        }
        hand_seconds = min(medians[:2])
        seconds = {n: medians[i + 2] if finals[n].accepted else hand_seconds for i, n in enumerate(best)}
        return Comparison(kernel, calls, hand_seconds, seconds, best, {n: f.accepted for n, f in finals.items()},
                          {n: h.spent for n, h in histories.items()})  # fmt: skip

    def _meet(
        self, kernel: Kernel, base: History, histories: dict[str, History]
    ) -> tuple[dict[str, Schedule], list[tuple[float, ...]]]:
        """(each strategy's winner, samples of hand-coded twice and of all of them); a winner that fails then gives its place to
        the next. Raises Refuted where it is hand-coded that fails, or where they crash together and no one by itself."""
        final, own = self.files["final"], self.measurer.fingerprint
        hand = base.baselines["hand_coded"].schedule
        for history in histories.values():
            history.trials += [t for t in base.trials if t.kind == "recheck"]
        while True:
            best = {name: h.best.schedule if h.best else hand for name, h in histories.items()}
            rivals = [hand, hand, *best.values()]
            if (samples := final.duel(kernel.key, own, rivals)) is not None:
                return best, samples
            try:
                samples = self.measurer.duel(kernel, rivals)
            except Refuted as refuted:
                if (failed := self._to_blame(kernel, refuted, hand, set(best.values()))) is None:
                    raise
                commit(final, self.measurer, kernel, [failed])
                if failed.schedule == hand:
                    raise
                for history in histories.values():
                    history.trials.append(failed)
                continue
            final.add_duel(kernel.key, own, rivals, samples)
            return best, samples

    def _to_blame(self, kernel: Kernel, refuted: Refuted, hand: Schedule, winners: set[Schedule]) -> Trial | None:
        """Who failed. Where a child died or hung nobody saw who it was, so each is tried by itself with hand-coded."""
        if refuted.trial.verdict not in ACCIDENTS:
            return refuted.trial
        for winner in sorted(winners - {hand}):
            try:
                samples = self.measurer.duel(kernel, [winner, hand])
            except Refuted as again:
                return again.trial
            self.files["final"].add_duel(kernel.key, self.measurer.fingerprint, [winner, hand], samples)  # for a replay
        return None

    def _search(self, name: str, kernel: Kernel, base: History) -> History:
        """This strategy's trials, resumed from its own file. All strategies share the baselines, which are no trials."""
        file, fingerprint = self.files[name], self.measurer.fingerprint
        history = History(list(base.baselines.values()) + file.history(kernel.key, fingerprint).trials)
        kind, guide = ("mixed", self.others[name]) if name in self.others else (name, self.guide)
        strategy = make_strategy(kind, kernel, self.renderer, self.seed, guide)
        strategy.tell(history.trials)
        while (count := min(BATCH, self.trials - history.spent)) > 0 and (asked := strategy.ask(count)):
            done = functools.partial(commit_one, file, self.measurer, kernel, name, self.seed)
            measured = self.measurer.measure(kernel, asked, cutoff_of(history), done)
            history.trials += measured
            strategy.tell(measured)
        return history

    def compare_all(self, kernels: Sequence[Kernel], calls: dict[str, int] | None = None,
                    over: Callable[[], bool] = lambda: False) -> list[Comparison]:  # fmt: skip
        """Kernel after kernel, until `over()`; without those whose hand-coded schedule fails."""
        found: list[Comparison] = []
        for kernel in tqdm(kernels, desc="comparing"):
            if over():
                break
            try:
                found.append(self.compare(kernel, (calls or {}).get(kernel.key, 1)))
            except (Refuted, Unprepared) as error:
                tqdm.write(f"{kernel.name} is left out: {error}")
        return found


def summarise(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Per strategy: geometric mean of time over hand-coded, total time over hand-coded, worst kernel, kernels won."""
    result: dict[str, Any] = {"kernels": len(comparisons)}
    total = sum(c.hand_coded * c.calls for c in comparisons)
    for name in comparisons[0].seconds if comparisons else ():
        ratios = np.array([c.seconds[name] / c.hand_coded for c in comparisons])
        result[name] = {
            "geometric_mean": float(np.exp(np.log(ratios).mean())),
            "total": float(sum(c.seconds[name] * c.calls for c in comparisons) / total),
            "worst": float(ratios.max()), "won": int(sum(c.accepted[name] for c in comparisons)),
            "trials": int(sum(c.trials[name] for c in comparisons)),
        }  # fmt: skip
    return result


def to_json(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    return [{"key": c.kernel.key, "name": c.kernel.name, "family": c.kernel.family, "calls": c.calls,
             "hand_coded_ms": c.hand_coded * 1e3, "ms": {n: s * 1e3 for n, s in c.seconds.items()}, "trials": c.trials,
             "accepted": c.accepted, "schedules": {n: schedule_to_json(s) for n, s in c.schedules.items()}}
            for c in comparisons]  # fmt: skip


def table(comparisons: Sequence[Comparison]) -> str:
    """For people: time over hand-coded per kernel and strategy, and the summary."""
    if not comparisons:
        return "no kernel was compared: too little time"
    names = list(comparisons[0].seconds)
    head = f"{'kernel':34} {'family':14} {'hand-coded':>11} " + " ".join(f"{n:>8}" for n in names)
    lines = [head, "-" * len(head)]
    for c in sorted(comparisons, key=lambda c: -c.hand_coded * c.calls):
        cells = " ".join(f"{c.seconds[n] / c.hand_coded:8.3f}" for n in names)
        lines.append(f"{c.kernel.name[:34]:34} {c.kernel.family[:14]:14} {c.hand_coded * 1e3:8.3f} ms {cells}")
    summary = summarise(comparisons)
    for label, key in (("geometric mean", "geometric_mean"), ("sum over calls", "total"), ("worst kernel", "worst")):
        lines.append(f"{label:61} " + " ".join(f"{summary[n][key]:8.3f}" for n in names))
    lines.append(f"{'trials':61} " + " ".join(f"{summary[n]['trials']:8d}" for n in names))
    return "\n".join(lines)
