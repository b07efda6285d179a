"""The jitted training step against a second implementation: plain numpy in float64, with its own
backpropagation.
"""

import numpy as np
import pytest
from tinygrad import Context, Tensor

from sims import mlp
from sims.ensemble import EnsembleConfig, _train_jit

SIZES = (5, 32, 64, 64, 1)  # what the fixture `small` uses: the capture is shared
HYPER = (1e-3, 0.5)  # learning rate, weight decay


def numpy_loss(p: np.ndarray, y: np.ndarray, s: mlp.LossShape) -> tuple[float, float, np.ndarray]:
    """Value, rank and d(value + rank_coef * rank)/dp for ONE member, p and y [G * R]; loops, float64."""
    value, rank, pairs, count = 0.0, 0.0, np.zeros_like(p), 0
    grad = np.zeros_like(p)
    for k in range(s.kernels):
        at = slice(k * s.rows, (k + 1) * s.rows)
        error = p[at] - y[at]
        error = error - (1 - s.anchor) * error.mean()
        inside = np.abs(error) <= s.huber
        value += np.where(inside, error**2 / 2, s.huber * (np.abs(error) - s.huber / 2)).sum() / len(p)
        slope = np.where(inside, error, s.huber * np.sign(error)) / len(p)
        grad[at] += slope - (1 - s.anchor) * slope.mean()
        for i in range(at.start, at.stop):
            for j in range(at.start, at.stop):
                if y[i] - y[j] > s.gap:
                    rank += np.log1p(np.exp(-(p[i] - p[j])))
                    push = 1 / (1 + np.exp(p[i] - p[j]))
                    pairs[i] -= push
                    pairs[j] += push
                    count += 1
    return value, rank / max(count, 1), grad + s.rank_coef * pairs / max(count, 1)


def numpy_step(
    w: list[np.ndarray],
    m: list[np.ndarray],
    v: list[np.ndarray],
    x: np.ndarray,
    y: np.ndarray,
    t: int,
    s: mlp.LossShape,
) -> tuple[float, float]:
    """One AdamW step of ONE member, in place; returns the losses before it."""
    z1 = x @ w[0] + w[1]
    h1 = np.maximum(z1, 0)
    z2 = h1 @ w[2] + w[3]
    h2 = np.maximum(z2, 0)
    value, rank, dp = numpy_loss((h2 @ w[4] + w[5])[:, 0], y, s)
    d3 = dp[:, None]
    d2 = d3 @ w[4].T * (z2 > 0)
    d1 = d2 @ w[2].T * (z1 > 0)
    grads = [
        x.T @ d1,
        d1.sum(0, keepdims=True),
        h1.T @ d2,
        d2.sum(0, keepdims=True),
        h2.T @ d3,
        d3.sum(0, keepdims=True),
    ]
    for i, g in enumerate(grads):
        m[i] = 0.9 * m[i] + 0.1 * g
        v[i] = 0.999 * v[i] + 0.001 * g * g
        decay = HYPER[1] * w[i] if w[i].shape[0] > 1 else 0.0  # weights only, not biases
        w[i] = w[i] - HYPER[0] * ((m[i] / (1 - 0.9**t)) / (np.sqrt(v[i] / (1 - 0.999**t)) + 1e-8) + decay)
    return value, rank


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_loss_equals_an_independent_numpy_computation() -> None:
    rng, s = np.random.default_rng(0), mlp.LossShape(3, 4, anchor=0.3, huber=0.5, rank_coef=0.7, gap=0.2)
    p, y = rng.standard_normal((2, 12)), 2 * rng.standard_normal((2, 12))
    with Context(BEAM=0):
        value, rank = (t.numpy() for t in mlp.loss_terms(Tensor(p.astype(np.float32)), Tensor(y.astype(np.float32)), s))
    for member in range(2):
        expected = numpy_loss(p[member], y[member], s)[:2]
        np.testing.assert_allclose([value[member], rank[member]], expected, atol=1e-5)


def test_loss_by_hand() -> None:
    """One kernel, two rows: y 0 and 2, p 0 and 1. Centred errors +-1/2; one pair, p_slow - p_fast = 1."""
    s = mlp.LossShape(1, 2, anchor=0.0, huber=1.0, rank_coef=1.0, gap=0.1)
    value, rank = mlp.loss_terms(Tensor([[0.0, 1.0]]), Tensor([[0.0, 2.0]]), s)
    assert value.item() == pytest.approx(0.125) and rank.item() == pytest.approx(np.log(1 + np.exp(-1)), abs=1e-6)


def test_four_jitted_steps_equal_numpy_for_every_member(small: EnsembleConfig) -> None:
    """Capture and three replays: in-place updates, Adam's moments, decay, and no leak between members."""
    rng, shape = np.random.default_rng(0), small.loss_shape
    start = mlp.initial(5, list(SIZES[1:]), rng)
    w, m, v = (
        [Tensor(a).realize() for a in arrays] for arrays in (start, [0 * a for a in start], [0 * a for a in start])
    )
    batches = [(rng.standard_normal((5, 256, 32)), rng.standard_normal((5, 256))) for _ in range(4)]
    jit, got = _train_jit(SIZES, shape), []
    with Context(BEAM=0, TRAINING=1):
        for t, (x, y) in enumerate(batches, 1):
            hyper = np.array([*HYPER, 1 / (1 - 0.9**t), 1 / (1 - 0.999**t)], np.float32)
            got.append(
                jit(*w, *m, *v, Tensor(x.astype(np.float32)), Tensor(y.astype(np.float32)), Tensor(hyper)).numpy()
            )
    expected = np.zeros((4, 2))
    for member in range(5):
        ours = [a[member].astype(np.float64) for a in start]
        first, second = [0 * a for a in ours], [0 * a for a in ours]
        for t, (x, y) in enumerate(batches):
            expected[t] += np.array(numpy_step(ours, first, second, x[member], y[member], t + 1, shape)) / 5
        for i, before in enumerate(start):  # norms: a ReLU at the edge may flip by rounding
            assert distance(m[i].numpy()[member], first[i]) < 2e-3
            assert distance(w[i].numpy()[member] - before[member], ours[i] - before[member]) < 2e-3
    np.testing.assert_allclose(got, expected, rtol=1e-4)
