"""Normalisation: exact statistics, frozen while they act, the same after loading, and worth having."""

import json
from dataclasses import replace

import numpy as np
import pytest

from agents import checkpoint
from agents.exploration import Wrapper
from agents.normalise import NormaliseConfig, Normalised, RunningMoments
from agents.ppo import PPO, PPOConfig
from agents.protocol import Observation, Step
from agents.rollout import Action, Rollouts, evaluate
from agents.toys import Identity

QUICK = PPOConfig(steps=4, n_envs=64, hidden=16, memory=False, gamma=0.0, lr=5e-2, lr_end=5e-2, entropy=0.0,
                  entropy_end=0.0, clip=0.3, max_grad_norm=10.0)  # fmt: skip


class Far(Identity):
    """Identity seen from afar: a large common number hides the differences from a tanh."""

    def state(self):
        return super().state() + 100


class Wild:
    """States of any scale that drift, random masks and rewards; every 3rd step ends even rows and cuts odd ones."""

    n_envs, state_dim, n_actions, action_dim = 64, 4, 4, 0

    def look(self):
        mask = self.rng.random((64, 4)) < 0.6
        mask[:, 2] = True
        state = self.rng.standard_normal((64, 4)) * [1, 30, 1e-3, 0] + [self.age, 100, 0, 7]
        return Observation(state.astype(np.float32), mask)

    def reset(self, seed):
        self.rng, self.age = np.random.default_rng(seed), 0
        return self.look()

    def step(self, actions):
        self.age += 1
        ended, odd = np.full(64, self.age % 3 == 0), np.arange(64) % 2 == 1
        reward = 50 * self.rng.standard_normal(64).astype(np.float32)
        return Step(self.look(), reward, ended & ~odd, ended & odd, self.look() if ended.any() else None)


@pytest.fixture
def make(cache_dir):
    def make(seed=0, cls=Normalised, **settings):
        return cls(PPO(4, 4, 0, QUICK, seed, cache_dir), NormaliseConfig(**settings))

    return make


class Spy(Wrapper):
    """Learns nothing; keeps what it was given."""

    dims, updates, name = (4, 4, 0), 0, "spy"

    def __init__(self):
        super().__init__(None)

    def update(self, rollout):
        self.given = rollout
        return {"loss": 1.0}


def spied(rollout, **settings):
    """What an agent inside is given of a rollout, and the agent around it."""
    agent = Normalised(Spy(), NormaliseConfig(**settings))
    agent.update(rollout)
    return agent.agent.given, agent


@pytest.fixture(scope="module")
def rollout():
    """4 steps of 64 environments by nobody in particular."""

    class Random:
        initial_hidden = staticmethod(lambda n: np.zeros((n, 2), np.float32))

        def value(self, observation, hidden, reset):
            return np.full(64, 3, np.float32)

        def act(self, observation, hidden, reset, temperature=1.0):
            return Action(np.full(64, 2, np.int32), np.zeros(64, np.float32), self.value(*[None] * 3), hidden)

    return Rollouts(Wild(), Random()).collect(4)[0]


def test_moments_do_not_depend_on_how_a_stream_is_cut():
    """Against numpy over everything at once. 1e8 beside a spread of 1: sums of squares alone would lose all digits."""
    x = np.random.default_rng(0).standard_normal((1000, 3)) * [1, 1e-3, 5] + [1e8, 0, -7]
    for cuts in ([], [500], [1, 2, 3, 999], [0, 400, 400]):
        moments = RunningMoments(3)
        for piece in np.split(x, cuts):
            moments.add(piece)
        assert np.allclose(moments.mean, x.mean(0), rtol=1e-12) and np.allclose(moments.variance, x.var(0), rtol=1e-6)
    left, right, both = (RunningMoments(3) for _ in range(3))
    left.add(x[:10]), right.add(x[10:]), both.add(x)
    left.merge(right.array)
    assert np.allclose(left.array, both.array, rtol=1e-6)
    naive = (x**2).mean(0) - x.mean(0) ** 2
    assert abs(naive[0] - x.var(0)[0]) > 0.1, "the sum of squares would have done here: a harder case is needed"
    assert RunningMoments(2).variance.tolist() == [1, 1] and RunningMoments(2).mean.tolist() == [0, 0]


