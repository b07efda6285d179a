"""Inputs, limits and error bounds: by hand, and against what rounding really does."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import add_one, in_place, kernel_of
from tinygrad import Tensor

from autotune.compiler import DTYPES, Ops, Opt, OptOps, UOp, dtypes, read_buffer, write_buffer
from autotune.measuring.bench import Bench
from autotune.measuring.buffers import GUARD, GuardedBuffer
from autotune.measuring.inputs import AFTERWARDS, CASES, NUMPY, Rules, make_input, rules_of
from autotune.measuring.reference import EPSILON, NoReference, reference
from autotune.measuring.verify import expect, formula_bound, unwritten_in

FREE = Rules(True, False, frozenset(), False)
EDGES = next(c for c in CASES if c.name == "edges")


def no_plain() -> np.ndarray:
    raise AssertionError("the un-optimized kernel was asked though all is clear")


def problem(output, v, bound, dtype=dtypes.float32, plain=no_plain, unwritten=None, poison=0xFF) -> str | None:
    kind = NUMPY[dtype]
    expected = expect(
        np.array(v, np.float64 if dtype in EPSILON else kind),
        None if bound is None else np.array(bound, np.float64),
        dtype,
        unwritten,
        poison,
        plain,
    )
    return expected.problem(np.array(output, kind).view(np.uint8))


def as_bytes(*values: float):
    return lambda: np.array(values, np.float32).view(np.uint8)


# **** limits ****


def test_limits_by_hand():
    assert problem([1.0, 2.0], [1.0, 2.0], None) is None
    assert problem([1.25, 2.0], [1.0, 2.0], [0.25, 0.0]) is None
    assert problem([1.0, 2.5, 9.0], [1.0, 2.0, 3.0], None, plain=as_bytes(1, 2, 3)) == (
        "2 of 3 elements differ, element 2 is 9, should be 3"
    )
    assert "element 0 is 1.25, should be from 0.79" in problem([1.25], [1.0], [0.2], plain=as_bytes(1.0))
    one_more = np.nextafter(np.float32(1), np.float32(2))
    assert problem([one_more], [1.0], None, plain=as_bytes(1.0)) is not None  # no bound: equal, or wrong
    assert problem([3, 4], [3, 5], None, dtypes.int32, plain=lambda: np.array([3, 5], np.int32).view(np.uint8)) == (
        "1 of 2 elements differ, element 1 is 4, should be 5"
    )


def test_an_unsure_integer_may_hold_anything():
    assert problem([3, 77], [3, 5], [0.0, math.inf], dtypes.int32) is None


def test_nan_and_infinity_must_stand_where_they_stood():
    inf, nan = math.inf, math.nan
    assert problem([inf, -inf, nan, 1], [inf, -inf, nan, 1], [0, 0, 0, 0.1]) is None
    assert problem([nan, nan], [nan, 1], [0, 0.1], plain=as_bytes(nan, 1)) is not None  # one is no excuse for the other
    for wrong in ([nan, 1, 1], [1, inf, 1], [inf, 1, 1], [3e38, 1, 1]):
        assert problem(wrong, [1, 1, 1], [0.1] * 3, plain=as_bytes(1, 1, 1)) is not None
        assert problem([1, 1, 1], wrong, [0.1] * 3, plain=as_bytes(*wrong)) is not None
    assert problem([inf], [-inf], None, plain=as_bytes(-inf)) is not None


def test_where_float64_does_not_overflow_the_plain_kernel_decides():
    inf = math.inf
    assert problem([inf], [1.0], [0.1], plain=as_bytes(inf)) is None  # an intermediate result overflows in float32
    assert problem([inf], [1.0], [0.1], plain=as_bytes(2.0)) is not None
    assert problem([inf], [1e300], [0.0]) is None and problem([1.0], [1e300], [0.0], plain=as_bytes(inf)) is not None


def test_what_is_left_alone_must_be_left_alone():
    rest = np.array([False, True])
    poison = np.frombuffer(b"\xff" * 4, np.float32)[0]
    assert problem([1.0, poison], [1.0, 7.0], [0.0, 0.0], unwritten=rest) is None
    for filled in (7.0, 0.0):
        text = problem([1.0, filled], [1.0, 7.0], [0.0, 0.0], unwritten=rest, plain=as_bytes(1.0, poison))
        assert f"element 1 is {filled:.9g}, should be left alone" in text


def test_unwritten_elements_are_those_that_keep_two_poisons():
    first, again = np.array([1, -1, -1], np.int32), np.array([1, -1, 0], np.int32)
    found = unwritten_in(first.view(np.uint8), 4, lambda: again.view(np.uint8), 0xFF)
    assert found.tolist() == [False, False, True]  # -1 is what the poison reads as, and here a result
    assert unwritten_in(np.array([1], np.int32).view(np.uint8), 4, no_plain, 0xFF) is None


@settings(max_examples=200, deadline=None, database=None)
@given(st.floats(-1e6, 1e6, width=32), st.floats(0, 1e3), st.floats(-2, 2))
def test_inside_the_bound_is_right_and_twice_outside_is_wrong(v, bound, part):
    error = part * bound + math.copysign(1e-3 + 1e-5 * abs(v), part) * (abs(part) > 1)
    text = problem([np.float32(v + error)], [v], [bound], plain=as_bytes(v))
    rounding = 2.0**-22 * abs(v)
    if abs(error) <= bound and bound > 0:
        assert text is None
    elif abs(error) > 2 * bound + rounding + 1e-4:
        assert text is not None


def test_formula_bound_by_hand():
    values = np.array([-3.0, 1.0, math.inf, math.nan])
    found = formula_bound(values, dtypes.float32, 100)
    assert found[:2] == pytest.approx(2.0**-23 * (16 * 10 * 3 + 64 * np.array([3, 1])))
    assert formula_bound(values, dtypes.int32, 100) is None
    assert formula_bound(values, dtypes.float32, 400)[1] > 1.8 * found[1] > 0


# **** the float64 twin ****


def twin_of(tensor: Tensor):
    bench = Bench(kernel_of(tensor), "CPU")
    bench.prepare()
    return bench


def relative_widths(bench: Bench, case: str) -> np.ndarray:
    expected = bench.expected[case][0]
    with np.errstate(all="ignore"):
        middle = (expected.high.astype(np.float64) + expected.low) / 2
        return (expected.high.astype(np.float64) - expected.low) / np.abs(middle)


def test_sums_and_products_of_small_integers_are_exact():
    for tensor in (Tensor.empty(30_000).sum(), Tensor.empty(16, 24) @ Tensor.empty(24, 32), Tensor.empty(9, 9).max(1)):
        bench = twin_of(tensor)
        expected = bench.expected["integers"][0]
        assert np.array_equal(expected.low, expected.high) and expected.low.any()
    a, b = (bench_inputs.reshape(shape) for bench_inputs, shape in zip(
        (lambda i: (i[1], i[2]))(twin_of(Tensor.empty(16, 24) @ Tensor.empty(24, 32)).inputs["integers"]),
        ((16, 24), (24, 32)), strict=True))  # fmt: skip
    exact = twin_of(Tensor.empty(16, 24) @ Tensor.empty(24, 32)).expected["integers"][0].low
    assert np.array_equal(exact.reshape(16, 32), a.astype(np.float64) @ b)


@pytest.mark.parametrize("tensor, most", [
    (lambda: Tensor.empty(300) + 1, 3e-7), (lambda: Tensor.empty(64, 100).sum(1), 2e-2), (lambda: Tensor.empty(300).exp(), 1e-5),
    (lambda: (Tensor.empty(300) * Tensor.empty(300)).sigmoid(), 1e-5), (lambda: Tensor.empty(300).square().sqrt(), 1e-5),
])  # fmt: skip
def test_bounds_are_tight_enough(tensor, most):
    """The median width of the limits, relative to the value; a sum of ordinary numbers cancels."""
    assert np.nanmedian(relative_widths(twin_of(tensor()), "ordinary")) < most


@pytest.mark.parametrize("tensor", [
    lambda: Tensor.empty(33, 7, 65).sum(2), lambda: (Tensor.empty(16, 24) @ Tensor.empty(24, 32)).gelu(),
    lambda: Tensor.empty(20, 50).softmax(), lambda: Tensor.empty(300).log(), lambda: Tensor.empty(300).sin(),
    lambda: Tensor.empty(20, 40, dtype="float16").sum(1), lambda: Tensor.empty(300).trunc(), lambda: 1 / Tensor.empty(300),
    lambda: (Tensor.empty(8, 30).sum(1) > 0).where(Tensor.empty(8), 2.0), lambda: Tensor.empty(30, 30, dtype="float64").sum(0),
    lambda: Tensor.empty(30, 30).max(0),
    lambda: Tensor.empty(8, 30).sum(1) > 0, lambda: (Tensor.empty(16, 24) @ Tensor.empty(24, 32)).clip(-0.7, 6),
    lambda: Tensor.empty(300, dtype="float16").clip(0.1, 6),
])  # fmt: skip
@pytest.mark.parametrize("seed", [0, 1])
def test_float32_in_any_order_stays_within_the_bounds(tensor, seed):
    """The un-optimized and the hand-coded kernel, on all inputs, without the plain kernel's second opinion."""
    from tiny import kernels_of

    for kernel in kernels_of(tensor()):
        bench = Bench(kernel, "CPU", seed)
        bench.prepare()
        for schedule in bench.baseline_schedules:
            candidate = bench.load(bench.compile(schedule))
            for case in (c for c in CASES if c.name != "nonfinite"):
                for slot, raw in candidate.outputs(case).items():
                    expected = bench.expected[case.name][slot]
                    expected.plain = lambda e=expected: np.full(len(e.low) * e.dtype.itemsize, 0xFF, np.uint8)
                    found = expected.problem(raw)
                    assert found is None or (case.name == "edges" and "nan" in found), (
                        kernel,
                        schedule,
                        case,
                        found,
                    )


