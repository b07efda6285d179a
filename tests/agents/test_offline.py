"""Implicit Q-learning: its losses by hand, its wiring, and that it beats its data."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from tinygrad import Tensor

from agents import checkpoint
from agents.logs import Log
from agents.networks import ILLEGAL, log_softmax
from agents.offline import (
    ACTOR_METRICS,
    CRITIC_METRICS,
    CRITICS,
    IQL,
    Batch,
    IQLConfig,
    actor_loss,
    critic_loss,
    expectile_loss,
)
from agents.rollout import Rollouts
from agents.toys import DelayedMemory, Identity, MaskedIdentity, Stitch
from agents.uniform import Uniform

SMALL = IQLConfig(steps=4, n_envs=2, hidden=8, memory=False, gamma=0.9, epochs=1, lr=1e-2, polyak=0.1)
TOY = IQLConfig(steps=8, n_envs=32, hidden=32, memory=False, lr=1e-2, max_grad_norm=10.0, polyak=0.05)


@pytest.fixture(scope="module")
def iql(cache_dir):
    """iql(seed, **settings) -> a small agent for Noise; those that differ in no loss share one capture."""
    return lambda seed=0, **settings: IQL(3, 4, 2, replace(SMALL, **settings), seed, cache_dir)


@pytest.fixture(scope="module")
def noise(make):
    """noise(seed, skip) -> a rollout of Noise [4, 2], after `skip` steps, by another agent, whose memory and values
    must not be looked at."""

    def noise(seed=0, skip=0):
        rollouts = Rollouts(make.env(), Uniform(3, 4, 2, None, seed), seed)
        rollout = [rollouts.collect(steps)[0] for steps in (skip, 4) if steps][-1]
        unknown = {name: np.full_like(getattr(rollout, name), np.nan) for name in ("value", "bootstrap", "last_value")}
        return replace(rollout, hidden=np.full((2, 16), np.nan, np.float32), **unknown)

    return noise


def batch_of(rng, T=3, B=4, A=5):
    """Arrays of a Batch, with masks, and logits [T, B, A]."""
    mask = rng.random((T, B, A)) < 0.6
    action = rng.integers(0, A, (T, B)).astype(np.int32)
    np.put_along_axis(mask, action[..., None], True, 2)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    going, known = ((rng.random((T, B)) < 0.6).astype(np.float32) for _ in range(2))
    known[-1] *= 1 - going[-1]
    uncut = np.ones((T, B), np.float32)
    uncut[0, 0] = uncut[1, 2] = 0
    arrays = [draw(B, 1), draw(T, B, 1), mask, draw(T, B), action, draw(T, B), going, known, uncut]
    return Batch(*(Tensor(x) for x in arrays)), Batch(*arrays), draw(T, B, A)


# *** the losses ***


def test_expectiles_by_hand():
    """Of 0 (three times) and 4 (once) the tau-expectile is 4 tau / (tau + 3 (1 - tau)): there the slope is 0. With 1/2
    it is the mean; at one place a larger tau draws upwards more."""
    sample = Tensor([0.0, 0.0, 0.0, 4.0])

    def slope(v, tau):
        v = Tensor([v]).realize()
        return expectile_loss(sample - v, tau).mean().gradient(v)[0].item()

    assert expectile_loss(Tensor([2.0, -2.0]), 0.75).tolist() == [3.0, 1.0]
    taus = (0.1, 0.5, 0.7, 0.9, 0.99)
    expectiles = [4 * tau / (tau + 3 * (1 - tau)) for tau in taus]
    assert expectiles[1] == 1.0 and expectiles == sorted(expectiles) and expectiles[-1] > 3.8
    assert [slope(v, tau) for v, tau in zip(expectiles, taus, strict=True)] == pytest.approx([0] * 5, abs=1e-6)
    slopes = [slope(1.0, tau) for tau in taus]
    assert slopes == sorted(slopes, reverse=True) and slopes[0] > 0 > slopes[2]


def test_the_actor_loss_equals_numpy_with_clipped_weights_and_no_gradient_of_illegal_logits():
    rng, config = np.random.default_rng(0), IQLConfig(expectile=0.7, beta=2.0, weight_clip=5.0, value_coef=0.3)
    batch, arrays, logits = batch_of(rng)
    q, value = (2 * rng.standard_normal((2, 3, 4))).astype(np.float32)
    scores, v = Tensor(logits).realize(), Tensor(value).realize()
    loss, metrics = actor_loss(log_softmax(batch.mask.where(scores, ILLEGAL)), v, Tensor(q), batch, config)
    policy, error, weights, by_logit = 0.0, 0.0, np.zeros((3, 4)), np.zeros((3, 4, 5))
    share = arrays.uncut / 10  # of each step, in both means: two of the twelve were cut
    for t, b in np.ndindex(3, 4):
        legal, advantage = np.flatnonzero(arrays.mask[t, b]), float(q[t, b]) - float(value[t, b])
        p = np.exp(logits[t, b, legal].astype(np.float64))
        p /= p.sum()
        chosen = legal == arrays.action[t, b]
        weights[t, b] = min(np.exp(2 * advantage), 5.0)
        policy -= share[t, b] * weights[t, b] * np.log(p[chosen][0])
        error += share[t, b] * (0.7 if advantage > 0 else 0.3) * advantage**2
        by_logit[t, b, legal] = share[t, b] * weights[t, b] * (p - chosen)
    found = dict(zip(ACTOR_METRICS, (m.item() for m in metrics), strict=True))
    assert (weights == 5.0).any() and (weights < 5.0).any()
    assert found["policy_loss"] == pytest.approx(policy, abs=1e-5)
    assert found["value_loss"] == pytest.approx(error, abs=1e-5)
    assert found["weight"] == pytest.approx(weights.mean(), abs=1e-5)
    assert found["advantage"] == pytest.approx((q - value).mean(), abs=1e-5)
    assert loss.item() == pytest.approx(policy + 0.3 * error, abs=1e-5)
    gradient, by_value = (g.numpy() for g in loss.gradient(scores, v))
    assert not arrays.mask.all() and (gradient[~arrays.mask] == 0).all()
    assert np.abs(gradient - by_logit).max() < 1e-5
    side = np.where(q > value, 0.7, 0.3)  # only eq. 5 moves V
    assert np.abs(by_value + 0.3 * 2 * side * (q - value) * share).max() < 1e-5


def test_an_absurd_advantage_has_the_largest_weight_and_nothing_overflows():
    batch, arrays, logits = batch_of(np.random.default_rng(1))
    config = IQLConfig(beta=3.0)
    log_probs = log_softmax(batch.mask.where(Tensor(logits), ILLEGAL))
    _, metrics = actor_loss(log_probs, Tensor.zeros(3, 4), Tensor.full((3, 4), 1e4), batch, config)
    assert metrics[ACTOR_METRICS.index("weight")].item() == pytest.approx(100, rel=1e-5)


def test_the_critic_loss_equals_numpy():
    rng = np.random.default_rng(2)
    batch, arrays, _ = batch_of(rng)
    q, value = rng.standard_normal((2, 3, 4)).astype(np.float32)
    scores, v = Tensor(q).realize(), Tensor(value).realize()
    loss, metrics = critic_loss(scores, v, batch, gamma=0.9)
    errors = []
    for t, b in np.argwhere(arrays.known):
        y = arrays.reward[t, b] + (0.9 * value[t + 1, b] if arrays.going[t, b] else 0.0)
        errors.append(float(y - q[t, b]) ** 2)
    found = dict(zip(CRITIC_METRICS, (m.item() for m in metrics), strict=True))
    assert 3 < len(errors) < 12 and found["critic_loss"] == pytest.approx(np.mean(errors), abs=1e-5)
    assert found["q"] == pytest.approx(q.mean(), abs=1e-5) and loss.item() == pytest.approx(np.mean(errors), abs=1e-5)
    gradient, by_value = (g.numpy() for g in loss.gradient(scores, v))
    assert ((gradient != 0) == (arrays.known > 0)).all() and not by_value.any()


def test_what_follows_an_end_or_is_unknown_does_not_count():
    """Metamorphic: rewards of unknown steps, and values of states that follow none, may be anything."""
    rng = np.random.default_rng(2)
    batch, arrays, _ = batch_of(rng)
    q, value = rng.standard_normal((2, 3, 4)).astype(np.float32)
    loss = lambda v, b: critic_loss(Tensor(q), Tensor(v), b, 0.9)[0].item()  # noqa: E731
    unknown = np.where(arrays.known > 0, arrays.reward, 99).astype(np.float32)
    follows = np.zeros((3, 4), bool)
    follows[1:] = (arrays.known[:-1] > 0) & (arrays.going[:-1] > 0)
    assert follows.any()
    other = np.where(follows, value, 77).astype(np.float32)
    assert loss(other, batch._replace(reward=Tensor(unknown))) == pytest.approx(loss(value, batch), rel=1e-6)
    assert loss(value + follows, batch) != pytest.approx(loss(value, batch), rel=1e-3)
    assert loss(value, batch._replace(reward=batch.reward + 1)) != pytest.approx(loss(value, batch), rel=1e-3)


# *** the agent ***


def vectors(agent):
    return {key: part.policy.theta.numpy().copy() for key, part in agent.parts.items()} | {
        f"target {key}": target.numpy().copy() for key, target in agent.targets.items()
    }


def feed_forward(policy, vector, rollout):
    """Logits and values [T, B, ...] of the network without memory, in float64."""
    p = {k: v.astype(np.float64) for k, v in policy.unflatten(vector).items()}
    x = np.tanh(rollout.state @ p["encoder1.weight"] + p["encoder1.bias"])
    x = np.tanh(x @ p["encoder2.weight"] + p["encoder2.bias"])
    query = x @ p["pointer.context"] + p["pointer.bias"]
    score = np.tanh(rollout.actions @ p["pointer.action"] + query[:, :, None]) @ p["pointer.score"][:, 0]
    return x @ p["policy.weight"] + p["policy.bias"] + score, (x @ p["value.weight"] + p["value.bias"])[..., 0]


def test_an_update_equals_numpy(iql, noise):
    """Two updates. Q of the target critics for the actor; V of the actor, after its step, for the critics. Row 0 of
    Noise terminates after every second step, row 1 is cut; the second rollout begins and ends within episodes."""
    agent = iql(4)
    for skip, ends in ((0, [False, True] * 2), (1, [True, False] * 2)):
        r, old = noise(3 + skip, skip), vectors(agent)
        assert r.terminated[:, 0].tolist() == ends and r.ended[:, 1].tolist() == ends and not r.terminated[:, 1].any()
        metrics, new = agent.update(r), vectors(agent)

        def q_of(vector, r=r):
            logits, value = feed_forward(agent.policy, vector, r)
            return value + np.take_along_axis(logits, r.action[..., None], 2)[..., 0]

        q = np.minimum(*(q_of(old[f"target {key}"]) for key in CRITICS))
        logits, value = feed_forward(agent.policy, old[""], r)
        legal = np.where(r.mask, np.exp(logits), 0)
        chosen = np.log(np.take_along_axis(legal, r.action[..., None], 2)[..., 0] / legal.sum(-1))
        advantage, uncut = q - value, ~r.ended | r.terminated
        weighted = (np.exp(3 * advantage).clip(0, 100) * chosen)[uncut]
        assert metrics["policy_loss"] == pytest.approx(-weighted.mean(), rel=1e-4)
        side = np.where(advantage > 0, 0.8, 0.2)
        assert metrics["value_loss"] == pytest.approx((side * advantage**2)[uncut].mean(), abs=1e-5)
        after, errors = feed_forward(agent.policy, new[""], r)[1], []
        for t, b in [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (2, 1)] if not skip else [(0, 0), (1, 0), (2, 0), (1, 1)]:
            y = r.reward[t, b] + (0.0 if r.terminated[t, b] else 0.9 * after[t + 1, b])
            errors += [(y - q_of(old[key])[t, b]) ** 2 for key in CRITICS]
        assert metrics["critic_loss"] == pytest.approx(np.mean(errors), abs=1e-5)
        for key in CRITICS:
            by_hand = old[f"target {key}"] + 0.1 * (new[key] - old[f"target {key}"])
            assert np.abs(new[f"target {key}"] - by_hand).max() < 1e-6 and (new[key] != old[key]).any()
    assert (q_of(new["critic1."]) != q_of(new["critic2."])).all(), "two critics that are one"
    fresh = iql(4)
    for key, part in agent.parts.items():
        before = fresh.parts[key].policy.unflatten(fresh.parts[key].policy.theta.numpy())
        after = part.policy.unflatten(part.policy.theta.numpy())
        assert [name for name in before if (before[name] == after[name]).all()] == [], key


def test_two_agents_on_one_capture_do_not_touch_each_other(iql, noise):
    def run(seeds):
        agents = [iql(seed) for seed in seeds]
        for step in range(2):
            for agent in agents:
                agent.update(noise(step))
        return [np.concatenate(list(vectors(agent).values())) for agent in agents]

    together, alone = run([4, 5]), run([4]) + run([5])
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))


def test_it_resumes_bit_exactly_through_a_file_with_its_targets(iql, noise, tmp_path):
    def finish(agent):
        metrics = [agent.update(noise(seed)) for seed in (7, 8)]
        return metrics, [v.tolist() for v in vectors(agent).values()]

    agent = iql(5)
    agent.update(noise(6))
    checkpoint.save(tmp_path / "agent", *agent.state())
    resumed = iql(50)
    resumed.load_state(*checkpoint.load(tmp_path / "agent"))
    assert finish(resumed) == finish(agent)
    tensors, meta = agent.state()
    before = vectors(resumed)
    for name in ("critic1.target/value.bias", "critic2.parameter/value.bias"):
        with pytest.raises(checkpoint.CheckpointError, match=name.replace(".", r"\.")):
            resumed.load_state(tensors | {name: np.zeros(3)}, meta)
    assert all(np.array_equal(before[key], value) for key, value in vectors(resumed).items())


@pytest.mark.parametrize("key, value", [
    ("expectile", 1.0), ("expectile", 0.0), ("polyak", 1.5), ("epochs", 0), ("weight_clip", 0.0),
])  # fmt: skip
def test_a_bad_setting_is_named(key, value):
    with pytest.raises(ValueError, match=key):
        IQLConfig(**{key: value})


def test_a_wrong_shape_and_a_nan_are_refused(iql, noise):
    agent, rollout = iql(9), noise()
    before = vectors(agent)
    with pytest.raises(ValueError, match="configuration says"):
        agent.update(replace(rollout, action=rollout.action[:3]))
    with pytest.raises(ValueError, match="not finite"):
        agent.update(replace(rollout, reward=rollout.reward * np.inf))
    assert all(np.array_equal(before[key], value) for key, value in vectors(agent).items())


# *** learning ***


def test_the_best_and_the_random_return_of_stitch_are_those_of_all_plans():
    """Every plan of right and wrong answers, side by side; a plan's probability at random is 1/4 for each right one."""
    plans = np.array(list(itertools.product([True, False], repeat=5)))  # [32, stage]
    env = Stitch(32, length=5)
    seen, totals = env.reset(0), np.zeros(32)
    for stage, right in enumerate(plans.T):
        assert (seen.state.argmax(1) % 5 == stage).all() and (seen.state.sum(1) == 1).all()
        step = env.step(np.where(right, env.secret[stage], (env.secret[stage] + 1) % 4))
        seen, totals = step.observation, totals + step.reward
        assert (step.terminated == (stage == 4)).all()
    assert totals.max() == totals[0] == env.best == 3.5
    assert (totals * np.prod(np.where(plans, 0.25, 0.75), axis=1)).sum() == pytest.approx(env.chance)


