import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from agents import checkpoint, training
from agents.checkpoint import CheckpointError
from agents.frequency import Frequency, FrequencyConfig, threshold
from agents.logs import whole_episodes
from agents.protocol import Observation
from agents.rollout import Rollouts, evaluate
from agents.toys import DelayedMemory, FixedSequence, Identity, MaskedIdentity
from agents.uniform import Uniform
from agents.zoo import AGENTS, Settings, teach

CONFIG = FrequencyConfig(limit=3, elite=0.5, window=4, decay=0.5, prior=0.25)


def rollout(action, reward, reset, ended):
    """What Frequency reads of a rollout, from lists of columns."""
    as_rows = lambda columns, dtype: np.array(columns, dtype).T  # noqa: E731
    return SimpleNamespace(
        action=as_rows(action, np.int32),
        reward=as_rows(reward, np.float32),
        reset=as_rows(reset, np.float32),
        ended=as_rows(ended, bool),
    )


def score(env, agent, episodes, temperature=0.0):
    return float(np.mean([e.total for e in evaluate(env, agent, episodes, seed=10_000, temperature=temperature)]))


def train(env, steps, updates, config=None, seed=0):
    agent = Frequency(env.state_dim, env.n_actions, config=config, seed=seed)
    rollouts = Rollouts(env, agent, seed)
    for _ in range(updates):
        agent.update(rollouts.collect(steps)[0])
    return agent


class Neighbours(FixedSequence):
    """Pays each copy for what its neighbour did: nothing can be learned, unless rows of a batch are mixed up."""

    def advance(self, actions):
        reward, terminated = super().advance(actions)
        return np.roll(reward, 1), terminated


# *** random ***


def test_random_scores_what_chance_gives():
    """Identity 100/4, masked identity 100/15, sequence 1/10; within 4 standard errors, at temperature 0 as at 1."""
    for env, episodes, chance, error in (
        (Identity(64), 64, 25.0, (100 * 0.25 * 0.75 / 64) ** 0.5),
        (MaskedIdentity(64), 64, 100 / 15, (100 * 14 / 15**2 / 64) ** 0.5),
        (FixedSequence(64), 2048, 0.1, (5 * 0.09 / 25 / 2048) ** 0.5),
    ):
        for temperature in (0.0, 1.0):
            found = score(env, Uniform(env.state_dim, env.n_actions, seed=3), episodes, temperature)
            print(f"random, {type(env).__name__}: bar {chance:.2f} +- {4 * error:.2f}, {found:.2f}")
            assert abs(found - chance) < 4 * error


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_random_is_uniform_over_legal_actions_at_any_temperature(temperature):
    agent, mask = Uniform(1, 4, seed=1), np.array([[True, False, True, True], [False, False, False, True]])
    seen, counts = Observation(np.zeros((2, 1), np.float32), mask), np.zeros((2, 4))
    hidden = agent.initial_hidden(2)
    for _ in range(3000):
        choice = agent.act(seen, hidden, np.zeros(2, np.float32), temperature)
        counts[np.arange(2), choice.action] += 1
        assert np.allclose(choice.log_prob, [-np.log(3), 0]) and choice.log_prob.dtype == np.float32
    assert np.abs(counts / 3000 - mask / mask.sum(1, keepdims=True)).max() < 0.04 and (counts[~mask] == 0).all()
    assert choice.hidden.shape == hidden.shape and choice.action.dtype == np.int32 and not choice.value.any()


def test_random_resumes_bit_exactly_through_a_file(tmp_path):
    env = MaskedIdentity(2, n=9, illegal=4, limit=5)

    def finish(agent):
        return Rollouts(env, agent, 4).collect(12)[0].action

    agent = Uniform(9, 9, seed=1)
    assert agent.update(Rollouts(env, agent, 0).collect(7)[0]) == {} and agent.updates == 1
    checkpoint.save(tmp_path / "agent", *agent.state())
    resumed = Uniform(9, 9, seed=2)
    resumed.load_state(*checkpoint.load(tmp_path / "agent"))
    assert resumed.updates == 1 and np.array_equal(finish(agent), finish(resumed))
    assert not np.array_equal(finish(agent), finish(Uniform(9, 9, seed=1)))


# *** the table ***


def test_only_episodes_that_begin_and_end_in_the_rollout_are_whole():
    """Column 0: a tail, a whole episode of 2, a beginning. Column 1: one step, then three. Column 2: a middle."""
    step, total, whole = whole_episodes(
        rollout(
            action=[[0] * 4] * 3,
            reward=[[8, 1, 2, 9], [5, 1, 2, 4], [1, 1, 1, 1]],
            reset=[[0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]],
            ended=[[1, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]],
        )
    ).at_steps()
    assert whole.T.tolist() == [[False, True, True, False], [True] * 4, [False] * 4]
    assert step[whole].tolist() == [0, 0, 0, 1, 1, 2]  # in order of time, then of column
    assert total[whole].tolist() == [5, 3, 7, 3, 7, 7]


