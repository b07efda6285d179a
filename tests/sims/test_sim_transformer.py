"""The transformer on toy paths: a small net, captured once. Scores are of kernels never seen in training."""

from dataclasses import replace

import numpy as np
import pytest

from sims import SimulatorError, metrics
from sims.paths import Paths
from sims.toys import DIRECTIONS, OPS, PathWorld, make_paths
from sims.transformer import Transformer, TransformerConfig

SMALL = TransformerConfig(members=2, width=32, layers=1, heads=2, kernels=8, rows_per_kernel=8, lr=1e-2, steps=400)
BAR = 0.85  # pairwise accuracy; the controls with the contexts shuffled reach about 0.5


@pytest.fixture(scope="module")
def world() -> PathWorld:
    return make_paths(kernels=100, rows=12, seed=1, context_matters=True)


@pytest.fixture(scope="module")
def unseen() -> PathWorld:
    return make_paths(kernels=20, rows=12, seed=2, context_matters=True)


@pytest.fixture(scope="module")
def fitted(world: PathWorld) -> Transformer:
    simulator = Transformer(world.paths.widths, SMALL)
    simulator.fit(world.paths)
    return simulator


@pytest.fixture(scope="module")
def brief(world: PathWorld) -> Transformer:
    """Trained for a moment: for what holds whatever was learned."""
    simulator = Transformer(world.paths.widths, SMALL)
    simulator.fit(world.paths, steps=30)
    return simulator


def fresh(world: PathWorld, **changes) -> Transformer:
    return Transformer(world.paths.widths, replace(SMALL, **changes))


def ends(paths: Paths) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(paths)), paths.length


def pairwise(simulator: Transformer, world: PathWorld, paths: Paths | None = None) -> float:
    predicted = simulator.predict(paths or world.paths).relative
    return metrics.pairwise_accuracy(predicted[ends(world.paths)], world.truth[ends(world.paths)], world.paths.kernel)


def shuffled(paths: Paths) -> Paths:
    return replace(paths, context=paths.context[np.random.default_rng(3).permutation(len(paths.context))])


@pytest.mark.learn
def test_reads_the_context_and_beats_the_control_without(fitted, world: PathWorld, unseen: PathWorld) -> None:
    control = fresh(world)
    control.fit(shuffled(world.paths), steps=150)
    ours, blind = pairwise(fitted, unseen), pairwise(control, unseen)
    misled = pairwise(fitted, unseen, shuffled(unseen.paths))
    print(f"pairwise: bar {BAR}, figure {ours:.3f}, trained on shuffled contexts {blind:.3f}, shown them {misled:.3f}")
    assert ours > BAR and blind < 0.7 and misled < 0.7


@pytest.mark.learn
def test_goes_on_without_summaries(fitted, unseen: PathWorld) -> None:
    paths = unseen.paths
    z = fitted.embed(paths.cut(0))
    for t in range(paths.widths.steps):
        z = fitted.advance(z, paths.actions[:, t])
    exact, latent = (
        metrics.pairwise_accuracy(x, unseen.truth[ends(paths)], paths.kernel)
        for x in (fitted.judge(fitted.embed(paths))[0], fitted.judge(z)[0])
    )
    print(f"pairwise: exact {exact:.3f}, latent from the root {latent:.3f}")
    assert latent > 0.75
    loss = metrics.roll_out_loss(fitted, paths, [1, 2, 9])
    assert abs(loss[1]) < 0.2 and abs(loss[2]) < 0.25 and np.isnan(loss[9])


@pytest.mark.learn
def test_null_actions_are_learned(fitted, unseen: PathWorld) -> None:
    """What is imagined to change nothing changes little, after 400 steps of training."""
    paths = unseen.paths.take(unseen.paths.length < unseen.paths.widths.steps)
    before = fitted.judge(z := fitted.embed(paths))[0]
    null, other = np.zeros((2, len(paths), OPS + DIRECTIONS), np.float32)
    null[:, 0] = other[:, 1] = other[:, OPS] = 1.0
    still, moved = (np.abs(fitted.judge(fitted.advance(z, a))[0] - before).mean() for a in (null, other))
    print(f"mean change in log2 time: null action {still:.3f}, another {moved:.3f}")
    assert still < 0.5 * moved


