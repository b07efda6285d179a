"""Intrinsic rewards: against numpy, what they fall for, and what they solve."""

import json
from dataclasses import replace

import numpy as np
import pytest

from agents import checkpoint
from agents.bonuses import RND, BonusConfig, Counts, Curious, Disagreement
from agents.exploration import ExplorationConfig, Explorer
from agents.learner import Diverged
from agents.ppo import PPO, PPOConfig
from agents.rollout import Rollout, Rollouts, evaluate
from agents.toys import Identity, NoisyTV, SparseChain
from agents.uniform import Uniform

SMALL = BonusConfig(hidden=8, outputs=4, members=3, epochs=1, lr=1e-2)
T, B, D, A = 8, 8, 4, 4  # of all rollouts here, so that each bonus is captured once
BANDIT = PPOConfig(steps=T, n_envs=B, hidden=32, memory=False, gamma=0.0, epochs=8, lr=1e-2, lr_end=1e-2, entropy=0.0,
                   entropy_end=0.0, clip=0.3, max_grad_norm=10.0)  # fmt: skip


def experience(seed, shift=0.0):
    """Random states around `shift`, each number of another size; episodes of 1 to 5 steps, some cut."""
    rng = np.random.default_rng(seed)
    f = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    ended = rng.random((T, B)) < 0.3
    state = (f(T, B, D) + np.float32(shift)) * np.array([1, 10, 0.1, 1], np.float32)
    return Rollout(state, np.ones((T, B, A), bool), None, rng.integers(0, A, (T, B)).astype(np.int32), f(T, B), f(T, B),
                   f(T, B), ended & (f(T, B) > 0), ended, f(T, B), f(T, B), f(B, 64), f(B))  # fmt: skip


@pytest.fixture(scope="session")
def new(cache_dir):
    """new(kind, seed) -> a small bonus that has seen one rollout, so that nothing is at its beginning."""

    def new(kind, seed=0, config=SMALL, learned=1):
        bonus = kind(D, A, config, seed, cache_dir)
        for i in range(learned):
            bonus.learn(experience(100 + i))
        return bonus

    return new


@pytest.fixture(scope="session")
def agent(cache_dir):
    """agent(seed) -> a PPO for one-step problems; all share one capture."""
    return lambda seed: PPO(D, A, 0, BANDIT, seed, cache_dir)


def explore(agent, way, seed, cache_dir, config=None, scale=0.1):
    """The agent with one way to explore: None, a bonus, or switches of an Explorer."""
    if way is None or isinstance(way, dict):
        return Explorer(agent, ExplorationConfig(**way or {}), seed)
    state_dim, n_actions, _ = agent.dims
    return Curious(agent, way(state_dim, n_actions, config, seed, cache_dir), scale)


# *** a second implementation, in float64 numpy ***


def mlp(net, vector, x):
    """[N, I] -> [M, N, O], one member after another."""
    p = net.unflatten(net.theta.numpy().astype(np.float64) if vector is None else vector)
    out = []
    for m in range(net.dims[0]):
        h = np.tanh(x @ p["layer1.weight"][m] + p["layer1.bias"][m])
        h = np.tanh(h @ p["layer2.weight"][m] + p["layer2.bias"][m])
        out.append(h @ p["layer3.weight"][m] + p["layer3.bias"][m])
    return np.array(out)


def normalised(state, seen):
    """By the statistics of the rollouts in `seen`, within 5 standard deviations."""
    rows = np.concatenate([r.state.reshape(-1, D) for r in seen]).astype(np.float64)
    return np.clip((state.reshape(-1, D) - rows.mean(0)) / rows.std(0), -5, 5)


def rnd_errors(bonus, rollout, seen, vector=None):
    """[T, B]: mean over outputs of the squared distance to the target network."""
    x = normalised(rollout.state, seen)
    return ((mlp(bonus.net, vector, x) - mlp(bonus.target, None, x)) ** 2)[0].mean(1).reshape(T, B)


