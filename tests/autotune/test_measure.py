"""Verification and timing inside the child: real programs on real buffers, wrong ones put in by hand."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from tiny import U2, U4, add_one, in_place, kernel_of, slots, symbolic, total
from tinygrad import Context, Tensor

from autotune.compiler import Opt, OptOps, compile_schedule, dtypes
from autotune.kernel import Kernel, kernel_to_json, schedule_to_json
from autotune.measuring import bench as bench_module
from autotune.measuring import worker as worker_module
from autotune.measuring.bench import MAX_SAMPLES, MIN_SAMPLES, MIN_SECONDS, Bench, Outcome, WrongOutput, compile_outcome
from autotune.measuring.buffers import GUARD
from autotune.measuring.inputs import CASES, sizes_of
from autotune.measuring.verify import values_of
from autotune.measuring.worker import Worker


def measured(kernel: Kernel, program_of: Kernel, schedule=(), device: str = "CPU") -> Outcome:
    """What becomes of a program of `program_of` that is put in as a candidate of `kernel`."""
    bench = Bench(kernel, device)
    sizes = sizes_of(program_of) if program_of.variables else bench.sizes
    outcome = bench.measure(compile_schedule(program_of.ast, schedule, bench.renderer, 0, sizes), None)
    assert outcome.verdict == "ok" or outcome.samples == []
    return outcome


def verdict(kernel: Kernel, program_of: Kernel) -> tuple[str, str]:
    outcome = measured(kernel, program_of)
    return outcome.verdict, outcome.detail


# **** wrong programs ****


def test_the_right_program_passes():
    assert verdict(add_one(), add_one()) == ("ok", "")
    assert measured(add_one(), add_one(), (U4,)).verdict == "ok"


def test_wrong_arithmetic_is_caught():
    found, detail = verdict(add_one(), kernel_of(Tensor.empty(300) * 2))
    assert found == "wrong_output" and detail.startswith("buffer 0, inputs 'integers' of seed 0: ")


def test_a_skipped_tail_is_caught():
    found, detail = verdict(add_one(), add_one(299))
    assert found == "wrong_output" and "1 of 300 elements differ, element 299" in detail


def test_a_program_that_writes_nearly_nothing_is_caught():
    found, detail = verdict(add_one(), add_one(1))
    assert found == "wrong_output" and "299 of 300 elements differ" in detail


@pytest.mark.parametrize("size", [1000, 30_000])
def test_one_missing_term_is_caught_in_a_sum_of_any_length(size):
    """Rounding of the ordinary inputs would hide it: 30,000 terms may err by more than one of them."""
    found, detail = verdict(total(size), kernel_of(Tensor.empty(size)[1:].sum()))
    assert found == "wrong_output" and "inputs 'integers'" in detail


def test_a_maximum_over_padding_and_one_that_misses_the_end_are_caught():
    x = Tensor.empty(1000)
    right = kernel_of(x.max())
    assert verdict(right, right)[0] == "ok"
    for wrong in (x.pad(((0, 24),)).max(), x[:999].max()):
        found, detail = verdict(right, kernel_of(wrong))
        assert found == "wrong_output" and "inputs 'negative'" in detail


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "bool"])
def test_skipped_zeros_are_caught(dtype):
    """What happens to lie in a buffer must never pass for a zero that was not written."""
    x = Tensor.empty(300, dtype=dtype)
    padded, bare = kernel_of(x.pad(((0, 50),)).contiguous()), kernel_of(x.contiguous().clone())
    found, detail = verdict(padded, bare)
    assert found == "wrong_output" and "50 of 350 elements differ" in detail
    assert verdict(padded, padded) == ("ok", "")


@pytest.mark.parametrize("behind", [1, (GUARD - 1200) // 4])  # up to the end of the page; behind it a fence stands
def test_writing_behind_the_end_is_caught(behind):
    found, detail = verdict(add_one(), add_one(300 + behind))
    assert found == "wrong_output" and detail.startswith("wrote behind the end of buffer 0")


def test_writing_to_an_input_is_caught():
    kernel = kernel_of(Tensor.empty(300) + Tensor.empty(300))
    found, detail = verdict(kernel, slots(kernel, {0: 1, 1: 0}))
    assert (found, detail) == ("wrong_output", "writes buffers [1], should write [0]")


def test_swapped_inputs_are_caught():
    kernel = kernel_of(Tensor.empty(300) - Tensor.empty(300))
    assert verdict(kernel, slots(kernel, {1: 2, 2: 1}))[0] == "wrong_output"
    symmetric = kernel_of(Tensor.empty(300) + Tensor.empty(300))
    assert verdict(symmetric, slots(symmetric, {1: 2, 2: 1}))[0] == "ok"


@pytest.mark.parametrize("wrong, case", [
    (lambda x: (x != 0).where(x + 1, 5.0), "edges"), ((lambda x: (x < 60000).where(x + 1, 5.0)), "edges"),
    (lambda x: (x == x).where(x + 1, 5.0), "nonfinite"),
])  # fmt: skip
def test_what_is_wrong_for_rare_inputs_only_is_caught(wrong, case):
    found, detail = verdict(add_one(), kernel_of(wrong(Tensor.empty(300))))
    assert found == "wrong_output" and f"inputs '{case}'" in detail


def test_a_program_that_turns_wrong_is_caught_after_timing(monkeypatch):
    """Another candidate's outputs after timing: here the input changes under it, which the last check must see."""
    bench = Bench(add_one(), "CPU")
    samples = bench_module.Candidate.samples

    def turns(self, cutoff):
        found = samples(self, cutoff)
        self._run = bench.load(compile_schedule(add_one(299).ast, (), bench.renderer, 0, bench.sizes))._run
        return found

    monkeypatch.setattr(bench_module.Candidate, "samples", turns)
    outcome = bench.measure(bench.compile((U4,)), None)
    assert outcome.verdict == "wrong_output" and "inputs 'retouched' of seed 0, after timing" in outcome.detail


