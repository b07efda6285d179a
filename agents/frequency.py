"""A frequency table: what was done at each step of the better episodes, whatever was seen there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from agents.checkpoint import CheckpointError, check_shapes
from agents.checks import check_least, check_positive, check_share
from agents.learner import sample
from agents.logs import whole_episodes
from agents.networks import ILLEGAL
from agents.protocol import Observation
from agents.rollout import Action, Rollout


@dataclass(frozen=True)
class FrequencyConfig:
    """Raises ValueError for a number out of its range."""

    steps: int = 32  # T of a rollout, for who collects them: several times as long as an episode
    limit: int = 64  # rows of the table; later steps of an episode share the last one
    elite: float = 0.25  # share of the recent episodes that is learned from
    window: int = 256  # returns that count as recent; long enough for a quantile, short enough to rise with the agent
    decay: float = 0.9  # of all counts, at each update: half is forgotten after 7, so a poor start does not stay
    prior: float = 0.5  # of each action, in episodes: what was never done stays possible

    def __post_init__(self) -> None:
        check_least(self, steps=1, limit=1, window=1)
        check_share(self, "elite", "decay")
        check_positive(self, "prior")


class Frequency:
    """pi(a | step) ~ count[step, a] + prior over the legal actions: the cross-entropy method (Rubinstein 1999) with
    one categorical distribution for each step, whose elite is counted with decay.

    It is blind but for the legality mask. The hidden state [n, 1] is the step of the episode. The value of everything
    is the mean of the recent returns.
    """

    name = "frequency"

    def __init__(
        self,
        state_dim: int,
        n_actions: int,
        action_dim: int = 0,
        config: FrequencyConfig | None = None,
        seed: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
    ):
        """Of a world it needs to know the number of actions only; the rest is the signature of all agents."""
        self.config = config or FrequencyConfig()
        self.rng, self.updates = np.random.default_rng(seed), 0
        self.counts = np.zeros((self.config.limit, n_actions))
        self.returns = np.zeros(0)  # of the recent episodes, the newest last

    # *** acting ***

    def initial_hidden(self, n: int) -> np.ndarray:
        return np.zeros((n, 1), np.float32)

    def value(self, observation: Observation, hidden: np.ndarray, reset: np.ndarray) -> np.ndarray:
        mean = self.returns.mean() if len(self.returns) else 0.0
        return np.full(len(observation.mask), mean, np.float32)

    def act(self, observation: Observation, hidden: np.ndarray, reset: np.ndarray, temperature: float = 1.0) -> Action:
        """Samples from the table at `temperature` (see agents.learner.sample); 0 takes the most frequent action."""
        step = hidden[:, 0] * (1 - reset)  # [B]
        weight = self.counts[np.minimum(step.astype(np.int64), self.config.limit - 1)] + self.config.prior  # [B, A]
        total = np.where(observation.mask, weight, 0).sum(1, keepdims=True)
        log_probs = np.where(observation.mask, np.log(weight / total), ILLEGAL).astype(np.float32)
        value = self.value(observation, hidden, reset)
        return Action(*sample(log_probs, self.rng, temperature), value, (step + 1)[:, None].astype(np.float32))

    # *** learning ***

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Counts the actions of the elite among the whole episodes of a rollout. Episodes longer than a rollout are
        never whole; those not much shorter seldom are, so chunks should be several times as long as an episode."""
        c, episodes = self.config, whole_episodes(rollout)
        step, total, whole = episodes.at_steps()
        in_time = np.argsort(episodes.first + episodes.length, kind="stable")
        self.returns = np.concatenate([self.returns, episodes.total[in_time]])[-c.window :]
        self.counts *= c.decay
        bar = threshold(self.returns, c.elite) if len(self.returns) else 0.0
        elite = whole & (total >= bar)  # [T, B]
        np.add.at(self.counts, (np.minimum(step, c.limit - 1)[elite], rollout.action[elite]), 1.0)
        self.updates += 1
        return {
            "episodes": float(len(episodes.total)),
            "elite_episodes": float((episodes.total >= bar).sum()),
            "elite_return": bar,
            "mean_return": float(self.returns.mean()) if len(self.returns) else 0.0,
        }

    # *** resuming ***

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything that the next update depends on: named arrays, and meta data that is JSON."""
        tensors = {"counts": self.counts.copy(), "returns": self.returns.copy()}
        return tensors, {
            "updates": self.updates,
            "config": asdict(self.config),
            "rng": self.rng.bit_generator.state,
        }

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """The opposite of `state`. Raises CheckpointError where a shape differs; nothing is changed then."""
        check_shapes(tensors, {"counts": self.counts.shape}, self.name)
        returns = tensors.get("returns", np.zeros(0))
        if returns.ndim != 1 or len(returns) > self.config.window:
            raise CheckpointError(f"{self.name}: returns must be a vector of at most {self.config.window} numbers")
        self.counts, self.returns = tensors["counts"].astype(np.float64), returns.astype(np.float64)
        self.updates = int(meta["updates"])
        self.rng.bit_generator.state = meta["rng"]


def threshold(returns: np.ndarray, elite: float) -> float:
    """The return [N] -> () from which on an episode is of the best `elite` share.

    Where so many are equally bad that the worst would belong to it, the next better return: the elite is then smaller.
    """
    better = returns[returns > returns.min()]
    return float(max(np.quantile(returns, 1 - elite), better.min() if len(better) else returns.min()))
