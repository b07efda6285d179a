"""The diffusion simulator's net, as functions of tensors that keep nothing between calls (so their captured JITs can be
pickled): how a value is noised, the loss of the net that takes the noise away, and the way back.
"""

from __future__ import annotations

import numpy as np
from tinygrad import Tensor

from agents.parameters import ALIGN, Shapes

CLOCK = 3  # numbers that tell the net how noisy its input is


def kept(steps: int) -> np.ndarray:
    """How much of the signal's variance is left at noise steps 0..steps [steps + 1]: cos^2 (Nichol & Dhariwal 2021, eq. 17,
    not divided by its value at 0), at least 1e-4: nothing is divided by 0.
    """
    return np.maximum(np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2, 1e-4)


def clock(alpha: np.ndarray) -> np.ndarray:
    """[..., CLOCK] float32 from the part of the variance that is left."""
    return np.stack([np.sqrt(alpha), np.sqrt(1 - alpha), np.log(alpha / (1 - alpha)) / 8], axis=-1).astype(np.float32)


def parameter_shapes(widths: tuple[int, ...]) -> Shapes:
    shapes: Shapes = {}
    for i in range(len(widths) - 1):
        shapes |= {f"w{i}": (widths[i], widths[i + 1]), f"b{i}": (1, widths[i + 1])}
    return shapes


def initial(widths: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """theta [1, P] float32: He-normal weights, a tenth of that last, zero biases; as `mlp.initial`."""
    parts = []
    for name, shape in parameter_shapes(widths).items():
        scale = np.sqrt(2.0 / shape[0]) * (0.1 if name == f"w{len(widths) - 2}" else 1.0)
        values = np.zeros(shape) if name[0] == "b" else scale * rng.standard_normal(shape)
        parts.append(np.pad(values.reshape(-1), (0, -values.size % ALIGN)))
    return np.concatenate(parts).astype(np.float32)[None]


def clean_of(p: dict[str, Tensor], x: Tensor, given: Tensor, ticks: Tensor) -> Tensor:
    """The net's guess of the clean value [B, X] from a noisy one [B, X], what is given [B, I] and the clock [B, CLOCK].

    Matmuls with ReLU between; see `mlp.forward` for what is made contiguous, and why.
    """
    h, last = x.cat(given, ticks, dim=1), len(p) // 2 - 1
    h = h.pad((None, (0, p["w0"].shape[1] - h.shape[1]))).contiguous().unsqueeze(0)
    for i in range(last + 1):
        h = (h @ p[f"w{i}"] + p[f"b{i}"]).contiguous_backward()
        h = h.relu().contiguous().contiguous_backward() if i < last else h.contiguous()
    return h[0, :, : x.shape[1]]


def loss_of(
    p: dict[str, Tensor], clean: Tensor, given: Tensor, noise: Tensor, ticks: Tensor, time_coef: float
) -> Tensor:
    """Mean over rows of sum_j w_j (guess_j - clean_j)^2, the guess from sqrt(a) clean + sqrt(1 - a) noise; w is 1, and
    `time_coef` for the last number, the time. Both roots are the first of the clock's numbers.
    """
    x = (clean * ticks[:, :1] + noise * ticks[:, 1:2]).contiguous()
    error = (clean_of(p, x, given, ticks) - clean).square()
    return (error.sum(1) + (time_coef - 1.0) * error[:, -1]).mean()


def step_back(p: dict[str, Tensor], x: Tensor, given: Tensor, ticks: Tensor, coefs: Tensor) -> Tensor:
    """One step of DDIM without fresh noise (Song et al. 2021, eq. 12): a is kept at x [B, X], a' at the step after it.

    e = (x - sqrt(a) c) / sqrt(1 - a);  x' = sqrt(a') c + sqrt(1 - a') e, with the clean guess c. See `coefficients`.
    """
    return coefs[:1] * clean_of(p, x, given, ticks) + coefs[1:] * x


def coefficients(alpha: np.ndarray) -> np.ndarray:
    """[steps, 2] float32: the weights of c and of x in x', for the ways from kept[s] to kept[s - 1], last first; the last
    step goes to the clean value itself.
    """
    here, there = alpha[:0:-1], np.append(alpha[-2:0:-1], 1.0)
    ratio = np.sqrt((1 - there) / (1 - here))
    return np.stack([np.sqrt(there) - ratio * np.sqrt(here), ratio], axis=1).astype(np.float32)