def guesses(bonus, rollout, seen, vector=None):
    """[M, N, D]: next observations as the members see them."""
    x = np.concatenate([normalised(rollout.state, seen), np.eye(A)[rollout.action.reshape(-1)]], axis=1)
    return mlp(bonus.net, vector, x)


def variances(bonus, rollout, seen):
    """[T, B]: over members, averaged over numbers; 0 where what followed is not known."""
    variance = guesses(bonus, rollout, seen).var(0).mean(1).reshape(T, B)
    return np.array([[variance[t, b] * (t < T - 1 and not rollout.ended[t, b]) for b in range(B)] for t in range(T)])


def prediction_error(bonus, rollout, seen, vector=None):
    """Mean squared error of all members over the steps whose successor is known."""
    following, guess = normalised(rollout.state, seen).reshape(T, B, D), guesses(bonus, rollout, seen, vector)
    errors = [
        (guess.reshape(-1, T, B, D)[m, t, b] - following[t + 1, b]) ** 2
        for m in range(len(guess)) for t in range(T - 1) for b in range(B) if not rollout.ended[t, b]
    ]  # fmt: skip
    return np.mean(errors)


@pytest.mark.parametrize("kind, raw", [(RND, rnd_errors), (Disagreement, variances)])
def test_a_bonus_equals_numpy(new, kind, raw):
    """The second rollout's: raw, over the root mean square of all that was paid for in the first. To 1e-5."""
    first, second, bonus = experience(100), experience(1, shift=0.5), new(kind, learned=0)
    before = bonus.bonus(first).astype(np.float64)  # nothing was seen: neither normalised nor scaled
    paid = before[before > 0] if kind is Disagreement else before
    bonus.learn(first)
    second.state[:2] *= 20  # beyond what is clipped
    got, expected = bonus.bonus(second), raw(bonus, second, [first]) / np.sqrt((paid**2).mean())
    assert got.dtype == np.float32 and got.shape == (T, B) and (got >= 0).all() and got.max() > 0.1
    assert np.abs(got - expected).max() < 1e-5 * max(1, expected.max())
    assert np.array_equal(got, bonus.bonus(second)), "asking for a bonus must change nothing"


@pytest.mark.parametrize("kind, error", [(RND, rnd_errors), (Disagreement, prediction_error)])
def test_a_loss_equals_numpy_and_its_first_step_is_adams(new, kind, error):
    """The metric to 1e-5; then each parameter moves by lr g / (|g| + eps), g by finite differences in numpy."""
    rollout, bonus = experience(2), new(kind, learned=0)
    vector = bonus.net.theta.numpy().astype(np.float64)
    loss = lambda x: float(np.mean(error(bonus, rollout, [rollout], x)))  # noqa: E731
    assert bonus.learn(rollout)[f"{bonus.name}_loss"] == pytest.approx(loss(vector), abs=1e-5)
    moved = bonus.net.theta.numpy() - vector
    for i in np.random.default_rng(0).choice(np.flatnonzero(vector), 40, replace=False):
        shift = np.eye(1, len(vector), i)[0] * 1e-4
        slope = (loss(vector + shift) - loss(vector - shift)) / 2e-4
        assert moved[i] == pytest.approx(-0.01 * slope / (abs(slope) + 1e-5), abs=1e-4) or abs(slope) < 1e-4


def test_counts_by_hand():
    """1 where nothing was seen; 1 / sqrt(1 + 3) after three visits, in whatever environment or step they were."""
    counts, rollout = Counts(D, A, SMALL), experience(3)
    assert (counts.bonus(rollout) == 1).all()
    state = rollout.state.copy()
    state[0, 0] = state[1, 1] = state[2, 0] = 7.0
    counts.learn(replace(rollout, state=state))
    later = counts.bonus(replace(rollout, state=np.where(np.arange(B)[:, None] < 4, state, state + 50)))
    assert later[0, 0] == later[1, 1] == later[2, 0] == 0.5 and later[3, 3] == np.float32(np.sqrt(0.5))
    assert (later[:, 4:] == 1).all() and counts.bonus(rollout).dtype == np.float32


