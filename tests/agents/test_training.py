"""The loop: when it stops, what it saves, that a resumed run is the same run, and that a spoilt head is mended."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from agents import checkpoint
from agents.bonuses import BonusConfig, Counts, Curious
from agents.exploration import ExplorationConfig, Explorer
from agents.learner import Diverged
from agents.normalise import NormaliseConfig, Normalised
from agents.ppo import PPO, PPOConfig
from agents.rollout import Action, Rollouts, evaluate
from agents.toys import Identity
from agents.training import Health, TrainingConfig, converged, no_rise, train, train_offline

QUICK = PPOConfig(steps=4, n_envs=64, hidden=16, memory=False, gamma=0.0, lr=5e-2, lr_end=5e-2, entropy=0.0,
                  entropy_end=0.0, clip=0.3, max_grad_norm=10.0)  # fmt: skip
UPDATE = 256  # environment steps


@pytest.fixture
def make(cache_dir):
    def make(seed=0, normalised=False):
        agent = PPO(4, 4, 0, QUICK, seed, cache_dir)
        return Normalised(agent, NormaliseConfig(reward="scale")) if normalised else agent

    return make


def world(limit=4):
    """Identity with 4 steps: 4 at best, 1 by chance."""
    return Identity(64, limit=limit)


def score(agent):
    return float(np.mean([e.total for e in evaluate(world(), agent, 64, seed=99)]))


# *** convergence ***


def first_stop(returns, window, patience, alpha=0.1):
    """Windows after which a run with these returns would have stopped, or infinity."""
    full = range(1, len(returns) // window + 1)
    return next((n for n in full if converged(returns[: n * window], window, patience, alpha)), math.inf)


def test_flat_returns_stop_and_rising_ones_do_not():
    """20 windows of 100, defaults: flat noise (normal; wins and losses) stops in >= 0.95 of runs; a rise of 0.2
    standard deviations a window in <= 0.01, of 0.1 in <= 0.15. Control: two neighbouring windows alone."""
    rng, c, runs = np.random.default_rng(0), TrainingConfig(), 200
    time = np.arange(20 * c.window) / c.window
    wins = lambda: (rng.random(len(time)) < 0.3).astype(float)  # noqa: E731
    flat = np.mean([first_stop(rng.standard_normal(len(time)), c.window, c.patience) < 21 for _ in range(runs)])
    coin = np.mean([first_stop(wins(), c.window, c.patience) < 21 for _ in range(runs)])
    rising = {}
    for slope in (0.2, 0.1):
        draws = [rng.standard_normal(len(time)) + slope * time for _ in range(runs)]
        rising[slope] = np.mean([first_stop(x, c.window, c.patience) < 21 for x in draws])
        rising[slope, "pairs"] = np.mean([first_stop(x, c.window, 1) < 21 for x in draws])
    print(f"convergence of flat returns: bar >= 0.95, {flat:.3f}, wins and losses {coin:.3f}")
    for slope, bar in ((0.2, 0.01), (0.1, 0.15)):
        print(
            f"convergence of returns rising {slope}: bar <= {bar}, {rising[slope]:.3f}, control {rising[slope, 'pairs']:.3f}"
        )
    assert flat >= 0.95 and coin >= 0.95
    assert rising[0.2] <= 0.01 and rising[0.1] <= 0.15
    assert rising[0.2, "pairs"] > 0.5 and rising[0.1, "pairs"] > 0.9


def test_the_p_value_of_a_rise():
    """By hand: means 0 and 1, variances 4/3 and 4/3 of 4 samples each: t = 1 / sqrt(2/3) = 1.2247, p = 0.1103."""
    before, after = np.array([-1.0, -1, 1, 1]), np.array([0.0, 0, 2, 2])
    assert no_rise(before, after) == pytest.approx(0.11034, abs=1e-5)
    assert no_rise(after, before) == pytest.approx(1 - 0.11034, abs=1e-5)
    assert no_rise(5 + 3 * before, 5 + 3 * after) == pytest.approx(no_rise(before, after))
    assert no_rise(before, before) == 0.5
    same = np.ones(4)
    assert (no_rise(same, same), no_rise(same, same + 1), no_rise(same + 1, same)) == (1, 0, 1)


def test_only_whole_windows_count_and_one_rise_among_them_is_enough():
    rng = np.random.default_rng(1)
    level = lambda *means: np.concatenate([m + rng.standard_normal(30) * 0.01 for m in means])  # noqa: E731
    still = level(1, 1 - 1e-3, 1 - 2e-3, 1 - 3e-3)
    assert converged(still, 30, 3, 0.1) and not converged(still[:-1], 30, 3, 0.1) and not converged(still, 30, 4, 0.1)
    assert converged(np.concatenate([still, still[-1] + np.ones(29)]), 30, 3, 0.1), "an unfinished window was judged"
    assert not converged(level(1, 0.5, 0.6, 0.5), 30, 3, 0.1), "the rise in the middle"
    assert converged(level(0, 1, 0.9, 0.8, 0.7), 30, 3, 0.1), "a rise before the windows asked for"


def test_a_run_learns_saves_and_stops_by_itself(make, tmp_path):
    """>= 3.9 of 4, and stopped as converged before its 100 updates."""
    told, agent, env = {}, make(), world()
    config = TrainingConfig(max_steps=100 * UPDATE, checkpoint_every=3, window=100, patience=2)
    untrained = score(agent)
    result = train(agent, env, config, tmp_path, lambda name, value, n: told.setdefault(n, {}).update({name: value}))
    print(
        f"train on identity: >= 3.9 of 4, {score(agent):.1f} after {result.updates} updates, untrained {untrained:.1f}"
    )
    assert score(agent) >= 3.9 and untrained < 2.5
    assert result.stopped == "converged" and 5 <= result.updates < 100 and result.steps == result.updates * UPDATE
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.pop("update") for row in rows] == list(range(1, result.updates + 1)) and rows == list(told.values())
    assert set(rows[0]) >= {"return", "length", "episodes", "entropy", "kl", "gradient_norm", "explained_variance"}
    assert all(row["length"] == 4 and row["episodes"] == 64 and row["steps"] % UPDATE == 0 for row in rows)
    assert all(0 < row[f"seconds_{x}"] < 60 for row in rows for x in ("environment", "inference", "update"))
    two = lambda n: [row["return"] for row in rows[max(0, n - 2) : n]]  # noqa: E731
    ends = [*range(3, result.updates, 3), result.updates]  # where it was saved
    # all 64 episodes of an update, and 36 of those before it: the mean lies between theirs
    assert min(two(result.updates)) - 0.01 <= result.score <= max(two(result.updates)) + 0.01
    assert result.best == pytest.approx(max(np.mean(two(n)) for n in ends), abs=0.1) and result.best >= result.score
    best, last = make(1), make(1)
    best.load_state(*checkpoint.load(tmp_path / "best"))
    last.load_state(*checkpoint.load(tmp_path / "last"))
    assert np.array_equal(last.policy.theta.numpy(), agent.policy.theta.numpy())
    assert best.updates in ends and last.updates == result.updates
    again = train(last, env, config, tmp_path, resume=True)
    assert again == result, "a run that has converged goes on"


class Scripted:
    """Gives the right answer in as many of the 64 rows as its script says for this update: 4 for these, 0 elsewhere."""

    name, config = "scripted", QUICK

    def __init__(self, *script):
        self.script, self.updates, self.rng = script, 0, np.random.default_rng(0)

    def initial_hidden(self, n):
        return np.zeros((n, 2), np.float32)

    def value(self, observation, hidden, reset):
        return np.zeros(64, np.float32)

    def act(self, observation, hidden, reset, temperature=1.0):
        right = np.arange(64) < self.script[self.updates]
        action = (observation.state.argmax(1) + ~right) % 4
        return Action(action.astype(np.int32), *(np.zeros(64, np.float32) for _ in range(2)), hidden)

    def update(self, rollout):
        self.updates += 1
        return {"loss": 0.0}

    def state(self):
        return {"script": np.array(self.script)}, {"updates": self.updates}

    def load_state(self, tensors, meta):
        self.updates = meta["updates"]


def test_the_best_checkpoint_is_kept_when_it_gets_worse_and_when_the_run_is_resumed(tmp_path):
    script = (16, 32, 64, 8, 8, 4, 4, 4)
    config = TrainingConfig(max_steps=4 * UPDATE, checkpoint_every=1, window=64, patience=0)
    assert train(Scripted(*script), world(), config, tmp_path) == ("max_steps", 4, 1024, 0.5, 4.0)
    longer = replace(config, max_steps=8 * UPDATE)
    assert train(Scripted(*script), world(), longer, tmp_path, resume=True) == ("max_steps", 8, 2048, 0.25, 4.0)
    best, last = (checkpoint.load(tmp_path / name)[1]["training"] for name in ("best", "last"))
    assert (best["updates"], best["best"], last["updates"], last["best"]) == (3, 4, 8, 4)


def test_returns_are_kept_for_as_long_as_a_window_needs_them(tmp_path):
    """Windows of 30 against 64 episodes an update: kept are whole windows, from a bound on, and an unfinished one."""
    script = [4 * n for n in range(1, 13)]  # always better: nothing converges
    config = TrainingConfig(max_steps=12 * UPDATE, checkpoint_every=5, window=30, patience=2)
    assert train(Scripted(*script), world(), config, tmp_path).stopped == "max_steps"
    every = np.concatenate([[4.0] * right + [0.0] * (64 - right) for right in script])
    kept = checkpoint.load(tmp_path / "last")[0]["training/returns"]
    assert np.array_equal(kept, every[len(every) // 30 * 30 - 3 * 30 :])


def test_an_agent_that_takes_any_rollout_is_given_8_steps():
    agent = Scripted(64)
    agent.config = object()
    assert train(agent, world(), TrainingConfig(max_steps=8 * 64)) == ("max_steps", 1, 512, 4.0, 4.0)


def test_nothing_has_converged_before_min_steps():
    config = TrainingConfig(max_steps=20 * UPDATE, window=64, patience=2)
    for least, updates in ((0, 3), (8 * UPDATE, 8)):
        result = train(Scripted(*[8] * 20), world(), replace(config, min_steps=least))
        assert result == ("converged", updates, updates * UPDATE, 0.5, 0.5)


# *** resuming ***


class Interrupted(Exception):
    pass


def content(directory):
    """Everything a run leaves but the times."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found = {"metrics": [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]}
    for name in ("best", "last"):
        tensors, meta = checkpoint.load(directory / name)
        found[name] = ({k: v.tobytes() for k, v in tensors.items()}, meta)
    return found


