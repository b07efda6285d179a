"""Intervals of the simulators' scores: what is of the same loops is drawn together."""

from __future__ import annotations

import numpy as np
import pytest

SCORES = [list(map(float, np.random.default_rng(seed).normal(0.5, 0.2, 30))) for seed in (0, 1)]


@pytest.fixture
def results(tool):
    return tool("sims_results")


def test_more_scores_of_the_same_kernels_narrow_nothing(results):
    """Each kernel is measured on a second machine, with the same score; then each is another kernel."""
    once = results.over(SCORES, units=[list(range(30)), list(range(30, 60))])
    twice = results.over([2 * s for s in SCORES], units=[2 * list(range(30)), 2 * list(range(30, 60))])
    apart = results.over([2 * s for s in SCORES], units=[list(range(60)), list(range(60, 120))])
    assert once == twice and once["value"] == pytest.approx(np.mean(SCORES))
    width = lambda found: found["high"] - found["low"]  # noqa: E731
    assert width(apart) < 0.8 * width(once)
    assert width(once) == pytest.approx(2 * 1.96 * np.std(SCORES) / np.sqrt(60), rel=0.15)


def test_what_cannot_be_scored_is_left_out(results):
    assert results.over([[None, 1.0, 3.0], [None, None, None]], units=[[0, 1, 2], [0, 3, 4]])["value"] == 2.0
    assert results.over([[None]], units=[[0]]) is None
    assert results.over([[1.0, 3.0, 8.0]], np.nanmedian, [[0, 1, 2]])["value"] == 3.0
