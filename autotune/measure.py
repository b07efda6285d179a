"""What a measurement is, as it happens inside the child process: inputs, verification, then timing.

Protocol 1. A candidate is run on several seeded inputs against the un-optimized kernel, with poisoned outputs and a
guard behind every buffer; only then is it timed: warm caches, all samples kept, the median ranks. Symbolic sizes take
tinygrad's middle value.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from autotune.compiler import (
    AxisType,
    Buffer,
    DType,
    Ops,
    Program,
    Renderer,
    compile_schedule,
    dtypes,
    hand_coded,
    read_buffer,
    renderer_of,
    write_buffer,
)
from autotune.errors import IllegalAction
from autotune.kernel import FLOATS, Kernel, Schedule

PROTOCOL = 1
SEEDS = (0, 1)  # inputs that each candidate is verified on; timing uses those of the first
GUARD = 64  # elements behind each buffer that no kernel may touch
MIN_SECONDS, MIN_SAMPLES, MAX_SAMPLES = 0.02, 3, 60  # of timing one candidate
DUEL_SECONDS, DUEL_MIN_ROUNDS, DUEL_MAX_ROUNDS = 0.25, 9, 101  # per competitor of an interleaved comparison
MAX_UOPS = (
    6000  # of a lowered kernel; BEAM stops at 3000, which shuts every good tile of a matmul with a fused GELU out
)
POISON = (
    0xFF,
    0x00,
)  # the byte that outputs hold before a run, by seed: NaN (or -1), then zeros. With either one alone an
#                      # element that is never written could look right: tiny numbers pass for the zeros of a padded edge
GUARD_BYTE = 0xA5
NUMPY = {dtypes.bool: np.bool_, dtypes.int8: np.int8, dtypes.uint8: np.uint8, dtypes.int16: np.int16,
         dtypes.uint16: np.uint16, dtypes.int32: np.int32, dtypes.uint32: np.uint32, dtypes.int64: np.int64,
         dtypes.uint64: np.uint64, dtypes.float16: np.float16, dtypes.bfloat16: np.uint16, dtypes.float32: np.float32,
         dtypes.float64: np.float64}  # fmt: skip
EPSILON = {dtypes.float16: 2.0**-10, dtypes.bfloat16: 2.0**-7, dtypes.float32: 2.0**-23, dtypes.float64: 2.0**-52}


@dataclass(frozen=True)
class Outcome:
    """What became of one candidate in the child."""

    verdict: str
    samples: list[float] = field(default_factory=list)  # seconds
    detail: str = ""


def make_input(dtype: DType, elements: int, seed: int, slot: int) -> np.ndarray:
    """Seeded contents of one buffer [elements]: ordinary values for seed 0, zeros, negatives and a wide range for others."""
    rng = np.random.default_rng([seed, slot, 7919])
    if dtype in FLOATS:
        values = rng.standard_normal(elements, dtype=np.float32)
        if seed:
            values *= np.exp2(rng.integers(-6, 4, elements)).astype(np.float32)
            values[rng.random(elements) < 0.1] = 0.0
        if dtype is dtypes.bfloat16:
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(NUMPY[dtype])
    if dtype is dtypes.bool:
        return rng.random(elements) < 0.5
    high = 100 if seed else 8
    low = 0 if dtypes.is_unsigned(dtype) or not seed else -2
    return rng.integers(low, high, elements).astype(NUMPY[dtype])


def as_float(values: np.ndarray, dtype: DType) -> np.ndarray:
    """Contents of a buffer as float64, whatever it holds."""
    if dtype is dtypes.bfloat16:
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)


def tolerance(dtype: DType, terms: int, reference: np.ndarray) -> float:
    """Largest difference that reordering a sum of `terms` may make, as a number to add to a relative part.

    Rounding errors of a reordered sum of n terms grow like sqrt(n) (random signs) on the scale of the partial sums,
    for which the largest finite output stands in. Integers and booleans must agree exactly.
    """
    if dtype not in EPSILON:
        return 0.0
    finite = np.abs(reference[np.isfinite(reference)])
    scale = float(finite.max()) if finite.size else 1.0
    return 16 * EPSILON[dtype] * math.sqrt(terms) * scale


def first_difference(output: np.ndarray, reference: np.ndarray, dtype: DType, terms: int) -> str | None:
    """A sentence on the worst wrong element, or None when all agree. NaN and infinities must stand where they stood."""
    got, want = as_float(output, dtype), as_float(reference, dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(got - want)
        allowed = tolerance(dtype, terms, want) + 64 * EPSILON.get(dtype, 0.0) * np.abs(want)
        same = (
            (got == want) | (np.isnan(got) & np.isnan(want)) | (error <= np.where(np.isfinite(allowed), allowed, 0.0))
        )
    if same.all():
        return None
    wrong = np.flatnonzero(~same)
    worst = int(wrong[np.nanargmax(np.where(np.isnan(error[wrong]), np.inf, error[wrong]))])
    return f"{len(wrong)} of {len(want)} elements differ, element {worst} is {got[worst]:g}, should be {want[worst]:g}"


class Bench:
    """One kernel set up for measuring on one device: buffers, seeded inputs, reference outputs, compiled candidates."""

    def __init__(self, kernel: Kernel, device: str):
        self.kernel, self.device = kernel, device
        self.renderer: Renderer = renderer_of(device)
        self.programs: dict[Schedule, Program] = {}
        self.loaded: dict[Schedule, Callable[..., float]] = {}
        nodes = kernel.ast.toposort()
        self.params = {u.arg.slot: u for u in nodes if u.op is Ops.PARAM and u.arg.slot >= 0}
        self.values = {name: (low + high) // 2 for name, (low, high) in kernel.variables.items()}
        self.terms = math.prod(int(u.vmax) + 1 for u in nodes if u.op is Ops.RANGE and u.arg[-1] is AxisType.REDUCE)
        self.buffers: dict[int, dict[int, Buffer]] = {}
        self.inputs: dict[int, dict[int, np.ndarray]] = {}
        self.reference: dict[int, dict[int, np.ndarray]] = {}

    def compile(self, schedule: Schedule, max_uops: int = 0) -> tuple[Program, float]:
        """(program, compile seconds); `max_uops` bounds the lowered kernel, 0 does not. Raises IllegalAction, OverflowError, or what the compiler raises."""
        started = time.perf_counter()
        if schedule not in self.programs:
            self.programs[schedule] = compile_schedule(self.kernel.ast, schedule, self.renderer, max_uops)
        return self.programs[schedule], time.perf_counter() - started

    def prepare(self) -> None:
        """Allocate buffers, and compute the reference outputs with the un-optimized kernel. Idempotent."""
        if self.reference:
            return
        plain, _ = self.compile(())
        for seed in SEEDS:
            self.inputs[seed] = {s: make_input(p.dtype, p.max_numel(), seed, s) for s, p in self.params.items()}
            self.buffers[seed] = {
                s: Buffer(self.device, p.max_numel() + GUARD, p.dtype).allocate() for s, p in self.params.items()
            }
            for slot in self.params:
                self._fill(seed, slot)
            self.reference[seed] = self._outputs_of((), seed, plain)

    def _fill(self, seed: int, slot: int, poisoned: bool = False) -> None:
        data = self.inputs[seed][slot]
        raw = (
            np.full(len(data) * data.itemsize, POISON[SEEDS.index(seed)], np.uint8) if poisoned else data.view(np.uint8)
        )
        guard = np.full(GUARD * data.itemsize, GUARD_BYTE, np.uint8)
        write_buffer(self.buffers[seed][slot], np.concatenate([raw, guard]).data)

    def _read(self, seed: int, slot: int) -> tuple[np.ndarray, bool]:
        """(contents, guard untouched)"""
        data = self.inputs[seed][slot]
        raw = np.empty((len(data) + GUARD) * data.itemsize, np.uint8)
        read_buffer(self.buffers[seed][slot], memoryview(raw.data))
        cut = len(data) * data.itemsize
        return raw[:cut].view(data.dtype), bool((raw[cut:] == GUARD_BYTE).all())

    def _run(self, schedule: Schedule, seed: int) -> float:
        if schedule not in self.loaded:
            self.loaded[schedule] = self.programs[schedule].load(self.device)
        return self.loaded[schedule](self.buffers[seed], self.values)

    def _outputs_of(self, schedule: Schedule, seed: int, program: Program) -> dict[int, np.ndarray]:
        """Run once on poisoned outputs (in-place buffers get their inputs back) and read them. Raises GuardTouched."""
        for slot in program.outputs:
            self._fill(seed, slot, poisoned=slot not in program.inputs)
        self._run(schedule, seed)
        outputs = {}
        for slot in self.params:
            contents, intact = self._read(seed, slot)
            if not intact:
                raise GuardTouched(f"wrote behind the end of buffer {slot} (inputs of seed {seed})")
            if slot in program.outputs:
                outputs[slot] = contents.copy()
            elif not np.array_equal(contents.view(np.uint8), self.inputs[seed][slot].view(np.uint8)):
                raise GuardTouched(f"changed its input buffer {slot} (inputs of seed {seed})")
        return outputs

    def verify(self, schedule: Schedule) -> str | None:
        """None when the candidate computes what the un-optimized kernel computes, else what is wrong."""
        self.prepare()
        program, _ = self.compile(schedule)
        for seed in SEEDS:
            try:
                outputs = self._outputs_of(schedule, seed, program)
            except GuardTouched as touched:
                return str(touched)
            if set(outputs) != set(self.reference[seed]):
                return f"writes buffers {sorted(outputs)}, should write {sorted(self.reference[seed])}"
            for slot, output in outputs.items():
                problem = first_difference(output, self.reference[seed][slot], self.params[slot].dtype, self.terms)
                if problem is not None:
                    return f"buffer {slot}, inputs of seed {seed}: {problem}"
        return None

    def sample(self, schedule: Schedule) -> float:
        """One timed run in seconds; in-place buffers are restored first, so that values cannot run away."""
        program = self.programs[schedule]
        for slot in set(program.outputs) & set(program.inputs):
            self._fill(SEEDS[0], slot)
        return self._run(schedule, SEEDS[0])

    def measure(self, schedule: Schedule, cutoff: float | None) -> Outcome:
        """Verify, then time. A candidate whose first run takes longer than `cutoff` seconds gets only two samples more."""
        wrong = self.verify(schedule)
        if wrong is not None:
            return Outcome("wrong_output", detail=wrong)
        first = self.sample(schedule)  # warm-up, not kept
        if cutoff is not None and first > cutoff:
            return Outcome("ok", [self.sample(schedule) for _ in range(2)], f"slower than {cutoff:.3g} s: two samples")
        samples: list[float] = []
        while len(samples) < MIN_SAMPLES or (sum(samples) < MIN_SECONDS and len(samples) < MAX_SAMPLES):
            samples.append(self.sample(schedule))
        return Outcome("ok", samples)

    def duel(self, schedules: Sequence[Schedule]) -> list[list[float]]:
        """Samples of each schedule in turn, A B C A B C ..., so that a drifting machine is fair to all."""
        self.prepare()
        for schedule in schedules:
            self.compile(schedule)
            self.sample(schedule)
        samples: list[list[float]] = [[] for _ in schedules]
        while len(samples[0]) < DUEL_MIN_ROUNDS or (
            min(map(sum, samples)) < DUEL_SECONDS and len(samples[0]) < DUEL_MAX_ROUNDS
        ):
            for own, schedule in zip(samples, schedules, strict=True):
                own.append(self.sample(schedule))
        return samples

    @functools.cache  # noqa: B019  (a Bench lives as long as its child has this kernel)
    def baseline_schedules(self) -> tuple[Schedule, Schedule]:
        """(un-optimized, hand-coded): always compiled, whatever their size"""
        return (), hand_coded(self.kernel.ast, self.renderer)


class GuardTouched(Exception):
    """A candidate wrote where it must not."""


def compile_outcome(bench: Bench, schedule: Schedule) -> tuple[str, str, float, str]:
    """(verdict, code hash, compile seconds, detail) of compiling a candidate."""
    try:
        program, seconds = bench.compile(schedule, 0 if schedule in bench.baseline_schedules() else MAX_UOPS)
    except IllegalAction as error:
        return "illegal", "", 0.0, str(error)[:200]
    except OverflowError as error:
        return "too_big", "", 0.0, str(error)[:200]
    except Exception as error:  # the compiler's own errors have no common base: each is this candidate's verdict
        return "compile_failed", "", 0.0, f"{type(error).__name__}: {str(error)[:200]}"
    return "ok", program.code_hash, seconds, ""
