"""Wrong answers of tinygrad 0.14.0 that verification caught: shown by the measuring child, and never offered by our mask.

Where tinygrad is mended these tests fail, and say what may then be widened.
"""

from __future__ import annotations

import numpy as np
import pytest
from tiny import add_one, by_op, total

from autotune.compiler import Opt, OptOps, renderer_of
from autotune.space import ACTIONS, apply_to_state, legal_mask, root_state

PAD = Opt(OptOps.PADTO, 0, 32)
UNROLL4 = Opt(OptOps.UNROLL, 0, 4)
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
