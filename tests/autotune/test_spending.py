"""Where trials go: by hand, and a whole tuning of two kernels."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_never_worse import Adversary
from tiny import add_one, kernel_of
from tinygrad import Tensor

from autotune.budget import Budget
from autotune.compiler import renderer_of
from autotune.files import DATA
from autotune.guide import Guide
from autotune.kernel import Kernel
from autotune.measuring.bench import PROTOCOL
from autotune.records import Records, Trial
from autotune.search.mixed import MixedSearch
from autotune.spending import DRY, FROZEN, LEFT, Spending
from autotune.tuner import Tuner

A, B, C = add_one(64), add_one(128), add_one(256)
CPU = renderer_of("CPU")
MATMUL = kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 48))


def spending(
    seconds: dict[str, float | None], promised: dict[str, float | None], calls: dict[str, int], made: dict[str, int]
) -> Spending:
    """`made` counts the trials of kernels, all of which may be on record before."""
    kernels = [A, B, C][: len(seconds)]
    return Spending(kernels, calls, lambda k: seconds[k.key], lambda k, _: promised[k.key], lambda k: made[k.key])


def visit(own: Spending, made: dict[str, int]) -> Kernel:
    """Where the next visit goes; it gains nothing."""
    kernel = own.next()
    assert kernel is not None
    size = own.size(kernel)
    made[kernel.key] += size
    own.visited(kernel, own.seconds(kernel), size)
    return kernel


def test_the_next_visit_goes_where_it_saves_most():
    """A: 4 calls of 1 s, half of which is promised: 2 s. B: one call of 5 s, an eighth left: 4.4 s. C: promises nothing, and
    first trials bring half of .8 on average, so from 9 s 2.2 s."""
    calls = {A.key: 4, B.key: 1, C.key: 9}
    own = spending({A.key: 1.0, B.key: 5.0, C.key: 1.0}, {A.key: 1.0, B.key: 3.0, C.key: 0.0}, calls, Counter())
    assert [own.saving(own.accounts[k.key]) for k in (A, B, C)] == pytest.approx([2.0, 4.375, 2.1793], abs=1e-4)
    assert own.next() is B


def test_a_promise_that_is_not_kept_is_believed_less():
    seconds: dict[str, float | None] = {A.key: 1.0, B.key: 1.0}
    own = spending(seconds, {A.key: 1.0, B.key: 0.9}, {A.key: 1, B.key: 1}, Counter())
    assert own.next() is A
    own.visited(A, 1.0, 8)
    assert own.gain(own.accounts[A.key]) == DRY and own.next() is B
    seconds[B.key] = 0.8
    own.visited(B, 1.0, 8)  # it gained: as good as before
    assert own.gain(own.accounts[B.key]) == 0.9 and own.next() is B


def test_trials_that_are_left_go_on_where_nothing_is_promised():
    """A is nine tenths of the program, B the rest. After n trials .8 / (n + 1) is left, so visits of 1, 3, 8, 8, 8, 8 and 8 trials
    bring .4, .24, .098, .023, .011, .0060 and .0038: with each trial of A 2179, 460, 74, 18, 8.2, 4.6 and 3.0 ms, of B a ninth of
    it: 242, 51, 8.3 and 2.0 ms. In the end A has had 44 trials, B 12: about as the roots of their times."""
    seconds: dict[str, float | None] = {A.key: 9.0, B.key: 1.0}
    made: dict[str, int] = Counter()
    own = spending(seconds, dict.fromkeys(seconds, 0.0), {A.key: 1, B.key: 1}, made)
    assert [visit(own, made) for _ in range(10)] == [A, A, B, A, B, A, B, A, A, A]
    assert made == {A.key: 44, B.key: 12}


@pytest.mark.parametrize("cut", [1, 2, 3, 7])
def test_a_run_that_was_cut_goes_on_as_it_would_have(cut: int):
    seconds: dict[str, float | None] = {A.key: 9.0, B.key: 1.0}

    def visits(lengths: list[int]) -> list[Kernel]:
        made: dict[str, int] = Counter()
        found = []
        for length in lengths:
            own = spending(seconds, dict.fromkeys(seconds, None), {A.key: 1, B.key: 1}, made)
            found += [visit(own, made) for _ in range(length)]
        return found

    assert visits([cut, 11 - cut]) == visits([11])


def test_first_visits_are_short_and_trials_are_compared():
    """One trial, three more, then eight; what the longer one saves is shared by more trials."""
    seconds: dict[str, float | None] = {A.key: 1.0, B.key: 1.0}
    asked: set[int] = set()
    made: dict[str, int] = Counter()

    def promise(kernel: Kernel, trials: int) -> float:
        asked.add(trials)
        return 1.0

    own = Spending([A, B], {A.key: 1, B.key: 1}, lambda k: seconds[k.key], promise, lambda k: made[k.key])
    sizes = []
    for _ in range(5):
        sizes.append(own.size(A))
        assert own.next() is (A if len(sizes) == 1 else B)  # B's one trial promises what A's three do
        made[A.key] += own.size(A)
        own.visited(A, 2.0, sizes[-1])
    assert sizes == [1, 3, 8, 8, 8] and own.size(B) == 1 and asked == {1, 3, 8}


def test_without_a_simulator_visits_promise_what_they_bring_on_average():
    made: dict[str, int] = Counter()
    own = spending({A.key: 1.0, B.key: 1.0}, {A.key: None, B.key: None}, {A.key: 1, B.key: 1}, made)
    account = own.accounts[A.key]
    assert own.gain(account) == LEFT / 2 and visit(own, made) is A
    assert own.gain(account) == pytest.approx(LEFT / 2 - LEFT / 5)  # of three trials, whatever the first one brought


def test_cheap_kernels_dead_ends_and_what_does_not_run_are_left():
    seconds: dict[str, float | None] = {A.key: 1.0, B.key: FROZEN / 10, C.key: None}
    own = spending(seconds, dict.fromkeys(seconds, 1.0), {A.key: 1, B.key: 1, C.key: 1}, Counter())
    assert own.next() is A
    own.visited(A, 1.0, 0)  # nothing new to say
    assert own.next() is None


def test_a_kernel_is_cheap_beside_what_the_others_take_by_now():
    seconds: dict[str, float | None] = {A.key: 1.0, B.key: FROZEN / 2}
    own = spending(seconds, dict.fromkeys(seconds, 1.0), {A.key: 1, B.key: 1}, Counter())
    assert own.next() is A
    seconds[A.key] = 0.1
    own.visited(A, 1.0, 0)  # nothing more to say, but ten times as fast
    assert own.next() is B


@pytest.fixture(scope="module")
def guide() -> Guide:
    return Guide.load(DATA / "guide-cpu")


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


def test_what_another_tuner_makes_meanwhile_is_spent_too(tmp_path: Path, runner, guide: Guide):
    """After each of the first three trials of eight another one finds a trial of the second kernel on record."""
    with closing(Records(tmp_path / "auto.db")) as records:
        own = records.add_fingerprint(runner.fields)
        tuner = Tuner(records, runner, CPU, trials=4, strategy="auto", guide=guide, progress=False)
        others = iter(range(3))

        def tick(made: int) -> None:
            if next(others, None) is not None:
                records.add_trial(own, Trial(A.key, (), "ok", (1.0,)), PROTOCOL)

        kernels, budget = [MATMUL, A], Budget(8)
        for kernel in kernels:
            tuner.baselines(kernel)
        tuner.spend(kernels, {MATMUL.key: 1000, A.key: 1}, budget, SimpleNamespace(update=tick, set_postfix_str=str))
        assert budget.spent == 8 and sum(records.spent(own).values()) == 8 and tuner.history_spent(A) >= 3
        assert tuner.left(kernels, budget) == 0


def test_what_another_tuner_makes_while_this_one_counts_is_spent_too(tmp_path: Path, runner, guide: Guide):
    """Three trials of the second kernel come in as soon as what is on record was read."""
    with closing(Records(tmp_path / "auto.db")) as records:
        own = records.add_fingerprint(runner.fields)
        tuner = Tuner(records, runner, CPU, trials=4, strategy="auto", guide=guide, progress=False)
        kernels, budget, read = [MATMUL, A], Budget(8), records.all_trials
        for kernel in kernels:
            tuner.baselines(kernel)

        def all_trials(fingerprint: str) -> list[tuple[float, Trial]]:
            found = read(fingerprint)
            for _ in range(3):
                records.add_trial(own, Trial(A.key, (), "ok", (1.0,)), PROTOCOL)
            return found

        records.all_trials = all_trials  # type: ignore[method-assign]
        nothing = SimpleNamespace(update=lambda made: None, set_postfix_str=str)
        tuner.spend(kernels, {MATMUL.key: 1000, A.key: 1}, budget, nothing)
        assert budget.spent == 8 and sum(records.spent(own).values()) == 8


def test_the_same_answers_are_asked_for_again(tmp_path: Path):
    """Though what they came to is on record by then."""
    device, kernels = Adversary(0, 0.0, 0.0), [MATMUL, A]
    with closing(Records(tmp_path / "auto.db")) as records:
        answers = []
        for _ in range(2):
            guide = Guide.load(DATA / "guide-cpu")  # as in a new process
            tuner = Tuner(records, device, CPU, trials=0, strategy="auto", guide=guide, progress=False)
            tuner.run(kernels, dict.fromkeys([k.key for k in kernels], 1), Budget(0))
            answers.append([t.schedule for _, t in records.all_trials(device.fingerprint) if t.kind == "answer"])
        assert len(answers[0]) == 2 and answers[0] == answers[1]


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
