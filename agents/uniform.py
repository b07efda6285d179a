"""Random: the agent that every other one has to beat."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from agents.learner import sample
from agents.networks import ILLEGAL
from agents.protocol import Observation
from agents.rollout import Action, Rollout


@dataclass(frozen=True)
class UniformConfig:
    """There is nothing to set."""


class Uniform:
    """Uniform over the legal actions. Values everything at 0, remembers nothing (hidden [n, 0]), learns nothing."""

    name = "random"

    def __init__(
        self,
        state_dim: int,
        n_actions: int,
        action_dim: int = 0,
        config: UniformConfig | None = None,
        seed: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
    ):
        """Only the seed is used; the rest is the signature of all agents."""
        self.config = config or UniformConfig()
        self.rng, self.updates = np.random.default_rng(seed), 0

    def initial_hidden(self, n: int) -> np.ndarray:
        return np.zeros((n, 0), np.float32)

    def value(self, observation: Observation, hidden: np.ndarray, reset: np.ndarray) -> np.ndarray:
        return np.zeros(len(observation.mask), np.float32)

    def act(self, observation: Observation, hidden: np.ndarray, reset: np.ndarray, temperature: float = 1.0) -> Action:
        """Temperature changes nothing, not even 0: among equals there is nothing to be greedy about."""
        mask = observation.mask
        log_probs = np.where(mask, -np.log(mask.sum(1, keepdims=True)), ILLEGAL).astype(np.float32)
        return Action(*sample(log_probs, self.rng), self.value(observation, hidden, reset), hidden)

    def update(self, rollout: Rollout) -> dict[str, float]:
        self.updates += 1
        return {}

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """No arrays; the random generator is all that the next action depends on."""
        return {}, {"updates": self.updates, "config": asdict(self.config), "rng": self.rng.bit_generator.state}

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        self.updates = int(meta["updates"])
        self.rng.bit_generator.state = meta["rng"]
