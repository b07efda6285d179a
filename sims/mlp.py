"""The ensemble's network as functions of tensors, which keep nothing between calls (so their captured JITs
can be pickled). The members are the leading axis of every array: one matmul serves all, without a loop.

Parameters are a flat list [w0, b0, w1, b1, ...] with w [M, in, out] and b [M, 1, out]; at the end out = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from tinygrad import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's published defaults


@dataclass(frozen=True)
class LossShape:
    """The constants of the loss; they are frozen into a captured JIT."""

    kernels: int  # G: kernels in a batch
    rows: int  # R: rows of each kernel
    anchor: float  # 0: only differences within a kernel count; 1: the level of the kernel counts in full
    huber: float  # residual (log2 units) where the loss turns from squared to linear
    rank_coef: float  # weight of the pairwise loss
    gap: float  # log2 units: pairs closer than this say nothing


def initial(members: int, widths: list[int], rng: np.random.Generator) -> list[np.ndarray]:
    """He-normal weights (variance 2 / fan_in; He et al. 2015), a tenth of that last, zero biases: float32."""
    params: list[np.ndarray] = []
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
        scale = np.sqrt(2.0 / fan_in) * (0.1 if layer == len(widths) - 2 else 1.0)
        params.append((scale * rng.standard_normal((members, fan_in, fan_out))).astype(np.float32))
        params.append(np.zeros((members, 1, fan_out), np.float32))
    return params


def forward(params: list[Tensor], x: Tensor) -> Tensor:
    """x [M or 1, B, D] -> predicted log2 time [M, B]: matmuls with ReLU between.

    Each activation and each gradient of one is made contiguous, so that no matmul recomputes it in its inner
    loop (three times slower, seen in DEBUG=2).
    """
    h = x
    for layer in range(0, len(params), 2):
        h = (h @ params[layer] + params[layer + 1]).contiguous_backward()
        h = h.relu().contiguous().contiguous_backward() if layer < len(params) - 2 else h
    return h.squeeze(2).contiguous()


def loss_terms(predicted: Tensor, target: Tensor, shape: LossShape) -> tuple[Tensor, Tensor]:
    """Value and rank loss of each member, [M] and [M]; predicted and target are [M, G * R] log2 times.

    Value: e = p - y; e' = e - (1 - anchor) * mean_R(e); mean of Huber(e'), which is e'^2 / 2 for |e'| <= d
    and d * (|e'| - d / 2) beyond (Huber 1964). Rank: over the pairs of a kernel with y_i - y_j > gap, the
    mean of ln(1 + exp(-(p_i - p_j))) (RankNet; Burges et al. 2005).
    """
    p, y = (t.reshape(-1, shape.kernels, shape.rows) for t in (predicted, target))  # [M, G, R]
    error = p - y
    error = error - (1.0 - shape.anchor) * error.mean(axis=2, keepdim=True)
    small = error.abs().minimum(shape.huber)
    value = (small * (error.abs() - 0.5 * small)).mean(axis=(1, 2))
    slower = (y.unsqueeze(3) - y.unsqueeze(2) > shape.gap).float()  # [M, G, R, R]: i slower than j
    pairs = (p.unsqueeze(2) - p.unsqueeze(3)).softplus() * slower
    rank = pairs.sum(axis=(1, 2, 3)) / slower.sum(axis=(1, 2, 3)).maximum(1.0)
    return value, rank


def train_step(
    params: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    x: Tensor,
    y: Tensor,
    hyper: Tensor,
    shape: LossShape,
) -> Tensor:
    """One AdamW step of all members. The tensors of params, first (m) and second (v) are updated in place.

    x [M, B, D], y [M, B]; hyper [4] = learning rate, weight decay, 1 / (1 - beta1^t), 1 / (1 - beta2^t).
    m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; w <- w - lr (m^ / (sqrt(v^) + eps) + decay w)
    (Loshchilov & Hutter 2019; biases do not decay). Returns the members' mean losses [2] (value, rank).
    The gradient is of the SUM over members, so no member's step depends on the others.
    """
    value, rank = loss_terms(forward(leaves := [p.detach() for p in params], x), y, shape)
    grads = (value + shape.rank_coef * rank).sum().gradient(*leaves)
    rate, decay, unbias1, unbias2 = (hyper[i] for i in range(4))
    updates = []
    for i, (p, m, v, g) in enumerate(zip(params, first, second, grads, strict=True)):
        m_new, v_new = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
        move = m_new * unbias1 / ((v_new * unbias2).sqrt() + EPSILON)
        p_new = p - rate * (move + decay * p if i % 2 == 0 else move)
        updates += [m.assign(m_new), v.assign(v_new), p.assign(p_new)]
    loss = value.mean().stack(rank.mean())
    return loss.realize(*updates)
