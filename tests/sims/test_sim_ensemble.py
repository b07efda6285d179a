"""The ensemble on synthetic kernels. Scores are of kernels never seen in training; bars stand beside what
broken and control models reach (seeds fixed, see sims.toys).
"""

from dataclasses import replace

import numpy as np
import pytest

from agents import jitcache
from agents.jitcache import CachedJit
from sims import Ensemble, EnsembleConfig, NearestNeighbour, SimulatorError, metrics
from sims.ensemble import CHUNK
from sims.toys import WIDTH, World, make_world, shuffled_within

BAR = 0.85  # pairwise accuracy; nearest neighbour 0.76, shuffled labels 0.5 to 0.58, the truth itself 0.996


def held_out_pairwise(simulator: Ensemble | NearestNeighbour, world: World) -> float:
    return metrics.pairwise_accuracy(simulator.predict(world.features)[0], world.log_time, world.group)


def test_learns_unseen_kernels_and_beats_the_controls(fitted, train: World, held_out: World) -> None:
    nearest = NearestNeighbour(WIDTH)
    nearest.fit(train.features, train.log_time, train.group)
    ours, control = held_out_pairwise(fitted[0], held_out), held_out_pairwise(nearest, held_out)
    assert ours > BAR and ours > control + 0.08 and control > 0.6, (ours, control)


def test_labels_shuffled_within_kernels_teach_nothing(train: World, held_out: World, small: EnsembleConfig) -> None:
    broken = Ensemble(WIDTH, small)
    metric = broken.fit(train.features, shuffled_within(train), train.group, steps=150)
    assert 0.35 < held_out_pairwise(broken, held_out) < 0.65
    assert 0.4 < metric["oob_pairwise"] < 0.6


def test_choices_are_good_and_the_out_of_bag_score_is_honest(fitted, held_out: World, small: EnsembleConfig) -> None:
    ensemble, metric = fitted
    mean, std = ensemble.predict(held_out.features, held_out.group)
    scores = metrics.evaluate(mean, std, held_out.log_time, held_out.group)
    assert scores["spearman"] > 0.8 and scores["top5"] > 0.9
    assert abs(metric["oob_pairwise"] - scores["pairwise"]) < 0.06
    assert 0.7 < scores["coverage80"] < 0.9
    assert metric["kernels"] == 100 and metric["rows"] == 2000 and metric["steps"] == small.steps


def test_spread_is_larger_away_from_the_training_data(fitted, held_out: World) -> None:
    inside = fitted[0].predict(held_out.features)[1]
    outside = fitted[0].predict(3.0 * held_out.features)[1]
    assert outside.mean() > 1.5 * inside.mean()


def test_a_kernels_level_does_not_matter(train: World, small: EnsembleConfig) -> None:
    a, b = Ensemble(WIDTH, small), Ensemble(WIDTH, small)
    a.fit(train.features, train.log_time, train.group, steps=5)
    b.fit(train.features, train.log_time + 8.0 * (train.group % 3), train.group, steps=5)
    np.testing.assert_allclose(a.predict(train.features[:50])[0], b.predict(train.features[:50])[0], atol=1e-4)


def test_one_seed_gives_one_result_bit_for_bit(train: World, held_out: World, small: EnsembleConfig) -> None:
    def run(seed: int) -> np.ndarray:
        ensemble = Ensemble(WIDTH, EnsembleConfig(**{**vars(small), "seed": seed}))
        np.random.seed(seed + 17)  # the global generator must not matter
        ensemble.fit(train.features, train.log_time, train.group, steps=12)
        return ensemble.predict_members(held_out.features)

    first = run(0)
    np.testing.assert_array_equal(first, run(0))
    assert not np.array_equal(first, run(1))


