"""Preferences: pairs, the loss on them, and what a reward or a policy learns from nothing else."""

from dataclasses import replace

import numpy as np
import pytest
from tinygrad import Tensor

from agents import checkpoint
from agents.logs import by_state
from agents.networks import ILLEGAL, LSTMPolicy, log_softmax
from agents.ppo import PPO
from agents.preferences import (
    POLICY_METRICS,
    REWARD_METRICS,
    Batch,
    PreferenceConfig,
    PreferencePolicy,
    PreferencePPO,
    PreferencePPOConfig,
    PreferenceReward,
    bradley_terry,
    pairs,
    preference_loss,
    reward_loss,
)
from agents.rollout import Rollout, Rollouts
from agents.uniform import Uniform

SMALL = PreferenceConfig(steps=4, n_envs=3, hidden=8, memory=False, gamma=0.9, epochs=1, lr=1e-2)
SMALL_PPO = PreferencePPOConfig(steps=4, n_envs=3, hidden=8, memory=False, epochs=1, reward_epochs=1, reward_lr=1e-2)


@pytest.fixture(scope="module")
def prefer(cache_dir):
    return lambda seed=0, **settings: PreferencePolicy(3, 4, 2, replace(SMALL, **settings), seed, cache_dir)


@pytest.fixture(scope="module")
def prefer_ppo(cache_dir):
    return lambda seed=0, **settings: PreferencePPO(3, 4, 2, replace(SMALL_PPO, **settings), seed, cache_dir)


@pytest.fixture(scope="module")
def noise(make):
    """noise(seed) -> a rollout of Noise [4, 3] by another agent, whose memory must not be looked at."""

    def noise(seed=0):
        rollout = Rollouts(make.env(3), Uniform(3, 4, 2, None, seed), seed).collect(4)[0]
        return replace(rollout, hidden=np.full((3, 16), np.nan, np.float32))

    return noise


def rollout_of(reward, reset, ended, state=None):
    """A rollout [T, B] of which nothing else matters."""
    reward, reset, ended = (np.array(x, kind) for x, kind in ((reward, np.float32), (reset, np.float32), (ended, bool)))
    T, B = reward.shape
    zero = np.zeros((T, B), np.float32)
    state = zero[..., None] if state is None else np.asarray(state, np.float32)
    return Rollout(state, np.ones((T, B, 2), bool), None, zero.astype(np.int32), zero, zero, reward, ended, ended, zero,
                   reset, zero[0, :, None], zero[0])  # fmt: skip


# *** pairs ***

# columns: an episode of 3, then more; one of 4 after a piece; no whole one; another of 3; their states name a kernel
BY_HAND = rollout_of(
    reward=[[1, 9, 9, 3], [2, 4, 9, 0], [9, 0, 9, 0], [9, 0, 9, 0]],
    reset=[[1, 0, 1, 1], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]],
    ended=[[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 1]],
    state=[[[1], [5], [1], [2]], [[5], [1], [5], [5]], [[5], [5], [5], [5]], [[5], [5], [5], [5]]],
)


def test_pairs_by_hand():
    found = pairs(BY_HAND)  # returns 3, 4, none, 3
    assert found.inside.tolist() == [[1, 0, 0, 1], [1, 1, 0, 1], [0, 1, 0, 1], [0, 1, 0, 0]]
    assert found.valid.tolist() == [[0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]]
    label = found.label[np.ix_([0, 1, 3], [0, 1, 3])]
    assert label.tolist() == [[0.5, 0, 0.5], [1, 0.5, 1], [0.5, 0, 0.5]]


@pytest.mark.parametrize("group", [by_state, lambda rollout: np.array([7, 7, 8, 8])], ids=["by state", "by column"])
def test_pairs_are_of_one_group(group):
    found = pairs(BY_HAND, group)  # the first two begin alike
    assert found.valid.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert np.array_equal(found.inside, pairs(BY_HAND).inside)


def test_labels_know_the_order_of_returns_and_nothing_else():
    """Metamorphic: any growing function of the returns gives the same pairs; a falling one turns the labels."""
    returns = np.random.default_rng(0).standard_normal((1, 9)).round(1)
    of = lambda reward: pairs(rollout_of(reward, np.ones((1, 9)), np.ones((1, 9))))  # noqa: E731
    assert np.array_equal(of(np.exp(3 * returns)).label, of(returns).label)
    assert np.array_equal(of(-returns).label, 1 - of(returns).label) and of(returns).valid.sum() == 72


# *** the losses ***


