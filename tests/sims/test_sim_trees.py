"""Boosted trees: each split against all splits tried one by one, and what trees must and must not depend on. Bars of the toy
kernels stand beside what broken and control models reach (seeds fixed, see sims.toys)."""

from __future__ import annotations

import numpy as np
import pytest

from sims import NearestNeighbour, SimulatorError, Trees, TreesConfig, metrics
from sims.base import TrainingRows
from sims.toys import WIDTH, World, make_world, shuffled_within
from sims.trees import CHUNK, NEVER, Tree, _answers, _binned, _boosted, _edges, _grow, _splits, _tiled

BAR = 0.80  # pairwise accuracy of 120 trees; nearest neighbour 0.76, shuffled labels 0.5
SMALL = TreesConfig(rounds=120)
ALL = {"members": 1, "rows": 1.0, "columns": 1.0, "least": 1, "ridge": 1e-6}


@pytest.fixture(scope="module")
def trees(train: World) -> tuple[Trees, dict[str, float]]:
    fresh = Trees(WIDTH, SMALL)
    return fresh, fresh.fit(train.features, train.log_time, train.group)


def pairwise(simulator, world: World) -> float:
    return metrics.pairwise_accuracy(simulator.predict(world.features)[0], world.log_time, world.group)


def test_learns_unseen_kernels_and_beats_the_controls(trees, train: World, held_out: World) -> None:
    nearest = NearestNeighbour(WIDTH)
    nearest.fit(train.features, train.log_time, train.group)
    ours, control = pairwise(trees[0], held_out), pairwise(nearest, held_out)
    assert ours > BAR and ours > control + 0.03 and control > 0.6, (ours, control)


def test_labels_shuffled_within_kernels_teach_nothing(train: World, held_out: World) -> None:
    broken = Trees(WIDTH, SMALL)
    told = broken.fit(train.features, shuffled_within(train), train.group, steps=60)
    assert 0.35 < pairwise(broken, held_out) < 0.65 and 0.4 < told["oob_pairwise"] < 0.6


def test_the_out_of_bag_score_and_the_spread_are_honest(trees, held_out: World) -> None:
    simulator, told = trees
    scores = metrics.evaluate(*simulator.predict(held_out.features, held_out.group), held_out.log_time, held_out.group)
    assert abs(told["oob_pairwise"] - scores["pairwise"]) < 0.06 and 0.7 < scores["coverage80"] < 0.9
    assert told["kernels"] == 100 and told["rows"] == 2000 and told["steps"] == 120


@pytest.mark.parametrize("seed", range(5))
def test_a_split_is_the_best_of_all(seed: int) -> None:
    """Squares of errors that each split of each node leaves, one by one."""
    rng = np.random.default_rng(seed)
    config = TreesConfig(bins=5, ridge=0.7, least=3)
    bins, node = rng.integers(0, 5, (3, 60)).astype(np.uint8), rng.integers(0, 2, 60)
    weight = rng.integers(1, 4, 60)
    error = weight * rng.standard_normal(60)
    feature, cut = _splits(bins, node, 2, _tiled(3, error, weight), config)
    for n in range(2):
        inside = node == n

        def gain(f: int, c: int, inside: np.ndarray = inside) -> float:
            left, right = inside & (bins[f] <= c), inside & (bins[f] > c)
            if min(weight[left].sum(), weight[right].sum()) < 3:
                return 0.0
            score = lambda rows: error[rows].sum() ** 2 / (weight[rows].sum() + 0.7)  # noqa: E731
            return score(left) + score(right) - score(inside)

        gains = {(f, c): gain(f, c) for f in range(3) for c in range(4)}
        assert gain(feature[n], cut[n]) == pytest.approx(max(gains.values())) and max(gains.values()) > 0


def test_where_nothing_is_gained_nothing_is_split() -> None:
    tree = _grow(np.zeros((2, 8), np.uint8), np.ones(8), np.ones(8), TreesConfig(bins=4, depth=2, least=1, ridge=1e-6))
    assert (tree.threshold == 3).all() and tree.value[0] == pytest.approx(1.0) and not tree.value[1:].any()


