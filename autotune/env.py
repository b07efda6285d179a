"""The world in which an agent learns: choose one schedule action after another for a kernel, then STOP.

One step's reward is Phi(s) - Phi(s'), where Phi is a simulator's log2 of the run time (no simulator: 0). At STOP the
measured time, where there is a measurer, corrects the sum, so that an episode's return is log2(t_unoptimized / t_final)
whoever supplied the time on the way: from hardware, from records (replay) or from the simulator alone. A failed trial
makes the return `failure_return`. STOP terminates; a cap on actions truncates where more could be done, and a cut episode costs
no trial. After MAX_STEPS actions STOP alone is left: that is no cut, since what follows is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from agents.protocol import Observation, Step
from autotune.compiler import Renderer
from autotune.errors import IllegalAction
from autotune.features import ACTION_WIDTH, View, observe
from autotune.kernel import Kernel, Schedule
from autotune.space import ACTION_INDEX, MAX_STEPS, N_ACTIONS, STOP_INDEX, State, legal_mask, root_state, step

LogTimes = Callable[[Sequence[State]], np.ndarray]  # log2 seconds of each state, NaN where the trial failed
Value = TypeVar("Value")
REMEMBERED = 2048  # states whose masks and views a task keeps, at about 40 KB each; in replay all, for they are few


@dataclass(frozen=True)
class EnvConfig:
    failure_return: float = -3.0  # of an episode whose trial failed: as if eight times slower
    max_steps: int = MAX_STEPS  # actions before an episode is cut, unless only STOP is left then


@dataclass
class Task:
    """What an environment may play: kernels, and where its times come from."""

    kernels: Sequence[Kernel]
    renderer: Renderer
    measured: LogTimes | None = None  # called at STOP, for all episodes that end in the same step at once
    potential: LogTimes | None = None  # called at every state
    allowed: Callable[[Kernel], Iterable[Schedule]] | None = None  # replay: the closed set of recorded schedules
    config: EnvConfig = field(default_factory=EnvConfig)
    masked: bool = True  # False: every action is offered, and an illegal one ends the episode where it stands
    sees: View = observe  # how an agent is shown a state
    _roots: dict[str, State] = field(default_factory=dict, repr=False)
    _moves: dict[str, dict[Schedule, np.ndarray]] = field(default_factory=dict, repr=False)
    _masks: dict[tuple[str, Schedule], np.ndarray] = field(default_factory=dict, repr=False)
    _views: dict[tuple[str, Schedule], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)

    def root(self, kernel: Kernel) -> State:
        if kernel.key not in self._roots:
            self._roots[kernel.key] = root_state(kernel, self.renderer)
        return self._roots[kernel.key]

    def mask(self, state: State) -> np.ndarray:
        """Legal actions [A] bool; in replay only those that lead to something recorded."""
        if self.allowed is None:
            return self._remembered(self._masks, state, lambda: legal_mask(state)).copy()
        key = state.kernel.key
        if key not in self._moves:
            self._moves[key] = _moves(
                {s for s in self.allowed(state.kernel) if all(opt in ACTION_INDEX for opt in s)} | {()}
            )
        return self._moves[key][state.schedule].copy()

    def view(self, state: State, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What an agent sees (state [D], actions [A, F])."""
        return self._remembered(self._views, state, lambda: self.sees(state, mask))

    def _remembered(self, known: dict[tuple[str, Schedule], Value], state: State, make: Callable[[], Value]) -> Value:
        """`make()`, called once as long as the state stays in `known`; the one that was longest unused leaves first."""
        key = state.kernel.key, state.schedule
        value = known.pop(key) if key in known else make()
        known[key] = value
        if self.allowed is None and len(known) > REMEMBERED:
            name, schedule = oldest = next(iter(known))
            known.pop(oldest)
            self._roots[name].forget(schedule)  # a training plays hundreds of thousands of states
        return value


def _moves(ends: Iterable[Schedule]) -> dict[Schedule, np.ndarray]:
    """The mask [A] after each prefix of some schedules: STOP where one ends, and the actions that lead on to one."""
    masks: dict[Schedule, np.ndarray] = {}
    for schedule in ends:
        for n in range(len(schedule) + 1):
            mask = masks.setdefault(schedule[:n], np.zeros(N_ACTIONS, dtype=bool))
            mask[STOP_INDEX if n == len(schedule) else ACTION_INDEX[schedule[n]]] = True
    return masks


class Episode:
    """One kernel being scheduled."""

    def __init__(self, task: Task, kernel: Kernel, number: int = 0):
        """`number`: how many were begun before it."""
        self.task, self.state, self.number = task, task.root(kernel), number
        self.log_time = self.start = 0.0
        self.mask = task.mask(self.state)

    @property
    def offered(self) -> np.ndarray:
        """What an agent may choose [A] bool."""
        return self.mask if self.task.masked else np.ones_like(self.mask)

    @property
    def cut(self) -> bool:
        """Whether the cap ends it here, though it could go on."""
        return len(self.state.schedule) >= self.task.config.max_steps and bool(self.mask[:STOP_INDEX].any())

    def take(self, action: int) -> bool:
        """Apply an action; True for what ends the episode. Raises IllegalAction for one that is not offered."""
        if not self.offered[action]:
            raise IllegalAction(f"action {action} is not legal after {len(self.state.schedule)} actions")
        if action == STOP_INDEX or not self.mask[action]:
            return True
        self.state = step(self.state, action)
        self.mask = self.task.mask(self.state)
        return False


