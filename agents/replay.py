"""A replay: the last sequences that were played, for agents that learn from samples of them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import numpy as np

from agents.checkpoint import CheckpointError
from agents.returns import known_steps
from agents.rollout import Rollout


class Replay:
    """The last sequences, one a row [N, X] float32: a sample is then one copy to the device, not one for each field."""

    def __init__(self, capacity: int, shapes: Mapping[str, tuple[int, ...]]):
        self.shapes, self.added = shapes, 0  # sequences that were ever added
        self.rows = np.zeros((capacity, sum(math.prod(shape) for shape in shapes.values())), np.float32)

    def __len__(self) -> int:
        return min(self.added, len(self.rows))

    def add(self, rollout: Rollout) -> None:
        """Every environment's sequence, over the oldest ones."""
        B = rollout.action.shape[1]
        known = {"weight": known_steps(rollout.terminated, rollout.ended), "hidden": rollout.hidden[None]}  # [1, B, 2H]
        columns = vars(rollout) | known
        parts = [np.moveaxis(columns[name], 1, 0).reshape(B, -1) for name in self.shapes]  # [T, B, ...] -> [B, T ...]
        self.rows[(self.added + np.arange(B)) % len(self.rows)] = np.concatenate(parts, axis=1)
        self.added += B

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """[count, X], each drawn from all with replacement."""
        return self.rows[rng.integers(len(self), size=count)]

    # Nearly all action features are 0 (on kernels 98%): compressed, hundreds of megabytes are a few.

    def deflated(self) -> np.ndarray:
        """The filled rows, as compressed bytes."""
        return np.frombuffer(zlib.compress(self.rows[: len(self)].tobytes(), 1), np.uint8)

    def inflated(self, data: np.ndarray, added: int) -> np.ndarray:
        """The filled rows of a replay of this layout to which `added` sequences were added. Raises CheckpointError."""
        shape = min(added, len(self.rows)), self.rows.shape[1]
        size = 4 * math.prod(shape)
        try:
            raw = zlib.decompressobj().decompress(data.tobytes(), size + 1)  # no more, whoever wrote the checkpoint
        except zlib.error as error:
            raise CheckpointError(f"the replay is damaged ({error})") from error
        if len(raw) != size:
            raise CheckpointError(f"the replay has {len(raw)} bytes or more, expected {size}")
        return np.frombuffer(raw, np.float32).reshape(shape)

    def load(self, rows: np.ndarray, added: int) -> None:
        self.added = added
        self.rows[: len(rows)] = rows