def wrong_by_itself(bench: Bench, case_name: str, schedule=()) -> list[str]:
    """What is found wrong with a schedule's outputs where the plain kernel may not be asked."""
    case = next(c for c in CASES if c.name == case_name)
    bench.prepare()
    found = []
    for slot, raw in bench.load(bench.compile(schedule)).outputs(case).items():
        expected = bench.expected[case_name][slot]
        expected.plain = lambda e=expected: np.full(len(e.low) * e.dtype.itemsize, 0xFF, np.uint8)
        found += [text for text in [expected.problem(raw)] if text]
    return found


@pytest.mark.parametrize("seed", range(4))
def test_terms_of_one_sign_and_size_are_all_rounded_one_way(seed):
    """A sum of thousands of nearly equal numbers, one after the other, is further off than errors of random sign would be."""
    bench = Bench(kernel_of((Tensor.empty(64, 1) + Tensor.empty(4000) * 1e-4).sum(1)), "CPU", seed)
    assert wrong_by_itself(bench, "negative") == []
    expected = bench.expected["negative"][0]
    assert (expected.high - expected.low < 1e-3 * np.abs(expected.low)).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_bound_that_an_infinity_spoils_does_not_ask_for_equality(seed):
    """exp(-inf) is 0, its error 0 * inf: such a sum is finite, and may be made in any order like the others."""
    kernel = kernel_of((Tensor.empty(3, 50) * 1.5).exp().sum(1))
    unroll = Opt(OptOps.UNROLL, 0, 5)
    for schedule in ((), (unroll,)):
        assert wrong_by_itself(Bench(kernel, "CPU", seed), "nonfinite", schedule) == []
    assert problem([1.1, 2.0], [1.0, 2.0], [math.nan, 0.2]) is None  # the largest known bound stands in
    assert problem([1.3, 2.0], [1.0, 2.0], [math.nan, 0.2], plain=as_bytes(1, 2)) is not None
    assert problem([9.9], [1.0], [math.nan]) is None  # nothing is known


