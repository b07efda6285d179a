from dataclasses import replace

import numpy as np
import pytest

from agents.ppo import PPOConfig
from agents.protocol import Observation, Step
from agents.rollout import Rollouts
from agents.stacking import FrameStack
from agents.toys import CartPole, DelayedMemory, EndlessReward, MaskedIdentity
from agents.uniform import Uniform

REACTIVE = PPOConfig(
    steps=8, n_envs=32, hidden=32, memory=False, gamma=0.99, lr=1e-2, lr_end=1e-3, entropy=0.02, entropy_end=0.0
)


class Counter:
    """Two environments that count 1, 2, 3, ... without end. Row 0 terminates at every multiple of 3; row 1 is cut at
    every multiple of 4, where its final state is the number it would have come to, with a minus."""

    n_envs, state_dim, n_actions, action_dim = 2, 1, 2, 1

    def look(self, state):
        features = np.full((2, 2, 1), self.age, np.float32)
        return Observation(np.array(state, np.float32)[:, None], np.array([[True, self.age % 2 == 0]] * 2), features)

    def reset(self, seed):
        self.age = 1
        return self.look([1, 1])

    def step(self, actions):
        self.age += 1
        terminated = np.array([self.age % 3 == 0, False])
        truncated = np.array([False, self.age % 4 == 0])
        final = self.look([-self.age, -self.age]) if truncated.any() else None
        return Step(self.look([self.age] * 2), np.full(2, self.age, np.float32), terminated, truncated, final)


def test_stacks_by_hand():
    """k = 3. What comes with an end is the next episode's first state: zeros stand before it."""
    env = FrameStack(Counter(), 3)
    assert (env.n_envs, env.state_dim, env.n_actions, env.action_dim) == (2, 3, 2, 1)
    assert env.reset(0).state.tolist() == [[0, 0, 1], [0, 0, 1]]
    steps = [env.step(np.zeros(2, int)) for _ in range(6)]
    assert [s.observation.state[0].tolist() for s in steps] == [
        [0, 1, 2], [0, 0, 3], [0, 3, 4], [3, 4, 5], [0, 0, 6], [0, 6, 7],
    ]  # fmt: skip
    assert [s.observation.state[1].tolist() for s in steps] == [
        [0, 1, 2], [1, 2, 3], [0, 0, 4], [0, 4, 5], [4, 5, 6], [5, 6, 7],
    ]  # fmt: skip
    assert [s.final is None for s in steps] == [True, True, False, True, True, True]
    assert steps[2].final.state[1].tolist() == [2, 3, -4]  # the end of the episode that was cut
    assert env.reset(0).state.tolist() == [[0, 0, 1], [0, 0, 1]]


def test_all_but_the_state_passes_through():
    inner, env = Counter(), FrameStack(Counter(), 2)
    pairs = [(inner.reset(0), env.reset(0))]
    for _ in range(4):
        bare, stacked = inner.step(np.zeros(2, int)), env.step(np.zeros(2, int))
        assert np.array_equal(bare.reward, stacked.reward) and np.array_equal(bare.terminated, stacked.terminated)
        assert np.array_equal(bare.truncated, stacked.truncated)
        pairs.append((bare.observation, stacked.observation))
        if bare.final is not None:
            pairs.append((bare.final, stacked.final))
    assert len(pairs) == 6
    for bare, stacked in pairs:
        assert np.array_equal(bare.mask, stacked.mask) and np.array_equal(bare.actions, stacked.actions)
        assert stacked.state.dtype == np.float32 and np.array_equal(stacked.state[:, -1:], bare.state)


@pytest.mark.parametrize("make", [
    lambda: CartPole(3, limit=15), lambda: DelayedMemory(3), lambda: EndlessReward(3),
    lambda: MaskedIdentity(3, limit=4),
])  # fmt: skip
def test_stacks_equal_those_cut_from_the_bare_states_and_smaller_ones_are_their_ends(make):
    """One world under k = 1, 2 and 5, all driven by one stream of random actions."""

    def collect(env):
        return Rollouts(env, Uniform(env.state_dim, env.n_actions, seed=1), seed=5).collect(40)[0]

    D, bare = make().state_dim, collect(make())
    one, two, five = (collect(FrameStack(make(), k)) for k in (1, 2, 5))
    assert np.array_equal(one.state, bare.state) and bare.ended.any()
    assert np.array_equal(two.state, five.state[..., -2 * D :])
    for b in range(3):
        episode: list[np.ndarray] = []
        for t in range(40):
            episode = ([] if bare.reset[t, b] else episode) + [bare.state[t, b]]
            padded = [np.zeros(D)] * 5 + episode
            assert np.array_equal(five.state[t, b], np.concatenate(padded[-5:])), (t, b)


def test_restarted_rows_begin_anew_and_the_others_do_not_move():
    env = FrameStack(CartPole(3), 2)
    before, first = env.reset(0).state, env.step(np.ones(3, int)).observation.state
    after = env.restart(np.array([1])).state
    assert np.array_equal(after[[0, 2]], first[[0, 2]]) and np.array_equal(first[:, :4], before[:, 4:])
    assert not after[1, :4].any() and not np.array_equal(after[1, 4:], first[1, 4:])
    assert np.array_equal(env.step(np.ones(3, int)).observation.state[:, :4], after[:, 4:])


def test_observations_given_out_are_not_changed_later():
    env = FrameStack(EndlessReward(2, limit=2), 3)
    first = env.reset(0).state
    kept = first.copy()
    for _ in range(5):
        env.step(np.zeros(2, int))
    assert np.array_equal(first, kept)


def test_a_stack_of_nothing_is_refused():
    with pytest.raises(ValueError, match="k must be"):
        FrameStack(EndlessReward(2), 0)


@pytest.mark.learn
def test_a_stack_of_4_remembers_over_3_steps(train):
    """>= 0.95 by a PPO without memory. With a stack of 3 the cue is just out of sight: 0.5, as without one."""
    steps, scores = 12_000, {}
    config = replace(REACTIVE, anneal_updates=steps // (REACTIVE.steps * REACTIVE.n_envs))
    for k in (4, 3, 1):
        env = FrameStack(DelayedMemory(32, delay=3), k)
        scores[k] = train.score(env, train(env, config, steps), episodes=512)
    print(
        f"PPO without LSTM, stack of 4, delayed memory of 3: bar >= 0.95, {scores[4]:.2f}, "
        f"control {scores[3]:.2f} (stack of 3), {scores[1]:.2f} (no stack)"
    )
    assert scores[4] >= 0.95 and 0.4 < scores[3] < 0.6 and 0.4 < scores[1] < 0.6
