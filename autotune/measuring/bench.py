"""What a measurement is, as it happens inside the child process: verification first, then timing.

Protocol 2. One set of guarded buffers holds each case of inputs in turn (inputs.py). Outputs are poisoned before every
run, timed ones too; in-place buffers get their inputs back. A candidate is verified on all cases, then timed on the last
with warm caches and the full grid, then verified once more: what its last timed run left, and a case that it has not seen.
The first timed run only tells whether the candidate is too slow to be timed further; all others are kept, the median ranks.
Symbolic sizes are timed at tinygrad's middle value.
"""

from __future__ import annotations

import functools
import math
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from autotune.compiler import AxisType, Binary, Ops, Renderer, compile_schedule, hand_coded, renderer_of
from autotune.errors import IllegalAction
from autotune.kernel import Kernel, Schedule
from autotune.measuring.buffers import GuardedBuffer, buffers_of
from autotune.measuring.inputs import AFTERWARDS, CASES, Case, make_input, rules_of, sizes_of
from autotune.measuring.reference import NoReference
from autotune.measuring.twin import Twin
from autotune.measuring.verify import Expected, expect, formula_bound, unwritten_in, values_of

PROTOCOL = 2
MIN_SECONDS, MIN_SAMPLES, MAX_SAMPLES = 0.02, 3, 60  # of timing one candidate
SHORTEST = 1e-9  # seconds of a sample: a coarse clock says 0 of a short run, which no record may hold
DUEL_SECONDS, DUEL_MIN_ROUNDS, DUEL_MAX_ROUNDS = 0.25, 9, 101  # per competitor of an interleaved comparison
MAX_UOPS = 6000  # of a lowered kernel; BEAM's 3000 shuts every good tile of a matmul with a fused GELU out
TIMED = CASES[-1]
ALL_CASES = (*CASES, AFTERWARDS)


@dataclass(frozen=True)
class Outcome:
    """What became of one candidate in the child. Times in seconds; `timing_seconds` holds warm-up and poisoning too."""

    verdict: str
    samples: list[float] = field(default_factory=list)
    detail: str = ""
    load_seconds: float = 0.0  # loading it, the first launch included: some drivers compile only then
    verify_seconds: float = 0.0
    timing_seconds: float = 0.0


class WrongOutput(Exception):
    """A candidate computed something else, or wrote where it must not. The message says where, `index` who in a duel."""

    index = 0


