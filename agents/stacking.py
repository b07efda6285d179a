"""Frame stacking: a short memory for agents that have none (Mnih et al. 2015)."""

from __future__ import annotations

import numpy as np

from agents.protocol import Observation, Step, VectorEnv


class FrameStack:
    """A VectorEnv whose state [B, k D] is the last k states of `env` [B, D] side by side, the newest last.

    Before an episode's first state there are zeros, and nothing of the episode before. The final observation of a
    truncated episode is stacked on that episode's own states. Masks and action features pass through.
    """

    def __init__(self, env: VectorEnv, k: int):
        """Raises ValueError for k below 1; 1 is the environment itself."""
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        self.env, self.n_envs = env, env.n_envs
        self.state_dim, self.n_actions, self.action_dim = k * env.state_dim, env.n_actions, env.action_dim
        self.frames = np.zeros((env.n_envs, k, env.state_dim), np.float32)  # [B, k, D]

    def reset(self, seed: int) -> Observation:
        self.frames[:] = 0
        return self._enter(self.env.reset(seed))

    def step(self, actions: np.ndarray) -> Step:
        step = self.env.step(actions)
        final = None
        if step.final is not None:
            final = step.final._replace(state=_flat(_pushed(self.frames, step.final.state)))
        self.frames[step.terminated | step.truncated] = 0  # the next episode knows nothing of this one
        return step._replace(observation=self._enter(step.observation), final=final)

    def restart(self, rows: np.ndarray) -> Observation:
        """See agents.protocol.Restartable, which `env` must then be."""
        observation = self.env.restart(rows)  # type: ignore[attr-defined]
        self.frames[rows] = 0
        self.frames[rows, -1] = observation.state[rows]
        return observation._replace(state=_flat(self.frames))

    def _enter(self, observation: Observation) -> Observation:
        self.frames = _pushed(self.frames, observation.state)
        return observation._replace(state=_flat(self.frames))


def _pushed(frames: np.ndarray, state: np.ndarray) -> np.ndarray:
    """The oldest of the frames [B, k, D] gives way to the state [B, D]. A new array."""
    return np.concatenate([frames[:, 1:], state[:, None]], axis=1)


def _flat(frames: np.ndarray) -> np.ndarray:
    return frames.reshape(len(frames), -1).copy()  # [B, k D]; frames are wiped in place later
