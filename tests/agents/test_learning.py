"""Rungs of the ladder that learn something. Each states its bar, and what a control run beside it scores."""

from dataclasses import replace

import numpy as np
import pytest

from agents.normalise import NormaliseConfig, Normalised
from agents.ppo import PPO, PPOConfig
from agents.rollout import Rollouts
from agents.toys import CartPole, DelayedMemory, EndlessReward, FixedSequence, Identity, MaskedIdentity

# one-step problems: no future to discount, nothing to remember, quick steps
BANDIT = PPOConfig(
    steps=8,
    n_envs=8,
    hidden=32,
    memory=False,
    gamma=0.0,
    epochs=8,
    lr=1e-2,
    lr_end=1e-2,
    entropy=0.0,
    entropy_end=0.0,
    clip=0.3,
    max_grad_norm=10.0,
)
MEMORY = PPOConfig(
    steps=10, n_envs=32, hidden=32, gamma=0.99, epochs=4, lr=3e-3, lr_end=1e-3, entropy=0.02, entropy_end=0.0
)
POLE = PPOConfig(
    steps=32,
    n_envs=16,
    hidden=64,
    gamma=0.99,
    epochs=8,
    lr=1e-3,
    lr_end=1e-4,
    entropy=0.0,
    entropy_end=0.0,
)


def scaled(agent):
    """Rewards as the return's spread says: of values near 100 the error would leave nothing of a clipped gradient."""
    return Normalised(agent, NormaliseConfig(reward="scale", gamma=POLE.gamma))


def anneal(config, steps):
    return replace(config, anneal_updates=steps // (config.steps * config.n_envs))


class Shuffled(Identity):
    """Pays each copy for what its neighbour did: nothing can be learned, unless rows of a batch are mixed up."""

    def advance(self, actions):
        reward, terminated = super().advance(actions)
        return np.roll(reward, 1), terminated


def test_identity_in_1200_steps(train):
    """>= 90 of 100. Untrained 25; with the neighbours' rewards 46, by chance."""
    env = Identity(8)
    trained = train.score(env, train(env, BANDIT, 1200), episodes=8)
    broken = train.score(env, train(Shuffled(8), BANDIT, 1200), episodes=8)
    random = train.score(env, train(env, BANDIT, 0), episodes=8, temperature=1.0)
    print(
        f"PPO, identity: bar >= 90, {trained:.1f}, control {broken:.1f} (neighbours' rewards), {random:.1f} (untrained)"
    )
    assert trained >= 90 and broken < 80 and random < 35


@pytest.mark.learn
def test_masked_identity_in_2048_steps(train):
    """>= 90 of 100. Random among the 15 legal answers 6.7; trained on the same world without its mask under 30."""
    config = replace(BANDIT, hidden=128, lr=3e-3, lr_end=3e-3, clip=0.2)
    masked, blind = MaskedIdentity(8), MaskedIdentity(8, masked=False)
    trained = train.score(masked, train(masked, config, 2048), episodes=8)
    unmasked = train.score(blind, train(blind, config, 2048), episodes=8)
    random = train.score(masked, train(masked, config, 0), episodes=8, temperature=1.0)
    print(f"PPO, masked identity: bar >= 90, {trained:.1f}, control {unmasked:.1f} (no mask), {random:.1f} (random)")
    assert trained >= 90 and unmasked < 30 and random < 12


@pytest.mark.learn
def test_fixed_sequence_in_50k_steps(train):
    """> 0.7 of 1. Without memory at most 0.2, since it cannot know the place."""
    env, config = FixedSequence(32), anneal(MEMORY, 50_000)
    trained = train.score(env, train(env, config, 50_000), episodes=32)
    forgetful = train.score(env, train(env, replace(config, memory=False), 50_000), episodes=32)
    print(f"PPO-LSTM, fixed sequence: bar > 0.7, {trained:.2f}, control {forgetful:.2f} (no LSTM)")
    assert trained > 0.7 and forgetful <= 0.21


@pytest.mark.learn
def test_delayed_memory_in_50k_steps(train):
    """>= 0.95. Without memory 0.5; and the cue of the previous episode must be out of reach: 0.5."""
    config, env = anneal(MEMORY, 50_000), DelayedMemory(32)
    trained = train.score(env, train(env, config, 50_000), episodes=512)
    forgetful = train.score(env, train(env, replace(config, memory=False), 50_000), episodes=512)
    previous = DelayedMemory(32, previous=True)
    leaked = train.score(previous, train(previous, config, 50_000), episodes=512)
    print(
        f"PPO-LSTM, delayed memory: bar >= 0.95, {trained:.2f}, control {forgetful:.2f} (no LSTM), {leaked:.2f} (last episode's cue)"
    )
    assert trained >= 0.95 and 0.4 < forgetful < 0.6 and 0.4 < leaked < 0.6


@pytest.mark.learn
def test_endless_reward_is_valued_at_50(cache_dir):
    """The network's own V(s0), gamma 0.98, cut every 8 steps: 50 +- 1. Truncation taken for an end would give 8 at most."""
    config = replace(BANDIT, gamma=0.98, lr=3e-2, lr_end=1e-3, anneal_updates=400, value_coef=1.0)
    agent = PPO(1, 2, 0, config, 0, cache_dir)
    rollouts = Rollouts(EndlessReward(8), agent)
    for _ in range(400):
        agent.update(rollouts.collect(config.steps)[0])
    value = float(agent.value(rollouts.observation, rollouts.hidden, rollouts.reset).mean())
    print(f"PPO, endless reward: bar 50 +- 1, {value:.1f}, control 8 at most, were truncation an end")
    assert abs(value - 50) < 1


@pytest.mark.bench
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cartpole_in_100k_steps(train, seed):
    """>= 475 in 3 of 3 seeds, where 200k are allowed. An untrained agent that samples scores about 22."""
    env, config = CartPole(16), anneal(POLE, 100_000)
    score = train.score(env, train(env, config, 100_000, seed, wrap=scaled), episodes=48)
    untrained = train.score(env, train(env, config, 0, seed), episodes=48, temperature=1.0)
    print(f"PPO-LSTM, CartPole, 100k steps, seed {seed}: bar >= 475, {score:.1f}, control {untrained:.1f} (untrained)")
    assert score >= 475 and untrained < 50


@pytest.mark.bench
def test_cartpole_without_velocities_in_100k_steps(train):
    """>= 450 in 4 of 5 seeds with memory; the same net without it stays under 100."""
    env, config = CartPole(16, velocities=False), anneal(replace(POLE, lam=0.98, lr_end=0.0), 100_000)
    scores = [train.score(env, train(env, config, 100_000, seed, wrap=scaled), episodes=48) for seed in range(5)]
    blind = replace(config, memory=False)
    control = train.score(env, train(env, blind, 100_000, wrap=scaled), episodes=48)
    shown = ", ".join(f"{s:.0f}" for s in scores)
    print(f"PPO-LSTM, CartPole without velocities: bar >= 450 in 4 of 5, {shown}, control {control:.1f} (no LSTM)")
    assert sum(s >= 450 for s in scores) >= 4 and control < 100