def test_a_closed_bench_gives_its_memory_back_at_once():
    bench = Bench(add_one(), "CPU")
    bench.prepare()
    buffers = [weakref.ref(buffer) for buffer in bench.buffers.values()]
    gc.disable()
    try:
        bench.close()
        assert len(buffers) == 2 and all(b() is None for b in buffers) and not bench.inputs and not bench.expected
    finally:
        gc.enable()


def hold(worker: Worker, size: int, seed: int = 0) -> Bench:
    """Send it `add_one(size)`, whose two buffers take 8 bytes an element, and let it be prepared."""
    worker.kernel(kernel_to_json(add_one(size)), seed)
    assert worker.prepare()["seconds"] > 0
    return worker._bench()


def test_a_worker_holds_kernels_as_long_as_there_is_room_and_gives_up_the_oldest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker_module, "HELD_BYTES", 8 * 100)
    worker = Worker("CPU")
    large, small = hold(worker, 64), hold(worker, 36)  # just fits
    assert large.nbytes == 8 * 64 and hold(worker, 64) is large and large.buffers
    last = hold(worker, 16)  # the one that was longest unused goes
    assert (large.buffers and not small.buffers) and list(worker.benches.values()) == [large, last]
    larger = hold(worker, 200)  # beyond the limit it is held alone
    assert list(worker.benches.values()) == [larger] and not large.buffers and not last.buffers
    again = hold(worker, 64)
    assert again is not large and list(worker.benches.values()) == [again]


def test_a_held_kernel_is_prepared_once_and_answers_as_a_fresh_one_does():
    """With two in turn each answers for itself. With other inputs it is another one."""
    worker, alone = Worker("CPU"), Worker("CPU")
    hold(alone, 64)
    binary = alone.compile(schedule_to_json((U4,)))["binary"]
    assert hold(worker, 64) is hold(worker, 64) is not hold(worker, 64, seed=1)
    first = hold(worker, 64)
    ran = first.plain.launched
    hold(worker, 300)
    assert worker.measure(binary, None)["verdict"] != "ok"  # it is of the other kernel
    assert hold(worker, 64) is first and first.plain.launched == ran
    assert worker.compile(schedule_to_json((U4,)))["binary"] == binary
    mine, other = worker.measure(binary, None), alone.measure(binary, None)
    assert mine["verdict"] == other["verdict"] == "ok" and len(mine["samples"]) > 3


def test_verifying_does_not_run_the_kernel_itself_again(monkeypatch: pytest.MonkeyPatch):
    """It may take a hundred times as long as any candidate; its time was known when it was prepared."""
    bench, runs = Bench(add_one(), "CPU"), []
    seconds = bench.prepare()
    candidate, run = bench.load(bench.compile((U4,))), bench.plain.run
    monkeypatch.setattr(bench.plain, "run", lambda case: runs.append(case) or run(case))
    bench.verify(candidate)
    assert not runs and bench.prepare() == seconds
    assert bench.plain.outputs(CASES[0]) and len(runs) == 1


