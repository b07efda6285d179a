import numpy as np
import pytest

from agents.protocol import InvalidObservation, Observation, check
from agents.returns import gae
from agents.rollout import Action, Rollouts, evaluate
from agents.toys import EndlessReward, FixedSequence, Toy


class Stub:
    """Acts at random, values everything at `worth`; its memory counts the steps since the episode began."""

    def __init__(self, worth=0.0):
        self.worth, self.rng = worth, np.random.default_rng(0)

    def initial_hidden(self, n):
        return np.zeros((n, 2), np.float32)

    def value(self, observation, hidden, reset):
        return np.full(len(hidden), self.worth, np.float32)

    def act(self, observation, hidden, reset, temperature=1.0):
        hidden = hidden * (1 - reset)[:, None] + 1
        action = self.rng.integers(0, observation.mask.shape[1], len(hidden)).astype(np.int32)
        return Action(action, np.zeros(len(hidden), np.float32), self.value(observation, hidden, reset), hidden)


def test_memory_and_flags_are_carried_from_chunk_to_chunk():
    rollouts = Rollouts(FixedSequence(2, length=3), Stub())
    first, _ = rollouts.collect(4)
    second, episodes = rollouts.collect(4)
    assert not first.hidden.any() and second.hidden[0, 0] == 1  # the fourth step was the next episode's first
    assert first.reset[:, 0].tolist() == [1, 0, 0, 1] and second.reset[:, 0].tolist() == [0, 0, 1, 0]
    assert first.ended[:, 0].tolist() == [False, False, True, False]
    assert [(e.env, e.length) for e in episodes] == [(0, 3), (1, 3)]
    assert first.action.shape == (4, 2) and first.state.shape == (4, 2, 1) and first.actions is None


def test_an_endless_reward_is_worth_50_and_8_if_truncation_were_an_end():
    """gamma .98, cut every 8 steps: the fixed point of V <- mean(A + V), through Rollouts and GAE."""

    def fixed_point(as_end):
        worth = 0.0
        for _ in range(150):
            r, _ = Rollouts(EndlessReward(4), Stub(worth)).collect(16)
            terminated = r.ended if as_end else r.terminated
            worth = float(
                (gae(r.reward, r.value, terminated, r.ended, r.last_value, 0.98, 0.95, r.bootstrap) + worth).mean()
            )
        return worth

    assert abs(fixed_point(as_end=False) - 50) < 1
    assert fixed_point(as_end=True) < 8


def test_the_final_observation_is_valued_with_the_memory_of_its_own_episode():
    class Spy(Stub):
        def value(self, observation, hidden, reset):
            return hidden[:, 0] * (1 - reset)

    rollout, _ = Rollouts(EndlessReward(2, limit=3), Spy()).collect(4)
    assert rollout.bootstrap[:, 0].tolist() == [0, 0, 3, 0]  # 3 steps remembered, not a fresh episode's 0
    assert rollout.last_value[0] == 1


def test_returns_and_lengths_of_episodes():
    episodes = evaluate(EndlessReward(2, limit=5), Stub(), 6)
    assert [(e.total, e.length) for e in episodes] == [(5.0, 5)] * 6


class Uneven(Toy):
    """Episodes as long as `lengths` says, one number for each environment."""

    state_dim = n_actions = 1

    def __init__(self, lengths):
        super().__init__(len(lengths), limit=10**9)
        self.lengths = np.array(lengths)

    def begin(self, rows):
        pass

    def state(self):
        return np.zeros((self.n_envs, 1))

    def advance(self, actions):
        return np.ones(self.n_envs), self.age + 1 >= self.lengths


@pytest.mark.parametrize("lengths, episodes, kept", [
    ([1, 2, 3, 4], 5, [1, 1, 2, 3, 4]),  # the first five to end are 1, 1, 2, 2 and 3 steps long
    ([4, 3, 2, 1], 5, [1, 2, 3, 4, 4]),
    ([1, 2, 3, 4], 8, [1, 1, 2, 2, 3, 3, 4, 4]),
    ([4, 3, 2, 1], 2, [3, 4]),
])  # fmt: skip
def test_short_episodes_count_no_more_than_long_ones(lengths, episodes, kept):
    """Each environment gives episodes // 4, and the first ones the rest."""
    assert sorted(e.length for e in evaluate(Uneven(lengths), Stub(), episodes)) == kept


@pytest.mark.parametrize("damage", ["mask", "state", "actions"])
def test_a_bad_observation_names_its_row(damage):
    good = Observation(np.zeros((3, 2), np.float32), np.ones((3, 4), bool), np.zeros((3, 4, 2), np.float32))
    assert check(good) is good
    if damage == "mask":
        good.mask[1] = False
    else:
        getattr(good, damage)[1, 0] = np.nan
    with pytest.raises(InvalidObservation, match="environment 1"):
        check(good)


def test_a_truncation_without_a_final_observation_is_refused():
    class Forgetful(EndlessReward):
        def step(self, actions):
            return super().step(actions)._replace(final=None)

    with pytest.raises(ValueError, match="final observation"):
        Rollouts(Forgetful(2, limit=2), Stub()).collect(3)
