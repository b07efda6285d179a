"""Ridge regression in closed form, its penalty chosen by leaving kernels out; and linear dynamics built on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PENALTIES = 10.0 ** np.arange(-9, 3)  # tried, as fractions of the mean eigenvalue of x'x
FOLDS = 5  # of kernels


def ridge(x: np.ndarray, y: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, float]:
    """w [D, T] = argmin |x w - y|^2 + p |w|^2 (Hoerl & Kennard 1970), and the best mean squared error on groups left out.

    x [N, D] and y [N, T] are centred by the caller; group [N] 0..K-1. All folds and penalties come from one Gram matrix
    each: x'x minus the fold's, decomposed once.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    fold = group % FOLDS
    parts = [(x[fold == f].T @ x[fold == f], x[fold == f].T @ y[fold == f]) for f in range(FOLDS)]
    gram, cross = sum(p[0] for p in parts), sum(p[1] for p in parts)
    scale = max(float(np.trace(gram)) / len(gram), 1e-12)
    errors = np.zeros(len(PENALTIES))
    for g, c in parts:
        values, vectors = np.linalg.eigh(gram - g)
        rotated = vectors.T @ (cross - c)
        for i, penalty in enumerate(PENALTIES):
            w = vectors @ (rotated / (np.maximum(values, 0.0) + penalty * scale)[:, None])
            errors[i] += ((g @ w - 2 * c) * w).sum()
    best = int(errors.argmin())
    w = np.linalg.solve(gram + PENALTIES[best] * scale * np.eye(len(gram)), cross)
    return w, float((errors[best] + (y * y).sum()) / max(1, y.size))


def principal(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and the leading axes [D, count] of x [N, D] (zero columns where x has fewer): principal components."""
    mean = x.mean(axis=0, dtype=np.float64)
    centred = x - mean
    vectors = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :count]
    return mean, np.pad(vectors, ((0, 0), (0, count - vectors.shape[1])))


@dataclass(frozen=True)
class Dynamics:
    """z' = z + W [1, a, z, (z - mean) P (x) (a - mean) Q]: bilinear in the leading components of embedding and action.

    What an action does to sums of log sizes is nearly linear in the action; where it does something else to another
    state, the product terms say so.
    """

    mean: np.ndarray  # [E + F]
    axes: np.ndarray  # [E, p] leading components of the embedding
    action_axes: np.ndarray  # [F, q] of the action
    weights: np.ndarray  # [1 + F + E + p * q, E]

    @staticmethod
    def fit(z: np.ndarray, action: np.ndarray, after: np.ndarray, group: np.ndarray, p: int, q: int) -> Dynamics:
        """From transitions z [N, E], action [N, F] -> after [N, E] of the kernels `group` [N]."""
        mean_z, axes = principal(z, p)
        mean_a, action_axes = principal(action, q)
        blank = Dynamics(np.concatenate([mean_z, mean_a]), axes, action_axes, np.zeros((0, 0)))
        weights, _ = ridge(blank._terms(z, action), after - z, group)
        return Dynamics(blank.mean, axes, action_axes, weights)

    @staticmethod
    def shapes(E: int, F: int, p: int, q: int) -> dict[str, tuple[int, ...]]:
        return {"mean": (E + F,), "axes": (E, p), "action_axes": (F, q), "weights": (1 + F + E + p * q, E)}

    def __call__(self, z: np.ndarray, action: np.ndarray) -> np.ndarray:
        """z [N, E], action [N, F] -> [N, E] float32. An action of zeros is none, and changes nothing."""
        moved = z + self._terms(z, action) @ self.weights
        return np.where(action.any(axis=1, keepdims=True), moved, z).astype(np.float32)

    def _terms(self, z: np.ndarray, action: np.ndarray) -> np.ndarray:
        E = z.shape[1]
        centred, act = z - self.mean[:E], action - self.mean[E:]
        product = (centred @ self.axes)[:, :, None] * (act @ self.action_axes)[:, None, :]
        return np.concatenate(
            [
                np.ones((len(z), 1)),
                act,
                centred,
                product.reshape(len(z), self.axes.shape[1] * self.action_axes.shape[1]),
            ],
            axis=1,
        )
