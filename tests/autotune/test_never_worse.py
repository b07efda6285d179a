"""Whatever a device answers, tuning ends with hand-coded or with something that beat it: over kernels of the corpus.

The measurer here is an adversary, not a device: any verdicts, any times, and duels that contradict the trials.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import U2, U4, add_one

from autotune import corpus
from autotune.budget import Budget
from autotune.compiler import hand_coded, renderer_of
from autotune.kernel import Kernel, Schedule
from autotune.measuring.bench import PROTOCOL
from autotune.measuring.runner import NOISE_FLOOR, Refuted
from autotune.records import History, Records, Trial
from autotune.tuner import Tuner
from autotune.winners import CONTENDERS, contenders

CPU = renderer_of("CPU")
KERNELS = [k for split in corpus.SPLITS for k in corpus.load(split)]
FAILED = ("illegal", "compile_failed", "too_big", "wrong_output", "timeout", "crashed")


class Adversary:
    """A Measurer that answers at random, from a seed."""

    fingerprint = "0" * 16

    def __init__(self, seed: int, failing: float, lying: float):
        self.rng, self.failing, self.lying = random.Random(seed), failing, lying
        self.true: dict[Schedule, float] = {}
        self.refuted: set[Schedule] = set()

    def baselines(self, kernel: Kernel) -> list[Trial]:
        pair = (("unoptimized", ()), ("hand_coded", hand_coded(kernel.ast, CPU)))
        return [Trial(**{**self._trial(kernel, schedule).__dict__, "kind": kind}) for kind, schedule in pair]

    def measure(
        self, kernel: Kernel, schedules: Sequence[Schedule], cutoff: float | None, done: Callable | None = None
    ) -> list[Trial]:
        trials = [self._trial(kernel, schedule) for schedule in schedules]
        for trial in trials:
            if done is not None:
                done(trial)
        return trials

    def duel(self, kernel: Kernel, schedules: Sequence[Schedule], fresh: bool = True) -> list[tuple[float, ...]]:
        if self.rng.random() < self.failing:
            failed = Trial(kernel.key, self.rng.choice(schedules), self.rng.choice(FAILED), kind="recheck")
            self.refuted.add(failed.schedule)
            raise Refuted(failed)
        return [self._samples(schedule) for schedule in schedules]

    def close(self) -> None:
        return None

    def _trial(self, kernel: Kernel, schedule: Schedule) -> Trial:
        code = str(self.rng.randrange(6))
        if self.rng.random() < self.failing:
            return Trial(kernel.key, schedule, self.rng.choice(FAILED), code_hash=code)
        return Trial(kernel.key, schedule, "ok", self._samples(schedule), code_hash=code)

    def _samples(self, schedule: Schedule) -> tuple[float, ...]:
        true = self.true.setdefault(schedule, 10 ** self.rng.uniform(-6, -1))
        return tuple(true * self.rng.uniform(1 / (1 + self.lying), 1 + self.lying) for _ in range(5))


@settings(max_examples=150, deadline=None, database=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.sampled_from([0.0, 0.02, 0.3, 5.0]),
       st.integers(0, 6))  # fmt: skip
def test_the_end_is_hand_coded_or_faster(seed, failing, lying, trials):
    kernel = KERNELS[seed % len(KERNELS)]
    with TemporaryDirectory() as folder, closing(Records(Path(folder) / "r.db")) as records:
        adversary = Adversary(seed, failing, lying)
        tuner = Tuner(records, adversary, CPU, trials=trials, strategy="random", seed=seed, progress=False)
        (result,), _ = tuner.run([kernel], {kernel.key: 1}, Budget(trials))
        served = records.winners(adversary.fingerprint, PROTOCOL)
        history = records.history(kernel.key, adversary.fingerprint)
        final = records.final(kernel.key, adversary.fingerprint)
    assert history.spent <= trials and result.tuned_seconds <= result.hand_coded_seconds
    assert served == ({} if result.schedule is None else {kernel.key: result.schedule})
    if result.schedule is not None:
        tuned, hand, control = (statistics.median(s) for s in (final.tuned, final.hand_coded, final.control))
        assert final.accepted and final.schedule == result.schedule != hand_coded(kernel.ast, CPU)
        assert tuned < min(hand, control) * (1 - NOISE_FLOOR) and result.schedule not in adversary.refuted
        assert result.schedule in {t.schedule for t in history.good}


@pytest.mark.parametrize("lying", [0.0, 0.01])
def test_an_honest_device_gets_its_fastest_schedule(lying):
    """The control: what is really much faster is found, and served."""
    found = 0
    for seed in range(12):
        kernel = KERNELS[seed]
        with TemporaryDirectory() as folder, closing(Records(Path(folder) / "r.db")) as records:
            honest = Adversary(seed, 0.0, lying)
            (result,), _ = Tuner(records, honest, CPU, trials=6, strategy="random", seed=seed, progress=False).run(
                [kernel], {kernel.key: 1}, Budget(6)
            )
        best = min(honest.true, key=lambda s: honest.true[s])
        hand = hand_coded(kernel.ast, CPU)
        if honest.true[best] < 0.9 * honest.true[hand]:
            assert result.schedule is not None and honest.true[result.schedule] <= honest.true[best] * 1.05
            found += 1
    assert found >= 6


def trial(schedule: Schedule, seconds: float, code: str, kind: str = "trial") -> Trial:
    return Trial(add_one().key, schedule, "ok", (seconds,), code_hash=code, kind=kind)


def test_contenders_by_hand():
    one, two, three = (U2,), (U4,), (U2, U2)
    history = History(
        [trial((), 1.0, "plain", "unoptimized"), trial(one, 0.5, "a"), trial(two, 0.54, "b"), trial(three, 0.56, "c")]
    )
    assert contenders(history) == [one, two]  # 0.56 is more than a tenth behind
    history.trials.append(trial((U2, U4), 0.51, "a"))
    assert contenders(history) == [one, two]  # the same binary once
    history.trials.append(Trial(add_one().key, one, "crashed", kind="recheck"))
    assert contenders(history) == [(U2, U4), two, three]  # an accident: the binary may be right
    history.trials.append(Trial(add_one().key, one, "wrong_output", kind="recheck"))
    assert contenders(history) == [two, three]  # it is wrong, whatever it is called
    many = History([trial((U2,) * n, 0.5 + n / 1000, str(n)) for n in range(1, 9)])
    assert contenders(many) == [(U2,) * n for n in range(1, CONTENDERS + 1)] and contenders(History()) == []
