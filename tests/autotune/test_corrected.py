"""What a guide believes of a program's kernels, moved by their trials: as a search would be moved by them."""

from __future__ import annotations

import numpy as np
import pytest
from test_relatives import COUSIN, CPU, KERNEL, SCHEDULES, TWIN, UNROLLED, states_of, taught, wrong_about_unrolling

from autotune.corrected import Corrected
from autotune.data import Dataset
from autotune.files import DATA
from autotune.guide import Guide
from autotune.kernel import Kernel
from autotune.records import Trial
from autotune.search.mixed import MixedSearch

PROGRAM = [TWIN, KERNEL, COUSIN]


@pytest.fixture(scope="module")
def guide() -> Guide:
    return Guide.load(DATA / "guide-cpu")


def measured(*told: tuple[Kernel, np.ndarray]) -> Dataset:
    """Log2 times of all SCHEDULES of some kernels."""
    data = Dataset(CPU)
    for kernel, times in told:
        rows = zip(SCHEDULES, (2.0**times).tolist(), strict=True)
        data.add(kernel, [Trial(kernel.key, s, "ok", (t,), code_hash=str(i)) for i, (s, t) in enumerate(rows)], "here")
    return data


def test_as_a_search_is_corrected_by_its_own_trials_and_those_of_its_relatives(guide: Guide):
    """A second implementation: `mixed`, kernel by kernel. It adds what is relative to the root's time only at the end."""
    times = {k.key: wrong_about_unrolling(guide, k) for k in PROGRAM}
    corrected = Corrected(guide, PROGRAM, measured(*((k, times[k.key]) for k in PROGRAM)))
    for kernel in PROGRAM:
        search = MixedSearch(kernel, CPU, 0, taught(*((k, times[k.key]) for k in PROGRAM if k is not kernel)))
        rows = zip(SCHEDULES, (2.0 ** times[kernel.key]).tolist(), strict=True)
        search.tell([Trial(kernel.key, s, "ok", (t,), kind="trial" if s else "unoptimized") for s, t in rows])
        believed = search._members(states_of(kernel)) + search._errors(states_of(kernel))
        np.testing.assert_allclose(corrected.members(states_of(kernel)), believed - believed[:, :1], rtol=0, atol=1e-3)
    alone = np.hstack([corrected.members(states_of(k)) for k in PROGRAM])
    afresh = Corrected(guide, PROGRAM, measured(*((k, times[k.key]) for k in PROGRAM)))  # it remembers what it has said
    together = afresh.members([s for k in PROGRAM for s in states_of(k)])  # of several kernels at once
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)


def test_without_trials_the_guide_is_believed(guide: Guide):
    states = states_of(KERNEL)
    expected = guide.members(states, guide.simulator.trees)
    np.testing.assert_allclose(Corrected(guide, PROGRAM, Dataset(CPU)).members(states), expected, atol=1e-5)


def test_a_kernel_without_trials_hears_of_others_where_a_memory_says_how_they_differ(guide: Guide):
    data = measured((TWIN, wrong_about_unrolling(guide, TWIN)))
    states, plain = states_of(KERNEL), guide.members(states_of(KERNEL), guide.simulator.trees)
    moved = (Corrected(guide, PROGRAM, data).members(states) - plain).mean(0)
    assert moved[UNROLLED].mean() - moved[~UNROLLED].mean() > 1.0
    alone = Guide.load(DATA / "guide-cpu")
    alone.memory = None
    np.testing.assert_allclose(Corrected(alone, PROGRAM, data).members(states), plain, atol=1e-5)
    own = Corrected(alone, PROGRAM, data).members(states_of(TWIN)).mean(0)
    assert own[UNROLLED].mean() - guide.members(states_of(TWIN), guide.simulator.trees).mean(0)[UNROLLED].mean() > 1.0
