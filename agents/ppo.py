"""Masked recurrent PPO (Schulman et al. 2017): acting, and one jitted step from a batch to new parameters."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tinygrad import Tensor

from agents import losses, networks
from agents.checkpoint import check_shapes
from agents.jitcache import cached_jit
from agents.losses import METRICS, Batch, ppo_loss
from agents.networks import LSTMPolicy
from agents.protocol import Observation
from agents.returns import explained_variance, gae
from agents.rollout import Action, Rollout


@dataclass(frozen=True)
class PPOConfig:
    steps: int = 8  # T of a rollout; schedules are rarely longer
    n_envs: int = 32  # B of a rollout; fixed, since another shape would mean another capture
    hidden: int = 128  # width of encoder and LSTM
    memory: bool = True  # False: the same net without LSTM, for control runs
    gamma: float = 1.0  # the return is a log-speedup: no reason to discount it
    lam: float = 0.95  # GAE's usual trade of bias for variance
    clip: float = 0.2  # the paper's; smaller is slower and safer
    epochs: int = 4  # passes over one rollout
    minibatches: int = 1  # split over environments, so that sequences stay whole
    lr: float = 3e-4  # Adam's, at the start
    lr_end: float = 0.0  # and at the end of the annealing
    entropy: float = 0.01  # weight of the entropy bonus, at the start
    entropy_end: float = 0.01  # and at the end of the annealing
    anneal_updates: int = 0  # updates over which both are annealed; 0 = never
    value_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # of the whole gradient; one lucky kernel must not wreck the policy
    normalise_advantages: bool = True  # over the rollout: the step size must not depend on the reward's scale
    adam_b1: float = 0.9  # Kingma and Ba 2015
    adam_b2: float = 0.999  # same
    adam_eps: float = 1e-5  # PPO's usual; 1e-8 lets tiny gradients take full steps


class Diverged(ArithmeticError):
    """An update produced a number that is not finite. The parameters are lost: go back to a checkpoint."""


class PPO:
    """An agent: parameters, Adam's state, a random generator. One seed gives one run."""

    def __init__(
        self,
        state_dim: int,
        n_actions: int,
        action_dim: int = 0,
        config: PPOConfig | None = None,
        seed: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
    ):
        self.config = c = config or PPOConfig()
        if c.n_envs % c.minibatches:
            raise ValueError("n_envs must be a multiple of minibatches")
        self.policy = LSTMPolicy(state_dim, n_actions, action_dim, c.hidden, seed, c.memory)
        self.rng = np.random.default_rng(seed)
        self.updates, self.adam_steps = 0, 0
        self.m, self.v = (Tensor(np.zeros(self.policy.theta.shape, np.float32)).realize() for _ in range(2))
        sources = (losses, networks, sys.modules[__name__])
        dims = (state_dim, n_actions, action_dim, c.hidden, c.memory)
        frozen = (c.clip, c.value_coef, c.max_grad_norm, c.adam_b1, c.adam_b2, c.adam_eps)
        self._forward = cached_jit(self._forward_fn, "ppo-act", dims, sources, cache_dir)
        self._train = cached_jit(self._train_fn, "ppo-update", dims + frozen, sources, cache_dir)

    # *** acting ***

    def initial_hidden(self, n: int) -> np.ndarray:
        return np.zeros((n, 2 * self.config.hidden), np.float32)

    def evaluate(
        self, observation: Observation, hidden: np.ndarray, reset: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log-probabilities [B, A] (illegal: about -1e9), values [B] and the next hidden state [B, 2H]."""
        state, mask, actions = observation
        inputs = [Tensor(x) for x in (state, mask, hidden, reset, actions) if x is not None]
        out = self._forward(self.policy.theta, *inputs).numpy().copy()  # the next call writes to the same buffer
        A = mask.shape[1]
        return out[:, :A], out[:, A], out[:, A + 1 :]

    def _forward_fn(
        self, theta: Tensor, state: Tensor, mask: Tensor, hidden: Tensor, reset: Tensor, actions: Tensor | None = None
    ) -> Tensor:
        """[B, A + 1 + 2H]: what `evaluate` returns, side by side, since copying out one array beats three."""
        out = self.policy.bind(theta).step(state, mask, actions, hidden, reset)
        return networks.log_softmax(out.logits).cat(out.value.unsqueeze(1), out.hidden, dim=1).contiguous()

    def value(self, observation: Observation, hidden: np.ndarray, reset: np.ndarray) -> np.ndarray:
        return self.evaluate(observation, hidden, reset)[1]

    def act(self, observation: Observation, hidden: np.ndarray, reset: np.ndarray, temperature: float = 1.0) -> Action:
        """Samples pi^(1/temperature) by the Gumbel-max trick (Gumbel 1954); 0 is greedy, training needs 1.

        The log-probability is that of the distribution sampled from, whatever the temperature.
        """
        log_probs, value, hidden = self.evaluate(observation, hidden, reset)
        if temperature == 0:
            return Action(log_probs.argmax(1).astype(np.int32), np.zeros_like(value), value, hidden)
        if temperature != 1:
            scaled = log_probs.astype(np.float64) / temperature
            log_probs = (scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True)).astype(np.float32)
        action = (log_probs + self.rng.gumbel(size=log_probs.shape)).argmax(1).astype(np.int32)
        return Action(action, np.take_along_axis(log_probs, action[:, None], 1)[:, 0], value, hidden)

    # *** learning ***

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Epochs of clipped gradient steps on one rollout. Returns METRICS averaged over them, and
        `first_ratio_error`: max |r - 1| before any step, 0 unless acting and learning disagree on the policy."""
        c, r = self.config, rollout
        if r.action.shape != (c.steps, c.n_envs):
            raise ValueError(f"a rollout of {r.action.shape}, but the configuration says {(c.steps, c.n_envs)}")
        advantage = gae(r.reward, r.value, r.terminated, r.ended, r.last_value, c.gamma, c.lam, r.bootstrap)
        target = advantage + r.value
        if c.normalise_advantages:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        lr, table = self.annealed(c.lr, c.lr_end), self._epochs(r, advantage, target)
        self.updates += 1
        metrics = dict(zip(METRICS, table.mean(0).tolist(), strict=True))
        if not np.isfinite(table).all():
            raise Diverged(f"update {self.updates}: {metrics}")
        return metrics | {
            "first_ratio_error": float(table[0, METRICS.index("ratio_error")]),
            "lr": lr,
            "explained_variance": explained_variance(r.value, target),
        }

    def _epochs(self, rollout: Rollout, advantage: np.ndarray, target: np.ndarray) -> np.ndarray:
        """All gradient steps of one update; METRICS of each, [epochs * minibatches, len(METRICS)]."""
        c, rows = self.config, []
        whole = self._batch(rollout, advantage, target, np.arange(c.n_envs)) if c.minibatches == 1 else None
        for _ in range(c.epochs):
            for envs in np.split(self.rng.permutation(c.n_envs), c.minibatches):
                batch = whole or self._batch(rollout, advantage, target, envs)
                self.adam_steps += 1
                rows.append(Tensor(np.zeros(len(METRICS), np.float32)).realize())
                self._train(self.policy.theta, self.m, self.v, rows[-1], self._schedule(), *batch)
        return np.stack([row.numpy() for row in rows])  # the only wait for the device

    def annealed(self, start: float, end: float) -> float:
        """Linear from start to end over `anneal_updates` updates."""
        total = self.config.anneal_updates
        return start + (end - start) * min(1.0, self.updates / total) if total else start

    def _schedule(self) -> Tensor:
        """[4] float32: learning rate, entropy weight, and Adam's bias corrections 1 / (1 - b^t). Inputs of the
        JIT, which would freeze Python numbers."""
        c, t = self.config, self.adam_steps
        numbers = (
            self.annealed(c.lr, c.lr_end),
            self.annealed(c.entropy, c.entropy_end),
            1 / (1 - c.adam_b1**t),
            1 / (1 - c.adam_b2**t),
        )
        return Tensor(np.array(numbers, np.float32)).realize()

    @staticmethod
    def _batch(r: Rollout, advantage: np.ndarray, target: np.ndarray, envs: np.ndarray) -> list[Tensor]:
        """The environments `envs` of a rollout, in Batch's order."""
        arrays = (r.state, r.mask, r.reset, r.action, r.log_prob, advantage, target, r.actions)
        columns = [r.hidden[envs]] + [array[:, envs] for array in arrays if array is not None]
        return [Tensor(np.ascontiguousarray(column)).realize() for column in columns]

    def _train_fn(self, theta: Tensor, m: Tensor, v: Tensor, row: Tensor, schedule: Tensor, *batch: Tensor) -> Tensor:
        """Loss, gradient, clipping and Adam (Kingma and Ba 2015). Assigns theta, m, v [P] and row in place.

        g <- g min(1, max_norm / |g|);   m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
        theta <- theta - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
        """
        c, b, policy = self.config, Batch(*batch), self.policy.bind(theta)
        lr, entropy_coef, correct1, correct2 = (schedule[i : i + 1] for i in range(4))
        out = policy.unroll(b.state, b.mask, b.actions, b.hidden, b.reset)
        loss, metrics = ppo_loss(networks.log_softmax(out.logits), out.value, b, entropy_coef, c.clip, c.value_coef)
        gradient = policy.gradient(loss).contiguous()
        norm = gradient.square().sum().sqrt()
        gradient = gradient * (c.max_grad_norm / (norm + 1e-6)).minimum(1.0)
        new_m = (c.adam_b1 * m + (1 - c.adam_b1) * gradient).contiguous()
        new_v = (c.adam_b2 * v + (1 - c.adam_b2) * gradient.square()).contiguous()
        step = lr * (new_m * correct1) / ((new_v * correct2).sqrt() + c.adam_eps)
        row.assign(Tensor.stack(*metrics, norm))
        Tensor.realize(row, theta.assign(theta - step), m.assign(new_m), v.assign(new_v))
        return row

    # *** resuming ***

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything that the next update depends on: named arrays, and meta data that is JSON."""
        groups = {"parameter": self.policy.theta, "adam_m": self.m, "adam_v": self.v}
        tensors = {
            f"{group}/{name}": array.copy()
            for group, vector in groups.items()
            for name, array in self.policy.unflatten(vector.numpy()).items()
        }
        return tensors, {
            "updates": self.updates,
            "adam_steps": self.adam_steps,
            "config": asdict(self.config),
            "rng": self.rng.bit_generator.state,
        }

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """The opposite of `state`. Raises CheckpointError where a shape differs; nothing is changed then."""
        groups, shapes = ("parameter", "adam_m", "adam_v"), self.policy.shapes
        check_shapes(tensors, {f"{g}/{name}": shape for g in groups for name, shape in shapes.items()}, "PPO")
        vectors = [self.policy.flatten({name: tensors[f"{g}/{name}"] for name in shapes}) for g in groups]
        self.policy.theta, self.m, self.v = (Tensor(vector).realize() for vector in vectors)
        self.updates, self.adam_steps = int(meta["updates"]), int(meta["adam_steps"])
        self.rng.bit_generator.state = meta["rng"]
