"""Normalisation: observations by running statistics, rewards by the spread of returns or by a logarithm.

Statistics move only in `update`, after the agent has learned: what acted and what learns are given the same numbers,
so that the policy's ratio is 1 before the first step, and an evaluation changes nothing. They are part of the state.

Action features are left alone: a table of statistics over [B, A, F] would be ruled by the rows of illegal actions, of
which most environments have many and fill with zeros. Whoever makes them gives them a scale of about one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from agents.checkpoint import CheckpointError
from agents.checks import check_fraction, check_positive
from agents.exploration import Wrapper
from agents.protocol import Observation
from agents.rollout import Action, Learner, Rollout

REWARDS = ("none", "scale", "log")
CONSTANT = 1e-6  # a spread below this is rounding: what has never varied is shifted, not blown up


class RunningMoments:
    """Mean and variance of a stream of D numbers, in float64, merged exactly batch by batch (Chan et al. 1979).

    d = mean_b - mean_a;   mean = mean_a + d n_b / n;   M2 = M2_a + M2_b + d^2 n_a n_b / n;   n = n_a + n_b
    """

    def __init__(self, dim: int):
        self.array = np.zeros((3, dim))  # n, mean, and M2: the sum of squares about the mean

    def add(self, x: np.ndarray) -> None:
        """x [N, D]; N may be 0."""
        if len(x):
            x = x.astype(np.float64)
            mean = x.mean(0)
            self.merge(np.stack([np.full(len(mean), float(len(x))), mean, np.square(x - mean).sum(0)]))

    def merge(self, other: np.ndarray) -> None:
        """`array` [3, D] of other moments, such as were taken elsewhere."""
        (n_a, mean_a, m2_a), (n_b, mean_b, m2_b) = self.array, other
        n, shift = n_a + n_b, mean_b - mean_a
        share = n_b / np.maximum(n, 1)
        self.array = np.stack([n, mean_a + shift * share, m2_a + m2_b + np.square(shift) * n_a * share])

    @property
    def mean(self) -> np.ndarray:
        return self.array[1]

    @property
    def variance(self) -> np.ndarray:
        """1 as long as nothing was seen."""
        n, _, m2 = self.array
        return np.where(n > 0, m2 / np.maximum(n, 1), 1.0)

    @property
    def scale(self) -> np.ndarray:
        """Standard deviation, and 1 for what has never varied."""
        std = np.sqrt(self.variance)
        return np.where(std > CONSTANT, std, 1.0)


@dataclass(frozen=True)
class NormaliseConfig:
    """Raises ValueError for a number out of its range."""

    observations: bool = True  # (x - mean) / std: encoders end in tanh, which large numbers saturate
    clip: float = 10.0  # of a normalised observation, either way; usual, and beyond what tanh can tell apart
    reward: str = "none"  # "scale": r / std of the discounted return; "log": sign(r) log2(1 + |r|)
    gamma: float = 0.99  # of the return that "scale" divides by; need not be the agent's

    def __post_init__(self) -> None:
        if self.reward not in REWARDS:
            raise ValueError(f"reward must be one of {', '.join(REWARDS)}, not {self.reward}")
        check_positive(self, "clip")
        check_fraction(self, "gamma")


class Normalised(Wrapper):
    """A Learner that sees normalised observations and learns from normalised rewards; any other one inside it.

    Values, bootstrapped ones too, stay as acting produced them: they are in units of the normalised reward already.
    Of the inner agent's methods only those named here may be given observations. What an agent keeps of earlier
    rollouts (a replay buffer) stays as normalised when it came.
    """

    def __init__(self, agent: Learner, config: NormaliseConfig | None = None):
        super().__init__(agent)
        self.normalisation = config or NormaliseConfig()
        self.observed, self.returned = RunningMoments(self.agent.dims[0]), RunningMoments(1)
        self._running = np.zeros(0)  # [B], discounted returns so far. Not saved: who resumes begins new episodes

    def normalise(self, state: np.ndarray) -> np.ndarray:
        """[..., D] -> [..., D] float32, by the statistics as they stand."""
        if not self.normalisation.observations:
            return state
        clip = self.normalisation.clip
        return ((state - self.observed.mean) / self.observed.scale).clip(-clip, clip).astype(np.float32)

    def seen(self, observation: Observation) -> Observation:
        return observation._replace(state=self.normalise(observation.state))

    def act(self, observation: Observation, hidden: np.ndarray, reset: np.ndarray, temperature: float = 1.0) -> Action:
        return self.agent.act(self.seen(observation), hidden, reset, temperature)

    def value(self, observation: Observation, hidden: np.ndarray, reset: np.ndarray) -> np.ndarray:
        return self.agent.value(self.seen(observation), hidden, reset)

    def evaluate(
        self, observation: Observation, hidden: np.ndarray, reset: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See NetworkAgent.evaluate."""
        return self.agent.evaluate(self.seen(observation), hidden, reset)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """The agent's own update; with "scale", `reward_scale` is added to its metrics. Raises what the agent raises.

        A rollout is learned from under the statistics that acted in it, and counts towards those of the next one. No
        action depends on the spread of returns: that one counts at once, so that the first rollout is scaled too.
        """
        reward, extra = self._reward(rollout)
        state = self.normalise(rollout.state)
        metrics = self.agent.update(replace(rollout, state=state, reward=reward.astype(np.float32)))
        if self.normalisation.observations:
            self.observed.add(rollout.state.reshape(-1, rollout.state.shape[-1]))  # [T * B, D]
        return metrics | extra

    def _reward(self, rollout: Rollout) -> tuple[np.ndarray, dict[str, float]]:
        """Normalised rewards [T, B], and metrics of it."""
        r = rollout.reward
        if self.normalisation.reward == "log":
            return np.sign(r) * np.log2(1 + np.abs(r)), {}
        if self.normalisation.reward == "none":
            return r, {}
        self.returned.add(self._returns(rollout).reshape(-1, 1))  # [T * B, 1]
        scale = float(self.returned.scale[0])
        return r / scale, {"reward_scale": scale}

    def _returns(self, rollout: Rollout) -> np.ndarray:
        """G_t = r_t + gamma G_{t-1}, from 0 where an episode begins (Engstrom et al. 2020, section 3), [T, B].

        It goes on from chunk to chunk, so these must follow each other, or begin with an episode.
        """
        n = rollout.reward.shape[1]
        running = self._running if len(self._running) == n else np.zeros(n)
        rows = []
        for reward, reset in zip(rollout.reward, rollout.reset, strict=True):
            running = reward + self.normalisation.gamma * (1 - reset) * running
            rows.append(running)
        self._running = running
        return np.stack(rows)

    # *** resuming ***

    def own_state(self) -> dict[str, np.ndarray]:
        return {
            "normalise/observations": self.observed.array.copy(),  # [3, D]
            "normalise/returns": self.returned.array.copy(),  # [3, 1]
        }

    def load_own_state(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.observed.array = tensors["normalise/observations"].copy()
        self.returned.array = tensors["normalise/returns"].copy()
        self._running = np.zeros(0)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = super().state()
        return tensors, meta | {"normalise": asdict(self.normalisation)}

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """The opposite of `state`. Raises CheckpointError where a shape or a setting of the normalisation differs."""
        saved = meta.get("normalise", {})
        for key, ours in asdict(self.normalisation).items():
            if key in saved and saved[key] != ours:
                raise CheckpointError(f"{self.name}: was normalised with {key}={saved[key]}, not {ours}")
        super().load_state(tensors, meta)
