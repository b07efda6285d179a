import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from dqn_numpy import reference_loss, reference_q
from tinygrad import Tensor

from agents import checkpoint
from agents.checkpoint import CheckpointError
from agents.dqn import DQN, METRICS, Batch, DQNConfig, closed, dqn_loss, duelling, layout, q_values
from agents.networks import ILLEGAL
from agents.replay import Replay
from agents.returns import known_steps
from agents.rollout import Rollouts

# T = 3, B = 2, two rollouts kept, so that the third one overwrites the first
SMALL = DQNConfig(steps=3, n_envs=2, hidden=8, gamma=0.9, lr=1e-2, lr_end=1e-2, max_grad_norm=10.0, replay=2, batch=2,
                  gradient_steps=2, target_every=2, epsilon=0.5, epsilon_end=0.1, anneal_updates=8,
                  epsilon_share=0.5)  # fmt: skip


@pytest.fixture(scope="module")
def agent_of(cache_dir):
    """agent_of(seed, **settings) -> a small DQN for Noise; those of one gamma share one capture."""
    return lambda seed=0, **settings: DQN(3, 4, 2, replace(SMALL, **settings), seed, cache_dir)


def rollout_of(make, agent, seed=0):
    return Rollouts(make.env(), agent, seed).collect(3)[0]


def theta(agent):
    return agent.policy.theta.numpy().copy()


def numbers(seed=0, T=5, B=3, A=4):
    """Heads of two networks, and a batch in which all kinds of steps occur."""
    rng = np.random.default_rng(seed)
    mask = rng.random((T, B, A)) < 0.6
    mask[..., 2] = True
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    ended = rng.random((T, B)) < 0.4
    action = np.array([[rng.choice(np.flatnonzero(row)) for row in rows] for rows in mask], np.int32)
    heads = {"scores": draw(T, B, A), "value": draw(T, B), "target_scores": draw(T, B, A), "target_value": draw(T, B)}
    terminated = ended & (rng.random((T, B)) < 0.5)
    return heads, {"mask": mask, "action": action, "reward": 2 * draw(T, B), "terminated": terminated, "ended": ended}


def loss_of(heads, steps, gamma):
    """Through the code under test: loss, metrics by name, and the gradient by each head."""
    tensors = {name: Tensor(x).realize() for name, x in heads.items()}
    mask = Tensor(steps["mask"])
    online = duelling(tensors["scores"], tensors["value"], mask)
    target = duelling(tensors["target_scores"], tensors["target_value"], mask)
    zeros = Tensor.zeros(1)
    batch = Batch(
        hidden=zeros, state=zeros, mask=mask, reset=zeros,
        action=Tensor(steps["action"]), reward=Tensor(steps["reward"]),
        terminated=Tensor(steps["terminated"].astype(np.float32)),
        weight=Tensor(known_steps(steps["terminated"], steps["ended"])),
    )  # fmt: skip
    loss, metrics = dqn_loss(online, target, batch, gamma)
    # all four are asked for, so that a gradient that leaks into the target network is seen
    gradients = (loss + 0 * sum(x.sum() for x in tensors.values())).gradient(*tensors.values())
    Tensor.realize(loss, *metrics, *gradients)
    named = dict(zip(METRICS, (m.item() for m in metrics), strict=True))
    return loss.item(), named, dict(zip(tensors, (g.numpy() for g in gradients), strict=True))


def expected_loss(heads, steps, gamma, double=True):
    heads = {name: x.astype(np.float64) for name, x in heads.items()}
    q = reference_q(heads["scores"], heads["value"], steps["mask"])
    target_q = reference_q(heads["target_scores"], heads["target_value"], steps["mask"])
    return (*reference_loss(q, target_q, **steps, gamma=gamma, double=double), q)


# *** the loss ***


