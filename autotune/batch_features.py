"""The summary of `features.py` for all states of a batch at once; the same numbers, in the same order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from autotune.compiler import AxisType
from autotune.features import IN_REGISTERS, KINDS, MAX_ACCESSES, REDUCES, VECTOR
from autotune.space import MAX_STEPS

if TYPE_CHECKING:
    from autotune.batch import Batch


def summary(batch: Batch) -> np.ndarray:
    """[B, S] float32"""
    walk = Walk(batch)
    parts = [
        batch.starts.kernel_part[batch.start],
        _tile_part(batch),
        _access_part(batch, walk),
        _traffic_part(batch, walk),
    ]
    return np.concatenate(parts, axis=1, dtype=np.float32, casting="same_kind")


def log2(value: np.ndarray) -> np.ndarray:
    return np.log2(1.0 + value) / 8.0


def _twos(size: np.ndarray) -> list[np.ndarray]:
    power = _power(size)
    return [np.log2(power) / 4.0, np.log2(size / power) / 2.0]


def _power(size: np.ndarray) -> np.ndarray:
    """The largest power of two that divides a whole number."""
    whole = size.astype(np.int64)
    return (whole & -whole).astype(float)


def _tile_part(batch: Batch) -> np.ndarray:
    """Sizes of the loop nest by kind, and of the innermost tile [B, ..]."""
    axes = batch.axes
    is_kind = np.stack([batch.of_kind(kind) for kind in KINDS], 1)  # [B, kinds, X]
    sizes = np.where(is_kind, axes.size[:, None], 1.0).prod(2)  # [B, kinds]
    upcast, unroll, reduce = (sizes[:, KINDS.index(k)] for k in (*IN_REGISTERS, AxisType.REDUCE))
    serial = batch.sizes(AxisType.WEAK, AxisType.GLOBAL, AxisType.REDUCE, AxisType.THREAD)
    padded = axes.size.prod(1, dtype=float) / batch.starts.iterations[batch.start]
    inner, registers = batch.of_kind(AxisType.REDUCE), batch.of_kind(*IN_REGISTERS)
    last = np.maximum(_first(registers[:, ::-1], axes.size[:, ::-1]), 1)  # of the register loops; 1 where there is none
    rest = [log2(serial), log2(upcast * unroll), np.log2(padded + 1), batch.no_locals, batch.depth / MAX_STEPS,
            batch.target("has_local"), reduce == 1, np.minimum(upcast, 64) / 64.0, np.minimum(unroll, 32) / 32.0,
            log2(_first(inner[:, ::-1], axes.size[:, ::-1])), log2(_first(inner, axes.size)),
            (axes.masked & registers).sum(1) / 2.0, axes.masked.sum(1) / 4.0,
            *_twos(upcast), *_twos(unroll), *_twos(last)]  # fmt: skip
    return np.concatenate([log2(sizes), is_kind.sum(2) / 4.0, np.stack(rest, 1)], 1)


def _first(where: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The first value along the axes [.., X] for which it holds [..]; 0 where it holds for none."""
    first = where.argmax(-1)[..., None]
    return (np.take_along_axis(values, first, -1) * np.take_along_axis(where, first, -1))[..., 0]


class Walk:
    """How the register tile of each state walks its memory, access by access."""

    def __init__(self, batch: Batch):
        self.stride = np.abs(batch.axes.strides).swapaxes(1, 2).copy()  # [B, K, X]
        self.moves = self.stride != 0
        self.registers = batch.of_kind(*IN_REGISTERS)[:, None]  # [B, 1, X]
        self.in_tile = self.moves & self.registers
        self.size = batch.axes.size[:, None].astype(float)  # [B, 1, X]
        self.touched = self.product(self.in_tile)  # [B, K]
        self.run = self._contiguous_run()  # [B, K]

    def product(self, where: np.ndarray) -> np.ndarray:
        """Of the sizes of some axes [B, K or 1, X]: [B, K or 1]."""
        return np.where(where, self.size, 1.0).prod(2)

    def _contiguous_run(self) -> np.ndarray:
        """As `features._contiguous_run`: shortest stride first, each must be what lies before it."""
        stride = np.where(self.in_tile, self.stride, np.inf)
        order = np.argsort(stride, axis=2, kind="stable")
        stride = np.take_along_axis(stride, order, 2)
        size = np.take_along_axis(np.where(self.in_tile, self.size, 1.0), order, 2)
        reach = np.cumprod(size, 2)  # elements up to and with each axis
        fits = np.logical_and.accumulate(stride * size == reach, 2)
        return np.where(fits, reach, 1.0).max(2, initial=1.0)


