"""What an agent may know of a world: arrays. Shapes: B environments, D state numbers, A actions, F numbers
per action."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np


class InvalidObservation(ValueError):
    """An observation that no policy can act on. Names the environment's row."""


class Observation(NamedTuple):
    state: np.ndarray  # [B, D] float32
    mask: np.ndarray  # [B, A] bool, True = legal
    actions: np.ndarray | None = None  # [B, A, F] float32, or None where actions have no features


class Step(NamedTuple):
    """One step of B environments. Where an episode has ended, `observation` is already the next episode's
    first one."""

    observation: Observation
    reward: np.ndarray  # [B] float32
    terminated: np.ndarray  # [B] bool: the task is over, do not bootstrap
    truncated: np.ndarray  # [B] bool: cut by a limit, bootstrap from `final`
    final: Observation | None = None  # rows of truncated environments: where the episode was cut. None: no row was


class VectorEnv(Protocol):
    """Arrays that it gives are kept for a whole rollout: it makes new ones at each step, and changes none."""

    n_envs: int
    state_dim: int
    n_actions: int
    action_dim: int  # 0 = no action features

    def reset(self, seed: int) -> Observation:
        """Begins an episode in every row; all that is random from here on comes from the seed."""
        ...

    def step(self, actions: np.ndarray) -> Step:
        """Takes a legal action in each row, actions [B] int32. A row whose episode ends in it begins the next one at once."""
        ...


class Restartable(VectorEnv, Protocol):
    """What an environment may offer besides: giving up single episodes."""

    def restart(self, rows: np.ndarray) -> Observation:
        """Begins new episodes in `rows` (indices); the others go on. Returns the observations of all rows."""
        ...


def check(observation: Observation) -> Observation:
    """Returns the observation, or raises InvalidObservation for the first row with nothing legal or a number
    not finite."""
    state, mask, actions = observation
    bad = ~np.isfinite(state).all(axis=1)
    if actions is not None:
        bad |= ~np.isfinite(actions).all(axis=(1, 2))
    if bad.any():
        raise InvalidObservation(f"environment {int(bad.argmax())}: observation holds NaN or infinity")
    if mask.dtype != np.bool_:
        raise InvalidObservation(f"the mask must be bool, not {mask.dtype}")
    stuck = ~mask.any(axis=1)
    if stuck.any():
        raise InvalidObservation(f"environment {int(stuck.argmax())}: no action is legal")
    return observation


def merge(where: np.ndarray, a: Observation, b: Observation) -> Observation:
    """Rows of `a` where `where` [B] is True, of `b` elsewhere."""
    actions = None if a.actions is None or b.actions is None else np.where(where[:, None, None], a.actions, b.actions)
    return Observation(np.where(where[:, None], a.state, b.state), np.where(where[:, None], a.mask, b.mask), actions)
