"""What trials say of schedules that were not measured."""

from __future__ import annotations

import numpy as np
import pytest

from sims.base import SimulatorError
from sims.correction import Correction, CorrectionConfig, alike

UNIT = CorrectionConfig(scale=1.0, level=2.0, noise=1.0, near=1.0)
A, B, HALF, QUARTER = (1, 1), (2, 2), (1, 2), (1, 3)  # leaves in two trees
NONE = np.zeros((1, 1))


def leaves(*rows: tuple[int, ...]) -> np.ndarray:
    return np.array(rows, np.uint8)


def test_alike_is_the_share_of_common_leaves() -> None:
    np.testing.assert_array_equal(alike(leaves(A, B), leaves(A, HALF, QUARTER, B)), [[1, 0.5, 0.5, 0], [0, 0.5, 0, 1]])


def test_nothing_told_nothing_corrected() -> None:
    shift = Correction(leaves(A)[:0], np.zeros(0, int), np.zeros((0, 3)), NONE)(leaves(A, B))
    np.testing.assert_array_equal(shift, np.zeros((2, 3)))


def test_one_trial_says_how_fast_the_kernel_is_and_no_more() -> None:
    shift = Correction(leaves(A), np.array([0]), np.array([[3.0]]), NONE, UNIT)(leaves(A, B))
    np.testing.assert_allclose(shift, 3.0)


def test_two_trials_by_hand() -> None:
    """Residuals 6 and 4: the level is 5, and (1, -1) an eigenvector of their covariance, of value scale^2 + noise^2 = 2. So half
    of it is believed where a schedule is itself; where it is half like one and not the other, a quarter."""
    shift = Correction(leaves(A, B), np.zeros(2, int), np.array([[6.0], [4.0]]), NONE, UNIT)(
        leaves(A, B, HALF, QUARTER)
    )
    np.testing.assert_allclose(shift[:, 0], [5.5, 4.5, 5.0, 5.25])


def test_another_kernel_says_which_schedules_are_fast_and_nothing_of_the_level() -> None:
    """As much as it would of its own, times exp(-distance / near); without trials of its own the level stays."""
    distance = np.array([[0.0, 0.7], [0.7, 0.0]])
    shift = Correction(leaves(A, B), np.array([1, 1]), np.array([[6.0], [4.0]]), distance, UNIT)(leaves(A, B, HALF))
    np.testing.assert_allclose(shift[:, 0], np.exp(-0.7) * np.array([0.5, -0.5, 0.0]), atol=1e-12)
    corrected = Correction(leaves(A, B, HALF), np.array([1, 1, 0]), np.array([[6.0], [4.0], [9.0]]), distance, UNIT)
    np.testing.assert_allclose(corrected(leaves(A, B, HALF))[:, 0] - 9.0, shift[:, 0], atol=1e-12)


def test_against_the_conditional_mean_of_a_joint_normal() -> None:
    """A second implementation, by way of the precision matrix, each covariance written out."""
    rng = np.random.default_rng(0)
    told, asked = rng.integers(0, 3, (9, 7)), rng.integers(0, 3, (4, 7))
    kernel, residual = np.array([0, 1, 2, 0, 1, 2, 0, 1, 1]), rng.standard_normal((9, 2))
    place = rng.standard_normal((3, 2))
    distance = ((place[:, None] - place) ** 2).sum(-1)
    c = CorrectionConfig(scale=0.7, level=1.3, noise=0.2, near=0.9)
    rows = [*zip(kernel, told, strict=True), *((0, row) for row in asked)]
    joint = np.array([
        [c.scale**2 * np.mean(x == y) * np.exp(-distance[i, j] / c.near) + (c.level**2 if i == j else 0.0) for j, y in rows]
        for i, x in rows
    ])  # fmt: skip
    precision = np.linalg.inv(joint + c.noise**2 * np.eye(len(rows)))
    means = np.array([residual[kernel == k].mean(0) for k in range(3)])
    expected = means[0] - np.linalg.solve(precision[9:, 9:], precision[9:, :9] @ (residual - means[kernel]))
    np.testing.assert_allclose(Correction(told, kernel, residual, distance, c)(asked), expected, atol=1e-9)


def test_what_was_learned_of_all_kernels_serves_each_of_them() -> None:
    """Asked for kernel k, as if that had been the first."""
    rng = np.random.default_rng(1)
    told, asked = rng.integers(0, 3, (9, 7)), rng.integers(0, 3, (4, 7))
    kernel, residual = np.array([0, 1, 2, 0, 1, 2, 0, 1, 1]), rng.standard_normal((9, 2))
    place = rng.standard_normal((4, 2))  # of the last one there are no trials
    distance = ((place[:, None] - place) ** 2).sum(-1)
    corrected = Correction(told, kernel, residual, distance, UNIT)
    for k in range(4):
        order = np.array([k, *(i for i in range(4) if i != k)])
        first = Correction(told, np.argsort(order)[kernel], residual, distance[order][:, order], UNIT)
        np.testing.assert_allclose(corrected(asked, k), first(asked), atol=1e-12)
    assert np.abs(corrected(asked, 1) - corrected(asked, 0)).max() > 0.1


def test_trials_correct_their_neighbours() -> None:
    """Wrong by 1 more wherever the first two trees, of six, come to leaf 1: after forty trials less than a third of what the first one
    leaves is left."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 2, (200, 3)).repeat(2, axis=1)  # six trees, alike in pairs
    wrong = 5.0 + 1.0 * (rows[:, 0] == 1)[:, None] + 0.05 * rng.standard_normal((200, 1))
    few, many = (
        np.abs(Correction(rows[:n], np.zeros(n, int), wrong[:n], NONE)(rows[100:]) - wrong[100:]).mean()
        for n in (1, 40)
    )
    assert many < 0.33 * few


def test_a_trial_that_failed_is_left_out_and_several_predictors_are_corrected_as_each_by_itself() -> None:
    rng = np.random.default_rng(0)
    rows, wrong = rng.integers(0, 3, (8, 5)), rng.standard_normal((8, 2))
    wrong[3, 1] = np.nan  # for both
    timed = np.arange(8) != 3
    together = Correction(rows, np.zeros(8, int), wrong, NONE)(rows)
    for i in range(2):
        apart = Correction(rows[timed], np.zeros(7, int), wrong[timed, i : i + 1], NONE)(rows)
        np.testing.assert_allclose(together[:, i : i + 1], apart, atol=1e-12)
    nothing = Correction(rows[:2], np.zeros(2, int), np.array([[np.nan], [np.inf]]), NONE)(rows)
    np.testing.assert_array_equal(nothing, 0.0)


def test_bad_input_is_refused() -> None:
    with pytest.raises(SimulatorError, match="do not fit"):
        Correction(leaves(A, B), np.zeros(2, int), np.zeros((3, 1)), NONE)
    with pytest.raises(SimulatorError, match="do not fit"):
        Correction(leaves(A, B), np.zeros(2, int), np.zeros((2, 1)), NONE)(leaves((1, 2, 3)))
    with pytest.raises(SimulatorError, match="none of the 1"):
        Correction(leaves(A, B), np.array([0, 1]), np.zeros((2, 1)), NONE)
    with pytest.raises(SimulatorError, match="near"):
        CorrectionConfig(near=0.0)
