"""Implicit Q-learning (Kostrikov, Nair and Levine 2022): the best policy that a log supports, without ever asking
for the value of an action that is not in it."""

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
from agents.checks import check_fraction, check_inside, check_positive
from agents.jitcache import CachedJit
from agents.learner import LearnerConfig, NetworkAgent, Trained, to_tensors
from agents.logs import sequences
from agents.losses import taken, weighted_mean
from agents.networks import LSTMPolicy
from agents.returns import known_steps
from agents.rollout import Rollout

ACTOR_METRICS = ("policy_loss", "value_loss", "entropy", "advantage", "weight")
CRITIC_METRICS = ("critic_loss", "q")
CRITICS = ("critic1.", "critic2.")


@dataclass(frozen=True)
class IQLConfig(LearnerConfig):
    """Raises ValueError for a setting out of its range."""

    epochs: int = 4  # gradient steps of each part on one rollout
    expectile: float = 0.8  # tau: 0.5 is the value of who made the log, 1 that of the best actions in it
    beta: float = 3.0  # the paper's; how sharply the policy prefers good actions, 0 = it clones
    weight_clip: float = 100.0  # the paper's; largest weight of one action
    polyak: float = 0.005  # the paper's; share of the way that target critics go at each step
    value_coef: float = 1.0  # weight of V's loss beside the policy's, in the network that both share

    def __post_init__(self) -> None:
        super().__post_init__()
        check_inside(self, "expectile")
        check_fraction(self, "polyak")
        check_positive(self, "epochs", "weight_clip")


class Batch(NamedTuple):
    """Whole sequences of a log."""

    hidden: Tensor  # [B, 2H], before the first step
    state: Tensor  # [T, B, D]
    mask: Tensor  # [T, B, A] bool
    reset: Tensor  # [T, B], 1 where an episode begins
    action: Tensor  # [T, B] int32
    reward: Tensor  # [T, B]
    going: Tensor  # [T, B], 0 where terminated
    known: Tensor  # [T, B], 0 where the state that follows is not in the log
    uncut: Tensor  # [T, B], 0 where the episode was cut: no critic learns what the action taken there is worth
    actions: Tensor | None = None  # [T, B, A, F]


def expectile_loss(error: Tensor, tau: float) -> Tensor:
    """|tau - 1(u < 0)| u^2 (eq. 5): asymmetric least squares, whose minimiser goes from mean to maximum as tau goes
    from 1/2 to 1."""
    return (error < 0).where(1 - tau, tau) * error.square()


