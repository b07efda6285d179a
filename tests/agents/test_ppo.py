import json
from dataclasses import replace

import numpy as np
import pytest
from tinygrad import Context, Tensor

from agents import checkpoint
from agents.bonuses import BonusConfig
from agents.dqn import DQNConfig
from agents.imitation import CloningConfig
from agents.learner import Diverged, without_moments
from agents.losses import METRICS, Batch, ppo_loss
from agents.muzero import MuZeroConfig
from agents.offline import IQLConfig
from agents.ppo import PPO, PPOConfig
from agents.preferences import PreferenceConfig, PreferencePPOConfig
from agents.protocol import Observation
from agents.returns import gae
from agents.rollout import Rollouts


def theta(agent):
    return agent.policy.theta.numpy().copy()


def advantages(rollout, config):
    r = rollout
    raw = gae(r.reward, r.value, r.terminated, r.ended, r.last_value, config.gamma, config.lam, r.bootstrap)
    return (raw - raw.mean()) / (raw.std() + 1e-8), raw + r.value


@pytest.mark.parametrize("ratio, advantage, loss, slope", [
    (1.0, 2.0, -2.0, -2.0),   # inside: the plain policy gradient
    (1.5, 2.0, -2.4, 0.0),    # above, and good: enough has been done
    (1.5, -2.0, 3.0, 3.0),    # above, and bad: must be undone
    (0.5, 2.0, -1.0, -1.0),   # below, and good: must be undone
    (0.5, -2.0, 1.6, 0.0),    # below, and bad: enough has been done
])  # fmt: skip
def test_each_side_of_the_clip(ratio, advantage, loss, slope):
    """One row, two actions. Slope is the derivative by log pi(a): r A where not clipped, else 0."""
    log_probs = Tensor(np.log(np.array([[[0.4, 0.6]]], np.float32))).realize()
    one = lambda x: Tensor(np.full((1, 1), x, np.float32))  # noqa: E731
    batch = Batch(
        hidden=one(0),
        state=one(0),
        mask=Tensor(np.ones((1, 1, 2), bool)),
        reset=one(0),
        action=Tensor(np.zeros((1, 1), np.int32)),
        log_prob=one(np.log(0.4 / ratio)),
        advantage=one(advantage),
        target=one(3.0),
    )
    total, metrics = ppo_loss(log_probs, one(1.0), batch, Tensor([0.0]), clip=0.2, value_coef=0.5)
    found = dict(zip(METRICS, (m.item() for m in metrics), strict=True))
    assert found["policy_loss"] == pytest.approx(loss, rel=1e-5) and found["value_loss"] == pytest.approx(2.0)
    assert total.item() == pytest.approx(loss + 0.5 * 2.0, rel=1e-5)
    assert found["kl"] == pytest.approx(ratio - 1 - np.log(ratio), abs=1e-5) and found["clip_fraction"] == (
        ratio != 1.0
    )
    assert found["entropy"] == pytest.approx(-(0.4 * np.log(0.4) + 0.6 * np.log(0.6)), rel=1e-5)
    assert total.gradient(log_probs)[0].numpy()[0, 0, 0] == pytest.approx(slope, rel=1e-5)


