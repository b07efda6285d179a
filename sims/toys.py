"""Synthetic kernels with a known truth: simulators are proved on these in seconds, with no compiler and no
device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WIDTH = 24  # features of a toy schedule


@dataclass(frozen=True)
class World:
    """Rows of many kernels: features [N, WIDTH], log_time [N] (log2 seconds) with noise, truth [N] without,
    group [N].
    """

    features: np.ndarray
    log_time: np.ndarray
    truth: np.ndarray
    group: np.ndarray


def make_world(kernels: int, rows: int, seed: int, noise: float = 0.1) -> World:
    """log2 time = offset of the kernel + smooth nonlinear function of the features + noise.

    The first third of the features describes the kernel (equal in all its rows) and interacts with the
    schedule's. The function is the same for every seed; kernels, schedules and noise are drawn anew.
    """
    law, rng = np.random.default_rng(1234), np.random.default_rng(seed)
    group = np.repeat(np.arange(kernels), rows)
    context = rng.standard_normal((kernels, WIDTH // 3))[group]
    features = np.concatenate([context, rng.standard_normal((kernels * rows, WIDTH - WIDTH // 3))], axis=1)
    inner = law.standard_normal((WIDTH, 12)) / np.sqrt(WIDTH)
    truth = np.tanh(2.0 * features @ inner + law.standard_normal(12)) @ law.standard_normal(12)
    offset = 4.0 * rng.standard_normal(kernels)[group] - 12.0
    return World(features.astype(np.float32), truth + offset + noise * rng.standard_normal(len(group)), truth, group)


def shuffled_within(world: World, seed: int = 0) -> np.ndarray:
    """The log times, shuffled among the rows of each kernel: what is left is the kernel, not the schedule."""
    rng, out = np.random.default_rng(seed), world.log_time.copy()
    for kernel in np.unique(world.group):
        rows = np.flatnonzero(world.group == kernel)
        out[rows] = out[rng.permutation(rows)]
    return out