def test_a_second_opinion_hides_nothing_of_what_the_candidate_did(monkeypatch):
    """It runs the un-optimized kernel on the same buffers: the candidate's touched input must have been seen before."""
    bench = Bench(add_one(), "CPU")
    candidate = bench.load(bench.compile((U4,)))
    bench.prepare()
    monkeypatch.setattr(bench.expected["ordinary"][0], "low", np.full(300, np.inf, np.float32))  # plain() is asked
    candidate.fill(CASES[-1])
    candidate.run(CASES[-1])
    bench.buffers[1].write(0x00)
    with pytest.raises(WrongOutput, match="changed its input buffer 1"):
        bench.check(candidate, CASES[-1])
    candidate.fill(CASES[-1])
    candidate.run(CASES[-1])
    bench.check(candidate, CASES[-1])  # the control: the second opinion finds it right


# **** programs that need care ****


def test_in_place_kernels_are_restored_before_each_run():
    bench = Bench(in_place(), "CPU")
    plain = bench.measure(bench.compile(()), None)
    assert plain.verdict == "ok" and len(plain.samples) > 10
    candidate = bench.load(bench.compile((U4,)))
    bench.verify(candidate)
    start = bench.inputs["ordinary"][0]
    for _ in range(2):
        candidate.sample()
        after, touched = bench.buffers[0].read()
        assert not touched and np.allclose(after.view(np.float32), start * 2 + 1)


def test_wrong_in_place_kernels_are_caught():
    x = Tensor.empty(300).realize()
    assert verdict(in_place(), kernel_of(x.assign(x * 2 + 2)))[0] == "wrong_output"


def test_symbolic_sizes_are_verified_at_both_ends_and_timed_in_the_middle():
    bench = Bench(symbolic(), "CPU")
    assert bench.sizes == ({"n": 32}, {"n": 64}, {"n": 1})
    assert bench.measure(bench.compile((U4,)), None).verdict == "ok"
    for case, n in zip(CASES, (64, 32, 1, 32, 32, 32), strict=True):
        rows = bench.inputs[case.name][1].reshape(64, 32)
        expected = bench.expected[case.name][0]
        with np.errstate(all="ignore"):
            want = rows[:n].astype(np.float64).sum(0)
            assert ((expected.low <= want) & (want <= expected.high) | np.isnan(want)).all()
    assert verdict(symbolic(), kernel_of(Tensor.empty(64, 32)[:32].sum(0)))[0] == "wrong_output"  # right in the middle
    assert verdict(symbolic(), symbolic())[0] == "ok"


@pytest.mark.cl
def test_wrong_programs_are_caught_on_cl(cl):
    assert measured(add_one(), add_one(), (Opt(OptOps.LOCAL, 0, 4),), "CL").verdict == "ok"
    for size in (299, 301):
        assert measured(add_one(), add_one(size), (), "CL").verdict == "wrong_output"


def test_a_seed_names_the_inputs():
    one, again, other = (Bench(add_one(), "CPU", seed) for seed in (5, 5, 6))
    for bench in (one, again, other):
        bench.prepare()
    same = [np.array_equal(one.inputs[c.name][1], again.inputs[c.name][1], equal_nan=True) for c in CASES]
    assert all(same) and not np.array_equal(one.inputs["ordinary"][1], other.inputs["ordinary"][1])


def test_without_float64_the_plain_kernel_is_the_reference(monkeypatch):
    def none(bench):
        raise bench_module.NoReference("no float64 here")

    kernel = kernel_of(Tensor.empty(16, 24) @ Tensor.empty(24, 32))
    wrong = kernel_of(Tensor.empty(16, 24) @ Tensor.empty(24, 32) * 1.001)
    monkeypatch.setattr(bench_module, "Twin", none)
    assert verdict(kernel, kernel) == ("ok", "") and verdict(kernel, wrong)[0] == "wrong_output"
    raw = Bench(kernel, "CPU")
    raw.prepare()
    assert values_of(raw.inputs["ordinary"][1].view(np.uint8), dtypes.float32).dtype == np.float32


def test_zeros_are_written_though_there_is_no_float64_reference():
    """Of a product there is none. Nearly all rows underflow, and the poison of some cases is 0 itself."""
    bench = Bench(kernel_of(Tensor.empty(64, 200).prod(1)), "CPU", seed=1)
    bench.prepare()
    assert (bench.plain.outputs(CASES[-1])[0].view(np.float32) == 0).mean() > 0.9
    assert all(bench.expected[case.name][0].unwritten is None for case in bench_module.ALL_CASES)


@pytest.mark.parametrize("f", [Tensor.sqrt, Tensor.log])
def test_a_maximum_of_roots_or_logarithms_may_be_taken_in_any_order(f):
    """Of negative numbers they are NaN, and which numbers a NaN pushes out depends on the order. A wrong one is still caught."""
    kernel, wrong = (kernel_of(f(Tensor.empty(64, 64) * factor).max(1)) for factor in (2, 3))
    assert measured(kernel, kernel, (Opt(OptOps.UNROLL, 0, 4),)).verdict == "ok"
    assert verdict(kernel, wrong)[0] == "wrong_output"