def test_duelling_by_hand():
    """V = 5, scores 1, 3 and an illegal 100: mean 2 over the legal ones, so Q = 4, 6; one legal action is worth V."""
    scores, value = np.array([[1, 100, 3], [7, 8, 9]], np.float32), np.array([5, 5], np.float32)
    mask = np.array([[True, False, True], [False, True, False]])
    expected = [[4, ILLEGAL, 6], [ILLEGAL, 5, ILLEGAL]]
    assert duelling(Tensor(scores), Tensor(value), Tensor(mask)).numpy().tolist() == expected
    assert q_values(scores, value, mask).tolist() == expected
    shifted = q_values(scores + 10, value, mask)  # a log-softmax's constant changes nothing
    assert np.allclose(shifted, expected)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_equals_a_second_implementation(seed, gamma):
    heads, steps = numbers(seed)
    assert steps["terminated"].any() and (steps["ended"] & ~steps["terminated"]).any() and not steps["mask"].all()
    loss, metrics, _ = loss_of(heads, steps, gamma)
    expected, errors, q = expected_loss(heads, steps, gamma)
    known = ~np.isnan(errors)
    assert (np.abs(errors[known]) > 1).any() and (np.abs(errors[known]) < 1).any(), "both sides of Huber's loss"
    chosen = np.take_along_axis(q, steps["action"][..., None], 2)[..., 0]
    assert loss == pytest.approx(expected, abs=1e-5) and metrics["td_loss"] == loss
    assert metrics["td_error"] == pytest.approx(np.abs(errors[known]).mean(), abs=1e-5)
    assert metrics["q"] == pytest.approx(chosen[known].mean(), abs=1e-5)
    assert metrics["weight"] == pytest.approx(known.mean())
    assert (known_steps(steps["terminated"], steps["ended"]) == known).all()
    single, _, _ = expected_loss(heads, steps, gamma, double=False)
    assert gamma == 0 or abs(single - loss) > 1e-3, "it must matter who chooses the action: double Q-learning"


def test_gradients_equal_finite_differences_and_those_of_illegal_scores_and_of_the_target_are_0():
    heads, steps = numbers(2)
    _, _, gradients = loss_of(heads, steps, 0.9)
    assert (gradients["scores"][~steps["mask"]] == 0).all() and gradients["scores"].any() and gradients["value"].any()
    assert not gradients["target_scores"].any() and not gradients["target_value"].any()
    # the target y is held fast by moving only Q(s, a): errors + (the change of Q(s, a))
    _, errors, q = expected_loss(heads, steps, 0.9)
    known, step = ~np.isnan(errors), 1e-5

    def loss(changed):
        moved = (
            reference_q(changed["scores"].astype(np.float64), changed["value"].astype(np.float64), steps["mask"]) - q
        )
        d = (errors - np.take_along_axis(moved, steps["action"][..., None], 2)[..., 0])[known]
        return np.where(np.abs(d) <= 1, d * d / 2, np.abs(d) - 0.5).mean()

    for name in ("scores", "value"):
        for where in np.ndindex(heads[name].shape):
            shift = np.zeros(heads[name].shape)
            shift[where] = step
            slope = (loss(heads | {name: heads[name] + shift}) - loss(heads | {name: heads[name] - shift})) / (2 * step)
            assert gradients[name][where] == pytest.approx(slope, abs=1e-5), (name, where)


def test_what_the_loss_does_not_depend_on():
    heads, steps = numbers(3)
    loss = loss_of(heads, steps, 0.9)[0]
    order = np.array([2, 0, 3, 1])  # actions by other numbers
    moved = {name: x[..., order] if "scores" in name else x for name, x in heads.items()}
    renamed = steps | {"mask": steps["mask"][..., order], "action": order.argsort()[steps["action"]].astype(np.int32)}
    assert loss_of(moved, renamed, 0.9)[0] == pytest.approx(loss, abs=1e-6)
    unknown = known_steps(steps["terminated"], steps["ended"]) == 0
    assert unknown[-1].any()
    assert loss_of(heads, steps | {"reward": np.where(unknown, 1e3, steps["reward"])}, 0.9)[0] == loss
    over = steps | {"terminated": np.ones_like(unknown), "ended": np.ones_like(unknown)}
    assert loss_of(heads, over, 0.9)[0] == loss_of(heads, over, 0.1)[0]  # nothing follows: nothing to discount
    cut = steps | {"terminated": np.zeros_like(unknown), "ended": np.ones_like(unknown)}
    assert loss_of(heads, cut, 0.9)[0] == 0  # nothing is known: no step, and no division by 0


def test_weights_by_hand():
    terminated = np.array([[0, 0, 1], [0, 0, 0], [0, 1, 0]], bool)
    ended = np.array([[0, 1, 1], [0, 0, 0], [0, 1, 1]], bool)
    assert known_steps(terminated, ended).tolist() == [[1, 0, 1], [1, 1, 1], [0, 1, 0]]


