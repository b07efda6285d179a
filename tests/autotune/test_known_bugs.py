"""Wrong answers of tinygrad 0.14.0 that verification caught: shown by the measuring child, and never offered by our mask.

Where tinygrad is mended these tests fail, and say what may then be widened.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from tiny import add_one, by_op, kernel_of, total
from tinygrad import Tensor

from autotune.compiler import Opt, OptOps, renderer_of
from autotune.measuring.runner import Runner
from autotune.space import ACTION_INDEX, ACTIONS, apply_to_state, legal_mask, root_state, state_after

PAD = Opt(OptOps.PADTO, 0, 32)
UNROLL4 = Opt(OptOps.UNROLL, 0, 4)
TRIES = 8
SIZES = (
    930,
    31622,
)  # of neither is 4 a divisor: the unrolled body that holds the true end also adds what lies behind it


@pytest.mark.parametrize("size", SIZES)
def test_padded_and_unrolled_sums_are_wrong(runner, size):
    (trial,) = runner.measure(total(size), [(PAD, UNROLL4)], None)
    assert trial.verdict != "ok", (
        "tinygrad sums padded reduces rightly now: space._worth_taking can offer PADTO on reduce axes; delete this test"
    )
    assert trial.verdict == "wrong_output" and "1 of 1 elements differ" in trial.detail and trial.samples == ()


def test_a_padded_gather_reads_behind_the_last_page_of_its_indices(runner):
    """An index that serves as an address loses its gate: 32 rows of 1000 are read where there are 31, and the mask offers it. In a
    program what lies there may be nothing; with a page of guard behind the data it passed. Fewer rows stay within the page."""
    gather = kernel_of(Tensor.empty(50, 1000).gather(0, Tensor.empty(31, 1000, dtype="int32")))
    plain, padded = runner.measure(gather, [(), (PAD,)], None)
    assert PAD in offered(gather) and plain.verdict == "ok"
    assert padded.verdict == "crashed", "tinygrad keeps the gate now, or the fence stands too far behind"


@pytest.mark.cl
def test_padding_a_grouped_reduce_of_a_tile_is_wrong(cl):
    """A group made of a whole reduce, then padded, adds what an earlier kernel left in local memory: here that of `full`, unless
    a thread runs it whose local memory nobody has used yet. So it is tried a few times."""
    matmul = kernel_of(Tensor.empty(8, 48) @ Tensor.empty(48, 8))
    upcast, group, pad = Opt(OptOps.UPCAST, 0, 2), Opt(OptOps.GROUP, 0, 0), Opt(OptOps.PADTO, 2, 32)
    full = (group, Opt(OptOps.UPCAST, 0, 4))
    with contextlib.closing(Runner("CL", workers=1)) as runner:
        for _ in range(TRIES):
            before, padded, without = runner.measure(matmul, [full, (upcast, group, pad), (upcast, group)], None)
            assert before.verdict == without.verdict == "ok"
            if padded.verdict != "ok":
                break
    assert padded.verdict == "wrong_output" and "of 64 elements differ" in padded.detail
    state = state_after(matmul, (upcast, group), cl)
    assert apply_to_state(state, pad).schedule[-1] == pad and not legal_mask(state)[ACTION_INDEX[pad]]


def offered(kernel) -> list[Opt]:
    return [ACTIONS[i] for i in np.flatnonzero(legal_mask(root_state(kernel, renderer_of("CPU")))[:-1])]


@pytest.mark.parametrize("size", SIZES)
def test_the_mask_never_pads_a_reduce(size):
    state = root_state(total(size), renderer_of("CPU"))
    assert apply_to_state(state, PAD).schedule == (PAD,)  # tinygrad takes it: only the mask stands in between
    assert by_op(offered(total(size)), OptOps.PADTO) == []
    assert PAD in offered(add_one(size))  # a loop over outputs may be padded


def test_the_same_sums_are_right_without_the_one_or_the_other(runner):
    """The control: neither padding nor unrolling alone breaks them, and both together only where 4 divides no size."""
    (padded,) = runner.measure(total(930), [(PAD,)], None)
    unrolled, both = runner.measure(total(932), [(UNROLL4,), (PAD, UNROLL4)], None)
    assert [t.verdict for t in (padded, unrolled, both)] == ["ok"] * 3
    assert len({t.code_hash for t in (padded, unrolled, both)}) == 3
