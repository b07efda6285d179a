"""Logs: rollouts that were recorded once, by any agent, and are learned from many times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from agents.learner import LearnerConfig, check_rollout
from agents.protocol import VectorEnv
from agents.rollout import Agent, Rollout, Rollouts

ROWS = ("hidden", "last_value")  # the fields of a rollout without a time axis: [B, ...] where others are [T, B, ...]
# (rollout) -> int64, [B] or [T, B]: episodes may be compared whose numbers at their first steps are equal
Group = Callable[[Rollout], np.ndarray]


class WholeEpisodes(NamedTuple):
    """The E episodes of a rollout that begin and end in it, column after column."""

    number: np.ndarray  # [T, B], which of them a step belongs to; -1: none
    total: np.ndarray  # [E], undiscounted return
    column: np.ndarray  # [E]
    first: np.ndarray  # [E], time of the first step
    length: np.ndarray  # [E]

    def at_steps(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each step [T, B]: which step of its episode it is, that episode's return, and whether it is of a whole one;
        the other two mean something only where it is."""
        t = np.arange(len(self.number))[:, None]
        return t - np.append(self.first, 0)[self.number], np.append(self.total, 0.0)[self.number], self.number >= 0


def whole_episodes(rollout: Rollout) -> WholeEpisodes:
    """Finds them. Terminated and truncated ones count alike: what was recorded is what they were worth."""
    T, B = rollout.reward.shape
    reset, ended, reward = (x.T.ravel() for x in (rollout.reset > 0, rollout.ended, rollout.reward))  # [B * T]
    begins = reset | (np.arange(B * T) % T == 0)  # of a piece; that of the first step may have begun before the chunk
    piece, first = begins.cumsum() - 1, np.flatnonzero(begins)
    last = np.append(first[1:], B * T) - 1
    whole = reset[first] & ended[last]
    number = np.where(whole, whole.cumsum() - 1, -1)[piece].reshape(B, T).T
    total = np.bincount(piece, reward)[whole]
    first, last = first[whole], last[whole]
    return WholeEpisodes(number, total, first // T, first % T, last - first + 1)


def groups(rollout: Rollout, episodes: WholeEpisodes, group: Group | None) -> np.ndarray:
    """The number [E] that says what an episode may be compared with; without `group` all are comparable."""
    numbers = np.broadcast_to(np.int64(0) if group is None else group(rollout), rollout.reward.shape)
    return numbers[episodes.first, episodes.column]


def by_state(rollout: Rollout) -> np.ndarray:
    """A Group: a hash of the observation [T, B]. Comparable is what begins alike: schedules of one kernel, say.

    Running normalisation of observations would defeat it: the same one never comes twice."""
    bits = np.ascontiguousarray(rollout.state, np.float32).view(np.int32).astype(np.int64)
    factors = np.random.default_rng(0).integers(1, 2**62, bits.shape[-1])
    return (bits * factors).sum(-1)  # wraps around, as a hash may


def sequences(rollout: Rollout, config: LearnerConfig) -> list[np.ndarray]:
    """What every loss on a log begins with: hidden [B, 2H], state, mask, reset, action.

    The memory starts at zero, since the recorded one is of another network: exact for episodes that begin in the chunk.
    Raises ValueError for a rollout of another shape, and for a reward that is not finite.
    """
    r = rollout
    check_rollout(r, config)
    if not np.isfinite(r.reward).all():
        raise ValueError("a rollout with a reward that is not finite")
    return [np.zeros((config.n_envs, 2 * config.hidden), np.float32), r.state, r.mask, r.reset, r.action]


class Log:
    """Rollouts side by side, as one of [T, N]; the length is in environment steps."""

    def __init__(self, rollouts: Sequence[Rollout]):
        """Raises ValueError where there is none, or where their numbers of steps differ."""
        if len({r.action.shape[0] for r in rollouts}) != 1:
            raise ValueError("a log needs rollouts, all of the same number of steps")
        columns = [vars(r) for r in rollouts]
        arrays = {k: [c[k] for c in columns] for k, a in columns[0].items() if a is not None}
        joined = {k: np.concatenate(a, axis=0 if k in ROWS else 1) for k, a in arrays.items()}
        self.rollout = replace(rollouts[0], **joined)

    @classmethod
    def record(cls, env: VectorEnv, agent: Agent, chunks: int, steps: int, seed: int = 0) -> Log:
        """What `agent` does in `env`, in chunks of `steps` steps."""
        rollouts = Rollouts(env, agent, seed)
        return cls([rollouts.collect(steps)[0] for _ in range(chunks)])

    def __len__(self) -> int:
        return self.rollout.action.size

    @property
    def returns(self) -> np.ndarray:
        """Of the episodes that lie within one chunk [E]."""
        return whole_episodes(self.rollout).total

    def sample(self, rng: np.random.Generator, n_envs: int) -> Rollout:
        """A rollout of `n_envs` whole columns, drawn with replacement."""
        columns = rng.integers(0, self.rollout.action.shape[1], n_envs)
        arrays = {k: a for k, a in vars(self.rollout).items() if a is not None}
        return replace(self.rollout, **{k: a[columns] if k in ROWS else a[:, columns] for k, a in arrays.items()})