class KernelVectorEnv:
    """B episodes in lockstep (agents.protocol.VectorEnv); a finished one gives way to the next kernel at once."""

    action_dim, n_actions = ACTION_WIDTH, N_ACTIONS

    def __init__(self, task: Task, n_envs: int, in_order: bool = False):
        """`in_order`: kernels come one after the other, for an evaluation; otherwise they are drawn."""
        if not task.kernels:
            raise ValueError("an environment needs at least one kernel")
        self.task, self.n_envs, self.in_order, self.begun = task, n_envs, in_order, 0
        self.rng = np.random.default_rng(0)
        self.episodes: list[Episode] = []
        self.finished: list[tuple[Kernel, Schedule, float]] = []  # (kernel, schedule, return) of terminated episodes
        self.begins: list[int] = []  # and how many were begun before each
        self.state_dim = len(self._observe_one(self._next())[0])

    def reset(self, seed: int) -> Observation:
        self.rng, self.begun, self.finished, self.begins = np.random.default_rng(seed), 0, [], []
        self.episodes = [self._next() for _ in range(self.n_envs)]
        self._enter(self.episodes)
        return self._observation(self.episodes)

    def step(self, actions: np.ndarray) -> Step:
        stopped = np.array([e.take(int(a)) for e, a in zip(self.episodes, actions, strict=True)])
        reward = self._progress()
        if stopped.any():
            reward[stopped] += self._settle([e for e, s in zip(self.episodes, stopped, strict=True) if s])
        truncated = np.array([e.cut for e in self.episodes]) & ~stopped
        final = self._observation(self.episodes) if truncated.any() else None
        ended = np.flatnonzero(stopped | truncated)
        for i in ended:
            self.episodes[i] = self._next()
        self._enter([self.episodes[i] for i in ended])
        return Step(self._observation(self.episodes), reward.astype(np.float32), stopped, truncated, final)

    def restart(self, rows: np.ndarray) -> Observation:
        """Gives up the episodes in `rows` (indices), at the cost of no trial, and begins new ones there."""
        for i in rows:
            self.episodes[i] = self._next()
        self._enter([self.episodes[i] for i in rows])
        return self._observation(self.episodes)

    def _next(self) -> Episode:
        kernels = self.task.kernels
        index = self.begun % len(kernels) if self.in_order else int(self.rng.integers(len(kernels)))
        self.begun += 1
        return Episode(self.task, kernels[index], self.begun - 1)

    def _enter(self, episodes: list[Episode]) -> None:
        if self.task.potential is not None and episodes:
            for episode, log_time in zip(episodes, self.task.potential([e.state for e in episodes]), strict=True):
                episode.start = episode.log_time = float(log_time)

    def _progress(self) -> np.ndarray:
        """Phi(s) - Phi(s') of every episode [B]; zero without a simulator and for those that stopped."""
        if self.task.potential is None:
            return np.zeros(self.n_envs)
        after = self.task.potential([e.state for e in self.episodes])
        reward = np.array([e.log_time for e in self.episodes]) - after
        for episode, log_time in zip(self.episodes, after, strict=True):
            episode.log_time = float(log_time)
        return reward

    def _settle(self, episodes: list[Episode]) -> np.ndarray:
        """What STOP adds, so that the return is the measured log-speedup; also notes the finished episodes."""
        predicted = np.array([e.start - e.log_time for e in episodes])
        total = predicted
        if self.task.measured is not None:
            before = self.task.measured([self.task.root(e.state.kernel) for e in episodes])
            speedup = before - self.task.measured([e.state for e in episodes])
            total = np.where(np.isnan(speedup), self.task.config.failure_return, speedup)
        self.finished += [(e.state.kernel, e.state.schedule, float(t)) for e, t in zip(episodes, total, strict=True)]
        self.begins += [e.number for e in episodes]
        return total - predicted

    def _observe_one(self, episode: Episode) -> tuple[np.ndarray, np.ndarray]:
        return self.task.view(episode.state, episode.mask)

    def _observation(self, episodes: list[Episode]) -> Observation:
        rows = [self._observe_one(e) for e in episodes]
        return Observation(
            np.stack([r[0] for r in rows]), np.stack([e.offered for e in episodes]), np.stack([r[1] for r in rows])
        )


class KernelEnv:
    """One episode at a time, on Gymnasium's contract: reset(seed=..., options=...) and step(action).

    An observation is {"state": [D], "mask": [A], "actions": [A, F]}. `options={"kernel": i}` picks the kernel.
    """

    def __init__(self, task: Task):
        self.task = task
        self.vector = KernelVectorEnv(task, 1)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        if seed is not None:
            self.vector.rng = np.random.default_rng(seed)
        chosen = (options or {}).get("kernel")
        self.episode = self.vector._next() if chosen is None else Episode(self.task, self.task.kernels[chosen])
        self.vector.episodes = [self.episode]
        self.vector._enter([self.episode])
        return self._observation(), self._info()

    def step(self, action: int) -> tuple[dict, float, bool, bool, dict]:
        """(observation, reward, terminated, truncated, info). Raises IllegalAction for an action outside the mask."""
        stopped = self.episode.take(int(action))
        reward = self.vector._progress()
        if stopped:
            reward += self.vector._settle([self.episode])
        return self._observation(), float(reward[0]), stopped, self.episode.cut and not stopped, self._info()

    def _observation(self) -> dict[str, np.ndarray]:
        # copies, since the task remembers what it has shown
        state, actions = self.task.view(self.episode.state, self.episode.mask)
        return {"state": state.copy(), "mask": self.episode.offered.astype(np.int8), "actions": actions.copy()}

    def _info(self) -> dict[str, Any]:
        return {"kernel": self.episode.state.kernel.key, "schedule": self.episode.state.schedule}