# *** an update ***


def test_an_update_is_that_loss_on_whole_sequences_from_their_stored_memory(agent_of, make, reference):
    """The network in numpy too, with action features; its parameters and the target's differ."""
    agent, other = agent_of(1, gradient_steps=1), agent_of(2)
    rollouts = Rollouts(make.env(), agent, 1)
    rollouts.collect(3)
    rollout, _ = rollouts.collect(3)
    assert rollout.hidden.any() and rollout.terminated.any() and (rollout.ended & ~rollout.terminated).any()
    agent.target = Tensor(theta(other)).realize()
    p, target_p = (agent.policy.unflatten(x.astype(np.float64)) for x in (theta(agent), theta(other)))
    rows = copy.deepcopy(agent.rng).integers(2, size=2)
    r = {name: x[:, rows] for name, x in vars(rollout).items() if name not in ("hidden", "last_value")}
    inputs = r["state"], r["mask"], r["actions"], rollout.hidden[rows], r["reset"]
    qs = [reference_q(*reference.forward(x, *inputs)[:2], r["mask"]) for x in (p, target_p)]
    # where an episode was cut, what was to come is what the agent said of it
    steps = {"mask": r["mask"], "action": r["action"], "ended": r["ended"], "terminated": r["ended"],
             "reward": r["reward"] + 0.9 * r["bootstrap"]}  # fmt: skip
    expected, errors = reference_loss(*qs, **steps, gamma=0.9)
    metrics = agent.update(rollout)
    assert metrics["td_loss"] == pytest.approx(expected, abs=1e-5)
    assert metrics["td_error"] == pytest.approx(np.nanmean(np.abs(errors)), abs=1e-5)
    assert metrics["replay"] == 2 and metrics["epsilon"] == 0.5


def test_a_step_that_is_cut_pays_what_was_to_come(agent_of, make):
    """By hand: 2 a step, and in row 1 cut where V is 3. gamma 0.5: 2 + 0.5 * 3. Row 0 terminates, the last step goes on."""
    agent = agent_of(11)
    r = rollout_of(make, agent, 11)
    assert r.ended.tolist() == [[False] * 2, [True] * 2, [False] * 2] and r.terminated[1].tolist() == [True, False]
    bootstrap = np.zeros((3, 2), np.float32)
    bootstrap[1] = 7, 3  # an environment may call the step at which all is over cut, too
    r = replace(r, reward=np.full((3, 2), 2, np.float32), bootstrap=bootstrap)
    found = closed(r, 0.5)
    assert found.reward.tolist() == [[2, 2], [2, 3.5], [2, 2]] and found.reward.dtype == np.float32
    assert known_steps(found.terminated, found.ended).tolist() == [[1, 1], [1, 1], [0, 0]] and found.terminated[1, 1]
    agent.update(r)
    expected = Replay(4, agent.replay.shapes)
    expected.add(closed(r, 0.9))
    assert np.array_equal(agent.replay.rows[:2], expected.rows[:2])


def test_every_parameter_moves_and_the_target_follows_every_second_update(agent_of, make):
    agent = agent_of(3)
    start = theta(agent)
    before = agent.policy.unflatten(start)
    assert np.array_equal(agent.target.numpy(), start)
    rollouts = Rollouts(make.env(), agent, 3)
    agent.update(rollouts.collect(3)[0])
    assert np.array_equal(agent.target.numpy(), start) and agent.trained.steps == 2
    agent.update(rollouts.collect(3)[0])
    copied = theta(agent)
    assert np.array_equal(agent.target.numpy(), copied) and not np.array_equal(copied, start)
    agent.update(rollouts.collect(3)[0])
    assert np.array_equal(agent.target.numpy(), copied) and not np.array_equal(theta(agent), copied)
    for name, array in agent.policy.unflatten(theta(agent)).items():
        assert (array != before[name]).any(), f"{name} was not trained"


