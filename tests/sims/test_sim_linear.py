"""Ridge, the linear simulator, and simulators of single summaries as simulators of paths."""

from dataclasses import replace

import numpy as np
import pytest

from sims import Committee, Ensemble, EnsembleConfig, NearestNeighbour, SimulatorError, Trees, TreesConfig, metrics
from sims.flat import Flat, StateSimulator, transitions
from sims.linear import Linear, LinearConfig
from sims.ridge import Dynamics, ridge
from sims.toys import OPS, STATE, PathWorld, make_paths

EXACT = LinearConfig(size=STATE, products=0, anchor=0.0)  # levels are random here: they must not pull


@pytest.fixture(scope="module")
def world() -> PathWorld:
    return make_paths(kernels=30, rows=12, seed=1, noise=0.0)


@pytest.fixture(scope="module")
def unseen() -> PathWorld:
    return make_paths(kernels=10, rows=12, seed=2, noise=0.0)


def fitted(world: PathWorld, config: LinearConfig = EXACT) -> Linear:
    linear = Linear(world.paths.widths, config)
    linear.fit(world.paths)
    return linear


def test_ridge_finds_the_weights_and_shrinks_those_of_noise() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((200, 5)), np.array([[1.0], [-2.0], [0.0], [3.0], [0.5]])
    found, error = ridge(x, x @ w, np.arange(200) % 10)
    np.testing.assert_allclose(found, w, atol=1e-6)
    assert error < 1e-10
    noise, error = ridge(x, rng.standard_normal((200, 1)), np.arange(200) % 10)
    assert np.abs(noise).max() < 0.1 and error == pytest.approx(1.0, abs=0.15)


