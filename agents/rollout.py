"""Collecting experience: fixed [T, B] chunks, with what the recurrent state was at their beginning."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from agents.protocol import Observation, VectorEnv, check, merge


class Action(NamedTuple):
    action: np.ndarray  # [B] int32
    log_prob: np.ndarray  # [B] float32, under the distribution that was sampled from
    value: np.ndarray  # [B] float32
    hidden: np.ndarray  # [B, 2H] float32


class Agent(Protocol):
    def initial_hidden(self, n: int) -> np.ndarray: ...
    def act(
        self, observation: Observation, hidden: np.ndarray, reset: np.ndarray, temperature: float = 1.0
    ) -> Action: ...
    def value(self, observation: Observation, hidden: np.ndarray, reset: np.ndarray) -> np.ndarray: ...


class Learner(Agent, Protocol):
    """The one signature of all agents. Those that learn from a log are given rollouts that another agent made."""

    name: str
    rng: np.random.Generator
    updates: int

    def update(self, rollout: Rollout) -> dict[str, float]: ...
    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]: ...
    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None: ...


class Episode(NamedTuple):
    env: int
    total: float  # undiscounted return
    length: int


@dataclass(frozen=True)
class Rollout:
    state: np.ndarray  # [T, B, D] float32
    mask: np.ndarray  # [T, B, A] bool
    actions: np.ndarray | None  # [T, B, A, F] float32
    action: np.ndarray  # [T, B] int32
    log_prob: np.ndarray  # [T, B] float32
    value: np.ndarray  # [T, B] float32
    reward: np.ndarray  # [T, B] float32
    terminated: np.ndarray  # [T, B] bool
    ended: np.ndarray  # [T, B] bool, terminated | truncated
    bootstrap: np.ndarray  # [T, B] float32, value of the final observation where truncated, else 0
    reset: np.ndarray  # [T, B] float32, 1 where an episode begins
    hidden: np.ndarray  # [B, 2H] float32, before the first step
    last_value: np.ndarray  # [B] float32, of the observation after the last step


class Rollouts:
    """Steps an environment with an agent. Observation, memory and running returns are carried from chunk to
    chunk."""

    def __init__(self, env: VectorEnv, agent: Agent, seed: int = 0):
        self.env, self.agent = env, agent
        self.observation = check(env.reset(seed))
        self.hidden = agent.initial_hidden(env.n_envs)
        self.reset = np.ones(env.n_envs, np.float32)
        self.total, self.length = np.zeros(env.n_envs), np.zeros(env.n_envs, np.int64)
        self.seconds = {"environment": 0.0, "inference": 0.0}  # where the time of `collect` went, since the start

    def collect(self, steps: int, temperature: float = 1.0) -> tuple[Rollout, list[Episode]]:
        """`steps` steps of every environment, and the episodes that ended in them."""
        rows: list[dict[str, Any]] = []
        episodes: list[Episode] = []
        hidden = self.hidden
        for _ in range(steps):
            rows.append(self._step(temperature, episodes))
        columns = {
            name: None if first is None else np.stack([row[name] for row in rows]) for name, first in rows[0].items()
        }
        last_value = self.agent.value(self.observation, self.hidden, self.reset)
        return Rollout(**columns, hidden=hidden, last_value=last_value), episodes  # type: ignore[arg-type]

    def _step(self, temperature: float, episodes: list[Episode]) -> dict[str, Any]:
        seen, reset = self.observation, self.reset
        started = time.perf_counter()
        choice = self.agent.act(seen, self.hidden, reset, temperature)
        acted = time.perf_counter()
        step = self.env.step(choice.action)
        self.seconds["inference"] += acted - started
        self.seconds["environment"] += time.perf_counter() - acted
        bootstrap = np.zeros_like(choice.value)
        if step.truncated.any():
            if step.final is None:
                raise ValueError("the environment truncated an episode without its final observation")
            # seen as the next step of the same episode: with its memory, without a reset
            final = check(merge(step.truncated, step.final, seen))
            value = self.agent.value(final, choice.hidden, np.zeros_like(reset))
            bootstrap = np.where(step.truncated, value, 0).astype(np.float32)
        ended = step.terminated | step.truncated
        self._count(step.reward, ended, episodes)
        self.observation, self.hidden, self.reset = (
            check(step.observation),
            choice.hidden,
            ended.astype(np.float32),
        )
        return {
            "state": seen.state,
            "mask": seen.mask,
            "actions": seen.actions,
            "action": choice.action,
            "log_prob": choice.log_prob,
            "value": choice.value,
            "reward": step.reward,
            "terminated": step.terminated,
            "ended": ended,
            "bootstrap": bootstrap,
            "reset": reset,
        }

    def _count(self, reward: np.ndarray, ended: np.ndarray, episodes: list[Episode]) -> None:
        self.total += reward
        self.length += 1
        episodes += [Episode(int(i), float(self.total[i]), int(self.length[i])) for i in np.flatnonzero(ended)]
        self.total[ended], self.length[ended] = 0, 0


def evaluate(env: VectorEnv, agent: Agent, episodes: int, seed: int = 0, temperature: float = 0.0) -> list[Episode]:
    """`episodes` episodes in the order in which they end, greedy by default. Every environment gives its first ones, as many
    as any other (the first environments one more where that does not divide), so that short episodes are not
    over-represented."""
    rollouts = Rollouts(env, agent, seed)
    quota = episodes // env.n_envs + (np.arange(env.n_envs) < episodes % env.n_envs)
    kept: list[Episode] = []
    counts = np.zeros(env.n_envs, np.int64)
    while (counts < quota).any():
        ended: list[Episode] = []
        rollouts._step(temperature, ended)
        for episode in ended:
            if counts[episode.env] < quota[episode.env]:
                kept.append(episode)
            counts[episode.env] += 1
    return kept
