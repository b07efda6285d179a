"""A network's parameters in one flat vector.

One vector rather than a dozen tensors: clipping and Adam are then a few kernels instead of dozens, and a captured JIT takes
the parameters of any network as one input."""

from __future__ import annotations

import copy
import math
from typing import Self

import numpy as np
from tinygrad import Tensor

from agents.jitcache import upload

ALIGN = 16  # floats; lets every slot of the vector be read in whole vectors
Shapes = dict[str, tuple[int, ...]]


def slots(shapes: Shapes) -> tuple[dict[str, tuple[int, int]], int]:
    """(name -> (start, end) in the vector, its length P). Each slot begins at a multiple of ALIGN; what lies between slots
    stays 0."""
    places, start = {}, 0
    for name, shape in shapes.items():
        places[name] = (start, start + math.prod(shape))
        start += -(-math.prod(shape) // ALIGN) * ALIGN
    return places, start


class Parameters:
    """The parameters of a network: names on the outside, one vector [P] within. A subclass sets `dims` and says what is
    `initial`, and what is computed."""

    dims: tuple[int, ...]  # all that tells its shape from another's of its kind

    def __init__(self, seed: int):
        self.shapes: Shapes = {name: array.shape for name, array in self.initial(None).items()}
        self.slots, self.size = slots(self.shapes)
        self._seed = seed
        self._theta: Tensor | None = None

    def initial(self, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        """Named arrays, float32, drawn from `rng`; without it their shapes alone mean something."""
        raise NotImplementedError

    @property
    def theta(self) -> Tensor:
        """All parameters [P]. Initial values are drawn when they are first asked for: a checkpoint's replace them before, and
        decompositions take seconds where another process keeps the other cores busy."""
        if self._theta is None:
            self._theta = upload(self.flatten(self.initial(np.random.default_rng(self._seed))))
        return self._theta

    @theta.setter
    def theta(self, vector: Tensor) -> None:
        self._theta = vector

    def flatten(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Named arrays -> [P] float32. Also serves for anything with a parameter's shape, such as Adam's
        moments."""
        parts = [
            np.pad(arrays[name].reshape(-1), (0, (start - end) % ALIGN)) for name, (start, end) in self.slots.items()
        ]
        return np.concatenate(parts).astype(np.float32)

    def unflatten(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """The opposite of `flatten`: views of a vector [P]."""
        return {name: vector[start:end].reshape(self.shapes[name]) for name, (start, end) in self.slots.items()}

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Name -> a view of theta."""
        return {name: self.theta[start:end].reshape(self.shapes[name]) for name, (start, end) in self.slots.items()}

    def gradient(self, loss: Tensor) -> Tensor:
        """d loss / d theta [P]. Each part is realized by itself: fused into one kernel they would be 100
        times slower."""
        parts = loss.gradient(*self.parameters.values())
        flat = [part.contiguous().reshape(-1) for part in parts]
        return Tensor.cat(*[part.pad((0, -part.shape[0] % ALIGN)) for part in flat])

    def bind(self, theta: Tensor) -> Self:
        """The same network over another parameter vector [P]."""
        other = copy.copy(self)
        other.theta = theta
        return other