def test_the_penalty_is_chosen_on_groups_left_out() -> None:
    """Numbers that only tell groups apart seem to explain their levels: to rows left out, not to groups left out."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(20), 10)
    own, y = rng.standard_normal((20, 15))[group], rng.standard_normal(20)[group][:, None]
    by_group, by_row = ridge(own, y, group)[0], ridge(own, y, np.arange(200))[0]
    assert np.abs(by_row).max() > 3 * np.abs(by_group).max()


def test_a_linear_world_is_recovered_exactly(world: PathWorld, unseen: PathWorld) -> None:
    linear, paths = fitted(world), unseen.paths
    found = linear.predict(paths).relative
    for kernel in range(10):
        mine = (paths.kernel == kernel)[:, None] & paths.reached
        error = found[mine] - unseen.truth[mine]
        assert np.ptp(error) < 1e-3, kernel


def test_the_next_embedding_is_exact_in_a_linear_world(world: PathWorld, unseen: PathWorld) -> None:
    linear, paths = fitted(world), unseen.paths
    z = linear.embed(paths.cut(0))
    for t in range(paths.widths.steps):
        z = linear.advance(z, paths.actions[:, t])  # beyond the end: zeros, which change nothing
    np.testing.assert_allclose(z, linear.embed(paths), atol=2e-3)
    assert max(abs(v) for v in metrics.roll_out_loss(linear, paths, range(1, 5)).values()) < 0.01


def test_products_tell_what_a_line_cannot() -> None:
    rng = np.random.default_rng(0)
    z, a = rng.standard_normal((400, 3)), rng.standard_normal((400, 2))
    after = z + (z[:, :1] * a[:, 1:])  # bilinear
    with_products = Dynamics.fit(z, a, after, np.arange(400), p=3, q=2)
    without = Dynamics.fit(z, a, after, np.arange(400), p=0, q=0)
    assert np.abs(with_products(z, a) - after).max() < 1e-4 < 0.5 < np.abs(without(z, a) - after).max()


def test_no_action_changes_nothing_whatever_was_learned() -> None:
    rng = np.random.default_rng(0)
    z, a = rng.standard_normal((50, 3)).astype(np.float32), rng.standard_normal((50, 2))
    dynamics = Dynamics.fit(z, a, z + 1.0, np.arange(50), p=1, q=1)
    np.testing.assert_array_equal(dynamics(z, np.zeros((50, 2))), z)
    np.testing.assert_allclose(dynamics(z, a), z + 1.0, atol=1e-3)


def test_null_actions_are_learned(world: PathWorld) -> None:
    linear = fitted(world)
    row, step = transitions(world.paths)
    null = world.paths.actions[row, step, 0] == 1
    paths = world.paths.take(row[null]).cut(step[null])
    z = linear.embed(paths)
    moved = linear.judge(linear.advance(z, np.eye(7, dtype=np.float32)[np.zeros(len(z), int)]))[0]
    assert np.abs(moved - linear.judge(z)[0]).max() < 1e-3
    other = np.eye(7, dtype=np.float32)[np.full(len(z), 1)] + np.eye(7, dtype=np.float32)[np.full(len(z), OPS)]
    assert np.abs(linear.judge(linear.advance(z, other))[0] - linear.judge(z)[0]).max() > 0.1


def test_reach_never_lies_above_the_time_and_finds_what_is_below() -> None:
    world = make_paths(kernels=40, rows=30, seed=3)
    prediction = fitted(world).predict(world.paths)
    inside = world.paths.reached
    assert (prediction.reachable[inside] <= prediction.relative[inside]).all()
    assert np.isnan(prediction.reachable[~inside]).all()


def test_what_is_within_reach_is_on_the_scale_of_the_time() -> None:
    """Metamorphic: times are comparable within a kernel only, so a simulator that says 7 more of all says 7 more of the best below,
    too; and the best below is about where it truly is."""

    class Higher(Trees):
        def predict(self, features: np.ndarray, group: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
            mean, std = super().predict(features, group)
            return mean + 7.0, std

    world = make_paths(kernels=40, rows=30, seed=3, noise=0.0)
    paths, gaps = world.paths, []
    for kind in (Trees, Higher):
        simulator = Flat(paths.widths, kind(STATE, TreesConfig(rounds=40)))
        simulator.fit(paths)
        prediction = simulator.predict(paths)
        gaps.append((prediction.relative - prediction.reachable)[paths.reached])
    np.testing.assert_allclose(*gaps, atol=1e-4)
    best = paths.best_below(paths.prefixes())
    measured = paths.reached & np.isfinite(paths.log_time)
    truth = (paths.log_time - best)[measured]
    prediction = fitted(world).predict(paths)  # levels are random here, and what lies below a state is not linear in it
    found = (prediction.relative - prediction.reachable)[measured]
    assert np.corrcoef(found, truth)[0, 1] > 0.5


def test_absolute_time_needs_the_level() -> None:
    """Offsets told by the root's first number: then the level of an unseen kernel is known."""
    world, unseen = (make_paths(kernels=40, rows=10, seed=s, noise=0.0) for s in (1, 2))
    for w in (world, unseen):
        own = w.truth[:, :1] - 8.0 * w.paths.states[:, :1, 0]  # root time becomes 8 * first number
        w.paths.log_time[:] -= own
        w.truth[:] -= own
    ends = np.arange(len(unseen.paths)), unseen.paths.length
    found = fitted(world).predict(unseen.paths).absolute[ends]
    assert metrics.mape(found, unseen.truth[ends], unseen.paths.kernel) < 1.0
    shifted = metrics.mape(found + 3.0, unseen.truth[ends], unseen.paths.kernel)
    assert shifted > 3.0


NETS = EnsembleConfig(hidden=32, members=2, steps=3, batch=64)
FOREST = TreesConfig(members=2, rounds=4)
SIMULATORS = {
    "linear": lambda w: Linear(w, LinearConfig(size=5, products=2)),
    "nearest": lambda w: Flat(w, NearestNeighbour(w.state)),
    "ensemble": lambda w: Flat(w, Ensemble(w.state, NETS)),
    "trees": lambda w: Flat(w, Trees(w.state, FOREST)),
    "committee": lambda w: Flat(w, Committee(w.state, NETS, FOREST)),
}


