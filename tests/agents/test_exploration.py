"""Every way to explore: the distribution by hand, what is stored against what is sampled, and its worlds."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from agents import checkpoint
from agents.exploration import (
    ExplorationConfig,
    Explorer,
    StateCounts,
    Wrapper,
    add_noise,
    normalise,
    optimistic,
    stick,
    temper,
)
from agents.muzero import MuZero, MuZeroConfig
from agents.networks import ILLEGAL
from agents.protocol import Observation
from agents.rollout import Rollouts
from agents.toys import NoisyTV, SparseChain

POLICY = np.array([[0.1, 0.2, 0.0, 0.7], [0.5, 0.5, 0.0, 0.0]])
MASK = POLICY > 0
LOG = np.where(MASK, np.log(np.where(MASK, POLICY, 1)), ILLEGAL).astype(np.float32)
COUNTS = np.array([[3, 0, 0, 5], [0, 0, 0, 0]], np.uint32)
PREVIOUS = np.array([1, -1])
EVERYTHING = ExplorationConfig(temperature=1.5, noise=0.2, sticky=0.3, ucb=0.7)


def close(log_probs, expected):
    return np.allclose(np.exp(log_probs.astype(np.float64)), expected, atol=1e-6)


def test_temperature_by_hand():
    """Roots and squares of 0.1, 0.2, 0.7, over their sums; and two temperatures are one, their product."""
    roots = np.sqrt([0.1, 0.2, 0, 0.7])
    assert close(temper(LOG, MASK, 2.0), [roots / (np.sqrt(0.1) + np.sqrt(0.2) + np.sqrt(0.7)), [0.5, 0.5, 0, 0]])
    assert close(temper(LOG, MASK, 0.5), [np.array([0.01, 0.04, 0, 0.49]) / 0.54, [0.5, 0.5, 0, 0]])
    assert np.allclose(temper(temper(LOG, MASK, 2.0), MASK, 3.0)[MASK], temper(LOG, MASK, 6.0)[MASK], atol=1e-6)


def test_noise_by_hand():
    """0.7 pi + 0.3 / 3 where three are legal; all of it is uniform; and two shares are one, 1 - (1 - a) (1 - b)."""
    assert close(add_noise(LOG, MASK, 0.3), [[0.17, 0.24, 0, 0.59], [0.5, 0.5, 0, 0]])
    assert close(add_noise(LOG, MASK, 1.0), [[1 / 3, 1 / 3, 0, 1 / 3], [0.5, 0.5, 0, 0]])
    twice, once = add_noise(add_noise(LOG, MASK, 0.2), MASK, 0.5), add_noise(LOG, MASK, 0.6)
    assert np.allclose(twice[MASK], once[MASK], atol=1e-6)


def test_sticky_by_hand():
    """0.6 pi + 0.4 of the previous action; pi itself where that one is illegal, or where there is none."""
    assert close(stick(LOG, MASK, np.array([1, 0]), 0.4), [[0.06, 0.52, 0, 0.42], [0.7, 0.3, 0, 0]])
    assert np.array_equal(stick(LOG, MASK, np.array([2, 3]), 0.4), LOG)
    assert np.array_equal(stick(LOG, MASK, np.array([-1, -1]), 0.4), LOG)


def test_ucb_by_hand():
    """N(s) = 8, N(s, a) = 3, 0, -, 5: pi exp(0.5 sqrt(log 8 / (1 + N(s, a)))), over its sum. A new state: pi."""
    log8 = 2.0794415
    weights = [0.1 * np.exp(0.5 * np.sqrt(log8 / 4)), 0.2 * np.exp(0.5 * np.sqrt(log8)), 0,
               0.7 * np.exp(0.5 * np.sqrt(log8 / 6))]  # fmt: skip
    assert close(optimistic(LOG, MASK, COUNTS, 0.5), [np.array(weights) / sum(weights), POLICY[1]])


CHANGES = {
    "temperature": (lambda q, m, n, p, x: temper(q, m, 1 + x), 0.5),
    "noise": (lambda q, m, n, p, x: add_noise(q, m, x), 0.3),
    "sticky": (lambda q, m, n, p, x: stick(q, m, p, x), 0.4),
    "ucb": (lambda q, m, n, p, x: optimistic(q, m, n, x), 0.8),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_is_a_distribution_over_what_is_legal_and_off_is_nothing(name):
    """Sums to 1, illegal is exactly 0, it does change something, off changes no bit, and the order of actions and
    one more illegal action do not matter."""
    change, on = CHANGES[name]
    rng = np.random.default_rng(0)
    mask = rng.random((200, 7)) < 0.5
    mask[:, 3] = True
    log_probs = normalise(3 * rng.standard_normal((200, 7)), mask)
    counts, previous = rng.integers(0, 9, (200, 7)), rng.integers(-1, 7, 200)
    changed = change(log_probs, mask, counts, previous, on)
    assert changed.dtype == np.float32 and np.allclose(np.exp(changed.astype(np.float64)).sum(1), 1, atol=1e-6)
    assert (np.exp(changed[~mask]) == 0).all() and (changed[~mask] == np.float32(ILLEGAL)).all()
    assert np.abs(np.exp(changed) - np.exp(log_probs)).max() > 0.1
    assert np.array_equal(change(log_probs, mask, counts, previous, 0), log_probs)
    order = rng.permutation(7)
    where = np.where(previous < 0, -1, order.argsort()[previous])
    counts[~mask] = 0
    changed = change(log_probs, mask, counts, previous, on)
    assert np.allclose(change(log_probs[:, order], mask[:, order], counts[:, order], where, on), changed[:, order])
    wider = [np.pad(x, ((0, 0), (0, 1)), constant_values=v) for x, v in ((log_probs, ILLEGAL), (mask, 0), (counts, 0))]
    assert np.allclose(change(*wider, previous, on)[:, :7], changed, atol=1e-6)


@pytest.mark.parametrize(
    "key, value",
    [("temperature", 0.0), ("temperature_end", -1.0), ("noise", 1.5), ("noise_end", -0.1), ("sticky", 1.0),
     ("ucb", -1.0), ("noise_updates", -1), ("ucb_bits", 0)],
)  # fmt: skip
def test_a_wrong_number_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"^{key} "):
        ExplorationConfig(**{key: value})


def test_counts_of_rounded_observations():
    """Nearly equal observations are one, others are not; every row of a batch counts; the table does not grow."""
    counts, rng = StateCounts(3, 2, bits=10, digits=2, seed=0), np.random.default_rng(0)
    seen = np.array([[0.5, -1.0, 0.0], [0.501, -1.0, -0.001], [0.52, -1.0, 0.0]], np.float32)
    counts.add(seen, np.array([0, 0, 1]))
    assert counts(seen).tolist() == [[2, 0], [2, 0], [0, 1]]
    other = rng.standard_normal((20, 3))
    assert len(set(counts.rows(other).tolist())) > 15 and counts.rows(other[None]).shape == (1, 20)
    assert not np.array_equal(counts.rows(other), StateCounts(3, 2, 10, 2, seed=1).rows(other))
    for _ in range(20):
        counts.add(rng.standard_normal((8, 64, 3)), rng.integers(0, 2, (8, 64)))
    assert counts.table.shape == (1024, 2) and counts.table.sum() == 3 + 20 * 8 * 64
    flags = StateCounts(30, 2, 10, 2, seed=0).rows(rng.integers(0, 2, (20_000, 30)))
    for rows in (counts.rows(rng.standard_normal((20_000, 3))), flags):
        assert np.bincount(rows).max() < 60, "20 a row is even; a hash that clusters makes what is new look old"
    assert counts.rows(np.array([[1e30, -1e30, 0]])).shape == (1,)


# *** the explorer, around a real agent ***


def theta(agent):
    return agent.policy.theta.numpy().copy()


def test_with_every_switch_off_it_is_the_agent_bit_for_bit(make):
    def run(agent):
        rollouts, trace = Rollouts(make.env(), agent, 1), []
        for _ in range(2):
            rollout = rollouts.collect(4)[0]
            trace += [agent.update(rollout), *[x.tolist() for x in vars(rollout).values() if x is not None]]
        return trace, theta(agent), agent.state()[1]

    (plain, parameters, meta), (wrapped, same, again) = run(make(1)), run(Explorer(make(1), seed=5))
    assert again.pop("wrappers") == asdict(ExplorationConfig())
    assert plain == wrapped and np.array_equal(parameters, same) and meta == again
    (explored, other, _) = run(Explorer(make(1), EVERYTHING))
    assert explored != plain and not np.array_equal(parameters, other)


def test_an_agent_that_plans_what_it_does_is_refused():
    """Around MuZero it would sample the prior that a search begins with."""
    with pytest.raises(TypeError, match="MuZero does not act by its policy alone"):
        Explorer(MuZero(3, 4, 2, MuZeroConfig(steps=4, n_envs=2, hidden=8)))


def test_an_explorer_around_an_explorer_is_refused(make):
    """The inner one's switches would not be heard, also behind another wrapper."""
    with pytest.raises(TypeError, match="set all switches in one"):
        Explorer(Explorer(make(2), EVERYTHING))
    with pytest.raises(TypeError, match="set all switches in one"):
        Explorer(Wrapper(Explorer(make(2), EVERYTHING)))


