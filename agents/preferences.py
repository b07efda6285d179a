"""Learning from which of two episodes was better, and from nothing else about their returns (but that the value, which shares the
policy's trunk, is fitted to them unless `value_coef` is 0).

A pairwise Bradley-Terry loss (Christiano et al. 2017, eq. 1 and the cross-entropy after it) on a score of each episode:
either the sum of a learned reward, from which PPO then learns, or the policy's own log-likelihood of what was done."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from tinygrad import Tensor

from agents import losses, networks, parameters
from agents.checks import check_positive
from agents.imitation import to_go
from agents.jitcache import CachedJit
from agents.learner import LearnerConfig, NetworkAgent, Trained, to_tensors
from agents.logs import Group, groups, sequences, whole_episodes
from agents.losses import taken, weighted_mean
from agents.networks import LSTMPolicy
from agents.ppo import PPO, PPOConfig
from agents.rollout import Rollout

REWARD_METRICS = ("loss", "accuracy", "score")
POLICY_METRICS = ("loss", "accuracy", "value_loss", "entropy")


@dataclass(frozen=True)
class PreferencePPOConfig(PPOConfig):
    """Raises ValueError for a setting out of its range."""

    reward_lr: float = 1e-3  # the reward's Adam, not annealed: it must keep up with the policy
    reward_epochs: int = 4  # its gradient steps on one rollout
    score_penalty: float = 1e-3  # of squared scores: pairs tell differences only, and sure ones for ever larger

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "reward_epochs")


@dataclass(frozen=True)
class PreferenceConfig(LearnerConfig):
    """Raises ValueError for a setting out of its range."""

    epochs: int = 4  # gradient steps on one rollout
    beta: float = 1.0  # of log pi in an episode's score; small: the policy may go far on one pair
    value_coef: float = 0.5  # weight of the value loss; the value only serves those who look at it

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "epochs", "beta")


class Pairs(NamedTuple):
    """Every column of a rollout beside every other one; each stands for its first whole episode."""

    inside: np.ndarray  # [T, B], 1 in that episode
    label: np.ndarray  # [B, B], 1 where the row's return is higher than the column's, 1/2 where both are equal, else 0
    valid: np.ndarray  # [B, B], 1 where both have an episode, and these may be compared


class Batch(NamedTuple):
    """Whole sequences of a rollout, and which of them are compared."""

    hidden: Tensor  # [B, 2H], before the first step
    state: Tensor  # [T, B, D]
    mask: Tensor  # [T, B, A] bool
    reset: Tensor  # [T, B], 1 where an episode begins
    action: Tensor  # [T, B] int32
    target: Tensor  # [T, B], return from here, true inside
    inside: Tensor  # [T, B], and the rest as in Pairs
    label: Tensor  # [B, B]
    valid: Tensor  # [B, B]
    actions: Tensor | None = None  # [T, B, A, F]


def pairs(rollout: Rollout, group: Group | None = None) -> Pairs:
    """All pairs of columns with comparable episodes (see agents.logs.Group). Of each pair both orders are there, which
    changes no mean."""
    episodes, B = whole_episodes(rollout), rollout.reward.shape[1]
    column, first = np.unique(episodes.column, return_index=True)  # the first episode of each column that has one
    episode, total, number = np.full(B, -1), np.zeros(B), np.zeros(B, np.int64)
    episode[column] = first
    total[column], number[column] = episodes.total[first], groups(rollout, episodes, group)[first]
    whole = episode >= 0
    label = (1 + np.sign(total[:, None] - total)) / 2
    valid = whole[:, None] & whole & (number[:, None] == number) & ~np.eye(B, dtype=bool)
    inside = whole & (episodes.number == episode)
    return Pairs(*(x.astype(np.float32) for x in (inside, label, valid)))


def bradley_terry(score: Tensor, label: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of scores [B]: P(i > j) = exp S_i / (exp S_i + exp S_j), and the mean over valid pairs of
    - y log P(i > j) - (1 - y) log P(j > i) = softplus(d) - y d,  d = S_i - S_j.  label y and valid: [B, B].

    Accuracy is the share of pairs that the scores order as the returns do; ties are left out.
    """
    difference = score.unsqueeze(1) - score
    loss = weighted_mean(difference.softplus() - label * difference, valid)
    right = ((difference > 0) == (label > 0.5)).float()
    return loss, weighted_mean(right, valid * (label != 0.5))