@pytest.mark.parametrize("normalised", [False, True])
def test_a_resumed_run_equals_one_that_was_never_interrupted(make, tmp_path, normalised):
    """6 updates, a checkpoint after every 3; cut off in the 5th. Parameters, metrics and both checkpoints."""

    def run(name, seed, resume=False, log=None):
        train(make(seed, normalised), world(3), config, tmp_path / name, log, 3, resume)

    def cut(name, value, update):
        if update == 5 and name == "return":
            raise Interrupted

    config = TrainingConfig(max_steps=6 * UPDATE, checkpoint_every=3, window=30)
    run("whole", 1)
    with pytest.raises(Interrupted):
        run("cut", 1, log=cut)
    assert len(content(tmp_path / "cut")["metrics"]) == 5 and content(tmp_path / "cut")["last"][1]["updates"] == 3
    run("cut", 2, resume=True)  # another seed: all of the agent must come from the file
    whole = content(tmp_path / "whole")
    assert len(whole["metrics"]) == 6 and whole["last"][1]["training"]["updates"] == 6
    assert whole["metrics"] == content(tmp_path / "cut")["metrics"] and whole == content(tmp_path / "cut")
    assert any("normalise" in name for name in whole["last"][0]) == normalised
    with pytest.raises(checkpoint.CheckpointError, match="seed=3, so it cannot be resumed with seed=4"):
        train(make(), world(3), replace(config, seed=4), tmp_path / "cut", resume=True)
    with pytest.raises(FileExistsError, match="holds a run already"):
        run("cut", 1)


