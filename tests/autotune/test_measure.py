"""Verification and timing inside the child: real programs on real buffers, wrong ones put in by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tiny import U2, U4, add_one, in_place, kernel_of, slots, symbolic
from tinygrad import Context, Tensor

from autotune import measure
from autotune.compiler import Opt, OptOps, compile_schedule, dtypes
from autotune.kernel import Kernel
from autotune.measure import (
    EPSILON,
    GUARD,
    MAX_SAMPLES,
    MIN_SAMPLES,
    MIN_SECONDS,
    Bench,
    compile_outcome,
    first_difference,
    make_input,
    tolerance,
)

TRICK = (U2, U2)  # the schedule under whose name a program of another kernel is put in


def bench_with(kernel: Kernel, program_of: Kernel, schedule=()) -> Bench:
    """A bench of `kernel` on which the candidate TRICK is really a program of another kernel."""
    bench = Bench(kernel, "CPU")
    bench.programs[TRICK] = compile_schedule(program_of.ast, schedule, bench.renderer)
    return bench


def verdict(kernel: Kernel, program_of: Kernel) -> tuple[str, str]:
    outcome = bench_with(kernel, program_of).measure(TRICK, None)
    assert outcome.verdict == "ok" or outcome.samples == []
    return outcome.verdict, outcome.detail


# **** wrong programs ****


def test_the_right_program_passes():
    assert verdict(add_one(), add_one()) == ("ok", "")
    assert bench_with(add_one(), add_one(), (U4,)).verify(TRICK) is None


def test_wrong_arithmetic_is_caught():
    found, detail = verdict(add_one(), kernel_of(Tensor.empty(300) * 2))
    assert found == "wrong_output" and detail.startswith("buffer 0, inputs of seed 0: 300 of 300 elements differ")


def test_a_skipped_tail_is_caught():
    found, detail = verdict(add_one(), add_one(299))
    assert found == "wrong_output" and "1 of 300 elements differ, element 299" in detail


def test_a_program_that_writes_nearly_nothing_is_caught():
    found, detail = verdict(add_one(), add_one(1))
    assert found == "wrong_output" and "299 of 300 elements differ" in detail


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "bool"])
def test_skipped_zeros_are_caught(dtype):
    """What happens to lie in a buffer must never pass for a zero that was not written."""
    x = Tensor.empty(300, dtype=dtype)
    padded, bare = kernel_of(x.pad(((0, 50),)).contiguous()), kernel_of(x.contiguous().clone())
    found, detail = verdict(padded, bare)
    assert found == "wrong_output" and "50 of 350 elements differ" in detail
    assert verdict(padded, padded) == ("ok", "")


@pytest.mark.parametrize("behind", [1, GUARD])
def test_writing_behind_the_end_is_caught(behind):
    found, detail = verdict(add_one(), add_one(300 + behind))
    assert found == "wrong_output" and detail.startswith("wrote behind the end of buffer 0")


def test_writing_to_an_input_is_caught():
    kernel = kernel_of(Tensor.empty(300) + Tensor.empty(300))
    found, detail = verdict(kernel, slots(kernel, {0: 1, 1: 0}))
    assert found == "wrong_output" and "buffer" in detail


def test_swapped_inputs_are_caught():
    kernel = kernel_of(Tensor.empty(300) - Tensor.empty(300))
    assert verdict(kernel, slots(kernel, {1: 2, 2: 1}))[0] == "wrong_output"
    symmetric = kernel_of(Tensor.empty(300) + Tensor.empty(300))
    assert verdict(symmetric, slots(symmetric, {1: 2, 2: 1}))[0] == "ok"


def test_what_is_wrong_for_rare_inputs_only_is_caught():
    """Zeros come with the second seed only: x != 0 is always true with the first."""
    x = Tensor.empty(300)
    found, detail = verdict(kernel_of((x != 0).where(x + 1, 5.0)), add_one())
    assert found == "wrong_output" and "inputs of seed 1" in detail


# **** programs that need care ****


def test_in_place_kernels_are_restored_before_each_run():
    bench = Bench(in_place(), "CPU")
    plain = bench.measure((), None)
    assert plain.verdict == "ok" and len(plain.samples) > 10
    assert bench.verify((U4,)) is None
    start, (after, intact) = bench.inputs[0][0], bench._read(0, 0)
    bench.sample((U4,))
    assert intact and np.allclose(after, start * 2 + 1) and np.allclose(bench._read(0, 0)[0], start * 2 + 1)


def test_wrong_in_place_kernels_are_caught():
    x = Tensor.empty(300).realize()
    assert verdict(in_place(), kernel_of(x.assign(x * 2 + 2)))[0] == "wrong_output"


def test_symbolic_sizes_take_the_middle_value():
    bench = Bench(symbolic(), "CPU")
    assert bench.values == {"n": 32} and bench.measure((U4,), None).verdict == "ok"
    rows = bench.inputs[0][1].reshape(64, 32)
    assert np.allclose(bench.reference[0][0], rows[:32].sum(0), rtol=1e-4, atol=1e-5)
    assert verdict(symbolic(), kernel_of(Tensor.empty(64, 32)[:32].sum(0)))[0] == "ok"
    assert verdict(symbolic(), kernel_of(Tensor.empty(64, 32)[:33].sum(0)))[0] == "wrong_output"


@pytest.mark.cl
def test_wrong_programs_are_caught_on_cl(cl):
    bench = Bench(add_one(), "CL")
    assert bench.verify((Opt(OptOps.LOCAL, 0, 4),)) is None
    for size in (299, 301):
        bench.programs[TRICK] = compile_schedule(add_one(size).ast, (), bench.renderer)
        bench.loaded.pop(TRICK, None)
        assert bench.measure(TRICK, None).verdict == "wrong_output"


# **** comparing ****


def test_tolerance_by_hand():
    reference = np.array([-3.0, 1.0, math.inf, math.nan])
    assert tolerance(dtypes.float32, 100, reference) == pytest.approx(16 * 2.0**-23 * 10 * 3)
    assert tolerance(dtypes.float16, 1, reference) == pytest.approx(16 * 2.0**-10 * 3)
    assert tolerance(dtypes.int32, 100, reference) == tolerance(dtypes.bool, 9, reference) == 0.0
    assert tolerance(dtypes.float32, 100, np.zeros(3)) == 0.0


@pytest.mark.parametrize("dtype", list(EPSILON))
def test_tolerance_grows_like_the_root_of_the_terms_and_with_the_scale(dtype):
    reference = np.array([1.0, -2.0])
    assert tolerance(dtype, 400, reference) == pytest.approx(2 * tolerance(dtype, 100, reference))
    assert tolerance(dtype, 100, 5 * reference) == pytest.approx(5 * tolerance(dtype, 100, reference))


def compare(output, reference, dtype=dtypes.float32, terms=1) -> str | None:
    kind = measure.NUMPY[dtype]
    return first_difference(np.array(output, kind), np.array(reference, kind), dtype, terms)


def test_first_difference_by_hand():
    assert compare([1.0, 2.0], [1.0, 2.0]) is None and compare([1.0 + 1e-6, 2.0], [1.0, 2.0]) is None
    assert compare([1.0, 2.5, 9.0], [1.0, 2.0, 3.0]) == "2 of 3 elements differ, element 2 is 9, should be 3"
    assert compare([1.0 + 2e-4], [1.0]) is not None and compare([1.0 + 2e-4], [1.0], terms=40_000) is None
    assert compare([3, 4], [3, 5], dtypes.int32, 10**6) == "1 of 2 elements differ, element 1 is 4, should be 5"


def test_nan_and_infinity_must_stand_where_they_stood():
    inf, nan = math.inf, math.nan
    assert compare([inf, -inf, nan, 1], [inf, -inf, nan, 1]) is None
    for wrong in ([nan, 1, 1], [1, inf, 1], [inf, 1, 1]):
        assert compare(wrong, [1, 1, 1]) is not None
        assert compare([1, 1, 1], wrong) is not None
    assert compare([inf], [-inf]) is not None
    assert compare([nan, 99.0], [1.0, 1.0]) == "2 of 2 elements differ, element 0 is nan, should be 1"


def test_inputs_are_seeded_and_fit_their_type():
    for dtype in measure.NUMPY:
        one, again = make_input(dtype, 500, 0, 1), make_input(dtype, 500, 0, 1)
        assert one.tobytes() == again.tobytes() and one.dtype == measure.NUMPY[dtype] and len(one) == 500
        assert one.tobytes() not in {make_input(dtype, 500, 1, 1).tobytes(), make_input(dtype, 500, 0, 2).tobytes()}
    wide = make_input(dtypes.float32, 5000, 1, 0)
    assert 300 < (wide == 0).sum() < 700 and (wide < 0).mean() > 0.3 and np.isfinite(wide).all()
    assert make_input(dtypes.int32, 5000, 1, 0).min() < 0 <= make_input(dtypes.uint8, 5000, 1, 0).min()


# **** timing ****


def test_samples_are_kept_until_there_are_enough():
    samples = Bench(add_one(), "CPU").measure((U4,), None).samples
    assert len(samples) == MAX_SAMPLES and 0 < sum(samples) < MIN_SECONDS  # a microsecond each
    slow = Bench(kernel_of(Tensor.empty(1 << 20).exp()), "CPU").measure((), None).samples
    assert MIN_SAMPLES <= len(slow) < MAX_SAMPLES and sum(slow) >= MIN_SECONDS


def test_a_slow_candidate_gets_two_samples():
    outcome = Bench(add_one(), "CPU").measure((U4,), 1e-9)
    assert outcome.verdict == "ok" and len(outcome.samples) == 2 and "slower than 1e-09 s" in outcome.detail


def test_a_duel_interleaves(monkeypatch):
    bench, order = Bench(add_one(), "CPU"), []
    run = bench._run
    monkeypatch.setattr(bench, "_run", lambda schedule, seed: order.append(schedule) or run(schedule, seed))
    samples = bench.duel([(), (U4,), ()])
    rounds = [order[i : i + 3] for i in range(len(order) - 3 * len(samples[0]), len(order), 3)]
    assert all(r == [(), (U4,), ()] for r in rounds)
    assert len(samples[0]) == len(samples[1]) == len(samples[2]) == len(rounds) >= measure.DUEL_MIN_ROUNDS


def test_failed_compilations_have_typed_verdicts(monkeypatch):
    bench = Bench(add_one(), "CPU")
    assert compile_outcome(bench, (U4,))[0] == "ok"
    found, code_hash, seconds, detail = compile_outcome(bench, (Opt(OptOps.UPCAST, 0, 7),))
    assert (found, code_hash, seconds) == ("illegal", "", 0.0) and "UPCAST" in detail
    assert compile_outcome(bench, (Opt(OptOps.UPCAST, 5, 2),))[0] == "illegal"
    monkeypatch.setattr(measure, "MAX_UOPS", 3)
    assert compile_outcome(bench, (U2,))[0] == "too_big"
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "/no/such/compiler")
    monkeypatch.setattr(measure, "MAX_UOPS", 3000)
    with Context(CACHELEVEL=0):  # or a compilation of long ago would be served
        assert compile_outcome(bench, (Opt(OptOps.UPCAST, 0, 3),))[0] == "compile_failed"
