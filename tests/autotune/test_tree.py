"""The tree of measured schedules: what it asks for, what it prefers, where it ends."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from tiny import add_one, kernel_of
from tinygrad import Tensor

from autotune.compiler import renderer_of
from autotune.kernel import Schedule
from autotune.records import Trial
from autotune.search import make_strategy
from autotune.search.tree import TreeSearch
from autotune.space import ACTIONS, legal_mask, state_after

CPU = renderer_of("CPU")
KERNEL = kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 48))


def trial(schedule: Schedule, seconds: float | None, kernel=KERNEL) -> Trial:
    return Trial(kernel.key, schedule, "ok" if seconds else "crashed", (seconds,) if seconds else ())


def grown(count: int, cost, exploration=0.5, seed=0) -> tuple[TreeSearch, list[Schedule]]:
    """A tree of `count` schedules whose seconds are cost(schedule), and these in order."""
    search, asked = TreeSearch(KERNEL, CPU, seed, exploration), []
    search.tell([trial((), cost(()))])
    for _ in range(count // 4):
        batch = search.ask(4)
        search.tell([trial(s, cost(s)) for s in batch])
        asked += batch
    return search, asked


def test_every_prefix_is_measured_and_nothing_twice():
    _, asked = grown(40, lambda s: 1.0 + len(s))
    assert len(asked) == len(set(asked)) == 40
    assert {s[:-1] for s in asked} <= set(asked) | {()}


def test_greedy_stays_below_the_best_and_ucb_looks_elsewhere_too():
    """Only what begins as the first schedule does is fast: greedy builds on it, a large constant spreads out."""
    first = grown(4, lambda s: 1.0)[1][0]
    cost = lambda s: 2.0 ** -len(s) if s[:1] == first[:1] else 1.0  # noqa: E731
    share = [np.mean([s[:1] == first[:1] for s in grown(40, cost, c)[1]]) for c in (0.0, 0.5, 50.0)]
    assert share[0] >= share[1] > share[2] and share[0] > 0.5 and share[2] < 0.35


def test_the_bound_by_hand():
    search = TreeSearch(KERNEL, CPU, 0, exploration=2.0)
    search.tell([trial((), 8.0)])
    a, b = search.ask(2)
    search.tell([trial(a, 2.0), trial(b, 8.0)])  # worths 1 and 0 of log2 times 1 and 3; the root's visits are 3
    child = {c.state.schedule: c for c in search.root.children.values()}
    explored = 2.0 * math.sqrt(math.log(3))
    assert search._bound(child[a], search.root) == pytest.approx(1 + explored)
    assert search._bound(child[b], search.root) == pytest.approx(0 + explored)


def test_nothing_is_built_on_a_failure():
    search = TreeSearch(KERNEL, CPU, 0)
    (failing,) = search.ask(1)
    search.tell([trial(failing, None)])
    assert all(s[:1] != failing for _ in range(10) for s in search.ask(4))


def test_a_refuted_schedule_has_no_worth_any_more():
    """Its time was that of another program; a recheck that holds is no visit."""
    search = TreeSearch(KERNEL, CPU, 0)
    search.tell([trial((), 8.0)])
    a, b = search.ask(2)
    search.tell([trial(a, 1.0), trial(b, 4.0)])
    child, visits = {c.state.schedule: c for c in search.root.children.values()}, search.root.visits
    assert (search.fastest, search.root.best, child[a].best) == (0.0, 0.0, 0.0)
    search.tell(
        [replace(trial(b, 4.0), kind="recheck"), replace(trial(a, None), kind="recheck", verdict="wrong_output")]
    )
    assert (search.fastest, search.slowest, search.root.best) == (2.0, 3.0, 2.0)
    assert child[a].best == math.inf and child[a].failed and not child[b].failed and search.root.visits == visits
    assert all(s[:1] != a for _ in range(10) for s in search.ask(4))


def test_told_schedules_are_not_asked_for_again_and_foreign_ones_are_passed_over():
    _, asked = grown(20, lambda s: 1.0)
    other = TreeSearch(KERNEL, CPU, 0)
    other.tell([trial(s, 1.0) for s in asked])
    assert not set(other.ask(20)) & set(asked)
    before = other.root.visits
    pad = next(a for a in ACTIONS if a is not None and a.op.name == "TC")  # not offered on this device
    other.tell([trial((pad,), 1.0)])
    assert other.root.visits == before


def test_what_a_told_schedule_passes_through_is_measured_too():
    """Hand-coded is a baseline and the fastest by far, so the tree goes there; a trial of others needs no trial of its own."""
    first, second = grown(8, lambda s: 1.0 + len(s))[1][:2]
    hand = (*first, ACTIONS[next(i for i in range(len(ACTIONS)) if legal_mask(state_after(KERNEL, first, CPU))[i])])
    search, asked = TreeSearch(KERNEL, CPU, 0), []
    search.tell([trial((), 8.0), replace(trial(hand, 2.0**-9), kind="hand_coded"), trial(second, 4.0)])
    for _ in range(12):
        batch = search.ask(4)
        search.tell([trial(s, 1.0) for s in batch])
        asked += batch
    assert {s[:-1] for s in asked} <= {*asked, second, ()}
    assert {first, hand} <= set(asked) and len(asked) == len(set(asked)) == 48 and second not in asked


def test_what_others_have_tried_counts_as_visited():
    _, asked = grown(20, lambda s: 1.0)
    told = TreeSearch(KERNEL, CPU, 0)
    told.tell([trial((), 1.0), *(trial(s, 1.0) for s in asked)])
    assert told.root.visits == 21
    assert sum(child.visits for child in told.root.children.values()) == 20
    own, asked = grown(20, lambda s: 1.0)
    assert own.root.visits == 21  # as many where it has asked itself


def test_what_a_dead_end_was_worth_is_not_forgotten():
    """The last schedule of a small space is the fastest, and is told when nothing is left to try."""
    kernel = add_one(2)
    search = make_strategy("ucb", kernel, CPU, 0, None)
    asked = search.ask(100)
    assert asked and search.ask(1) == []
    search.tell([trial(s, 2.0 ** (1 - i), kernel) for i, s in enumerate(asked)])
    assert search.root.best == search.fastest == 2 - len(asked)


def test_a_small_space_is_walked_to_its_end():
    kernel = add_one(2)
    search, found = make_strategy("ucb", kernel, CPU, 0, None), []
    while batch := search.ask(8):
        search.tell([trial(s, 1.0, kernel) for s in batch])
        found += batch
        assert len(found) < 500
    assert len(found) == len(set(found)) >= 1 and search.ask(1) == []
