"""Checked rows, scaling, the bootstrap and the batches."""

import numpy as np
import pytest

from sims import Ensemble, NearestNeighbour, SimulatorError
from sims.base import Scaling, Spread, TrainingRows, centre
from sims.sampling import BatchSampler, bootstrap

X = np.arange(12, dtype=np.float32).reshape(6, 2)
Y = np.array([3.0, 1.0, 2.0, 9.0, 8.0, 5.0])
G = np.array([4, 4, 4, 2, 2, 7])


def test_rows_are_sorted_centred_and_the_useless_left_out() -> None:
    y = Y.copy()
    y[2] = np.inf  # a failed trial
    rows = TrainingRows.build(X, y, G, 2)
    assert rows.dropped == 2  # it, and the lone row of kernel 7
    np.testing.assert_array_equal(rows.features, X[[4, 3, 1, 0]])  # kernel 2, then 4, each from fast to slow
    np.testing.assert_allclose(rows.target, [-0.5, 0.5, -1.0, 1.0])  # medians 8.5 and 2
    np.testing.assert_array_equal(rows.start, [0, 2, 4])


def test_a_straggler_does_not_move_the_reference() -> None:
    calm = TrainingRows.build(X, np.array([0.0, 1, 2, 0, 1, 0]), G, 2).target
    wild = TrainingRows.build(X, np.array([0.0, 1, 20, 0, 1, 0]), G, 2).target
    np.testing.assert_array_equal(calm[2:4], wild[2:4])


@pytest.mark.parametrize("simulator", [Ensemble, NearestNeighbour])
@pytest.mark.parametrize(
    "features, log_time, group, message",
    [
        (np.where(X == 5, np.nan, X), Y, G, "NaN or infinity in 1 of 6 rows, first at row 2"),
        (X[:0], Y[:0], G[:0], "empty"),
        (X, np.full(6, np.nan), G, "all 6 rows are failed"),
        (X, Y, np.zeros(6, int), "timed rows: 1, but two"),
        (X, Y, np.arange(6), "timed rows: 0, but two"),
        (X, Y[:5], G, "need log_time and group"),
        (X[:, :1], Y, G, r"shape \[N, 2\]"),
    ],
)
def test_unusable_data_is_a_typed_error_in_one_line(simulator, features, log_time, group, message) -> None:
    with pytest.raises(SimulatorError, match=message) as caught:
        simulator(2).fit(features, log_time, group)
    assert "\n" not in str(caught.value)


def test_scaling_standardises_clips_and_ignores_constants() -> None:
    x = np.array([[0.0, 5.0], [2.0, 5.0]], np.float32)
    scale = Scaling.measure(x, limit=5.0)
    np.testing.assert_allclose(scale(x), [[-1, 0], [1, 0]])
    np.testing.assert_allclose(scale(np.array([[100.0, 9.0], [-100.0, 1.0]], np.float32)), [[5, 0], [-5, 0]])


def test_centre_by_hand() -> None:
    np.testing.assert_allclose(
        centre(np.array([[1.0, 5.0, 3.0], [0.0, 2.0, 4.0]]), np.array([1, 0, 1])), [[-1, 0, 1], [-2, 0, 2]]
    )


def test_spread_draws_a_noisy_variance_to_the_typical_one() -> None:
    np.testing.assert_allclose(Spread()(np.array([4.0]), 5), [2.0])
    # 3 * sqrt((4 * 1 + 4 * 7) / 8) and, from two members, 3 * sqrt((4 * 1 + 1 * 21) / 5)
    np.testing.assert_allclose(Spread(3.0, 1.0)(np.array([7.0, 21.0]), np.array([5, 2])), [6.0, 3 * 5**0.5])


def many_rows(sizes: list[int]) -> TrainingRows:
    n = sum(sizes)
    return TrainingRows.build(
        np.zeros((n, 1)),
        np.random.default_rng(0).standard_normal(n),
        np.repeat(np.arange(len(sizes)), sizes),
        1,
    )


def test_members_see_different_kernels_and_only_their_own() -> None:
    rows, rng = many_rows([6] * 30), np.random.default_rng(0)
    counts = bootstrap(rows, 5, rng)
    assert (counts.sum(axis=1) == 30).all() and len(np.unique(counts, axis=0)) == 5
    assert 0.2 < (counts == 0).mean() < 0.55  # (1 - 1/30)^30 = 0.36 are never drawn
    sampler = BatchSampler(rows, counts, kernels=8, rows_per_kernel=4, fast_bias=1.0)
    for _ in range(30):
        index = sampler.draw(rng)
        assert index.shape == (5, 32)
        for member in range(5):
            assert counts[member, rows.kernel[index[member]]].all()


def test_a_kernel_timed_on_two_devices_is_drawn_as_one() -> None:
    """Groups 0 and 2 are one kernel: a member has both or neither, and a lone unit is too few."""
    group, unit = np.repeat(np.arange(3), 4), np.repeat([7, 5, 7], 4)
    x, y = np.zeros((12, 2), np.float32), np.tile([1.0, 2.0, 3.0, 4.0], 3)
    rows = TrainingRows.build(x, y, group, 2, unit=unit)
    np.testing.assert_array_equal(rows.unit, [1, 0, 1])
    counts = bootstrap(rows, 50, np.random.default_rng(0))
    np.testing.assert_array_equal(counts[:, 0], counts[:, 2])
    assert (counts[:, 0] + counts[:, 1] == 2).all()
    apart = bootstrap(TrainingRows.build(x, y, group, 2), 50, np.random.default_rng(0))
    assert (apart[:, 0] != apart[:, 2]).any()
    with pytest.raises(SimulatorError, match="rows: 1, but two"):
        TrainingRows.build(x, y, group, 2, unit=np.zeros(12, int))


def test_batches_are_blocks_of_one_kernel_and_lean_to_the_fast_end() -> None:
    rows, rng = many_rows([40] * 10 + [3]), np.random.default_rng(0)
    sampler = BatchSampler(rows, np.ones((2, 11), int), kernels=16, rows_per_kernel=8, fast_bias=1.0)
    drawn = np.stack([sampler.draw(rng) for _ in range(200)]).reshape(-1, 8)
    kernel = rows.kernel[drawn]
    assert (kernel == kernel[:, :1]).all()
    place = (drawn - rows.start[kernel])[kernel[:, 0] < 10]
    # weight e^-q on q in [0, 1]: the fast half gets 1 / (1 + e^-1/2) = 0.622
    assert (place < 20).mean() == pytest.approx(0.622, abs=0.01)
    assert set(np.unique(drawn)) == set(range(403))
    short = (kernel[:, 0] == 10).mean()  # 3 rows against min(40, 8): 3 / 83
    assert short == pytest.approx(3 / 83, abs=0.01)