def test_a_run_is_resumed_with_the_settings_of_its_agent_only(cache_dir, tmp_path):
    """Those of the agent, and of what is wrapped around it."""
    plain = lambda **changed: PPO(4, 4, 0, replace(QUICK, **changed), 0, cache_dir)  # noqa: E731
    curious = lambda scale, **changed: Curious(plain(), Counts(4, 0, BonusConfig(**changed)), scale)  # noqa: E731
    noisy = lambda noise: Explorer(plain(), ExplorationConfig(noise=noise))  # noqa: E731
    config = TrainingConfig(max_steps=UPDATE)
    for n, (made, other, key, theirs, ours) in enumerate([
        (plain(), plain(gamma=0.5), "gamma", 0.0, 0.5),
        (plain(), plain(n_envs=32), "n_envs", 64, 32),
        (curious(0.5), curious(0.1), "scale", 0.5, 0.1),
        (curious(0.5), curious(0.5, digits=3), "bonus_digits", 2, 3),
        (curious(0.5), plain(), "scale", 0.5, None),
        (noisy(0.2), noisy(0.3), "noise", 0.2, 0.3),
        (Curious(noisy(0.2), Counts(4)), Curious(noisy(0.0), Counts(4)), "noise", 0.2, 0.0),
    ]):  # fmt: skip
        out = tmp_path / str(n)
        train(made, world(), config, out)
        before = other.policy.theta.numpy().copy()
        message = f"made with {key}={theirs}, so it cannot be resumed with {key}={ours}$"
        with pytest.raises(checkpoint.CheckpointError, match=message):
            train(other, Identity(other.config.n_envs, limit=4), config, out, resume=True)
        assert np.array_equal(other.policy.theta.numpy(), before)
        assert train(made, world(), replace(config, max_steps=2 * UPDATE), out, resume=True).updates == 2


