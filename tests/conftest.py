"""Which of tinygrad's settings a test runs under."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from tinygrad import Context
from tinygrad.helpers import PARALLEL

LONG = "learn", "slow", "bench"  # markers of tests that run long enough for tinygrad's optimizations to pay
# files of tests/sims whose nets are small, or briefly trained
QUICK = "test_sim_diffusion", "test_sim_latent", "test_sim_linear", "test_sim_transformer"
PROCESSES = PARALLEL.value  # that compile


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """The networks of most agents' and simulators' tests are tiny: to compile them with upcasts and unrolled loops, in processes
    of their own, takes nearly all the time. The tuner's tests, and what trains to a bar, run kernels as users do.

    A hook and not a fixture: it comes before all fixtures. Each test is told all of it: a Context that outlives a test
    restores, when it ends, what was in force when it began.
    """
    nets = item.path.parent.name in ("agents", "sims")
    long = any(item.get_closest_marker(name) for name in LONG)
    quick = item.path.stem in QUICK or (item.path.parent.name == "agents" and not long)
    with Context(NOOPT=int(quick), PARALLEL=0 if nets else PROCESSES):
        return (yield)
