"""The final judgement: never worse."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import U4, add_one

from autotune.measuring.runner import NOISE_FLOOR, judge

add_one_key = add_one()
times = st.lists(st.floats(1e-7, 10.0), min_size=1, max_size=9).map(tuple)
near = st.tuples(times, st.floats(0.5, 1.5), st.floats(0.9, 1.1)).map(
    lambda t: (t[0], tuple(x * t[1] for x in t[0]), tuple(x * t[1] * t[2] for x in t[0]))
)


@settings(max_examples=400, deadline=None, database=None)
@given(st.one_of(st.tuples(times, times, times), near))
def test_what_is_accepted_is_faster_than_both(samples):
    tuned, hand, control = samples
    final = judge(add_one_key, (U4,), samples)
    medians = [statistics.median(s) for s in samples]
    noise = max(NOISE_FLOOR, abs(medians[1] / medians[2] - 1), abs(medians[2] / medians[1] - 1))
    assert final.accepted == (medians[0] < min(medians[1:]) * (1 - noise))
    if final.accepted:
        assert medians[0] < medians[1] and medians[0] < medians[2] and final.ratio <= 1 - NOISE_FLOOR + 1e-9
    assert (final.tuned, final.hand_coded, final.control) == samples


@pytest.mark.parametrize("tuned, hand, control, accepted", [
    (0.97, 1.0, 1.0, True), (0.985, 1.0, 1.0, False), (1.0, 1.0, 1.0, False), (1.5, 1.0, 1.0, False),
    (0.905, 1.0, 1.1, False), (0.905, 1.1, 1.0, False), (0.85, 1.1, 1.0, True), (0.5, 2.0, 1.0, False),
])  # fmt: skip
def test_judge_by_hand(tuned, hand, control, accepted):
    """Between 1.0 and 1.1 the A/A run differs by 10 %, whichever came first, and a win must be larger than that."""
    assert judge(add_one_key, (U4,), [(tuned,) * 3, (hand,) * 3, (control,) * 3]).accepted is accepted


def test_a_higher_noise_floor_asks_for_a_larger_win():
    times = [(0.97,) * 3, (1.0,) * 3, (1.0,) * 3]
    assert judge(add_one_key, (U4,), times, 0.02).accepted and not judge(add_one_key, (U4,), times, 0.05).accepted