def reference(score, label, valid):
    """Loss and accuracy in float64, one pair after another."""
    losses, right = [], []
    for i, j in np.argwhere(valid):
        p = 1 / (1 + np.exp(float(score[j]) - float(score[i])))
        losses.append(-label[i, j] * np.log(p) - (1 - label[i, j]) * np.log(1 - p))
        if label[i, j] != 0.5:
            right.append((p > 0.5) == (label[i, j] > 0.5))
    return np.mean(losses), np.mean(right)


def some_pairs(rng, B):
    """Scores, labels and validities as `pairs` makes them, some of them ties."""
    total = rng.integers(0, 4, B)
    label = (1 + np.sign(total[:, None] - total)) / 2
    valid = np.triu(rng.random((B, B)) < 0.6, 1)
    return [x.astype(np.float32) for x in (2 * rng.standard_normal(B), label, valid | valid.T)]


def test_bradley_terry_equals_numpy():
    score, label, valid = some_pairs(np.random.default_rng(0), 7)
    s = Tensor(score).realize()
    loss, accuracy = bradley_terry(s, Tensor(label), Tensor(valid))
    assert (label[valid > 0] == 0.5).any() and 4 < valid.sum() < 42
    assert (loss.item(), accuracy.item()) == pytest.approx(reference(score, label, valid), abs=1e-5)
    p = 1 / (1 + np.exp(score[None] - score[:, None]))  # d loss / d S_i = sum over its pairs, in both orders, of P - y
    by_hand = 2 * (valid * (p - label)).sum(1) / valid.sum()
    assert np.abs(loss.gradient(s)[0].numpy() - by_hand).max() < 1e-6


def test_bradley_terry_knows_differences_only():
    """Metamorphic: a constant changes nothing; turning scores and labels changes nothing; no pair, no loss."""
    score, label, valid = some_pairs(np.random.default_rng(1), 7)
    of = lambda s, y, v: [x.item() for x in bradley_terry(Tensor(s), Tensor(y), Tensor(v))]  # noqa: E731
    assert of(score + 5, label, valid) == pytest.approx(of(score, label, valid), abs=1e-5)
    assert of(-score, 1 - label, valid) == pytest.approx(of(score, label, valid), abs=1e-5)
    assert of(score, label, 0 * valid) == [0, 0]
    huge = of(np.float32([1e6, -1e6]), np.eye(2, dtype=np.float32)[:, ::-1] * [[1], [0]], 1 - np.eye(2))
    assert huge == [0, 1], "a sure pair must not overflow"


def batch_of(rng, T=3, B=5, A=4):
    """Arrays of a Batch, with masks, and logits [T, B, A]."""
    mask = rng.random((T, B, A)) < 0.6
    action = rng.integers(0, A, (T, B)).astype(np.int32)
    np.put_along_axis(mask, action[..., None], True, 2)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    inside = (rng.random((T, B)) < 0.7).astype(np.float32)
    _, label, valid = some_pairs(rng, B)
    arrays = [draw(B, 1), draw(T, B, 1), mask, draw(T, B), action, draw(T, B), inside, label, valid]
    return Batch(*(Tensor(x) for x in arrays)), Batch(*arrays), draw(T, B, A), draw(T, B)


def test_the_reward_loss_equals_numpy():
    batch, arrays, _, reward = batch_of(np.random.default_rng(2))
    total, metrics = reward_loss(Tensor(reward), batch, penalty=0.1)
    score = (reward * arrays.inside).sum(0)
    loss, accuracy = reference(score, arrays.label, arrays.valid)
    assert [m.item() for m in metrics] == pytest.approx([loss, accuracy, score.mean()], abs=1e-5)
    assert total.item() == pytest.approx(loss + 0.1 * (score**2).mean(), abs=1e-5)


def test_the_preference_loss_equals_numpy_and_illegal_logits_have_no_gradient():
    config = PreferenceConfig(beta=0.7, value_coef=0.3)
    batch, arrays, logits, value = batch_of(np.random.default_rng(3))
    scores = Tensor(logits).realize()
    total, metrics = preference_loss(log_softmax(batch.mask.where(scores, ILLEGAL)), Tensor(value), batch, config)
    score, entropy = np.zeros(5), []
    for t, b in np.ndindex(3, 5):
        legal = np.flatnonzero(arrays.mask[t, b])
        p = np.exp(logits[t, b, legal].astype(np.float64))
        p /= p.sum()
        score[b] += 0.7 * arrays.inside[t, b] * np.log(p[legal == arrays.action[t, b]][0])
        entropy.append(-(p * np.log(p)).sum())
    loss, accuracy = reference(score, arrays.label, arrays.valid)
    error = ((value - arrays.target) ** 2)[arrays.inside > 0].mean() / 2
    assert [m.item() for m in metrics] == pytest.approx([loss, accuracy, error, np.mean(entropy)], abs=1e-5)
    assert total.item() == pytest.approx(loss + 0.3 * error, abs=1e-5)
    gradient = total.gradient(scores)[0].numpy()
    assert not arrays.mask.all() and (gradient[~arrays.mask] == 0).all()
    assert (gradient[arrays.inside == 0] == 0).all() and gradient.any()


