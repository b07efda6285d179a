"""What every agent with a network shares: acting by it, Adam under one jitted gradient step, and its state.

An agent is a NetworkAgent with one or more parts; a part is a network with the loss that trains it (`Trained`). All agents
have one signature: `act`, `value`, `update(rollout)`, `state`, `load_state`; see agents.rollout.Learner."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import numpy as np
from tinygrad import Device, Tensor

from agents import networks, parameters
from agents.checkpoint import check_shapes
from agents.checks import check_below_one, check_fraction, check_least, check_positive
from agents.jitcache import CachedJit, refill, upload
from agents.networks import LSTMPolicy
from agents.parameters import Parameters
from agents.protocol import Observation
from agents.rollout import Action, Rollout

Loss = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]  # (policy, coefs [K], *batch) -> scalar to minimise, metrics
GROUPS = ("parameter", "adam_m", "adam_v")


class Diverged(ArithmeticError):
    """An update produced a number that is not finite. The parameters are lost: go back to a checkpoint."""


@dataclass(frozen=True)
class LearnerConfig:
    """What all agents with a network can be set to."""

    steps: int = 8  # T of a rollout; schedules are rarely longer
    n_envs: int = 32  # B of a rollout; fixed, since another shape would mean another capture
    hidden: int = 128  # width of encoder and LSTM
    memory: bool = True  # False: the same net without LSTM, for control runs
    gamma: float = 1.0  # the return is a log-speedup: no reason to discount it
    lr: float = 3e-4  # Adam's, at the start
    lr_end: float = 0.0  # and at the end of the annealing
    anneal_updates: int = 0  # updates over which settings with an end are annealed; 0 = never
    max_grad_norm: float = 0.5  # of the whole gradient; one lucky kernel must not wreck the policy
    adam_b1: float = 0.9  # Kingma and Ba 2015
    adam_b2: float = 0.999  # same
    adam_eps: float = 1e-5  # PPO's usual; 1e-8 lets tiny gradients take full steps

    def __post_init__(self) -> None:
        check_fraction(self, "gamma")
        check_least(self, lr=0, lr_end=0, anneal_updates=0)
        check_positive(self, "max_grad_norm", "adam_eps")
        check_below_one(self, "adam_b1", "adam_b2")


class Trained:
    """A network under Adam. `step(lr, coefs, *batch)` takes one jitted gradient step on its loss."""

    def __init__(self, policy: Parameters, loss: Loss, metrics: Sequence[str], config: LearnerConfig, name: str,
                 frozen: Sequence[object] = (), sources: Sequence[ModuleType] = (),
                 cache_dir: str | os.PathLike[str] | None = None):  # fmt: skip
        """`frozen` are the Python values that `loss` reads, which its capture holds as constants; `sources` the modules."""
        self.policy, self.loss, self.config = policy, loss, config
        self.metrics = (*metrics, "gradient_norm")
        self._begin()
        adam = (config.max_grad_norm, config.adam_b1, config.adam_b2, config.adam_eps)
        modules = (networks, parameters, sys.modules[__name__], *sources)
        self._jit = CachedJit(self._step, f"{name}-update", (*policy.dims, *adam, *frozen), modules, cache_dir)

    def _begin(self) -> None:
        """Adam before its first step."""
        self.steps = 0
        self.m, self.v = (upload(np.zeros(self.policy.size, np.float32)) for _ in range(2))

    def step(self, lr: float, coefs: Sequence[float], batch: Sequence[Tensor]) -> Tensor:
        """The metrics of this step [M], on the device. Parameters and Adam's moments are changed in place."""
        self.steps += 1
        c, row = self.config, upload(np.zeros(len(self.metrics), np.float32))
        numbers = (lr, 1 / (1 - c.adam_b1**self.steps), 1 / (1 - c.adam_b2**self.steps), *coefs)
        schedule = upload(np.array(numbers, np.float32))  # inputs of the JIT, which would freeze numbers
        self._jit(self.policy.theta, self.m, self.v, row, schedule, *batch)
        return row

    def _step(self, theta: Tensor, m: Tensor, v: Tensor, row: Tensor, schedule: Tensor, *batch: Tensor) -> Tensor:
        """Loss, gradient, clipping and Adam (Kingma and Ba 2015). Assigns theta, m, v [P] and row in place.

        g <- g min(1, max_norm / |g|);   m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
        theta <- theta - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
        """
        c, policy = self.config, self.policy.bind(theta)
        lr, correct1, correct2 = (schedule[i : i + 1] for i in range(3))
        loss, metrics = self.loss(policy, schedule[3:], *batch)
        gradient = policy.gradient(loss).contiguous()
        norm = gradient.square().sum().sqrt()
        gradient = gradient * (c.max_grad_norm / (norm + 1e-6)).minimum(1.0)
        new_m = (c.adam_b1 * m + (1 - c.adam_b1) * gradient).contiguous()
        new_v = (c.adam_b2 * v + (1 - c.adam_b2) * gradient.square()).contiguous()
        step = lr * (new_m * correct1) / ((new_v * correct2).sqrt() + c.adam_eps)
        row.assign(Tensor.stack(*metrics, norm))
        Tensor.realize(row, theta.assign(theta - step), m.assign(new_m), v.assign(new_v))
        return row

    def table(self, rows: Sequence[Tensor]) -> np.ndarray:
        """Metrics of some steps [N, M], which waits for the device. Raises Diverged."""
        table = np.stack([row.numpy() for row in rows])
        if not np.isfinite(table).all():
            raise Diverged(f"gradient step {self.steps}: {self.means(table)}")
        return table

    def means(self, table: np.ndarray) -> dict[str, float]:
        """Metrics by name, averaged over the steps of a `table` [N, M]."""
        return dict(zip(self.metrics, table.mean(0).tolist(), strict=True))

    def reset(self, names: Sequence[str], seed: int) -> None:
        """Give the named parameters fresh values. Adam begins anew for all: it has one step count, and under a high one moments
        that were just zeroed make steps of several times lr."""
        fresh = self.policy.initial(np.random.default_rng(seed))
        arrays = self.policy.unflatten(self.policy.theta.numpy()) | {name: fresh[name] for name in names}
        self.policy.theta.assign(Tensor(self.policy.flatten(arrays))).realize()
        self._begin()

    def state(self, prefix: str) -> dict[str, np.ndarray]:
        """Parameters and Adam's moments by name."""
        vectors = dict(zip(GROUPS, (self.policy.theta, self.m, self.v), strict=True))
        return {
            f"{prefix}{group}/{name}": array.copy()
            for group, vector in vectors.items()
            for name, array in self.policy.unflatten(vector.numpy()).items()
        }

    def load(self, tensors: Mapping[str, np.ndarray], prefix: str, steps: int | None) -> None:
        """The opposite of `state`, for arrays whose shapes were checked. `steps` that Adam has made; None: there are no moments of it,
        and it begins anew."""
        vectors = [
            self.policy.flatten({name: tensors[f"{prefix}{group}/{name}"] for name in self.policy.shapes})
            for group in (GROUPS if steps is not None else GROUPS[:1])
        ]
        self.policy.theta, *moments = (upload(vector) for vector in vectors)
        if steps is None:
            self._begin()
        else:
            self.steps, (self.m, self.v) = steps, moments


