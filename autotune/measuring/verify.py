"""Whether an output is right: per element, between two limits that come from the reference and its error bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autotune.compiler import DType, dtypes
from autotune.measuring.inputs import NUMPY
from autotune.measuring.reference import EPSILON

BLOCK = 1 << 16  # elements at a time: temporaries that stay in the cache
SMALLEST_NORMAL = {
    dtypes.float16: 2.0**-14,
    dtypes.bfloat16: 2.0**-126,
    dtypes.float32: 2.0**-126,
    dtypes.float64: 2.0**-1022,
}


def values_of(raw: np.ndarray, dtype: DType) -> np.ndarray:
    """A buffer's bytes as numbers that numpy can compare: bfloat16 becomes float32."""
    if dtype is dtypes.bfloat16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype is dtypes.bool:  # a byte that is neither 0 nor 1 is no boolean: compare it as it is
        return raw.view(np.uint8)
    return raw.view(NUMPY[dtype])


@dataclass
class Expected:
    """What one output buffer should hold in one case: limits for each element, and where nothing may be written.

    `plain` gives the un-optimized kernel's own output, which is right by definition; it is asked for only where an
    element lies outside its limits (overflow in between has another outcome in float64).
    """

    dtype: DType
    low: np.ndarray
    high: np.ndarray
    is_nan: np.ndarray | None
    unwritten: np.ndarray | None
    poison: int
    plain: Callable[[], np.ndarray]

    def problem(self, raw: np.ndarray) -> str | None:
        """A sentence on the worst wrong element of an output, or None."""
        got = values_of(raw, self.dtype)
        good = (self.low <= got) & (got <= self.high)
        if self.is_nan is not None:
            good |= np.isnan(got) & self.is_nan
        if self.unwritten is not None:
            good = np.where(self.unwritten, holds(raw, self.dtype.itemsize, self.poison), good)
        if good.all() or (good := good | self._as_plain(got)).all():
            return None
        return self._sentence(got, np.flatnonzero(~good))

    def _as_plain(self, got: np.ndarray) -> np.ndarray:
        plain = values_of(self.plain(), self.dtype)
        if self.dtype not in EPSILON:
            return np.zeros(len(got), bool) if self.unwritten is None else (got == plain) & ~self.unwritten
        with np.errstate(all="ignore"):
            room = np.nan_to_num(self.high.astype(np.float64) - self.low, nan=0.0, posinf=0.0) / 2
            near = (np.abs(got.astype(np.float64) - plain) <= room) & np.isfinite(plain)
        same = near | (got == plain) | (np.isnan(got) & np.isnan(plain))
        return same if self.unwritten is None else same & ~self.unwritten

    def _sentence(self, got: np.ndarray, wrong: np.ndarray) -> str:
        with np.errstate(all="ignore"):
            want = self.low[wrong].astype(np.float64) / 2 + self.high[wrong].astype(np.float64) / 2
            error = np.abs(got[wrong].astype(np.float64) - want)
        worst = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
        at, low, high = int(wrong[worst]), self.low[wrong[worst]], self.high[wrong[worst]]
        should = f"from {low:.9g} to {high:.9g}" if low != high else f"{low:.9g}"
        if self.unwritten is not None and self.unwritten[at]:
            should = "left alone"
        return f"{len(wrong)} of {len(got)} elements differ, element {at} is {got[at]:.9g}, should be {should}"


def expect(v: np.ndarray, bound: np.ndarray | None, dtype: DType, unwritten: np.ndarray | None, poison: int,
           plain: Callable[[], np.ndarray]) -> Expected:  # fmt: skip
    """Limits of an output from its float64 reference and error bound [elements]; without a bound it must be equal.

    The limits are rounded outward to the output's dtype. Where a bound is no number though the value is one, the largest
    of the other elements' stands in. A bound is widened by the result's own last rounding and by
    the smallest normal number, since a device may flush denormals.
    """
    if dtype not in EPSILON:
        unsure = np.zeros(len(v), bool) if bound is None else bound > 0
        lowest, highest = (0, 255) if dtype is dtypes.bool else (np.iinfo(v.dtype).min, np.iinfo(v.dtype).max)
        v = v.view(np.uint8) if dtype is dtypes.bool else v
        return Expected(dtype, np.where(unsure, lowest, v).astype(v.dtype), np.where(unsure, highest, v).astype(v.dtype),
                        None, unwritten, poison, plain)  # fmt: skip
    kind = np.float32 if dtype is dtypes.bfloat16 else NUMPY[dtype]
    low: np.ndarray = np.empty(len(v), kind)
    high = np.empty_like(low)
    known = np.zeros(1) if bound is None else bound[np.isfinite(bound)]
    unknown = float(known.max(initial=0.0)) if len(known) else math.inf  # infinity times zero on the way: 1 / inf, say
    for start in range(0, len(v), BLOCK):
        part = slice(start, start + BLOCK)
        low[part], high[part] = _limits(v[part], None if bound is None else bound[part], dtype, kind, unknown)
    is_nan = np.isnan(v)
    return Expected(dtype, low, high, is_nan if is_nan.any() else None, unwritten, poison, plain)


def _limits(
    v: np.ndarray, bound: np.ndarray | None, dtype: DType, kind: type, unknown: float
) -> tuple[np.ndarray, np.ndarray]:
    """Both limits, rounded outward to `kind` wherever they are apart. `unknown` stands in for a bound that is NaN."""
    with np.errstate(all="ignore"):
        room = np.zeros(len(v)) if bound is None else np.nan_to_num(bound, nan=unknown, posinf=math.inf)
        room = np.where(room > 0, room + EPSILON[dtype] / 2 * np.abs(v), 0.0)
        room += np.where((v != 0) & (np.abs(v) < 4 * SMALLEST_NORMAL[dtype]), 4 * SMALLEST_NORMAL[dtype], 0.0)
        room[~np.isfinite(v)] = 0.0
        low, high = (v - room).astype(kind), (v + room).astype(kind)
        low = np.where(room > 0, np.nextafter(low, kind(-np.inf)), low)
        return low, np.where(room > 0, np.nextafter(high, kind(np.inf)), high)


def holds(raw: np.ndarray, itemsize: int, byte: int) -> np.ndarray:
    """Which elements of a buffer's bytes are this byte over and over."""
    return raw.view(f"u{itemsize}") == int.from_bytes(bytes([byte] * itemsize), "little")


def unwritten_in(raw: np.ndarray, itemsize: int, again: Callable[[], np.ndarray], poison: int) -> np.ndarray | None:
    """Which elements still hold the poison of one run, and that of `again`, which uses 0x00; None where there are none."""
    if not (left := holds(raw, itemsize, poison)).any():
        return None
    left &= holds(again(), itemsize, 0x00)
    return left if left.any() else None


def formula_bound(values: np.ndarray, dtype: DType, terms: int) -> np.ndarray | None:
    """Where a kernel has no float64 reference: 16 eps sqrt(terms) of the largest finite output, and 64 eps of its own.

    Errors of a reordered sum of n terms grow like sqrt(n) on the scale of its partial sums, for which the largest
    output stands in. Integers and booleans must agree exactly (None).
    """
    if dtype not in EPSILON:
        return None
    finite = np.abs(values[np.isfinite(values)])
    scale = float(finite.max()) if finite.size else 0.0
    return 16 * EPSILON[dtype] * math.sqrt(terms) * scale + 64 * EPSILON[dtype] * np.abs(values)