def test_what_has_no_bound_is_told():
    for tensor in (
        Tensor.empty(300).bitcast("int32") + 1,
        (Tensor.empty(9, 9).sum(0)).cast("int32"),
        Tensor.empty(9, 9).prod(0),
    ):
        with pytest.raises(NoReference):
            reference(kernel_of(tensor).ast)
    constants = UOp.const(1.5, dtypes.weakfloat), UOp.const(2.5, dtypes.weakfloat)
    with pytest.raises(NoReference, match="constants"):
        reference(constants[0] < constants[1])


def test_the_twin_is_float64_and_has_one_more_output():
    kernel = kernel_of(Tensor.empty(64, 100).sum(1))
    twin = reference(kernel.ast)
    params = {u.arg.slot: u.dtype for u in twin.ast.toposort() if u.op is Ops.PARAM}
    assert twin.bounds == {0: 2} and params == dict.fromkeys((0, 1, 2), dtypes.float64)
    assert (
        reference(in_place().ast).bounds == {0: 1} and reference(kernel_of(Tensor.empty(9, 9).max(0)).ast).bounds == {}
    )


# **** inputs ****


@pytest.mark.parametrize("dtype", list(NUMPY))
@pytest.mark.parametrize("case", [*CASES, AFTERWARDS])
def test_inputs_are_seeded_and_fit_their_type(dtype, case):
    one = make_input(dtype, 500, case, FREE, 0, 1)
    assert one.dtype == NUMPY[dtype] and len(one) == 500 and make_input(dtype, 1, case, FREE, 0, 1).shape == (1,)
    assert one.tobytes() == make_input(dtype, 500, case, FREE, 0, 1).tobytes()
    assert one.tobytes() not in {
        make_input(dtype, 500, case, FREE, 3, 1).tobytes(),
        make_input(dtype, 500, case, FREE, 0, 2).tobytes(),
    }