def test_a_capture_loaded_from_disk_gives_the_same_bits(
    train: World, held_out: World, small: EnsembleConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> np.ndarray:
        ensemble = Ensemble(WIDTH, small)
        ensemble.fit(train.features, train.log_time, train.group, steps=4)
        return ensemble.predict_members(held_out.features)

    captured, made = run(), []
    monkeypatch.setattr(jitcache, "_loaded", {})  # as in a new process
    capture = CachedJit._capture
    monkeypatch.setattr(CachedJit, "_capture", lambda *a: made.append(a) or capture(*a))
    np.testing.assert_array_equal(run(), captured)
    assert len(jitcache._loaded) == 2 and not made


def test_two_ensembles_do_not_touch_each_other(fitted, train: World, held_out: World, small: EnsembleConfig) -> None:
    before = fitted[0].predict_members(held_out.features)
    Ensemble(WIDTH, small).fit(train.features, train.log_time, train.group, steps=3)
    np.testing.assert_array_equal(fitted[0].predict_members(held_out.features), before)


def test_any_number_of_rows_gives_the_same_answer_per_row(fitted, train: World, small: EnsembleConfig) -> None:
    whole = fitted[0].predict_members(train.features[: CHUNK + 3])
    assert whole.shape == (small.members, CHUNK + 3)
    for n in (1, CHUNK - 1, CHUNK):
        np.testing.assert_array_equal(fitted[0].predict_members(train.features[:n]), whole[:, :n])
    mean, std = fitted[0].predict(train.features[:0])
    assert mean.shape == std.shape == (0,)


def test_grouped_prediction_is_centred_and_orders_alike(fitted, held_out: World) -> None:
    mean, _ = fitted[0].predict(held_out.features, held_out.group)
    for kernel in range(3):
        assert mean[held_out.group == kernel].mean() == pytest.approx(0.0, abs=1e-5)
    same = metrics.pairwise_accuracy(mean, held_out.log_time, held_out.group)
    assert same == pytest.approx(held_out_pairwise(fitted[0], held_out), abs=1e-3)


def test_state_round_trip(fitted, held_out: World, small: EnsembleConfig) -> None:
    copy = Ensemble(WIDTH, small)
    copy.load_state(fitted[0].state())
    for ours, theirs in zip(copy.predict(held_out.features), fitted[0].predict(held_out.features), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda s: s.update(p0=s["p0"][:, 1:]), "'p0' has shape"),
        (lambda s: s.pop("mean"), "wrong names"),
        (lambda s: s.update(extra=s["mean"]), "wrong names"),
        (lambda s: s.update(p2=s["p2"] * np.nan), "'p2' holds NaN"),
    ],
)
def test_a_wrong_state_is_refused_and_changes_nothing(fitted, held_out: World, harm, message) -> None:
    state, before = fitted[0].state(), fitted[0].predict_members(held_out.features)
    harm(state)
    with pytest.raises(SimulatorError, match=message):
        fitted[0].load_state(state)
    np.testing.assert_array_equal(fitted[0].predict_members(held_out.features), before)


def test_errors_of_use(fitted, small: EnsembleConfig) -> None:
    fresh = Ensemble(WIDTH, small)
    for call in (lambda: fresh.predict(np.zeros((1, WIDTH))), fresh.state):
        with pytest.raises(SimulatorError, match="before fit"):
            call()
    with pytest.raises(SimulatorError, match="NaN"):
        fitted[0].predict(np.full((2, WIDTH), np.nan))
    with pytest.raises(SimulatorError, match="shape"):
        fitted[0].predict(np.zeros((2, WIDTH + 1)))
    for field in ({"members": 0}, {"batch": 100}, {"rows_per_kernel": 1}):
        with pytest.raises(SimulatorError, match=next(iter(field))):
            EnsembleConfig(**field)


def test_a_fit_that_diverges_leaves_what_was_learned(fitted, train: World, held_out: World, small) -> None:
    """Also how features are scaled: those of the second fit are others. After a single step only parameters show it: the loss is of
    those before."""
    ensemble = Ensemble(WIDTH, small)
    ensemble.load_state(fitted[0].state())
    before = ensemble.predict(held_out.features)
    for lr, steps in ((1e30, 5), (3e38, 1)):
        ensemble.config = replace(small, lr=lr)
        with pytest.raises(SimulatorError, match=f"training diverged: .* at step {steps}"):
            ensemble.fit(3 * train.features + 1, train.log_time, train.group, steps=steps)
        for ours, theirs in zip(ensemble.predict(held_out.features), before, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_deadline_and_failed_trials(small: EnsembleConfig) -> None:
    world, asked = make_world(kernels=6, rows=9, seed=3), iter([False, False, True])
    log_time = world.log_time.copy()
    log_time[::7] = np.nan  # failed trials are left out, not guessed
    metric = Ensemble(WIDTH, small).fit(world.features, log_time, world.group, deadline=lambda: next(asked))
    assert metric["steps"] == 3 and metric["dropped"] == 8