def _access_part(batch: Batch, walk: Walk) -> np.ndarray:
    """The first loads and stores inside the register tile: how many addresses, in how long contiguous runs [B, ..]."""
    K = min(MAX_ACCESSES, walk.touched.shape[1])
    size, stride, moves = walk.size, walk.stride[:, :K], walk.moves[:, :K]
    touched, run = walk.touched[:, :K], walk.run[:, :K]
    fixed = batch.starts.accesses[batch.start, :K]  # [B, K, 6]
    loops = ~walk.registers
    free = walk.product(walk.registers) / touched
    turning = batch.of_kind(AxisType.REDUCE, AxisType.WEAK, AxisType.GLOBAL, AxisType.LOCAL)[:, None] & (stride >= 0)
    step = _first(turning[..., ::-1], stride[..., ::-1])  # of the innermost loop
    shortest = np.where(walk.in_tile[:, :K], stride, np.inf).min(2)
    unit = _first(loops & (stride == 1), np.broadcast_to(size, stride.shape))
    lanes = walk.registers & (stride == 1)
    lane = np.maximum(_first(lanes, np.broadcast_to(size, stride.shape)), 1)
    place = _first(lanes, np.broadcast_to(walk.registers.cumsum(2), stride.shape))
    columns = [
        *(fixed[..., i] for i in range(4)), fixed[..., 4] / 8.0,
        log2(fixed[..., 5]), log2(touched), log2(free), log2(run), np.minimum(run, VECTOR) / VECTOR, log2(touched / run),
        log2(step), step == 0, step == 1, log2(walk.product(loops & moves)), log2(walk.product(loops & ~moves)), log2(unit),
        log2(np.where(np.isinf(shortest), 0, shortest)), *_twos(run), *_twos(lane), place / 4.0,
    ]  # fmt: skip
    found = np.stack(columns, 2) * fixed[..., :1]  # nothing where there is no access
    padded = np.concatenate([found, np.zeros((len(batch), MAX_ACCESSES - K, len(columns)))], 1)
    return padded.reshape(len(batch), MAX_ACCESSES * len(columns))


def _traffic_part(batch: Batch, walk: Walk) -> np.ndarray:
    """Totals over all accesses [B, ..]: loads per arithmetic tile, vectorisable share, footprint in the tile and its rows."""
    there, is_store, _, _, itemsize, elements = np.moveaxis(batch.starts.accesses[batch.start], 2, 0)  # [B, K] each
    inner = batch.of_kind(AxisType.REDUCE)[:, None] | walk.registers
    vectors = (there * walk.touched / np.minimum(walk.run, VECTOR)).sum(1)
    even_vectors = (there * walk.touched / np.minimum(_power(walk.run), VECTOR)).sum(1)
    stored = (is_store * walk.touched).sum(1)
    loads = (there * walk.touched).sum(1) - stored
    footprint = (itemsize * walk.product(inner & walk.moves)).sum(1)
    row = (itemsize * np.minimum(elements, walk.product(walk.moves))).sum(1)
    tile = walk.product(walk.registers)[:, 0]
    accumulators = np.where(batch.of_kind(*REDUCES).any(1), batch.sizes(AxisType.UPCAST), 0.0)
    return np.stack([log2(loads), log2(vectors), log2(stored), log2(tile / np.maximum(vectors, 1e-9)), log2(footprint), log2(row),
                     log2(accumulators), accumulators > 32, accumulators > 128, there.sum(1) / 4.0,
                     log2(even_vectors), log2(tile / np.maximum(even_vectors, 1e-9))], 1)  # fmt: skip