def test_observations_by_hand():
    """Seen: 0, 2, 4 (mean 2, std sqrt(8/3)) and 7, 7, 7, which never varied and is only shifted. Clipped at 2."""
    agent = Normalised(Spy(), NormaliseConfig(clip=2.0))
    agent.observed = RunningMoments(2)
    agent.observed.add(np.array([[0, 7], [2, 7], [4, 7]], np.float32))
    given = agent.normalise(np.array([[0, 7], [3, 8], [100, -100]], np.float32))
    assert given.dtype == np.float32
    assert np.allclose(given, [[-1.2247449, 0], [0.6123724, 1], [2, -2]])


def test_rewards_by_hand(rollout):
    reward = np.broadcast_to(np.array([[3], [-1], [0], [-7]], np.float32), (4, 64))
    given, _ = spied(replace(rollout, reward=reward), reward="log")
    assert given.reward[:, 0].tolist() == [2, -1, 0, -3] and given.reward.dtype == np.float32
    given, _ = spied(replace(rollout, reward=reward))
    assert np.array_equal(given.reward, reward)


def test_rewards_are_divided_by_the_spread_of_discounted_returns(rollout):
    """Over two chunks, each return summed anew from its episode's beginning (O(T^2)); the scale cancels out."""
    rng = np.random.default_rng(1)
    chunks = [replace(rollout, reward=50 * rng.standard_normal((4, 64)).astype(np.float32)) for _ in range(2)]
    chunks[1] = replace(chunks[1], reset=np.roll(rollout.reset, 1, axis=0))
    chunks[1].reset[0] = np.arange(64) % 3 == 0  # most go on with the episode of the chunk before
    agent = Normalised(Spy(), NormaliseConfig(reward="scale", gamma=0.9))
    reward, reset = (np.concatenate([getattr(c, k) for c in chunks]).astype(np.float64) for k in ("reward", "reset"))
    returns = np.zeros_like(reward)
    for b in range(64):
        for t in range(8):
            begin = max(s for s in range(t + 1) if reset[s, b] or s == 0)
            returns[t, b] = sum(0.9 ** (t - s) * reward[s, b] for s in range(begin, t + 1))
    for n, chunk in enumerate(chunks, 1):
        metrics = agent.update(chunk)
        spread = returns[: 4 * n].std()
        assert metrics == {"loss": 1.0, "reward_scale": pytest.approx(spread)}
        assert np.allclose(agent.agent.given.reward, chunk.reward / spread, rtol=1e-5)
    once, _ = spied(rollout, reward="scale")
    tenfold, _ = spied(replace(rollout, reward=10 * rollout.reward), reward="scale")
    assert np.allclose(once.reward, tenfold.reward, rtol=1e-5)


def test_a_rollout_keeps_what_acting_produced_and_counts_for_the_next_one_only(rollout):
    state = np.random.default_rng(2).standard_normal((4, 64, 4)).astype(np.float32) * 2 + 1  # not clipped
    given, agent = spied(replace(rollout, state=state), reward="log")
    assert np.array_equal(given.state, state), "the first rollout was acted in without any statistics"
    for name in ("value", "bootstrap", "last_value", "log_prob", "mask", "reset", "hidden", "action"):
        assert getattr(given, name) is getattr(rollout, name), name
    agent.update(replace(rollout, state=state))
    seen = agent.agent.given.state
    assert np.abs(seen.mean((0, 1))).max() < 1e-5 and np.abs(seen.std((0, 1)) - 1).max() < 1e-5


def test_with_everything_off_it_is_the_agent_itself(make):
    plain, wrapped = make(1).agent, make(1, observations=False)
    for agent in (plain, wrapped):
        rollouts = Rollouts(Wild(), agent, 1)
        for _ in range(2):
            agent.update(rollouts.collect(4)[0])
    assert np.array_equal(plain.policy.theta.numpy(), wrapped.policy.theta.numpy())