def test_each_case_brings_what_it_promises():
    x = {case.name: make_input(dtypes.float32, 5000, case, FREE, 0, 0) for case in CASES}
    assert set(x["integers"]) == set(range(1, 32))
    assert x["negative"].max() < -0.99 and (np.diff(x["negative"]) > 0).all()
    edges = x["edges"]
    assert (edges == 0).any() and np.signbit(edges[edges == 0]).any() and not np.signbit(edges[edges == 0]).all()
    assert (
        edges.max() == 65536 == -edges.min()
        and ((edges != 0) & (np.abs(edges) < 2.0**-126)).any()
        and np.isfinite(edges).all()
    )
    assert [int(np.sum(f(x["nonfinite"]))) for f in (np.isnan, np.isposinf, np.isneginf)] == [1, 1, 1]
    assert np.isfinite(x["ordinary"]).all() and 0.9 < x["ordinary"].std() < 1.1
    assert 0 < (x["touched"] != x["ordinary"]).mean() < 0.05
    whole = make_input(dtypes.int32, 5000, EDGES, FREE, 0, 0)
    assert whole.min() == -(2**31) and whole.max() == 2**31 - 1


@pytest.mark.parametrize("n", [1, 2, 3, 50, 300, 5000])
def test_whatever_element_is_looked_at_it_is_the_same_in_one_case_of_others(n):
    """What remembers outputs by one element of its input goes wrong in `touched` or in `retouched`, whatever the seed."""
    for seed in range(40):
        ordinary, touched, again = (
            make_input(dtypes.float32, n, case, FREE, seed, 0) for case in (CASES[-1], CASES[-2], AFTERWARDS)
        )
        first, second = touched != ordinary, again != ordinary
        assert first.any() and second.any() and (n == 1 or not (first & second).any())
        assert max(first.sum(), second.sum()) <= max(1, 0.04 * n) + 3


def test_rules_by_hand():
    x, i = Tensor.empty(300), Tensor.empty(300, dtype="int32")
    assert rules_of(add_one()) == FREE and not rules_of(kernel_of(x.relu())).nonfinite
    assert not rules_of(kernel_of(x.max())).nonfinite and rules_of(kernel_of(i.max())).nonfinite
    padded = x.pad(((2, 2),))
    assert rules_of(kernel_of((padded + 1).sum())).nonfinite
    assert not rules_of(kernel_of(padded * Tensor.empty(304))).nonfinite  # zero times NaN is folded, or is not
    assert not rules_of(kernel_of((padded + Tensor.empty(304)) * Tensor.empty(304))).nonfinite
    assert rules_of(kernel_of(x // Tensor.empty(300))).divides is False
    divided = rules_of(kernel_of(Tensor.empty(300, dtype="int32") // i))
    assert divided.divides and make_input(dtypes.int32, 500, EDGES, divided, 0, 1).min() >= 1
    looked_up = rules_of(kernel_of(Tensor.empty(50, 8)[Tensor.empty(20, dtype="int32")]))
    slots = looked_up.addresses
    assert all(np.abs(make_input(dtypes.int32, 500, EDGES, looked_up, 0, s)).max() < 100 for s in slots)


# **** buffers ****


@pytest.mark.parametrize("device", ["CPU", pytest.param("CL", marks=pytest.mark.cl)])
def test_guards_tell_where_they_were_touched(device, request):
    if device == "CL":
        request.getfixturevalue("cl")
    buffer, other = (GuardedBuffer(device, dtypes.float32, 100, slot) for slot in (0, 1))
    assert buffer.guard != other.guard
    data = np.arange(100, dtype=np.float32)
    buffer.write(data)
    contents, touched = buffer.read()
    assert np.array_equal(contents.view(np.float32), data) and touched == ""
    assert buffer.front == (GUARD if device == "CPU" else 0)
    whole = np.empty(buffer.base.nbytes, np.uint8)
    read_buffer(buffer.base, whole.data)
    assert (np.delete(whole, np.s_[buffer.front : buffer.front + 400]) == buffer.guard).all()
    for at, where in ((buffer.front + 400, "behind the end"), (buffer.front - 1, "in front of the start")):
        if at >= 0:
            changed = whole.copy()
            changed[at] ^= 1
            write_buffer(buffer.base, changed.data)
            assert buffer.read()[1] == where
    buffer.write(0x5A)
    assert (buffer.read()[0] == 0x5A).all() and buffer.read()[1] == ""


def test_every_dtype_that_is_stored_can_be_fed():
    assert set(NUMPY) == {d for name, d in DTYPES.items() if name not in ("void", "weakint", "weakfloat")}
