"""Nets and trees together: they err in different ways, so a schedule that both believe in is seldom the error of one."""

from __future__ import annotations

import math

import numpy as np

from sims.bagged import Bagged, Deadline
from sims.base import SimulatorError, TrainingRows, check_state
from sims.ensemble import Ensemble, EnsembleConfig
from sims.trees import Trees, TreesConfig


class Committee(Bagged):
    """The members of an `Ensemble`, then those of `Trees`, fitted to the same trials."""

    def __init__(self, input_dim: int, nets: EnsembleConfig, trees: TreesConfig):
        """All members together have one spread, at the nets' `level`. Raises SimulatorError where the trees have another."""
        if trees.level not in (nets.level, TreesConfig.level):
            raise SimulatorError(f"TreesConfig.level ({trees.level}) is not used here: set EnsembleConfig.level")
        super().__init__(input_dim, nets.level)
        self.nets, self.trees = Ensemble(input_dim, nets), Trees(input_dim, trees)

    def learn(
        self, rows: TrainingRows, steps: int | None, deadline: Deadline | None
    ) -> tuple[np.ndarray, dict[str, float]]:
        """As in `Bagged`: `steps` and `deadline` are of the nets; the trees make the same share of theirs, and no more than all."""
        counts, told = self.nets.learn(rows, steps, deadline)
        share = min(1.0, told["steps"] / self.nets.config.steps)
        more, _ = self.trees.learn(rows, math.ceil(share * self.trees.config.rounds), None)
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
        """Take over what `state()` gave; another shape, a wrong name or a number that is none is a SimulatorError, and changes
        nothing."""
        nets = {k.removeprefix("nets."): v for k, v in state.items() if k.startswith("nets.")}
        trees = {k.removeprefix("trees."): v for k, v in state.items() if k.startswith("trees.")}
        rest = {k: v for k, v in state.items() if not k.startswith(("nets.", "trees."))}
        spread = check_state(rest, {"spread": (2,)})["spread"]
        Trees(self.input_dim, self.trees.config).load_state(trees)  # on trial, before the nets are changed
        self.nets.load_state(nets)
        self.trees.load_state(trees)
        self._load_spread(spread)