def reward_loss(reward: Tensor, batch: Batch, penalty: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The scalar to minimise, and REWARD_METRICS: Bradley-Terry on S = sum of rewards, plus penalty mean S^2.

    reward [T, B] of the actions taken."""
    score = (reward * batch.inside).sum(0)  # [B]
    loss, accuracy = bradley_terry(score, batch.label, batch.valid)
    return loss + penalty * score.square().mean(), (loss, accuracy, score.mean())


def preference_loss(
    log_probs: Tensor, value: Tensor, batch: Batch, config: PreferenceConfig
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The scalar to minimise, and POLICY_METRICS: Bradley-Terry on S = beta sum_t log pi(a_t | s_t), that is
    - log sigmoid(S_A - S_B) where A is preferred.

    This is contrastive preference learning (Hejna et al. 2024, section 3.2) without discount. To it comes c_v mean (V - G)^2 / 2.
    log_probs [T, B, A] over legal actions, value [T, B].
    """
    b = batch
    score = config.beta * (taken(log_probs, b.action) * b.inside).sum(0)  # [B]
    loss, accuracy = bradley_terry(score, b.label, b.valid)
    value_loss = 0.5 * weighted_mean((value - b.target).square(), b.inside)
    mean_entropy = networks.entropy(log_probs, b.mask).mean()
    return loss + config.value_coef * value_loss, (loss, accuracy, value_loss, mean_entropy)


def tensors(rollout: Rollout, config: LearnerConfig, group: Group | None) -> list[Tensor]:
    """The rollout in Batch's order."""
    start = sequences(rollout, config)
    return to_tensors(*start, to_go(rollout, config.gamma), *pairs(rollout, group), rollout.actions)


class PreferencePolicy(NetworkAgent):
    """A policy that makes the better one of two episodes the likelier one. `group`: which episodes are comparable."""

    name = "preferences"
    config: PreferenceConfig
    group: Group | None = None

    def __init__(
        self,
        state_dim: int,
        n_actions: int,
        action_dim: int = 0,
        config: PreferenceConfig | None = None,
        seed: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
    ):
        c = config or PreferenceConfig()
        super().__init__(state_dim, n_actions, action_dim, c, seed, cache_dir)
        frozen = (c.beta, c.value_coef)
        modules = (losses, sys.modules[__name__])
        self.trained = Trained(self.policy, self._loss, POLICY_METRICS, c, "preferences", frozen, modules, cache_dir)
        self.parts = {"": self.trained}

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Gradient steps on all pairs of one rollout. Returns the mean of POLICY_METRICS."""
        batch = tensors(rollout, self.config, self.group)
        table = self.trained.table([self.trained.step(self.lr, [], batch) for _ in range(self.config.epochs)])
        self.updates += 1
        return self.trained.means(table)

    def _loss(self, policy: LSTMPolicy, coefs: Tensor, *batch: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        b = Batch(*batch)
        out = policy.unroll(b.state, b.mask, b.actions, b.hidden, b.reset)
        return preference_loss(networks.log_softmax(out.logits), out.value, b, self.config)


class PreferenceReward:
    """A reward r(s, a) = value + logit of a, learned from preferences; they tell it up to a constant per episode."""

    def __init__(
        self, policy: LSTMPolicy, config: PreferencePPOConfig, cache_dir: str | os.PathLike[str] | None = None
    ):
        self.policy, self.config, modules = policy, config, (losses, sys.modules[__name__])
        frozen, name = (config.score_penalty,), "preference-reward"
        self.trained = Trained(policy, self._loss, REWARD_METRICS, config, name, frozen, modules, cache_dir)
        self._jit = CachedJit(self._rewards, f"{name}s", policy.dims, (networks, parameters, *modules), cache_dir)

    def learn(self, rollout: Rollout, group: Group | None = None) -> dict[str, float]:
        """Gradient steps on all pairs of one rollout. Returns the mean of REWARD_METRICS."""
        c, batch = self.config, tensors(rollout, self.config, group)
        table = self.trained.table([self.trained.step(c.reward_lr, [], batch) for _ in range(c.reward_epochs)])
        return self.trained.means(table)

    def relabel(self, rollout: Rollout) -> Rollout:
        """The same rollout with the learned reward [T, B] in place of the environment's."""
        inputs = to_tensors(*sequences(rollout, self.config), rollout.actions)
        return replace(rollout, reward=self._jit(self.policy.theta, *inputs).numpy().copy())

    def _rewards(
        self, theta: Tensor, hidden: Tensor, state: Tensor, mask: Tensor, reset: Tensor, action: Tensor,
        actions: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        out = self.policy.bind(theta).unroll(state, mask, actions, hidden, reset)
        return (out.value + taken(out.logits, action)).contiguous()

    def _loss(self, policy: LSTMPolicy, coefs: Tensor, *batch: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        b = Batch(*batch)
        reward = self._rewards(policy.theta, b.hidden, b.state, b.mask, b.reset, b.action, b.actions)
        return reward_loss(reward, b, self.config.score_penalty)


class PreferencePPO(PPO):
    """PPO that never sees the environment's reward: a learned one takes its place, learned from the same rollouts."""

    name = "preferences-reward"
    config: PreferencePPOConfig
    group: Group | None = None

    def __init__(
        self,
        state_dim: int,
        n_actions: int,
        action_dim: int = 0,
        config: PreferencePPOConfig | None = None,
        seed: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
    ):
        c = config or PreferencePPOConfig()
        super().__init__(state_dim, n_actions, action_dim, c, seed, cache_dir)
        self.reward = PreferenceReward(self.network(seed + 1), c, cache_dir)
        self.parts["reward."] = self.reward.trained

    def update(self, rollout: Rollout) -> dict[str, float]:
        """First the reward learns, then the policy. Returns PPO's metrics, and REWARD_METRICS after `reward_`."""
        found = self.reward.learn(rollout, self.group)
        return super().update(self.reward.relabel(rollout)) | {f"reward_{k}": v for k, v in found.items()}
