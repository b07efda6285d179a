"""All agents by name, each with how it is built and what it learns from: what a comparison walks through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from agents.bonuses import RND, Curious, Disagreement
from agents.dqn import DQN, DQNConfig
from agents.exploration import ExplorationConfig, Explorer
from agents.frequency import Frequency, FrequencyConfig
from agents.imitation import Cloning, CloningConfig
from agents.logs import Log, by_state
from agents.muzero import MuZero, MuZeroConfig
from agents.offline import IQL, IQLConfig
from agents.ppo import PPO, PPOConfig
from agents.preferences import PreferenceConfig, PreferencePolicy, PreferencePPO, PreferencePPOConfig
from agents.protocol import VectorEnv
from agents.rollout import Learner, Rollouts
from agents.stacking import FrameStack
from agents.uniform import Uniform

FRAMES = 4  # that a stacked agent sees
# steps of a rollout, for agents that learn of whole episodes: shorter ones cut most of the long episodes
WHOLE = FrequencyConfig.steps
LIMIT = 9  # steps of an episode, at most as many as kernels' have, of which a frequency table tells one from another


class Settings(NamedTuple):
    """What all agents of a comparison have in common."""

    state_dim: int
    n_actions: int
    action_dim: int
    steps: int  # T of a rollout
    n_envs: int  # B
    hidden: int  # width of all networks
    updates: int  # over which settings are annealed
    seed: int

    @property
    def dims(self) -> tuple[int, int, int]:
        return self.state_dim, self.n_actions, self.action_dim

    @property
    def common(self) -> dict[str, int]:
        """Fields of LearnerConfig."""
        return {"steps": self.steps, "n_envs": self.n_envs, "hidden": self.hidden, "anneal_updates": self.updates}


@dataclass(frozen=True)
class Kind:
    build: Callable[[Settings], Learner]
    offline: bool = False  # it learns from a log of random play, as long as what the others play themselves
    frames: int = 1  # that it sees at once
    steps: int | None = None  # of a rollout, where it needs longer ones: as many fewer of them

    def own(self, settings: Settings) -> Settings:
        """With rollouts of this kind's length, and as many fewer updates."""
        if self.steps is None:
            return settings
        return settings._replace(steps=self.steps, updates=max(1, settings.updates * settings.steps // self.steps))

    def make(self, settings: Settings) -> Learner:
        return self.build(self.own(settings))

    def wrap(self, env: VectorEnv) -> VectorEnv:
        """The environment as this kind of agent sees it."""
        return env if self.frames == 1 else FrameStack(env, self.frames)


def _ppo(s: Settings, **changed: object) -> PPO:
    config = PPOConfig(**{**s.common, "lr": 1e-3, "lr_end": 1e-4, "entropy": 0.02, "entropy_end": 0.002, **changed})  # type: ignore[arg-type]
    return PPO(*s.dims, config, s.seed)


def _dqn(s: Settings) -> DQN:
    return DQN(*s.dims, DQNConfig(**s.common, replay=32, gradient_steps=4), s.seed)  # type: ignore[arg-type]


def _cloning(s: Settings) -> Cloning:
    agent = Cloning(*s.dims, CloningConfig(**s.common, lr=1e-3, lr_end=1e-4, elite=0.15), s.seed)  # type: ignore[arg-type]
    agent.group = by_state  # returns of one kernel's schedules say nothing of another's
    return agent


def _iql(s: Settings) -> IQL:
    return IQL(*s.dims, IQLConfig(**s.common, lr=1e-3, lr_end=1e-4, polyak=0.02), s.seed)  # type: ignore[arg-type]


def _preferences(s: Settings) -> PreferencePolicy:
    agent = PreferencePolicy(*s.dims, PreferenceConfig(**s.common, lr=1e-3, lr_end=1e-4), s.seed)  # type: ignore[arg-type]
    agent.group = by_state
    return agent


def _preference_ppo(s: Settings) -> PreferencePPO:
    config = PreferencePPOConfig(**s.common, lr=1e-3, lr_end=1e-4, entropy=0.02, entropy_end=0.002)  # type: ignore[arg-type]
    agent = PreferencePPO(*s.dims, config, s.seed)
    agent.group = by_state
    return agent


def _curious(s: Settings, bonus: type[RND] | type[Disagreement]) -> Curious:
    return Curious(_ppo(s), bonus(s.state_dim, s.n_actions, None, s.seed))


def _explorer(s: Settings, **switches: float) -> Explorer:
    return Explorer(_ppo(s), ExplorationConfig(**switches), s.seed)  # type: ignore[arg-type]


AGENTS: dict[str, Kind] = {
    "random": Kind(lambda s: Uniform(*s.dims, None, s.seed)),
    "frequency": Kind(lambda s: Frequency(*s.dims, FrequencyConfig(limit=LIMIT), s.seed), steps=WHOLE),
    "ppo-lstm": Kind(_ppo),
    "ppo": Kind(lambda s: _ppo(s, memory=False)),
    "ppo-stacked": Kind(lambda s: _ppo(s, memory=False), frames=FRAMES),
    "ppo-rnd": Kind(lambda s: _curious(s, RND)),
    "ppo-disagreement": Kind(lambda s: _curious(s, Disagreement)),
    "ppo-ucb": Kind(lambda s: _explorer(s, ucb=0.5)),
    "ppo-noise": Kind(lambda s: _explorer(s, noise=0.2, noise_updates=s.updates)),
    "ppo-sticky": Kind(lambda s: _explorer(s, sticky=0.1)),
    "dqn": Kind(_dqn),
    "muzero": Kind(lambda s: MuZero(*s.dims, MuZeroConfig(**s.common), s.seed)),  # type: ignore[arg-type]
    "preferences-reward": Kind(_preference_ppo, steps=WHOLE),
    "cloning": Kind(_cloning, offline=True, steps=WHOLE),
    "iql": Kind(_iql, offline=True),
    "preferences": Kind(_preferences, offline=True, steps=WHOLE),
}


def teach(agent: Learner, kind: Kind, env: VectorEnv, settings: Settings) -> None:
    """`updates` updates: from its own rollouts, or from samples of a log of as many rollouts of random play."""
    own = kind.own(settings)
    if kind.offline:
        log = Log.record(env, Uniform(*own.dims, None, own.seed), own.updates, own.steps, own.seed)
        rng = np.random.default_rng(own.seed)
        for _ in range(own.updates):
            agent.update(log.sample(rng, own.n_envs))
        return
    rollouts = Rollouts(env, agent, own.seed)
    for _ in range(own.updates):
        agent.update(rollouts.collect(own.steps)[0])
