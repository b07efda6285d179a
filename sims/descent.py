"""The optimizer's loop around a captured training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from tinygrad import Context, Tensor

from agents.jitcache import upload
from sims.base import SimulatorError, check_learned
from sims.mlp import BETA1, BETA2
from sims.padding import grown


def cosine(t: int, total: int, final: float) -> float:
    """The part of a learning rate that is left at step t = 1 .. total: from 1 down to nearly `final` (Loshchilov & Hutter 2017)."""
    return final + (1 - final) * 0.5 * (1 + np.cos(np.pi * (t - 1) / total))


def hyper(rate: float, decay: float, t: int) -> np.ndarray:
    """What AdamW needs to know at step t = 1, 2, .. [4] float32; see `theta.adam`."""
    return np.array([rate, decay, 1 / (1 - BETA1**t), 1 / (1 - BETA2**t)], np.float32)


def descend(
    step: Callable[..., object], start: np.ndarray, data: Sequence[np.ndarray], batches: Iterable[Sequence[np.ndarray]],
    rates: Sequence[float], decay: float, losses: int, deadline: Callable[[], bool] | None = None,
) -> tuple[Tensor, np.ndarray]:  # fmt: skip
    """From `start` [M, P], a step for each of `rates`, or up to the one at which `deadline()` turns true: what was learned
    [M, P], and the losses of each step [steps, losses].

    `step(theta, m, v, row [losses], hyper [4], *batch, *data)` changes theta and Adam's moments in place, and fills the row;
    `data`, of which a batch says what is gathered, lies on the device (`grown`). Raises SimulatorError where there is no
    step, or where it diverged.
    """
    if not rates:
        raise SimulatorError("fit needs at least one step")
    rows = []
    with Context(BEAM=0, TRAINING=1):
        fixed = [Tensor(grown(a)).realize() for a in data]
        theta, m, v = (Tensor(a).realize() for a in (start, np.zeros_like(start), np.zeros_like(start)))
        for t, (rate, batch) in enumerate(zip(rates, batches, strict=False), 1):
            rows.append(upload(np.zeros(losses, np.float32)))
            step(theta, m, v, rows[-1], upload(hyper(rate, decay, t)), *(upload(a) for a in batch), *fixed)
            if deadline is not None and deadline():
                break
        table = np.stack([row.numpy() for row in rows])
    check_learned(table, theta.numpy())
    return theta, table
