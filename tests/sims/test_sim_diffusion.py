"""The diffusion simulator: a Gaussian whose mean and spread are known, and toy paths."""

import inspect
from dataclasses import replace

import numpy as np
import pytest

from agents import parameters
from sims import SimulatorError, denoise, metrics, mlp, theta
from sims.denoise import clock, coefficients, kept
from sims.diffusion import Diffusion, DiffusionConfig, _train_jit
from sims.paths import Paths
from sims.toys import PathWorld, make_paths

SMALL = DiffusionConfig(size=6, hidden=64, steps=400, batch=256, samples=16, noise_steps=8)
NOISE = 0.7  # log2 units


@pytest.fixture(scope="module")
def world() -> PathWorld:
    return make_paths(kernels=60, rows=12, seed=1)


@pytest.fixture(scope="module")
def unseen() -> PathWorld:
    return make_paths(kernels=20, rows=12, seed=2)


@pytest.fixture(scope="module")
def fitted(world: PathWorld) -> Diffusion:
    simulator = Diffusion(world.paths.widths, SMALL)
    simulator.fit(world.paths)
    return simulator


def noisy_world() -> Paths:
    """The time of a schedule is its first number plus noise, whose deviation is NOISE where the second is 1, and a tenth of
    that where it is 0. Kernels differ in nothing."""
    rng, K, N = np.random.default_rng(0), 40, 1200
    states = np.zeros((N, 2, 6), np.float32)
    states[..., 0], states[..., 1] = rng.uniform(-1, 1, (N, 2)), rng.integers(0, 2, (N, 1))
    deviation = np.where(states[..., 1] > 0, NOISE, 0.1 * NOISE)
    log_time = states[..., 0] + deviation * rng.standard_normal((N, 2))
    return Paths(np.zeros((K, 3, 5)), np.ones((K, 3), bool), np.arange(N) % K, rng.standard_normal((N, 1, 7)), states,
                 np.ones(N, int), log_time)  # fmt: skip


def test_the_cosine_schedule_by_hand() -> None:
    alpha = kept(12)
    assert alpha[0] == pytest.approx(1.0, abs=2e-4) and alpha[12] == pytest.approx(1e-4)
    assert alpha[6] == pytest.approx(np.cos((0.5 + 0.008) / 1.008 * np.pi / 2) ** 2)
    assert (np.diff(alpha) < 0).all()
    np.testing.assert_allclose(clock(np.array(0.5)), [0.5**0.5, 0.5**0.5, 0.0], atol=1e-6)


def test_the_way_back_from_a_known_clean_value_ends_there() -> None:
    """With the true clean value as the guess, each step lands on sqrt(a') c + sqrt(1 - a') e, and the last on c."""
    alpha, c, e = kept(12), 0.7, -1.3
    x = np.sqrt(alpha[12]) * c + np.sqrt(1 - alpha[12]) * e
    for s, (of_clean, of_x) in zip(range(11, -1, -1), coefficients(alpha), strict=True):
        x = of_clean * c + of_x * x
        assert x == pytest.approx(np.sqrt(alpha[s]) * c + np.sqrt(1 - alpha[s]) * e if s else c, abs=1e-5)


@pytest.mark.learn
def test_mean_and_spread_of_a_known_gaussian_are_recovered() -> None:
    """A noisy TV: where the time is random the spread is large, and it spoils nothing elsewhere."""
    paths = noisy_world()
    simulator = Diffusion(paths.widths, replace(SMALL, steps=700))
    simulator.fit(paths)
    paths = paths.take(np.arange(400))
    z = simulator.embed(paths)
    times = simulator.samples(z, np.zeros((len(z), 7), np.float32))[..., -1]
    loud = paths.ends[:, 1] > 0
    error = np.abs(times.mean(axis=1) - paths.ends[:, 0])
    spread = times.std(axis=1)
    print(f"mean: error {error[loud].mean():.3f} loud, {error[~loud].mean():.3f} calm; "
          f"spread {spread[loud].mean():.3f} (truth {NOISE}), {spread[~loud].mean():.3f} ({0.1 * NOISE:.2f})")  # fmt: skip
    assert error[~loud].mean() < 0.1 and error[loud].mean() < 0.25
    assert 0.7 * NOISE < spread[loud].mean() < 1.3 * NOISE
    assert spread[~loud].mean() < 0.5 * NOISE  # too wide where there is hardly any, but told apart