def test_two_agents_on_one_capture_do_not_touch_each_other_and_one_seed_gives_one_run(agent_of, make):
    def run(seeds):
        agents = [agent_of(seed) for seed in seeds]
        sources = [Rollouts(make.env(), agent, seed) for agent, seed in zip(agents, seeds, strict=True)]
        for _ in range(3):
            rollouts = [source.collect(3)[0] for source in sources]
            for agent, rollout in zip(agents, rollouts, strict=True):
                agent.update(rollout)
        return [x for agent in agents for x in (theta(agent), agent.target.numpy().copy())]

    together, alone = run([4, 5]), run([4]) + run([5])
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))
    assert not np.array_equal(together[0], together[2])


def test_the_replay_keeps_the_last_sequences_whole(agent_of, make):
    agent = agent_of(4)
    replay = Replay(4, layout(3, (3, 4, 2), 8))
    source = Rollouts(make.env(), agent, 4)
    rollouts = [source.collect(3)[0] for _ in range(3)]
    for rollout, kept in zip(rollouts, (2, 4, 4), strict=True):
        replay.add(rollout)
        assert len(replay) == kept and replay.added % 2 == 0
    sizes = np.cumsum([np.prod(shape) for shape in replay.shapes.values()])[:-1]
    drawn = replay.sample(np.random.default_rng(0), 200)
    seen = set()
    for row in drawn:
        fields = dict(zip(replay.shapes, np.split(row, sizes), strict=True))
        for n, b in ((1, 0), (1, 1), (2, 0), (2, 1)):  # the first rollout is forgotten
            if np.array_equal(fields["state"].reshape(3, 3), rollouts[n].state[:, b]):
                break
        else:
            raise AssertionError("a sequence that was never added, or should be forgotten")
        seen.add((n, b))
        r = rollouts[n]
        assert np.array_equal(fields["hidden"], r.hidden[b])
        assert np.array_equal(fields["weight"], known_steps(r.terminated, r.ended)[:, b])
        for name in ("mask", "reset", "action", "reward", "terminated", "actions"):
            assert np.array_equal(fields[name], getattr(r, name)[:, b].reshape(-1).astype(np.float32)), name
    assert len(seen) == 4


# *** acting ***


def test_epsilon_greedy_by_hand(agent_of):
    """epsilon 0.3: 0.1 for each of three legal actions and 0.7 more for the best; a single legal action is certain."""
    agent = agent_of(5, epsilon=0.3)
    log_probs = np.log(np.array([[0.2, 0.5, 0.3, 1e-30], [0.1, 1e-30, 1e-30, 1e-30]], np.float32))
    mask = np.array([[True, True, True, False], [True, False, False, False]])
    log_probs[~mask] = -1e9
    expected = np.array([[0.1, 0.8, 0.1, 0.0], [1.0, 0.0, 0.0, 0.0]])
    probability = np.exp(agent.behaviour(log_probs, mask).astype(np.float64))
    assert np.allclose(probability, expected, atol=1e-6) and (probability[~mask] == 0).all()
    for epsilon, best in ((0.0, 1.0), (1.0, 1 / 3)):
        probability = np.exp(agent_of(5, epsilon=epsilon).behaviour(log_probs, mask))
        assert probability[0, 1] == pytest.approx(best) and probability.sum(1) == pytest.approx([1, 1])


def test_epsilon_falls_over_its_share_of_the_annealing(agent_of):
    agent, found = agent_of(6), []
    for agent.updates in range(6):
        found.append(agent.epsilon)
    assert found == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    assert agent_of(6, anneal_updates=0).epsilon == 0.5


def test_it_acts_epsilon_greedily_on_q_and_values_the_best_legal_action(agent_of, make, reference):
    agent, env, rows = agent_of(7), make.env(), np.arange(2)
    seen, hidden, reset = env.reset(7), np.full((2, 16), 0.3, np.float32), np.zeros(2, np.float32)
    p = agent.policy.unflatten(theta(agent).astype(np.float64))
    once = [x[None] for x in seen]
    scores, value, _ = reference.forward(p, *once, hidden, reset[None])
    q = reference_q(scores, value, once[1])[0]
    greedy = agent.act(seen, hidden, reset, temperature=0)
    assert np.array_equal(greedy.action, np.nanargmax(q, 1))
    assert np.allclose(greedy.value, np.nanmax(q, 1), atol=1e-5)
    assert np.allclose(agent.value(seen, hidden, reset), greedy.value) and greedy.value.dtype == np.float32
    expected = 0.5 * seen.mask / seen.mask.sum(1, keepdims=True)
    expected[rows, np.nanargmax(q, 1)] += 0.5
    cached, counts = agent.evaluate(seen, hidden, reset), np.zeros((2, 4))
    agent.evaluate = lambda *_: cached  # what follows is numpy
    for _ in range(3000):
        choice = agent.act(seen, hidden, reset)
        counts[rows, choice.action] += 1
        assert np.allclose(np.exp(choice.log_prob), expected[rows, choice.action], atol=1e-6)
    assert np.abs(counts / 3000 - expected).max() < 0.04 and (counts[~seen.mask] == 0).all()


