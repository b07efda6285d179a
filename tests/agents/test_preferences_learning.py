"""What agents must learn from preferences alone, and what a control run beside them scores."""

from dataclasses import replace

import numpy as np
import pytest

from agents.logs import Log
from agents.preferences import PreferenceConfig, PreferencePolicy, PreferencePPO, PreferencePPOConfig
from agents.rollout import Rollouts
from agents.toys import Identity, MaskedIdentity, Stitch
from agents.uniform import Uniform

TOY = PreferenceConfig(steps=4, n_envs=32, hidden=32, memory=False, lr=1e-2, max_grad_norm=10.0)
TOY_PPO = PreferencePPOConfig(steps=1, n_envs=64, hidden=32, memory=False, gamma=0.0, lr=1e-2, lr_end=1e-2, clip=0.3,
                              entropy=0.0, entropy_end=0.0, max_grad_norm=10.0, reward_lr=1e-2)  # fmt: skip


class Shuffled(PreferencePolicy):
    """Is told the returns of other columns."""

    def update(self, rollout):
        return super().update(replace(rollout, reward=rollout.reward[:, self.rng.permutation(rollout.reward.shape[1])]))


def learn(cls, env, log, config, updates, cache_dir):
    agent = cls(env.state_dim, env.n_actions, env.action_dim, config, 0, cache_dir)
    for _ in range(updates):
        agent.update(log.sample(agent.rng, config.n_envs))
    return agent


def learn_ppo(env, world, config, updates, cache_dir, shuffled=False):
    """Learns in `world`, whose columns give each other's rewards if shuffled."""
    agent, rng = (
        PreferencePPO(env.state_dim, env.n_actions, env.action_dim, config, 0, cache_dir),
        np.random.default_rng(0),
    )
    rollouts = Rollouts(world, agent, 0)
    for _ in range(updates):
        rollout = rollouts.collect(config.steps)[0]
        columns = rng.permutation(config.n_envs) if shuffled else np.arange(config.n_envs)
        agent.update(replace(rollout, reward=rollout.reward[:, columns]))
    return agent


@pytest.mark.learn
def test_the_policy_beats_the_log_that_it_learned_from(train, cache_dir):
    """Greedy >= 6 of 6.5, beyond the best logged episode, and drawn >= 4. Control: told others' returns, < 3."""
    env, config = Stitch(32), replace(TOY, steps=8, lr=3e-3)
    log = Log.record(Stitch(16), Uniform(env.state_dim, env.n_actions), chunks=64, steps=8)
    agents = [learn(cls, env, log, config, 100, cache_dir) for cls in (PreferencePolicy, Shuffled)]
    greedy = [train.score(env, agent, 32) for agent in agents]
    drawn = [train.score(env, agent, 512, temperature=1.0) for agent in agents]
    print(f"preferences: bar 6.0 of {env.best}, greedy {greedy[0]:.2f} (drawn {drawn[0]:.2f}), told others' returns "
          f"{greedy[1]:.2f} ({drawn[1]:.2f}); {len(log)} logged steps: mean {log.returns.mean():.2f}, "
          f"best {log.returns.max():.2f}")  # fmt: skip
    assert log.returns.max() < 6 <= greedy[0] and drawn[0] >= 4
    assert greedy[1] < 3 and drawn[1] < 1


@pytest.mark.learn
def test_identity_from_2048_random_steps(train, cache_dir):
    """>= 90 of 100, learned from pairs of episodes of 4 steps, judged on 100. Control: told others' returns, < 60."""
    env = Identity(8)
    log = Log.record(Identity(32, limit=4), Uniform(4, 4), chunks=16, steps=4)
    trained, control = (train.score(env, learn(cls, env, log, TOY, 20, cache_dir), 8)
                        for cls in (PreferencePolicy, Shuffled))  # fmt: skip
    print(f"identity, preferences: bar 90, trained {trained:.1f}, told others' returns {control:.1f}")
    assert trained >= 90 and control < 60


@pytest.mark.learn
def test_masked_identity_from_8192_random_steps(train, cache_dir):
    """>= 90 of 100, learned from pairs of episodes of one step, judged on 100. Control: told others' returns, < 30."""
    env, config = MaskedIdentity(8), replace(TOY, steps=1, n_envs=128, hidden=128, lr=3e-3)
    log = Log.record(MaskedIdentity(32, limit=1), Uniform(70, 70), chunks=256, steps=1)
    trained, control = (train.score(env, learn(cls, env, log, config, 80, cache_dir), 8)
                        for cls in (PreferencePolicy, Shuffled))  # fmt: skip
    print(f"masked identity, preferences: bar 90, trained {trained:.1f}, told others' returns {control:.1f}")
    assert trained >= 90 and control < 30


@pytest.mark.learn
def test_identity_in_1280_steps_of_a_learned_reward(train, cache_dir):
    """>= 90 of 100, learned from episodes of one step, judged on 100. Control: told others' returns, < 60."""
    env, world = Identity(8), Identity(64, limit=1)
    agents = [learn_ppo(env, world, TOY_PPO, 20, cache_dir, shuffled) for shuffled in (False, True)]
    trained, control = (train.score(env, agent, 8) for agent in agents)
    print(f"identity, preferences-reward: bar 90, trained {trained:.1f}, told others' returns {control:.1f}")
    assert trained >= 90 and control < 60


@pytest.mark.learn
def test_masked_identity_in_6400_steps_of_a_learned_reward(train, cache_dir):
    """>= 90 of 100, learned from episodes of one step, judged on 100. Control: told others' returns, < 30."""
    config = replace(TOY_PPO, n_envs=128, hidden=128, lr=3e-3, lr_end=3e-3, clip=0.2, entropy=0.02, entropy_end=0.02,
                     reward_lr=3e-3, reward_epochs=8)  # fmt: skip
    env, world = MaskedIdentity(8), MaskedIdentity(128, limit=1)
    agents = [learn_ppo(env, world, config, 50, cache_dir, shuffled) for shuffled in (False, True)]
    trained, control = (train.score(env, agent, 8) for agent in agents)
    print(f"masked identity, preferences-reward: bar 90, trained {trained:.1f}, told others' returns {control:.1f}")
    assert trained >= 90 and control < 30
