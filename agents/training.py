"""The loop around an agent: it collects, updates, logs, saves, mends heads and stops by itself.

A run is equal to the bit to one that was interrupted and resumed. Environments cannot be saved, so at every checkpoint
all runs alike drop the episodes in progress and begin new ones, with a seed made of (seed, updates)."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from agents import checkpoint
from agents.checks import check_inside
from agents.learner import Diverged, LearnerConfig
from agents.protocol import VectorEnv
from agents.rollout import Episode, Learner, Rollout, Rollouts

Log = Callable[[str, float, int], None]  # (metric, value, update)
HEADS = {  # head -> the metric that shows its health, and how its parameters' names begin
    "value": ("explained_variance", ("value.",)),
    "policy": ("return", ("policy.", "pointer.")),
}


@dataclass(frozen=True)
class TrainingConfig:
    """When a run saves, when it stops, and what it mends. Raises ValueError for a number out of its range."""

    max_steps: int = 200_000  # environment steps at most, of all copies together; whole updates only
    checkpoint_every: int = 100  # updates; far more than an episode takes, since those in progress are dropped there
    window: int = 100  # episodes whose mean return is the score; at least 30, see `converged`
    patience: int = 5  # windows in a row that show no improvement, after which it has converged; 0 = never stop early
    alpha: float = 0.1  # what counts as improvement: a p-value up to it. Larger stops later, and less often wrongly
    min_steps: int = 0  # environment steps before which nothing has converged, such as the length of an annealing
    reset_value_after: int = 0  # updates without a better explained variance until the value head is reset; 0 = never
    reset_policy_after: int = 0  # updates without a better mean return until the policy head is reset; 0 = never
    max_resets: int = 1  # of each head: one that has learned all there is to learn does not improve either
    seed: int = 0  # of the environments' episodes, and of heads that are reset

    def __post_init__(self) -> None:
        positive = {"max_steps": 1, "checkpoint_every": 1, "window": 30}  # all others may be 0
        for key, value in asdict(self).items():
            if value < positive.get(key, 0):
                raise ValueError(f"{key} must be at least {positive.get(key, 0)}, not {value}")
        check_inside(self, "alpha")


class Result(NamedTuple):
    stopped: str  # "max_steps" or "converged"
    updates: int
    steps: int  # environment steps, of all copies together
    score: float  # mean return of the last `window` episodes; NaN where none ended
    best: float  # the best score at a checkpoint; -infinity where there was none


# *** convergence ***


def no_rise(before: np.ndarray, after: np.ndarray) -> float:
    """p-value of "the mean has not risen", one-sided (Welch 1947); small where it has. Samples [N] and [M].

    t = (mean_a - mean_b) / sqrt(s_a^2 / M + s_b^2 / N), with the normal distribution's tail in place of Student's:
    with 30 samples or more, a p-value of 0.105 is taken for 0.1 at worst.
    """
    rise = float(after.mean() - before.mean())
    variance = float(before.var(ddof=1) / len(before) + after.var(ddof=1) / len(after))
    return 0.5 * math.erfc(rise / math.sqrt(2 * variance)) if variance > 0 else float(rise <= 0)


def converged(returns: Sequence[float] | np.ndarray, window: int, patience: int, alpha: float) -> bool:
    """Whether the last patience + 1 whole windows of episode returns show no improvement.

    None of them is significantly better (p <= alpha) than the one before it, nor the last one than the first: a slow
    rise does not show from one window to the next, but adds up. Windows are counted from the first return on, so that
    the answer changes only when one is full.
    """
    whole = len(returns) // window
    if whole <= patience:
        return False
    windows = np.asarray(returns[: whole * window], np.float64).reshape(whole, window)[-patience - 1 :]
    pairs = [*itertools.pairwise(windows), (windows[0], windows[-1])]
    return all(no_rise(before, after) > alpha for before, after in pairs)


@dataclass
class Health:
    """Of a head: the best that its metric has been, for how many updates it has not been better, and resets so far."""

    best: float | None = None
    age: int = 0
    resets: int = 0

    def stalled(self, value: float, patience: int) -> bool:
        """Notes one more value; True where the last `patience` ones were none better."""
        better = self.best is None or value > self.best
        self.best, self.age = (value, 0) if better else (self.best, self.age + 1)
        return self.age >= patience


# *** the loop ***


class Source(Protocol):
    """Where rollouts come from: Rollouts, or a log."""

    seconds: dict[str, float]

    def collect(self, steps: int) -> tuple[Rollout, list[Episode]]: ...


class Logged:
    """Rollouts that another agent made."""

    def __init__(self, sample: Callable[[np.random.Generator], Rollout], seed: int):
        self.sample, self.rng, self.seconds = sample, np.random.default_rng(seed), {"sampling": 0.0}

    def collect(self, steps: int) -> tuple[Rollout, list[Episode]]:
        started = time.perf_counter()
        rollout = self.sample(self.rng)
        self.seconds["sampling"] += time.perf_counter() - started
        return rollout, []


class Training:
    """One run of at most `limit` updates. `start(seed)` gives a source whose episodes all begin."""

    def __init__(self, agent: Learner, start: Callable[[int], Source], config: TrainingConfig, limit: int,
                 steps_each: int, out: str | os.PathLike[str] | None, log: Log | None):  # fmt: skip
        self.agent: Any = agent
        self.start, self.config, self.limit, self.steps_each, self.log = start, config, limit, steps_each, log
        self.out = None if out is None else Path(out)
        self.updates, self.best = 0, -math.inf
        self.returns: list[float] = []  # of ended episodes; what no window needs is dropped
        self.health = {head: Health() for head in HEADS}
        for head in HEADS:
            if self._reset_after(head) and not self._parameters(head):
                raise ValueError(f"reset_{head}_after: {self.agent.name} has no {head} head")

    def run(self, resume: bool) -> Result:
        if resume:
            self._load()
        elif self.out is not None and (self.out / "last.safetensors").exists():
            raise FileExistsError(f"{self.out} holds a run already: resume it, or name another directory")
        source: Source | None = None
        while (stopped := self._stop()) is None:
            if source is None or self.updates % self.config.checkpoint_every == 0:
                self._save()
                source = self.start(self._seed())
            self._write(self._update(source))
        self._save()
        return Result(stopped, self.updates, self.updates * self.steps_each, self.score, self.best)

    @property
    def score(self) -> float:
        return float(np.mean(self.returns[-self.config.window :])) if self.returns else math.nan

    def _seed(self) -> int:
        return int(np.random.SeedSequence([self.config.seed, self.updates]).generate_state(1)[0])

    def _stop(self) -> str | None:
        c = self.config
        if c.patience and self.updates * self.steps_each >= c.min_steps:
            if converged(self.returns, c.window, c.patience, c.alpha):
                return "converged"
        return "max_steps" if self.updates >= self.limit else None

    def _update(self, source: Source) -> dict[str, float]:
        """One update, and everything there is to log of it."""
        before = dict(source.seconds)
        rollout, episodes = source.collect(_rollout_steps(self.agent))
        started = time.perf_counter()
        try:
            metrics = self.agent.update(rollout)
        except Diverged as error:
            raise self._diverged(self.updates + 1, str(error)) from error
        spent = {name: total - before[name] for name, total in source.seconds.items()}
        spent["update"] = time.perf_counter() - started
        self.updates += 1
        row = {"steps": self.updates * self.steps_each, "episodes": len(episodes), **metrics}
        if episodes:
            row["return"] = float(np.mean([e.total for e in episodes]))
            row["length"] = float(np.mean([e.length for e in episodes]))
            self._remember([e.total for e in episodes])
        self._mend(row)
        return row | {f"seconds_{name}": value for name, value in spent.items()}

    def _remember(self, totals: list[float]) -> None:
        self.returns += totals
        window = self.config.window
        excess = len(self.returns) // window - self.config.patience - 1
        del self.returns[: max(0, excess) * window]  # whole windows, so that the others keep their bounds

    def _diverged(self, update: int, why: str) -> Diverged:
        last = None if self.out is None else self.out / "last.safetensors"
        good = last if last is not None and last.exists() else "none was kept"
        return Diverged(f"update {update}: {why}; the last good checkpoint: {good}")

    # *** heads ***

    def _reset_after(self, head: str) -> int:
        return getattr(self.config, f"reset_{head}_after")

    def _parameters(self, head: str) -> list[str]:
        parts = getattr(self.agent, "parts", {})
        return [name for name in parts[""].policy.shapes if name.startswith(HEADS[head][1])] if "" in parts else []

    def _mend(self, row: dict[str, float]) -> None:
        """Resets a head that has not improved for long, and notes it in the row as `reset_value` or `reset_policy`."""
        for head, (metric, _) in HEADS.items():
            after, health = self._reset_after(head), self.health[head]
            if not after or health.resets >= self.config.max_resets:
                continue
            if metric not in row:
                if metric == "return":  # no episode has ended in this update
                    continue
                raise ValueError(f"reset_{head}_after: {self.agent.name} does not report {metric}")
            if health.stalled(row[metric], after):
                self.agent.parts[""].reset(self._parameters(head), self._seed())
                self.health[head] = Health(resets=health.resets + 1)
                row[f"reset_{head}"] = 1.0

    # *** files ***

    def _write(self, row: dict[str, float]) -> None:
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "metrics.jsonl").open("a" if self.updates > 1 else "w") as stream:
                stream.write(json.dumps({"update": self.updates, **row}) + "\n")
        if self.log is not None:
            for name, value in row.items():
                self.log(name, value, self.updates)

    def _save(self) -> None:
        """`last`, and `best` where the score beats all those before. Raises Diverged, saving nothing."""
        tensors, meta = self.agent.state()
        if lost := [n for n, array in tensors.items() if "parameter/" in n and not np.isfinite(array).all()]:
            raise self._diverged(self.updates, f"{lost[0]} is not finite")
        better = self.score > self.best
        self.best = self.score if better else self.best
        meta["training"] = {
            "config": asdict(self.config),
            "updates": self.updates,
            "best": self.best,
            "health": {head: asdict(health) for head, health in self.health.items()},
        }
        if self.out is not None:
            tensors["training/returns"] = np.array(self.returns, np.float64)
            for name in ("best", "last") if better else ("last",):
                checkpoint.save(self.out / name, tensors, meta)

    def _load(self) -> None:
        """Goes on from `last`. Raises CheckpointError where there is none, or of other settings or another shape."""
        if self.out is None:
            raise ValueError("resume needs the directory of the run: out")
        tensors, meta = checkpoint.load(self.out / "last", self._complaint)
        self.agent.load_state(tensors, meta)
        saved = meta["training"]
        self.updates, self.best = int(saved["updates"]), float(saved["best"])
        self.returns = tensors.get("training/returns", np.zeros(0)).tolist()
        self.health = {head: Health(**saved["health"][head]) for head in HEADS}
        metrics = self.out / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        metrics.write_text("".join(lines[: self.updates]))  # those after the checkpoint come again

    def _complaint(self, meta: dict[str, Any]) -> str | None:
        """What speaks against going on from this checkpoint. Only `max_steps` may be another one, and of the agent what an older
        checkpoint does not say."""
        if "training" not in meta:
            return "not a checkpoint of a training run"
        saved, own = meta["training"]["config"], self.agent.state()[1]
        pairs = [(key, saved.get(key), ours) for key, ours in asdict(self.config).items() if key != "max_steps"]
        for part in ("config", "wrappers"):
            pairs += [(key, theirs, own.get(part, {}).get(key)) for key, theirs in meta.get(part, {}).items()]
        for key, theirs, ours in pairs:
            if theirs != ours:
                return f"made with {key}={theirs}, so it cannot be resumed with {key}={ours}"
        return None


def _rollout_steps(agent: Any) -> int:
    """T of its rollouts. Agents without a network take any, and do not say."""
    return getattr(agent.config, "steps", LearnerConfig.steps)


def train(agent: Learner, env: VectorEnv, config: TrainingConfig | None = None,
          out: str | os.PathLike[str] | None = None, log: Log | None = None, seed: int | None = None,
          resume: bool = False) -> Result:  # fmt: skip
    """Trains the agent in place until `max_steps` or convergence, and returns how it ended.

    In `out`: metrics.jsonl, a line for each update (the agent's metrics, mean return and length of the episodes that
    ended in it, seconds in environment, inference and update), and the checkpoints `last` and `best`, which hold the
    agent's state as agents.checkpoint.load and agent.load_state read it. `log(name, value, update)` is told the same.
    `seed` stands for the configuration's. With `resume` it goes on from `last`, equal to the bit to a run that was
    never interrupted, if it was not `max_steps` that ended it, or at a multiple of checkpoint_every updates.

    Raises InvalidObservation, CheckpointError (resume), FileExistsError (out holds a run), and Diverged, which names
    the last good checkpoint.
    """
    c = config or TrainingConfig()
    c = c if seed is None else replace(c, seed=seed)
    steps_each = _rollout_steps(agent) * env.n_envs
    if c.max_steps < steps_each:
        raise ValueError(f"max_steps={c.max_steps} is less than one update takes, {steps_each}")
    limit = c.max_steps // steps_each
    return Training(agent, lambda s: Rollouts(env, agent, s), c, limit, steps_each, out, log).run(resume)


def train_offline(agent: Learner, sample: Callable[[np.random.Generator], Rollout], updates: int,
                  config: TrainingConfig | None = None, out: str | os.PathLike[str] | None = None,
                  log: Log | None = None, seed: int | None = None, resume: bool = False) -> Result:  # fmt: skip
    """The same loop for agents that learn from a log: `updates` updates on rollouts that `sample(rng)` gives.

    No episode is played: there is no score, so neither convergence nor `best`, and no return; `max_steps` is not used. Raises
    ValueError for an agent that scales rewards by running returns: rollouts of a log do not go on from one another.
    """
    if getattr(getattr(agent, "normalisation", None), "reward", None) == "scale":
        raise ValueError('rollouts of a log do not go on from one another: normalise rewards by "log", not by "scale"')
    c = config or TrainingConfig()
    c = c if seed is None else replace(c, seed=seed)
    return Training(agent, lambda s: Logged(sample, s), c, updates, 0, out, log).run(resume)
