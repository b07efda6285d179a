"""Masked, recurrent deep Q-learning: double (van Hasselt et al. 2016) and duelling (Wang et al. 2016), with a replay of
whole sequences and the memory that was stored at their beginning (R2D2: Kapturowski et al. 2019)."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from tinygrad import Tensor

from agents import losses
from agents.checkpoint import check_shapes
from agents.checks import check_fraction, check_least, check_share
from agents.jitcache import upload
from agents.learner import LearnerConfig, NetworkAgent, Trained, annealed, check_rollout
from agents.losses import taken, weighted_mean
from agents.networks import ILLEGAL, LSTMPolicy
from agents.protocol import Observation
from agents.replay import Replay
from agents.rollout import Rollout

METRICS = ("td_loss", "td_error", "q", "weight")


@dataclass(frozen=True)
class DQNConfig(LearnerConfig):
    """Raises ValueError for a number out of its range."""

    anneal_updates: int = 500  # epsilon must fall at some time; 0 would leave it at its start for ever
    lr: float = 3e-3  # FixedSequence in 12,800 steps: 0.93 in the mean of 3 seeds; with 1e-3 0.73
    lr_end: float = 3e-4  # not 0: what is found late must still be learned
    max_grad_norm: float = 10.0  # the Huber loss has bounded the errors already
    epsilon: float = 1.0  # share of uniform choices, at the start: the replay should begin with all that is legal
    epsilon_end: float = 0.05  # and at the end: an action that looks bad is tried again now and then
    epsilon_share: float = 0.8  # of anneal_updates is over when it has fallen; at 0.5 one of 4 toy runs missed its best
    replay: int = 32  # rollouts kept; each takes 4 T B (D + A (1 + F)) bytes and some, on kernels 11 MB
    save_replay: bool = True  # False: small checkpoints, but a resumed run differs from an uninterrupted one
    batch: int = 32  # sequences of a gradient step
    gradient_steps: int = 8  # for each rollout
    target_every: int = 4  # updates between two copies to the target network; after each one, CartPole is not learned

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, steps=2, replay=1, batch=1, gradient_steps=1, target_every=1)
        check_fraction(self, "epsilon", "epsilon_end")
        check_share(self, "epsilon_share")


class Batch(NamedTuple):
    """What one gradient step learns from: whole sequences."""

    hidden: Tensor  # [B, 2H], before the first step
    state: Tensor  # [T, B, D]
    mask: Tensor  # [T, B, A] bool
    reset: Tensor  # [T, B], 1 where an episode begins
    action: Tensor  # [T, B] int32
    reward: Tensor  # [T, B]
    terminated: Tensor  # [T, B] float32
    weight: Tensor  # [T, B], see agents.returns.known_steps
    actions: Tensor | None = None  # [T, B, A, F]


# *** the loss ***


def duelling(scores: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Q(s, a) = V(s) + A(s, a) - mean of A(s, .) over the legal actions (Wang et al. 2016, eq. 9); ILLEGAL elsewhere.

    scores, mask [..., A], value [...] -> [..., A]. A constant added to all scores changes nothing.
    """
    mean = mask.where(scores, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    return mask.where(value.unsqueeze(-1) + scores - mean, ILLEGAL)


def q_values(log_probs: np.ndarray, value: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`duelling` in numpy, of what NetworkAgent.evaluate returns: log-probabilities are scores less a constant."""
    mean = np.where(mask, log_probs, 0).sum(-1, keepdims=True) / mask.sum(-1, keepdims=True)
    return np.where(mask, value[..., None] + log_probs - mean, ILLEGAL)


def dqn_loss(q: Tensor, target_q: Tensor, batch: Batch, gamma: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The scalar to minimise, and METRICS (van Hasselt et al. 2016, eq. 4; with Huber's loss, as Mnih et al. 2015).

        y_t = r_t + gamma (1 - terminated_t) Q_target(s_{t+1}, argmax_a Q(s_{t+1}, a))
        L = sum w huber(y - Q(s, a)) / sum w;   huber(d) = d^2 / 2 if |d| <= 1, else |d| - 1/2

    q, target_q [T, B, A], illegal actions at ILLEGAL. No gradient flows through y.
    """
    following = taken(target_q, q.argmax(-1))[1:].pad(((0, 1), (0, 0)))  # [T, B], nothing known after the last step
    target = (batch.reward + gamma * (1 - batch.terminated) * following).detach()
    chosen = taken(q, batch.action)
    error = (target - chosen).abs()
    huber = (error <= 1).where(0.5 * error.square(), error - 0.5)
    loss, error, q_taken = (weighted_mean(x, batch.weight) for x in (huber, error, chosen))
    return loss, (loss, error, q_taken, batch.weight.mean())


# *** the replay ***


def closed(rollout: Rollout, gamma: float) -> Rollout:
    """The same, where a truncated step is an end that pays r + gamma V(s'), V as the agent saw it then. Without a target an action
    that a time limit always cuts would keep whatever value it happened to begin with, and steps before would learn from it."""
    # 0 but where truncated; what is over at that very step is worth nothing more
    reward = rollout.reward + np.float32(gamma) * rollout.bootstrap * ~rollout.terminated
    return replace(rollout, reward=reward, terminated=rollout.ended)


def layout(steps: int, dims: tuple[int, int, int], hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of what the row of one sequence holds, in Batch's order."""
    T, (D, A, F) = steps, dims
    each = {
        "state": (T, D),
        "mask": (T, A),
        **dict.fromkeys(("reset", "action", "reward", "terminated", "weight"), (T,)),
    }
    return {"hidden": (2 * hidden,), **each, **({"actions": (T, A, F)} if F else {})}


def unpack(rows: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Batch:
    """The sequences [B, X] of a replay, field by field."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = zip(shapes.items(), rows.split(sizes, dim=1), strict=True)
    fields = {name: part.reshape(-1, *shape) for (name, shape), part in parts}  # [B, T, ...]
    fields = {name: x if name == "hidden" else x.transpose(0, 1).contiguous() for name, x in fields.items()}
    return Batch(**fields | {"mask": fields["mask"] > 0.5, "action": fields["action"].cast("int32")})


# *** the agent ***


class DQN(NetworkAgent):
    """An LSTMPolicy whose logits are advantages and whose value is V. One seed gives one run."""

    name = "DQN"
    config: DQNConfig

    def __init__(
        self,
        state_dim: int,
        n_actions: int,
        action_dim: int = 0,
        config: DQNConfig | None = None,
        seed: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
    ):
        c = config or DQNConfig()
        super().__init__(state_dim, n_actions, action_dim, c, seed, cache_dir)
        sources = (losses, sys.modules[__name__])
        self.replay = Replay(c.replay * c.n_envs, layout(c.steps, self.dims, c.hidden))
        frozen = (c.steps, c.gamma)
        self.trained = Trained(self.policy, self._loss, METRICS, c, "dqn", frozen, sources, cache_dir)
        self.parts = {"": self.trained}
        self._copy_to_target()

    # *** acting ***

    @property
    def epsilon(self) -> float:
        """Share of uniform choices: linear from `epsilon` to `epsilon_end` over a share of the annealing."""
        c = self.config
        return annealed(c.epsilon, c.epsilon_end, self.updates, c.epsilon_share * c.anneal_updates)

    def evaluate(
        self, observation: Observation, hidden: np.ndarray, reset: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log-probabilities of softmax Q [B, A], whose argmax is Q's; max Q over the legal actions [B]; next hidden."""
        log_probs, value, hidden = super().evaluate(observation, hidden, reset)
        return log_probs, q_values(log_probs, value, observation.mask).max(1).astype(np.float32), hidden

    def behaviour(self, log_probs: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Epsilon-greedy: (1 - epsilon) [a = argmax Q] + epsilon / legal actions; [B, A]."""
        probability = self.epsilon * mask / mask.sum(1, keepdims=True)
        probability[np.arange(len(mask)), log_probs.argmax(1)] += 1 - self.epsilon
        out = np.full(mask.shape, ILLEGAL)
        return np.log(probability, out=out, where=probability > 0).astype(np.float32)

    # *** learning ***

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Adds a rollout to the replay, then takes gradient steps on samples. Returns METRICS averaged over them."""
        c, r = self.config, rollout
        check_rollout(r, c)
        self.replay.add(closed(r, c.gamma))
        lr, epsilon = self.lr, self.epsilon
        samples = (upload(self.replay.sample(self.rng, c.batch)) for _ in range(c.gradient_steps))
        table = self.trained.table([self.trained.step(lr, [], [self.target, sample]) for sample in samples])
        self.updates += 1
        if self.updates % c.target_every == 0:
            self._copy_to_target()
        return self.trained.means(table) | {
            "lr": lr,
            "epsilon": epsilon,
            "replay": float(len(self.replay)),
        }

    def start_from(self, other: NetworkAgent) -> None:
        """As any agent's; the target network begins there, too."""
        super().start_from(other)
        self._copy_to_target()

    def _copy_to_target(self) -> None:
        self.target = Tensor(self.policy.theta.numpy().copy()).realize()  # [P]

    def _loss(
        self, policy: LSTMPolicy, coefs: Tensor, target: Tensor, rows: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """theta is in `policy`, that of the target network in target [P], and sequences in rows [B, X]."""
        b = unpack(rows, self.replay.shapes)
        outs = [p.unroll(b.state, b.mask, b.actions, b.hidden, b.reset) for p in (policy, policy.bind(target))]
        q, target_q = (duelling(out.logits, out.value, b.mask).contiguous() for out in outs)
        return dqn_loss(q, target_q, b, self.config.gamma)

    # *** resuming ***

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """As NetworkAgent's, with the target network and, where the configuration says so, the replay."""
        tensors, meta = super().state()
        target = self.policy.unflatten(self.target.numpy())
        tensors |= {f"target/{name}": array.copy() for name, array in target.items()}
        if self.config.save_replay:
            tensors["replay"] = self.replay.deflated()
        return tensors, meta | {"replay_added": self.replay.added if self.config.save_replay else 0}

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """The opposite of `state`. Raises CheckpointError where a shape differs; nothing is changed then."""
        shapes, added = self.policy.shapes, int(meta["replay_added"])
        check_shapes(tensors, {f"target/{name}": shape for name, shape in shapes.items()}, self.name)
        replay = self.replay.inflated(tensors.get("replay", np.zeros(0, np.uint8)), added)
        super().load_state(tensors, meta)
        self.target = Tensor(self.policy.flatten({name: tensors[f"target/{name}"] for name in shapes})).realize()
        self.replay.load(replay, added)
