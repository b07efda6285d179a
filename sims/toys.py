"""Synthetic kernels with a known truth: simulators are proved on these in seconds, with no compiler and no
device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sims.paths import Paths

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


OPS, DIRECTIONS, STATE = (
    4,
    3,
    6,
)  # ops of a toy path (the first changes nothing), what the others move, numbers of a state


@dataclass(frozen=True)
class PathWorld:
    """Toy paths with noise in their times, and truth [N, L + 1], the log2 times without."""

    paths: Paths
    truth: np.ndarray


def make_paths(
    kernels: int,
    rows: int,
    seed: int,
    noise: float = 0.05,
    context_matters: bool = False,
    steps: int = 4,
    null: float = 0.25,
) -> PathWorld:
    """log2 time = offset of the kernel + state . (w + context_matters * law(context)); state' = state + B action.

    An action row is [one-hot of the op, its amount in the op's own column]: the next state is linear in it. A fraction
    `null` of the actions is the op that changes nothing. With `context_matters` the sign of what a state costs stands in
    the kernel's tokens alone: it must be read there. Ends and roots are measured, and a third of what lies between. The
    law is the same for every seed.
    """
    law, rng = np.random.default_rng(4321), np.random.default_rng(seed)
    N = kernels * rows
    moves, cost = law.standard_normal((DIRECTIONS, STATE)), law.standard_normal(STATE)
    context = rng.standard_normal((kernels, 3, 5)).astype(np.float32)
    context[:, 1, 0] = sign = rng.choice([-1.0, 1.0], kernels)
    weight = np.where(context_matters, sign[:, None] * cost, np.broadcast_to(cost, (kernels, STATE)))
    kernel, length = np.repeat(np.arange(kernels), rows), rng.integers(1, steps + 1, N)
    op = np.where(rng.random((N, steps)) < null, 0, rng.integers(1, OPS, (N, steps)))
    inside = np.arange(steps) < length[:, None]
    amount = rng.uniform(0.5, 1.5, (N, steps)) * inside
    actions = np.concatenate(
        [np.eye(OPS)[op] * inside[..., None], np.eye(OPS)[op][..., 1:] * amount[..., None]], axis=2
    )
    start = rng.standard_normal((kernels, STATE))[kernel]
    states = np.concatenate([start[:, None], start[:, None] + np.cumsum(actions[..., OPS:] @ moves, axis=1)], axis=1)
    truth = (states * weight[kernel][:, None]).sum(-1) + 3.0 * rng.standard_normal(kernels)[kernel, None] - 12.0
    error = noise * rng.standard_normal((N, steps + 1))
    error[:, 0] = noise * rng.standard_normal(kernels)[kernel]  # the root of a kernel is measured once
    place = np.arange(steps + 1)
    measured = (place == 0) | (place == length[:, None]) | (rng.random((N, steps + 1)) < 1 / 3)
    log_time = np.where(measured & (place <= length[:, None]), truth + error, np.nan)
    return PathWorld(Paths(context, np.ones((kernels, 3), bool), kernel, actions, states, length, log_time), truth)
