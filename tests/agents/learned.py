"""What the learning tests of several agents share."""

from dataclasses import replace

import numpy as np

from agents.rollout import Rollouts, evaluate
from agents.toys import Identity


class Strangers(Identity):
    """Shows each copy its neighbour's number: nothing can be learned, unless rows of a batch are mixed up."""

    def state(self):
        return np.roll(super().state(), 1, axis=0)


def score(env, agent, episodes=8, temperature=0.0):
    return float(np.mean([e.total for e in evaluate(env, agent, episodes, seed=10_000, temperature=temperature)]))


def annealed(cls, env, config, steps, cache_dir, seed=0):
    """An agent of `cls`, trained on about `steps` steps, at the end of which all that anneals has done so."""
    updates = steps // (config.steps * config.n_envs)
    config = replace(config, anneal_updates=max(1, updates))
    agent = cls(env.state_dim, env.n_actions, env.action_dim, config, seed, cache_dir)
    rollouts = Rollouts(env, agent, seed)
    for _ in range(updates):
        agent.update(rollouts.collect(config.steps)[0])
    return agent