def test_a_step_makes_the_better_episode_likelier_and_the_worse_one_less():
    """One pair, one state each, uniform policy over 4: -log sigmoid(0) = log 2, and slopes of 1/2 on the log-odds."""
    batch, arrays, _, _ = batch_of(np.random.default_rng(4), T=1, B=2)
    everything = Tensor(np.ones((1, 2, 4), bool))
    one = batch._replace(
        mask=everything, action=Tensor(np.array([[1, 3]], np.int32)), inside=Tensor.ones(1, 2),
        label=Tensor([[0.5, 1.0], [0.0, 0.5]]), valid=Tensor([[0.0, 1.0], [1.0, 0.0]]))  # fmt: skip
    scores = Tensor(np.zeros((1, 2, 4), np.float32)).realize()
    loss, _ = preference_loss(log_softmax(scores), Tensor.zeros(1, 2), one, PreferenceConfig(value_coef=0.0))
    assert loss.item() == pytest.approx(np.log(2), rel=1e-6)
    slope = loss.gradient(scores)[0].numpy()[0]
    assert slope == pytest.approx(np.array([[1, -3, 1, 1], [-1, -1, -1, 3]]) / 8, abs=1e-6)


# *** the agents ***


def theta(part):
    return part.policy.theta.numpy().copy()


def q_of(policy, rollout):
    """value + logit of the action taken, and log-probabilities of it, [T, B]: the network without memory in float64."""
    p = {k: v.astype(np.float64) for k, v in policy.unflatten(policy.theta.numpy()).items()}
    x = np.tanh(rollout.state @ p["encoder1.weight"] + p["encoder1.bias"])
    x = np.tanh(x @ p["encoder2.weight"] + p["encoder2.bias"])
    query = x @ p["pointer.context"] + p["pointer.bias"]
    score = np.tanh(rollout.actions @ p["pointer.action"] + query[:, :, None]) @ p["pointer.score"][:, 0]
    logits, value = x @ p["policy.weight"] + p["policy.bias"] + score, (x @ p["value.weight"])[..., 0] + p["value.bias"]
    chosen = np.take_along_axis(logits, rollout.action[..., None], 2)[..., 0]
    return value + chosen, chosen - np.log(np.where(rollout.mask, np.exp(logits), 0).sum(-1))


def test_an_update_of_the_policy_equals_numpy(prefer, noise):
    agent, r = prefer(4), noise(3)
    before = agent.policy.unflatten(theta(agent.trained))
    found, score = pairs(r), (q_of(agent.policy, r)[1] * pairs(r).inside).sum(0)
    metrics = agent.update(r)
    loss, accuracy = reference(score, found.label, found.valid)
    assert found.valid.sum() == 6 and found.inside.sum() == 6, "Noise: the first two steps of each column"
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5) and metrics["accuracy"] == pytest.approx(accuracy)
    after = agent.policy.unflatten(theta(agent.trained))
    assert [name for name in before if (before[name] == after[name]).all()] == []
    assert set(POLICY_METRICS) < set(metrics)


def test_the_reward_learns_and_relabels_by_numpy(prefer_ppo, noise):
    reward, r = prefer_ppo(4).reward, noise(3)
    expected, found = q_of(reward.trained.policy, r)[0], pairs(r)
    relabelled = reward.relabel(r)
    assert np.abs(relabelled.reward - expected).max() < 1e-5 and relabelled.reward.dtype == np.float32
    assert all(value is getattr(r, name) for name, value in vars(relabelled).items() if name != "reward")
    score = (expected * found.inside).sum(0)
    loss, accuracy = reference(score, found.label, found.valid)
    metrics = reward.learn(r)
    assert [metrics[name] for name in REWARD_METRICS] == pytest.approx([loss, accuracy, score.mean()], abs=1e-5)
    assert np.abs(reward.relabel(r).reward - q_of(reward.trained.policy, r)[0]).max() < 1e-5
    assert np.abs(reward.relabel(r).reward - expected).max() > 1e-3


def test_an_update_is_one_of_the_reward_and_then_one_of_ppo_on_what_it_says(prefer_ppo, noise):
    one, two, r = prefer_ppo(8), prefer_ppo(8), noise(9)
    metrics = one.update(r)
    learned = two.reward.learn(r)
    assert metrics == PPO.update(two, two.reward.relabel(r)) | {f"reward_{k}": v for k, v in learned.items()}
    assert all(np.array_equal(theta(one.parts[key]), theta(two.parts[key])) for key in ("", "reward."))


