"""Behaviour cloning of the best episodes known: masked maximum likelihood of what was done in them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tinygrad import Tensor

from agents import losses, networks
from agents.checkpoint import check_shapes
from agents.checks import check_positive, check_share
from agents.learner import LearnerConfig, NetworkAgent, Trained, to_tensors
from agents.logs import Group, groups, sequences, whole_episodes
from agents.losses import taken, weighted_mean
from agents.networks import LSTMPolicy
from agents.returns import gae
from agents.rollout import Rollout

METRICS = ("policy_loss", "value_loss", "entropy")


@dataclass(frozen=True)
class CloningConfig(LearnerConfig):
    """Raises ValueError for a setting out of its range."""

    epochs: int = 4  # gradient steps on one rollout
    weighting: str = "elite"  # or "exponential"
    elite: float = 0.1  # share of the episodes seen that is worth copying
    temperature: float = 1.0  # of the exponential weight, in units of return
    weight_clip: float = 20.0  # largest exponential weight: one lucky episode must not be all that is copied
    window: int = 4096  # episodes that are remembered, to know what is good
    value_coef: float = 0.5  # weight of the value loss; the value only serves those who look at it

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weighting not in ("elite", "exponential"):
            raise ValueError(f"weighting must be elite or exponential, not {self.weighting!r}")
        check_share(self, "elite")
        check_positive(self, "epochs", "temperature", "weight_clip", "window")


class Batch(NamedTuple):
    """Whole sequences of a log, and which of their steps to learn from."""

    hidden: Tensor  # [B, 2H], before the first step
    state: Tensor  # [T, B, D]
    mask: Tensor  # [T, B, A] bool
    reset: Tensor  # [T, B], 1 where an episode begins
    action: Tensor  # [T, B] int32
    weight: Tensor  # [T, B], of log pi(a)
    known: Tensor  # [T, B], 1 where the return is known: in whole episodes
    target: Tensor  # [T, B], for the value where known
    actions: Tensor | None = None  # [T, B, A, F]


def cloning_loss(
    log_probs: Tensor, value: Tensor, batch: Batch, value_coef: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The scalar to minimise, and METRICS: L = - sum w log pi(a) / sum w + c_v sum k (V - G)^2 / 2 / sum k.

    log_probs [T, B, A] over legal actions, value [T, B].
    """
    policy_loss = -weighted_mean(taken(log_probs, batch.action), batch.weight)
    value_loss = 0.5 * weighted_mean((value - batch.target).square(), batch.known)
    mean_entropy = networks.entropy(log_probs, batch.mask).mean()
    return policy_loss + value_coef * value_loss, (policy_loss, value_loss, mean_entropy)


def to_go(rollout: Rollout, gamma: float) -> np.ndarray:
    """Discounted sum of rewards from each step to the end of its episode [T, B]; true in whole episodes."""
    nothing = np.zeros_like(rollout.reward)
    return gae(rollout.reward, nothing, rollout.ended, rollout.ended, nothing[0], gamma, 1.0)


class Cloning(NetworkAgent):
    """Copies the best `elite` share of all episodes seen (the cross-entropy method, where it acts by itself: Rubinstein
    1999), or all in proportion to exp((G - mean) / temperature) (reward-weighted regression: Peters and Schaal 2007).

    `group` says which episodes are compared with each other; None: all with all.
    """

    name = "cloning"
    config: CloningConfig
    group: Group | None = None

    def __init__(
        self,
        state_dim: int,
        n_actions: int,
        action_dim: int = 0,
        config: CloningConfig | None = None,
        seed: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
    ):
        c = config or CloningConfig()
        super().__init__(state_dim, n_actions, action_dim, c, seed, cache_dir)
        self.returns = np.full(c.window, np.nan)  # of the last episodes seen; NaN: none yet
        self.groups = np.zeros(c.window, np.int64)
        modules = (losses, sys.modules[__name__])
        self.trained = Trained(self.policy, self._loss, METRICS, c, "cloning", (c.value_coef,), modules, cache_dir)
        self.parts = {"": self.trained}

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Gradient steps on the steps worth copying. Returns METRICS, `copied`, the share of such steps, and, once an
        episode was whole, `best`, the best return seen lately."""
        r, c, start = rollout, self.config, sequences(rollout, self.config)
        weight, known = self.weights(r)
        batch = to_tensors(*start, weight, known, to_go(r, c.gamma), r.actions)
        table = self.trained.table([self.trained.step(self.lr, [], batch) for _ in range(c.epochs)])
        self.updates += 1
        seen = self.returns[~np.isnan(self.returns)]
        metrics = self.trained.means(table) | {"copied": float((weight > 0).mean())}
        return metrics | ({"best": float(seen.max())} if len(seen) else {})

    def weights(self, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
        """How much each step is to be copied, and whether its episode is whole: both [T, B]. Remembers the returns."""
        episodes = whole_episodes(rollout)
        group = groups(rollout, episodes, self.group)
        self.returns = np.append(self.returns, episodes.total)[-self.config.window :]
        self.groups = np.append(self.groups, group)[-self.config.window :]
        known = episodes.number >= 0
        worth = np.append(self.worth(episodes.total, group), 0.0)  # the last one serves steps of no whole episode
        return worth[episodes.number].astype(np.float32), known.astype(np.float32)

    def worth(self, total: np.ndarray, group: np.ndarray) -> np.ndarray:
        """Weights [E] of episodes of these returns and groups, among all that are remembered."""
        c, total = self.config, total[:, None]
        peers = (group[:, None] == self.groups) & ~np.isnan(self.returns)  # [E, window]
        count = peers.sum(1).clip(1)
        if c.weighting == "elite":
            return ((peers & (self.returns > total)).sum(1) / count < c.elite).astype(np.float64)
        above = total[:, 0] - np.where(peers, self.returns, 0.0).sum(1) / count
        return np.exp(np.minimum(above / c.temperature, np.log(c.weight_clip)))

    def _loss(self, policy: LSTMPolicy, coefs: Tensor, *batch: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        b = Batch(*batch)
        out = policy.unroll(b.state, b.mask, b.actions, b.hidden, b.reset)
        return cloning_loss(networks.log_softmax(out.logits), out.value, b, self.config.value_coef)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = super().state()
        return tensors | {"seen/returns": self.returns.copy(), "seen/groups": self.groups.copy()}, meta

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        shape = (self.config.window,)
        check_shapes(tensors, {"seen/returns": shape, "seen/groups": shape}, self.name)
        super().load_state(tensors, meta)
        self.returns, self.groups = tensors["seen/returns"].copy(), tensors["seen/groups"].copy()