def learn(env, log, config, updates, cache_dir):
    agent = IQL(env.state_dim, env.n_actions, env.action_dim, config, 0, cache_dir)
    for _ in range(updates):
        agent.update(log.sample(agent.rng, config.n_envs))
    return agent


@pytest.mark.learn
def test_it_beats_the_log_that_it_learned_from(train, cache_dir):
    """Greedy >= 6 of 6.5, which no logged episode comes near; drawing actions > 3. The chunks cut episodes anywhere.

    Controls: tau 1/2 values what the log's author would do later, for whom climbing does not pay: greedy <= 0. Beta 0
    clones the log: drawn, no better than its mean."""
    env = Stitch(32)
    log = Log.record(Stitch(16), Uniform(env.state_dim, env.n_actions), chunks=64, steps=11)
    config = replace(TOY, steps=11)
    agents = [learn(env, log, replace(config, **changed), 60, cache_dir)
              for changed in ({}, {"expectile": 0.5}, {"beta": 0.0})]  # fmt: skip
    greedy = [train.score(env, agent, 32) for agent in agents]
    drawn = [train.score(env, agent, 512, temperature=1.0) for agent in agents]
    mean, best = log.returns.mean(), log.returns.max()
    print(f"IQL: bar 6.0 of {env.best}, greedy {greedy[0]:.2f} (drawn {drawn[0]:.2f}); tau 0.5 {greedy[1]:.2f} "
          f"({drawn[1]:.2f}), beta 0 {greedy[2]:.2f} ({drawn[2]:.2f}); {len(log)} logged steps: mean {mean:.2f} "
          f"({env.chance:.2f}), best {best:.2f}")  # fmt: skip
    assert abs(mean - env.chance) < 0.3 and best < 6
    assert greedy[0] >= 6 and drawn[0] > 3
    assert greedy[1] <= 0 and drawn[2] < mean + 0.5


