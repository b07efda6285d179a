"""Which schedule wins, which displaces another, and what becomes of refusals, on a device that answers as it is told."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tiny import U2
from told import FIRST, KERNEL, SECOND, Told, accepted, seen, tuner_of

from autotune.kernel import Kernel, Schedule
from autotune.measuring.bench import PROTOCOL
from autotune.measuring.runner import Refuted, Unprepared
from autotune.records import Final, Trial
from autotune.report import result_of
from autotune.winners import contenders


def test_a_refusal_withdraws_no_other_schedule(records):
    device = Told()
    tuner = accepted(records, device)
    seen(records, device, SECOND, 0.1)  # in a lucky moment, and side by side with FIRST in another
    records.add_duel(KERNEL.key, device.fingerprint, [SECOND, FIRST], [(0.1,), (0.5,)])
    final = tuner.winners.finish(KERNEL)
    assert final is not None and (final.schedule, final.accepted) == (SECOND, False)
    assert records.winners(device.fingerprint, PROTOCOL) == {KERNEL.key: FIRST}
    result = result_of(records, device.fingerprint, KERNEL)
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
    assert (
        final is not None
        and final.schedule == FIRST
        and result_of(records, device.fingerprint, KERNEL).tuned_seconds == 0.5
    )
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


def test_a_winner_that_is_seen_to_be_slower_than_hand_coded_is_served_no_more(records):
    """As where a file was merged that holds another minute's verdict, or its owner's."""
    device, third = Told(), (U2, U2, U2)
    tuner = tuner_of(records, device)
    tuner.baselines(KERNEL)
    device.true[third] = 1.3
    seen(records, device, third, 1.3)
    records.add_final(device.fingerprint, Final(KERNEL.key, third, (0.8,), (1.0,), (1.0,), True, PROTOCOL))
    assert not tuner.winners.decided(KERNEL)
    assert tuner.winners.finish(KERNEL) is None and records.winners(device.fingerprint, PROTOCOL) == {}
    assert device.duels == 2 and tuner.winners.decided(KERNEL)  # all that are close, and this one beside hand-coded
    assert tuner.winners.finish(KERNEL) is None and device.duels == 2


def test_so_is_one_that_is_seen_to_be_slower_beside_another(records):
    """SECOND seemed the fastest, and is as fast as hand-coded."""
    device, third = Told(), (U2, U2, U2)
    tuner = tuner_of(records, device)
    tuner.baselines(KERNEL)
    device.true[SECOND], device.true[third] = 0.99, 1.3
    seen(records, device, SECOND, 0.5)
    records.add_final(device.fingerprint, Final(KERNEL.key, third, (0.8,), (1.0,), (1.0,), True, PROTOCOL))
    final = tuner.winners.finish(KERNEL)
    assert final is not None and (final.schedule, final.accepted) == (SECOND, False)
    assert device.duels == 2 and records.winners(device.fingerprint, PROTOCOL) == {}


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


def test_a_refusal_in_a_noisy_minute_is_looked_at_again(records):
    device = Told(control=0.45)
    tuner = tuner_of(records, device)
    tuner.baselines(KERNEL)
    seen(records, device, FIRST, 0.5)
    final = tuner.winners.finish(KERNEL)
    assert (
        final is not None
        and not final.accepted
        and final.noise > 1
        and result_of(records, device.fingerprint, KERNEL).schedule is None
    )
    device.control = 1.0
    final = tuner.winners.finish(KERNEL)
    assert (
        final is not None
        and final.accepted
        and device.duels == 2
        and result_of(records, device.fingerprint, KERNEL).schedule == FIRST
    )


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
    assert (
        records.winners(device.fingerprint, PROTOCOL) == {}
        and result_of(records, device.fingerprint, KERNEL).schedule is None
    )
