"""Where trials go: by hand, and a whole tuning of two kernels."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from tiny import add_one, kernel_of
from tinygrad import Tensor

from autotune.budget import Budget
from autotune.compiler import renderer_of
from autotune.guide import SHIPPED, Guide
from autotune.kernel import Kernel
from autotune.records import Records, Trial
from autotune.search.mixed import MixedSearch
from autotune.spending import DRY, FROZEN, PRIOR, Spending
from autotune.tuner import Tuner

A, B, C = add_one(64), add_one(128), add_one(256)
CPU = renderer_of("CPU")
MATMUL = kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 48))


def spending(seconds: dict[str, float | None], promised: dict[str, float | None], calls: dict[str, int]) -> Spending:
    kernels = [A, B, C][: len(seconds)]
    return Spending(kernels, calls, lambda k: seconds[k.key], lambda k, _: promised[k.key])


def test_the_next_visit_goes_where_it_saves_most():
    """A: 4 calls of 1 s, half of which is promised: 2 s. B: one call of 5 s, an eighth left: 4.4 s. C: promises nothing, and
    may be hoped to come down by 2^-0.1, so from 9 s by 0.6 s."""
    calls = {A.key: 4, B.key: 1, C.key: 9}
    own = spending({A.key: 1.0, B.key: 5.0, C.key: 1.0}, {A.key: 1.0, B.key: 3.0, C.key: 0.0}, calls)
    assert own.total == 18.0
    assert [own.saving(own.accounts[k.key]) for k in (A, B, C)] == pytest.approx([2.0, 4.375, 0.6027], abs=1e-4)
    assert own.next() is B


def test_a_promise_that_is_not_kept_is_believed_less():
    seconds: dict[str, float | None] = {A.key: 1.0, B.key: 1.0}
    own = spending(seconds, {A.key: 1.0, B.key: 0.9}, {A.key: 1, B.key: 1})
    assert own.next() is A
    own.visited(A, 1.0, 8)
    assert own.gain(own.accounts[A.key]) == DRY and own.next() is B
    seconds[B.key] = 0.8
    own.visited(B, 1.0, 8)  # it gained: as good as before
    assert own.gain(own.accounts[B.key]) == 0.9 and own.next() is B


def test_trials_that_are_left_go_on_where_nothing_is_promised():
    """A is nine tenths of the program, B the rest. A third visit of A may bring 9 s x (1 - 2^(-.1 / 3)) / 4 trials = 51 ms with each,
    a first one of B 1 s x (1 - 2^-.1) / 1 = 67 ms; a fourth of A 19 ms, a second of B 17 ms, a fifth of A 15 ms."""
    seconds: dict[str, float | None] = {A.key: 9.0, B.key: 1.0}
    own = spending(seconds, dict.fromkeys(seconds, 0.0), {A.key: 1, B.key: 1})
    visited = []
    for _ in range(11):
        kernel = own.next()
        assert kernel is not None
        visited.append(kernel)
        own.visited(kernel, seconds[kernel.key], 8)
    assert visited == [A, A, B, A, A, B, *[A] * 5]


def test_first_visits_are_short_and_trials_are_compared():
    """Each next visit of a kernel is twice as long, up to eight; what the longer one saves is shared by more trials."""
    seconds: dict[str, float | None] = {A.key: 1.0, B.key: 1.0}
    asked: set[int] = set()

    def promise(kernel: Kernel, trials: int) -> float:
        asked.add(trials)
        return 1.0

    own, sizes = Spending([A, B], {A.key: 1, B.key: 1}, lambda k: seconds[k.key], promise), []
    for _ in range(5):
        sizes.append(own.size(A))
        assert own.next() is (A if len(sizes) == 1 else B)  # B's one trial promises what A's two do
        own.visited(A, 2.0, own.size(A))
    assert sizes == [1, 2, 4, 8, 8] and own.size(B) == 1 and asked == {1, 2, 4, 8}


def test_without_a_simulator_later_visits_promise_less():
    own = spending({A.key: 1.0, B.key: 1.0}, {A.key: None, B.key: None}, {A.key: 1, B.key: 1})
    account = own.accounts[A.key]
    assert own.gain(account) == PRIOR
    account.visits = 1
    assert own.gain(account) == PRIOR / 4


def test_cheap_kernels_dead_ends_and_what_does_not_run_are_left():
    seconds: dict[str, float | None] = {A.key: 1.0, B.key: FROZEN / 10, C.key: None}
    own = spending(seconds, dict.fromkeys(seconds, 1.0), {A.key: 1, B.key: 1, C.key: 1})
    assert own.next() is A
    own.visited(A, 1.0, 0)  # nothing new to say
    assert own.next() is None


@pytest.fixture(scope="module")
def guide() -> Guide:
    return Guide.load(SHIPPED / "guide-cpu")


def test_what_the_ensemble_promises(guide: Guide):
    search = MixedSearch(MATMUL, CPU, 0, guide)
    assert search.promise(8) is None
    slow = [Trial(MATMUL.key, (), "ok", (1.0,), kind="unoptimized")]
    search.tell(slow)
    few, many = search.promise(1), search.promise(32)
    assert few is not None and many is not None and 1 < few <= many  # a matmul, plain: far more than a factor of two
    found = search.ask(1)
    search.tell([Trial(MATMUL.key, found[0], "ok", (2.0**-20,))])
    assert search.promise(8) < few / 2  # faster than anything believed


def test_a_program_is_tuned_where_it_pays(tmp_path: Path, runner, guide: Guide):
    """A matmul of a million calls, and an addition that takes next to nothing beside them: all goes to the first. It is
    counted once, though the addition, which had no trial, be what takes time later."""
    kernels: list[Kernel] = [MATMUL, A]

    def tuned(calls: tuple[int, int]) -> list[int]:
        tuner = Tuner(records, runner, CPU, trials=6, strategy="auto", guide=guide, progress=False)
        budget = Budget(12)
        results, done = tuner.run(kernels, dict(zip((MATMUL.key, A.key), calls, strict=True)), budget)
        assert done and budget.spent == 12
        return [next(r.trials for r in results if r.kernel is k) for k in kernels]

    with closing(Records(tmp_path / "auto.db")) as records:
        records.add_fingerprint(runner.fields)
        assert tuned((10**6, 1)) == [12, 0]
        assert tuned((1, 10**6)) == [12, 0]


def test_trials_under_another_program_take_nothing_from_new_kernels(tmp_path: Path, runner, guide: Guide):
    """A matmul had 4 trials in a program of its own, four times what the next one allows for it and another kernel."""
    other = kernel_of(Tensor.empty(64, 80) @ Tensor.empty(80, 48))

    def tuned(kernels: list[Kernel], trials: int) -> list[int]:
        tuner = Tuner(records, runner, CPU, trials=trials, strategy="auto", guide=guide, progress=False)
        budget = Budget(trials * len(kernels))
        results, done = tuner.run(kernels, dict.fromkeys([k.key for k in kernels], 1), budget)
        assert done and budget.spent <= budget.trials
        return [next(r.trials for r in results if r.kernel is k) for k in kernels]

    with closing(Records(tmp_path / "auto.db")) as records:
        records.add_fingerprint(runner.fields)
        assert tuned([MATMUL], 4) == [4]
        assert tuned([MATMUL, other], 1) == [4, 1]
        assert tuned([MATMUL, other], 1) == [4, 1]  # again: nothing
        assert tuned([MATMUL, other], 3) == [4, 3]  # with more, what is left of its own
