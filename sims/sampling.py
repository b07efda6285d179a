"""Batches of fixed shape for a pairwise loss: G kernels of R rows each, for all members at once, in numpy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sims.base import TrainingRows


def bootstrap(rows: TrainingRows, members: int, rng: np.random.Generator) -> np.ndarray:
    """How often each member drew each kernel: [M, K] int64 (Efron 1979, as many units drawn as there are).

    Never rows: rows of one kernel leak into each other. A member left with one distinct unit is drawn again.
    """
    total = int(rows.unit.max()) + 1
    counts = np.zeros((members, total), np.int64)
    for member in range(members):
        while (counts[member] > 0).sum() < 2:
            counts[member] = rng.multinomial(total, np.full(total, 1.0 / total))
    return counts[:, rows.unit]


class BatchSampler:
    """Draws row indices [M, G * R]. No masks: a kernel with fewer than R rows repeats them, and a row paired
    with its own copy has no time difference, so it adds nothing to the rank loss.
    """

    def __init__(self, rows: TrainingRows, counts: np.ndarray, kernels: int, rows_per_kernel: int, fast_bias: float):
        """Kernels are drawn by counts * min(size, R). Inside a kernel the row at quantile q (0 fastest) has
        weight exp(-fast_bias * q).
        """
        self._rows, self._g, self._r = rows, kernels, rows_per_kernel
        weight = counts * np.minimum(rows.sizes, rows_per_kernel)
        self._kernel_cdf = np.cumsum(weight, axis=1) / weight.sum(axis=1, keepdims=True)  # [M, K]
        quantile = (np.arange(len(rows.kernel)) - rows.start[rows.kernel] + 0.5) / rows.sizes[rows.kernel]
        mass = np.cumsum(np.exp(-fast_bias * quantile))
        before = np.concatenate([[0.0], mass])[rows.start]  # [K + 1]
        inside = (mass - before[rows.kernel]) / np.diff(before)[rows.kernel]
        self._row_cdf = rows.kernel + inside  # [N], rising from k to k + 1 over the rows of kernel k

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """One batch: row indices [M, G * R] int64. Systematic sampling: one draw in each of R equal slices of
        the kernel's probability, so a batch is spread over fast and slow.
        """
        members = len(self._kernel_cdf)
        u = rng.random((members, self._g))
        kernel = np.stack(
            [np.searchsorted(cdf, row, side="right") for cdf, row in zip(self._kernel_cdf, u, strict=True)]
        )
        kernel = np.minimum(kernel, self._rows.kernels - 1)  # [M, G]
        inside = (np.arange(self._r) + rng.random((members, self._g, self._r))) / self._r
        row = np.searchsorted(self._row_cdf, kernel[..., None] + inside, side="right")
        row = np.clip(row, self._rows.start[kernel][..., None], self._rows.start[kernel + 1][..., None] - 1)
        return row.reshape(members, self._g * self._r)

    def batches(self, rng: np.random.Generator, features: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Endless (x [M, G * R, D], y [M, G * R]) float32 from standardised features [N, D] in the order of
        the rows.
        """
        while True:
            index = self.draw(rng)
            yield features[index], self._rows.target[index]