def test_two_steps_are_found_exactly() -> None:
    """In two kernels far apart, x0 > 0.5 costs 3 and, there, x1 > 0.5 one more: two levels say so, in one tree."""
    x = np.tile(np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32), (2, 1))
    y = np.tile([0.0, 0.0, 3.0, 4.0], 2) + np.repeat([5.0, -90.0], 4)
    exact = Trees(2, TreesConfig(depth=2, rounds=1, rate=1.0, **ALL))
    exact.fit(x, y, np.repeat([0, 1], 4))
    said = exact.predict(x[:4])[0]
    np.testing.assert_allclose(said - said[0], [0, 0, 3, 4], atol=1e-5)
    assert exact.state()["threshold"][0, 0, 0] == 0.5


def test_a_row_drawn_twice_counts_as_two() -> None:
    rng = np.random.default_rng(0)
    bins, error, weight = rng.integers(0, 8, (4, 50)).astype(np.uint8), rng.standard_normal(50), rng.integers(1, 3, 50)
    again = np.repeat(np.arange(50), weight)
    config = TreesConfig(bins=8, depth=3)
    ours, theirs = (
        _grow(bins, weight * error, weight, config),
        _grow(bins[:, again], error[again], np.ones(len(again)), config),
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b)


@pytest.mark.parametrize("odd", [0, 1])
def test_a_lone_row_is_no_leaf(odd: int) -> None:
    bins, error = np.full((1, 6), 1 - odd, np.uint8), np.zeros(6)
    bins[0, 5], error[5] = odd, 100.0
    sums = _tiled(1, error, np.ones(6))
    assert _splits(bins, np.zeros(6, int), 1, sums, TreesConfig(bins=2, least=2))[1] == 1  # none
    assert _splits(bins, np.zeros(6, int), 1, sums, TreesConfig(bins=2, least=1))[1] == 0


def test_what_equals_a_threshold_goes_left() -> None:
    tree = Tree(np.array([[0]]), np.array([[0.5]], np.float32), np.array([[1.0, 2.0]], np.float32))
    np.testing.assert_array_equal(_answers(tree, np.array([[0.5], [0.6]], np.float32)), [[1.0], [2.0]])


