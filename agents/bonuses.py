"""Intrinsic rewards: what an observation is worth for being new.

A bonus has one interface: `bonus(rollout)` -> [T, B], then `learn(rollout)`; Curious adds it to the rewards of any
agent. All are episodic here, as the returns are: in a schedule of a few steps, what a later episode finds is no
reason to act in this one. So one value head does, where Burda et al. need two.

The novelty of s_t is paid at step t: the action that led there gets its credit through the return, also over the
end of a chunk; an agent with gamma 0 sees none of it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
from tinygrad import Tensor

from agents import networks, parameters
from agents.checks import check_least
from agents.exploration import StateCounts, Wrapper
from agents.jitcache import CachedJit
from agents.learner import LearnerConfig, Trained, to_tensors
from agents.networks import orthogonal, tanh
from agents.normalise import RunningMoments
from agents.parameters import Parameters
from agents.rollout import Learner, Rollout

CLIP = 5.0  # of a normalised observation, in standard deviations
FLOOR = 1e-3  # of a standard deviation: what hardly varies is not blown up


@dataclass(frozen=True)
class BonusConfig(LearnerConfig):
    """What all bonuses can be set to. Of LearnerConfig, a predictor uses hidden, lr, max_grad_norm and Adam's.

    Raises ValueError for a number out of its range, and for a setting that no bonus uses."""

    hidden: int = 64  # width of a predictor's two layers
    lr: float = 1e-3  # Adam's; a predictor that learns slower than the policy keeps it curious
    max_grad_norm: float = 10.0  # only against accidents: nothing acts by these networks
    epochs: int = 2  # gradient steps on one rollout
    outputs: int = 32  # of RND's networks
    members: int = 5  # of the ensemble
    bits: int = 14  # 2^bits counters
    digits: int = 2  # decimals of an observation that tell it from another, for the counters

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, epochs=1, outputs=1, members=2, bits=1)
        for key in ("steps", "n_envs", "memory", "gamma", "lr_end", "anneal_updates"):
            if getattr(self, key) != getattr(LearnerConfig, key):
                raise ValueError(f"{key} is used by no bonus, so it cannot be {getattr(self, key)}")


class Bonus(Protocol):
    name: str
    config: BonusConfig

    def bonus(self, rollout: Rollout) -> np.ndarray:
        """[T, B] float32, not negative. Changes nothing."""
        ...

    def learn(self, rollout: Rollout) -> dict[str, float]:
        """Makes what the rollout holds less new. Metrics by name; raises Diverged."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """Everything that the next bonus depends on."""
        ...

    def load_state(self, tensors: Mapping[str, np.ndarray]) -> None:
        """The opposite of `state`, for arrays whose shapes were checked."""
        ...


class Curious(Wrapper):
    """An agent that is paid reward + scale * bonus, and whose bonus learns from the same rollouts."""

    def __init__(self, agent: Learner, bonus: Bonus, scale: float = 0.1):
        super().__init__(agent)
        self.bonus, self.scale = bonus, scale

    def update(self, rollout: Rollout) -> dict[str, float]:
        """The agent's update on the sum, then the bonus' own. Adds `bonus` (its mean, unscaled) to the metrics."""
        extra = self.bonus.bonus(rollout)
        metrics = self.agent.update(replace(rollout, reward=rollout.reward + np.float32(self.scale) * extra))
        return metrics | self.bonus.learn(rollout) | {"bonus": float(extra.mean())}

    def settings(self) -> dict[str, Any]:
        own = {f"bonus_{key}": value for key, value in asdict(self.bonus.config).items()}
        return {"scale": self.scale, "bonus": self.bonus.name, **own}

    def own_state(self) -> dict[str, np.ndarray]:
        return self.bonus.state()

    def load_own_state(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.bonus.load_state(tensors)


class Counts:
    """1 / sqrt(N(s)), this visit counted (Bellemare et al. 2016), N by a hash of the rounded observation (Tang et
    al. 2017). Nothing scales it as it falls, unlike the others: a scale of about 1 suits it where 0.1 suits them."""

    name = "counts"

    def __init__(self, state_dim: int, n_actions: int = 0, config: BonusConfig | None = None, seed: int = 0,
                 cache_dir: str | os.PathLike[str] | None = None):  # fmt: skip
        self.config = c = config or BonusConfig()
        self.counts = StateCounts(state_dim, 1, c.bits, c.digits, seed)

    def bonus(self, rollout: Rollout) -> np.ndarray:
        return (1 / np.sqrt(1.0 + self.counts(rollout.state)[..., 0])).astype(np.float32)

    def learn(self, rollout: Rollout) -> dict[str, float]:
        self.counts.add(rollout.state)
        return {}

    def state(self) -> dict[str, np.ndarray]:
        return self.counts.state("counts/")

    def load_state(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.counts.load(tensors, "counts/")


# *** bonuses that predict ***


class MLPs(Parameters):
    """M networks of two tanh layers side by side: [N, I] -> [M, N, O]."""

    def __init__(self, members: int, inputs: int, outputs: int, hidden: int, seed: int):
        self.dims = members, inputs, outputs, hidden
        super().__init__(seed)

    def initial(self, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        """Orthogonal weights [M, rows, columns], zero biases [M, 1, columns]: the members differ only in these."""
        members, inputs, outputs, hidden = self.dims
        arrays = {}
        for i, (rows, columns) in enumerate(((inputs, hidden), (hidden, hidden), (hidden, outputs)), 1):
            gain = math.sqrt(2) if i < 3 else 1.0
            arrays[f"layer{i}.weight"] = np.stack([orthogonal(rng, rows, columns, gain) for _ in range(members)])
            arrays[f"layer{i}.bias"] = np.zeros((members, 1, columns), np.float32)
        return arrays

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        p = self.bind(theta).parameters
        x = tanh(x.unsqueeze(0) @ p["layer1.weight"] + p["layer1.bias"])  # [1, N, I] @ [M, I, H] -> [M, N, H]
        x = tanh(x @ p["layer2.weight"] + p["layer2.bias"])
        return x @ p["layer3.weight"] + p["layer3.bias"]


class Predictor:
    """Pays for what its network cannot predict yet. A subclass says what is predicted, and from what.

    Observations are normalised by running statistics and clipped. The bonus is divided by its running standard
    deviation about zero (its root mean square). Burda et al. divide by that of the discounted sum of bonuses, which
    needs a running sum for each environment across chunks; over episodes of a few steps the two differ by a constant,
    which belongs to the scale. About zero, since a world of one state pays a bonus without any deviation.
    """

    name: str

    def __init__(self, net: MLPs, state_dim: int, config: BonusConfig, cache_dir: str | os.PathLike[str] | None):
        self.net, self.config = net, config
        self.seen, self.paid = RunningMoments(state_dim), RunningMoments(1)
        here = (sys.modules[__name__],)
        self.trained = Trained(net, self.loss, (f"{self.name}_loss",), config, self.name, (), here, cache_dir)
        self._raw = CachedJit(self.raw, f"{self.name}-bonus", net.dims, (networks, parameters, *here), cache_dir)

    def raw(self, theta: Tensor, *batch: Tensor) -> Tensor:
        """The bonus before it is scaled: `inputs` -> [N]."""
        raise NotImplementedError

    def loss(self, net: MLPs, coefs: Tensor, *batch: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The scalar to minimise on `inputs` and `targets`, and itself as the metric."""
        raise NotImplementedError

    def inputs(self, rollout: Rollout) -> list[Tensor]:
        raise NotImplementedError

    def targets(self, rollout: Rollout) -> list[Tensor]:
        return []

    def where(self, rollout: Rollout) -> np.ndarray:
        """[T, B] bool: steps that are paid for, which are those that can be learned from."""
        return np.ones(rollout.action.shape, bool)

    def normalised(self, state: np.ndarray) -> np.ndarray:
        """[..., D] -> [N, D] float32 within +-CLIP."""
        scaled = (state - self.seen.mean) / np.maximum(np.sqrt(self.seen.variance), FLOOR)
        return np.clip(scaled, -CLIP, CLIP).astype(np.float32).reshape(-1, state.shape[-1])

    def unscaled(self, rollout: Rollout) -> np.ndarray:
        """[T, B], 0 where nothing is paid."""
        raw = self._raw(self.net.theta, *self.inputs(rollout)).numpy().reshape(rollout.action.shape)
        return np.where(self.where(rollout), raw, np.float32(0))

    def bonus(self, rollout: Rollout) -> np.ndarray:
        spread = np.sqrt(self.paid.mean[0] ** 2 + self.paid.variance[0])
        return (self.unscaled(rollout) / max(spread, 1e-8)).astype(np.float32)

    def learn(self, rollout: Rollout) -> dict[str, float]:
        """The statistics first, then `epochs` gradient steps."""
        self.paid.add(self.unscaled(rollout)[self.where(rollout)][:, None])
        self.seen.add(rollout.state.reshape(-1, rollout.state.shape[-1]))
        batch = self.inputs(rollout) + self.targets(rollout)
        table = self.trained.table([self.trained.step(self.config.lr, (), batch) for _ in range(self.config.epochs)])
        return {f"{self.name}_loss": float(table[:, 0].mean())}

    def state(self) -> dict[str, np.ndarray]:
        arrays = {"seen": self.seen.array, "paid": self.paid.array, "steps": np.array([self.trained.steps])}
        own = {f"{self.name}/{name}": array.copy() for name, array in arrays.items()}
        return own | self.trained.state(f"{self.name}/")

    def load_state(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.seen.array, self.paid.array = (tensors[f"{self.name}/{name}"].copy() for name in ("seen", "paid"))
        self.trained.load(tensors, f"{self.name}/", int(tensors[f"{self.name}/steps"][0]))


class RND(Predictor):
    """Random network distillation (Burda et al. 2019): b(s) = mean |f(s) - g(s)|^2, g a fixed random network, f
    trained to copy it on what was seen."""

    name = "rnd"

    def __init__(self, state_dim: int, n_actions: int = 0, config: BonusConfig | None = None, seed: int = 0,
                 cache_dir: str | os.PathLike[str] | None = None):  # fmt: skip
        c = config or BonusConfig()
        net, self.target = (MLPs(1, state_dim, c.outputs, c.hidden, s) for s in (2 * seed, 2 * seed + 1))
        super().__init__(net, state_dim, c, cache_dir)

    def inputs(self, rollout: Rollout) -> list[Tensor]:
        return [self.target.theta, *to_tensors(self.normalised(rollout.state))]

    def raw(self, theta: Tensor, *batch: Tensor) -> Tensor:
        target, x = batch
        return (self.net(theta, x) - self.net(target, x)).square().mean((0, 2)).contiguous()  # [1, N, O]

    def loss(self, net: MLPs, coefs: Tensor, *batch: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = self.raw(net.theta, *batch).mean()
        return loss, (loss,)

    def state(self) -> dict[str, np.ndarray]:
        target = self.target.unflatten(self.target.theta.numpy())
        return super().state() | {f"{self.name}/target/{name}": array.copy() for name, array in target.items()}

    def load_state(self, tensors: Mapping[str, np.ndarray]) -> None:
        super().load_state(tensors)
        target = {name: tensors[f"{self.name}/target/{name}"] for name in self.target.shapes}
        self.target.theta = Tensor(self.target.flatten(target)).realize()


class Disagreement(Predictor):
    """Ensemble disagreement (Pathak et al. 2019): b(s, a) = the variance, over members that differ in their first
    parameters, of the predicted next observation, averaged over its numbers.

    Noise in the world is an error that stays, but none on which the members differ for long: their common answer is
    the mean. What follows a step is known within a chunk only, and not where an episode ended; those steps teach
    nothing, so that their bonus would never fall: they are paid nothing.
    """

    name = "disagreement"

    def __init__(self, state_dim: int, n_actions: int, config: BonusConfig | None = None, seed: int = 0,
                 cache_dir: str | os.PathLike[str] | None = None):  # fmt: skip
        c, self.n_actions = config or BonusConfig(), n_actions
        super().__init__(MLPs(c.members, state_dim + n_actions, state_dim, c.hidden, seed), state_dim, c, cache_dir)

    def where(self, rollout: Rollout) -> np.ndarray:
        pairs = ~rollout.ended
        pairs[-1] = False
        return pairs

    def inputs(self, rollout: Rollout) -> list[Tensor]:
        choice = np.eye(self.n_actions, dtype=np.float32)[rollout.action.reshape(-1)]
        return to_tensors(np.concatenate([self.normalised(rollout.state), choice], axis=1))  # [N, D + A]

    def targets(self, rollout: Rollout) -> list[Tensor]:
        following = np.roll(rollout.state, -1, axis=0)  # the last row is none, and has no weight
        return to_tensors(self.normalised(following), self.where(rollout).reshape(-1).astype(np.float32))

    def raw(self, theta: Tensor, *batch: Tensor) -> Tensor:
        guess = self.net(theta, batch[0])  # [M, N, D]
        return (guess - guess.mean(0, keepdim=True)).square().mean((0, 2)).contiguous()

    def loss(self, net: MLPs, coefs: Tensor, *batch: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, following, weight = batch
        errors = (net(net.theta, x) - following.unsqueeze(0)).square().mean((0, 2))  # [M, N, D] -> [N]
        loss = (errors * weight).sum() / weight.sum().maximum(1.0)
        return loss, (loss,)
