"""`python -m autotune.experiments.imagination`: does imagination help? PPO in a simulator beside PPO on replayed records.

Every arm is given as many hardware trials, drawn by the seed from the recorded ones of training kernels, and as many
environment steps. PPO is `ppo` of agents.zoo, the plain one: docs/agents.md finds that no memory pays on kernels.
- `replay`: PPO on the closed set of these trials, rewarded by their times.
- `imagination`: the committee is fitted to these trials; PPO on the full action space, rewarded by what the committee
  predicts, pessimistically, as in training.py. No schedule that it ends on is measured.
- `imagination-closed`: the same with the moves of `replay`, which tells a model's reward from more actions.
- `imagination-checked`: `imagination` on a part of the trials; at even distances the policy plays training kernels on the
  recording, in place of hardware; the trials it chooses there join the simulator's, until all arms have had as many.
- `simulator`: no policy. Of a held-out kernel's recorded schedules the committee takes those that it predicts, pessimistically, to be fastest.
- `random`: random play, no trial.
All are judged as the agents in agents.py: on the recording of held-out kernels, by one greedy answer, and by the best of a few
that are drawn. `with part=runs/3` goes on from what an earlier run has finished.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
from sacred.run import Run

from agents.ppo import PPO
from agents.rollout import Learner, Rollouts
from agents.zoo import AGENTS, Settings
from autotune.compiler import Renderer, default_device, renderer_of
from autotune.env import KernelVectorEnv, Task
from autotune.errors import UsageError
from autotune.experiments import (
    Session,
    check_counts,
    check_names,
    check_types,
    command_line,
    finished,
    make_experiment,
    without,
)
from autotune.experiments.agents import (
    ENVS,
    STEPS,
    check_env_steps,
    play,
    recordings,
    references,
    scores_of,
    summarise,
)
from autotune.experiments.jobs import run_jobs
from autotune.guide import Guide
from autotune.kernel import Kernel, Schedule
from autotune.recorded import Recorded
from autotune.space import State, after
from autotune.statistics import Estimate, bootstrap, improvement
from autotune.training import TrainConfig
from sims import EnsembleConfig, SimulatorError, TreesConfig

ARMS = ("replay", "imagination", "imagination-closed", "imagination-checked", "simulator", "random")
KIND = AGENTS["ppo"]
Choice = dict[str, Schedule]  # of each kernel, by its key

experiment = make_experiment("imagination")
DEFAULTS: dict[str, Any] = {
    "arms": list(ARMS),
    "trials": [250, 500, 1000, 2000],  # hardware trials that an arm may learn from
    "seeds": 5,
    "env_steps": 16384,  # of PPO, whatever rewards it
    "hidden": 64,  # width of its networks
    "sim_steps": TrainConfig.sim_steps,  # of fitting the simulator
    "pessimism": TrainConfig.pessimism,  # simulator's spread added to its log-time
    "checks": TrainConfig.checks,  # of `imagination-checked`
    "check_share": 0.2,  # of the trials is spent by them
    "draws": 4,  # schedules drawn of each kernel for the second score
    "processes": 2,
    "part": "",  # directory of an earlier run, whose finished jobs are taken over
}  # fmt: skip
experiment.add_config(DEFAULTS)
experiment.add_named_config("fast", {"trials": [150, 300], "seeds": 1, "env_steps": 512, "hidden": 8, "sim_steps": 10, "checks": 1,
                                     "draws": 2, "processes": 1})  # fmt: skip


class Student:
    """PPO and a simulator that learn from `trials` trials of a recording's training kernels, as their arm says."""

    def __init__(
        self, recorded: Recorded, renderer: Renderer, arm: str, trials: int, seed: int, settings: dict[str, Any]
    ):
        self.recorded, self.renderer, self.arm, self.seed, self.settings = recorded, renderer, arm, seed, settings
        self.checks = settings["checks"] if arm == "imagination-checked" else 0
        self.held_back = round(trials * settings["check_share"]) if self.checks else 0  # trials, for checks
        self.drawn = recorded.draw("train", trials, seed)
        self.known = recorded.draw("train", trials - self.held_back, seed)
        self.task = self._task()
        self.env = KernelVectorEnv(self.task, ENVS)
        self.updates = 0 if arm in ("simulator", "random") else settings["env_steps"] // (STEPS * ENVS)
        shared = Settings(self.env.state_dim, self.env.n_actions, self.env.action_dim, STEPS, ENVS, settings["hidden"],
                          self.updates, seed)  # fmt: skip
        config = cast(PPO, KIND.make(shared)).config
        self.guide = Guide.new(
            self.task.kernels[0], renderer, config, EnsembleConfig(seed=seed), TreesConfig(seed=seed), seed
        )
        self.agent: Learner = AGENTS["random"].make(shared) if arm == "random" else self.guide.agent
        self.seconds: defaultdict[str, float] = defaultdict(float)  # where the time went

    def _task(self) -> Task:
        """What PPO plays."""
        closed = self.known.task("train", self.renderer)
        if self.arm == "replay":
            return closed
        allowed = closed.allowed if self.arm == "imagination-closed" else None
        return Task(closed.kernels, self.renderer, potential=self.potential, allowed=allowed)

    def potential(self, states: Sequence[State]) -> np.ndarray:
        """Pessimistic log2 time [N], relative to the un-optimized kernel."""
        mean, spread = self.guide.predict(states)
        return mean + self.settings["pessimism"] * spread

    @property
    def trials(self) -> int:
        """Hardware trials that have been learned from; un-optimized kernels are baselines."""
        return sum(len(entry.times) - 1 for entry in self.known.entries["train"])

    def learn(self) -> None:
        """All updates; between them the checks, at even distances."""
        first = self.trials
        for part, updates in enumerate(np.array_split(np.arange(self.updates), self.checks + 1)):
            if part:
                self.check(first + self.held_back * part // self.checks)
            if self.arm not in ("replay", "random"):
                self.fit()
            if len(updates):
                self._practise(len(updates), self.seed + part)

    def fit(self) -> None:
        """The simulator to all trials known so far, from scratch. Raises UsageError where they are too few."""
        began = time.perf_counter()
        rows = [(state, entry.times[state.schedule], group) for group, entry in enumerate(self.known.entries["train"])
                for state in states_of(self.task, entry.kernel, entry.times)]  # fmt: skip
        states, log_times, groups = zip(*rows, strict=True)
        try:
            self.guide.fit(states, np.array(log_times), np.array(groups), steps=self.settings["sim_steps"])
        except SimulatorError as error:
            raise UsageError(f"{self.trials} trials are too few to learn from: {error}") from None
        self.seconds["fit"] += time.perf_counter() - began

    def _practise(self, updates: int, seed: int) -> None:
        began, rollouts = time.perf_counter(), Rollouts(self.env, self.agent, seed)
        for _ in range(updates):
            self.agent.update(rollouts.collect(STEPS)[0])
        self.seconds["practise"] += time.perf_counter() - began
        for part, seconds in rollouts.seconds.items():
            self.seconds[part] += seconds

    def check(self, trials: int) -> None:
        """The policy's own schedules of training kernels become known, until there are so many trials.

        Greedy ones come first, then drawn ones, then, where these are known already, the next of the seed's draw.
        """
        policy = itertools.islice(self.answers(self.recorded.task("train", self.renderer)), 1 + self.settings["draws"])
        chosen = itertools.chain.from_iterable(answer.items() for answer in policy)
        turns = sorted((turn, e.kernel.key, s) for e in self.drawn.entries["train"] for turn, s in enumerate(e.times))
        for key, schedule in itertools.chain(chosen, ((key, schedule) for _, key, schedule in turns)):
            if self.trials == trials:
                break
            self.known.by_key[key].times[schedule] = self.recorded.by_key[key].times[schedule]

    def answers(self, task: Task) -> Iterator[Choice]:
        """What it would do with each kernel of a task: greedily first, then drawn, over and over."""
        if self.arm != "simulator":
            yield play(self.agent, KIND, task, 0.0)
            while True:
                yield play(self.agent, KIND, task, 1.0)
        ranked = {}
        for kernel in task.kernels:
            states = states_of(task, kernel, self.recorded.by_key[kernel.key].times)
            ranked[kernel.key] = [states[i].schedule for i in np.argsort(self.potential(states), kind="stable")]
        for turn in itertools.count(-1):
            yield {key: order[min(max(turn, 0), len(order) - 1)] for key, order in ranked.items()}


def states_of(task: Task, kernel: Kernel, schedules: Iterable[Schedule]) -> list[State]:
    return [after(task.root(kernel), schedule) for schedule in schedules]


def run_one(arm: str, trials: int, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train one student and judge it. The scores are those of `Recorded.score`, one a held-out kernel."""
    recorded, renderer = recordings(), renderer_of(default_device())
    student = Student(recorded, renderer, arm, trials, seed, settings)
    student.learn()
    task = recorded.task("held_out", renderer)
    greedy, *drawn = (
        [recorded.score(kernel, answer[kernel.key]) for kernel in task.kernels]
        for answer in itertools.islice(student.answers(task), 1 + settings["draws"])
    )
    return {"agent": arm, "trials": trials, "seed": seed, "greedy": greedy, "drawn": np.max(drawn, axis=0).tolist(),
            "seconds": dict(student.seconds)}  # fmt: skip


def summarise_all(rows: Sequence[dict[str, Any]], arms: Sequence[str]) -> dict[str, Any]:
    """For each number of trials what agents.summarise says of each arm, and its probability of improvement over replay."""
    found = {}
    for trials in sorted({row["trials"] for row in rows}):
        here = [row for row in rows if row["trials"] == trials]
        found[str(trials)] = summary = summarise(here, arms)
        for arm, kind in itertools.product(summary if "replay" in arms else (), ("greedy", "drawn")):
            pair = scores_of(here, arm, kind), scores_of(here, "replay", kind)
            summary[arm][f"{kind} over replay"] = vars(bootstrap(improvement, *pair))
    return found


def table_rows(figures: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of result.json's figures: a row for each number of trials and arm, intervals in brackets."""
    summary = figures["summary"]
    kinds = list(next(iter(next(iter(summary.values())).values())))
    rows = [[trials, arm, *(str(Estimate(**v)) for v in row.values())]
            for trials, arms in summary.items() for arm, row in arms.items()]  # fmt: skip
    return ["trials", "arm", *kinds], rows


def speed(rows: Sequence[dict[str, Any]], arm: str, env_steps: int) -> str:
    """For people: environment steps a second of an arm, and seconds of each part of a job (median)."""
    spent = [row["seconds"] for row in rows if row["agent"] == arm and "practise" in row["seconds"]]
    if not spent:
        return ""
    median = {part: float(np.median([seconds[part] for seconds in spent])) for part in spent[0]}
    parts = ", ".join(f"{part} {value:.1f}" for part, value in median.items())
    return f"{arm}: {env_steps / median['practise']:.0f} environment steps a second; seconds: {parts}"


def compare(session: Session, settings: dict[str, Any]) -> dict[str, Any]:
    """All arms, numbers of trials and seeds, and the table."""
    check_types(DEFAULTS, settings)
    check_names("arm", settings["arms"], ARMS)
    check_counts(settings, "seeds", "env_steps", "hidden", "sim_steps", "draws", "processes")
    check_env_steps(settings["env_steps"])
    if not settings["trials"] or not all(type(trials) is int for trials in settings["trials"]):
        raise UsageError("bad setting trials: it is a list of whole numbers, like [250, 500]")
    if not settings["check_share"] < 1:
        raise UsageError(
            f"bad setting check_share: {settings['check_share']} leaves no trials to learn from: name a share below 1"
        )
    for trials in settings["trials"]:
        recordings().draw("train", trials, 0)  # so many that there are not are refused before hours are spent
    jobs = list(itertools.product(settings["arms"], settings["trials"], range(settings["seeds"])))
    jobs.sort(key=lambda job: job[2])  # seed by seed: a run that is stopped leaves whole comparisons
    rows = run_jobs(run_one, jobs, settings, session.out, "imagination")
    figures = {"summary": summarise_all(rows, settings["arms"]), "references": references(),
               "rows": [without(row, "seconds") for row in rows],
               "settings": without(settings, "part", "processes")}  # fmt: skip
    head, lines = table_rows(figures)
    for line in (head, *lines):
        print("".join(f"{cell:{24 if i > 1 else 20}}" for i, cell in enumerate(line)))
    for arm in settings["arms"]:
        if text := speed(rows, arm, settings["env_steps"]):
            print(text)
    return figures


@experiment.main
def run(_run: Run, _config: dict[str, Any]) -> dict[str, Any]:
    return finished(_run, _config, compare)["summary"]


if __name__ == "__main__":
    sys.exit(command_line(experiment, sys.argv[1:]))
