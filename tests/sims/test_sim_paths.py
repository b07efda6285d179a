"""Paths: what is checked, how they are cut, split and numbered, and what becomes of them as rows to learn from."""

from dataclasses import replace

import numpy as np
import pytest

from sims import SimulatorError
from sims.paths import Paths, Points
from sims.toys import make_paths

NAN = np.nan
# one kernel: root -> a -> b, root -> a -> c, root -> d; another: root -> a. The actions are one number each.
A, B, C, D = 1.0, 2.0, 3.0, 4.0


@pytest.fixture
def tree() -> Paths:
    actions = np.array([[A, B], [A, C], [D, 9.0], [A, 9.0]])[..., None]  # 9: padding
    states = np.arange(12.0).reshape(4, 3, 1)
    log_time = np.array([[5.0, NAN, 2.0], [5.0, NAN, 3.0], [5.0, 4.0, -99.0], [7.0, 8.0, NAN]])
    return Paths(np.array([[[0.0]], [[1.0]]]), np.ones((2, 1), bool), np.array([0, 0, 0, 1]), actions, states,
                 np.array([2, 2, 1, 1]), log_time)  # fmt: skip


def test_a_prefix_is_its_kernel_and_its_actions(tree: Paths) -> None:
    numbers = tree.prefixes()
    np.testing.assert_array_equal(numbers, [[0, 1, 2], [0, 1, 3], [0, 4, -1], [5, 6, -1]])


def test_best_below_is_the_fastest_schedule_that_begins_so(tree: Paths) -> None:
    best = tree.best_below(tree.prefixes())  # -99 stands beyond an end
    np.testing.assert_array_equal(best, [[2, 2, 2], [2, 2, 3], [2, 4, NAN], [7, 8, NAN]])


def test_points_are_distinct_measured_and_centred(tree: Paths) -> None:
    points = Points.build(tree, tree.widths)
    np.testing.assert_allclose(points.level, [3.5, 7.5])  # medians of 2 3 4 5 and of 7 8
    np.testing.assert_allclose(points.rows.target, [-1.5, -0.5, 0.5, 1.5, -0.5, 0.5])
    np.testing.assert_array_equal(points.position, [2, 2, 1, 0, 0, 1])
    np.testing.assert_array_equal(points.rows.features[:, 0], tree.states[points.path, points.position, 0])
    np.testing.assert_allclose(points.reach[0], [-1.5, -1.5, -1.5])  # the path to 2, less the kernel's 3.5
    np.testing.assert_allclose(points.reach[3], [-1.5, NAN, NAN])  # the root as a path of its own
    assert points.rows.dropped == 0


def test_failed_ends_count_as_dropped(tree: Paths) -> None:
    log_time = tree.log_time.copy()
    log_time[0, 2] = NAN
    assert Points.build(replace(tree, log_time=log_time), tree.widths).rows.dropped == 1


def test_cutting_keeps_the_first_actions(tree: Paths) -> None:
    np.testing.assert_array_equal(tree.cut(1).length, [1, 1, 1, 1])
    np.testing.assert_array_equal(tree.cut(np.array([0, 1, 2, 0])).length, [0, 1, 1, 0])
    np.testing.assert_array_equal(tree.ends[:, 0], [2, 5, 7, 10])
    np.testing.assert_array_equal(tree.cut(0).ends[:, 0], [0, 3, 6, 9])


def test_splits_are_of_whole_kernels() -> None:
    paths = make_paths(kernels=20, rows=5, seed=0).paths
    rest, held = paths.split(0.25, np.random.default_rng(0))
    assert len(held) == 25 and len(rest) == 75
    assert not set(rest.kernel) & set(held.kernel) and len(set(held.kernel)) == 5


def bent(paths: Paths, **changes: np.ndarray) -> dict:
    return vars(paths) | changes


def test_one_kernel_on_two_devices_is_never_split() -> None:
    paths = make_paths(8, 4, 0).paths
    twice = replace(paths, context=paths.context[[0, 1, 2, 3, 0, 1, 2, 3]])
    assert sorted(twice.units.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    for seed in range(5):
        rest, held = twice.split(0.25, np.random.default_rng(seed))
        assert not set(twice.units[rest.kernel]) & set(twice.units[held.kernel])
        assert len(np.unique(held.kernel)) == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        (lambda p: {"states": np.where(p.states == 7, NAN, p.states)}, "states holds NaN or infinity in 1 of 4"),
        (lambda p: {"context": p.context + np.inf}, "context holds NaN"),
        (lambda p: {"states": p.states[:, 1:]}, r"states has shape \[4, 2, 1\], need \[4, 3, 1\]"),
        (lambda p: {"log_time": p.log_time[:3]}, "log_time has shape"),
        (lambda p: {"actions": p.actions[..., 0]}, "actions must have three axes"),
        (lambda p: {"length": p.length + 2}, r"length must lie in 0..2, got 3..4"),
        (lambda p: {"kernel": p.kernel + 1}, r"kernel must lie in 0..1, got 1..2"),
    ],
)
def test_malformed_paths_are_a_typed_error_in_one_line(tree: Paths, changes, message) -> None:
    with pytest.raises(SimulatorError, match=message) as caught:
        Paths(**bent(tree, **changes(tree)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda p: p.take(np.zeros(0, int)), "empty"),
        (lambda p: p.take(p.kernel == 0), "timed rows: 1, but two are"),
        (lambda p: replace(p, log_time=p.log_time * NAN), "failed trials"),
        (lambda p: replace(p, context=np.zeros((2, 3, 1)), present=np.ones((2, 3), bool)), "tokens 3 in place of 1"),
    ],
)
def test_paths_that_teach_nothing_are_a_typed_error(tree: Paths, harm, message) -> None:
    with pytest.raises(SimulatorError, match=message):
        Points.build(harm(tree), tree.widths)
