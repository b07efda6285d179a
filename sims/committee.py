"""Nets and trees together: they err in different ways, so a schedule that both believe in is seldom the error of one."""

from __future__ import annotations

import math

import numpy as np

from sims.bagged import Bagged, Deadline
from sims.base import SimulatorError, TrainingRows
from sims.ensemble import Ensemble, EnsembleConfig
from sims.trees import Trees, TreesConfig


class Committee(Bagged):
    """The members of an `Ensemble`, then those of `Trees`, fitted to the same trials."""

    def __init__(self, input_dim: int, nets: EnsembleConfig, trees: TreesConfig):
        super().__init__(input_dim, nets.level)
        self.nets, self.trees = Ensemble(input_dim, nets), Trees(input_dim, trees)

    def learn(
        self, rows: TrainingRows, steps: int | None, deadline: Deadline | None
    ) -> tuple[np.ndarray, dict[str, float]]:
        """As in `Bagged`: `steps` are of the nets, the trees make the same share of theirs."""
        share = 1.0 if steps is None else steps / self.nets.config.steps
        counts, told = self.nets.learn(rows, steps, deadline)
        more, _ = self.trees.learn(rows, math.ceil(share * self.trees.config.rounds), deadline)
        return np.concatenate([counts, more]), told

    def predict_members(self, features: np.ndarray) -> np.ndarray:
        """features [N, D] -> each member's prediction [M, N] float32, the nets' first."""
        return np.concatenate([self.nets.predict_members(features), self.trees.predict_members(features)])

    def state(self) -> dict[str, np.ndarray]:
        """All that was learned, as arrays: those of the nets (nets.), of the trees (trees.), and the spread of both."""
        nets, trees = self.nets.state(), self.trees.state()
        named = {f"nets.{k}": v for k, v in nets.items()} | {f"trees.{k}": v for k, v in trees.items()}
        return named | {"spread": self._spread_state()}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state()` gave; another shape or a missing name is a SimulatorError."""
        if "spread" not in state or state["spread"].shape != (2,):
            raise SimulatorError("the state holds no spread of a committee")
        for prefix, part in (("nets.", self.nets), ("trees.", self.trees)):
            part.load_state({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        self._load_spread(state["spread"])
