"""The sanity checks, on toy paths whose law is known: each must pass a sound simulator and convict a broken one."""

from dataclasses import replace

import numpy as np
import pytest

from sims import Flat, Linear, LinearConfig, NearestNeighbour, SimulatorError, metrics
from sims.checks import noisy_tv, null_action, shuffled, with_idle
from sims.paths import Paths
from sims.toys import DIRECTIONS, OPS, STATE, PathWorld, make_paths

EXACT = LinearConfig(size=STATE, products=0, anchor=0.0)
NULL, ONE = np.eye(OPS + DIRECTIONS, dtype=np.float32)[0], np.zeros(OPS + DIRECTIONS, np.float32)
ONE[[1, OPS]] = 1.0  # op 1 by an amount of 1


def cost_of_one() -> float:
    """What op 1 costs by the toys' law, log2 units."""
    law = np.random.default_rng(4321)
    moves, cost = law.standard_normal((DIRECTIONS, STATE)), law.standard_normal(STATE)
    return abs(float(moves[0] @ cost))


@pytest.fixture(scope="module")
def world() -> PathWorld:
    return make_paths(kernels=30, rows=12, seed=1, noise=0.0)


@pytest.fixture(scope="module")
def linear(world: PathWorld) -> Linear:
    simulator = Linear(world.paths.widths, EXACT)
    simulator.fit(world.paths)
    return simulator


class Restless(Linear):
    """Takes no action for op 1."""

    def advance(self, embedding: np.ndarray, action: np.ndarray) -> np.ndarray:
        return super().advance(embedding, np.where(action.any(axis=1, keepdims=True), action, ONE))