def test_what_is_stored_is_the_probability_of_what_is_sampled(make):
    """Frequencies of 4000 actions against the stored log-probabilities and against the four changes by hand, all
    switches on. Storing the policy's own, as if nothing had been changed, is off by more than 0.1."""
    explorer = Explorer(make(2), EVERYTHING)
    seen, rows = Observation(np.zeros((2, 3), np.float32), MASK), np.arange(2)
    explorer.agent.evaluate = lambda *_: (LOG, np.zeros(2, np.float32), np.zeros((2, 16), np.float32))  # numpy only
    explorer.counts.add(np.zeros((8, 3)), np.repeat([0, 3], [3, 5]))  # both rows show the state counted here
    counted = optimistic(LOG, MASK, np.tile(COUNTS[0], (2, 1)), 0.7)
    expected = np.exp(stick(add_noise(temper(counted, MASK, 1.5), MASK, 0.2), MASK, PREVIOUS, 0.3))
    hidden = np.concatenate([np.zeros((2, 16)), [[2], [1]]], axis=1).astype(np.float32)  # 1 + previous, and ...
    reset, counts = np.array([0, 1], np.float32), np.zeros((2, 4))  # ... row 1 begins an episode
    for _ in range(4000):
        choice = explorer.act(seen, hidden, reset)
        counts[rows, choice.action] += 1
        assert np.allclose(np.exp(choice.log_prob), expected[rows, choice.action], atol=1e-6)
        assert np.array_equal(choice.hidden[:, -1], choice.action + 1)
    assert np.abs(counts / 4000 - expected).max() < 0.04 and (counts[~MASK] == 0).all()
    assert np.abs(np.exp(LOG) - expected).max() > 0.1
    greedy = explorer.act(seen, hidden, reset, temperature=0)
    assert np.array_equal(greedy.action, [3, 0]) and not greedy.log_prob.any()