def test_an_older_checkpoint_that_does_not_say_a_setting_is_resumed(make, tmp_path):
    config = TrainingConfig(max_steps=UPDATE)
    train(make(), world(), config, tmp_path)
    tensors, meta = checkpoint.load(tmp_path / "last")
    del meta["config"]["gamma"]
    checkpoint.save(tmp_path / "last", tensors, meta)
    assert train(make(), world(), replace(config, max_steps=2 * UPDATE), tmp_path, resume=True).updates == 2


def test_an_agent_that_learns_from_a_log_resumes_as_well(make, tmp_path):
    rollouts = [Rollouts(world(), make(seed), seed).collect(4)[0] for seed in range(4)]
    taken = []

    def sample(rng):
        taken.append(int(rng.integers(10**6)))
        return rollouts[taken[-1] % 4]

    config = TrainingConfig(checkpoint_every=2)
    whole = make(1)
    result = train_offline(whole, sample, 6, config, tmp_path / "whole")
    order, taken = taken, []
    assert result.stopped == "max_steps" and result.updates == 6 and math.isnan(result.score)
    train_offline(make(1), sample, 4, config, tmp_path / "cut")  # stopped by its settings
    resumed = make(2)
    train_offline(resumed, sample, 6, config, tmp_path / "cut", resume=True)
    assert taken == order and len(set(order)) == 6, "not the same, or the same after every checkpoint"
    assert np.array_equal(whole.policy.theta.numpy(), resumed.policy.theta.numpy())
    assert not (tmp_path / "whole" / "best.safetensors").exists()


# *** heads ***


