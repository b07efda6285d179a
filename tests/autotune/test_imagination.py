"""Imagination beside replay: which trials an arm may learn from, what it is paid, and how the arms are compared."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tiny import add_one, kernel_of
from tinygrad import Tensor

from autotune import env as environment
from autotune.compiler import renderer_of
from autotune.env import KernelVectorEnv, Task
from autotune.errors import UsageError
from autotune.experiments import imagination
from autotune.experiments.imagination import ARMS, Student, compare, states_of, summarise_all, table_rows
from autotune.features import observe, summary
from autotune.recorded import Entry, Recorded
from autotune.search.tree import TreeSearch
from autotune.space import STOP_INDEX, legal_mask, state_after
from sims import EnsembleConfig

ROOT = Path(__file__).resolve().parents[2]
CPU = renderer_of("CPU")
SETTINGS = {"checks": 2, "check_share": 0.4, "env_steps": 0, "hidden": 8, "sim_steps": 5, "pessimism": 0.5, "draws": 3}


@pytest.fixture(autouse=True)
def small_nets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the simulator: what is asked here is who may learn from what."""
    monkeypatch.setattr(imagination, "EnsembleConfig", partial(EnsembleConfig, members=2, hidden=16, batch=32))


def entry(kernel, seed: int) -> Entry:
    """Sixteen schedules of a tree, each with a time of its own."""
    schedules = TreeSearch(kernel, CPU, seed).ask(16)
    luck = np.random.default_rng(seed).permutation(16) / 8
    return Entry(kernel, 3.0, {(): 4.0, **{s: 4.0 - len(s) + t for s, t in zip(schedules, luck, strict=True)}})


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    train = [add_one(304), kernel_of(Tensor.empty(16, 32) @ Tensor.empty(32, 8)), add_one(4096)]
    held_out = [kernel_of(Tensor.empty(64, 48).sum(0))]
    return Recorded({split: [entry(k, i) for i, k in enumerate(kernels)]
                     for split, kernels in {"train": train, "held_out": held_out}.items()})  # fmt: skip


def trials_of(part: Recorded) -> set:
    """(kernel, schedule) of each trial; un-optimized kernels are none."""
    return {(e.kernel.key, s) for e in part.entries["train"] for s in e.times if s}


def student(recorded: Recorded, arm: str, trials: int = 30, **changed) -> Student:
    return Student(recorded, CPU, arm, trials, 0, {**SETTINGS, **changed})


# **** which trials ****


@pytest.mark.parametrize("seed", [0, 1])
def test_fewer_trials_are_among_more_of_them(recorded, seed):
    drawn = [trials_of(recorded.draw("train", n, seed)) for n in range(1, 49)]
    assert [len(d) for d in drawn] == list(range(1, 49))
    assert all(few < many for few, many in pairwise(drawn))
    assert drawn[-1] == trials_of(recorded)


@pytest.mark.parametrize("trials", [1, 7, 20, 47])
def test_what_is_drawn_is_closed_even_and_as_it_was_recorded(recorded, trials):
    part = recorded.draw("train", trials, 3)
    sizes = [len(e.times) - 1 for e in part.entries["train"]]
    assert max(sizes) - min(sizes) <= 1 and len(sizes) == 3
    for e in part.entries["train"]:
        whole = recorded.by_key[e.kernel.key]
        assert () in e.times and all(s[:-1] in e.times for s in e.times if s)
        assert all(whole.times[s] == t for s, t in e.times.items()) and e.hand_coded == whole.hand_coded
    assert trials_of(part) != trials_of(recorded.draw("train", trials, 4))


def test_drawing_leaves_the_recording_alone(recorded):
    part = recorded.draw("train", 5, 0)
    before = trials_of(recorded)
    part.entries["train"][0].times.clear()
    assert trials_of(recorded) == before


@pytest.mark.parametrize("trials", [0, -1, 49])
def test_more_trials_than_there_are_cannot_be_drawn(recorded, trials):
    with pytest.raises(UsageError, match="48 are on record"):
        recorded.draw("train", trials, 0)


# **** what is played, and what it pays ****


def play_at_random(env: KernelVectorEnv, steps: int) -> list[float]:
    """Returns of the episodes that stopped, in the order of `env.finished`, summed from the rewards of single steps."""
    seen, rng = env.reset(0), np.random.default_rng(0)
    totals, returns = np.zeros(env.n_envs), []
    for _ in range(steps):
        step = env.step(np.array([rng.choice(np.flatnonzero(m)) for m in seen.mask]))
        totals += step.reward
        returns += [float(totals[i]) for i in np.flatnonzero(step.terminated)]
        totals[step.terminated | step.truncated] = 0
        seen = step.observation
    return returns