def test_sticky_actions_repeat_within_an_episode_and_are_forgotten_between(make):
    """Of 2-step episodes: the second action repeats the first in 0.95 of those where it may, the first of the next
    one repeats in about as many as chance has it. The update takes the agent's own hidden state."""
    explorer = Explorer(make(3, replace(make.config, lr=0.0, lr_end=0.0)), ExplorationConfig(sticky=0.95))
    rollouts, within, across, last = Rollouts(make.env(), explorer, 3), [], [], None
    for _ in range(30):
        rollout = rollouts.collect(4)[0]
        for t in range(4):
            if last is not None:
                may = np.take_along_axis(rollout.mask[t], last[:, None], 1)[:, 0]
                (across if rollout.reset[t].all() else within).extend((rollout.action[t] == last)[may].tolist())
            last = rollout.action[t]
    assert np.mean(within) > 0.93 and np.mean(across) < 0.6 and min(len(within), len(across)) > 50
    assert rollout.hidden.shape == (2, 17) and explorer.update(rollout)["ratio"] > 0


def test_looking_in_between_disturbs_nothing_and_is_not_counted(make):
    def run(look):
        explorer = Explorer(make(4), EVERYTHING)
        rollouts, actions = Rollouts(make.env(), explorer, 4), []
        for _ in range(2):
            rollout = rollouts.collect(4)[0]
            explorer.update(rollout)
            actions.extend(rollout.action.ravel())
            if look:
                before = explorer.rng.bit_generator.state
                Rollouts(make.env(), explorer, 9).collect(3)
                explorer.rng.bit_generator.state = before
        assert explorer.counts.table.sum(0).tolist() == np.bincount(actions, minlength=4).tolist()
        return theta(explorer), explorer.counts.table

    (a, counted), (b, counted_too) = run(False), run(True)
    assert np.array_equal(a, b) and np.array_equal(counted, counted_too)


def test_annealing_follows_the_updates(make):
    explorer = Explorer(make(5), ExplorationConfig(noise=0.8, noise_end=0.2, noise_updates=2, temperature=2.0))
    seen, found = Observation(np.zeros((2, 3), np.float32), MASK), []
    for updates in range(4):
        explorer.agent.updates = updates
        found.append(explorer.explore(LOG, seen, None))
    for log_probs, share in zip(found, (0.8, 0.5, 0.2, 0.2), strict=True):
        assert np.array_equal(log_probs, add_noise(temper(LOG, MASK, 2.0), MASK, share))


