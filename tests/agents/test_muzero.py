import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from muzero_numpy import dynamics, keys_of, predict, reference_loss, represent, softmax, total
from tinygrad import Context, Tensor

from agents import checkpoint
from agents.checkpoint import CheckpointError
from agents.learner import to_tensors
from agents.muzero import METRICS, Batch, MuZero, MuZeroConfig, muzero_loss, two_hot, value_targets
from agents.planning import search
from agents.protocol import Observation
from agents.rollout import Rollouts

# T = 4 with two ends in each row, B = 2; the third rollout overwrites the first
SMALL = MuZeroConfig(steps=4, n_envs=2, hidden=8, gamma=0.9, lr=1e-2, lr_end=1e-2, simulations=4, unroll=2, bins=9,
                     low=-3.0, high=3.0, replay=2, batch=3, gradient_steps=2)  # fmt: skip


@pytest.fixture(scope="module")
def agent_of(cache_dir):
    """agent_of(seed, **settings) -> a small MuZero for Noise."""
    return lambda seed=0, **settings: MuZero(3, 4, 2, replace(SMALL, **settings), seed, cache_dir)


def rollout_of(make, agent, seed=0):
    return Rollouts(make.env(), agent, seed).collect(4)[0]


def theta(agent):
    return agent.policy.theta.numpy().copy()


