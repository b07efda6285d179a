"""`mixed`: what it is told corrects it, whoever measured it."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import kernel_of
from tinygrad import Tensor

from autotune.compiler import Opt, OptOps, renderer_of
from autotune.guide import SHIPPED, Guide
from autotune.records import Trial
from autotune.search.policy import MixedSearch
from autotune.space import legal_mask, root_state, step

CPU = renderer_of("CPU")
KERNEL = kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 48))


@pytest.fixture(scope="module")
def guide() -> Guide:
    return Guide.load(SHIPPED / "guide-cpu")


def test_a_search_that_goes_on_knows_what_the_first_one_learned(guide: Guide):
    first = MixedSearch(KERNEL, CPU, 0, guide)
    trials = [Trial(KERNEL.key, s, "ok", (2.0**-i,)) for i, s in enumerate(first.ask(4))]
    trials.append(Trial(KERNEL.key, first.ask(1)[0], "timeout"))
    first.tell(trials)
    again = MixedSearch(KERNEL, CPU, 0, guide)
    again.tell(trials)
    assert [(s.schedule, t) for s, t in again.measured] == [(s.schedule, t) for s, t in first.measured]
    assert [s.schedule for s in again.failed] == [s.schedule for s in first.failed] == [trials[-1].schedule]
    candidates = list(first.pool.values())[:50]
    np.testing.assert_allclose(again._corrected(candidates), first._corrected(candidates), atol=1e-5)
    for trial in trials[:4]:
        assert {trial.schedule[:n] for n in range(len(trial.schedule) + 1)} <= set(again.pool)
    assert not set(again.ask(8)) & {t.schedule for t in trials}


def test_hand_coded_is_a_place_to_go_on_from(guide: Guide):
    """It begins as no schedule does that an untold search would ask for. Told that it is fast, the search goes on from it."""
    untold = {s[:1] for s in MixedSearch(KERNEL, CPU, 0, guide).ask(16)}
    root = root_state(KERNEL, CPU)
    strange = next(step(root, int(a)) for a in np.flatnonzero(legal_mask(root)[:-1])[::-1]
                   if step(root, int(a)).schedule not in untold)  # fmt: skip
    asked = []
    for seconds in (2.0**-20, 1.0):
        search = MixedSearch(KERNEL, CPU, 0, guide)
        search.tell([Trial(KERNEL.key, (), "ok", (2.0**-10,), kind="unoptimized"),
                     Trial(KERNEL.key, strange.schedule, "ok", (seconds,), kind="hand_coded")])  # fmt: skip
        assert len(search.measured) == 2
        asked.append(sum(s[:1] == strange.schedule for s in search.ask(16)))
    assert asked[0] > asked[1]


def test_what_is_not_legal_here_is_passed_over(guide: Guide):
    search = MixedSearch(KERNEL, CPU, 0, guide)
    search.tell([Trial(KERNEL.key, (Opt(OptOps.UPCAST, 9, 4),), "ok", (1.0,))])
    assert not search.measured and search.ask(2)
