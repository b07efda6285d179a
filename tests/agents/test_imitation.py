"""Logs, and cloning the best of them."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from tinygrad import Tensor

from agents import checkpoint
from agents.imitation import METRICS, Batch, Cloning, CloningConfig, cloning_loss
from agents.logs import Log, by_state, whole_episodes
from agents.networks import ILLEGAL, log_softmax
from agents.rollout import Rollout, Rollouts
from agents.toys import Identity, MaskedIdentity, Stitch
from agents.uniform import Uniform

SMALL = CloningConfig(steps=4, n_envs=2, hidden=8, gamma=0.9, epochs=1, lr=1e-2, elite=0.5, window=8)
TOY = CloningConfig(steps=8, n_envs=32, hidden=32, memory=False, lr=3e-3, max_grad_norm=10.0)


@pytest.fixture(scope="module")
def clone(cache_dir):
    """clone(seed, **settings) -> a small agent for Noise; those that differ in no loss share one capture."""
    return lambda seed=0, **settings: Cloning(3, 4, 2, replace(SMALL, **settings), seed, cache_dir)


@pytest.fixture(scope="module")
def noise(make):
    """noise(seed) -> a rollout of Noise [4, 2] by another agent, whose memory must not be looked at."""

    def noise(seed=0):
        rollout = Rollouts(make.env(), Uniform(3, 4, 2, None, seed), seed).collect(4)[0]
        return replace(rollout, hidden=np.full((2, 16), np.nan, np.float32))

    return noise


def rollout_of(reward, reset, ended, state=None):
    """A rollout [T, B] of which nothing else matters."""
    reward, reset, ended = (np.array(x, kind) for x, kind in ((reward, np.float32), (reset, np.float32), (ended, bool)))
    T, B = reward.shape
    zero = np.zeros((T, B), np.float32)
    state = np.zeros((T, B, 1), np.float32) if state is None else np.array(state, np.float32)[..., None]
    return Rollout(state, np.ones((T, B, 2), bool), None, zero.astype(np.int32), zero, zero, reward, ended, ended, zero,
                   reset, zero[0, :, None], zero[0])  # fmt: skip


# *** logs ***

# columns: two whole episodes; one that began before the chunk, then one that goes on after it; one whole, one cut off
BY_HAND = rollout_of(
    reward=[[1, 1, 5], [2, 2, 6], [3, 3, 7], [4, 4, 8]],
    reset=[[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 0, 1]],
    ended=[[0, 0, 0], [1, 1, 0], [0, 0, 1], [1, 0, 0]],
)


def test_whole_episodes_by_hand():
    found = whole_episodes(BY_HAND)
    assert found.number.tolist() == [[0, -1, 2], [0, -1, 2], [1, -1, 2], [1, -1, -1]]
    assert found.total.tolist() == [3, 7, 18] and found.column.tolist() == [0, 0, 2]
    assert found.first.tolist() == [0, 2, 0] and found.length.tolist() == [2, 2, 3]


def test_whole_episodes_equal_those_that_rollouts_count():
    """In one long chunk from a reset every episode that ended is whole; and columns may be exchanged."""
    env = Stitch(5, length=3)
    rollout, episodes = Rollouts(env, Uniform(6, 4), 1).collect(11)
    found = whole_episodes(rollout)
    assert sorted(found.total) == sorted(e.total for e in episodes) and len(episodes) == 15
    assert (found.length == 3).all() and found.number.max() == 14
    for name in ("state", "mask", "action", "log_prob", "value", "reward", "terminated", "ended", "bootstrap", "reset"):
        rollout = replace(rollout, **{name: getattr(rollout, name)[:, ::-1]})
    assert sorted(whole_episodes(rollout).total) == sorted(found.total)


def test_a_log_gives_whole_columns_of_what_was_recorded(make):
    agent = Uniform(3, 4, 2)
    agent.initial_hidden = lambda n: np.arange(n, dtype=np.float32)[:, None]  # so that the memory is looked at too
    log = Log.record(make.env(), agent, chunks=3, steps=4, seed=5)
    assert len(log) == 3 * 4 * 2 and len(log.returns) == 3 * 2 * 2
    sample, drawn = log.sample(np.random.default_rng(0), 64), set()
    for b in range(64):
        same = np.flatnonzero((log.rollout.state == sample.state[:, b : b + 1]).all(axis=(0, 2)))
        assert len(same) == 1, "no column of the log, or one that stands there twice"
        for name, array in vars(sample).items():
            there, axis = getattr(log.rollout, name), 0 if name in ("hidden", "last_value") else 1
            assert np.array_equal(array.take(b, axis), there.take(same[0], axis)), name
        drawn.add(int(same[0]))
    assert drawn == set(range(6)), "columns that are never drawn"
    with pytest.raises(ValueError, match="same number of steps"):
        Log([log.rollout, Log.record(make.env(), agent, 1, 3).rollout])
    with pytest.raises(ValueError, match="needs rollouts"):
        Log([])


def test_alike_states_have_one_number_and_others_have_others():
    states = np.random.default_rng(0).standard_normal((2, 50, 3)).astype(np.float32)
    states[1] = states[0]
    states[1, 7, 2] = np.nextafter(states[1, 7, 2], 9)  # one bit
    rollout = replace(rollout_of(np.zeros((2, 50)), np.zeros((2, 50)), np.zeros((2, 50))), state=states)
    first, second = by_state(rollout)
    assert len(set(first)) == 50 and np.flatnonzero(first != second).tolist() == [7]


# *** the loss ***


def batch_of(rng, T=3, B=4, A=5):
    """Arrays of a Batch, with masks, and logits [T, B, A]."""
    mask = rng.random((T, B, A)) < 0.6
    action = rng.integers(0, A, (T, B)).astype(np.int32)
    np.put_along_axis(mask, action[..., None], True, 2)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    weight, known = rng.random((T, B)).astype(np.float32), (rng.random((T, B)) < 0.5).astype(np.float32)
    arrays = [draw(B, 1), draw(T, B, 1), mask, draw(T, B), action, weight, known, draw(T, B)]
    return Batch(*(Tensor(x) for x in arrays)), Batch(*arrays), draw(T, B, A), draw(T, B)


def masked_log_softmax(logits, mask):
    """Row by row, over legal entries only, in float64; 0 elsewhere."""
    out = np.zeros(logits.shape)
    for row, legal, into in zip(*(x.reshape(-1, logits.shape[-1]) for x in (logits, mask, out)), strict=True):
        scores = row[legal].astype(np.float64)
        into[legal] = scores - np.log(np.exp(scores).sum())
    return out


def test_the_loss_equals_numpy_and_illegal_logits_have_no_gradient():
    batch, arrays, logits, value = batch_of(np.random.default_rng(0))
    scores = Tensor(logits).realize()
    loss, metrics = cloning_loss(log_softmax(batch.mask.where(scores, ILLEGAL)), Tensor(value), batch, 0.3)
    log_probs = masked_log_softmax(logits, arrays.mask)
    parts = np.zeros(4)
    for t, b in np.ndindex(3, 4):
        w, k = arrays.weight[t, b], arrays.known[t, b]
        error = value[t, b] - arrays.target[t, b]
        parts += [-w * log_probs[t, b, arrays.action[t, b]], w, k * error**2 / 2, k]
    expected = [parts[0] / parts[1], parts[2] / parts[3]]
    found = dict(zip(METRICS, (m.item() for m in metrics), strict=True))
    assert found["policy_loss"] == pytest.approx(expected[0], abs=1e-5)
    assert found["value_loss"] == pytest.approx(expected[1], abs=1e-5)
    assert found["entropy"] == pytest.approx(-(np.exp(log_probs) * log_probs).sum(-1).mean(), abs=1e-5)
    assert loss.item() == pytest.approx(expected[0] + 0.3 * expected[1], abs=1e-5)
    gradient = loss.gradient(scores)[0].numpy()
    assert not arrays.mask.all() and (gradient[~arrays.mask] == 0).all()
    chosen = np.eye(5)[arrays.action]
    by_hand = arrays.weight[..., None] * (np.exp(log_probs) * arrays.mask - chosen) / parts[1]
    assert np.abs(gradient - by_hand).max() < 1e-6


def test_the_loss_knows_only_the_proportions_of_weights_and_nothing_of_steps_without():
    rng = np.random.default_rng(1)
    batch, arrays, logits, value = batch_of(rng)
    log_probs = log_softmax(batch.mask.where(Tensor(logits), ILLEGAL))
    v = Tensor(value)
    loss = lambda **fields: cloning_loss(log_probs, v, batch._replace(**fields), 1.0)[0].item()  # noqa: E731
    assert loss(weight=batch.weight * 7) == pytest.approx(loss(), rel=1e-5)
    zero = rng.random((3, 4)) < 0.5
    ignored = Tensor(np.where(zero, 0, arrays.weight).astype(np.float32))
    other = Tensor(np.where(zero, arrays.mask.argmax(-1), arrays.action).astype(np.int32))
    assert (other.numpy() != arrays.action).any()
    assert loss(weight=ignored, action=other) == pytest.approx(loss(weight=ignored), rel=1e-6)
    nothing = Tensor(np.zeros((3, 4), np.float32))
    assert loss(weight=nothing, known=nothing) == 0


# *** what is copied ***


def bandit(returns, state=None):
    """Episodes of one step [1, B]."""
    ones = np.ones((1, len(returns)))
    return rollout_of([returns], ones, ones, None if state is None else [state])


@pytest.fixture
def chooser(cache_dir):
    """chooser(**settings) -> weights(returns [B], states) [B] of an agent that remembers."""

    def chooser(group=None, **settings):
        agent = Cloning(1, 2, 0, replace(SMALL, memory=False, **settings), 0, cache_dir)
        agent.group = group
        return lambda returns, state=None: agent.weights(bandit(returns, state))[0][0].tolist()

    return chooser


def test_the_elite_by_hand(chooser):
    weights = chooser(elite=0.3, window=6)
    assert weights([3, 1, 2, 5]) == [1, 0, 0, 1]  # 1 of 4 is better than 3: 25%; than 2 are 50%
    assert weights([9, 8]) == [1, 1], "of 6 one is better than 8"
    assert weights([5]) == [0], "best once, and no more"
    assert weights([0, 0, 0, 0, 0, 0]) == [1] * 6, "the window has forgotten all others"
    assert chooser(elite=1.0)([3, 1, 2]) == [1, 1, 1]


def test_the_first_of_four_is_elite_where_its_share_allows(chooser):
    """Metamorphic: a larger share copies a superset; and any growing function of the returns leaves it as it is."""
    returns = np.random.default_rng(0).standard_normal(64).round(1)
    copied = [chooser(elite=elite, window=64)(returns) for elite in (0.1, 0.3, 0.9)]
    assert all(np.less_equal(a, b).all() and a != b for a, b in itertools.pairwise(copied))
    assert chooser(elite=0.3, window=64)(np.exp(returns)) == copied[1]
    assert sum(copied[0]) == pytest.approx(6.4, abs=2)


def test_exponential_weights_by_hand(chooser):
    weights = chooser(weighting="exponential", temperature=0.5, weight_clip=20.0)
    assert weights([0, 1, 2, 5]) == pytest.approx([np.exp(-4), np.exp(-2), 1, 20])  # mean 2; e^6 is clipped
    assert weights([12]) == pytest.approx([20]) and weights([0]) == pytest.approx([np.exp(-2 * 20 / 6)])


def test_only_comparable_episodes_compete(chooser):
    returns, kernels = [1, 2, 3, 10, 20, 30], [0, 0, 0, 1, 1, 1]
    assert chooser(elite=0.3)(returns, kernels) == [0, 0, 0, 0, 1, 1]
    assert chooser(by_state, elite=0.3)(returns, kernels) == [0, 0, 1, 0, 0, 1]
    exponential = {"weighting": "exponential", "weight_clip": 99.0}
    assert chooser(by_state, **exponential)(returns, kernels) == pytest.approx(
        np.exp([-1, 0, 1, -10, 0, np.log(99)]).tolist()
    )


def test_only_whole_episodes_are_copied(clone):
    weight, known = clone(elite=0.4).weights(BY_HAND)  # 18 is best; of 7 1/3 is better, of 3 are 2/3
    assert weight.tolist() == [[0, 0, 1], [0, 0, 1], [1, 0, 1], [1, 0, 0]]
    assert known.tolist() == [[1, 0, 1], [1, 0, 1], [1, 0, 1], [1, 0, 0]]


# *** the agent ***


def test_an_update_equals_numpy(clone, noise, reference):
    """Loss parts of the first gradient step against the float64 network; and every parameter moves."""
    rollout, agent = noise(3), clone(4, elite=0.5)
    assert not rollout.mask.all()
    p = {k: v.astype(np.float64) for k, v in agent.policy.unflatten(agent.policy.theta.numpy()).items()}
    zero = np.zeros((2, 16))
    log_probs, values, _ = reference.forward(p, rollout.state, rollout.mask, rollout.actions, zero, rollout.reset)
    chosen = np.take_along_axis(log_probs, rollout.action[..., None], 2)[..., 0]
    r = rollout.reward.astype(np.float64).reshape(2, 2, 2)  # [episode, step, column], since all last 2 steps
    totals, to_go = r.sum(1), np.stack([r[:, 0] + 0.9 * r[:, 1], r[:, 1]], 1).reshape(4, 2)
    best = np.sort(totals.ravel())[2:]  # half of 4
    copied = np.isin(totals, best).repeat(2, 0)
    metrics = agent.update(rollout)
    assert metrics["policy_loss"] == pytest.approx(-chosen[copied].mean(), abs=1e-5) and metrics["copied"] == 0.5
    assert metrics["value_loss"] == pytest.approx(((values - to_go) ** 2).mean() / 2, abs=1e-5)
    assert metrics["best"] == pytest.approx(totals.max())
    after = agent.policy.unflatten(agent.policy.theta.numpy())
    assert [name for name in p if (p[name] == after[name]).all()] == []


def test_without_a_whole_episode_nothing_is_learned(clone, noise):
    rollout, agent = noise(), clone(4)
    before = agent.policy.theta.numpy().copy()
    metrics = agent.update(replace(rollout, reset=0 * rollout.reset, ended=rollout.ended & False))
    assert metrics["copied"] == 0 and "best" not in metrics and np.isfinite(list(metrics.values())).all()
    assert np.array_equal(before, agent.policy.theta.numpy())


def test_it_resumes_bit_exactly_through_a_file_with_what_it_has_seen(clone, noise, tmp_path):
    def finish(agent):
        metrics = [agent.update(noise(seed)) for seed in (7, 8)]
        return metrics, agent.policy.theta.numpy().tolist(), agent.returns.tolist()

    agent = clone(5)
    agent.group = by_state
    agent.update(noise(6))
    checkpoint.save(tmp_path / "agent", *agent.state())
    resumed, fresh = clone(50), clone(5)
    resumed.group = by_state
    resumed.load_state(*checkpoint.load(tmp_path / "agent"))
    assert np.array_equal(resumed.groups, agent.groups) and resumed.groups.any()
    assert finish(resumed) == finish(agent) != finish(fresh)
    tensors, meta = agent.state()
    before = resumed.policy.theta.numpy().copy()
    with pytest.raises(checkpoint.CheckpointError, match="seen/returns"):
        resumed.load_state(tensors | {"seen/returns": np.zeros(3)}, meta)
    with pytest.raises(checkpoint.CheckpointError, match=r"adam_m/value\.bias"):
        resumed.load_state(tensors | {"adam_m/value.bias": np.zeros(3)}, meta)
    assert np.array_equal(before, resumed.policy.theta.numpy())
    assert np.array_equal(resumed.returns, agent.returns, equal_nan=True)


@pytest.mark.parametrize("key, value", [
    ("weighting", "rank"), ("elite", 0.0), ("elite", 1.5), ("epochs", 0), ("temperature", 0.0), ("window", 0),
    ("weight_clip", -1.0),
])  # fmt: skip
def test_a_bad_setting_is_named(key, value):
    with pytest.raises(ValueError, match=key):
        CloningConfig(**{key: value})


def test_a_wrong_shape_and_a_nan_are_refused(clone, noise):
    agent, rollout = clone(9), noise()
    with pytest.raises(ValueError, match="configuration says"):
        agent.update(replace(rollout, action=rollout.action[:3]))
    with pytest.raises(ValueError, match="not finite"):
        agent.update(replace(rollout, reward=rollout.reward * np.nan))
    assert np.isnan(agent.returns).all(), "a refused rollout left its mark"


# *** learning ***


def learn(env, log, config, updates, cache_dir):
    agent = Cloning(env.state_dim, env.n_actions, env.action_dim, config, 0, cache_dir)
    for _ in range(updates):
        agent.update(log.sample(agent.rng, config.n_envs))
    return agent


@pytest.mark.learn
def test_it_beats_the_log_that_it_learned_from(train, cache_dir):
    """Greedy >= 6 of 6.5, beyond the best logged episode; drawing actions >= 1 above the log's mean. Control: cloning
    of all that was logged is no better than the log (greedily it then follows noise)."""
    env = Stitch(32)
    log = Log.record(Stitch(16), Uniform(env.state_dim, env.n_actions), chunks=64, steps=8)
    elite = learn(env, log, replace(TOY, elite=0.05), 150, cache_dir)
    whole = learn(env, log, replace(TOY, elite=1.0), 150, cache_dir)
    greedy, drawn = train.score(env, elite, 32), train.score(env, elite, 512, temperature=1.0)
    control, control_drawn = train.score(env, whole, 32), train.score(env, whole, 512, temperature=1.0)
    mean, best = log.returns.mean(), log.returns.max()
    print(f"cloning: bar 6.0 of {env.best}, greedy {greedy:.2f} (drawn {drawn:.2f}), all cloned {control:.2f} "
          f"({control_drawn:.2f}); {len(log)} logged steps: mean {mean:.2f} ({env.chance:.2f}), "
          f"best {best:.2f}")  # fmt: skip
    assert abs(mean - env.chance) < 0.2 and best < 6
    assert greedy >= 6 and drawn > mean + 1
    assert control < 3 and control_drawn < mean + 0.5


def test_identity_from_512_random_steps(train, cache_dir):
    """>= 90 of 100, learned from episodes of one step, since the return of 100 random ones says little of each; judged
    on the usual 100 steps. Control: cloning of all of them is still random, 25."""
    env = Identity(8)
    log = Log.record(Identity(8, limit=1), Uniform(4, 4), chunks=8, steps=8)
    config = replace(TOY, n_envs=16, lr=1e-2, elite=0.1)
    trained = train.score(env, learn(env, log, config, 15, cache_dir), 8, temperature=1.0)
    control = train.score(env, learn(env, log, replace(config, elite=1.0), 15, cache_dir), 8, temperature=1.0)
    print(f"identity, cloning: bar 90, trained {trained:.1f}, all cloned {control:.1f}")
    assert trained >= 90 and control < 40


@pytest.mark.learn
def test_masked_identity_from_4096_random_steps(train, cache_dir):
    """>= 90 of 100, learned from episodes of one step, of which 1 in 15 is right. Control: all cloned is random, 7."""
    env = MaskedIdentity(8)
    log = Log.record(MaskedIdentity(8, limit=1), Uniform(70, 70), chunks=64, steps=8)
    config = replace(TOY, hidden=128, elite=0.05)
    trained = train.score(env, learn(env, log, config, 60, cache_dir), 8)
    control = train.score(env, learn(env, log, replace(config, elite=1.0), 60, cache_dir), 8)
    print(f"masked identity, cloning: bar 90, trained {trained:.1f}, all cloned {control:.1f}")
    assert trained >= 90 and control < 40