def test_an_answer_is_of_this_question_alone(make, cache_dir):
    """Whatever was asked before, though states and memories have one shape."""
    new = lambda: PPO(16, 4, 2, make.config, 0, cache_dir)  # noqa: E731
    rng, used = np.random.default_rng(0), new()
    draw = lambda *shape: rng.standard_normal((2, *shape)).astype(np.float32)  # noqa: E731
    asked = [
        (Observation(draw(16), np.ones((2, 4), bool), draw(4, 2)), draw(16), np.zeros(2, np.float32)) for _ in range(3)
    ]
    answers = [used.evaluate(*question) for question in asked]
    for question, answer in zip(asked, answers, strict=True):
        for ours, theirs in zip(new().evaluate(*question), answer, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    swapped = asked[0][0]._replace(state=asked[0][1])
    assert not np.allclose(used.evaluate(swapped, asked[0][0].state, asked[0][2])[0], answers[0][0])


def test_before_any_step_the_ratio_is_one_and_afterwards_every_parameter_has_moved(make):
    agent = make(1)
    rollouts, before = Rollouts(make.env(), agent, 1), agent.policy.unflatten(theta(agent))
    for _ in range(2):  # the second rollout begins with a memory that is not empty
        rollout, _ = rollouts.collect(4)
        assert (rollout.ended.sum(0) >= 2).all() and not rollout.mask.all()
        assert agent.update(rollout)["first_ratio_error"] < 1e-4
    assert rollout.hidden.any()
    after = agent.policy.unflatten(theta(agent))
    for name in before:
        assert (before[name] != after[name]).any(), f"{name} was not trained"


@pytest.mark.parametrize("minibatches", [1, 2])
def test_the_ratio_is_one_where_a_chunk_begins_within_an_episode(make, minibatches):
    """Chunks of 3 steps, episodes of 2. Nothing is learned (lr 0), so the ratio is 1 in every epoch and minibatch. With the memory
    wiped it is off by more than 0.01."""
    agent = make(1, replace(make.config, steps=3, minibatches=minibatches, lr=0.0, lr_end=0.0))
    arrays = agent.policy.unflatten(theta(agent))
    arrays["policy.weight"] = 100 * arrays["policy.weight"]  # so that what is remembered matters
    agent.policy.theta.assign(Tensor(agent.policy.flatten(arrays))).realize()
    rollouts = Rollouts(make.env(), agent, 1)
    rollouts.collect(3)
    rollout, _ = rollouts.collect(3)
    assert not rollout.reset[0].any() and rollout.hidden.any(axis=1).all()
    assert agent.update(rollout)["ratio_error"] < 1e-4
    assert agent.update(replace(rollout, hidden=np.zeros_like(rollout.hidden)))["ratio_error"] > 0.01


def test_an_update_equals_finite_differences_and_adam_in_numpy(make, reference):
    """Both epochs: loss parts, gradient norm, clipping and Adam, against float64 numpy."""
    c, agent = make.config, make(2)
    rollout, vector = make.rollout(agent, 2), theta(agent).astype(np.float64)
    advantage, target = advantages(rollout, c)
    used = np.zeros(len(vector), bool)
    for start, end in agent.policy.slots.values():
        used[start:end] = True
    loss = lambda x: reference.loss(agent.policy.unflatten(x), rollout, advantage, target, c)  # noqa: E731
    m, v, table = np.zeros_like(vector), np.zeros_like(vector), []
    for t in range(1, c.epochs + 1):
        gradient, step = np.zeros_like(vector), 1e-5
        for i in np.flatnonzero(used):
            shift = np.eye(1, len(vector), i)[0] * step
            gradient[i] = (loss(vector + shift)[0] - loss(vector - shift)[0]) / (2 * step)
        norm = np.linalg.norm(gradient)
        table.append(loss(vector)[1] | {"gradient_norm": norm})
        gradient *= min(1.0, c.max_grad_norm / norm)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        vector = vector - c.lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-5)
    metrics = agent.update(rollout)
    for name in table[0]:
        assert metrics[name] == pytest.approx(np.mean([row[name] for row in table]), abs=1e-5, rel=1e-4), name
    assert metrics["gradient_norm"] > c.max_grad_norm, "nothing was clipped: this test must clip"
    assert np.abs(theta(agent) - vector).max() < 2e-4  # of steps of 1e-2
    assert not theta(agent)[~used].any()


def test_jit_on_equals_jit_off(make):
    def run(jit):
        agent = make(3)
        with Context(JIT=jit):
            rollout = make.rollout(agent, 3)
            metrics = agent.update(rollout)
        return rollout, metrics, theta(agent)

    (on, metrics_on, theta_on), (off, metrics_off, theta_off) = run(1), run(0)
    assert np.array_equal(on.action, off.action) and np.abs(on.value - off.value).max() < 1e-6
    assert np.abs(theta_on - theta_off).max() < 1e-6
    assert all(metrics_on[k] == pytest.approx(metrics_off[k], abs=1e-5) for k in metrics_on)


def test_two_agents_on_one_capture_do_not_touch_each_other_and_one_seed_gives_one_run(make):
    def run(seeds):
        agents = [make(seed) for seed in seeds]
        sources = [Rollouts(make.env(), agent, seed) for agent, seed in zip(agents, seeds, strict=True)]
        for _ in range(2):
            rollouts = [source.collect(4)[0] for source in sources]
            for agent, rollout in zip(agents, rollouts, strict=True):
                agent.update(rollout)
        return [theta(agent) for agent in agents]

    together, alone = run([4, 5]), run([4]) + run([5])
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))
    assert not np.array_equal(*together)


def test_without_moments_adam_begins_anew(make):
    """The policy is the same; a state that holds some of the moments is damaged."""
    agent, other = make(0), make(1)
    agent.update(make.rollout(agent))
    tensors, meta = agent.state()
    small = without_moments(tensors)
    assert len(small) * 3 == len(tensors)
    other.update(make.rollout(other))
    other.load_state(small, meta)
    part = other.parts[""]
    assert np.array_equal(theta(other), theta(agent)) and other.updates == 1
    assert part.steps == 0 and not part.m.numpy().any() and not part.v.numpy().any()
    gone = next(name for name in tensors if "adam_m/" in name)
    with pytest.raises(checkpoint.CheckpointError):
        other.load_state({name: array for name, array in tensors.items() if name != gone}, meta)


