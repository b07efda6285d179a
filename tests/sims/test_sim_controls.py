"""The roofline."""

import numpy as np
import pytest

from sims import SimulatorError
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
