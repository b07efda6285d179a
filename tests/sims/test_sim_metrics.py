"""Each metric by hand, and what must not change it."""

import math

import numpy as np
import pytest

from sims import SimulatorError, metrics
from sims.paths import Paths

ONE = np.zeros(4, int)
TIMES = np.log2([1.0, 1.05, 2.0, 4.0])  # five pairs are more than 10 % apart: all but the first


def score_all(p: np.ndarray, y: np.ndarray, g: np.ndarray) -> list[float]:
    return [
        metrics.pairwise_accuracy(p, y, g),
        metrics.spearman(p, y, g),
        metrics.top_k(p, y, g, 1),
        metrics.top_k(p, y, g, 3),
    ]


@pytest.fixture
def sample() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    g = np.repeat([3, 1, 7], [8, 5, 9])
    y = rng.standard_normal(22)
    return y + rng.standard_normal(22), y, g


def test_pairwise_by_hand() -> None:
    assert metrics.pairwise_accuracy(TIMES, TIMES, ONE) == 1.0
    assert metrics.pairwise_accuracy(-TIMES, TIMES, ONE) == 0.0
    assert metrics.pairwise_accuracy(np.zeros(4), TIMES, ONE) == 0.5
    # predicted order 1.05, 1.0, 4.0, 2.0: of the five pairs only (2.0, 4.0) is wrong
    assert metrics.pairwise_accuracy(np.array([1.0, 0.0, 3.0, 2.0]), TIMES, ONE) == pytest.approx(4 / 5)


def test_pairwise_is_a_mean_over_kernels_not_over_pairs() -> None:
    y, g = np.array([0.0, 1.0, 0.0, 1.0, 2.0, 3.0]), np.array([0, 0, 1, 1, 1, 1])
    p = np.array([1.0, 0.0, 0.0, 1.0, 2.0, 3.0])  # kernel 0: its one pair wrong; kernel 1: six right
    assert metrics.pairwise_accuracy(p, y, g) == pytest.approx(0.5)


def test_spearman_by_hand() -> None:
    y = np.array([1.0, 2.0, 3.0, 4.0])
    assert metrics.spearman(np.array([1.0, 2.0, 4.0, 3.0]), y, ONE) == pytest.approx(
        1 - 6 * 2 / (4 * 15)
    )  # sum d^2 = 2
    # ties: ranks 1.5 1.5 3.5 3.5 against 1 2 3 4, centred products 1.5 + .5 + .5 + 1.5 over sqrt(4 * 5)
    assert metrics.spearman(np.array([0.0, 0.0, 1.0, 1.0]), y, ONE) == pytest.approx(4 / math.sqrt(20))
    assert metrics.spearman(np.zeros(4), y, ONE) == 0.0


def test_spearman_can_take_the_median_of_kernels() -> None:
    y, g = np.tile([1.0, 2.0, 3.0], 3), np.repeat([0, 1, 2], 3)
    p = np.array([1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 3.0, 2.0, 1.0])  # 1, 1, -1
    assert metrics.spearman(p, y, g) == pytest.approx(1 / 3)
    assert metrics.spearman(p, y, g, np.median) == pytest.approx(1.0)


def test_top_k_by_hand() -> None:
    p = np.array([3.0, 2.0, 0.0, 1.0])  # chooses 2.0, then 4.0, then 1.05, then 1.0
    expected = {1: 1 / 2.0, 2: 1 / 2.0, 3: 1 / 1.05, 4: 1.0, 9: 1.0}
    for k, score in expected.items():
        assert metrics.top_k(p, TIMES, ONE, k) == pytest.approx(score)
    assert metrics.top_k(np.zeros(4), TIMES, ONE, 1) == pytest.approx(1 / 4)  # ties count against the simulator
    with pytest.raises(SimulatorError, match="k >= 1"):
        metrics.top_k(p, TIMES, ONE, 0)


def test_coverage_by_hand() -> None:
    y, p = np.array([10.0, 11.0, 12.0, 15.0]), np.array([0.0, 1.0, 2.0, 1.0])
    # centred: y -2 -1 0 3, p -1 0 1 0, errors 1 1 1 3; z(0.8) = 1.28155
    assert metrics.coverage(p, np.full(4, 0.79), y, ONE) == pytest.approx(3 / 4)  # 1.28155 * .79 = 1.0124
    assert metrics.coverage(p, np.full(4, 0.77), y, ONE) == 0.0  # .9868
    assert metrics.coverage(p, np.full(4, 2.4), y, ONE) == 1.0  # 3.0757
    assert metrics.coverage(p, np.full(4, 0.6), y, ONE, level=0.95) == pytest.approx(3 / 4)  # 1.95996 * .6 = 1.176


def test_coverage_of_a_known_normal_is_its_level() -> None:
    rng = np.random.default_rng(0)
    p = rng.standard_normal(20_000)
    y, g = p + 0.3 * rng.standard_normal(20_000), np.repeat(np.arange(20), 1000)
    assert metrics.coverage(p, np.full(20_000, 0.3), y, g) == pytest.approx(0.80, abs=0.01)


