"""Masked recurrent PPO (Schulman et al. 2017)."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor

from agents import losses, networks
from agents.checks import check_fraction, check_least, check_positive
from agents.learner import LearnerConfig, NetworkAgent, Trained, check_rollout, to_tensors
from agents.losses import METRICS, Batch, ppo_loss
from agents.networks import LSTMPolicy
from agents.returns import explained_variance, gae
from agents.rollout import Rollout


@dataclass(frozen=True)
class PPOConfig(LearnerConfig):
    """Raises ValueError for a number out of its range."""

    lam: float = 0.95  # GAE's usual trade of bias for variance
    clip: float = 0.2  # the paper's; smaller is slower and safer
    epochs: int = 4  # passes over one rollout
    minibatches: int = 1  # split over environments, so that sequences stay whole
    entropy: float = 0.01  # weight of the entropy bonus, at the start
    entropy_end: float = 0.01  # and at the end of the annealing
    value_coef: float = 0.5  # weight of the value loss
    masked: bool = True  # False: illegal actions are offered, too, and end the episode, for control runs
    normalise_advantages: bool = True  # over the rollout: the step size must not depend on the reward's scale

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, steps=1, n_envs=1, hidden=1, epochs=1, minibatches=1)
        check_positive(self, "clip")
        check_fraction(self, "lam")
        if self.n_envs % self.minibatches:
            raise ValueError(f"n_envs ({self.n_envs}) must be a multiple of minibatches ({self.minibatches})")


class PPO(NetworkAgent):
    """An agent: parameters, Adam's state, a random generator. One seed gives one run."""

    name = "PPO"
    config: PPOConfig

    def __init__(
        self,
        state_dim: int,
        n_actions: int,
        action_dim: int = 0,
        config: PPOConfig | None = None,
        seed: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
    ):
        c = config or PPOConfig()
        super().__init__(state_dim, n_actions, action_dim, c, seed, cache_dir)
        sources = (losses, sys.modules[__name__])
        self.trained = Trained(self.policy, self._loss, METRICS, c, "ppo", (c.clip, c.value_coef), sources, cache_dir)
        self.parts = {"": self.trained}

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Epochs of clipped gradient steps on one rollout. Returns METRICS averaged over them, and
        `first_ratio_error`: max |r - 1| before any step, 0 unless acting and learning disagree on the policy."""
        c, r = self.config, rollout
        check_rollout(r, c)
        advantage = gae(r.reward, r.value, r.terminated, r.ended, r.last_value, c.gamma, c.lam, r.bootstrap)
        target = advantage + r.value
        if c.normalise_advantages:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        lr, table = self.lr, self._epochs(r, advantage, target)
        self.updates += 1
        return self.trained.means(table) | {
            "first_ratio_error": float(table[0, METRICS.index("ratio_error")]),
            "lr": lr,
            "explained_variance": explained_variance(r.value, target),
        }

    def _epochs(self, rollout: Rollout, advantage: np.ndarray, target: np.ndarray) -> np.ndarray:
        """All gradient steps of one update; metrics of each, [epochs * minibatches, M]."""
        c, rows = self.config, []
        whole = self._batch(rollout, advantage, target, np.arange(c.n_envs)) if c.minibatches == 1 else None
        for _ in range(c.epochs):
            for envs in np.split(self.rng.permutation(c.n_envs), c.minibatches):
                batch = whole or self._batch(rollout, advantage, target, envs)
                rows.append(self.trained.step(self.lr, [self.annealed(c.entropy, c.entropy_end)], batch))
        return self.trained.table(rows)

    @staticmethod
    def _batch(r: Rollout, advantage: np.ndarray, target: np.ndarray, envs: np.ndarray) -> list[Tensor]:
        """The environments `envs` of a rollout, in Batch's order."""
        arrays = (r.state, r.mask, r.reset, r.action, r.log_prob, advantage, target, r.actions)
        return to_tensors(r.hidden[envs], *[None if array is None else array[:, envs] for array in arrays])

    def _loss(self, policy: LSTMPolicy, coefs: Tensor, *batch: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        b = Batch(*batch)
        out = policy.unroll(b.state, b.mask, b.actions, b.hidden, b.reset)
        log_probs = networks.log_softmax(out.logits)
        return ppo_loss(log_probs, out.value, b, coefs[:1], self.config.clip, self.config.value_coef)