# **** timing ****


def test_a_clock_that_says_zero_gives_samples_all_the_same():
    """A record holds none that is not above 0."""
    bench, binary = bench_and_binary(add_one(), (Opt(OptOps.UPCAST, 0, 4),))
    bench.prepare()
    candidate = bench.load(binary)
    bench.verify(candidate)
    run = candidate._run
    candidate._run = lambda *arguments: 0.0 * run(*arguments)
    assert set(candidate.samples(None)[0]) == {bench_module.SHORTEST}


def bench_and_binary(kernel: Kernel, schedule=()) -> tuple[Bench, bench_module.Binary]:
    bench = Bench(kernel, "CPU")
    return bench, bench.compile(schedule)


def test_samples_are_kept_until_there_are_enough():
    bench, binary = bench_and_binary(add_one(), (U4,))
    quick = bench.measure(binary, None)
    assert len(quick.samples) == MAX_SAMPLES and 0 < sum(quick.samples) < MIN_SECONDS  # a microsecond each
    assert 0 < sum(quick.samples) < quick.timing_seconds and quick.verify_seconds > 0 and quick.load_seconds > 0
    bench, binary = bench_and_binary(kernel_of(Tensor.empty(1 << 20).exp()))
    slow = bench.measure(binary, None).samples
    assert MIN_SAMPLES <= len(slow) < MAX_SAMPLES and sum(slow) >= MIN_SECONDS


def test_a_slow_candidate_gets_two_samples():
    bench, binary = bench_and_binary(add_one(), (U4,))
    outcome = bench.measure(binary, 1e-9)
    assert outcome.verdict == "ok" and len(outcome.samples) == 2 and "slower than 1e-09 s" in outcome.detail


def test_outputs_are_poisoned_before_every_timed_run(monkeypatch):
    bench, binary = bench_and_binary(add_one(), (U4,))
    candidate, seen = bench.load(binary), []
    bench.verify(candidate)
    run = candidate._run
    monkeypatch.setattr(
        candidate, "_run", lambda *a: seen.append((bench.buffers[0].read()[0] == 0xFF).all()) or run(*a)
    )
    candidate.samples(None)
    assert len(seen) == MAX_SAMPLES + 1 and all(seen)


def test_a_duel_interleaves(monkeypatch):
    bench, order = Bench(add_one(), "CPU"), []
    sample = bench_module.Candidate.sample
    monkeypatch.setattr(bench_module.Candidate, "sample", lambda self: order.append(self.binary) or sample(self))
    binaries = [bench.compile(()), bench.compile((U4,)), bench.compile((U2,))]
    samples = bench.duel(binaries)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert all(r == binaries for r in rounds)
    assert len(samples[0]) == len(samples[1]) == len(samples[2]) == len(rounds) >= bench_module.DUEL_MIN_ROUNDS


def test_a_duel_names_who_is_wrong():
    bench = Bench(add_one(), "CPU")
    wrong = compile_schedule(add_one(299).ast, (), bench.renderer, 0, bench.sizes)
    with pytest.raises(WrongOutput, match="1 of 300 elements differ") as caught:
        bench.duel([bench.compile(()), wrong, bench.compile(())])
    assert caught.value.index == 1


def test_failed_compilations_have_typed_verdicts(monkeypatch, tmp_path):
    bench = Bench(add_one(), "CPU")
    assert compile_outcome(bench, (U4,))[0] == "ok"
    found, binary, seconds, detail = compile_outcome(bench, (Opt(OptOps.UPCAST, 0, 7),))
    assert (found, binary) == ("illegal", None) and 1.0 > seconds > 0.0 and "UPCAST" in detail
    assert compile_outcome(bench, (Opt(OptOps.UPCAST, 5, 2),))[0] == "illegal"
    monkeypatch.setattr(bench_module, "MAX_UOPS", 3)
    assert compile_outcome(bench, (U2,))[0] == "too_big"
    monkeypatch.setattr(bench_module, "MAX_UOPS", 3000)
    with Context(CACHELEVEL=0):  # or a compilation of long ago would be served
        (tmp_path / "clang").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "clang").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert compile_outcome(bench, (Opt(OptOps.UPCAST, 0, 3),))[0] == "compile_failed"
        monkeypatch.setenv("PATH", "")
        with pytest.raises(OSError):  # no candidate's fault
            compile_outcome(bench, (Opt(OptOps.UPCAST, 0, 5),))
