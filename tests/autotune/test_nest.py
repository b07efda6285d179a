"""Which schedules are one program."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from tiny import U4, add_one, kernel_of
from tinygrad import Tensor

from autotune import corpus
from autotune.compiler import Opt, OptOps, compile_schedule, renderer_of
from autotune.errors import IllegalAction
from autotune.kernel import Kernel, Schedule
from autotune.nest import nest
from autotune.search.random import random_path
from autotune.space import root_state, state_after

CPU = renderer_of("CPU")
MATMUL = kernel_of(Tensor.empty(64, 24) @ Tensor.empty(24, 48))
UP, UNROLL = OptOps.UPCAST, OptOps.UNROLL


def nest_of(*opts: tuple[OptOps, int, int], kernel: Kernel = MATMUL):
    return nest(state_after(kernel, tuple(Opt(*o) for o in opts), CPU))


def test_the_order_of_splits_into_the_tile_does_not_matter():
    assert nest_of((UP, 0, 4), (UP, 1, 2), (UNROLL, 0, 4)) == nest_of((UNROLL, 0, 4), (UP, 1, 2), (UP, 0, 4))


def test_a_split_by_two_twice_is_one_by_four():
    assert nest_of((UP, 0, 2), (UP, 0, 2)) == nest_of((UP, 0, 4)) != nest_of((UP, 0, 2))
    assert nest_of((UNROLL, 0, 4), (UNROLL, 0, 0)) == nest_of((UNROLL, 0, 0))  # 4 x 6, and 24
    assert nest_of((UP, 0, 4), (UP, 0, 2)) != nest_of((UP, 0, 4), (UP, 1, 2))


def test_which_loop_it_is_and_what_becomes_of_it_matters():
    found = [nest_of(), nest_of((UP, 0, 4)), nest_of((UP, 1, 4)), nest_of((UNROLL, 0, 4)), nest_of((OptOps.THREAD, 0, 2)),
             nest_of((OptOps.PADTO, 1, 32)), nest_of((OptOps.PADTO, 1, 32), (UP, 1, 4))]  # fmt: skip
    assert len(set(found)) == len(found)


def test_padding_before_a_split_is_another_program_than_without():
    assert nest_of((OptOps.PADTO, 1, 32), (UP, 0, 4)) == nest_of((UP, 0, 4), (OptOps.PADTO, 1, 32))
    assert nest_of((OptOps.PADTO, 1, 32), (UP, 1, 2)) != nest_of((UP, 1, 2))


def test_the_top_of_a_loop_is_not_its_bottom():
    kernel = add_one(320)
    thread, upcast = Opt(OptOps.THREAD, 0, 2), U4
    both = [state_after(kernel, schedule, CPU) for schedule in ((thread, upcast), (upcast, thread))]
    assert nest(both[0]) == nest(both[1])  # whichever is split off first
    assert {a.step for a in both[0].axes if a.kind.name == "UPCAST"} == {1}


def binaries(kernel: Kernel, schedules: list[Schedule]) -> dict[object, set[str]]:
    """By nest."""
    found: dict[object, set[str]] = defaultdict(set)
    for schedule in schedules:
        found[nest(state_after(kernel, schedule, CPU))].add(compile_schedule(kernel.ast, schedule, CPU).code_hash)
    return found


@pytest.mark.slow
def test_equal_nests_are_equal_binaries_and_others_are_not():
    """Real compilations of orders of the same splits, on kernels of the corpus. Rare exceptions are known: at most one in ten."""
    rng, same, other, every = np.random.default_rng(0), 0, 0, []
    for kernel in corpus.load("train")[::150]:
        schedules = []
        for _ in range(6):
            path = [s.schedule for s in random_path(root_state(kernel, CPU), rng)]
            for _ in range(3):
                shuffled = tuple(path[-1][i] for i in rng.permutation(len(path[-1])))
                try:
                    state_after(kernel, shuffled, CPU)
                except IllegalAction:
                    continue
                schedules.append(shuffled)
        found = binaries(kernel, list(dict.fromkeys(schedules)))
        same += sum(len(own) == 1 for own in found.values())
        other += sum(len(own) - 1 for own in found.values())
        every += [(kernel.key, code) for own in found.values() for code in own]
    assert same > 20 and other <= 0.1 * same
    assert len(set(every)) >= 0.9 * len(every)