class Bench:
    """One kernel set up for measuring on one device: guarded buffers, inputs, and what the outputs should be."""

    def __init__(self, kernel: Kernel, device: str, seed: int = 0):
        self.kernel, self.device, self.seed = kernel, device, seed
        self.renderer: Renderer = renderer_of(device)
        self.rules, self.sizes = rules_of(kernel), sizes_of(kernel)
        self.params = buffers_of(kernel.ast)
        self.inputs: dict[str, dict[int, np.ndarray]] = {}
        self.expected: dict[str, dict[int, Expected]] = {}
        self.buffers: dict[int, GuardedBuffer] = {}
        self.plain_seconds: float | None = None  # of one un-optimized run

    @property
    def nbytes(self) -> int:
        """Of the kernel's buffers."""
        return sum(p.max_numel() * p.dtype.itemsize for p in self.params.values())

    def close(self) -> None:
        """Give back its memory: cycles of the bench and its candidates would keep it until a collection that may be long off."""
        self.buffers.clear()
        self.inputs.clear()
        self.expected.clear()

    def compile(self, schedule: Schedule, max_uops: int = 0) -> Binary:
        """`max_uops` bounds the lowered kernel, 0 does not. Raises IllegalAction, OverflowError, or what the compiler raises."""
        return compile_schedule(self.kernel.ast, schedule, self.renderer, max_uops, self.sizes)

    def load(self, binary: Binary) -> Candidate:
        return Candidate(self, binary)

    # **** what is right ****

    def prepare(self) -> float:
        """Allocate buffers and compute what is expected in each case; returns seconds of one un-optimized run. Idempotent."""
        if not self.buffers:
            self.buffers = {s: GuardedBuffer(self.device, p.dtype, p.max_numel(), s) for s, p in self.params.items()}
            for case in ALL_CASES:
                self.inputs[case.name] = {
                    s: make_input(p.dtype, p.max_numel(), case, self.rules, self.seed, s)
                    for s, p in self.params.items()
                    if s not in self.written_only
                }
        if not self.expected:
            twin = self._twin()
            expected = {case.name: self._expect(case, twin) for case in ALL_CASES}
            self.expected = expected
        if self.plain_seconds is None:
            self.plain.fill(TIMED)
            self.plain_seconds = self.plain.run(TIMED)
        return self.plain_seconds

    @functools.cached_property
    def plain(self) -> Candidate:
        """The un-optimized kernel."""
        return self.load(self.compile(()))

    @functools.cached_property
    def written_only(self) -> set[int]:
        """Slots of the buffers that the un-optimized kernel writes and does not read."""
        return set(self.plain.binary.outputs) - set(self.plain.binary.inputs)

    def _twin(self) -> Twin | None:
        try:
            return Twin(self)
        except NoReference:
            return None

    def _expect(self, case: Case, twin: Twin | None) -> dict[int, Expected]:
        plain = functools.cache(lambda: self.plain.outputs(case))
        found = {}
        for slot in self.plain.binary.outputs:
            dtype = self.params[slot].dtype
            if twin is not None:
                v, bound, unwritten = twin.expected(case, slot)
            else:
                raw, unwritten = self._plainly(case, slot)
                v = values_of(raw, dtype)
                bound = formula_bound(v.astype(np.float64), dtype, self.terms)
            poison = case.poison if slot in self.written_only else 0
            found[slot] = expect(v, bound, dtype, unwritten, poison, functools.partial(lambda s: plain()[s], slot))
        return found

    def _plainly(self, case: Case, slot: int) -> tuple[np.ndarray, np.ndarray | None]:
        # a case's own poison may be the second one: then every zero would count
        first = self.plain.outputs(case, 0xFF)[slot]
        return first, unwritten_in(first, self.params[slot].dtype.itemsize,
                                   lambda: self.plain.outputs(case, 0x00)[slot], 0xFF)  # fmt: skip

    @functools.cached_property
    def terms(self) -> int:
        """How many values a sum of this kernel may have."""
        return math.prod(int(u.vmax) + 1 for u in self.kernel.ast.toposort()
                         if u.op is Ops.RANGE and u.arg[-1] is AxisType.REDUCE)  # fmt: skip

    # **** verification and timing ****

    def verify(self, candidate: Candidate) -> None:
        """Raises WrongOutput unless the candidate computes on every case what it should."""
        self.prepare()
        if set(candidate.binary.outputs) != set(self.plain.binary.outputs):
            candidate.launched = time.perf_counter()
            raise WrongOutput(f"writes buffers {sorted(candidate.binary.outputs)}, "
                              f"should write {sorted(self.plain.binary.outputs)}")  # fmt: skip
        for case in CASES:
            candidate.fill(case)
            candidate.run(case)
            self.check(candidate, case)

    def check(self, candidate: Candidate, case: Case, when: str = "") -> None:
        """Look at all buffers after a run. Raises WrongOutput."""
        where = f"inputs '{case.name}' of seed {self.seed}{when}"
        outputs = {}
        for slot, buffer in self.buffers.items():  # all are read first: a second opinion runs on the same buffers
            contents, touched = buffer.read()
            if touched:
                raise WrongOutput(f"wrote {touched} of buffer {slot} ({where})")
            if slot in self.expected[case.name]:
                outputs[slot] = contents.copy()
            elif not np.array_equal(contents, self.inputs[case.name][slot].view(np.uint8)):
                raise WrongOutput(f"changed its input buffer {slot} ({where})")
        for slot, contents in outputs.items():
            if (problem := self.expected[case.name][slot].problem(contents)) is not None:
                raise WrongOutput(f"buffer {slot}, {where}: {problem}")

    def measure(self, binary: Binary, cutoff: float | None) -> Outcome:
        """Verify, time, verify again. A candidate whose run takes longer than `cutoff` seconds gets two samples only."""
        started = time.perf_counter()
        candidate = self.load(binary)
        samples: list[float] = []
        verdict, detail, timing_seconds = "ok", "", 0.0
        try:
            self.verify(candidate)
            timing_started = time.perf_counter()
            samples, detail = candidate.samples(cutoff)
            timing_seconds = time.perf_counter() - timing_started
            self.check_afterwards(candidate)
        except WrongOutput as wrong:
            verdict, samples, detail = "wrong_output", [], str(wrong)
        load_seconds = candidate.launched - started
        verify_seconds = time.perf_counter() - candidate.launched - timing_seconds
        return Outcome(verdict, samples, detail, load_seconds, verify_seconds, timing_seconds)

    def check_afterwards(self, candidate: Candidate) -> None:
        """What the last timed run left must be right, and so must a run on other inputs. Raises WrongOutput."""
        self.check(candidate, TIMED, ", after timing")
        candidate.fill(AFTERWARDS)
        candidate.run(AFTERWARDS)
        self.check(candidate, AFTERWARDS, ", after timing")

    def duel(self, binaries: Sequence[Binary], seconds: float = DUEL_SECONDS) -> list[list[float]]:
        """Verified, then timed in turn, A B C A B C ..., so that a drifting machine is fair to all.

        `seconds` are spent on each at least, within DUEL_MIN_ROUNDS and DUEL_MAX_ROUNDS. Raises WrongOutput.
        """
        candidates = [self.load(binary) for binary in binaries]
        self._each(candidates, self.verify)
        samples: list[list[float]] = [[] for _ in candidates]
        while len(samples[0]) < DUEL_MIN_ROUNDS or (
            min(map(sum, samples)) < seconds and len(samples[0]) < DUEL_MAX_ROUNDS
        ):
            for own, candidate in zip(samples, candidates, strict=True):
                own.append(candidate.sample())
        self._each(candidates, self._verify_again)
        return samples

    def _verify_again(self, candidate: Candidate) -> None:
        candidate.fill(TIMED)
        candidate.run(TIMED)
        self.check_afterwards(candidate)

    def _each(self, candidates: Sequence[Candidate], check: Callable[[Candidate], None]) -> None:
        for i, candidate in enumerate(candidates):
            try:
                check(candidate)
            except WrongOutput as wrong:
                wrong.index = i
                raise

    @functools.cached_property
    def baseline_schedules(self) -> tuple[Schedule, Schedule]:
        """(un-optimized, hand-coded): always compiled, whatever their size"""
        return (), hand_coded(self.kernel.ast, self.renderer)