def actor_loss(
    log_probs: Tensor, value: Tensor, q: Tensor, batch: Batch, config: IQLConfig
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The scalar to minimise, and ACTOR_METRICS (eqs. 5 and 7; A = Q - V, through which no gradient flows in eq. 7).

        L = - mean min(exp(beta A), clip) log pi(a) + c_v mean |tau - 1(A < 0)| A^2,  means over uncut steps

    log_probs [T, B, A] over legal actions, value [T, B], q [T, B] of the actions taken.
    """
    advantage = q - value
    value_loss = weighted_mean(expectile_loss(advantage, config.expectile), batch.uncut)
    # the exponent is clipped, not its result: an infinity on the way would be one in the metrics too
    weight = (config.beta * advantage.detach()).minimum(float(np.log(config.weight_clip))).exp()
    policy_loss = -weighted_mean(weight * taken(log_probs, batch.action), batch.uncut)
    mean_entropy = networks.entropy(log_probs, batch.mask).mean()
    loss = policy_loss + config.value_coef * value_loss
    return loss, (policy_loss, value_loss, mean_entropy, advantage.mean(), weight.mean())


def critic_loss(q: Tensor, value: Tensor, batch: Batch, gamma: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The scalar to minimise, and CRITIC_METRICS: mean (r + gamma (1 - terminated) V(s') - Q(s, a))^2 (eq. 6) over the
    steps whose s' is known. q and value [T, B], of s."""
    following = value[1:].pad(((0, 1), (0, 0)))  # V(s') [T, B]; what stands where none is known has no weight
    target = (batch.reward + gamma * batch.going * following).detach()
    loss = weighted_mean((target - q).square(), batch.known)
    return loss, (loss, q.mean())


class IQL(NetworkAgent):
    """Learns from rollouts of any agent. The acting part's value head is V; each critic is a network of the same shape
    with Q(s, a) = value + logit of a, so that all its parameters serve."""

    name = "IQL"
    config: IQLConfig

    def __init__(
        self,
        state_dim: int,
        n_actions: int,
        action_dim: int = 0,
        config: IQLConfig | None = None,
        seed: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
    ):
        c = config or IQLConfig()
        super().__init__(state_dim, n_actions, action_dim, c, seed, cache_dir)
        modules = (losses, sys.modules[__name__])
        frozen = (c.expectile, c.beta, c.weight_clip, c.value_coef)
        actor = Trained(self.policy, self._actor_loss, ACTOR_METRICS, c, "iql-actor", frozen, modules, cache_dir)
        self.parts, self.targets = {"": actor}, {}
        for i, key in enumerate(CRITICS, 1):
            net = self.network(seed + i)
            critic = Trained(net, self._critic_loss, CRITIC_METRICS, c, "iql-critic", (c.gamma,), modules, cache_dir)
            self.parts[key], self.targets[key] = critic, Tensor(net.theta.numpy()).realize()
        self._follow = CachedJit(self._follow_fn, "polyak", (c.polyak,), modules, cache_dir)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Gradient steps of actor and critics. Returns the mean of ACTOR_METRICS and CRITIC_METRICS.

        Without a known successor is the last step of a chunk, and of an episode that was cut: the values that the
        rollout holds there are of another agent. From the first V and the policy still learn, since the critics know such
        steps from elsewhere; from the second nobody does.
        """
        r, c, start = rollout, self.config, sequences(rollout, self.config)
        going, uncut = (x.astype(np.float32) for x in (~r.terminated, ~r.ended | r.terminated))
        batch = to_tensors(*start, r.reward, going, known_steps(r.terminated, r.ended), uncut, r.actions)
        actor, critics = self.parts[""], [self.parts[key] for key in CRITICS]
        rows: tuple[list[Tensor], list[Tensor]] = [], []
        for _ in range(c.epochs):
            rows[0].append(actor.step(self.lr, [], [*self.targets.values(), *batch]))
            rows[1].extend([critic.step(self.lr, [], [self.policy.theta, *batch]) for critic in critics])
            for key, target in self.targets.items():
                self._follow(target, self.parts[key].policy.theta)
        self.updates += 1
        found = critics[0].means(critics[0].table(rows[1]))
        found["critic_gradient_norm"] = found.pop("gradient_norm")
        return found | actor.means(actor.table(rows[0]))

    def _actor_loss(
        self, policy: LSTMPolicy, coefs: Tensor, target1: Tensor, target2: Tensor, *batch: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        b = Batch(*batch)
        q = self._q(policy.bind(target1), b).minimum(self._q(policy.bind(target2), b)).detach()
        out = policy.unroll(b.state, b.mask, b.actions, b.hidden, b.reset)
        return actor_loss(networks.log_softmax(out.logits), out.value, q, b, self.config)

    def _critic_loss(
        self, policy: LSTMPolicy, coefs: Tensor, actor: Tensor, *batch: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        b = Batch(*batch)
        value = policy.bind(actor).unroll(b.state, b.mask, b.actions, b.hidden, b.reset).value.contiguous()
        return critic_loss(self._q(policy, b), value, b, self.config.gamma)

    @staticmethod
    def _q(critic: LSTMPolicy, b: Batch) -> Tensor:
        """Q(s, a) [T, B] of the actions taken."""
        out = critic.unroll(b.state, b.mask, b.actions, b.hidden, b.reset)
        return (out.value + taken(out.logits, b.action)).contiguous()

    def _follow_fn(self, target: Tensor, theta: Tensor) -> Tensor:
        """target <- target + polyak (theta - target), in place."""
        return target.assign(target + self.config.polyak * (theta - target)).realize()

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = super().state()
        for key, target in self.targets.items():
            arrays = self.policy.unflatten(target.numpy())
            tensors |= {f"{key}target/{name}": array.copy() for name, array in arrays.items()}
        return tensors, meta

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        shapes = self.policy.shapes
        check_shapes(tensors, {f"{key}target/{name}": s for key in CRITICS for name, s in shapes.items()}, self.name)
        super().load_state(tensors, meta)
        for key in CRITICS:
            arrays = {name: tensors[f"{key}target/{name}"] for name in shapes}
            self.targets[key] = Tensor(self.policy.flatten(arrays)).realize()
