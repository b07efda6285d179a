"""Seeing what a program runs."""

from __future__ import annotations

import pytest
from running import DEVICE, array
from tinygrad import Tensor, TinyJit, Variable

import autotune
from autotune.compiler import KernelInfo, UOp
from autotune.script import left_out


def test_every_launch_counts():
    x, y = array(12, 34), array(12, 34, seed=1)
    with autotune.capture() as program:
        for _ in range(5):
            (x + y).realize()
        (x * 7.5).sum(1).realize()
    names = {program.kernels[key].name: n for key, n in program.calls.items()}
    assert names == {"e 408": 5, "r 12 / 34": 1} and set().union(*program.devices.values()) == {DEVICE}
    assert program.for_device(DEVICE) == list(program.kernels.values()) and program.for_device("GPU:7") == []


def test_nothing_is_seen_outside():
    x = array(12, 35)
    with autotune.capture() as program:
        pass
    (x + 1).realize()
    assert program.calls == {} == program.kernels
    with pytest.raises(ZeroDivisionError), autotune.capture() as program:
        (x + 2).realize()
        raise ZeroDivisionError
    (x + 3).realize()
    assert sum(program.calls.values()) == 1


@pytest.mark.parametrize("calls", [1, 2, 3, 6])
def test_replays_of_a_jit_count(calls):
    """One call runs, the second is captured, all others are replays: each launches both kernels once."""
    step = TinyJit(lambda x: (x.sin().sum(0) + 1.5).contiguous().cos().sum().realize())
    inputs = [array(24, 24 + calls, seed=i) for i in range(calls)]
    with autotune.capture() as program:
        for x in inputs:
            step(x)
    assert len(program.calls) >= 2 and set(program.calls.values()) == {calls} and program.skipped == 0


def test_kernels_compiled_before_are_found():
    x, y = array(9, 41), array(9, 41, seed=1)
    (x * y - 3).realize()
    with autotune.capture() as program:
        (y * x - 3).realize()
    assert list(program.calls.values()) == [1]


def test_symbolic_shapes_are_kept():
    x = array(40, 6)
    with autotune.capture() as program:
        for n in (3, 17, 40):
            x[: Variable("rows", 2, 40).bind(n)].sum(0).realize()
    ((key, kernel),) = program.kernels.items()
    assert kernel.variables == {"rows": (2, 40)} and program.calls[key] == 3


def test_kernels_with_a_schedule_of_their_own_are_skipped():
    def twice(out: UOp, source: UOp) -> UOp:
        i = UOp.range(48, 0)
        return out[i].store(source[i] * 2).end(i).sink(arg=KernelInfo(name="twice", opts_to_apply=()))

    x = array(48)
    with autotune.capture() as program:
        assert (Tensor.empty(48).custom_kernel(x, fxn=twice)[0].numpy() == 2 * x.numpy()).all()
        (x + 1).realize()
    assert (sum(program.calls.values()), program.skipped) == (1, 1)


@pytest.mark.parametrize("make", [lambda: array(7).cast("int32").realize() << array(7).abs().cast("int32").realize(),
                                  lambda: ~array(9).cast("uint64").realize()])  # fmt: skip
def test_kernels_that_cannot_be_read_back_are_skipped(make):
    unrealized = make()
    with autotune.capture() as program:
        unrealized.realize()
    assert program.kernels == {} and program.skipped == 1


@pytest.mark.skipif(DEVICE != "CPU", reason="needs a second device of the backend")
def test_a_kernel_that_ran_on_two_devices_of_a_backend_belongs_to_both():
    there = f"{DEVICE}:1"
    x, y, z = array(5, 13), array(5, 13).to(there).realize(), array(5, 14).to(there).realize()
    with autotune.capture() as program:
        for t in (x, y, z):
            (t + 1).realize()
    both, one = program.kernels.values()
    assert program.devices == {both.key: {DEVICE, there}, one.key: {there}} and program.calls[both.key] == 2
    assert program.for_device(DEVICE) == program.for_device(there) == [both, one] and left_out(program, DEVICE) == ""
    program.devices[one.key] = {"GPU:1"}
    assert program.for_device(DEVICE) == [both] and program.for_device("GPU") == [one]
    assert left_out(program, DEVICE) == ", kernels on other devices (GPU:1): 1"
    program.devices[one.key] = {there}
    program.skipped = 3
    assert left_out(program, there) == ", launches of kernels that cannot be tuned: 3"


def test_captures_may_be_nested():
    x = array(7, 49)
    with autotune.capture() as outer:
        (x + 1).realize()
        with autotune.capture() as inner:
            (x + 1).realize()
    assert (sum(outer.calls.values()), sum(inner.calls.values())) == (2, 1) and list(outer.kernels) == list(
        inner.kernels
    )