def test_both_agents_know_nothing_of_returns_but_their_order(prefer, prefer_ppo, noise):
    """Metamorphic: returns turned into their cubes change no bit; other orders do. (V of the policy sees returns.)"""
    r = noise(5)
    episode = r.reward.reshape(2, 2, 3)  # [episode, step, column]
    r = replace(r, reward=np.stack([np.zeros((2, 3)), episode[:, 1]], 1).reshape(4, 3).astype(np.float32))
    for make, settings in ((prefer, {"value_coef": 0.0}), (prefer_ppo, {})):
        vectors = []
        for reward in (r.reward, r.reward**3, -r.reward):
            agent = make(6, **settings)
            agent.update(replace(r, reward=reward))
            vectors.append(np.concatenate([theta(part) for part in agent.parts.values()]))
        assert np.array_equal(vectors[0], vectors[1]) and not np.array_equal(vectors[0], vectors[2])


def test_without_comparable_episodes_nothing_is_learned_of_any(prefer, noise):
    agent = prefer(7, value_coef=0.0)
    agent.group = lambda rollout: np.arange(3)
    before = theta(agent.trained)
    assert agent.update(noise())["loss"] == 0 and np.array_equal(theta(agent.trained), before)


@pytest.mark.parametrize("which", ["prefer", "prefer_ppo"])
def test_they_resume_bit_exactly_through_a_file(which, noise, tmp_path, request):
    make = request.getfixturevalue(which)

    def finish(agent):
        metrics = [agent.update(noise(seed)) for seed in (7, 8)]
        return metrics, [theta(part).tolist() for part in agent.parts.values()]

    agent = make(5)
    agent.update(noise(6))
    checkpoint.save(tmp_path / "agent", *agent.state())
    resumed = make(50)
    resumed.load_state(*checkpoint.load(tmp_path / "agent"))
    assert finish(resumed) == finish(agent)
    tensors, meta = agent.state()
    before = theta(resumed.parts[""])
    name = next(reversed([name for name in tensors if name.endswith("parameter/value.bias")]))
    with pytest.raises(checkpoint.CheckpointError, match=name.replace(".", r"\.")):
        resumed.load_state(tensors | {name: np.zeros(3)}, meta)
    assert np.array_equal(before, theta(resumed.parts[""]))


@pytest.mark.parametrize("config, key, value", [
    (PreferenceConfig, "epochs", 0), (PreferenceConfig, "beta", 0.0), (PreferencePPOConfig, "reward_epochs", 0),
])  # fmt: skip
def test_a_bad_setting_is_named(config, key, value):
    with pytest.raises(ValueError, match=key):
        config(**{key: value})


def test_a_wrong_shape_and_a_nan_are_refused(prefer, prefer_ppo, noise):
    for agent in (prefer(9), prefer_ppo(9)):
        rollout, before = noise(), [theta(part) for part in agent.parts.values()]
        with pytest.raises(ValueError, match="configuration says"):
            agent.update(replace(rollout, action=rollout.action[:3]))
        with pytest.raises(ValueError, match="not finite"):
            agent.update(replace(rollout, reward=rollout.reward * np.nan))
        assert all(np.array_equal(a, theta(p)) for a, p in zip(before, agent.parts.values(), strict=True))


def kendall(a, b):
    """Rank correlation of two lists without ties (Kendall 1938)."""
    signs = np.sign(a[:, None] - a) * np.sign(b[:, None] - b)
    return signs.sum() / (len(a) * (len(a) - 1))


def test_a_known_ranking_is_recovered(cache_dir):
    """16 items of known utility, compared 24 at a time: Kendall's tau 1.0. Control: with shuffled labels about 0."""
    n, config = 16, replace(SMALL_PPO, steps=1, n_envs=24, hidden=16, reward_epochs=4, max_grad_norm=10.0)
    utility = np.random.default_rng(0).standard_normal(n)

    def rank(shuffled):
        rng = np.random.default_rng(1)
        model = PreferenceReward(LSTMPolicy(n, 2, 0, 16, 2, memory=False), config, cache_dir)
        for _ in range(60):
            item = rng.integers(0, n, 24)
            told = rng.permutation(utility[item]) if shuffled else utility[item]
            model.learn(rollout_of(told[None], np.ones((1, 24)), np.ones((1, 24)), np.eye(n)[item][None]))
        shown = np.eye(n)[np.arange(24) % n][None]
        return kendall(model.relabel(rollout_of(np.zeros((1, 24)), *np.ones((2, 1, 24)), shown)).reward[0, :n], utility)

    found, control = rank(False), rank(True)
    print(f"ranking from preferences: bar 1.0, tau {found:.3f}, with shuffled labels {control:.3f}")
    assert found == 1.0 and abs(control) < 0.5