def test_later_actions_change_no_earlier_prediction(brief, unseen: PathWorld) -> None:
    paths, rng = unseen.paths, np.random.default_rng(0)
    whole = brief.predict(paths)
    for t in range(1, paths.widths.steps):
        actions, states = paths.actions.copy(), paths.states.copy()
        actions[:, t:] += rng.standard_normal(actions[:, t:].shape)
        states[:, t + 1 :] += rng.standard_normal(states[:, t + 1 :].shape)
        bent = brief.predict(replace(paths, actions=actions, states=states))
        for ours, theirs in zip(bent, whole, strict=True):
            np.testing.assert_allclose(ours[:, : t + 1], theirs[:, : t + 1], atol=1e-5)
        inside = paths.length > t
        assert np.abs(bent.relative - whole.relative)[inside, t + 1].mean() > 0.01


def test_padding_absent_tokens_and_the_order_of_rows_change_nothing(brief, unseen: PathWorld) -> None:
    paths, order = unseen.paths, np.random.default_rng(0).permutation(len(unseen.paths))
    half = replace(paths, present=np.broadcast_to([True, True, False], paths.present.shape))
    whole, without = brief.predict(paths), brief.predict(half)
    inside = paths.reached
    bent = replace(
        half,
        actions=paths.actions + 9.0 * ~inside[:, 1:, None],
        states=paths.states + 9.0 * ~inside[..., None],
        context=np.where(half.present[..., None], half.context, 9.0),
    )
    for ours, theirs in zip(brief.predict(bent), without, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.nanmax(np.abs(without.relative - whole.relative)) > 1e-4
    for ours, theirs in zip(brief.predict(paths.take(order)), whole, strict=True):
        np.testing.assert_allclose(ours, theirs[order], atol=1e-5)
        assert np.isnan(theirs[~inside]).all() and np.isfinite(theirs[inside]).all()
    assert brief.predict(paths.take(np.zeros(0, int))).relative.shape == (0, 5)


def test_judging_the_embedding_is_predicting_the_end(brief, unseen: PathWorld) -> None:
    prediction = brief.predict(unseen.paths)
    found = brief.judge(brief.embed(unseen.paths))
    for ours, theirs in zip(found, (prediction.relative, prediction.reachable, prediction.spread), strict=True):
        np.testing.assert_allclose(ours, theirs[ends(unseen.paths)], atol=1e-5)


@pytest.mark.learn
def test_reach_lies_below_the_time_and_tells_good_beginnings(fitted, unseen: PathWorld) -> None:
    prediction, paths = fitted.predict(unseen.paths), unseen.paths
    inside = paths.reached
    assert (prediction.reachable[inside] <= prediction.relative[inside] + 1e-5).all()
    best = paths.best_below(paths.prefixes())
    first = paths.take(paths.length > 1)
    at = (paths.length > 1) & np.isfinite(best[:, 1])
    score = metrics.spearman(prediction.reachable[at, 1], best[at, 1], first.kernel)
    print(f"Spearman of what is within reach after one action: {score:.3f}")
    assert score > 0.4


@pytest.mark.learn
def test_noisy_kernels_spoil_no_other(world: PathWorld, unseen: PathWorld) -> None:
    rng = np.random.default_rng(5)
    noisy = world.paths.kernel < 4  # times that are random by factors: a noisy TV
    log_time = world.paths.log_time + np.where(
        noisy[:, None], 3.0 * rng.standard_normal(world.paths.log_time.shape), 0.0
    )
    simulator = fresh(world)
    simulator.fit(replace(world.paths, log_time=log_time), steps=150)
    score = pairwise(simulator, unseen)
    print(f"pairwise of other kernels beside four noisy ones: {score:.3f}")
    assert score > BAR


@pytest.mark.learn
def test_finetuning_takes_in_a_new_device(fitted, world: PathWorld) -> None:
    """A device on which everything costs the opposite: few trials of few kernels turn the order round."""
    new = make_paths(kernels=16, rows=12, seed=7, context_matters=True)
    turned = PathWorld(replace(new.paths, log_time=-new.paths.log_time), -new.truth)
    seen, rest = (
        PathWorld(turned.paths.take(m), turned.truth[m]) for m in (new.paths.kernel < 8, new.paths.kernel >= 8)
    )
    copy = fresh(world, finetune_lr=3e-3)
    copy.load_state(fitted.state())
    before = pairwise(copy, rest)
    copy.finetune(seen.paths, steps=100)
    after = pairwise(copy, rest)
    print(f"pairwise on the new device: before {before:.3f}, after 100 steps {after:.3f}")
    assert after > 0.7 > 0.4 > before
    copy.finetune(seen.paths.take(seen.paths.kernel == 0), steps=1)  # one kernel is enough


def test_state_round_trip_one_seed_one_result(brief, world: PathWorld, unseen: PathWorld) -> None:
    copy, again = fresh(world), fresh(world)
    copy.load_state(brief.state())
    for ours, theirs in zip(copy.predict(unseen.paths), brief.predict(unseen.paths), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    copy.fit(world.paths, steps=3)
    again.fit(world.paths, steps=3)
    np.testing.assert_array_equal(copy.state()["theta"], again.state()["theta"])


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda s: s.pop("theta"), "wrong names"),
        (lambda s: s.update(theta=s["theta"][:, 1:]), "'theta' has shape"),
        (lambda s: s.update({"state.mean": s["state.mean"] + np.nan}), "'state.mean' holds NaN"),
    ],
)
def test_a_wrong_state_is_refused_and_changes_nothing(brief, unseen: PathWorld, harm, message) -> None:
    state, before = brief.state(), brief.predict(unseen.paths)
    harm(state)
    with pytest.raises(SimulatorError, match=message):
        brief.load_state(state)
    np.testing.assert_array_equal(brief.predict(unseen.paths).relative, before.relative)