@pytest.fixture(scope="module", params=SIMULATORS)
def pair(request, world: PathWorld) -> tuple[StateSimulator, StateSimulator]:
    """A fitted simulator, and a fresh one of its kind."""
    make = SIMULATORS[request.param]
    simulator = make(world.paths.widths)
    simulator.fit(world.paths)
    return simulator, make(world.paths.widths)


def test_a_fit_that_diverges_leaves_what_was_learned(world: PathWorld, unseen: PathWorld) -> None:
    simulator = Flat(world.paths.widths, ensemble := Ensemble(world.paths.widths.state, NETS))
    simulator.fit(world.paths)
    before = simulator.predict(unseen.paths)
    ensemble.config = replace(NETS, lr=1e30)
    with pytest.raises(SimulatorError, match="diverged"):
        simulator.fit(unseen.paths)
    for ours, theirs in zip(simulator.predict(unseen.paths), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_state_round_trip(pair, unseen: PathWorld) -> None:
    simulator, fresh = pair
    fresh.load_state(simulator.state())
    for ours, theirs in zip(fresh.predict(unseen.paths), simulator.predict(unseen.paths), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    z, a = simulator.embed(unseen.paths.cut(1)), unseen.paths.actions[:, 1]
    np.testing.assert_array_equal(fresh.advance(z, a), simulator.advance(z, a))


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda s: s.pop("level.weights"), "wrong names"),
        (lambda s: s.update(extra=np.zeros(1)), "wrong names"),
        (lambda s: s.update({"reach.mean": np.zeros(99)}), "'reach.mean' has shape"),
        (lambda s: s.update({"dynamics.weights": s["dynamics.weights"] * np.nan}), "'dynamics.weights' holds NaN"),
    ],
)
def test_a_wrong_state_is_refused_and_changes_nothing(pair, unseen: PathWorld, harm, message) -> None:
    simulator = pair[0]
    state, before = simulator.state(), simulator.predict(unseen.paths)
    harm(state)
    with pytest.raises(SimulatorError, match=message):
        simulator.load_state(state)
    for ours, theirs in zip(before, simulator.predict(unseen.paths), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_judging_the_embedding_is_predicting_the_end(pair, unseen: PathWorld) -> None:
    simulator, paths = pair[0], unseen.paths
    prediction, ends = simulator.predict(paths), (np.arange(len(paths)), paths.length)
    relative, reachable, spread = simulator.judge(simulator.embed(paths))
    for ours, theirs in (
        (relative, prediction.relative),
        (reachable, prediction.reachable),
        (spread, prediction.spread),
    ):
        np.testing.assert_allclose(ours, theirs[ends], atol=1e-5)


def test_rows_are_predicted_one_by_one_and_padding_is_not_looked_at(pair, unseen: PathWorld) -> None:
    simulator, paths = pair[0], unseen.paths
    order = np.random.default_rng(0).permutation(len(paths))
    whole = simulator.predict(paths)
    for ours, theirs in zip(simulator.predict(paths.take(order)), whole, strict=True):
        np.testing.assert_allclose(ours, theirs[order], atol=1e-5)
    bent = replace(paths, states=paths.states + 5.0 * ~paths.reached[..., None])
    for ours, theirs in zip(simulator.predict(bent), whole, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_errors_of_use(world: PathWorld) -> None:
    fresh = Linear(world.paths.widths)
    for call in (lambda: fresh.predict(world.paths), fresh.state, lambda: fresh.embed(world.paths)):
        with pytest.raises(SimulatorError, match="before fit"):
            call()
    with pytest.raises(SimulatorError, match="other widths"):
        Linear(world.paths.widths._replace(state=9)).fit(world.paths)
    with pytest.raises(SimulatorError, match="products <= size"):
        LinearConfig(size=4, products=5)
    none = world.paths.take(np.zeros(0, int))
    linear = fitted(world)
    assert len(linear.advance(linear.embed(none), none.actions[:, 0])) == len(linear.predict(none).relative) == 0
    with pytest.raises(SimulatorError, match="NaN"):
        fitted(world).judge(np.full((2, STATE), np.nan))