class Candidate:
    """A binary loaded on a bench."""

    def __init__(self, bench: Bench, binary: Binary):
        self.bench, self.binary = bench, binary
        self._run = binary.load(bench.device)
        self.launched = 0.0  # when its first run was over (perf_counter)

    def fill(self, case: Case, poison: int | None = None) -> None:
        """Inputs into all buffers that are read, poison into those that are only written."""
        for slot in self.bench.buffers:
            self._fill(slot, case, case.poison if poison is None else poison)

    def _fill(self, slot: int, case: Case, poison: int) -> None:
        contents = poison if slot in self.bench.written_only else self.bench.inputs[case.name][slot]
        self.bench.buffers[slot].write(contents)

    def run(self, case: Case) -> float:
        """Seconds of one run on the buffers as they are."""
        seconds = self._run({slot: b.buffer for slot, b in self.bench.buffers.items()}, case.size)
        self.launched = self.launched or time.perf_counter()
        return seconds

    def sample(self) -> float:
        """One timed run in seconds, on poisoned outputs and restored in-place buffers."""
        for slot in self.binary.outputs:
            self._fill(slot, TIMED, TIMED.poison)
        return max(self.run(TIMED), SHORTEST)

    def samples(self, cutoff: float | None) -> tuple[list[float], str]:
        """(samples, why there are only two): repeated until there are enough; the verification before was the warm-up."""
        first = self.sample()
        if cutoff is not None and first > cutoff:
            return [first, self.sample()], f"slower than {cutoff:.3g} s: two samples"
        samples: list[float] = []
        while len(samples) < MIN_SAMPLES or (sum(samples) < MIN_SECONDS and len(samples) < MAX_SAMPLES):
            samples.append(self.sample())
        return samples, ""

    def outputs(self, case: Case, poison: int | None = None) -> dict[int, np.ndarray]:
        """Run once and read all outputs as bytes."""
        self.fill(case, poison)
        self.run(case)
        return {slot: self.bench.buffers[slot].read()[0].copy() for slot in self.binary.outputs}


def compile_outcome(bench: Bench, schedule: Schedule) -> tuple[str, Binary | None, float, str]:
    """(verdict, binary, compile seconds, detail) of compiling a candidate. Raises OSError or sqlite3.Error."""
    started, binary = time.perf_counter(), None
    verdict, detail = "ok", ""
    try:
        binary = bench.compile(schedule, 0 if schedule in bench.baseline_schedules else MAX_UOPS)
    except IllegalAction as error:
        verdict, detail = "illegal", str(error)[:200]
    except OverflowError as error:
        verdict, detail = "too_big", str(error)[:200]
    except (OSError, sqlite3.Error):  # no compiler, a full disk, a broken cache: no candidate's fault
        raise
    except Exception as error:  # the compiler's own errors have no common base: each is this candidate's verdict
        verdict, detail = "compile_failed", f"{type(error).__name__}: {str(error)[:200]}"
    return verdict, binary, time.perf_counter() - started, detail
