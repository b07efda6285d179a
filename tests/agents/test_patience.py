"""Patience: which episodes are stuck, what that costs, and that the others never notice."""

import numpy as np
import pytest

from agents.patience import Patience
from agents.returns import gae
from agents.rollout import Action, Rollouts
from agents.toys import CartPole, Toy


class Corridor(Toy):
    """Action 1 walks on, 0 stands still; each episode begins elsewhere and pays 1 at place 9."""

    state_dim, n_actions = 1, 2

    def __init__(self, n_envs, limit=100, first=0):
        super().__init__(n_envs, limit)
        self.place, self.first, self.begun = np.zeros(n_envs, np.int64), first, np.zeros(n_envs, np.int64)

    def begin(self, rows):
        self.begun[rows] += 1
        self.place[rows] = self.first

    def state(self):
        return self.place[:, None]

    def advance(self, actions):
        self.place = self.place + actions
        return (self.place == 9).astype(float), self.place == 9


def play(env, *plan):
    """Rewards, terminated and truncated of a plan [T][B]."""
    env.reset(0)
    steps = [env.step(np.array(actions)) for actions in plan]
    return [np.array([getattr(s, k) for s in steps]).T.tolist() for k in ("reward", "terminated", "truncated")]


def test_a_stuck_row_ends_with_a_penalty_and_begins_anew_while_the_others_go_on():
    """Limit 2. Row 0 walks; row 1 stands for two steps; row 2 stands, walks, and only then stands twice."""
    inner = Corridor(3)
    env = Patience(inner, limit=2, penalty=-0.5)
    reward, terminated, truncated = play(env, [1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 0])
    assert terminated == [[False] * 4, [False, True, False, False], [False, False, False, True]]
    assert reward == [[0] * 4, [0, -0.5, 0, 0], [0, 0, 0, -0.5]] and not np.any(truncated)
    assert inner.place.tolist() == [4, 2, 0] and inner.begun.tolist() == [1, 2, 2] and inner.age.tolist() == [4, 2, 0]


def test_counting_starts_afresh_with_every_episode():
    """Standing for ever at limit 3: an end at every 3rd step, not at every step from the 3rd on."""
    _, terminated, _ = play(Patience(Corridor(1), 3), *[[0]] * 9)
    assert terminated == [[False, False, True] * 3]
    env = Patience(Corridor(1, limit=2), 3)  # cut after 2 steps, where the next episode looks the same
    _, terminated, truncated = play(env, *[[0]] * 8)
    assert not np.any(terminated) and truncated == [[False, True] * 4]
    env = Patience(Corridor(1), 3)
    play(env, [0], [0])
    _, terminated, _ = play(env, [0], [0])
    assert not np.any(terminated), "a reset did not clear the count"


@pytest.mark.parametrize("changes", [True, False])
def test_a_change_of_the_mask_alone_is_a_change(changes):
    class Blinking(Corridor):
        def mask(self):
            return np.array([[True, not changes or self.age[0] % 2 == 0]])

    _, terminated, _ = play(Patience(Blinking(1), 2), *[[0]] * 6)
    assert terminated == [[False] * 6 if changes else [False, True] * 3]


@pytest.mark.parametrize("limit", [1, 10**6])
def test_where_nothing_is_stuck_nothing_changes(limit):
    """CartPole never shows the same twice: to the bit the bare environment, whatever the limit."""
    bare, env = CartPole(4, limit=20), Patience(CartPole(4, limit=20), limit)
    assert np.array_equal(bare.reset(3).state, env.reset(3).state)
    rng = np.random.default_rng(0)
    for _ in range(60):
        actions = rng.integers(0, 2, 4)
        a, b = bare.step(actions), env.step(actions)
        assert np.array_equal(a.observation.state, b.observation.state) and np.array_equal(a.reward, b.reward)
        assert np.array_equal(a.terminated, b.terminated) and np.array_equal(a.truncated, b.truncated)


def test_rollouts_count_the_penalty_and_nothing_is_bootstrapped_over_the_end():
    class Lazy:
        """Stands still, and thinks that everything is worth 100."""

        initial_hidden = staticmethod(lambda n: np.zeros((n, 2), np.float32))

        def value(self, observation, hidden, reset):
            return np.full(len(hidden), 100, np.float32)

        def act(self, observation, hidden, reset, temperature=1.0):
            n = len(hidden)
            return Action(
                np.zeros(n, np.int32), np.zeros(n, np.float32), self.value(observation, hidden, reset), hidden
            )

    r, episodes = Rollouts(Patience(Corridor(2), 4, penalty=-3), Lazy()).collect(4)
    assert [(e.total, e.length) for e in episodes] == [(-3, 4), (-3, 4)] and r.reward.dtype == np.float32
    advantage = gae(r.reward, r.value, r.terminated, r.ended, r.last_value, 1.0, 1.0, r.bootstrap)
    assert np.allclose(advantage, -3 - 100)


def test_what_it_cannot_wrap_is_said():
    class Whole:
        n_envs = state_dim = n_actions = 1
        action_dim = 0

    with pytest.raises(TypeError, match="restart.*Whole has not"):
        Patience(Whole(), 3)
    with pytest.raises(ValueError, match="limit"):
        Patience(Corridor(1), 0)
    with pytest.raises(ValueError, match="penalty"):
        Patience(Corridor(1), 1, penalty=0.5)
