"""The environment in replay: two small kernels with a handful of recorded schedules stand in for a device."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from tiny import U2, U4, add_one, kernel_of
from tinygrad import Tensor

from autotune.compiler import Opt, OptOps, renderer_of
from autotune.env import EnvConfig, KernelEnv, KernelVectorEnv, Task
from autotune.errors import IllegalAction, ReplayError
from autotune.features import observe
from autotune.measuring.recording import Recording
from autotune.records import Records, Trial
from autotune.space import ACTION_INDEX, MAX_STEPS, STOP_INDEX, State, legal_mask

UNROLL = Opt(OptOps.UNROLL, 0, 4)
A2, A4, AU = ACTION_INDEX[U2], ACTION_INDEX[U4], ACTION_INDEX[UNROLL]
FOREIGN = (Opt(OptOps.UPCAST, 0, 6),)  # legal, but no action of the vocabulary
DEVICE = "recorded"


def add():
    return add_one(304)


def matmul():
    return kernel_of(Tensor.empty(16, 32) @ Tensor.empty(32, 8))


TIMES = {  # seconds by kernel and schedule; None: the trial crashed
    "add": {(): 8.0, (U4,): 2.0, (U2,): 4.0, (U2, U2): 1.0, (U4, U4): None, FOREIGN: 1.0},
    "matmul": {(): 10.0, (U4,): 5.0, (UNROLL, U2): 1.25, (U4, UNROLL, U2): 20.0},
}


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    records = Records(tmp_path_factory.mktemp("env") / "records.db")
    for kernel, times in zip((add(), matmul()), TIMES.values(), strict=True):
        for kind in ("unoptimized", "hand_coded"):
            records.add_trial(DEVICE, Trial(kernel.key, (), "ok", (times[()],), kind=kind), 1)
        for schedule, seconds in times.items():
            verdict, samples = ("crashed", ()) if seconds is None else ("ok", (seconds, seconds, 9 * seconds))
            records.add_trial(DEVICE, Trial(kernel.key, schedule, verdict, samples), 1)
    return Recording([records], DEVICE)


def task_of(recording, kernels=None, potential=None, **config) -> Task:
    def measured(states):
        trials = [recording.measure(s.kernel, [s.schedule], None)[0] for s in states]
        return np.array([math.nan if t.seconds is None else math.log2(t.seconds) for t in trials])

    def allowed(kernel):
        return [schedule for key, schedule in recording.trials if key == kernel.key]

    return Task(kernels or [add(), matmul()], renderer_of("CPU"), measured, potential, allowed, EnvConfig(**config))


def play(env: KernelEnv, kernel: int, actions) -> tuple[list[float], bool, bool, dict]:
    env.reset(seed=0, options={"kernel": kernel})
    steps = [env.step(a) for a in actions]
    assert not any(s[2] or s[3] for s in steps[:-1])
    return [s[1] for s in steps], *steps[-1][2:]


def odd_potential(states) -> np.ndarray:
    """A simulator that knows nothing: any number for each state, the same each time."""
    return np.array(
        [((len(s.schedule) * 7 + s.sizes(*{a.kind for a in s.axes}) * 3 + len(s.axes) ** 2) % 11) - 5.5 for s in states]
    )


# **** Gymnasium's contract ****


class Adapter(gymnasium.Env):
    """Gymnasium's spaces around a KernelEnv. An illegal sample becomes the next legal action."""

    def __init__(self, env: KernelEnv):
        self.env = env
        first, _ = env.reset(seed=0)
        box = lambda x: gymnasium.spaces.Box(-np.inf, np.inf, x.shape, np.float32)  # noqa: E731
        mask = gymnasium.spaces.MultiBinary(len(first["mask"]))
        self.observation_space = gymnasium.spaces.Dict(
            {"state": box(first["state"]), "mask": mask, "actions": box(first["actions"])}
        )
        self.action_space = gymnasium.spaces.Discrete(len(first["mask"]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.mask = (found := self.env.reset(seed=seed, options=options))[0]["mask"]
        return found

    def step(self, action):
        legal = np.flatnonzero(self.mask)
        found = self.env.step(int(legal[np.searchsorted(legal, action) % len(legal)]))
        self.mask = found[0]["mask"]
        return found


def test_gymnasiums_own_checker_is_content(recording):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", message=".*(Box observation space m|not been initialized by|not having a spec|spec is None).*"
        )
        check_env(Adapter(KernelEnv(task_of(recording))), skip_render_check=True)


def test_a_seed_gives_one_sequence_of_kernels(recording):
    def kernels(seed):
        env = KernelEnv(task_of(recording))
        return [env.reset(seed=seed)[1]["kernel"]] + [env.reset()[1]["kernel"] for _ in range(20)]

    assert kernels(3) == kernels(3) and kernels(3) != kernels(4)
    assert set(kernels(3)) == {add().key, matmul().key}


# **** rewards ****


@pytest.mark.parametrize("kernel, actions, speedup", [
    (0, [STOP_INDEX], 0.0), (0, [A4, STOP_INDEX], 2.0), (0, [A2, STOP_INDEX], 1.0), (0, [A2, A2, STOP_INDEX], 3.0),
    (1, [A4, STOP_INDEX], 1.0), (1, [AU, A2, STOP_INDEX], 3.0), (1, [A4, AU, A2, STOP_INDEX], -1.0),
])  # fmt: skip
def test_the_return_is_the_log_of_the_speedup(recording, kernel, actions, speedup):
    """By hand: 8 s / 2 s is 2, 10 s / 1.25 s is 3, 10 s / 20 s is -1. Without a simulator all of it comes at STOP."""
    for potential in (None, odd_potential):
        rewards, terminated, truncated, info = play(KernelEnv(task_of(recording, potential=potential)), kernel, actions)
        assert sum(rewards) == pytest.approx(speedup) and terminated and not truncated
        assert len(info["schedule"]) == len(actions) - 1
        if potential is None:
            assert all(r == 0.0 for r in rewards[:-1])


def test_a_step_pays_the_fall_of_the_potential(recording):
    env = KernelEnv(task_of(recording, potential=odd_potential))
    env.reset(seed=0, options={"kernel": 1})
    before = odd_potential([env.episode.state])[0]
    for action in (A4, AU, A2):
        reward = env.step(action)[1]
        after = odd_potential([env.episode.state])[0]
        assert reward == pytest.approx(before - after)
        before = after
    assert any(odd_potential([s])[0] != before for s in (env.task.root(matmul()), env.task.root(add())))


def test_without_a_device_the_simulator_alone_pays():
    task = Task([add()], renderer_of("CPU"), potential=odd_potential)
    env = KernelEnv(task)
    rewards, *_ = play(env, 0, [A4, A2, STOP_INDEX])
    before, after = odd_potential([task.root(add()), env.episode.state])
    assert rewards[-1] == 0.0 and sum(rewards) == pytest.approx(before - after)


@pytest.mark.parametrize("potential", [None, odd_potential])
@pytest.mark.parametrize("failure", [-3.0, -5.5])
def test_a_failed_trial_earns_the_failure_return(recording, potential, failure):
    env = KernelEnv(task_of(recording, potential=potential, failure_return=failure))
    rewards, terminated, _, _ = play(env, 0, [A4, A4, STOP_INDEX])
    assert sum(rewards) == pytest.approx(failure) and terminated
    assert EnvConfig().failure_return == -3.0


def test_stop_ends_and_applies_nothing(recording):
    """The ancestor applied the last action once more at STOP: here the schedule measured is the one before it."""
    env = KernelEnv(task_of(recording))
    env.reset(seed=0, options={"kernel": 0})
    _, _, terminated, truncated, info = env.step(A2)
    assert (terminated, truncated, info["schedule"]) == (False, False, (U2,))
    state = env.episode.state
    observation, _, terminated, truncated, info = env.step(STOP_INDEX)
    assert (terminated, truncated, info["schedule"]) == (True, False, (U2,)) and env.episode.state is state
    assert env.vector.finished[-1] == (add(), (U2,), 1.0)


# **** masks and ends ****


def legal(env: KernelEnv) -> set[int]:
    return set(np.flatnonzero(env._observation()["mask"]).tolist())


def test_without_a_mask_an_illegal_action_is_offered_and_ends_the_episode(recording):
    """It adds nothing: the return is that of the schedule so far, 8 s / 2 s. With the mask the same action is refused."""
    task = task_of(recording)
    env = KernelEnv(replace(task, masked=False))
    env.reset(options={"kernel": 0})
    assert len(legal(env)) == len(ACTION_INDEX)
    shown, _, terminated, _, _ = env.step(A4)
    assert not terminated and not shown["actions"][A2].any()  # what is illegal looks like nothing
    _, reward, terminated, truncated, info = env.step(A2)
    assert (reward, terminated, truncated, info["schedule"]) == (2.0, True, False, (U4,))
    masked = KernelEnv(task)
    masked.reset(options={"kernel": 0})
    masked.step(A4)
    with pytest.raises(IllegalAction):
        masked.step(A2)


def test_replay_leaves_only_what_is_recorded(recording):
    env = KernelEnv(task_of(recording))
    env.reset(options={"kernel": 0})
    assert legal(env) == {A2, A4, STOP_INDEX}  # the foreign schedule is not offered
    env.step(A4)
    assert legal(env) == {A4, STOP_INDEX}
    env.reset(options={"kernel": 1})
    env.step(AU)
    assert legal(env) == {A2}  # (UNROLL,) itself was never measured: no STOP
    with pytest.raises(IllegalAction):
        env.step(STOP_INDEX)
    env.reset(options={"kernel": 1})
    with pytest.raises(IllegalAction):
        env.step(A2)
    with pytest.raises(ReplayError):
        recording.measure(matmul(), [(U2, U2)], None)


def test_without_a_recording_the_mask_is_the_legal_one():
    env = KernelEnv(Task([add()], renderer_of("CPU")))
    observation, _ = env.reset(seed=0)
    assert (observation["mask"] == legal_mask(env.task.root(add()))).all() and observation["mask"].dtype == np.int8
    assert not observation["actions"][observation["mask"] == 0].any() and np.isfinite(observation["state"]).all()
    with pytest.raises(IllegalAction):
        env.step(ACTION_INDEX[Opt(OptOps.UNROLL, 0, 4)])


def test_the_cap_truncates_and_tells_where():
    measured = []

    def never(states):
        measured.append(states)
        return np.zeros(len(states))

    task = Task([add_one(2**12)], renderer_of("CPU"), never, config=EnvConfig(max_steps=3))
    env = KernelVectorEnv(task, 2)
    env.reset(0)
    ends = [env.step(np.array([A2, A2 if i else STOP_INDEX])) for i in range(3)]
    assert [e.truncated.tolist() for e in ends] == [[False, False], [False, False], [True, False]]
    assert [e.terminated.tolist() for e in ends] == [[False, True], [False, False], [False, False]]
    assert ends[0].final is None is ends[1].final and ends[2].final is not None
    fresh = env._observe_one(env.episodes[0])[0]
    assert (ends[2].observation.state[0] == fresh).all() and (ends[2].final.state[0] != fresh).any()
    assert (ends[2].final.state[1] == ends[2].observation.state[1]).all()
    assert (
        len(measured) == 2 and EnvConfig().max_steps == MAX_STEPS
    )  # root and end of the one that stopped; a cut episode costs none


def test_where_only_stop_is_left_the_cap_cuts_nothing(recording):
    """After eight actions, or two in a recording that holds no longer ones: the episode ends by STOP, and its return is known."""
    env = KernelEnv(Task([add_one(2**12)], renderer_of("CPU"), potential=odd_potential))
    env.reset(seed=0)
    rewards = []
    while len(env.episode.state.schedule) < MAX_STEPS:
        _, reward, terminated, truncated, _ = env.step(min(legal(env) - {STOP_INDEX}))
        rewards.append(reward)
        assert not terminated and not truncated
    assert legal(env) == {STOP_INDEX}
    _, reward, terminated, truncated, _ = env.step(STOP_INDEX)
    before, after = odd_potential([env.task.root(env.episode.state.kernel), env.episode.state])
    assert reward == 0.0 and sum(rewards) == pytest.approx(before - after) and terminated and not truncated
    rewards, terminated, truncated, _ = play(KernelEnv(task_of(recording, max_steps=2)), 0, [A2, A2, STOP_INDEX])
    assert sum(rewards) == 3.0 and terminated and not truncated
    cut = play(KernelEnv(task_of(recording, max_steps=2)), 1, [A4, AU])  # (U4, UNROLL, U2) is recorded beyond
    assert sum(cut[0]) == 0.0 and cut[1:3] == (False, True)


def test_it_tells_how_many_episodes_were_begun_before_each_that_finished(recording):
    """Row 0 stops at once and again, row 1 does one action first."""
    env = KernelVectorEnv(task_of(recording), 2, in_order=True)
    env.reset(0)
    for actions in ([STOP_INDEX, AU], [STOP_INDEX, A2], [STOP_INDEX, STOP_INDEX]):
        env.step(np.array(actions))
    assert env.begins == [0, 2, 3, 1] and len(env.finished) == 4


@pytest.mark.parametrize("potential", [None, odd_potential])
def test_several_in_lockstep_equal_each_alone(recording, potential):
    kernels, rng = [add(), matmul()], np.random.default_rng(5)
    env = KernelVectorEnv(task_of(recording, kernels, potential, max_steps=2), 3)
    seen = env.reset(1)
    episodes = defaultdict(list)  # by row: (kernel, actions, rewards, observation before each action, ends)
    logs = []
    for _ in range(40):
        actions = np.array([rng.choice(np.flatnonzero(m)) for m in seen.mask])
        for i in range(3):
            episodes[i].append(
                [env.episodes[i].state.kernel, int(actions[i]), seen.state[i], seen.mask[i], seen.actions[i]]
            )
        step = env.step(actions)
        for i in range(3):
            episodes[i][-1] += [step.reward[i], step.terminated[i], step.truncated[i]]
            if step.terminated[i] or step.truncated[i]:
                logs.append(episodes.pop(i))
        seen = step.observation
    single = KernelEnv(task_of(recording, kernels, potential, max_steps=2))
    for log in logs:
        observation, _ = single.reset(options={"kernel": kernels.index(log[0][0])})
        for _, action, state, mask, features, reward, terminated, truncated in log:
            assert (
                (observation["state"] == state).all()
                and (observation["mask"] == mask).all()
                and (observation["actions"] == features).all()
            )
            observation, got, *ends, _ = single.step(action)
            assert got == pytest.approx(reward, abs=1e-6) and ends == [terminated, truncated]
    assert len(logs) > 30 and len(env.finished) == sum(log[-1][6] for log in logs)


def test_restart_gives_up_the_named_episodes_and_no_other(recording):
    env = KernelVectorEnv(task_of(recording), 3, in_order=True)
    env.reset(0)
    env.step(np.array([A4, AU, A4]))
    kept = env.episodes[1]
    seen = env.restart(np.array([0, 2]))
    assert env.episodes[1] is kept and kept.state.schedule == (UNROLL,)
    assert [len(e.state.schedule) for e in env.episodes] == [0, 1, 0]
    assert [e.state.kernel.key for e in env.episodes][::2] == [matmul().key, add().key]  # the fourth and the fifth
    assert (seen.mask == np.stack([e.mask for e in env.episodes])).all()
    assert env.finished == []  # what is given up has cost no trial


def test_baselines_of_a_recording_can_be_asked_again(recording):
    kinds = [[t.kind for t in recording.baselines(add())] for _ in range(3)]
    assert kinds == [["unoptimized", "hand_coded"]] * 3


def test_repeated_measurements_are_replayed_in_their_order(tmp_path):
    records = Records(tmp_path / "r.db")
    for seconds in (3.0, 1.0, 2.0):
        records.add_trial(DEVICE, Trial(add().key, (U4,), "ok", (seconds,)), 1)
    again = Recording([records], DEVICE)
    assert [again.measure(add(), [(U4,)], None)[0].seconds for _ in range(4)] == [3.0, 1.0, 2.0, 2.0]
    assert again.compiled == 4
    with pytest.raises(ReplayError):
        again.baselines(add())
    with pytest.raises(ReplayError):
        again.duel(add(), [(U4,), ()])


def test_an_environment_needs_a_kernel():
    with pytest.raises(ValueError):
        KernelEnv(Task([], renderer_of("CPU")))


def test_one_by_one_sees_what_several_see(recording):
    """A policy of a simulator's view: twice the features, here."""

    def twice(state: State, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        vector, actions = observe(state, mask)
        return 2 * vector, actions

    task = replace(task_of(recording, [matmul()], None), sees=twice)
    seen, single = KernelVectorEnv(task, 1).reset(0), KernelEnv(task)
    alone, _ = single.reset(seed=0)
    np.testing.assert_array_equal(alone["state"], seen.state[0])
    alone["state"][:] = 0  # it is the caller's
    np.testing.assert_array_equal(single._observation()["state"], seen.state[0])