def window_of(seed=0, K=2, B=3):
    """A batch in which all kinds of steps occur: row 0 ends at once, row 1 is cut after a step, row 2 ends with the window.
    As large as an update's, whose kernels it shares."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    mask = rng.random((K + 1, B, 4)) < 0.6
    mask[..., 2] = True
    policy = np.where(mask, rng.random(mask.shape), 0)
    here = np.ones((K + 1, B), np.float32)
    here[1:, 0] = here[2:, 1] = 0
    terminated = np.zeros((K, B), np.float32)
    terminated[0, 0] = terminated[1, 2] = 1
    return Batch(
        draw(K + 1, B, 3), mask, (policy / policy.sum(-1, keepdims=True)).astype(np.float32), 3 * draw(K + 1, B), here,
        rng.integers(4, size=(K, B)).astype(np.int32), draw(K, B), terminated, here[:-1].copy(), draw(B, 4, 2),
    )  # fmt: skip


def loss_of(agent, window):
    """Through the code under test: loss, metrics by name, gradient by parameter."""
    loss, metrics = agent._loss(agent.policy, Tensor.zeros(1), *to_tensors(*window))
    gradient = agent.policy.gradient(loss)
    Tensor.realize(loss, *metrics, gradient)
    named = dict(zip(METRICS, (m.item() for m in metrics), strict=True))
    return loss.item(), named, agent.policy.unflatten(gradient.numpy().copy())


def lively(agent, seed=0):
    """With parameters far from their small beginnings, biases too."""
    shaken = np.random.default_rng(seed).standard_normal(len(theta(agent))) * 0.4
    arrays = agent.policy.unflatten(shaken.astype(np.float32))
    agent.policy.theta = Tensor(agent.policy.flatten(arrays)).realize()
    return {name: array.astype(np.float64) for name, array in arrays.items()}


# *** values ***


def test_two_hot_there_and_back():
    x = np.array([-2.0, -1.99, 0.0, 0.03, 1.0, 5.97, 6.0, 7.5, -9.0], np.float32)
    weights = two_hot(Tensor(x), 121, -2.0, 6.0).numpy()
    support = np.linspace(-2, 6, 121)
    assert np.allclose(weights @ support, np.clip(x, -2, 6), atol=1e-5)
    assert np.allclose(weights.sum(1), 1, atol=1e-5) and ((weights > 1e-5).sum(1) <= 2).all() and (weights >= 0).all()


def test_value_targets_by_hand():
    """One row: a step, an end; two steps, a cut; a step into the unknown. gamma 0.5."""
    reward = np.array([[1.0], [2.0], [4.0], [9.0], [9.0]])
    terminated = np.array([[0], [1], [0], [0], [0]], bool)
    ended = np.array([[0], [1], [0], [1], [0]], bool)
    value = np.array([[0.1], [8.0], [0.2], [0.4], [0.6]])
    targets = lambda lam: value_targets(reward, terminated, ended, value, 0.5, lam)[:, 0]  # noqa: E731
    assert targets(1.0) == pytest.approx([1 + 0.5 * 2, 2, 4 + 0.5 * 0.4, 0.4, 0.6])
    assert targets(0.0) == pytest.approx([1 + 0.5 * 8, 2, 4 + 0.5 * 0.4, 0.4, 0.6])
    assert targets(0.25)[0] == pytest.approx(1 + 0.5 * (0.75 * 8 + 0.25 * 2))


# *** the loss ***


def test_the_loss_equals_that_of_numpy(agent_of):
    agent, window = agent_of(1), window_of(1)
    expected = reference_loss(lively(agent, 1), window, SMALL)
    loss, found, _ = loss_of(agent, window)
    for name in METRICS:
        assert found[name] == pytest.approx(expected[name], abs=1e-5), name
    assert loss == pytest.approx(total(expected, SMALL), abs=1e-5)


def test_no_gradient_flows_through_what_is_seen_and_half_through_each_step(agent_of):
    agent, window = agent_of(2), window_of(2)
    lively(agent, 2)
    net, b = agent.policy, Batch(*to_tensors(*window))
    seen = Tensor(net.represent(b.state[1:].reshape(-1, 3)).numpy().reshape(2, 3, 8)).realize()
    constant = net.unflatten(
        net.gradient(muzero_loss(net.unroll(b.state[0], b.action, b.actions), seen, b, SMALL)[0]).numpy()
    )
    for name, slope in loss_of(agent, window)[2].items():
        assert np.allclose(slope, constant[name], atol=1e-6), name
    keys = net.keys(b.state[0], b.actions)
    _, reward, _ = net.dynamics(net.represent(b.state[0]), keys, b.action[0])
    whole = net.unflatten(net.gradient(reward.sum() + 0 * net.theta.sum()).numpy().copy())
    out = net.unroll(b.state[0], b.action, b.actions)
    half = net.unflatten(net.gradient(out.reward[0].sum() + 0 * net.theta.sum()).numpy().copy())
    assert np.abs(whole["encoder1.weight"]).max() > 1e-3
    assert np.allclose(half["encoder1.weight"], whole["encoder1.weight"] / 2, atol=1e-6)
    assert np.allclose(half["dynamics1.weight"], whole["dynamics1.weight"], atol=1e-6)


def test_what_stands_past_the_end_of_an_episode_changes_nothing(agent_of):
    agent, window = agent_of(3), window_of(3)
    lively(agent, 3)
    loss, metrics, gradient = loss_of(agent, window)
    rng, changed = np.random.default_rng(0), copy.deepcopy(window)
    past, unknown = window.here == 0, window.going == 0
    assert past.any() and unknown.any()
    for name in ("state", "value", "policy"):
        getattr(changed, name)[past] = rng.standard_normal(getattr(changed, name)[past].shape)
    changed.mask[past] = True
    changed.action[unknown] = 3 - changed.action[unknown]
    changed.reward[unknown], changed.terminated[unknown] = 77.0, 1 - changed.terminated[unknown]
    other_loss, other_metrics, other_gradient = loss_of(agent, changed)
    assert other_loss == loss and other_metrics == metrics
    for name in gradient:
        assert np.allclose(gradient[name], other_gradient[name], atol=1e-7), name


def test_windows_stop_where_an_episode_or_the_sequence_does(agent_of, make):
    """In Noise every second step ends an episode: a window holds two states of one at most."""
    agent = agent_of(4, batch=200)
    agent.replay.add(rollout_of(make, agent, 4))  # no update: it would be captured for these 200 alone
    sample = agent._sample() | {"policy": np.zeros((4, 200, 4)), "value": np.arange(4)[:, None] + np.zeros((4, 200))}
    state, mask, _, value, here, action, reward, terminated, going, features = agent.windows(sample)
    start = value[0].astype(int)
    assert set(start) == {0, 1, 2, 3}
    for row, t in enumerate(start):
        within = [1, 1, 0] if t % 2 == 0 else [1, 0, 0]
        assert here[:, row].tolist() == within and going[:, row].tolist() == within[:2]
        for k in range(3):
            if here[k, row]:
                assert np.array_equal(state[k, row], sample["state"][t + k, row])
                assert np.array_equal(mask[k, row], sample["mask"][t + k, row])
            if k < 2 and going[k, row]:
                for name, x in (("action", action), ("reward", reward), ("terminated", terminated)):
                    assert x[k, row] == sample[name][t + k, row]
        assert np.array_equal(features[row], sample["actions"][t, row])


# *** the model ***


def test_the_model_equals_that_of_numpy(agent_of, make):
    agent = agent_of(5)
    p, seen = lively(agent, 5), make.env().reset(5)
    root, action = agent.initial(seen), np.array([2, 1])
    out = agent.recurrent(root.embedding, action)
    again = agent.recurrent(out.embedding, action)
    support = np.linspace(SMALL.low, SMALL.high, SMALL.bins)
    assert np.array_equal(root.mask, seen.mask)
    for row in range(2):
        latent, keys = represent(p, seen.state[row]), keys_of(p, seen.actions[row])
        logits, value, _ = predict(p, latent, keys)
        assert np.allclose(root.prior_logits[row], logits, atol=1e-5)
        assert root.value[row] == pytest.approx(softmax(value) @ support, abs=1e-5)
        for found in (out, again):
            latent, outcome = dynamics(p, latent, keys, action[row])
            logits, value, legal = predict(p, latent, keys)
            assert np.allclose(found.prior_logits[row], logits, atol=1e-5)
            assert found.value[row] == pytest.approx(softmax(value) @ support, abs=1e-5)
            assert found.reward[row] == pytest.approx(outcome[0], abs=1e-5)
            assert found.discount[row] == (0.9 if outcome[1] < 0 else 0.0)
            assert np.array_equal(found.mask[row], legal > 0 if (legal > 0).any() else legal == legal.max())


def test_where_nothing_seems_legal_the_likeliest_action_is(agent_of, make):
    agent = agent_of(16)
    arrays = agent.policy.unflatten(theta(agent)) | {"legal.bias": np.array([-20, -9, -20, -20])}
    agent.policy.theta = Tensor(agent.policy.flatten(arrays)).realize()
    out = agent.recurrent(agent.initial(make.env().reset(16)).embedding, np.array([0, 3]))
    assert out.mask.tolist() == [[False, True, False, False]] * 2


def test_it_acts_by_a_search_of_that_model_and_never_illegally(agent_of, make):
    agent, env = agent_of(6), make.env()
    lively(agent, 6)
    seen, hidden, reset = env.reset(6), agent.initial_hidden(2), np.zeros(2, np.float32)
    found = search(agent.initial(seen), agent.recurrent, 4, spread=1.0)
    choice = agent.act(seen, hidden, reset, temperature=0)
    assert np.array_equal(choice.action, found.action) and np.allclose(choice.value, found.value)
    assert np.allclose(np.exp(choice.log_prob), found.policy_target[[0, 1], found.action], atol=1e-6)
    assert [x.dtype for x in choice] == [np.int32, np.float32, np.float32, np.float32]
    for _ in range(30):
        assert seen.mask[[0, 1], agent.act(seen, hidden, reset).action].all()
        seen = env.step(np.array([2, 2])).observation
    log_probs, value, _ = agent.evaluate(seen, hidden, reset)
    assert np.allclose(np.exp(log_probs).sum(1), 1, atol=1e-5) and (log_probs[~seen.mask] < -1e8).all()
    assert np.allclose(agent.value(seen, hidden, reset), value)
    agent.config = replace(agent.config, simulations=0)
    assert np.array_equal(agent.act(seen, hidden, reset, 0).action, log_probs.argmax(1))


def test_it_explores_while_it_learns_and_never_when_greedy(agent_of, make):
    """explore 1 -> 0.2 over 4 updates. At 1 and without simulations it acts uniformly, whatever it has learned."""
    agent = agent_of(15, explore=1.0, explore_end=0.2, anneal_updates=4, simulations=0)
    lively(agent, 15)
    seen, hidden, reset = make.env().reset(15), agent.initial_hidden(2), np.zeros(2, np.float32)
    prior = np.exp(agent.evaluate(seen, hidden, reset)[0])
    uniform, share = seen.mask / seen.mask.sum(1, keepdims=True), np.zeros((2, 4))
    mixed = np.exp(agent.plan(seen, 1.0, 0.3).tree.log_prior[:, 0])
    assert np.allclose(mixed, 0.7 * prior + 0.3 * uniform, atol=1e-5) and np.abs(prior - uniform).max() > 0.2
    cached = agent.initial(seen)
    agent.initial = lambda observation: cached  # what follows is numpy
    for _ in range(2000):
        share[[0, 1], agent.act(seen, hidden, reset).action] += 1 / 2000
    assert np.abs(share - uniform).max() < 0.05
    assert np.array_equal(agent.act(seen, hidden, reset, 0).action, prior.argmax(1))
    agent.updates = 4
    choice = agent.act(seen, hidden, reset)
    expected = (0.8 * prior + 0.2 * uniform)[[0, 1], choice.action]
    assert np.allclose(np.exp(choice.log_prob), expected, atol=1e-5)


# *** an update ***


def test_targets_come_from_a_fresh_search_by_the_present_network(agent_of, make):
    agent = agent_of(7)
    agent.update(rollout_of(make, agent, 7))
    lively(agent, 7)
    sample, twin = agent._sample(), copy.deepcopy(agent.rng)
    found, metrics = agent.reanalyse(sample)
    flat = Observation(*(sample[name].reshape(12, *sample[name].shape[2:]) for name in ("state", "mask", "actions")))
    expected = search(agent.initial(flat), agent.recurrent, 4, twin.gumbel(size=(12, 4)), spread=1.0)
    assert np.allclose(found["policy"].reshape(12, 4), expected.policy_target, atol=1e-6)
    rewards = (sample[name] for name in ("reward", "terminated", "ended"))
    assert np.allclose(found["value"], value_targets(*rewards, expected.value.reshape(4, 3), 0.9, 1.0))
    assert (found["policy"][~sample["mask"]] == 0).all() and metrics["target_kl"] > 0


def test_every_parameter_moves_and_stands_in_the_optimizer_once(agent_of, make):
    agent = agent_of(8)
    before = agent.policy.unflatten(theta(agent))
    metrics = [agent.update(rollout_of(make, agent, seed)) for seed in range(2)]
    for name, array in agent.policy.unflatten(theta(agent)).items():
        assert (array != before[name]).any(), f"{name} was not trained"
    used = np.zeros(len(theta(agent)), int)
    for start, end in agent.policy.slots.values():
        used[start:end] += 1
    assert used.max() == 1 and not theta(agent)[used == 0].any() and agent.trained.steps == 4
    assert metrics[1]["replay"] == 4
    assert {*METRICS, "gradient_norm", "gain", "target_kl"} <= metrics[0].keys()


def test_jit_on_equals_jit_off(agent_of, make):
    def run(jit):
        agent = agent_of(9)
        with Context(JIT=jit):
            rollout = rollout_of(make, agent, 9)
            return rollout, agent.update(rollout), theta(agent)

    (on, metrics_on, theta_on), (off, metrics_off, theta_off) = run(1), run(0)
    assert np.array_equal(on.action, off.action) and np.abs(on.value - off.value).max() < 1e-5
    assert np.abs(theta_on - theta_off).max() < 1e-5
    assert all(metrics_on[k] == pytest.approx(metrics_off[k], abs=1e-4) for k in metrics_on)


def test_two_agents_on_one_capture_do_not_touch_each_other_and_one_seed_gives_one_run(agent_of, make):
    def run(seeds):
        agents = [agent_of(seed) for seed in seeds]
        sources = [Rollouts(make.env(), agent, seed) for agent, seed in zip(agents, seeds, strict=True)]
        for _ in range(2):
            rollouts = [source.collect(4)[0] for source in sources]
            for agent, rollout in zip(agents, rollouts, strict=True):
                agent.update(rollout)
        return [theta(agent) for agent in agents]

    together, alone = run([4, 5]), run([4]) + run([5])
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))
    assert not np.array_equal(together[0], together[1])


# *** resuming, and what is refused ***


def test_training_resumes_bit_exactly_through_a_file_with_the_replay(agent_of, make, tmp_path):
    def finish(agent):
        rollouts = Rollouts(make.env(), agent, 7)
        return [agent.update(rollouts.collect(4)[0]) for _ in range(2)], theta(agent), agent.replay.rows.copy()

    agent, resumed = agent_of(10), agent_of(80)
    for seed in range(3):
        agent.update(rollout_of(make, agent, seed))
    checkpoint.save(tmp_path / "agent", *agent.state())
    resumed.load_state(*checkpoint.load(tmp_path / "agent"))
    json.dumps(resumed.state()[1])
    expected, got = finish(agent), finish(resumed)
    assert expected[0] == got[0] and all(np.array_equal(a, b) for a, b in zip(expected[1:], got[1:], strict=True))
    forgetful = agent_of(11, save_replay=False)
    forgetful.update(rollout_of(make, forgetful))
    tensors, meta = forgetful.state()
    assert "replay" not in tensors
    resumed.load_state(tensors, meta)
    assert len(resumed.replay) == 0 and np.array_equal(theta(resumed), theta(forgetful))


def test_another_shape_is_refused_and_changes_nothing(agent_of, make):
    agent, fresh = agent_of(12), agent_of(13)
    agent.update(rollout_of(make, agent))
    tensors, meta = agent.state()
    before = theta(fresh)
    for damage, complaint in (
        ({"replay": tensors["replay"][:-9]}, "replay has"),
        ({"parameter/value.bias": np.zeros(2, np.float32)}, r"parameter/value\.bias"),
        ({"adam_m/policy.query": np.zeros(2, np.float32)}, r"adam_m/policy\.query"),
    ):
        with pytest.raises(CheckpointError, match=complaint):
            fresh.load_state(tensors | damage, meta)
    wider = agent_of(14, hidden=16)
    with pytest.raises(CheckpointError, match="has shape"):
        wider.load_state(tensors, meta)
    assert np.array_equal(theta(fresh), before) and len(fresh.replay) == fresh.updates == 0
    with pytest.raises(ValueError, match="configuration"):
        fresh.update(replace(rollout_of(make, fresh), action=np.zeros((3, 2), np.int32)))


@pytest.mark.parametrize("key, value", [
    ("simulations", -1), ("considered", 0), ("spread", 0.0), ("unroll", 0), ("bins", 1), ("replay", 0), ("batch", 0),
    ("gradient_steps", 0), ("low", 9.0), ("lam", 1.5), ("explore", 2.0), ("explore_end", -0.1), ("backup", "median"),
    ("memory", True),
])  # fmt: skip
def test_a_bad_setting_is_named(key, value):
    with pytest.raises(ValueError, match=key):
        replace(SMALL, **{key: value})