@pytest.mark.parametrize("kind", [RND, Disagreement])
def test_a_bonus_falls_for_what_was_seen_and_not_for_what_was_not(new, kind):
    """After 200 updates on states around 0: under 0.3 of what it was there; around 3, four times as large a share."""
    bonus, here, there = new(kind), experience(4), experience(5, shift=3.0)
    before = [bonus.unscaled(rollout).mean() for rollout in (here, there)]
    for _ in range(200):
        bonus.learn(here)
    seen, unseen = (bonus.unscaled(rollout).mean() / b for rollout, b in zip((here, there), before, strict=True))
    print(f"{bonus.name}: {seen:.3f} of the bonus is left where it learned, {unseen:.2f} elsewhere")
    assert seen < 0.3 and unseen > 4 * seen


@pytest.mark.parametrize("kind", [RND, Disagreement, Counts])
def test_the_order_of_environments_does_not_matter(new, kind):
    bonus, rollout = new(kind), experience(6)
    order = np.random.default_rng(0).permutation(B)
    turned = replace(rollout, state=rollout.state[:, order], action=rollout.action[:, order],
                     ended=rollout.ended[:, order])  # fmt: skip
    assert np.allclose(bonus.bonus(turned), bonus.bonus(rollout)[:, order], atol=1e-6)


def test_disagreement_is_of_members_and_only_where_it_can_be_learned(new):
    """The order of members does not matter; equal members agree; ends and the last step are paid nothing, and what
    follows them teaches nothing."""
    bonus, rollout = new(Disagreement), experience(7)
    whole, arrays = bonus.bonus(rollout), bonus.net.unflatten(bonus.net.theta.numpy())
    assert (whole[rollout.ended] == 0).all() and (whole[-1] == 0).all() and (whole[:-1][~rollout.ended[:-1]] > 0).all()
    for order, expected in (([2, 0, 1], whole), ([1, 1, 1], 0 * whole)):
        bonus.net.theta.assign(type(bonus.net.theta)(bonus.net.flatten({k: a[order] for k, a in arrays.items()})))
        assert np.allclose(bonus.bonus(rollout), expected, atol=1e-5)
    a, b, state = new(Disagreement), new(Disagreement), rollout.state.copy()
    last = replace(rollout, ended=np.ones((T, B), bool))
    for bonus in (a, b):
        bonus.seen.array = new(Disagreement).seen.array
    state[1:] = state[1:, ::-1]
    losses = [x.learn(replace(last, state=s))["disagreement_loss"] for x, s in ((a, rollout.state), (b, state))]
    assert losses == [0, 0], "a pair across the end of an episode was learned"


@pytest.mark.parametrize("kind", [RND, Disagreement, Counts])
def test_a_bonus_resumes_bit_exactly_through_a_file_with_its_agent(new, agent, kind, tmp_path):
    def wrap(seed):
        return Curious(agent(seed), new(kind, seed, learned=0), 0.5)

    curious, other, next_one = wrap(1), wrap(2), experience(9)
    curious.bonus.learn(experience(8))
    checkpoint.save(tmp_path / "agent", *curious.state())
    other.load_state(*checkpoint.load(tmp_path / "agent"))
    json.dumps(other.state()[1])
    for bonus in (curious.bonus, other.bonus):
        bonus.results = [bonus.bonus(next_one), bonus.learn(next_one), bonus.bonus(next_one)]
    assert all(np.array_equal(x, y) for x, y in zip(curious.bonus.results, other.bonus.results, strict=True))
    tensors, meta = curious.state()
    name = next(name for name in tensors if name.startswith(f"{curious.bonus.name}/"))
    before = other.policy.theta.numpy().copy()
    with pytest.raises(checkpoint.CheckpointError, match=f"{name} has shape"):
        other.load_state(tensors | {name: np.zeros((9, 9, 9))} | {"parameter/value.bias": np.ones(1)}, meta)
    assert np.array_equal(other.policy.theta.numpy(), before)