class Curved(Linear):
    """Tells the square of the time: how far an action moves it depends on where it is taken."""

    def judge(self, embedding: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        relative, reachable, spread = super().judge(embedding)
        return relative**2, reachable, spread


def test_a_simulator_that_knows_the_world_moves_where_the_world_moves(world: PathWorld, linear: Linear) -> None:
    paths, rows = world.paths, np.arange(len(world.paths))
    found = null_action(linear, paths)
    step = world.truth[rows, paths.length] - world.truth[rows, paths.length - 1]
    assert found["real"] == pytest.approx(np.abs(step).mean(), rel=1e-2)
    assert found["zero"] == 0.0 and found["same"] < 1e-3 < 0.3 < found["real"]


def test_the_real_action_is_taken_where_it_was_taken(world: PathWorld, linear: Linear) -> None:
    curved = Curved(world.paths.widths, EXACT)
    curved.load_state(linear.state())
    told, rows, ends = linear.predict(world.paths).relative, np.arange(len(world.paths)), world.paths.length
    expected = np.abs(told[rows, ends] ** 2 - told[rows, ends - 1] ** 2).mean()
    assert null_action(curved, world.paths)["real"] == pytest.approx(expected, rel=1e-2)


def test_the_steps_that_change_nothing_are_counted_once(world: PathWorld, linear: Linear) -> None:
    paths, steps = world.paths, set()
    for n, kernel in enumerate(paths.kernel):
        for t in range(paths.length[n]):
            if paths.actions[n, t, 0] == 1:
                steps.add((int(kernel), paths.actions[n, : t + 1].tobytes()))
    assert null_action(linear, paths)["same_count"] == len(steps) > 50
    twice = paths.take(np.tile(np.arange(len(paths)), 2))
    assert null_action(linear, twice) == pytest.approx(null_action(linear, paths), rel=1e-4, abs=1e-6)


def test_what_the_data_do_not_have_is_not_made_up(linear: Linear) -> None:
    found = null_action(linear, make_paths(kernels=5, rows=8, seed=3, null=0.0).paths)
    assert found["same_count"] == 0 and np.isnan(found["same"]) and "idle" not in found


def test_a_simulator_to_which_nothing_is_something_is_convicted(world: PathWorld) -> None:
    restless = Restless(world.paths.widths, EXACT)
    restless.fit(world.paths)
    assert null_action(restless, world.paths)["zero"] == pytest.approx(cost_of_one(), rel=1e-2)


def test_each_kernel_is_asked_its_own_idle_action(world: PathWorld, linear: Linear) -> None:
    amount = np.linspace(0.0, 2.0, 30, dtype=np.float32)
    idle = np.where(np.arange(OPS + DIRECTIONS) == OPS, amount[:, None], ONE)
    room = world.paths.length < world.paths.widths.steps
    expected = cost_of_one() * amount[world.paths.kernel[room]].mean()
    assert null_action(linear, world.paths, idle)["idle"] == pytest.approx(expected, rel=2e-3)
    assert null_action(linear, world.paths, np.tile(NULL, (30, 1)))["idle"] < 1e-3


def test_an_idle_action_is_put_in_and_all_else_is_as_before(world: PathWorld) -> None:
    paths, steps = world.paths, world.paths.widths.steps
    idle = np.tile(
        7.0 + np.arange(30, dtype=np.float32)[:, None], OPS + DIRECTIONS
    )  # told from all others, and by kernel
    found = with_idle(paths, idle, 0.5, np.random.default_rng(0))
    longer = found.length > paths.length
    assert not longer[paths.length == steps].any() and 0.35 < longer[paths.length < steps].mean() < 0.65
    places = set()
    for n in range(len(paths)):
        own, length = found.actions[n, : found.length[n]], found.length[n]
        put = np.flatnonzero((own == idle[paths.kernel[n]]).all(axis=1))
        assert len(put) == longer[n]
        np.testing.assert_array_equal(np.delete(own, put, axis=0), paths.actions[n, : paths.length[n]])
        for t in put:
            places.add((int(t), int(length)))
            np.testing.assert_array_equal(found.states[n, t], found.states[n, t + 1])
        for name in ("states", "log_time"):
            was, now = getattr(paths, name)[n, : paths.length[n] + 1], getattr(found, name)[n, : length + 1]
            np.testing.assert_array_equal(np.delete(now, put + 1, axis=0), was)
            np.testing.assert_array_equal(now[put], now[put + 1])
    assert {(0, 2), (1, 2), (0, 4), (3, 4)} <= places  # before the first action, and after the last
    np.testing.assert_array_equal(with_idle(paths, idle, 0.0, np.random.default_rng(0)).actions, paths.actions)


def test_an_idle_action_is_learned_from_paths_that_have_it(world: PathWorld) -> None:
    """A row of a kind of its own (a negative amount): unseen it moves the time, learned it does not."""
    idle, scores = np.tile(-ONE, (30, 1)), []
    for fraction in (0.0, 0.3):
        simulator = Linear(world.paths.widths, EXACT)
        simulator.fit(with_idle(world.paths, idle, fraction, np.random.default_rng(0)))
        scores.append(null_action(simulator, world.paths, idle)["idle"])
    assert scores[1] < 0.5 * scores[0] and scores[0] == pytest.approx(cost_of_one(), rel=1e-2)


def test_no_measured_action_is_an_error(world: PathWorld, linear: Linear) -> None:
    with pytest.raises(SimulatorError, match="no measured schedule has an action"):
        null_action(linear, world.paths.cut(0))
    with pytest.raises(SimulatorError, match="no measured schedule has an action"):
        null_action(linear, replace(world.paths, log_time=np.full_like(world.paths.log_time, np.nan)))


def test_shuffling_keeps_each_kernels_times_and_nothing_else(world: PathWorld) -> None:
    paths, kernels = world.paths, np.array([3, 4, 5])
    mixed, own = shuffled(paths, kernels, np.random.default_rng(0)), np.isin(paths.kernel, kernels)
    np.testing.assert_array_equal(mixed.log_time[~own], paths.log_time[~own])
    np.testing.assert_array_equal(np.isnan(mixed.log_time), np.isnan(paths.log_time))
    prefixes = paths.prefixes()
    for kernel in kernels:
        cells = (paths.kernel == kernel)[:, None] & np.isfinite(paths.log_time) & paths.reached
        times = [dict(zip(prefixes[cells], p.log_time[cells], strict=True)) for p in (paths, mixed)]
        assert all(times[1][k] == t for k, t in zip(prefixes[cells], mixed.log_time[cells], strict=True))
        assert sorted(times[0].values()) == sorted(times[1].values())
        assert np.mean([times[0][k] == times[1][k] for k in times[0]]) < 0.3
    same = shuffled(paths, np.array([], int), np.random.default_rng(0))
    np.testing.assert_array_equal(same.log_time, paths.log_time)


def test_noise_widens_the_spread_of_those_who_look_at_it(world: PathWorld) -> None:
    held = make_paths(kernels=10, rows=12, seed=2, noise=0.0).paths
    widths = world.paths.widths
    near = noisy_tv(lambda: Flat(widths, NearestNeighbour(widths.state)), world.paths, held, np.random.default_rng(0))
    same = noisy_tv(lambda: Linear(widths, EXACT), world.paths, held, np.random.default_rng(0))
    assert near["kernels"] == same["kernels"] == 3
    assert near["spread_ratio"] > 1.2  # the neighbours of a random kernel differ
    assert same["spread_ratio"] == pytest.approx(1.0)  # one spread for all


def test_a_random_kernel_is_random_on_every_device(world: PathWorld) -> None:
    """Else its other times would tell what was taken away, and the simulator without it would know it."""
    twice, told = replace(world.paths, context=world.paths.context[np.arange(30) % 15]), []

    class Listening(Linear):
        def fit(self, paths: Paths, **options: object) -> dict[str, float]:
            told.append(paths)
            return super().fit(paths)

    held = make_paths(kernels=10, rows=12, seed=2, noise=0.0).paths
    noisy_tv(lambda: Listening(twice.widths, EXACT), twice, held, np.random.default_rng(0), fraction=1 / 15)
    moved = np.isfinite(twice.log_time) & (told[0].log_time != twice.log_time)
    random = np.unique(twice.kernel[moved.any(1)])
    assert len(random) == 2 and random[1] == random[0] + 15
    assert set(told[1].kernel) == set(range(30)) - set(random)


def test_half_of_the_kernels_random_costs_accuracy_and_without_them_none_is_lost(world: PathWorld) -> None:
    noisy = make_paths(kernels=30, rows=12, seed=1, noise=0.5).paths
    held = make_paths(kernels=10, rows=12, seed=2, noise=0.0).paths
    make = lambda: Flat(noisy.widths, NearestNeighbour(noisy.widths.state))  # noqa: E731
    found = noisy_tv(make, noisy, held, np.random.default_rng(0), fraction=0.5)
    assert found["kernels"] == 15 and found["pairwise"] < found["pairwise_without"] - 0.02
    simulator, random = make(), np.random.default_rng(0).permutation(30)[:15]
    simulator.fit(noisy.take(~np.isin(noisy.units[noisy.kernel], random)))
    at = held.reached & np.isfinite(held.log_time)
    first = np.unique(held.prefixes()[at], return_index=True)[1]  # each measured prefix once
    score = metrics.pairwise_accuracy(
        simulator.predict(held).relative[at][first], held.log_time[at][first],
        np.broadcast_to(held.kernel[:, None], at.shape)[at][first],
    )  # fmt: skip
    assert found["pairwise_without"] == pytest.approx(score, abs=1e-6)