def test_errors_of_use(brief, world: PathWorld) -> None:
    blank = fresh(world)
    for call in (lambda: blank.predict(world.paths), blank.state, lambda: blank.embed(world.paths)):
        with pytest.raises(SimulatorError, match="before fit"):
            call()
    with pytest.raises(SimulatorError, match="other widths"):
        Transformer(world.paths.widths._replace(action=99), SMALL).fit(world.paths)
    with pytest.raises(SimulatorError, match="is full"):
        z = brief.embed(world.paths)
        for _ in range(5):
            z = brief.advance(z, np.ones((len(z), OPS + DIRECTIONS)))
    with pytest.raises(SimulatorError, match="multiple of heads"):
        TransformerConfig(width=10, heads=4)
    with pytest.raises(SimulatorError, match="one step"):
        blank.fit(world.paths, steps=0)


def test_a_fit_that_diverges_at_its_last_step_leaves_what_was_learned(
    brief, world: PathWorld, unseen: PathWorld
) -> None:
    """Its loss is of the parameters before that step: only those that were learned show it."""
    copy = fresh(world, lr=3e38)
    copy.load_state(brief.state())
    with pytest.raises(SimulatorError, match=r"training diverged: .* at step 1"):
        copy.fit(unseen.paths, steps=1)
    np.testing.assert_array_equal(copy.predict(unseen.paths).relative, brief.predict(unseen.paths).relative)


def test_no_warm_up_is_as_good_as_one_step_of_it(world: PathWorld) -> None:
    thetas = []
    for warmup in (0, 1):
        simulator = fresh(world, warmup=warmup)
        simulator.fit(world.paths, steps=2)
        thetas.append(simulator.state()["theta"])
    np.testing.assert_array_equal(*thetas)


def test_deadline_and_failed_trials(world: PathWorld) -> None:
    log_time, asked = world.paths.log_time.copy(), iter([False, False, True])
    rows = np.arange(0, len(log_time), 7)
    log_time[rows, world.paths.length[rows]] = np.nan
    metric = fresh(world).fit(replace(world.paths, log_time=log_time), deadline=lambda: next(asked))
    assert metric["steps"] == 3 and metric["dropped"] >= 0.9 * len(rows)  # some of the times stand on another path, too


def test_a_fit_that_diverges_leaves_what_was_learned(world: PathWorld, unseen: PathWorld, brief: Transformer) -> None:
    """Also how inputs are scaled: those of the second fit are others."""
    simulator = fresh(world, lr=1e30)
    simulator.load_state(brief.state())
    before = simulator.predict(unseen.paths)
    with pytest.raises(SimulatorError):
        simulator.fit(unseen.paths, steps=5)
    for ours, theirs in zip(simulator.predict(unseen.paths), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