def test_all_kernels_drawn_twice_are_the_same_with_twice_the_ridge(train: World) -> None:
    rows = TrainingRows.build(train.features, train.log_time, train.group, WIDTH)
    trees = []
    for times in (1, 2):
        config = TreesConfig(members=1, rows=1.0, columns=1.0, ridge=5.0 * times, least=10 * times)
        counts = np.full((1, len(rows.target)), times)
        trees.append(_boosted(rows, counts, config, 3, np.random.default_rng(0), None))
    for (once,), (twice,) in zip(*trees, strict=True):
        for a, b in zip(once, twice, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_kernels_level_does_not_matter(train: World) -> None:
    a, b = Trees(WIDTH, SMALL), Trees(WIDTH, SMALL)
    a.fit(train.features, train.log_time, train.group, steps=5)
    b.fit(train.features, train.log_time + 8.0 * (train.group % 3), train.group, steps=5)
    np.testing.assert_allclose(a.predict(train.features[:50])[0], b.predict(train.features[:50])[0], atol=1e-4)


def test_which_schedules_of_a_kernel_were_tried_does_not_matter() -> None:
    """A kernel of which only fast schedules are known teaches the same differences: its level is no error of the trees."""
    rng = np.random.default_rng(0)
    x = rng.random((400, 1), np.float32)
    group, fast = np.repeat(np.arange(40), 10), np.repeat(np.arange(40) < 20, 10)
    x[fast] *= 0.3
    simulator = Trees(1, TreesConfig(rounds=60, rate=0.3, **ALL))
    simulator.fit(x, 4.0 * x[:, 0], group)
    said = simulator.predict(np.array([[0.05], [0.25], [0.9]]))[0]
    np.testing.assert_allclose(np.diff(said), [0.8, 2.6], atol=0.25)


def test_only_the_order_of_a_features_values_matters(train: World) -> None:
    x = np.round(2 * train.features)  # few values: each of them is a bin
    said = []
    for values in (x, np.sign(x) * np.abs(x) ** 3):
        simulator = Trees(WIDTH, SMALL)
        simulator.fit(values, train.log_time, train.group, steps=10)
        said.append(simulator.predict(values)[0])
    np.testing.assert_array_equal(*said)


def test_beyond_what_was_seen_nothing_changes(trees, train: World, held_out: World) -> None:
    low, high = train.features.min(0), train.features.max(0)
    far = 1e3 * held_out.features
    np.testing.assert_array_equal(trees[0].predict(far)[0], trees[0].predict(np.clip(far, low, high))[0])


def test_one_seed_gives_one_result_bit_for_bit(train: World, held_out: World) -> None:
    def run(seed: int) -> np.ndarray:
        simulator = Trees(WIDTH, TreesConfig(seed=seed))
        simulator.fit(train.features, train.log_time, train.group, steps=6)
        return simulator.predict_members(held_out.features)

    first = run(0)
    np.testing.assert_array_equal(first, run(0))
    assert not np.array_equal(first, run(1)) and len(np.unique(first, axis=0)) == TreesConfig().members


def test_any_number_of_rows_gives_the_same_answer_per_row(trees, train: World) -> None:
    whole = trees[0].predict_members(train.features[: CHUNK + 3])
    assert whole.shape == (5, CHUNK + 3)
    for n in (0, 1, CHUNK - 1, CHUNK):
        np.testing.assert_array_equal(trees[0].predict_members(train.features[:n]), whole[:, :n])


def test_a_deadline_ends_with_whole_rounds(train: World) -> None:
    asked = iter([False, False, True])
    simulator = Trees(WIDTH, SMALL)
    told = simulator.fit(train.features, train.log_time, train.group, deadline=lambda: next(asked))
    assert told["steps"] == 3 and simulator.state()["value"].shape == (5, 3, 64)


def test_edges_and_bins_by_hand() -> None:
    x = np.array([[3, 7], [1, 7], [3, 7], [2, 7]], np.float32)
    edges = _edges(x, 4)
    np.testing.assert_array_equal(edges, [[1.5, 2.5, 2.5], [7, 7, 7]])
    np.testing.assert_array_equal(_binned(x, edges), [[3, 0], [0, 0], [3, 0], [1, 0]])
    many = _edges(np.arange(101, dtype=np.float32)[:, None], 5)
    np.testing.assert_allclose(many, [[20, 40, 60, 80]])


def test_state_round_trip(trees, held_out: World) -> None:
    copy = Trees(WIDTH, SMALL)
    copy.load_state(trees[0].state())
    for ours, theirs in zip(copy.predict(held_out.features), trees[0].predict(held_out.features), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert np.abs(copy.state()["threshold"]).max() <= NEVER


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda s: s.update(feature=s["feature"][:, :, 1:]), "'feature' has shape"),
        (lambda s: s.update(feature=s["feature"] + WIDTH), "none of the 24"),
        (lambda s: s.update(feature=s["feature"] - WIDTH), "none of the 24"),
        (lambda s: s.update(value=s["value"][:, :0]), "no trees"),
        (lambda s: s.pop("value"), "no trees"),
        (lambda s: s.pop("spread"), "wrong names"),
        (lambda s: s.update(threshold=s["threshold"] * np.nan), "'threshold' holds NaN"),
    ],
)
def test_a_wrong_state_is_refused_and_changes_nothing(trees, held_out: World, harm, message) -> None:
    state, before = trees[0].state(), trees[0].predict_members(held_out.features)
    harm(state)
    with pytest.raises(SimulatorError, match=message):
        trees[0].load_state(state)
    np.testing.assert_array_equal(trees[0].predict_members(held_out.features), before)


def test_errors_of_use(trees, train: World) -> None:
    fresh = Trees(WIDTH, SMALL)
    for call in (lambda: fresh.predict(np.zeros((1, WIDTH))), fresh.state):
        with pytest.raises(SimulatorError, match="before fit"):
            call()
    with pytest.raises(SimulatorError, match="NaN"):
        trees[0].predict(np.full((2, WIDTH), np.nan))
    with pytest.raises(SimulatorError, match="at least one step"):
        fresh.fit(train.features, train.log_time, train.group, steps=0)
    for wrong in ({"rounds": 0}, {"rows": 1.5}, {"columns": 0.0}, {"bins": 300}, {"depth": 13}, {"ridge": 0.0}):
        with pytest.raises(SimulatorError, match=next(iter(wrong))):
            TreesConfig(**wrong)


def test_a_world_of_few_kernels_is_enough_to_start() -> None:
    tiny = make_world(kernels=2, rows=3, seed=0)
    simulator = Trees(WIDTH, SMALL)
    simulator.fit(tiny.features, tiny.log_time, tiny.group, steps=3)
    assert np.isfinite(simulator.predict(tiny.features)).all()