def test_exploring_resumes_bit_exactly_through_a_file(make, tmp_path):
    def finish(explorer):
        rollouts = Rollouts(make.env(), explorer, 7)
        metrics = [explorer.update(rollouts.collect(4)[0]) for _ in range(2)]
        return metrics, theta(explorer), explorer.counts.table

    explorer = Explorer(make(6), EVERYTHING, seed=6)
    explorer.update(Rollouts(make.env(), explorer, 6).collect(4)[0])
    checkpoint.save(tmp_path / "agent", *explorer.state())
    resumed = Explorer(make(60), EVERYTHING, seed=60)
    resumed.load_state(*checkpoint.load(tmp_path / "agent"))
    json.dumps(resumed.state()[1])
    (metrics, expected, counted), (again, got, recounted) = finish(explorer), finish(resumed)
    assert metrics == again and np.array_equal(expected, got) and np.array_equal(counted, recounted)
    before, (tensors, meta) = theta(resumed), make(8).state()
    with pytest.raises(checkpoint.CheckpointError, match="explorer/counts is missing"):
        resumed.load_state(tensors, meta)
    assert np.array_equal(theta(resumed), before)
    Explorer(make(9)).load_state(tensors, meta)  # without counts, an agent's own checkpoint is enough


# *** the worlds that ask for it ***


def play(env, actions):
    return float(sum(env.step(np.array(a)).reward for a in actions)[0])


def test_a_sparse_chain_pays_1_for_the_only_way_and_a_fifth_for_none():
    env = SparseChain(1, n=6, walks=2)
    for actions, total in (
        (env.secret, 1.0),
        (1 - env.secret[:1].repeat(6), 0.2),
        ([*env.secret[:5], 1 - env.secret[5]], 0),
    ):
        assert env.reset(0).state[0].tolist() == [1, 0, 0, 0, 0, 0]
        assert play(env, [[a] for a in actions]) == pytest.approx(total) and env.age[0] == 0
    env.reset(0)
    assert play(env, [[env.secret[0]], [env.secret[1]], [1 - env.secret[2]]]) == 0 and env.state()[0].argmax() == 0
    env, rng, found = SparseChain(64, n=3), np.random.default_rng(0), 0
    env.reset(0)
    for _ in range(3 * 100):
        found += int((env.step(rng.integers(0, 4, 64)).reward == 1).sum())
    assert abs(found / 6400 - 1 / 64) < 0.008, "random play gets there once in 4^3 episodes"


def test_the_tv_shows_what_was_never_seen_keeps_the_place_and_pays_nothing():
    env = NoisyTV(1, n=3, walks=2, channels=2)
    assert env.reset(0).state[0].tolist() == [1, 0, 0, 0, 0]
    screens = [env.step(np.array([2])).observation.state[0] for _ in range(3)]
    assert all(s[:3].tolist() == [1, 0, 0] and s[3:].all() for s in screens)
    assert len({s.tobytes() for s in screens}) == 3 and env.tv_share == 1
    assert play(env, [[a] for a in env.secret]) == 1 and env.tv_share == 0.5
    walk = env.secret[:1]
    assert [env.step(a).observation.state[0, :3].argmax() for a in (walk, np.array([2]), 1 - walk)] == [1, 1, 0]
    env.reset(0)
    assert play(env, [[2]] * 6) == 0 and env.age[0] == 0 and not env.screen.any()
    env.step(1 - walk)
    assert env.tv_share == 6 / 7
    env.reset(0)
    assert env.tv_share == 0


def test_the_worlds_keep_their_contract():
    """Shapes, dtypes, one seed gives one run."""

    def run(env):
        rng, trace = np.random.default_rng(0), [env.reset(5).state]
        for _ in range(60):
            seen, reward, terminated, truncated, final = env.step(rng.integers(0, env.n_actions, 2))
            assert seen.state.shape == (2, env.state_dim) and seen.state.dtype == np.float32
            assert seen.mask.shape == (2, env.n_actions) and reward.dtype == np.float32 and terminated.dtype == bool
            assert not truncated.any() and final is None
            trace.append(seen.state)
        return np.array(trace)

    for env in (SparseChain(2), NoisyTV(2)):
        assert np.array_equal(run(env), run(env))