def test_a_return_in_imagination_is_the_ensembles_pessimistic_speedup(recorded):
    """The sum of an episode's rewards, held against the members' raw predictions."""
    learner = student(recorded, "imagination")
    learner.fit()
    returns = play_at_random(learner.env, 40)
    assert len(returns) == len(learner.env.finished) > 50
    members = lambda s: learner.guide.simulator.predict_members(summary(s)[None])[:, 0].astype(np.float64)  # noqa: E731
    for (kernel, schedule, _), total in list(zip(learner.env.finished, returns, strict=True))[:40]:
        (end,) = states_of(learner.task, kernel, [schedule])
        relative = members(end) - members(learner.task.root(kernel))  # [M]
        assert total == pytest.approx(-(relative.mean() + 0.5 * relative.std()), abs=1e-4)
    recorded_ends = {(k.key, s) for k, s, _ in learner.env.finished} & trials_of(recorded)
    assert len(recorded_ends) < len({(k.key, s) for k, s, _ in learner.env.finished if s})  # it leaves the recording


def test_closed_arms_stay_with_their_trials_and_differ_in_what_pays(recorded):
    real, imagined = student(recorded, "replay", 20), student(recorded, "imagination-closed", 20)
    imagined.fit()
    paid = play_at_random(real.env, 40), play_at_random(imagined.env, 40)
    ends = [[(k.key, s) for k, s, _ in learner.env.finished] for learner in (real, imagined)]
    assert ends[0] == ends[1] and {end for end in ends[0] if end[1]} <= trials_of(real.known)  # the same random play
    assert paid[0] == pytest.approx([4.0 - recorded.by_key[key].times[s] for key, s in ends[0]], abs=1e-5)
    assert paid[0] != pytest.approx(paid[1], abs=0.1)


def test_checks_spend_what_was_held_back_and_no_more(recorded):
    learner = student(recorded, "imagination-checked", 30, check_share=0.9)
    before = trials_of(learner.known)
    assert len(before) == learner.trials == 3
    answer = next(learner.answers(recorded.task("train", CPU)))
    greedy = {(key, schedule) for key, schedule in answer.items() if schedule} - before
    assert greedy  # it would do something else than what is known
    learner.check(3 + len(greedy))
    assert trials_of(learner.known) == before | greedy
    learner.check(30)
    assert learner.trials == 30 and trials_of(learner.known) <= trials_of(recorded)
    for e in learner.known.entries["train"]:
        assert all(recorded.by_key[e.kernel.key].times[s] == t for s, t in e.times.items())


def test_all_arms_have_had_the_same_trials_in_the_end(recorded):
    for arm in ARMS:
        learner = student(recorded, arm, 25)
        learner.learn()
        assert learner.trials == 25 and ("fit" in learner.seconds) == (arm not in ("replay", "random"))


def test_the_simulators_own_answers_are_its_ranking(recorded):
    learner = student(recorded, "simulator")
    learner.fit()
    task = recorded.task("held_out", CPU)
    (kernel,) = task.kernels
    answers = [a[kernel.key] for a, _ in zip(learner.answers(task), range(30), strict=False)]
    cost = [learner.potential(states_of(task, kernel, [s]))[0] for s in answers]
    assert answers[0] == answers[1] and cost[1:] == sorted(cost[1:])
    assert set(answers) == set(recorded.by_key[kernel.key].times) and answers[17:] == answers[17:18] * 13


def test_too_few_trials_to_fit_are_named(recorded):
    learner = student(recorded, "imagination", 1)  # one kernel has two times, the others one
    with pytest.raises(UsageError, match="1 trials are too few to learn from"):
        learner.learn()


# **** remembered masks and views ****


