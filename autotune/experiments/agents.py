"""`python -m autotune.experiments.agents`: all agents on recorded kernels, at equal environment steps. No device is measured.

Each agent learns on the kernels of the training split, from its own steps or, where it learns from a log, from as many steps
of random play. It is judged on held-out kernels: by the schedule that it chooses greedily, and by the best of a few that it
draws. `with part=runs/3` goes on from what an earlier run has finished. `docs/agents.md` holds the table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from sacred.run import Run

from agents.rollout import Learner, Rollouts
from agents.zoo import AGENTS, Kind, Settings, teach
from autotune.compiler import default_device, renderer_of
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
from autotune.experiments.jobs import run_jobs
from autotune.kernel import Schedule
from autotune.recorded import Recorded, recorded_path
from autotune.space import MAX_STEPS
from autotune.statistics import Estimate, bootstrap, improvement, iqm

experiment = make_experiment("agents")
DEFAULTS: dict[str, Any] = {
    "agents": list(AGENTS),
    "seeds": 5,
    "env_steps": 16384,  # that each agent sees, whether its own or logged
    "hidden": 64,  # width of all networks
    "draws": 4,  # schedules drawn of each kernel for the second score
    "processes": 2,
    "part": "",  # directory of an earlier run, whose finished jobs are taken over
}  # fmt: skip
experiment.add_config(DEFAULTS)
experiment.add_named_config("fast", {"agents": ["random", "frequency", "ppo-lstm"], "seeds": 2, "env_steps": 1024, "hidden": 8,
                                     "draws": 2, "processes": 1})  # fmt: skip
STEPS, ENVS = 8, 32  # T and B of all rollouts
CONTROLS = ("random", "frequency")  # that every agent is held against


@cache
def recordings() -> Recorded:
    """What is recorded of this device. Raises UsageError where nothing is."""
    return Recorded.load(recorded_path(default_device()))


def play(agent: Learner, kind: Kind, task: Task, temperature: float) -> dict[str, Schedule]:
    """The schedule that an agent chooses for each kernel of a task when it first comes to it; nothing, (), for one that it never
    finished."""
    inner, rounds = KernelVectorEnv(task, ENVS, in_order=True), -(-len(task.kernels) // ENVS)
    Rollouts(kind.wrap(inner), agent).collect(rounds * (MAX_STEPS + 1), temperature)  # by then all have ended
    first = {begun: schedule for begun, (_, schedule, _) in zip(inner.begins, inner.finished, strict=True)}
    return {kernel.key: first.get(i, ()) for i, kernel in enumerate(task.kernels)}


def check_env_steps(env_steps: int) -> None:
    """Raises UsageError for fewer than one update takes."""
    if env_steps < STEPS * ENVS:
        raise UsageError(f"bad setting env_steps: {env_steps} are fewer than the {STEPS * ENVS} of one update")


def run_one(name: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train one agent with one seed and judge it. The scores are those of `Recorded.score`, one a held-out kernel."""
    recorded, renderer, kind = recordings(), renderer_of(default_device()), AGENTS[name]
    env = kind.wrap(KernelVectorEnv(recorded.task("train", renderer), ENVS))
    updates = settings["env_steps"] // (STEPS * ENVS)
    shared = Settings(env.state_dim, env.n_actions, env.action_dim, STEPS, ENVS, settings["hidden"], updates, seed)
    agent = kind.make(shared)
    teach(agent, kind, env, shared)
    task = recorded.task("held_out", renderer)

    def score(temperature: float) -> list[float]:
        chosen = play(agent, kind, task, temperature)
        return [recorded.score(kernel, chosen[kernel.key]) for kernel in task.kernels]

    drawn = np.array([score(1.0) for _ in range(settings["draws"])])
    return {"agent": name, "seed": seed, "greedy": score(0.0), "drawn": drawn.max(0).tolist()}


def scores_of(rows: Sequence[dict[str, Any]], agent: str, kind: str) -> np.ndarray:
    """[seeds, kernels]"""
    return np.array([row[kind] for row in rows if row["agent"] == agent])


def summarise(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """IQM of both scores and probability of improvement over the controls, with intervals, best greedy IQM first."""
    found = {}
    for name in names:
        greedy, drawn = scores_of(rows, name, "greedy"), scores_of(rows, name, "drawn")
        found[name] = {"greedy": vars(bootstrap(iqm, greedy)), "drawn": vars(bootstrap(iqm, drawn))}
        for control in CONTROLS:
            if control in names:
                found[name][f"over {control}"] = vars(
                    bootstrap(improvement, greedy, scores_of(rows, control, "greedy"))
                )
    return dict(sorted(found.items(), key=lambda item: -item[1]["greedy"]["value"]))


def references() -> dict[str, float]:
    """What the scale means on held-out kernels."""
    recorded = recordings()
    entries = recorded.entries["held_out"]
    hand = [(e.times[()] - e.hand_coded) / max(e.times[()] - e.best, 1e-9) for e in entries]
    return {"hand-coded": iqm(np.array([hand])), "un-optimized": 0.0, "best recorded": 1.0}


def compare(session: Session, settings: dict[str, Any]) -> dict[str, Any]:
    """All agents, all seeds, and the table."""
    check_types(DEFAULTS, settings)
    check_names("agent", settings["agents"], AGENTS)
    check_counts(settings, "seeds", "env_steps", "hidden", "draws", "processes")
    check_env_steps(settings["env_steps"])
    jobs = [(name, seed) for seed in range(settings["seeds"]) for name in settings["agents"]]
    rows = run_jobs(run_one, jobs, settings, session.out, "agents")
    summary = summarise(rows, settings["agents"])
    print(table(summary))
    return {"summary": summary, "references": references(), "rows": rows,
            "settings": without(settings, "part", "processes")}  # fmt: skip


def table(summary: dict[str, Any]) -> str:
    """For people: one line an agent, values with their intervals."""
    kinds = list(next(iter(summary.values())))
    lines = [f"{'agent':20}" + "".join(f"{kind:>26}" for kind in kinds)]
    for name, row in summary.items():
        lines.append(f"{name:20}" + "".join(f"{Estimate(**v)!s:>26}" for v in row.values()))
    return "\n".join(lines)


@experiment.main
def run(_run: Run, _config: dict[str, Any]) -> dict[str, Any]:
    return finished(_run, _config, compare)["summary"]


if __name__ == "__main__":
    sys.exit(command_line(experiment, sys.argv[1:]))
