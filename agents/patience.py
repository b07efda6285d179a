"""Patience: an episode in which nothing changes any more is ended, at a price."""

from __future__ import annotations

import numpy as np

from agents.protocol import Observation, Restartable, Step


class Patience:
    """An environment whose stuck episodes end as terminated, with `penalty` added to the reward of that step.

    Stuck is an episode whose observation (state and mask) has been the same for `limit` steps. Not for worlds that show
    nothing of their progress: there every episode looks stuck. What a learner sees of it is an ordinary end.
    """

    def __init__(self, env: Restartable, limit: int, penalty: float = -1.0):
        """Raises TypeError for an environment without `restart`, ValueError for a number out of its range."""
        if not callable(getattr(env, "restart", None)):
            raise TypeError(f"Patience needs an environment with restart(rows), which {type(env).__name__} has not")
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        if not penalty <= 0:
            raise ValueError(f"penalty must not be above 0, but is {penalty}: it would pay for being stuck")
        self.env, self.limit, self.penalty = env, limit, penalty
        self.n_envs, self.state_dim = env.n_envs, env.state_dim
        self.n_actions, self.action_dim = env.n_actions, env.action_dim
        self.unchanged = np.zeros(env.n_envs, np.int64)  # steps for which each observation has been the same

    def reset(self, seed: int) -> Observation:
        self.unchanged[:] = 0
        return self._remember(self.env.reset(seed))

    def step(self, actions: np.ndarray) -> Step:
        step = self.env.step(actions)
        state, mask, _ = step.observation
        same = (state == self.state).all(1) & (mask == self.mask).all(1) & ~(step.terminated | step.truncated)
        self.unchanged = np.where(same, self.unchanged + 1, 0)
        stuck = self.unchanged >= self.limit
        if stuck.any():
            self.unchanged[stuck] = 0
            step = step._replace(
                observation=self.env.restart(np.flatnonzero(stuck)),
                reward=step.reward + np.where(stuck, self.penalty, 0).astype(np.float32),
                terminated=step.terminated | stuck,
            )
        self._remember(step.observation)
        return step

    def _remember(self, observation: Observation) -> Observation:
        self.state, self.mask = observation.state.copy(), observation.mask.copy()  # an environment may reuse its arrays
        return observation
