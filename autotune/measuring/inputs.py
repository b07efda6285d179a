"""What a kernel is fed while it is verified: six cases, each with its own kind of numbers, poison and symbolic sizes, and one
more after it was timed.

integers   small positive ones: sums of products are exact, and any missing or doubled term changes them
negative   all below zero, rising: a maximum over padding would be zero, and one that misses the end is too small
edges      zeros of both signs, denormals, large values among magnitudes from 2^-6 to 2^4
nonfinite  infinities and NaN, where tinygrad defines what becomes of them
touched    the ordinary ones with a few elements drawn anew: what remembers inputs by a look at some of them goes wrong
ordinary   normal deviates; these are timed
retouched  as touched, other elements: whatever element is looked at, it is the ordinary one in one of the two
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from autotune.compiler import DType, Ops, UOp, dtypes
from autotune.kernel import FLOATS, Kernel

NUMPY = {dtypes.bool: np.bool_, dtypes.int8: np.int8, dtypes.uint8: np.uint8, dtypes.int16: np.int16,
         dtypes.uint16: np.uint16, dtypes.int32: np.int32, dtypes.uint32: np.uint32, dtypes.int64: np.int64,
         dtypes.uint64: np.uint64, dtypes.float16: np.float16, dtypes.bfloat16: np.uint16, dtypes.float32: np.float32,
         dtypes.float64: np.float64}  # fmt: skip
DIVISIONS = (Ops.CDIV, Ops.CMOD, Ops.FLOORDIV, Ops.FLOORMOD)
MIDDLE, LARGEST, SMALLEST = 0, 1, 2  # of `sizes_of`


@dataclass(frozen=True)
class Case:
    """One set of inputs. `poison` is the byte that outputs hold before a run: no value passes for all three of them."""

    name: str
    size: int
    poison: int


CASES = (Case("integers", LARGEST, 0xFF), Case("negative", MIDDLE, 0x00), Case("edges", SMALLEST, 0x5A),
         Case("nonfinite", MIDDLE, 0x00), Case("touched", MIDDLE, 0x5A), Case("ordinary", MIDDLE, 0xFF))  # fmt: skip
AFTERWARDS = Case("retouched", MIDDLE, 0x00)  # for programs that are right at first only
PERIOD = 262_139  # after so many elements floats repeat, to save time; a prime, so that no shift of a tile's size fits
TOUCHED = 0.02  # of the elements, and one at least


@dataclass(frozen=True)
class Rules:
    """What may be fed to a kernel without asking it for what it does not define."""

    nonfinite: bool  # False: what a NaN becomes is left open, by maxima, by comparisons of floats, by zeros that mask
    divides: bool  # by integers that it reads: zeros would stop the program
    addresses: frozenset[int]  # slots whose integers are used as addresses: wild ones may point anywhere
    positive: bool  # it takes the largest of roots or logarithms: whom a NaN pushes out depends on the order


def rules_of(kernel: Kernel) -> Rules:
    """What the operations of a kernel allow."""
    nodes = kernel.ast.toposort()
    ordered = any(
        (u.op in (Ops.MAX, Ops.CMPLT, Ops.CMPNE, Ops.CMPEQ) and u.src[0].dtype in FLOATS)
        or (u.op is Ops.REDUCE and u.arg[0] is Ops.MAX and u.dtype in FLOATS)
        for u in nodes
    )
    padded = _padded(nodes)
    masked = any(u.op is Ops.MUL and not padded.isdisjoint(u.src) for u in nodes)
    divides = any(u.op in DIVISIONS and _loads(u.src[1]) for u in nodes)
    addresses = {slot for u in nodes if u.op is Ops.INDEX for address in u.src[1:] for slot in _loads(address)}
    maxima = [u for u in nodes if u.op is Ops.REDUCE and u.arg[0] is Ops.MAX and u.dtype in FLOATS]
    positive = any(n.op in (Ops.SQRT, Ops.LOG2) for u in maxima for n in u.src[0].toposort())
    return Rules(not (ordered or masked), divides, frozenset(addresses), positive)


def _padded(nodes: Iterable[UOp]) -> set[UOp]:
    """The floats that may be a constant zero of a choice, such as a padding's: where a schedule makes the choice known,
    tinygrad folds zero times anything to zero, NaN included. `nodes` come in topological order."""
    found: set[UOp] = set()
    for u in nodes:
        zero = u.op is Ops.WHERE and any(s.op is Ops.CONST and s.val == 0 for s in u.src[1:])
        if u.dtype in FLOATS and (zero or (u.op is not Ops.INDEX and not found.isdisjoint(u.src))):
            found.add(u)
    return found


def _loads(u: UOp) -> set[int]:
    return {n.src[0].arg.slot for n in u.toposort() if n.op is Ops.INDEX and n.src[0].op is Ops.PARAM}


def sizes_of(kernel: Kernel) -> tuple[dict[str, int], ...]:
    """Values of the symbolic sizes: tinygrad's middle, all at their largest, all at their smallest."""
    limits = kernel.variables.items()
    return ({name: (low + high) // 2 for name, (low, high) in limits}, {name: high for name, (_, high) in limits},
            {name: low for name, (low, _) in limits})  # fmt: skip


def make_input(dtype: DType, elements: int, case: Case, rules: Rules, seed: int, slot: int) -> np.ndarray:
    """Seeded contents of one buffer [elements]; bfloat16 comes as its bits in uint16."""
    if case.name in ("touched", "retouched"):
        return _touched(dtype, elements, case, rules, seed, slot)
    rng = np.random.default_rng([seed, CASES.index(case), slot])
    if dtype is dtypes.bool:
        return rng.random(elements) < 0.5
    if dtype not in FLOATS:
        return _integers(rng, dtype, elements, case, rules, slot)
    values: np.ndarray = FLOAT_CASES[case.name](rng, min(elements, PERIOD), dtype)
    if elements > PERIOD:
        values = _negative(rng, elements, dtype) if case.name == "negative" else np.resize(values, elements)
    if rules.positive:
        values = np.abs(values)
    if case.name == "nonfinite" and rules.nonfinite:
        values[rng.integers(0, elements, 3)] = (np.inf, -np.inf, np.nan)
    if dtype is dtypes.bfloat16:
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(NUMPY[dtype])


def _touched(dtype: DType, n: int, case: Case, rules: Rules, seed: int, slot: int) -> np.ndarray:
    """The ordinary ones, where a few are those of another seed. No element is drawn anew in both cases, unless it is the
    only one."""
    rng = np.random.default_rng([seed, len(CASES), slot])
    draw = rng.random(min(n, PERIOD))
    first = np.resize(draw < TOUCHED, n)
    first[rng.integers(n)] = True
    first[0] &= n == 1 or not first.all()  # something must be left for the other case
    free = np.flatnonzero(~first) if n > 1 else np.zeros(1, int)
    second = np.resize(draw >= 1 - TOUCHED, n) & ~first
    second[free[rng.integers(len(free))]] = True
    where, other = (first, seed + 1) if case.name == "touched" else (second, seed + 2)
    ordinary, others = (make_input(dtype, n, CASES[-1], rules, own, slot) for own in (seed, other))
    return np.where(where, others, ordinary)


def _integers(rng: np.random.Generator, dtype: DType, n: int, case: Case, rules: Rules, slot: int) -> np.ndarray:
    low = 1 if rules.divides else 0 if dtypes.is_unsigned(dtype) or case.name == "ordinary" else -2
    values: np.ndarray = rng.integers(low, 8 if case.name == "ordinary" else 100, n).astype(NUMPY[dtype])
    if case.name == "edges" and not rules.divides and slot not in rules.addresses:
        limits = np.iinfo(values.dtype)
        extreme = np.array([limits.min, limits.max], values.dtype)
        values = np.where(rng.random(n) < 0.05, rng.choice(extreme, n), values)
    return values


def _ordinary(rng: np.random.Generator, n: int, dtype: DType) -> np.ndarray:
    return rng.standard_normal(n, dtype=np.float32)


def _small_integers(rng: np.random.Generator, n: int, dtype: DType) -> np.ndarray:
    return rng.integers(1, 4 if dtype is dtypes.float16 else 32, n).astype(np.float32)


def _negative(rng: np.random.Generator, n: int, dtype: DType) -> np.ndarray:
    return -2.0 + (np.arange(n) + np.resize(rng.random(min(n, PERIOD)) / 2, n)) / n


def _edges(rng: np.random.Generator, n: int, dtype: DType) -> np.ndarray:
    """One at least of each strange value, or as many as there is room for."""
    values = rng.standard_normal(n) * np.exp2(rng.integers(-6, 5, n))
    values[rng.random(n) < 0.1] = 0.0
    tiny, large = DENORMAL.get(dtype, 1e-40), 256.0 if dtype is dtypes.float16 else 65536.0
    strange = np.array([0.0, -0.0, tiny, -tiny, large, -large])
    count = max(len(strange), n // 50)
    values[rng.permutation(n)[:count]] = np.resize(strange, min(count, n))
    return values


DENORMAL = {dtypes.float16: 1e-7, dtypes.float64: 1e-310}
FLOAT_CASES = {
    "integers": _small_integers,
    "negative": _negative,
    "edges": _edges,
    "nonfinite": _ordinary,
    "ordinary": _ordinary,
}
