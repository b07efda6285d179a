"""The summary's numbers, by hand: which of a tile's sizes a vector can fill. That a batch has the same, test_batch.py holds."""

from __future__ import annotations

import math

import pytest
from tiny import kernel_of
from tinygrad import Tensor
from tinygrad.helpers import Target
from tinygrad.runtime.ops_python import PythonRenderer

from autotune.compiler import Opt, OptOps, renderer_of
from autotune.features import (
    _NO_EFFECT,
    AXIS_WIDTH,
    MAX_AXES,
    _access_part,
    _effect,
    _tile_part,
    _traffic_part,
    _twos,
    log2,
)
from autotune.kernel import Kernel
from autotune.paths import action_row
from autotune.space import State, root_state, state_after

RENDERER = renderer_of("CPU")
LOG2_5 = math.log2(5)


def matmul() -> Kernel:
    """[20, 30] @ [30, 40]: loops of 20, 40 and 30"""
    return kernel_of(Tensor.empty(20, 30) @ Tensor.empty(30, 40))


def after(*opts: Opt) -> State:
    return state_after(matmul(), opts, RENDERER)


def upcast(axis: int, size: int) -> Opt:
    return Opt(OptOps.UPCAST, axis, size)


@pytest.mark.parametrize(("size", "power", "odd"), [(1, 0, 1), (7, 0, 7), (16, 4, 1), (80, 4, 5), (12, 2, 3)])
def test_a_size_is_a_power_of_two_and_an_odd_rest(size: int, power: int, odd: int) -> None:
    assert _twos(size) == pytest.approx([power / 4, math.log2(odd) / 2])
    assert _twos(2 * size) == pytest.approx([(power + 1) / 4, math.log2(odd) / 2])


def test_the_tiles_products_are_told_apart_by_their_powers_of_two() -> None:
    # 4 rows of 5 columns: 20 values, of which 4 is the power; 5 steps of the reduction at a time; its loop is the last one
    found = _tile_part(after(upcast(0, 4), upcast(1, 5), Opt(OptOps.UNROLL, 0, 5)))
    assert found[-6:] == pytest.approx([2 / 4, LOG2_5 / 2, 0, LOG2_5 / 2, 0, LOG2_5 / 2])
    assert _tile_part(after())[-6:] == [0.0] * 6


def test_an_access_says_how_long_its_runs_are_and_which_loop_makes_them() -> None:
    state = after(upcast(0, 4), upcast(1, 5), upcast(1, 4))  # 4 rows; 5 columns next to each other; 4 times 5 of these
    store = next(i for i, access in enumerate(state.accesses) if access.is_store)
    # 20 columns lie side by side, 4 rows do not; the loop with stride 1 is of the second or third place in the tile
    sizes = [(a.size, abs(a.strides[store])) for a in state.axes if a.kind.name == "UPCAST"]
    place = 1 + [stride for _, stride in sizes].index(1)
    lane = sizes[place - 1][0]
    assert sorted(size for size, _ in sizes) == [4, 4, 5] and place > 1
    found = _access_part(state, store)[-5:]
    assert found == pytest.approx([2 / 4, LOG2_5 / 2, *_twos(lane), place / 4])
    assert _access_part(after(), store)[-5:] == [0.0] * 5


def test_vectors_of_odd_runs_are_no_vectors() -> None:
    # 5 columns of output and of the second matrix, none of the first, which is loaded once: 3 vectors if any length fills one,
    # and 11 if each is a single number; of 4 columns 3 either way
    odd, even = _traffic_part(after(upcast(1, 5))), _traffic_part(after(upcast(1, 4)))
    assert odd[1] == pytest.approx(log2(3)) and odd[-2:] == pytest.approx([log2(11), log2(5 / 11)])
    assert even[1] == pytest.approx(log2(3)) and even[-2:] == pytest.approx([log2(3), log2(4 / 3)])


def test_a_tensor_core_is_shown_on_no_loop() -> None:
    """Its `axis` counts the ways to use it, of which loop 2 knows nothing."""
    half = kernel_of(Tensor.empty(32, 32, dtype="half").matmul(Tensor.empty(32, 32, dtype="half"), dtype="float"))
    root = root_state(half, PythonRenderer(Target.parse("PYTHON::sm_80")))
    opt = Opt(OptOps.TC, 2, (-1, 0, 1))
    assert _effect(root, opt, 1) == (_NO_EFFECT, MAX_AXES) != _effect(root, upcast(0, 4), 1)
    slots = [action_row(root, o)[-AXIS_WIDTH:] for o in (opt, upcast(0, 4))]
    assert not slots[0].any() and slots[1].any()
