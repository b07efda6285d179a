"""The roofline, and the correction by trials."""

import numpy as np
import pytest

from sims import SimulatorError
from sims.correction import Correction, CorrectionConfig
from sims.roofline import Roofline, RooflineConfig

LIMITS = RooflineConfig(terms=((0,), (1, 2)), unit=8.0)


def limited(rows: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, 3] and the log2 times of a machine with two limits."""
    x = np.random.default_rng(0).uniform(0, 2, (rows, 3)).astype(np.float32)
    return x, np.maximum(8 * x[:, 0] - 30.0, 8 * (x[:, 1] + x[:, 2]) - 40.0)


def test_the_roofline_finds_the_constants_of_a_roofline() -> None:
    x, y = limited()
    roofline = Roofline(3, LIMITS)
    roofline.fit(x, y, np.arange(200) % 10)
    np.testing.assert_allclose(roofline.state()["constants"], [-30, -40], atol=0.05)
    mean, std = roofline.predict(x)
    assert np.abs(mean - y).max() < 0.1 and std[0] < 0.05
    copy = Roofline(3, LIMITS)
    copy.load_state(roofline.state())
    np.testing.assert_array_equal(copy.predict(x)[0], mean)


def test_roofline_errors() -> None:
    with pytest.raises(SimulatorError, match="beyond"):
        Roofline(2, LIMITS)
    with pytest.raises(SimulatorError, match="terms"):
        RooflineConfig(terms=())
    with pytest.raises(SimulatorError, match="before fit"):
        Roofline(3, LIMITS).predict(np.zeros((1, 3)))


def test_nothing_told_nothing_corrected() -> None:
    c = CorrectionConfig(scale=0.6, level=0.8)
    shift, std = Correction(np.random.default_rng(0).standard_normal((20, 3)), c)(np.zeros((4, 3)))
    np.testing.assert_array_equal(shift, 0.0)
    np.testing.assert_allclose(std, 1.0)  # sqrt(.6^2 + .8^2)


def test_one_trial_by_hand() -> None:
    """At the trial itself the shift is k / (k + noise^2) of the residual; far away only the level is left of k."""
    c = CorrectionConfig(length=0.1, scale=1.0, level=2.0, noise=1.0)
    reference = np.array([[-1.0], [1.0]])  # scaled to themselves
    correction = Correction(reference, c)
    correction.tell(np.array([[1.0]]), np.array([3.0]))
    shift, std = correction(reference)
    np.testing.assert_allclose(shift, [3 * 4 / 6, 3 * 5 / 6])  # k = 4 + e^-200 and 5
    np.testing.assert_allclose(std, [np.sqrt(5 - 16 / 6), np.sqrt(5 - 25 / 6)])


def test_trials_correct_their_neighbours_and_the_level() -> None:
    rng = np.random.default_rng(0)
    z = rng.uniform(-1, 1, (200, 2))
    wrong = 5.0 + 0.5 * np.sin(3 * z[:, 0])
    correction = Correction(z, CorrectionConfig(length=0.5))
    order = rng.permutation(200)
    errors = []
    for told in (order[:1], order[1:40]):
        correction.tell(z[told], wrong[told] + 0.05 * rng.standard_normal(len(told)))
        errors.append(np.abs(correction(z)[0] - wrong)[order[40:]].mean())
    assert errors[1] < 0.5 * errors[0] < 0.5 * 1.0  # without a trial it is 5


def test_several_predictors_are_corrected_as_each_by_itself() -> None:
    rng = np.random.default_rng(0)
    z, wrong = rng.standard_normal((12, 3)), rng.standard_normal((8, 2))
    wrong[3, 1] = np.nan  # left out for both
    together, apart = Correction(z), [Correction(z), Correction(z)]
    together.tell(z[:8], wrong)
    timed = np.arange(8) != 3
    for i, correction in enumerate(apart):
        correction.tell(z[:8][timed], wrong[timed, i])
    shift, std = together(z)
    np.testing.assert_allclose(shift, np.stack([c(z)[0] for c in apart], axis=1), atol=1e-9)
    np.testing.assert_array_equal(std, apart[0](z)[1])
    none = Correction(z)
    none.tell(z[:1], np.array([[np.nan, 1.0]]))
    np.testing.assert_array_equal(none(z)[0], np.zeros((12, 2)))


def test_failed_trials_say_nothing_and_bad_input_is_refused() -> None:
    correction = Correction(np.eye(3))
    correction.tell(np.eye(3), np.array([np.nan, np.inf, np.nan]))
    np.testing.assert_array_equal(correction(np.eye(3))[0], 0.0)
    with pytest.raises(SimulatorError, match="residuals of shape"):
        correction.tell(np.eye(3), np.zeros(2))
    with pytest.raises(SimulatorError, match="NaN"):
        correction(np.full((1, 3), np.nan))
    with pytest.raises(SimulatorError, match="N above 0"):
        Correction(np.zeros((0, 3)))
    with pytest.raises(SimulatorError, match="length"):
        CorrectionConfig(length=0.0)