def test_whole_episodes_equal_a_walk_through_each_column_and_follow_a_permutation():
    rng = np.random.default_rng(0)
    T, B = 20, 7
    ended = rng.random((T, B)) < 0.3
    reset = np.concatenate([rng.random((1, B)) < 0.5, ended[:-1]]).astype(np.float32)
    r = SimpleNamespace(reward=rng.standard_normal((T, B)).astype(np.float32), reset=reset, ended=ended)
    step, total, whole = whole_episodes(r).at_steps()
    for b in range(B):
        begun = None
        expected = {}
        for t in range(T):
            if reset[t, b]:
                begun = t
            if ended[t, b] and begun is not None:
                expected |= {u: (u - begun, r.reward[begun : t + 1, b].sum()) for u in range(begun, t + 1)}
                begun = None
        assert np.flatnonzero(whole[:, b]).tolist() == sorted(expected)
        assert all(step[t, b] == s and total[t, b] == pytest.approx(g, abs=1e-5) for t, (s, g) in expected.items())
    order = rng.permutation(B)
    moved = whole_episodes(
        SimpleNamespace(reward=r.reward[:, order], reset=reset[:, order], ended=ended[:, order])
    ).at_steps()
    assert np.array_equal(moved[2], whole[:, order]) and np.allclose(moved[1], total[:, order])


@pytest.mark.parametrize("returns, elite, bar", [
    ([0, 1, 2, 3, 4], 0.25, 3.0),   # the best quarter of what lies between 0 and 4
    ([0, 1, 2, 3, 4], 1.0, 1.0),    # everyone, but for the worst: that is not an elite
    ([0, 0, 0, 0, 0, 0, 0, 2], 0.25, 2.0),  # the quantile is 0, which is also the worst
    ([5, 5, 5], 0.25, 5.0),         # all are alike: all of them
])  # fmt: skip
def test_threshold_by_hand(returns, elite, bar):
    assert threshold(np.array(returns, float), elite) == bar
    assert threshold(10 * np.array(returns[::-1], float) + 1, elite) == 10 * bar + 1


def test_an_update_by_hand():
    """Returns 1, 7, 3 of whole episodes: the median is 3, so the second and the third are counted. The fourth column
    holds the tail of an episode, however good. Steps beyond the limit of 3 rows share the last one."""
    r = rollout(
        action=[[0, 0, 1, 1], [2, 1, 2, 1], [3, 3, 3, 3], [3, 3, 3, 3]],
        reward=[[0, 0, 0, 1], [4, 1, 1, 1], [3, 0, 0, 0], [9, 9, 9, 9]],
        reset=[[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]],
        ended=[[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]],
    )
    agent = Frequency(1, 4, config=CONFIG)
    metrics = agent.update(r)
    counts = np.array([[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 1]], float)
    assert np.array_equal(agent.counts, counts)
    assert metrics == {
        "episodes": 3.0,
        "elite_episodes": 2.0,
        "elite_return": 3.0,
        "mean_return": pytest.approx(11 / 3),
    }
    agent.update(r)  # the window of 4 holds 7, 3, 1, 7 in the order in which they ended: only the second is above 5
    counts = counts / 2 + np.array([[0, 0, 1, 0], [0, 1, 0, 0], [0, 1, 1, 0]])
    assert agent.returns.tolist() == [7, 3, 1, 7] and np.array_equal(agent.counts, counts)
    nothing = rollout(action=[[0, 1]], reward=[[9, 9]], reset=[[1, 0]], ended=[[0, 0]])
    agent.update(nothing)  # no episode ended: the old counts decay, and that is all
    assert agent.returns.tolist() == [7, 3, 1, 7] and np.array_equal(agent.counts, counts / 2)
    assert agent.updates == 3 and Frequency(1, 4).update(nothing)["mean_return"] == 0


def test_it_samples_counts_plus_prior_over_legal_actions_at_the_step_of_the_episode():
    """Prior 1/4: row 0 weighs 1/4, 1/4, 5/4, 9/4; without the last action the others are 1/7, 1/7, 5/7."""
    agent, mask = Frequency(1, 4, config=CONFIG, seed=1), np.array([[True, True, True, False]] * 3)
    agent.counts = np.array([[0, 0, 1, 2], [3, 0, 0, 9], [0, 4, 0, 0]], float)
    agent.returns = np.array([1.0, 2.0])
    seen = Observation(np.zeros((3, 1), np.float32), mask)
    hidden, reset = np.array([[7], [1], [9]], np.float32), np.array([1, 0, 0], np.float32)
    greedy = agent.act(seen, hidden, reset, temperature=0)
    assert greedy.action.tolist() == [2, 0, 1]  # rows 0 (reset), 1, and 2 for step 9; never the illegal last action
    assert greedy.hidden.tolist() == [[1], [2], [10]] and greedy.value.tolist() == [1.5] * 3
    for temperature in (1.0, 0.5):
        expected = np.array([0.25, 0.25, 1.25]) ** (1 / temperature)
        expected, counts = expected / expected.sum(), np.zeros(4)
        for _ in range(3000):
            choice = agent.act(seen, hidden, reset, temperature)
            counts[choice.action[0]] += 1
            assert choice.log_prob[0] == pytest.approx(np.log(expected[choice.action[0]]), abs=1e-5)
        assert np.abs(counts[:3] / 3000 - expected).max() < 0.04 and counts[3] == 0
    assert agent.initial_hidden(3).shape == hidden.shape and Frequency(1, 4).value(seen, hidden, reset).sum() == 0


