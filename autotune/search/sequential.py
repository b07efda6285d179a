"""The sequential variant (`sequential`): a model-free policy that sees of a schedule what the simulator of `guide.world` makes of
it, in place of the features. It acts on the exact dynamics, one action after another, as `policy` does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autotune.compiler import Renderer
from autotune.episodes import sample_episodes
from autotune.errors import UsageError
from autotune.guide import Guide
from autotune.kernel import Kernel
from autotune.search.policy import PolicySearch
from autotune.space import State


class SequentialSearch(PolicySearch):
    """Raises UsageError where the guide has no world, or its world no policy."""

    def __init__(self, kernel: Kernel, renderer: Renderer, seed: int, guide: Guide, root: State | None = None):
        super().__init__(kernel, renderer, seed, guide, root)
        if guide.world is None or guide.world.agent is None:
            raise UsageError(
                "this checkpoint holds no policy of a simulator's view: train one with sequential_updates above 0"
            )
        self.world, self.agent = guide.world, guide.world.agent

    def episodes(self, starts: Sequence[State], temperature: float | np.ndarray) -> list[list[State]]:
        return sample_episodes(self.agent, starts, self.rng, temperature, self.looked, self.world.view)
