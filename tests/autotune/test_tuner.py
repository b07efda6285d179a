"""What the tuner makes of accidents, of refusals, and of kernels that cannot win, on devices that answer as they are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_never_worse import Adversary
from tiny import U2, add_one
from tinygrad import Context
from tinygrad.helpers import BEAM

import autotune
from autotune.budget import Budget
from autotune.compiler import hand_coded, renderer_of
from autotune.errors import UsageError
from autotune.kernel import Kernel, Schedule
from autotune.measuring.bench import PROTOCOL
from autotune.measuring.recheck import Checked, choose, recheck
from autotune.measuring.runner import Refuted, Unprepared
from autotune.memory import Memory, traits
from autotune.records import Final, Records, Trial
from autotune.space import root_state
from autotune.tuner import Tuner
from autotune.winners import contenders

CPU = renderer_of("CPU")
KERNEL = add_one()
HAND = hand_coded(KERNEL.ast, CPU)
FIRST, SECOND = (U2,), (U2, U2)
assert HAND not in (FIRST, SECOND, ())


class Told(Adversary):
    """An honest device on which hand-coded takes 1 s, FIRST half of that, SECOND three times as long. It may be told what
    becomes of hand-coded, how far its control is off, and how many accidents it has."""

    def __init__(self, hand: str = "ok", control: float = 1.0, accidents: int = 0):
        super().__init__(0, 0.0, 0.0)
        self.true = {(): 1.5, HAND: 1.0, FIRST: 0.5, SECOND: 3.0}
        self.hand, self.control, self.accidents = hand, control, accidents
        self.asked = self.prepared = self.duels = 0

    def baselines(self, kernel: Kernel) -> list[Trial]:
        self.prepared += 1
        plain, hand = super().baselines(kernel)
        return [plain, hand if self.hand == "ok" else replace(hand, verdict=self.hand, samples=(), detail="as told")]

    def measure(self, kernel: Kernel, schedules: Sequence[Schedule], cutoff: float | None,
                done: Callable | None = None) -> list[Trial]:  # fmt: skip
        self.asked += len(schedules)
        if self.accidents:
            self.accidents -= 1
            return [Trial(kernel.key, s, "timeout") for s in schedules]
        return super().measure(kernel, schedules, cutoff, done)

    def duel(self, kernel: Kernel, schedules: Sequence[Schedule], fresh: bool = True) -> list[tuple[float, ...]]:
        self.duels += 1
        *samples, control = super().duel(kernel, schedules, fresh)
        return [*samples, tuple(s * self.control for s in control)]


@pytest.fixture
def records(tmp_path: Path):
    with closing(Records(tmp_path / "r.db")) as records:
        yield records


def tuner_of(records: Records, device: Told, **more) -> Tuner:
    return Tuner(records, device, CPU, progress=False, **{"trials": 4, "strategy": "random", **more})


def seen(records: Records, device: Told, schedule: Schedule, seconds: float) -> None:
    """A trial of which the device knows better."""
    records.add_trial(device.fingerprint, Trial(KERNEL.key, schedule, "ok", (seconds,)), PROTOCOL)


def accepted(records: Records, device: Told) -> Tuner:
    """A tuner that has accepted FIRST."""
    tuner = tuner_of(records, device)
    tuner.baselines(KERNEL)
    seen(records, device, FIRST, 0.5)
    final = tuner.winners.finish(KERNEL)
    assert final is not None and final.accepted and device.duels == 1
    return tuner


class Says:
    """A strategy with one answer, whatever it hears; `heard` holds the kinds of trials that it had been told by then."""

    def __init__(self, answer: Schedule):
        self.answer = answer
        self.told: list[str] = []
        self.heard: list[str] = []

    def ask(self, count: int) -> list[Schedule]:
        self.heard = list(self.told)
        return [self.answer]

    def tell(self, trials: Sequence[Trial]) -> None:
        self.told += [t.kind for t in trials]


def answering(records: Records, device: Told, says: Says, monkeypatch: pytest.MonkeyPatch) -> Tuner:
    """At zero trials, by a strategy that needs a guide."""
    monkeypatch.setattr("autotune.tuner.make_strategy", lambda *_: says)
    return tuner_of(records, device, trials=0, guide=SimpleNamespace(memory=None))


def test_a_refusal_withdraws_no_other_schedule(records):
    device = Told()
    tuner = accepted(records, device)
    seen(records, device, SECOND, 0.1)  # in a lucky moment, and side by side with FIRST in another
    records.add_duel(KERNEL.key, device.fingerprint, [SECOND, FIRST], [(0.1,), (0.5,)])
    final = tuner.winners.finish(KERNEL)
    assert final is not None and (final.schedule, final.accepted) == (SECOND, False)
    assert records.winners(device.fingerprint, PROTOCOL) == {KERNEL.key: FIRST}
    result = tuner.result(KERNEL, 1)
    assert (result.schedule, result.tuned_seconds, result.hand_coded_seconds) == (FIRST, 0.5, 1.0)
    assert tuner.winners.finish(KERNEL) == final and device.duels == 2  # neither is asked again


def test_a_winner_is_displaced_only_by_what_beats_it_side_by_side(records):
    """Timed alone THIRD seemed a fifth faster than FIRST, too much for the two to be compared as a matter of course."""
    device, third = Told(), (U2, U2, U2)
    tuner = accepted(records, device)
    device.true[third] = 0.6
    seen(records, device, third, 0.4)
    assert contenders(records.history(KERNEL.key, device.fingerprint)) == [third]
    assert tuner.winners.rivals(KERNEL) == [third, FIRST] and not tuner.winners.decided(KERNEL)
    final = tuner.winners.finish(KERNEL)
    assert final is not None and final.schedule == FIRST and tuner.result(KERNEL, 1).tuned_seconds == 0.5
    assert device.duels == 2 and tuner.winners.decided(KERNEL)  # of FIRST the verdict was on record
    device.true[third] = 0.3
    records.add_duel(KERNEL.key, device.fingerprint, [third, FIRST], device.duel(KERNEL, [third, FIRST]))
    final = tuner.winners.finish(KERNEL)
    assert final is not None and (final.schedule, final.accepted) == (third, True)
    assert records.winners(device.fingerprint, PROTOCOL) == {KERNEL.key: third}


@pytest.mark.parametrize(("true", "replaces"), [(0.52, False), (0.495, False), (0.4, True)])
def test_a_winner_is_displaced_only_by_what_beats_it_in_the_fresh_process(records, true, replaces):
    """Side by side on the bench THIRD was ahead by luck. FIRST takes half of hand-coded, and 2% is noise."""
    device, third = Told(), (U2, U2, U2)
    tuner = accepted(records, device)
    device.true[third] = true
    seen(records, device, third, 0.45)
    records.add_duel(KERNEL.key, device.fingerprint, [third, FIRST], [(0.45,), (0.5,)])
    final = tuner.winners.finish(KERNEL)
    assert final is not None and (final.schedule, final.accepted) == (third, replaces) and final.ratio == true
    assert records.winners(device.fingerprint, PROTOCOL) == {KERNEL.key: third if replaces else FIRST}
    assert tuner.winners.decided(KERNEL) and tuner.winners.finish(KERNEL) == final and device.duels == 2
    if not replaces:  # once FIRST has turned out wrong THIRD is held against hand-coded alone
        records.add_trial(device.fingerprint, Trial(KERNEL.key, FIRST, "wrong_output", kind="recheck"), PROTOCOL)
        assert not tuner.winners.decided(KERNEL)
        final = tuner.winners.finish(KERNEL)
        assert final is not None and final.accepted and device.duels == 3
        assert records.winners(device.fingerprint, PROTOCOL) == {KERNEL.key: third}


def test_a_refusal_is_judged_by_the_noise_that_is_known_now(records):
    """It wins by 5%; where 8% are noise that is nothing, where 2% are it is kept, and nothing is timed again."""
    device = Told()
    device.true[FIRST] = 0.95
    tuner = tuner_of(records, device)
    tuner.baselines(KERNEL)
    seen(records, device, FIRST, 0.95)
    records.add_noise(device.fingerprint, [(1.0, 0.08)])
    final = tuner.winners.finish(KERNEL)
    assert final is not None and not final.accepted and tuner.winners.finish(KERNEL) == final
    made = device.duels
    records.add_noise(device.fingerprint, [(1.0, 0.01)])
    assert tuner.winners.decided(KERNEL)
    final = tuner.winners.finish(KERNEL)
    assert final is not None and final.accepted and device.duels == made
    assert records.winners(device.fingerprint, PROTOCOL) == {KERNEL.key: FIRST}


@pytest.mark.parametrize(
    ("now", "control", "stays"), [(0.7, 1.0, True), (1.1, 1.0, False), (0.99, 1.0, False), (1.1, 1.5, True)]
)
def test_a_winner_that_has_become_slower_stays_as_long_as_it_beats_hand_coded(records, now, control, stays):
    """In a noisy minute nothing is decided."""
    device = Told()
    tuner = accepted(records, device)
    device.true[FIRST], device.control = now, control
    final = tuner.winners.again(KERNEL, FIRST)
    assert final is not None and final.ratio == now
    assert records.winners(device.fingerprint, PROTOCOL) == ({KERNEL.key: FIRST} if stays else {})
    assert tuner.winners.decided(KERNEL)
    tuner.winners.finish(KERNEL)  # the comparison that it had won once does not bring it back
    assert records.winners(device.fingerprint, PROTOCOL) == ({KERNEL.key: FIRST} if stays else {})
    device.duel = lambda *_, **__: (_ for _ in ()).throw(Unprepared("too busy"))  # type: ignore[method-assign]
    assert tuner.winners.again(KERNEL, FIRST) is None


def test_a_faster_winner_comes_back_when_a_slower_one_was_accepted_since(records):
    """As where the records of another machine of the same kind were merged, on which FIRST was never tried."""
    device, third = Told(), (U2, U2, U2)
    tuner = accepted(records, device)
    device.true[third] = 0.8
    seen(records, device, third, 0.8)
    records.add_final(device.fingerprint, Final(KERNEL.key, third, (0.8,), (1.0,), (1.0,), True, PROTOCOL))
    assert records.winners(device.fingerprint, PROTOCOL) == {KERNEL.key: third}
    for _ in range(2):
        final = tuner.winners.finish(KERNEL)
        assert final is not None and final.schedule == FIRST
    assert records.winners(device.fingerprint, PROTOCOL) == {KERNEL.key: FIRST}
    assert len(records.rows("finals")) == 3  # it is said again once


def test_a_clock_that_was_ahead_holds_no_winner_back(records, monkeypatch):
    device = Told()
    tuner = accepted(records, device)
    with monkeypatch.context() as ahead:
        ahead.setattr("time.time", lambda: 4e9)
        records.add_final(device.fingerprint, Final(KERNEL.key, (U2, U2, U2), (0.8,), (1.0,), (1.0,), True, PROTOCOL))
    seen(records, device, (U2, U2, U2), 0.8)
    device.true[U2, U2, U2] = 0.8
    assert tuner.winners.finish(KERNEL) is not None
    assert records.winners(device.fingerprint, PROTOCOL) == {KERNEL.key: FIRST}


def test_a_kernel_that_cannot_be_prepared_loses_no_winner(records):
    device = Told()
    tuner = accepted(records, device)
    seen(records, device, SECOND, 0.1)
    before = records.history(KERNEL.key, device.fingerprint).trials
    device.duel = lambda *_, **__: (_ for _ in ()).throw(Unprepared("too busy"))  # type: ignore[method-assign]
    assert tuner.winners.finish(KERNEL) is None and tuner.winners.settle(KERNEL) is None
    assert records.history(KERNEL.key, device.fingerprint).trials == before
    assert records.winners(device.fingerprint, PROTOCOL) == {KERNEL.key: FIRST}


@pytest.mark.parametrize("hand", ["ok", "wrong_output"])
def test_nothing_is_kept_back_for_what_was_decided(records, hand):
    """A program of one kernel whose winner is on record goes on with all of its seconds."""
    device = Told(hand=hand)
    tuner_of(records, device).run([KERNEL], {KERNEL.key: 1}, Budget(4))
    budget = Budget(8, 1.0, lambda: 0.0)
    tuner = tuner_of(records, device, trials=8)
    assert tuner.winners.decided(KERNEL)
    tuner.run([KERNEL], {KERNEL.key: 1}, budget)
    assert budget.reserved == 0.0


def test_a_visit_that_time_ended_is_told(records):
    """Baselines took all the time but what a final timing would take: no trial was made, and not all was done."""
    now = [0.0]
    device = Told()
    tuner, budget = tuner_of(records, device), Budget(4, 10.0, lambda: now[0])
    tuner.baselines(KERNEL)
    now[0] = 9.0
    (result,), done = tuner.run([KERNEL], {KERNEL.key: 1}, budget)
    assert not done and result.trials == 0 and tuner.left([KERNEL], Budget(4)) == 4
    (result,), done = tuner_of(records, device).run([KERNEL], {KERNEL.key: 1}, Budget(4))
    assert done and result.trials == 4


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": 1 << 63}, {"trials": -1}, {"beam": -1}])
def test_numbers_that_are_none_are_refused_before_anything_is_measured(records, wrong):
    with pytest.raises(UsageError):
        tuner_of(records, Told(), **wrong)


def test_a_refusal_in_a_noisy_minute_is_looked_at_again(records):
    device = Told(control=0.45)
    tuner = tuner_of(records, device)
    tuner.baselines(KERNEL)
    seen(records, device, FIRST, 0.5)
    final = tuner.winners.finish(KERNEL)
    assert final is not None and not final.accepted and final.noise > 1 and tuner.result(KERNEL, 1).schedule is None
    device.control = 1.0
    final = tuner.winners.finish(KERNEL)
    assert final is not None and final.accepted and device.duels == 2 and tuner.result(KERNEL, 1).schedule == FIRST


def test_what_was_refuted_is_not_shown_as_tuned(records):
    device = Told()
    tuner = accepted(records, device)
    assert [c.schedule for c in choose(records, device.fingerprint, 9, 0) if c.winner] == [FIRST]
    records.add_trial(device.fingerprint, Trial(KERNEL.key, FIRST, "wrong_output", kind="recheck"), PROTOCOL)
    result = tuner.result(KERNEL, 1)
    assert result.schedule is None and result.tuned_seconds == result.hand_coded_seconds == 1.0
    assert choose(records, device.fingerprint, 9, 0)
    assert FIRST not in [c.schedule for c in choose(records, device.fingerprint, 9, 0)]  # nor as a trial that was right


def test_a_binary_that_is_refuted_is_not_accepted_under_another_name(records):
    """The fastest is wrong on new inputs. Another order of its actions, which gives the same binary, is the next best."""
    device, other = Told(), (U2, U2, U2)
    tuner = tuner_of(records, device)
    tuner.baselines(KERNEL)
    for schedule, seconds in ((other, 0.4), (FIRST, 0.5)):
        records.add_trial(device.fingerprint, Trial(KERNEL.key, schedule, "ok", (seconds,), code_hash="same"), PROTOCOL)
    duel = device.duel

    def refuting(kernel: Kernel, schedules: Sequence[Schedule], fresh: bool = True) -> list[tuple[float, ...]]:
        if other in schedules:
            raise Refuted(Trial(kernel.key, other, "wrong_output", kind="recheck"))
        return duel(kernel, schedules, fresh)

    device.duel = refuting  # type: ignore[method-assign]
    assert tuner.winners.finish(KERNEL) is None and device.duels == 0
    assert records.winners(device.fingerprint, PROTOCOL) == {} and tuner.result(KERNEL, 1).schedule is None


def test_each_guide_has_its_answer_once(records, monkeypatch):
    """A repeat measures nothing, and what another guide says is measured too; neither hears of earlier answers."""
    device = Told()
    for answer in (FIRST, FIRST, SECOND, SECOND, FIRST, HAND):
        says = Says(answer)
        (result,), done = answering(records, device, says, monkeypatch).run([KERNEL], {KERNEL.key: 1}, Budget(0))
        assert done and result.trials == 0 and says.heard == ["unoptimized", "hand_coded"]
    trials = records.history(KERNEL.key, device.fingerprint).trials
    assert [t.schedule for t in trials if t.kind == "answer"] == [FIRST, SECOND] and device.asked == 2


def test_an_answer_that_time_left_out_is_told(records, monkeypatch):
    device = Told()
    tuner = answering(records, device, Says(FIRST), monkeypatch)
    (result,), done = tuner.run([KERNEL], {KERNEL.key: 1}, Budget(0, 0.0))
    assert not done and device.asked == 0 and tuner.left([KERNEL], Budget(0)) == 0
    (result,), done = answering(records, device, Says(FIRST), monkeypatch).run([KERNEL], {KERNEL.key: 1}, Budget(0))
    assert done and device.asked == 1 and result.schedule == FIRST


@pytest.mark.parametrize("late", [False, True])
def test_kernels_of_another_tuner_get_their_answers_in_time_or_are_told(records, monkeypatch, late):
    """The baselines find the kernel free, the search does not; then it is, or time is over."""
    device, now, free = Told(), [0.0], iter([True, False])

    @contextmanager
    def claim(*_):
        if not (mine := next(free, True)):
            now[0] = 9.0 * late
        yield mine

    monkeypatch.setattr("autotune.records.claims.claim", claim)
    monkeypatch.setattr("autotune.records.claims.PAUSE", 0.0)
    tuner = answering(records, device, Says(FIRST), monkeypatch)
    _, done = tuner.run([KERNEL], {KERNEL.key: 1}, Budget(0, 9.0, lambda: now[0]))
    assert done is not late and device.asked == (not late)


@pytest.mark.parametrize(("trials", "cut"), [(2, False), (8, True)])
def test_a_visit_that_ends_with_the_budget_was_not_cut_by_time(records, trials, cut):
    """Of eight trials it may make two, or time is over after four."""
    device, now = Told(), [0.0]
    tuner = tuner_of(records, device, trials=8)
    tuner.baselines(KERNEL)
    budget = Budget(trials, 10.0, lambda: now[0])
    made = tuner.visit(KERNEL, 8, budget, lambda n: now.__setitem__(0, 20.0))
    assert made == min(trials, 4) and tuner._tried([KERNEL], budget) is not cut


@pytest.mark.parametrize(("accidents", "verdict"), [(1, "ok"), (2, "timeout")])
def test_an_accident_is_tried_once_more_before_a_winner_is_lost(records, accidents, verdict):
    device = Told()
    accepted(records, device)
    claims = [c for c in choose(records, device.fingerprint, 9, 0) if c.winner]
    device.accidents = accidents
    told: list[Checked] = []
    recheck(claims, device, told.append)
    (checked,) = told
    assert (checked.now.verdict, checked.now.kind, device.asked) == (verdict, "recheck", 2)


@pytest.mark.parametrize("trials", [0, 4])
def test_a_kernel_whose_hand_coded_form_fails_gets_no_trials_and_is_told(records, trials):
    device = Told(hand="wrong_output")
    tuner = tuner_of(records, device, trials=trials, beam=2)
    (result,), done = tuner.run([KERNEL], {KERNEL.key: 1}, Budget(trials))
    assert (result.trials, device.asked, device.duels, result.schedule) == (0, 0, 0, None) and done
    assert result.refused == "wrong_output: as told" and tuner.best_seconds(KERNEL) is None
    assert tuner_of(records, device).continue_by_beam(KERNEL, Budget(0)) and device.asked == 0


@pytest.mark.parametrize(("verdict", "times"), [("timeout", 2), ("crashed", 2), ("wrong_output", 1), ("ok", 1)])
def test_an_accident_of_a_baseline_is_measured_in_one_more_run_only(records, verdict, times):
    device = Told(hand=verdict)
    for _ in range(4):
        tuner_of(records, device).baselines(KERNEL)
    assert device.prepared == times


def test_a_run_is_not_done_because_one_kernel_had_many_trials_before(records):
    device, other = Told(), add_one(64)
    for _ in range(10):
        seen(records, device, FIRST, 0.5)
    calls = {KERNEL.key: 1, other.key: 1}
    results, done = tuner_of(records, device, trials=2).run([KERNEL, other], calls, Budget(4, 0.0))
    assert not done and [r.trials for r in results if r.kernel is other] == [0]
    results, done = tuner_of(records, device, trials=2).run([KERNEL, other], calls, Budget(4))
    assert done and [r.trials for r in results if r.kernel is other] == [2]


def test_beam_in_force_searches_nothing_of_ours(monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr(Tuner, "run", lambda *_: found.append(BEAM.value) or ([], True))
    with Context(BEAM=2):
        autotune.tune([], records=tmp_path / "r.db", strategy="random")
        assert BEAM.value == 2
    assert found == [0]


def test_a_search_hears_of_every_trial_once_though_a_merge_puts_some_before_others(records):
    device = Told()
    tuner = tuner_of(records, device)
    tuner.baselines(KERNEL)
    heard: list[Schedule] = []
    strategy = tuner._opened(KERNEL, tuner._history(KERNEL))
    strategy.tell = lambda trials: heard.extend(t.schedule for t in trials)  # type: ignore[method-assign]
    seen(records, device, FIRST, 0.5)
    tuner._opened(KERNEL, tuner._history(KERNEL))
    seen(records, device, SECOND, 3.0)
    records.db.execute("UPDATE trials SET created = 0 WHERE rowid = (SELECT max(rowid) FROM trials)")
    tuner._opened(KERNEL, tuner._history(KERNEL))
    assert heard == [FIRST, SECOND]


def test_similar_kernels_hear_of_trials_as_the_benchmark_tells_them(records):
    """Without the baselines, which are far from where searches go."""
    device = Told()
    tuner = tuner_of(records, device)
    memory = Memory(np.zeros((1, len(traits(root_state(KERNEL, CPU))))), [[FIRST]])
    tuner.guide = SimpleNamespace(memory=memory)  # type: ignore[assignment]
    tuner.baselines(KERNEL)
    tuner._remember(KERNEL, tuner._history(KERNEL))
    assert not memory.added
    seen(records, device, FIRST, 0.5)
    tuner._remember(KERNEL, tuner._history(KERNEL))
    assert memory.added[KERNEL.key].log_times == {FIRST: -1.0}


@pytest.mark.parametrize("trials", [0, 4])
def test_answers_are_recalled_where_trials_follow(records, trials):
    """Where answers are asked for each kernel's would otherwise be another one once those of similar kernels are on record."""
    device = Told()
    tuner = tuner_of(records, device, trials=trials)
    memory = Memory(np.zeros((1, len(traits(root_state(KERNEL, CPU))))), [[FIRST]])
    tuner.guide = SimpleNamespace(memory=memory)  # type: ignore[assignment]
    records.add_trial(device.fingerprint, Trial(KERNEL.key, FIRST, "ok", (0.5,), kind="answer"), PROTOCOL)
    tuner._remember(KERNEL, tuner._history(KERNEL))
    assert bool(memory.added) is bool(trials)
