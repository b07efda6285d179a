"""Toy kernels, and an ensemble trained once for the whole session. All tests share one shape, so one capture
each.
"""

from __future__ import annotations

import pytest

from sims import Ensemble, EnsembleConfig
from sims.toys import WIDTH, World, make_world


@pytest.fixture(scope="session")
def small() -> EnsembleConfig:
    return EnsembleConfig(hidden=64, steps=350, batch=256)


@pytest.fixture(scope="session")
def train() -> World:
    return make_world(kernels=100, rows=20, seed=1)


@pytest.fixture(scope="session")
def held_out() -> World:
    return make_world(kernels=20, rows=20, seed=2)


@pytest.fixture(scope="session")
def fitted(train: World, small: EnsembleConfig) -> tuple[Ensemble, dict[str, float]]:
    """The ensemble after its full training, and the metrics that `fit` returned."""
    ensemble = Ensemble(WIDTH, small)
    return ensemble, ensemble.fit(train.features, train.log_time, train.group)