def test_curious_is_the_agent_on_the_sum_of_rewards(agent):
    """Scale 0 is the agent itself, bit for bit; another scale the agent on rewards that were added by hand."""
    rollout, bonus = experience(11), Counts(D, A, SMALL)
    bonus.learn(rollout)
    extra = bonus.bonus(rollout)
    for scale in (0.0, 0.7):
        plain, curious = agent(11), Curious(agent(11), Counts(D, A, SMALL), scale)
        curious.bonus.learn(rollout)
        metrics = plain.update(replace(rollout, reward=rollout.reward + np.float32(scale) * extra))
        assert curious.update(rollout) == metrics | {"bonus": float(extra.mean())}
        assert np.array_equal(plain.policy.theta.numpy(), curious.policy.theta.numpy())
    assert curious.bonus.bonus(rollout).mean() < extra.mean() and curious.name == plain.name


def test_nan_and_wrong_numbers_are_refused(new):
    with pytest.raises(Diverged, match="rnd_loss"):
        new(RND).learn(replace(experience(1), state=experience(1).state * np.nan))
    with pytest.raises(ValueError, match="^members "):
        BonusConfig(members=1)
    unused = {"steps": 4, "n_envs": 4, "memory": False, "gamma": 0.9, "lr_end": 1e-4, "anneal_updates": 10}
    for key, value in unused.items():
        with pytest.raises(ValueError, match=f"^{key} is used by no bonus, so it cannot be {value}$"):
            BonusConfig(**{key: value})


# *** what they are for, and what they fall for ***


class Surprise(Disagreement):
    """The control: pays for the error of the prediction itself (Pathak et al. 2017, without learned features)."""

    name = "surprise"

    def inputs(self, rollout):
        return super().inputs(rollout) + super().targets(rollout)[:1]

    def targets(self, rollout):
        return super().targets(rollout)[1:]

    def raw(self, theta, *batch):
        x, following = batch
        return (self.net(theta, x) - following.unsqueeze(0)).square().mean((0, 2)).contiguous()


class Unpaid(Identity):
    def advance(self, actions):
        reward, terminated = super().advance(actions)
        return 0 * reward, terminated


def test_what_is_left_of_the_bonus_of_fresh_noise(new):
    """60 rollouts of random play before a TV. Of what they first paid there, counts and prediction errors keep over
    half: they fall for it. RND, which learns the region that noise comes from, and disagreement, whose members agree
    on its mean, keep under a fifth. Elsewhere counts keep under a tenth: it is the noise that holds them."""
    left = {}
    for kind in (Counts, Surprise, RND, Disagreement):
        bonus, source = new(kind, learned=0), Rollouts(NoisyTV(B, n=2, walks=2, channels=2), Uniform(D, 3), 0)
        paid = []
        for _ in range(60):
            r, _ = source.collect(T)
            pay = bonus.bonus(r) if kind is Counts else bonus.unscaled(r)
            tv = r.action == 2 if isinstance(bonus, Disagreement) else r.state[..., 2:].any(-1)  # of a step, or a state
            paid.append([pay[tv & (pay > 0)].mean(), pay[~tv & (pay > 0)].mean()])
            bonus.learn(r)
        left[kind], elsewhere = np.mean(paid[-10:], axis=0) / np.mean(paid[:3], axis=0)
        print(f"{bonus.name}: {left[kind]:.3f} of its first bonus is left at the TV, {elsewhere:.3f} elsewhere")
        assert kind is not Counts or elsewhere < 0.1
    assert min(left[Counts], left[Surprise]) > 0.5 and max(left[RND], left[Disagreement]) < 0.2


WAYS = {"none": None, "rnd": RND, "disagreement": Disagreement, "counts": Counts, "surprise": Surprise,
        "ucb": {"ucb": 1.0}, "action noise": {"noise": 0.3}}  # fmt: skip