def test_winners_optimism_by_hand() -> None:
    y, p = np.array([1.0, 0.0, 2.0]), np.array([-2.0, 0.0, 2.0])
    # the winner is row 0: predicted 2 below the mean, measured exactly at it; two doublings too good
    assert metrics.winners_optimism(p, y, np.zeros(3, int)) == pytest.approx(2 * math.log(2))
    assert metrics.winners_optimism(y, y, np.zeros(3, int)) == pytest.approx(0.0)


def test_mape_by_hand() -> None:
    y, p = np.log2([1.0, 2.0, 4.0]), np.log2([2.0, 2.0, 3.0])
    assert metrics.mape(p, y, np.array([0, 0, 1])) == pytest.approx(((1 + 0) / 2 + 1 / 4) / 2)
    assert metrics.mape(y, y, np.array([0, 0, 1])) == 0.0


class Forgetful:
    """Knows the truth while it sees the state, and nothing after `memory` imagined actions. E = (time, imagined)."""

    def __init__(self, memory: int):
        self.memory = memory

    def embed(self, paths: Paths) -> np.ndarray:
        return np.stack([paths.ends[:, 0], np.zeros(len(paths))], axis=1)

    def advance(self, embedding: np.ndarray, action: np.ndarray) -> np.ndarray:
        return embedding + np.stack([action[:, 0], np.ones(len(action))], axis=1)

    def judge(self, embedding: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        time = np.where(embedding[:, 1] > self.memory, 0.0, embedding[:, 0])
        return time, time, time


def test_roll_out_loss_by_hand() -> None:
    """State = time = sum of the actions: what remembers two actions loses nothing up to depth 2, and all beyond."""
    actions = np.random.default_rng(0).standard_normal((12, 4, 1))
    states = np.concatenate([np.zeros((12, 1, 1)), np.cumsum(actions, axis=1)], axis=1)
    length = np.tile([1, 3, 4, 4], 3)
    log_time = np.where(np.arange(5) == length[:, None], states[..., 0], np.nan)
    paths = Paths(np.zeros((2, 1, 1)), np.ones((2, 1)), np.repeat([0, 1], 6), actions, states, length, log_time)
    loss = metrics.roll_out_loss(Forgetful(2), paths, range(1, 6))  # type: ignore[arg-type]
    assert [loss[d] for d in (1, 2, 3, 4)] == pytest.approx([0, 0, 1, 1]) and math.isnan(loss[5])


def test_noise_ceiling_by_hand_and_by_simulation() -> None:
    assert metrics.noise_ceiling(1.0, 1.0) == pytest.approx(0.75)
    assert metrics.noise_ceiling(1.0, 0.0) == pytest.approx(1.0)
    assert metrics.noise_ceiling(0.0, 1.0) == pytest.approx(0.5)
    rng = np.random.default_rng(0)
    true = rng.standard_normal(1500)
    noisy = true + 0.5 * rng.standard_normal(1500)
    simulated = metrics.pairwise_accuracy(true, noisy, np.zeros(1500, int), gap=0.0)
    assert simulated == pytest.approx(metrics.noise_ceiling(1.0, 0.5), abs=0.01)
    with pytest.raises(SimulatorError, match="sigmas"):
        metrics.noise_ceiling(0.0, 0.0)


def test_rank_scores_ignore_monotone_transforms(sample: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    p, y, g = sample
    for transform in (np.exp, np.arctan, lambda v: v**3, lambda v: 7 * v - 100):
        assert score_all(transform(p), y, g) == score_all(p, y, g)


def test_scores_ignore_the_order_of_rows_and_the_names_of_kernels(
    sample: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    p, y, g = sample
    p = np.round(p)  # with ties
    std, order = np.linspace(0.1, 2.0, len(p)), np.random.default_rng(1).permutation(len(p))
    renamed = np.array([{3: 0, 1: 9, 7: 4}[k] for k in g])
    expected = metrics.evaluate(p, std, y, g)
    assert metrics.evaluate(p[order], std[order], y[order], renamed[order]) == pytest.approx(expected)


def test_all_scores_ignore_an_offset_per_kernel(sample: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    p, y, g = sample
    assert metrics.evaluate(p + 10.0 * g, np.ones(22), y, g) == pytest.approx(metrics.evaluate(p, np.ones(22), y, g))


def test_kernels_that_cannot_be_scored_are_left_out() -> None:
    y, g = np.array([0.0, 1.0, 5.0, 2.0, 2.0]), np.array([0, 0, 1, 2, 2])  # a lone row; two rows alike
    assert metrics.pairwise_accuracy(y, y, g) == 1.0
    assert metrics.spearman(y, y, g) == pytest.approx(1.0)
    assert math.isnan(metrics.pairwise_accuracy(y[2:3], y[2:3], g[2:3]))


def test_bad_input_is_a_typed_error() -> None:
    with pytest.raises(SimulatorError, match="alike"):
        metrics.spearman(np.zeros(3), np.zeros(4), np.zeros(4, int))
    with pytest.raises(SimulatorError, match="finite"):
        metrics.spearman(np.array([0.0, np.nan]), np.zeros(2), np.zeros(2, int))
    with pytest.raises(SimulatorError, match="std has shape"):
        metrics.coverage(np.zeros(2), np.zeros(3), np.zeros(2), np.zeros(2, int))