class Early(Normalised):
    """Broken: moves its statistics before the agent learns."""

    def update(self, rollout):
        self.observed.add(rollout.state.reshape(-1, 4))
        return super().update(rollout)


def test_what_acts_is_what_learns(make):
    """Before the first step of each of 3 updates the ratio is 1 +- 1e-4. Statistics moved too early: above 0.01."""
    worst = {}
    for cls in (Normalised, Early):
        agent = make(2, cls)
        rollouts = Rollouts(Wild(), agent, 2)
        worst[cls] = max(agent.update(rollouts.collect(4)[0])["first_ratio_error"] for _ in range(3))
    print(f"ratio error, normalised: bar <= 1e-4, {worst[Normalised]:.1e}, moved too early {worst[Early]:.3f}")
    assert worst[Normalised] <= 1e-4 and worst[Early] > 0.01


def test_a_loaded_agent_sees_the_same_and_evaluation_moves_nothing(make, tmp_path):
    agent = make(3, reward="scale")
    rollouts = Rollouts(Wild(), agent, 3)
    for _ in range(2):
        agent.update(rollouts.collect(4)[0])
    kept = agent.observed.array.copy(), agent.returned.array.copy()
    evaluate(Wild(), agent, 64)
    assert np.array_equal(agent.observed.array, kept[0]) and np.array_equal(agent.returned.array, kept[1])
    checkpoint.save(tmp_path / "agent", *agent.state())
    loaded = make(4, reward="scale")
    loaded.load_state(*checkpoint.load(tmp_path / "agent"))
    seen = Rollouts(Wild(), agent, 5).observation
    inputs = seen, agent.initial_hidden(64), np.ones(64, np.float32)
    for method in ("evaluate", "act", "value"):
        ours, theirs = (getattr(a, method)(*inputs) for a in (agent, loaded))
        pairs = [(ours, theirs)] if method == "value" else zip(ours, theirs, strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs), method
    assert np.array_equal(agent.value(*inputs), agent.evaluate(*inputs)[1])
    assert np.array_equal(agent.value(*inputs), agent.act(*inputs).value)
    bare = agent.agent.evaluate(*inputs)[0]
    assert np.abs(bare - agent.evaluate(*inputs)[0]).max() > 1e-3, "normalised or not makes no difference here"
    json.dumps(loaded.state()[1])


def test_a_state_of_other_settings_is_refused(make):
    agent = make(5)
    tensors, meta = agent.state()
    with pytest.raises(checkpoint.CheckpointError, match=r"clip=10\.0, not 5\.0"):
        make(5, clip=5.0).load_state(tensors, meta)
    with pytest.raises(checkpoint.CheckpointError, match="normalise/observations is missing"):
        agent.load_state(*agent.agent.state())
    with pytest.raises(checkpoint.CheckpointError, match="normalise/observations has shape"):
        agent.load_state(tensors | {"normalise/observations": np.zeros((3, 5))}, meta)
    for key, value in (("reward", "sqrt"), ("clip", 0.0), ("gamma", 1.5)):
        with pytest.raises(ValueError, match=key):
            NormaliseConfig(**{key: value})


def test_far_away_numbers_are_learned_when_normalised(make):
    """Identity with 100 added to every observation, 8 updates: >= 3.9 of 4. Not normalised <= 2.5; by chance 1."""
    scores = {}
    for observations in (True, False):
        agent = make(0, observations=observations)
        rollouts = Rollouts(Far(64, limit=4), agent)
        for _ in range(8):
            agent.update(rollouts.collect(4)[0])
        scores[observations] = np.mean([e.total for e in evaluate(Far(64, limit=4), agent, 64, seed=99)])
    print(f"far identity, normalised: bar >= 3.9 of 4, {scores[True]:.1f}, not normalised {scores[False]:.1f}")
    assert scores[True] >= 3.9 and scores[False] <= 2.5
