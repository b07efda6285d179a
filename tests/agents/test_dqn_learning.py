"""What DQN must learn, and what a control run beside it scores."""

from dataclasses import replace
from functools import partial

import pytest
from learned import Strangers, annealed, score

from agents.dqn import DQN, DQNConfig
from agents.toys import DelayedMemory, Identity, MaskedIdentity

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
