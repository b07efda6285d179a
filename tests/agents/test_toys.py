import numpy as np
import pytest

from agents.toys import CartPole, DelayedMemory, EndlessReward, FixedSequence, Identity, MaskedIdentity


def test_cartpole_literal_of_gymnasium():
    env = CartPole(1)
    env.reset(123)
    assert np.allclose(
        env.step(np.array([1])).observation.state[0], [0.01734283, 0.15089367, -0.02859527, -0.33293587], atol=1e-7
    )


def test_cartpole_falls_and_is_cut():
    env = CartPole(3, velocities=False)
    assert env.reset(0).state.shape == (3, 2)
    for steps in range(1, 20):  # noqa: B007
        if (step := env.step(np.ones(3, int))).terminated.any():
            break
    assert 7 < steps < 12, steps
    assert not step.truncated.any()  # one push in one direction tips it over in about 10 steps
    assert np.abs(step.observation.state[step.terminated]).max() < 0.05  # the next episode has begun already
    env = CartPole(1, limit=4)
    env.reset(0)
    *_, last = [env.step(np.array([i % 2])) for i in range(4)]
    assert last.truncated[0] and not last.terminated[0] and last.final is not None
    assert not np.array_equal(last.final.state, last.observation.state)


def test_masked_identity_leaves_15_legal_actions_and_refuses_the_others():
    env = MaskedIdentity(8)
    seen = env.reset(0)
    assert (seen.mask.sum(1) == 15).all()
    assert seen.mask[np.arange(8), seen.state.argmax(1)].all()
    later = env.step(seen.state.argmax(1))
    assert (later.reward == 1).all() and (later.observation.mask != seen.mask).any()
    with pytest.raises(ValueError, match="illegal"):
        env.step((~later.observation.mask).argmax(1))


def test_fixed_sequence_gives_1_for_the_whole_and_a_fifth_for_one_number():
    env = FixedSequence(1)
    env.reset(0)
    assert sum(env.step(np.array([a])).reward[0] for a in env.secret) == pytest.approx(1)
    assert sum(env.step(np.array([env.secret[0]])).reward[0] for _ in range(5)) == pytest.approx(0.2)


@pytest.mark.parametrize("previous", [False, True])
def test_delayed_memory_shows_its_cue_once(previous):
    env = DelayedMemory(1, delay=2, previous=previous)
    cue, total = int(env.reset(3).state[0].argmax()), 0.0
    before = cue
    for _ in range(10):
        assert env.step(np.array([0])).observation.state[0].tolist() == [0, 0, 0]
        assert env.step(np.array([0])).observation.state[0].tolist() == [0, 0, 1]
        step = env.step(np.array([cue]))
        assert step.terminated[0] and (previous or step.reward[0] == 1)
        if previous:
            total += step.reward[0] == (cue == before)
        before, cue = cue, int(step.observation.state[0].argmax())
    assert not previous or total >= 9  # the first episode has no predecessor


@pytest.mark.parametrize(
    "env", [CartPole(2), Identity(2), MaskedIdentity(2), FixedSequence(2), DelayedMemory(2), EndlessReward(2)]
)
def test_contract(env):
    """Shapes, dtypes, one seed gives one run, and every episode ends."""

    def run():
        rng, seen = np.random.default_rng(0), env.reset(5)
        trace, ends = [seen.state], 0
        for _ in range(120):
            legal = [int(rng.choice(np.flatnonzero(row))) for row in seen.mask]
            seen, reward, terminated, truncated, final = env.step(np.array(legal))
            assert seen.state.shape == (2, env.state_dim) and seen.state.dtype == np.float32
            assert seen.mask.shape == (2, env.n_actions) and seen.mask.dtype == np.bool_
            assert reward.dtype == np.float32 and not (terminated & truncated).any()
            assert not truncated.any() or final is not None
            ends += int((terminated | truncated).sum())
            trace.append(seen.state)
        assert ends >= 2
        return np.array(trace)

    assert np.array_equal(run(), run())


def test_a_seed_is_a_run_whatever_was_played_before():
    """Though the answer is the cue of the episode before."""

    def rewards(env: DelayedMemory) -> list:
        env.reset(5)
        return [env.step(np.ones(8, int)).reward.tolist() for _ in range(12)]

    used = DelayedMemory(8, delay=2, previous=True)
    fresh = rewards(DelayedMemory(8, delay=2, previous=True))
    used.cue[:] = 1
    assert rewards(used) == fresh and sum(map(sum, fresh)) > 0
