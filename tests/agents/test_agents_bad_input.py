"""What an agent may be given by mistake, through the training loop: one clear error that names it; and two odd shapes
that are no mistake."""

from dataclasses import replace

import numpy as np
import pytest

from agents.checkpoint import CheckpointError
from agents.ppo import PPO, PPOConfig
from agents.protocol import InvalidObservation
from agents.toys import Identity, Toy
from agents.training import TrainingConfig, train

ONE = PPOConfig(steps=4, n_envs=1, hidden=8, memory=False, epochs=1)
SHORT = TrainingConfig(max_steps=12, checkpoint_every=2)


@pytest.fixture
def make(cache_dir):
    return lambda **settings: PPO(4, 4, 0, replace(ONE, **settings), 0, cache_dir)


class Faulty(Identity):
    """Breaks in its 6th step: "state" shows a NaN, "mask" leaves nothing legal."""

    def __init__(self, fault):
        super().__init__(1, limit=4)
        self.fault, self.steps = fault, 0

    def advance(self, actions):
        self.steps += 1
        return super().advance(actions)

    def state(self):
        return super().state() * (np.nan if self.fault == "state" and self.steps >= 6 else 1)

    def mask(self):
        return super().mask() & (self.fault != "mask" or self.steps < 6)


@pytest.mark.parametrize("fault, message", [
    ("state", "environment 0: observation holds NaN or infinity"),
    ("mask", "environment 0: no action is legal"),
])  # fmt: skip
def test_a_bad_observation_ends_the_run_with_its_row(make, tmp_path, fault, message):
    with pytest.raises(InvalidObservation, match=message):
        train(make(), Faulty(fault), SHORT, tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1, "the update before was lost"


class OneStep(Toy):
    """Every episode is over after its only step."""

    state_dim = n_actions = 4

    def begin(self, rows):
        pass

    def state(self):
        return np.ones((self.n_envs, 4))

    def advance(self, actions):
        return actions == 2, np.ones(self.n_envs, bool)


@pytest.mark.parametrize("env", [OneStep(1, limit=10), Identity(1, limit=1)], ids=["terminated", "truncated"])
def test_a_batch_of_one_and_episodes_of_one_step_are_trained_on(make, env):
    agent, rows = make(), []
    before = agent.policy.theta.numpy().copy()
    result = train(agent, env, SHORT, log=lambda *row: rows.append(row))
    assert result.updates == 3 and result.steps == 12
    assert [value for name, value, _ in rows if name == "length"] == [1, 1, 1]
    assert [value for name, value, _ in rows if name == "episodes"] == [4, 4, 4]
    assert np.isfinite([value for _, value, _ in rows]).all() and (agent.policy.theta.numpy() != before).any()


def test_a_checkpoint_of_another_shape_is_refused_and_changes_nothing(make, cache_dir, tmp_path):
    train(make(), Identity(1, limit=4), SHORT, tmp_path)
    for other, n, message in (
        (make(hidden=16), 4, "made with hidden=8, so it cannot be resumed with hidden=16"),
        (PPO(5, 5, 0, ONE, 0, cache_dir), 5, r"encoder1\.weight has shape \(4, 8\), expected \(5, 8\)"),
    ):
        before = other.policy.theta.numpy().copy()
        with pytest.raises(CheckpointError, match=message):
            train(other, Identity(1, n, limit=4), SHORT, tmp_path, resume=True)
        assert np.array_equal(other.policy.theta.numpy(), before)
    with pytest.raises(CheckpointError, match="no checkpoint at .*nowhere"):
        train(make(), Identity(1, limit=4), SHORT, tmp_path / "nowhere", resume=True)
