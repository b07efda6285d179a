"""BEAM-like search on trials: level by level, as wide as it says, over when a level brings nothing."""

from __future__ import annotations

import numpy as np
from tiny import kernel_of
from tinygrad import Tensor
from tinygrad.codegen.opt.search import actions as beam_actions

from autotune.compiler import OptOps, renderer_of
from autotune.kernel import Schedule
from autotune.records import Trial
from autotune.search.beam import BeamSearch
from autotune.space import ACTIONS, legal_mask, root_state

CPU = renderer_of("CPU")
KERNEL = kernel_of(Tensor.empty(8, 12) @ Tensor.empty(12, 6))
FIRST = {(ACTIONS[a],) for a in np.flatnonzero(legal_mask(root_state(KERNEL, CPU))[:-1])}


def trial(schedule: Schedule, seconds: float | None, code: str = "") -> Trial:
    return Trial(KERNEL.key, schedule, "ok" if seconds else "crashed", (seconds,) if seconds else (), code_hash=code)


def levels(cost, width=2, seed=0, batch=1000, code=str) -> list[list[Schedule]]:
    """What is asked for until the search ends, by depth."""
    search, asked = BeamSearch(KERNEL, CPU, seed, width), []
    while new := search.ask(batch):
        search.tell([trial(s, cost(s), code(s)) for s in new])
        asked += new
    return [[s for s in asked if len(s) == n] for n in range(1, max(map(len, asked)) + 1)]


def rank(schedule: Schedule) -> float:
    """Any order of schedules, deeper ones faster."""
    return (1 + sum(ACTIONS.index(opt) for opt in schedule) % 97 / 97) / 4 ** len(schedule)


def test_first_all_actions_then_all_children_of_the_fastest():
    first, second, *_ = levels(rank)
    assert set(first) == FIRST and len(first) == len(FIRST)
    assert {s[:1] for s in second} == set(sorted(first, key=rank)[:2])
    wide = levels(rank, width=4)
    assert {s[:1] for s in wide[1]} == set(sorted(first, key=rank)[:4])


def test_its_actions_are_those_of_tinygrads_own_beam():
    """Padding is legal here, but no action of BEAM's unless an environment variable says so."""
    kernel = kernel_of(Tensor.empty(30, 12) @ Tensor.empty(12, 6))
    legal = {(ACTIONS[a],) for a in np.flatnonzero(legal_mask(root_state(kernel, CPU))[:-1])}
    asked = set(BeamSearch(kernel, CPU, 0).ask(1000))
    assert asked == {s for s in legal if s[0] in beam_actions} < legal
    assert {s[0].op for s in legal - asked} == {OptOps.PADTO}


def test_a_binary_has_one_place_in_the_beam():
    """The two fastest of the first level are one binary: the second of the two parents is the third. A child that is a binary
    of the first level again has no children, though it be the fastest of its own."""
    fastest = sorted(FIRST, key=rank)
    twin = {fastest[1]: str(fastest[0])}
    first, second, *_ = levels(rank, code=lambda s: twin.get(s, str(s)))
    assert set(first) == FIRST and {s[:1] for s in second} == {fastest[0], fastest[2]}
    child = min(second, key=rank)
    again = levels(rank, width=1, code=lambda s: str(fastest[0]) if s == child else str(s))
    assert child in again[1] and child not in {s[:2] for s in again[2]}
    assert child in {s[:2] for s in levels(rank, width=1)[2]}  # otherwise it has


def test_it_ends_where_a_level_brings_nothing_and_never_builds_on_a_failure():
    assert len(levels(lambda s: float(len(s)))) == 2  # the second level is slower than the first: no third one
    broken = sorted(FIRST, key=rank)[0]
    _, second, *_ = levels(lambda s: None if s == broken else rank(s), width=1)
    assert {s[:1] for s in second} == {sorted(FIRST, key=rank)[1]}
    assert len(levels(lambda s: None)) == 1


def test_the_size_of_a_batch_and_what_others_measured_change_nothing_but_the_order():
    whole = levels(rank)
    assert [set(level) for level in levels(rank, batch=3)] == [set(level) for level in whole]
    search = BeamSearch(KERNEL, CPU, 0, 2)
    known = whole[0][: len(whole[0]) // 2]
    search.tell([trial(s, rank(s)) for s in known])
    assert set(search.ask(1000)) == FIRST - set(known)
    assert search.ask(1000) == []  # the level's trials are missing


def test_a_seed_gives_one_order_and_another_another():
    assert levels(rank)[0] == levels(rank)[0] != levels(rank, seed=1)[0]
