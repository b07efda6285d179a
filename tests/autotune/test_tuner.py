"""What the tuner makes of accidents, of refusals, and of kernels that cannot win, on devices that answer as they are told."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import add_one
from tinygrad import Context
from tinygrad.helpers import BEAM
from told import CPU, FIRST, HAND, KERNEL, SECOND, Told, accepted, seen, tuner_of

import autotune
from autotune.budget import Budget
from autotune.errors import UsageError
from autotune.kernel import Schedule
from autotune.measuring.bench import PROTOCOL
from autotune.measuring.recheck import Checked, choose, recheck
from autotune.memory import Memory, traits
from autotune.records import Records, Trial
from autotune.report import Report, result_of
from autotune.space import root_state
from autotune.tuner import Tuner


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


def test_what_was_refuted_is_not_shown_as_tuned(records):
    device = Told()
    accepted(records, device)
    assert [c.schedule for c in choose(records, device.fingerprint, 9, 0) if c.winner] == [FIRST]
    records.add_trial(device.fingerprint, Trial(KERNEL.key, FIRST, "wrong_output", kind="recheck"), PROTOCOL)
    result = result_of(records, device.fingerprint, KERNEL)
    assert result.schedule is None and result.tuned_seconds == result.hand_coded_seconds == 1.0
    assert choose(records, device.fingerprint, 9, 0)
    assert FIRST not in [c.schedule for c in choose(records, device.fingerprint, 9, 0)]  # nor as a trial that was right


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


@pytest.mark.parametrize("seconds", [9.0, 0.0])
def test_a_replay_gives_as_many_answers_as_there_was_time_for(records, monkeypatch, seconds):
    """Whatever its own clock says: it says nothing of the recorded run's."""
    device, now = Told(), [0.0]
    tuner = answering(records, device, Says(FIRST), monkeypatch)
    budget = Budget(0, seconds, lambda: now[0])
    (result,), done = tuner.run([KERNEL], {KERNEL.key: 1}, budget)
    answers = int(seconds > 0)
    assert budget.answered == answers and done == bool(answers) and result.verdicts == {}
    again = Budget(0, 9.0 - seconds, lambda: now[0], stop_after=0, answers=budget.answered)
    other = answering(records, Told(), Says(SECOND), monkeypatch)
    other.search(KERNEL, again)
    assert again.answered == answers and other.measurer.asked == answers


def test_a_kernel_that_another_tuner_held_to_the_end_is_told(records, monkeypatch):
    now = [0.0]

    @contextmanager
    def claim(*_):
        now[0] = 9.0
        yield False

    monkeypatch.setattr("autotune.records.claims.claim", claim)
    monkeypatch.setattr("autotune.records.claims.PAUSE", 0.0)
    (result,), done = tuner_of(records, Told()).run([KERNEL], {KERNEL.key: 1}, Budget(4, 5.0, lambda: now[0]))
    assert not done and "run the same command again" in result.refused
    assert f"{KERNEL.name} could not be measured (its baselines" in Report("CPU", 9.0, 0, [result]).table()


def test_tuners_of_one_file_meet_wherever_the_program_goes(tmp_path, monkeypatch):
    """Claims lie beside the file, not in the folder of the moment."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with closing(Records("r.db")) as records:
        monkeypatch.chdir(tmp_path / "elsewhere")
        tuner_of(records, Told()).run([KERNEL], {KERNEL.key: 1}, Budget(4, None))
    assert list(Path.cwd().iterdir()) == []


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
