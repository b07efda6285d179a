"""Which of tinygrad's settings a test runs under."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # read as numpy is loaded; those of two workers would wait for each other

import pytest  # noqa: E402
from tinygrad import Context  # noqa: E402
from tinygrad.helpers import PARALLEL  # noqa: E402

LONG = "learn", "slow", "bench"  # markers of tests that run long enough for tinygrad's optimizations to pay
# files whose nets are small, or briefly trained, and which time nothing
QUICK = "test_imagination", "test_sim_diffusion", "test_sim_latent", "test_sim_linear", "test_sim_transformer"
# that compile; one alone gains nothing, and is started again and again
PROCESSES = PARALLEL.value if PARALLEL.value > 1 else 0


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is loaded by now stays: looking through it again and again takes a good part of every capture."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Captures go to a fresh directory, not to the user's cache: the suite always runs from cold. All workers share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(mode=0o700, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


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