class NetworkAgent:
    """Acts by a network. A subclass names its parts, of which "" is the one that acts, and says how it learns."""

    name = "network"
    config: LearnerConfig
    parts: dict[str, Trained]

    def __init__(self, state_dim: int, n_actions: int, action_dim: int, config: LearnerConfig, seed: int,
                 cache_dir: str | os.PathLike[str] | None):  # fmt: skip
        self.config, self.dims = config, (state_dim, n_actions, action_dim)
        self.policy = self.network(seed)
        self.rng = np.random.default_rng(seed)
        self.updates = 0
        # of `evaluate`, filled anew each time: making them took a quarter of it
        self._inputs: dict[tuple[Any, ...], Tensor] = {}
        modules = (networks, parameters, sys.modules[__name__])
        self._forward = CachedJit(self._forward_fn, "act", self.policy.dims, modules, cache_dir)

    def network(self, seed: int) -> Any:
        """One more network of this agent's shape: Parameters, of a kind that a subclass may choose."""
        return LSTMPolicy(*self.dims, self.config.hidden, seed, self.config.memory)

    # *** acting ***

    def initial_hidden(self, n: int) -> np.ndarray:
        return np.zeros((n, 2 * self.config.hidden), np.float32)

    def evaluate(
        self, observation: Observation, hidden: np.ndarray, reset: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log-probabilities [B, A] (illegal: about -1e9), values [B] and the next hidden state [B, 2H]."""
        state, mask, actions = observation
        inputs = [self._input(i, x) for i, x in enumerate((state, mask, hidden, reset, actions)) if x is not None]
        out = self._forward(self.policy.theta, *inputs).numpy().copy()  # the next call writes to the same buffer
        A = mask.shape[1]
        return out[:, :A], out[:, A], out[:, A + 1 :]

    def _input(self, place: int, array: np.ndarray) -> Tensor:
        key = (place, array.shape, array.dtype, Device.DEFAULT)
        if key not in self._inputs:
            self._inputs[key] = upload(array)
        else:
            refill(self._inputs[key], array)
        return self._inputs[key]

    def _forward_fn(
        self, theta: Tensor, state: Tensor, mask: Tensor, hidden: Tensor, reset: Tensor, actions: Tensor | None = None
    ) -> Tensor:
        """[B, A + 1 + 2H]: what `evaluate` returns, side by side, since copying out one array beats three."""
        out = self.policy.bind(theta).step(state, mask, actions, hidden, reset)
        return networks.log_softmax(out.logits).cat(out.value.unsqueeze(1), out.hidden, dim=1).contiguous()

    def value(self, observation: Observation, hidden: np.ndarray, reset: np.ndarray) -> np.ndarray:
        return self.evaluate(observation, hidden, reset)[1]

    def behaviour(self, log_probs: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Log-probabilities [B, A] from which actions are sampled while it learns; here the policy's own."""
        return log_probs

    def act(self, observation: Observation, hidden: np.ndarray, reset: np.ndarray, temperature: float = 1.0) -> Action:
        """Samples from the behaviour at `temperature` (see `sample`); 0 is greedy, training needs 1."""
        log_probs, value, hidden = self.evaluate(observation, hidden, reset)
        if temperature:
            log_probs = self.behaviour(log_probs, observation.mask)
        return Action(*sample(log_probs, self.rng, temperature), value, hidden)

    # *** learning ***

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Learn from a rollout; metrics by name. Raises Diverged."""
        raise NotImplementedError

    def annealed(self, start: float, end: float) -> float:
        """Linear from start to end over `anneal_updates` updates."""
        return annealed(start, end, self.updates, self.config.anneal_updates)

    @property
    def lr(self) -> float:
        return self.annealed(self.config.lr, self.config.lr_end)

    def start_from(self, other: NetworkAgent) -> None:
        """The acting policy of another agent, for one that has learned nothing yet. Raises ValueError where it has another shape,
        or this one has learned."""
        if self.updates:
            raise ValueError(f"this one has learned already, in {self.updates} updates")
        if self.policy.dims != other.policy.dims:
            raise ValueError(f"the policy has the shape {other.policy.dims}, this one {self.policy.dims}")
        self.policy.theta = upload(other.policy.theta.numpy())

    # *** resuming ***

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything that the next update depends on: named arrays, and meta data that is JSON."""
        tensors = {name: array for key, part in self.parts.items() for name, array in part.state(key).items()}
        return tensors, {
            "updates": self.updates,
            "adam_steps": {key: part.steps for key, part in self.parts.items()},
            "config": asdict(self.config),
            "rng": self.rng.bit_generator.state,
        }

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """The opposite of `state`; without Adam's moments (`without_moments`) Adam begins anew. Raises CheckpointError where a shape
        differs; nothing is changed then."""
        groups = GROUPS if len(without_moments(tensors)) < len(tensors) else GROUPS[:1]
        shapes = {
            f"{key}{g}/{name}": s
            for key, p in self.parts.items()
            for g in groups
            for name, s in p.policy.shapes.items()
        }
        check_shapes(tensors, shapes, self.name)
        steps = meta["adam_steps"]
        for key, part in self.parts.items():
            own = int(steps[key] if isinstance(steps, dict) else steps)  # one number: written before there were parts
            part.load(tensors, key, own if groups == GROUPS else None)
        self.updates = int(meta["updates"])
        self.rng.bit_generator.state = meta["rng"]


def without_moments(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An agent's state without what only goes on with its training needs: two thirds of it."""
    return {name: array for name, array in tensors.items() if not any(f"{group}/" in name for group in GROUPS[1:])}


def sample(log_probs: np.ndarray, rng: np.random.Generator, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Actions [B] of pi^(1/temperature) by the Gumbel-max trick (Gumbel 1954), and their log-probabilities [B].

    The log-probability is that of the distribution sampled from, whatever the temperature; 0 is greedy.
    """
    if temperature == 0:
        return log_probs.argmax(1).astype(np.int32), np.zeros(len(log_probs), np.float32)
    if temperature != 1:
        scaled = log_probs.astype(np.float64) / temperature
        log_probs = (scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True)).astype(np.float32)
    action = (log_probs + rng.gumbel(size=log_probs.shape)).argmax(1).astype(np.int32)
    return action, np.take_along_axis(log_probs, action[:, None], 1)[:, 0]


def to_tensors(*arrays: np.ndarray | None) -> list[Tensor]:
    """Realized inputs of a jitted function; absent ones are left out."""
    return [upload(array) for array in arrays if array is not None]


def check_rollout(rollout: Rollout, config: LearnerConfig) -> None:
    """Raises ValueError for a rollout of another shape than the configuration's."""
    shape = config.steps, config.n_envs
    if rollout.action.shape != shape:
        raise ValueError(f"a rollout of {rollout.action.shape}, but the configuration says {shape}")


def annealed(start: float, end: float, updates: int, total: float) -> float:
    """Linear from start to end over `total` updates; 0 = for ever at start."""
    return start + (end - start) * min(1.0, updates / total) if total else start