@pytest.mark.learn
@pytest.mark.parametrize(
    "way", [RND, Disagreement, Counts, {"temperature": 1.5}, {"noise": 0.3}, {"sticky": 0.2}, {"ucb": 0.5}]
)
def test_a_stationary_problem_stays_solvable(agent, way, cache_dir):
    """Identity in 1200 steps, greedy: >= 18 of 20, whatever explores. The same without its rewards: under 12."""

    def score(world):
        explorer = explore(agent(0), way, 0, cache_dir, SMALL)
        rollouts = Rollouts(world, explorer, 0)
        for _ in range(1200 // (T * B)):
            explorer.update(rollouts.collect(T)[0])
        return np.mean([e.total for e in evaluate(Identity(B, limit=20), explorer, 8, seed=10_000)])

    solved, unpaid = score(Identity(B)), score(Unpaid(B))
    print(f"identity with {getattr(way, 'name', way)}: bar 18, {solved:.1f}, unpaid {unpaid:.1f}")
    assert solved >= 18 and unpaid < 12


# advantages as they are: once all returns are equal, normalised ones would be noise of size 1 and wreck the policy
SPARSE = PPOConfig(steps=10, n_envs=64, hidden=32, memory=False, gamma=0.99, lr=3e-3, lr_end=3e-3, normalise_advantages=False)  # fmt: skip
UPDATES = 60


def seek(env, way, config, seed, cache_dir, scale=0.1):
    """(mean return sampled from what was learned, share of the last 12 updates' steps spent before a TV)."""
    agent = PPO(env.state_dim, env.n_actions, 0, config, seed, cache_dir)
    agent = explore(agent, way, seed, cache_dir, scale=scale)
    rollouts = Rollouts(env, agent, seed)
    for update in range(UPDATES):
        if update == UPDATES - 12:
            env.watched = env.played = 0
        agent.update(rollouts.collect(config.steps)[0])
    share = getattr(env, "tv_share", 0.0)
    return float(np.mean([e.total for e in evaluate(env, agent, 128, seed=10_000, temperature=1.0)])), share


@pytest.mark.learn
def test_rnd_solves_a_sparse_chain_that_plain_ppo_does_not(cache_dir):
    """38,400 steps, 3 seeds, sampled: RND >= 0.9 of the optimum 1 in each; plain PPO takes the distractor, <= 0.2.
    So does one that is paid for counts, which nothing scales, at a tenth; paid in full it gets there too."""
    for seed in range(3):
        found, plain = (seek(SparseChain(64), way, SPARSE, seed, cache_dir)[0] for way in (RND, None))
        print(f"sparse chain seed {seed}: bar 0.9, rnd {found:.2f}, plain ppo {plain:.2f}")
        assert found >= 0.9 and plain <= 0.21
    counted, little = (seek(SparseChain(64), Counts, SPARSE, 0, cache_dir, scale)[0] for scale in (1.0, 0.1))
    print(f"sparse chain: bar 0.9, counts at scale 1 {counted:.2f}, at 0.1 {little:.2f}")
    assert counted >= 0.9 and little <= 0.21


@pytest.mark.learn
def test_who_falls_for_a_noisy_tv(cache_dir):
    """61,440 steps. Counts and prediction errors fall for it: over 0.6 of the time is spent there, and the task stays
    undone (< 0.2). RND and disagreement do it (> 0.6 of 1), and watch less than the half of the time that it leaves
    free: they do not fall for it here, where what a screen can show is a small region that 60 updates make known. The
    others do not watch, but do not find the task either: at best they take the distractor, 0.2."""
    config, table = replace(SPARSE, steps=16), {}
    for name, way in WAYS.items():
        env = NoisyTV(64)
        table[name] = seek(env, way, config, 0, cache_dir)
        print(f"noisy tv, {name}: return {table[name][0]:.2f}, at the tv {table[name][1]:.2f}, random play 0.20")
    for name, (total, share) in table.items():
        if name in ("counts", "surprise"):
            assert share > 0.6 and total < 0.2, name
        elif name in ("rnd", "disagreement"):
            assert share < 0.5 and total > 0.6, name
        else:
            assert share < 0.3 and total < 0.25, name
