"""What a guide believes of a program's kernels, moved by all trials that were made of them: what fine-tuning practises with.

A search corrects its simulator so as well (`search/mixed.py`), one kernel at a time; here all of them ask in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autotune.data import Dataset
from autotune.guide import Guide, relative
from autotune.kernel import Kernel, Schedule
from autotune.memory import traits
from autotune.space import State, root_state
from sims.correction import Correction


class Corrected:
    """A guide's trees and what they get wrong of some kernels. They are not fitted again, which would take minutes."""

    def __init__(self, guide: Guide, kernels: Sequence[Kernel], data: Dataset):
        """`data` has trials of these kernels alone; without any, the guide is believed as it is."""
        self.guide = guide
        self.place = {kernel.key: i for i, kernel in enumerate(kernels)}
        roots = [root_state(kernel, data.renderer) for kernel in kernels]
        self.correction = self._learn(roots, data) if len(data) else None
        self._known: dict[tuple[str, Schedule], np.ndarray] = {}  # [M]

    def _learn(self, roots: Sequence[State], data: Dataset) -> Correction:
        kernel = np.array([self.place[s.kernel.key] for s in data.states])
        residual = data.arrays()[0][:, None] - self.guide.believed(data.states).T  # [K, M]
        return Correction(self.guide.leaves(data.states), kernel, residual, self._distance(roots))

    def _distance(self, roots: Sequence[State]) -> np.ndarray:
        """Between kernels [G, G]; without a memory, which knows by how much kernels differ, none hears of another."""
        if self.guide.memory is not None:
            return self.guide.memory.distance(np.stack([traits(root) for root in roots]))
        return np.where(np.eye(len(roots), dtype=bool), 0.0, np.inf)

    def members(self, states: Sequence[State]) -> np.ndarray:
        """Each tree member's log2 time relative to the kernel's un-optimized state, corrected [M, N]; remembered."""
        return relative(states, self._known, lambda missing: self.guide.believed(missing) + self._errors(missing))

    def _errors(self, states: Sequence[State]) -> np.ndarray:
        """What is to be added [M, N]."""
        if self.correction is None:
            return np.zeros((1, len(states)))
        return self.correction(self.guide.leaves(states), np.array([self.place[s.kernel.key] for s in states])).T