def test_frequency_resumes_bit_exactly_through_a_file(tmp_path):
    env = FixedSequence(4)

    def finish(agent):
        rollouts = Rollouts(env, agent, 7)
        return [agent.update(rollouts.collect(20)[0]) for _ in range(3)], agent.counts

    agent = train(env, 20, 5)
    checkpoint.save(tmp_path / "agent", *agent.state())
    resumed = Frequency(1, 10, seed=60)
    resumed.load_state(*checkpoint.load(tmp_path / "agent"))
    json.dumps(resumed.state()[1])
    (metrics, counts), (again, got) = finish(agent), finish(resumed)
    assert metrics == again and np.array_equal(counts, got) and agent.updates == resumed.updates == 8
    tensors, meta = agent.state()
    for name, damaged in (("counts", counts[:-1]), ("returns", np.zeros((2, 2))), ("returns", np.zeros(257))):
        with pytest.raises(CheckpointError, match=name):
            resumed.load_state(tensors | {name: damaged}, meta | {"updates": 99})
    assert np.array_equal(resumed.counts, got) and resumed.updates == 8


def test_the_loop_saves_it_before_any_episode_has_ended_and_resumes_it(tmp_path):
    """4 updates of 20 steps, with and without an interruption after 2. Control: in chunks of 4 steps no episode of 5 is whole."""
    env, config = FixedSequence(32), training.TrainingConfig(max_steps=4 * 640, checkpoint_every=2, patience=0)
    new = lambda seed, steps=20: Frequency(1, 10, config=FrequencyConfig(steps=steps), seed=seed)  # noqa: E731
    whole, resumed, blind = new(1), new(2), new(1, steps=4)
    assert training.train(whole, env, config, tmp_path / "whole").updates == 4
    training.train(new(1), env, replace(config, max_steps=2 * 640), tmp_path / "cut")
    training.train(resumed, env, config, tmp_path / "cut", resume=True)
    assert np.array_equal(whole.counts, resumed.counts) and np.array_equal(whole.returns, resumed.returns)
    training.train(blind, env, config, tmp_path / "blind")
    assert len(whole.returns) == 256 and whole.counts.any() and not blind.counts.any()


@pytest.mark.parametrize("key, value", [
    ("steps", 0), ("limit", 0), ("window", 0), ("elite", 0.0), ("elite", 1.5), ("decay", 0.0), ("prior", 0.0),
])  # fmt: skip
def test_a_bad_setting_is_named(key, value):
    with pytest.raises(ValueError, match=key):
        FrequencyConfig(**{key: value})


def test_fixed_sequence_in_10k_steps():
    """> 0.7 of 1: it sees nothing, but knows the step. Random 0.1; paid for what its neighbour does it must stay under
    0.5; and a table of a single row, which does not know the step either, reaches 0.2 at most."""
    updates, steps = 16, 20  # of 32 environments
    trained = [score(FixedSequence(32), train(FixedSequence(32), steps, updates, seed=s), 32) for s in range(3)]
    broken = score(FixedSequence(32), train(Neighbours(32), steps, updates), 32)
    single = score(FixedSequence(32), train(FixedSequence(32), steps, updates, FrequencyConfig(limit=1)), 32)
    print(
        f"frequency, fixed sequence: bar > 0.7, {min(trained):.2f}, "
        f"control {broken:.2f} (neighbours' rewards), {single:.2f} (one row for all steps)"
    )
    assert min(trained) > 0.7 and broken < 0.5 and single <= 0.21


def test_identity_stays_at_chance():
    """25 of 100, within 4 standard errors: it is blind, and the right answer is another one at every step."""
    env = Identity(32)
    trained, error = score(env, train(env, 200, 10, FrequencyConfig(limit=100)), 64), (100 * 0.25 * 0.75 / 64) ** 0.5
    print(f"frequency, identity: bar 25 +- {4 * error:.1f} (blind), {trained:.1f}")
    assert abs(trained - 25) < 4 * error


@pytest.mark.parametrize("name", ["frequency", "cloning", "preferences", "preferences-reward"])
def test_a_comparison_gives_rollouts_long_enough_to_those_that_learn_of_whole_episodes(name):
    """Episodes of five steps: of rollouts of eight they would hear half. What they hear is as much as the others do."""
    settings = Settings(3, 2, 0, steps=8, n_envs=4, hidden=8, updates=16, seed=0)
    kind = AGENTS[name]
    agent, env, heard = kind.make(settings), DelayedMemory(4), []
    agent.update = lambda rollout: heard.append(rollout)
    teach(agent, kind, env, settings)
    assert sum(r.reward.size for r in heard) == 8 * 4 * 16
    whole = sum(whole_episodes(r).at_steps()[2].sum() for r in heard)
    assert whole >= 0.8 * 8 * 4 * 16