@pytest.mark.learn
def test_identity_from_1024_random_steps(train, cache_dir):
    """>= 90 of 100. Control: beta 0 clones the random log, 25 when drawn."""
    env = Identity(8)
    log = Log.record(env, Uniform(4, 4), chunks=16, steps=8)
    config = replace(TOY, gamma=0.0)
    agents = [learn(env, log, replace(config, beta=beta), 30, cache_dir) for beta in (10.0, 0.0)]
    trained, control = (train.score(env, agent, 8, temperature=1.0) for agent in agents)
    print(f"identity, IQL: bar 90, trained {trained:.1f}, beta 0 {control:.1f}")
    assert trained >= 90 and control < 40


@pytest.mark.learn
def test_masked_identity_from_8192_random_steps(train, cache_dir):
    """>= 90 of 100. Control: beta 0 clones the random log, 7."""
    env = MaskedIdentity(8)
    log = Log.record(env, Uniform(70, 70), chunks=128, steps=8)
    config = replace(TOY, gamma=0.0, hidden=128, lr=3e-3)
    agents = [learn(env, log, replace(config, beta=beta), 60, cache_dir) for beta in (10.0, 0.0)]
    trained, control = (train.score(env, agent, 8) for agent in agents)
    print(f"masked identity, IQL: bar 90, trained {trained:.1f}, beta 0 {control:.1f}")
    assert trained >= 90 and control < 30


@pytest.mark.learn
def test_delayed_memory_from_12288_random_steps(train, cache_dir):
    """>= 0.95: the cue must come through the memory of actor and critics alike. Without memory 0.5."""
    env = DelayedMemory(32, delay=2)
    log = Log.record(env, Uniform(3, 2), chunks=64, steps=6)
    config = replace(TOY, steps=6, gamma=0.9, beta=10.0)
    agents = [learn(env, log, replace(config, memory=memory), 60, cache_dir) for memory in (True, False)]
    trained, control = (train.score(env, agent, 512) for agent in agents)
    print(f"delayed memory, IQL: bar 0.95, trained {trained:.2f}, without memory {control:.2f}")
    assert trained >= 0.95 and 0.4 < control < 0.6