# *** resuming, and what is refused ***


def test_training_resumes_bit_exactly_through_a_file_with_the_replay(agent_of, make, tmp_path):
    def finish(agent):
        rollouts = Rollouts(make.env(), agent, 7)
        metrics = [agent.update(rollouts.collect(3)[0]) for _ in range(3)]
        return metrics, theta(agent), agent.target.numpy().copy(), agent.replay.rows.copy()

    def trained(**settings):
        agent = agent_of(8, **settings)
        for seed in range(3):  # theta and the target then differ, and the next sequence belongs in the replay's middle
            agent.update(rollout_of(make, agent, seed))
        return agent

    agent, resumed = trained(), agent_of(80)
    checkpoint.save(tmp_path / "agent", *agent.state())
    resumed.load_state(*checkpoint.load(tmp_path / "agent"))
    json.dumps(resumed.state()[1])
    expected, got = finish(agent), finish(resumed)
    assert expected[0] == got[0] and all(np.array_equal(a, b) for a, b in zip(expected[1:], got[1:], strict=True))
    forgetful = trained(save_replay=False)
    tensors, meta = forgetful.state()
    assert "replay" not in tensors
    resumed.load_state(tensors, meta)
    assert len(resumed.replay) == 0 and np.array_equal(theta(resumed), theta(forgetful))
    assert finish(resumed)[0] != finish(forgetful)[0], "the replay changed nothing: this test must miss it"


def test_a_damaged_checkpoint_is_refused_and_changes_nothing(agent_of, make):
    agent = agent_of(9)
    agent.update(rollout_of(make, agent, 9))
    tensors, meta = agent.state()
    fresh = agent_of(90)
    before = theta(fresh)
    noise = np.arange(50, dtype=np.uint8)
    for damage, complaint in (
        ({"replay": noise}, "replay is damaged"),
        ({"replay": tensors["replay"][:-9]}, "replay has"),
        ({"target/value.bias": np.zeros(2, np.float32)}, r"target/value\.bias"),
        ({"adam_m/value.bias": np.zeros(2, np.float32)}, r"adam_m/value\.bias"),
    ):
        with pytest.raises(CheckpointError, match=complaint):
            fresh.load_state(tensors | damage, meta)
    with pytest.raises(CheckpointError, match="replay has 0 bytes"):
        fresh.load_state({name: x for name, x in tensors.items() if name != "replay"}, meta)
    with pytest.raises(CheckpointError, match="replay has"):  # more rows than the meta data says: not unpacked at all
        fresh.load_state(tensors, meta | {"replay_added": 1})
    assert np.array_equal(theta(fresh), before) and len(fresh.replay) == fresh.updates == 0
    assert np.array_equal(fresh.target.numpy(), before)


@pytest.mark.parametrize("key, value", [
    ("steps", 1), ("replay", 0), ("batch", 0), ("gradient_steps", 0), ("target_every", 0), ("epsilon", 1.5),
    ("epsilon_end", -0.1), ("epsilon_share", 0.0),
])  # fmt: skip
def test_a_bad_setting_is_named(key, value):
    with pytest.raises(ValueError, match=key):
        replace(SMALL, **{key: value})


def test_a_rollout_of_another_shape_is_refused(agent_of, make):
    agent = agent_of(10)
    rollout = rollout_of(make, agent)
    with pytest.raises(ValueError, match="configuration"):
        agent.update(replace(rollout, action=rollout.action[:2]))


def test_where_it_starts_from_another_the_target_does_too(agent_of):
    known, fresh = agent_of(1), agent_of(2)
    fresh.start_from(known)
    assert np.array_equal(theta(fresh), theta(known)) and np.array_equal(fresh.target.numpy(), theta(known))
