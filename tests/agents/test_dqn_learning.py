"""What DQN must learn, and what a control run beside it scores."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from learned import Strangers, annealed, score
from tinygrad import Tensor

from agents import dqn
from agents.dqn import DQN, DQNConfig
from agents.rollout import Rollouts
from agents.toys import DelayedMemory, Identity, MaskedIdentity, Stitch, Toy

BANDIT = DQNConfig(steps=8, n_envs=8, hidden=32, memory=False, gamma=0.0, lr=1e-2, lr_end=1e-3)
trained_on = partial(annealed, DQN)


def test_identity_in_640_steps(cache_dir):
    """>= 90 of 100 with 3 of 3 seeds. Random 25; seeing the neighbour's number under 35."""
    env, strange = Identity(8), Strangers(8)
    trained = [score(env, trained_on(env, BANDIT, 640, cache_dir, seed)) for seed in range(3)]
    broken = score(strange, trained_on(strange, BANDIT, 640, cache_dir))
    random = score(env, trained_on(env, BANDIT, 0, cache_dir), temperature=1.0)
    print(
        f"DQN, identity: bar >= 90, {min(trained):.1f}, "
        f"control {broken:.1f} (neighbours' numbers), {random:.1f} (random)"
    )
    assert min(trained) >= 90 and broken < 35 and random < 35


class Capped(Toy):
    """Two places, two steps. To stop (1) earns 1/2 in the first place, and nothing in the second; to go on (0) leads to the other
    one, and costs 1 from the second, which is always cut."""

    state_dim = n_actions = 2

    def __init__(self, n_envs):
        super().__init__(n_envs, limit=2)
        self.place = np.zeros(n_envs, np.int64)

    def begin(self, rows):
        self.place[rows] = 0

    def state(self):
        return np.eye(2)[self.place]

    def advance(self, actions):
        stop, first = actions == 1, self.place == 0
        self.place = np.where(stop, self.place, 1 - self.place)
        return np.where(stop, 0.5 * first, -1.0 * ~first), stop


def test_what_a_time_limit_always_cuts_is_learned_as_well(cache_dir, monkeypatch):
    """0.5 of 0.5, though at first to go on seems to be worth 2 in both places. Control: where steps that are cut have no target,
    that is what it keeps believing of the second place, and it goes there: 0 at most."""
    config = DQNConfig(steps=4, n_envs=8, hidden=16, memory=False, gamma=0.9, lr=2e-2, lr_end=2e-3, replay=4, batch=16,
                       gradient_steps=4, target_every=2, anneal_updates=60)  # fmt: skip

    def learned():
        env, agent = Capped(8), DQN(2, 2, 0, config, 0, cache_dir)
        arrays = agent.policy.unflatten(agent.policy.theta.numpy()) | {"policy.bias": np.array([4.0, 0.0])}
        agent.policy.theta.assign(Tensor(agent.policy.flatten(arrays))).realize()
        agent._copy_to_target()
        rollouts = Rollouts(env, agent)
        for _ in range(config.anneal_updates):
            agent.update(rollouts.collect(config.steps)[0])
        return score(env, agent)

    trained = learned()
    monkeypatch.setattr(dqn, "closed", lambda rollout, gamma: rollout)
    broken = learned()
    print(f"DQN, cut at two steps: bar 0.5, {trained:.2f}, control {broken:.2f} (no target where it is cut)")
    assert trained == 0.5 and broken <= 0


@pytest.mark.learn
def test_stitch_in_51k_steps(cache_dir):
    """>= 6 of 6.5, by the values of what follows, through eight stages: to climb costs at once and pays later. Control: with gamma
    0 it sees what comes at once only, and stays below: 0."""
    env = Stitch(32)
    config = DQNConfig(steps=8, n_envs=32, hidden=64, memory=False, lr=5e-3, lr_end=5e-4)
    trained = score(env, trained_on(env, config, 51_200, cache_dir), 32)
    blind = score(env, trained_on(env, replace(config, gamma=0.0), 51_200, cache_dir), 32)
    print(f"DQN, stitch: bar >= 6 of {env.best}, {trained:.2f}, control {blind:.2f} (gamma 0)")
    assert trained >= 6 and blind <= 0


@pytest.mark.learn
def test_masked_identity_in_5120_steps(cache_dir):
    """>= 90 of 100. Random among the 15 legal answers 6.7; in the same world without its mask at least 20 less."""
    config = replace(BANDIT, hidden=128)
    masked, blind = MaskedIdentity(8), MaskedIdentity(8, masked=False)
    trained = score(masked, trained_on(masked, config, 5120, cache_dir))
    unmasked = score(blind, trained_on(blind, config, 5120, cache_dir))
    random = score(masked, trained_on(masked, config, 0, cache_dir), temperature=1.0)
    print(f"DQN, masked identity: bar >= 90, {trained:.1f}, control {unmasked:.1f} (no mask), {random:.1f} (random)")
    assert trained >= 90 and unmasked < trained - 20 and random < 12


@pytest.mark.learn
def test_delayed_memory_in_12k_steps(cache_dir):
    """>= 0.95, by sequences that begin with their stored memory. Without an LSTM 0.5."""
    env = DelayedMemory(32)
    config = DQNConfig(steps=10, n_envs=32, hidden=32, lr=3e-3, lr_end=3e-4)
    trained = score(env, trained_on(env, config, 12_000, cache_dir), 256)
    forgetful = score(env, trained_on(env, replace(config, memory=False), 12_000, cache_dir), 256)
    print(f"DQN, delayed memory: bar >= 0.95, {trained:.2f}, control {forgetful:.2f} (no LSTM)")
    assert trained >= 0.95 and 0.4 < forgetful < 0.6
