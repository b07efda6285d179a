"""Statistics by hand, by brute force, and by what they promise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autotune.statistics import bootstrap, chance, improvement, iqm


def test_iqm_by_hand():
    assert iqm(np.array([[0.0, 1, 2, 100]])) == 1.5  # a quarter is cut at each end
    assert iqm(np.array([[-50.0], [1], [2], [3], [4], [5], [6], [900]])) == 3.5
    assert iqm(np.array([[1.0, 2, 4]])) == pytest.approx((0.25 * 1 + 2 + 0.25 * 4) / 1.5)  # the middle 1.5 of three
    assert iqm(np.array([[7.0]])) == 7.0


def test_iqm_forgets_outliers_and_follows_shifts():
    scores = np.random.default_rng(0).normal(size=(5, 12))
    spoilt = scores.copy()
    spoilt.flat[scores.argmax()] += 1e6
    assert iqm(spoilt) == iqm(scores) and iqm(3 * scores + 2) == pytest.approx(3 * iqm(scores) + 2)


def test_improvement_against_brute_force():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 4, (3, 5)), rng.integers(0, 4, (2, 5))
    wins = [[(a > b) + 0.5 * (a == b) for a, b in itertools.product(x[:, t], y[:, t])] for t in range(5)]
    assert improvement(x, y) == pytest.approx(np.mean([np.mean(w) for w in wins]))
    assert improvement(x, x) == 0.5 and improvement(x + 9, y) == 1.0
    assert improvement(x, y) + improvement(y, x) == pytest.approx(1.0)


def test_chance_by_hand():
    assert chance(np.array([0.3])) == 0.5 and chance(np.array([-0.3])) == chance(np.array([0.0, 0.0])) == 1.0
    assert chance(np.array([1.0, 2.0, 4.0])) == 1 / 8  # of 8 signs only these are as high
    assert chance(np.array([-1.0, 2.0, 4.0])) == 2 / 8 and chance(np.array([1.0, 2.0, -4.0])) == 5 / 8
    with pytest.raises(ValueError, match="nothing to compare"):
        chance(np.array([]))


@pytest.mark.parametrize("count", [7, 20])
def test_chance_alarms_as_seldom_as_it_says_and_sees_what_is_there(count):
    """400 experiments of each kind: nothing there (20 alarms are expected; a percentile bootstrap gave 7%), and a whole deviation."""
    rng = np.random.default_rng(3)
    drawn = rng.normal(size=(400, count))
    assert 8 <= sum(chance(row) <= 0.05 for row in drawn) <= 33
    assert sum(chance(row + 1.0) <= 0.05 for row in drawn) > 240
    one = drawn[0]
    assert chance(3 * one) == chance(one) and chance(one + 0.1) <= chance(one)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """60 experiments on a known mean: 95% intervals hold it in 48 at least (expected 57, less the bootstrap's bias for 6 runs)."""
    rng = np.random.default_rng(2)
    mean = lambda s: float(s.mean())  # noqa: E731
    held = 0
    for i in range(60):
        found = bootstrap(mean, rng.normal(size=(6, 20)), seed=i)
        assert found.low <= found.value <= found.high
        held += found.low <= 0 <= found.high
    assert held >= 48


def test_more_runs_make_a_narrower_interval_and_unlike_tasks_are_refused():
    rng = np.random.default_rng(3)
    few, many = rng.normal(size=(3, 10)), rng.normal(size=(30, 100))
    assert bootstrap(iqm, many).high - bootstrap(iqm, many).low < bootstrap(iqm, few).high - bootstrap(iqm, few).low
    with pytest.raises(ValueError, match="tasks"):
        bootstrap(improvement, few, many)
