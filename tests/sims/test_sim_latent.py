"""Planning in a simulator's latent space, on toys whose law is known: z' = z + B a, log2 time = w . z."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from agents import networks, parameters
from agents.ppo import PPOConfig
from sims import SimulatorError, mlp, theta
from sims.base import check_features
from sims.heads import Heads, HeadsConfig, _train_jit
from sims.latent import LatentWorld, reanalyse
from sims.paths import Paths

E, A, F, STEPS = 8, 6, 5, 3
CONFIG = HeadsConfig(hidden=32, steps=300, kernels=8, positions=16)


class Law:
    """The true toy, as a path simulator: an embedding is z itself, and nothing is within reach but what is there."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.moves, self.cost = rng.standard_normal((F, E)), 0.1 * rng.standard_normal(E)

    def embed(self, paths: Paths) -> np.ndarray:
        return paths.ends.astype(np.float32)

    def advance(self, embedding: np.ndarray, action: np.ndarray) -> np.ndarray:
        return (check_features(embedding, E) + action @ self.moves).astype(np.float32)

    def judge(self, embedding: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        time = (embedding @ self.cost).astype(np.float32)
        return time, time, np.zeros_like(time)


def rows_of(rng: np.random.Generator, kernels: int) -> np.ndarray:
    rows = rng.standard_normal((kernels, A, F)).astype(np.float32)
    rows[:, -1] = 0
    return rows


def roots(count: int) -> Paths:
    """One kernel, at z = (1, 0, 1, 0, ...)."""
    states = np.zeros((count, STEPS + 1, E), np.float32)
    states[:, :, ::2] = 1
    zeros = np.zeros(count, int)
    return Paths(np.zeros((1, 1, 1)), np.ones((1, 1), bool), zeros, np.zeros((count, STEPS, F)), states, zeros,
                 np.full((count, STEPS + 1), np.nan))  # fmt: skip


class Taught:
    """Positions whose truth is known: action a is legal where z_a > 0 (STOP always), and to take is the legal action with
    the largest first number of its row, or the smallest where z_7 < 0."""

    def __init__(self, seed: int, kernels: int = 20, positions: int = 60):
        rng = np.random.default_rng(seed)
        self.rows = rows_of(rng, kernels)
        self.kernel = np.repeat(np.arange(kernels), positions)
        self.z = rng.standard_normal((kernels * positions, E)).astype(np.float32)
        self.mask = self.z[:, :A] > 0
        self.mask[:, -1] = True
        worth = np.where(self.mask, self.rows[self.kernel, :, 0] * np.sign(self.z[:, -1:]), -np.inf)
        self.target = np.eye(A)[worth.argmax(1)]


@pytest.fixture(scope="module")
def taught() -> tuple[Heads, Taught]:
    data, heads = Taught(1), Heads(E, A, F, CONFIG)
    heads.fit(data.z, data.kernel, data.rows, data.mask, data.target)
    return heads, data


def accuracy(heads: Heads, data: Taught) -> tuple[float, float]:
    """(of legality, of the action to take), on all positions."""
    legal, right = [], []
    for k in range(len(data.rows)):
        at = data.kernel == k
        prior, legality = heads(data.z[at], data.rows[k])
        legal.append(((legality > 0) == data.mask[at]).mean())
        right.append((np.where(data.mask[at], prior, -np.inf).argmax(1) == data.target[at].argmax(1)).mean())
    return float(np.mean(legal)), float(np.mean(right))


def test_heads_tell_what_is_legal_and_likely_of_kernels_that_they_never_saw(taught: tuple[Heads, Taught]) -> None:
    """Bars 0.9 and 0.75; of heads taught with embeddings shuffled 0.7 and 0.6 at most."""
    heads, data = taught
    fresh = Taught(2)
    legal, right = accuracy(heads, fresh)
    shuffled = Heads(E, A, F, CONFIG)
    mixed = np.random.default_rng(0).permutation(len(data.z))
    shuffled.fit(data.z[mixed], data.kernel, data.rows, data.mask, data.target)
    control = accuracy(shuffled, fresh)
    print(f"heads: bars 0.9 and 0.75, {legal:.2f} and {right:.2f}, shuffled {control[0]:.2f} and {control[1]:.2f}")
    assert legal > 0.9 and right > 0.75 and control[0] < 0.7 and control[1] < 0.6


def test_saved_and_loaded_heads_say_the_same(taught: tuple[Heads, Taught]) -> None:
    heads, data = taught
    other = Heads(E, A, F, CONFIG)
    other.load_state(heads.state())
    for a, b in zip(heads(data.z[:20], data.rows[0]), other(data.z[:20], data.rows[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    for bad in ({"theta": heads.state()["theta"]}, heads.state() | {"theta": np.zeros((1, 3), np.float32)}):
        with pytest.raises(SimulatorError, match="state"):
            other.load_state(bad)


def test_a_world_keeps_how_far_its_heads_clip() -> None:
    """Of random paths; most inputs lie beyond a limit of 0.5 standard deviations. An older file, which does not say, has 5."""
    from autotune.paths import ROW_WIDTH
    from autotune.space import N_ACTIONS
    from autotune.world import World, widths_of

    rng, K, N, S = np.random.default_rng(0), 6, 60, 7
    w = widths_of(S)
    draw = lambda *shape: rng.standard_normal(shape)  # noqa: E731
    paths = Paths(draw(K, w.tokens, w.token), np.ones((K, w.tokens), bool), np.arange(N) % K, draw(N, w.steps, w.action),
                  draw(N, w.steps + 1, S), np.full(N, 2), draw(N, w.steps + 1))  # fmt: skip
    kept = World("linear", w, 0, HeadsConfig(hidden=16, steps=2, clip=0.5))
    kept.simulator.fit(paths)
    z, rows, mask = kept.simulator.embed(paths), draw(K, N_ACTIONS, ROW_WIDTH), np.ones((N, N_ACTIONS), bool)
    kept.heads = Heads(z.shape[1], N_ACTIONS, ROW_WIDTH, kept.heads_config)
    kept.heads.fit(z, paths.kernel, rows, mask, mask / N_ACTIONS)
    arrays, meta = kept.state()
    older = {name: value for name, value in meta.items() if name != "heads_clip"}
    loaded, usual = (World.load(arrays, m, S, PPOConfig()) for m in (meta, older))
    assert loaded.heads is not None and usual.heads is not None and usual.heads_config.clip == 5.0
    expected = kept.heads(z, rows[0])
    np.testing.assert_array_equal(loaded.heads(z, rows[0]), expected)
    assert not np.array_equal(usual.heads(z, rows[0]), expected)


class Watched(Heads):
    """Keeps the positions of each fit's first batch."""

    def __init__(self) -> None:
        super().__init__(E, A, F, CONFIG)
        self.first: list[np.ndarray] = []

    def _batches(self, rng: np.random.Generator, kernel: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for n, batch in enumerate(super()._batches(rng, kernel)):
            if n == 0:
                self.first.append(batch[1])
            yield batch


def test_each_fit_draws_batches_of_its_own(taught: tuple[Heads, Taught]) -> None:
    """The first those of the seed, as ever; who goes on from loaded heads does not repeat these."""
    d, runs = taught[1], []
    for _ in range(2):
        heads = Watched()
        for _ in range(3):
            heads.fit(d.z, d.kernel, d.rows, d.mask, d.target, 1)
        runs.append(heads.first)
    loaded = Watched()
    loaded.load_state(heads.state())
    loaded.fit(d.z, d.kernel, d.rows, d.mask, d.target, 1)
    rng = np.random.default_rng(CONFIG.seed)
    taught[0]._initial(rng)
    np.testing.assert_array_equal(runs[0][0], next(taught[0]._batches(rng, d.kernel))[1])
    np.testing.assert_array_equal(*runs)
    assert len({batch.tobytes() for batch in runs[0]}) == 3
    assert not np.array_equal(loaded.first[0], runs[0][0])


def test_a_capture_is_keyed_by_the_modules_whose_constants_it_holds() -> None:
    """Adam's, and the logit of what is illegal."""
    parts = _train_jit(Heads(E, A, F, CONFIG).sizes, CONFIG.legal_coef).parts
    assert {inspect.getsource(module) for module in (mlp, networks, parameters, theta)} <= set(parts)


def test_a_batch_of_many_says_what_each_alone_says(taught: tuple[Heads, Taught]) -> None:
    heads, data = taught
    together = heads(data.z[:20], data.rows[0])
    for i in (0, 7, 19):
        alone = heads(data.z[i : i + 1], data.rows[0])
        np.testing.assert_allclose(alone, [x[i : i + 1] for x in together], atol=1e-5)


def test_what_heads_cannot_learn_from_is_an_error(taught: tuple[Heads, Taught]) -> None:
    heads, d = Heads(E, A, F, CONFIG), taught[1]
    with pytest.raises(SimulatorError, match="learned nothing"):
        heads(d.z, d.rows[0])
    with pytest.raises(SimulatorError, match="P > 0"):
        heads.fit(d.z[:0], d.kernel[:0], d.rows, d.mask[:0], d.target[:0])
    with pytest.raises(SimulatorError, match="sum to 1"):
        heads.fit(d.z, d.kernel, d.rows, d.mask, np.roll(d.target, 1, axis=1))
    with pytest.raises(SimulatorError, match="NaN"):
        heads.fit(np.where(np.arange(E) == 2, np.nan, d.z), d.kernel, d.rows, d.mask, d.target)
    wild = Heads(E, A, F, replace(CONFIG, lr=3e38, weight_decay=100.0))
    with pytest.raises(
        SimulatorError, match=r"training diverged: .* at step 1"
    ):  # the loss is of the parameters before it
        wild.fit(d.z, d.kernel, d.rows, d.mask, d.target, 1)
    with pytest.raises(SimulatorError, match="hidden"):
        HeadsConfig(hidden=0)


class Open:
    """Heads without opinions: all is legal, and all alike."""

    def __call__(self, z: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((len(z), len(rows)), np.float32), np.ones((len(z), len(rows)), np.float32)


@pytest.fixture(scope="module")
def world() -> LatentWorld:
    return LatentWorld(Law(), Open(), rows_of(np.random.default_rng(5), 1)[0], STEPS)  # type: ignore[arg-type]


def walk(world: LatentWorld, actions: tuple[int, ...]) -> float:
    """The log2 speedup of a plan, by hand."""
    law, z = world.simulator, np.zeros((1, E), np.float32)
    z[:, ::2] = 1
    before = law.judge(z)[0][0]
    for a in actions:
        z = law.advance(z, world.rows[[a]])
    return float(before - law.judge(z)[0][0])


def test_rewards_of_a_plan_sum_to_its_speedup(world: LatentWorld) -> None:
    node, total = world.root(roots(2), np.ones((2, A), bool)).embedding, np.zeros(2)
    for actions in ([0, 3], [2, 4]):
        found = world.recurrent(np.asarray(node), np.array(actions))
        node, total = found.embedding, total + found.reward
        assert (found.discount == 1).all()
    np.testing.assert_allclose(total, [walk(world, (0, 2)), walk(world, (3, 4))], rtol=1e-4)


def test_stop_ends_and_pays_nothing_and_a_full_path_can_only_stop(world: LatentWorld) -> None:
    root = world.root(roots(2), np.ones((2, A), bool))
    stopped = world.recurrent(np.asarray(root.embedding), np.array([A - 1, 0]))
    assert stopped.reward[0] == 0 and stopped.discount.tolist() == [0, 1]
    node = root.embedding
    for _ in range(STEPS):
        found = world.recurrent(np.asarray(node), np.array([1, 1]))
        node = found.embedding
    assert found.mask.tolist() == [[False] * (A - 1) + [True]] * 2


def test_a_full_path_promises_nothing() -> None:
    """Here a simulator believes that twice the speed is within reach of anything; below the last action it cannot be had."""

    class Hopeful(Law):
        def judge(self, embedding: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            time, _, spread = super().judge(embedding)
            return time, time - 1, spread

    world = LatentWorld(Hopeful(), Open(), rows_of(np.random.default_rng(5), 1)[0], STEPS)  # type: ignore[arg-type]
    root = world.root(roots(2), np.ones((2, A), bool))
    node, values = root.embedding, [root.value.tolist()]
    for _ in range(STEPS):
        found = world.recurrent(np.asarray(node), np.array([1, 1]))
        node = found.embedding
        values.append(found.value.tolist())
    assert values == [[pytest.approx(1)] * 2] * STEPS + [[0, 0]]


def test_a_search_finds_the_best_plan_of_all(world: LatentWorld) -> None:
    every = [p for n in range(STEPS + 1) for p in itertools.product(range(A - 1), repeat=n)]
    best = max(walk(world, p) for p in every)
    result = world.plan(roots(1), np.ones((1, A), bool), 600)
    found = max(walk(world, tuple(a for a in leaf.path if a != A - 1)) for leaf in result.leaves(0))
    assert found == pytest.approx(best, rel=1e-4)
    poor = world.plan(roots(1), np.ones((1, A), bool), 2)  # two simulations cannot see it
    assert max(walk(world, tuple(a for a in leaf.path if a != A - 1)) for leaf in poor.leaves(0)) < best


def test_fresh_targets_are_legal_and_prefer_what_pays(world: LatentWorld) -> None:
    mask = np.ones((4, A), bool)
    mask[:, 0] = False
    target = reanalyse(world, roots(4), mask, 64, np.random.default_rng(0))
    np.testing.assert_allclose(target.sum(1), 1, rtol=1e-5)
    assert (target[:, 0] == 0).all()
    gains = [max(walk(world, (a, *p)) for n in range(STEPS) for p in itertools.product(range(A - 1), repeat=n))
             for a in range(1, A - 1)]  # fmt: skip
    assert target[:, 1:-1].mean(0).argmax() == int(np.argmax(gains))


def test_the_last_action_must_be_stop() -> None:
    rows = rows_of(np.random.default_rng(5), 1)[0]
    with pytest.raises(SimulatorError, match="STOP"):
        LatentWorld(Law(), Open(), rows[:-1], STEPS)  # type: ignore[arg-type]


def test_paths_of_another_kernel_change_nothing_for_this_one(world: LatentWorld) -> None:
    """Metamorphic: a root's value depends on its own end alone."""
    one, two = roots(2), roots(2)
    two = replace(two, states=np.where(np.arange(2)[:, None, None] == 1, two.states + 1, two.states))
    mask = np.ones((2, A), bool)
    a, b = (np.asarray(world.root(p, mask).embedding)[0] for p in (one, two))
    np.testing.assert_array_equal(a, b)