def test_training_resumes_bit_exactly_through_a_file(make, tmp_path):
    def finish(agent):
        rollouts = Rollouts(make.env(), agent, 7)
        metrics = [agent.update(rollouts.collect(4)[0]) for _ in range(2)]
        return metrics, theta(agent)

    agent = make(6)
    agent.update(make.rollout(agent, 6))
    checkpoint.save(tmp_path / "agent", *agent.state())
    resumed = make(60)
    resumed.load_state(*checkpoint.load(tmp_path / "agent"))
    json.dumps(resumed.state()[1])
    (metrics, expected), (again, got) = finish(agent), finish(resumed)
    assert metrics == again and np.array_equal(expected, got)
    tensors, meta = agent.state()
    tensors["adam_v/value.weight"] = tensors["adam_v/value.weight"][:-1]
    with pytest.raises(checkpoint.CheckpointError, match=r"adam_v/value\.weight"):
        resumed.load_state(tensors, meta)
    assert np.array_equal(theta(resumed), got)


def test_annealing_reaches_a_captured_update(make):
    agent = make(8, replace(make.config, lr_end=0.0, anneal_updates=1))
    rollout = make.rollout(agent, 8)
    before = theta(agent)
    assert agent.update(rollout)["lr"] == make.config.lr and not np.array_equal(before, theta(agent))
    before = theta(agent)
    assert agent.update(rollout)["lr"] == 0 and np.array_equal(before, theta(agent))


def test_after_a_reset_adam_takes_no_larger_steps_than_at_its_beginning(make):
    """Late in a training: at most 1.05 lr in each of 8 steps, whatever the gradients. Moments of 0 under an old count of steps make
    it 3 lr and more."""
    agent = make(11, replace(make.config, epochs=1))
    agent.update(make.rollout(agent, 11))
    agent.trained.steps = 10_000
    before = agent.policy.unflatten(theta(agent))
    agent.trained.reset(["value.weight"], 1)
    after = agent.policy.unflatten(theta(agent))
    assert [name for name in before if not np.array_equal(before[name], after[name])] == ["value.weight"]
    for seed in range(8):
        before = theta(agent)
        agent.update(make.rollout(agent, seed))
        assert 0 < np.abs(theta(agent) - before).max() <= 1.05 * make.config.lr


def test_samples_follow_the_masked_policy_and_carry_its_probability(make):
    agent, env, rows = make(9), make.env(), np.arange(2)
    seen, hidden, reset = env.reset(9), agent.initial_hidden(2), np.ones(2, np.float32)
    assert not hidden.any()
    first = agent.evaluate(seen, hidden, reset)
    log_probs, kept = first[0], first[0].copy()
    agent.evaluate(env.look(), hidden + 1, reset)
    assert np.array_equal(log_probs, kept), "an array given out was overwritten by a later call"
    probability = np.exp(kept.astype(np.float64))
    assert np.allclose(probability.sum(1), 1) and (probability[~seen.mask] == 0).all()
    agent.evaluate = lambda *_: first  # what follows is numpy
    for temperature in (1.0, 0.5):
        counts, expected = np.zeros((2, 4)), probability ** (1 / temperature)
        expected /= expected.sum(1, keepdims=True)
        for _ in range(4000):
            choice = agent.act(seen, hidden, reset, temperature)
            counts[rows, choice.action] += 1
            assert np.allclose(np.exp(choice.log_prob), expected[rows, choice.action], atol=1e-6)
        assert np.abs(counts / 4000 - expected).max() < 0.04 and (counts[~seen.mask] == 0).all()
    assert np.array_equal(agent.act(seen, hidden, reset, temperature=0).action, kept.argmax(1))


@pytest.mark.parametrize("config", [PPOConfig, PreferencePPOConfig])
@pytest.mark.parametrize("key, value", [
    ("steps", 0), ("n_envs", 0), ("hidden", 0), ("epochs", 0), ("minibatches", 0), ("clip", 0.0), ("clip", float("nan")),
    ("gamma", 1.5), ("lam", -0.1), ("lr", -1e-3), ("max_grad_norm", 0.0), ("adam_b1", 1.0), ("adam_b2", -0.1), ("adam_eps", 0.0),
])  # fmt: skip
def test_a_bad_setting_is_named(config, key, value):
    with pytest.raises(ValueError, match=f"^{key} must be"):
        config(**{key: value})


@pytest.mark.parametrize("config", [BonusConfig, DQNConfig, CloningConfig, MuZeroConfig, IQLConfig, PreferenceConfig])
def test_what_all_agents_share_is_checked_in_each(config):
    with pytest.raises(ValueError, match=r"^gamma must be from 0 to 1, not 1\.5"):
        config(gamma=1.5)


def test_a_wrong_shape_and_a_nan_are_refused(make):
    agent = make(10)
    rollout = make.rollout(agent)
    with pytest.raises(ValueError, match="configuration"):
        agent.update(replace(rollout, action=rollout.action[:3]))
    with pytest.raises(Diverged):
        agent.update(replace(rollout, reward=rollout.reward * np.nan))
    with pytest.raises(ValueError, match="minibatches"):
        make(0, replace(make.config, minibatches=3))


def test_only_an_agent_that_has_learned_nothing_starts_from_another(make):
    known, fresh = make(1), make(0)
    known.update(make.rollout(known))
    fresh.start_from(known)
    np.testing.assert_array_equal(theta(fresh), theta(known))
    with pytest.raises(ValueError, match="learned already, in 1 updates"):
        known.start_from(fresh)