def test_learns_unseen_kernels_and_goes_on_without_states(fitted, unseen: PathWorld) -> None:
    paths = unseen.paths
    ends = np.arange(len(paths)), paths.length
    z = fitted.embed(paths.cut(0))
    for t in range(paths.widths.steps):
        z = fitted.advance(z, paths.actions[:, t])
    exact, latent = fitted.predict(paths).relative[ends], fitted.judge(z)[0]
    scores = [metrics.pairwise_accuracy(x, unseen.truth[ends], paths.kernel) for x in (exact, latent)]
    print(f"pairwise: exact {scores[0]:.3f}, latent from the root {scores[1]:.3f}")
    assert min(scores) > 0.85
    shown = np.random.default_rng(0).permutation(len(paths))  # another schedule's summaries, and its kernel's
    control = replace(paths, states=paths.states[shown], length=paths.length[shown])
    blind = fitted.predict(control).relative[np.arange(len(paths)), control.length]
    broken = metrics.pairwise_accuracy(blind, unseen.truth[ends], paths.kernel)
    print(f"pairwise of the control, shown the summaries of others: {broken:.3f}")
    assert broken < 0.65


class Stopped(Exception):
    pass


class Split(Diffusion):
    """Stops before it learns, and keeps the units of the rows that it learns from, and of those held out."""

    def _examples(self, paths, points, own):
        unit = points.rows.unit[points.rows.kernel]
        self.split = set(unit[own].tolist()), set(unit[~own].tolist())
        raise Stopped


def test_what_scales_the_spread_was_seen_on_no_device(unseen: PathWorld) -> None:
    """20 kernels on two devices: 2 are held out, with both their rows of contexts. On one device those that a permutation of the
    kernels begins with."""
    once = unseen.paths
    again = replace(once, kernel=once.kernel + 20, context=np.tile(once.context, (2, 1, 1)),
                    present=np.tile(once.present, (2, 1)))  # fmt: skip
    both = {name: np.concatenate([getattr(once, name), getattr(again, name)])
            for name in ("kernel", "actions", "states", "length", "log_time")}  # fmt: skip
    first = set(once.units[np.random.default_rng(SMALL.seed).permutation(20)[:2]].tolist())
    for paths, held in ((once, first), (replace(again, **both), None)):
        simulator = Split(paths.widths, SMALL)
        with pytest.raises(Stopped):
            simulator.fit(paths)
        learned, out = simulator.split
        assert len(out) == 2 and len(learned) == 18 and not learned & out
        assert held is None or out == held


def test_a_capture_is_keyed_by_the_modules_whose_constants_it_holds() -> None:
    parts = _train_jit((16, 16), 8.0).parts
    assert {inspect.getsource(module) for module in (denoise, mlp, parameters, theta)} <= set(parts)


def test_rows_are_predicted_one_by_one(fitted, unseen: PathWorld) -> None:
    order = np.random.default_rng(0).permutation(len(unseen.paths))
    whole = fitted.predict(unseen.paths)
    for ours, theirs in zip(fitted.predict(unseen.paths.take(order)), whole, strict=True):
        np.testing.assert_allclose(ours, theirs[order], atol=1e-5)


def test_state_round_trip_and_errors(fitted, world: PathWorld, unseen: PathWorld) -> None:
    copy = Diffusion(world.paths.widths, SMALL)
    with pytest.raises(SimulatorError, match="before fit"):
        copy.predict(unseen.paths)
    copy.load_state(fitted.state())
    for ours, theirs in zip(copy.predict(unseen.paths), fitted.predict(unseen.paths), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    state = fitted.state()
    state["theta"] = state["theta"][:, 1:]
    with pytest.raises(SimulatorError, match="'theta' has shape"):
        copy.load_state(state)
    wild = Diffusion(world.paths.widths, replace(SMALL, lr=3e38))
    with pytest.raises(
        SimulatorError, match=r"training diverged: .* at step 1"
    ):  # the loss is of the parameters before it
        wild.fit(world.paths, steps=1)
    with pytest.raises(SimulatorError, match="noise_steps"):
        DiffusionConfig(noise_steps=0)