@pytest.mark.parametrize("remembered", [1, 7])
def test_what_a_task_forgets_it_sees_again(monkeypatch, remembered):
    """The same play with next to no memory, held against the functions that the task remembers for."""
    monkeypatch.setattr(environment, "REMEMBERED", remembered)
    task = Task([add_one(304), kernel_of(Tensor.empty(16, 32) @ Tensor.empty(32, 8))], CPU)
    env, rng = KernelVectorEnv(task, 3), np.random.default_rng(0)
    seen = env.reset(0)
    for _ in range(25):
        for i, episode in enumerate(env.episodes):
            fresh = state_after(episode.state.kernel, episode.state.schedule, CPU)  # of a root that nobody remembers
            mask = legal_mask(fresh)
            state, actions = observe(fresh, mask)
            assert (
                (seen.mask[i] == mask).all() and (seen.state[i] == state).all() and (seen.actions[i] == actions).all()
            )
        assert len(task._views) <= remembered and len(task._masks) <= remembered
        assert sum(len(task.root(k).known) for k in task.kernels) <= 2 * (remembered + len(env.episodes))
        seen = env.step(np.array([rng.choice(np.flatnonzero(m)) for m in seen.mask])).observation


def test_the_longest_unused_is_forgotten_first(monkeypatch):
    monkeypatch.setattr(environment, "REMEMBERED", 2)
    task = Task([add_one(size) for size in (304, 608, 912)], CPU)
    first, second, third = (task.root(k) for k in task.kernels)
    for state in (first, second, first, third):
        task.mask(state)[STOP_INDEX] = False  # what is handed out is a copy
    assert [key for key, _ in task._masks] == [first.kernel.key, third.kernel.key]
    assert task.mask(first)[STOP_INDEX]


# **** the comparison ****


def rows(**scores) -> list[dict]:
    return [{"agent": arm, "trials": trials, "seed": seed, "greedy": [s, s + 0.1], "drawn": [s + 0.2, s + 0.2], "seconds": {}}
            for arm, per_trials in scores.items() for trials, s in per_trials.items() for seed in range(2)]  # fmt: skip


def test_imagination_is_held_against_replay_at_equal_trials():
    """By hand: at 9 trials it is better on every kernel, at 16 the same, so P(improvement) is 1 and 1/2."""
    found = summarise_all(rows(replay={16: 0.5, 9: 0.1}, imagination={16: 0.5, 9: 0.3}), ["replay", "imagination"])
    assert list(found) == ["9", "16"]
    assert found["9"]["imagination"]["greedy over replay"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["16"]["imagination"]["drawn over replay"]["value"] == 0.5
    assert found["9"]["replay"]["greedy over replay"]["value"] == 0.5
    assert found["9"]["imagination"]["greedy"]["value"] == pytest.approx(0.35)
    head, lines = table_rows(json.loads(json.dumps({"summary": found})))
    assert head == ["trials", "arm", "greedy", "drawn", "greedy over replay", "drawn over replay"]
    assert [line[:2] for line in lines[:2]] == [["9", "imagination"], ["9", "replay"]]
    assert lines[0][4] == "1.000 (1.000 to 1.000)" and {len(line) for line in lines} == {6}


def test_without_replay_there_is_nothing_to_hold_against():
    found = summarise_all(rows(random={10: 0.1}, imagination={10: 0.3}), ["random", "imagination"])
    assert set(found["10"]["imagination"]) == {"greedy", "drawn", "over random"}


def test_an_unknown_arm_is_named():
    with pytest.raises(UsageError, match="unknown arm 'dreams'; choose of replay"):
        compare(None, {"arms": ["replay", "dreams"]})  # type: ignore[arg-type]  # it ends before a session is needed


@pytest.mark.slow
def test_the_experiment_runs_and_goes_on_from_its_parts(tmp_path: Path):
    def run(*more: str) -> dict:
        command = [sys.executable, "-m", "autotune.experiments.imagination", "with", "fast", *more]
        env = {**os.environ, "DEV": "CPU", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "over replay" in done.stdout and "environment steps a second" in done.stdout
        newest = max((tmp_path / "runs").glob("[0-9]*"), key=lambda p: int(p.name))
        return json.loads((newest / "result.json").read_text())["figures"]

    first = run()
    assert set(first["summary"]) == {"150", "300"} and set(first["summary"]["150"]) == set(ARMS)
    assert len(first["rows"]) == 2 * len(ARMS)
    assert all(math.isfinite(s) and s <= 1.0 + 1e-9 for row in first["rows"] for s in row["greedy"] + row["drawn"])
    (tmp_path / "runs" / "1" / "job-imagination-150-0.json").unlink()
    again = run("part=runs/1")
    assert all(
        again[part] == first[part] for part in ("summary", "rows", "references")
    )  # the job made anew gave the same