def test_a_head_stalls_when_its_metric_was_not_better_for_so_many_updates():
    health, values = Health(), [1, 2, 2, 1, 3, 0, 3, 2.9, 4]
    assert [health.stalled(v, 3) for v in values] == [False] * 7 + [True, False]
    assert asdict(health) == {"best": 4, "age": 0, "resets": 0}


def spoil(agent, head):
    """Saturated logits, which have no gradient; or a value that drowns every advantage."""
    arrays = {k: a.copy() for k, a in agent.policy.unflatten(agent.policy.theta.numpy()).items()}
    if head == "policy":
        arrays["policy.bias"][0] = 1e3
    else:
        arrays["value.weight"] *= 1e4
    agent.policy.theta.assign(agent.policy.flatten(arrays)).realize()


@pytest.mark.parametrize("head", ["policy", "value"])
def test_a_spoilt_head_is_rescued_by_its_reset(make, head):
    """10 updates: >= 3.9 of 4. Without the reset <= 2.5."""
    resets, scores = [], {}
    for after in (0, 2):
        agent = make()
        spoil(agent, head)
        config = TrainingConfig(max_steps=10 * UPDATE, patience=0, **{f"reset_{head}_after": after})
        log = lambda name, value, n: name.startswith("reset") and resets.append(name)  # noqa: E731
        train(agent, world(), config, log=log)
        scores[after] = score(agent)
    print(f"spoilt {head} head: bar >= 3.9 of 4, {scores[2]:.1f}, without reset {scores[0]:.1f}")
    assert resets == [f"reset_{head}"], "not once, or another head"
    assert scores[2] >= 3.9 and scores[0] <= 2.5


# *** what is refused ***


class Broken(Identity):
    """Pays NaN from its 13th step on."""

    def __init__(self, n_envs):
        super().__init__(n_envs, limit=4)
        self.steps = 0

    def advance(self, actions):
        reward, terminated = super().advance(actions)
        self.steps += 1
        return (reward * np.nan if self.steps > 12 else reward), terminated


def test_divergence_saves_nothing_and_names_the_last_good_checkpoint(make, tmp_path):
    config = TrainingConfig(max_steps=10 * UPDATE, checkpoint_every=2)
    with pytest.raises(Diverged, match=r"update 4: .*last good checkpoint: .*/last\.safetensors"):
        train(make(), Broken(64), config, tmp_path)
    assert checkpoint.load(tmp_path / "last")[1]["training"]["updates"] == 2
    agent = make()
    agent.policy.theta.assign(agent.policy.theta * math.inf).realize()
    with pytest.raises(
        Diverged, match=r"update 0: parameter/.* is not finite; the last good checkpoint: none was kept"
    ):
        train(agent, world(), config, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("key, value", [("window", 29), ("alpha", 1.0), ("max_steps", 0), ("patience", -1)])
def test_a_setting_out_of_range_is_named(key, value):
    with pytest.raises(ValueError, match=key):
        TrainingConfig(**{key: value})


def test_what_cannot_be_done_is_said(make):
    with pytest.raises(ValueError, match="max_steps=255 is less than one update takes, 256"):
        train(make(), world(), TrainingConfig(max_steps=255))
    with pytest.raises(ValueError, match="resume needs the directory"):
        train(make(), world(), resume=True)
    agent = make()
    agent.update = lambda rollout: {}
    with pytest.raises(ValueError, match="reset_value_after: PPO does not report explained_variance"):
        train(agent, world(), TrainingConfig(reset_value_after=1))
    agent.parts = {}
    with pytest.raises(ValueError, match="reset_value_after: PPO has no value head"):
        train(agent, world(), TrainingConfig(reset_value_after=1))


def test_returns_that_do_not_go_on_are_no_scale(make):
    agent = Normalised(make(1), NormaliseConfig(reward="scale"))
    with pytest.raises(ValueError, match="do not go on from one another"):
        train_offline(agent, lambda rng: None, 1)
