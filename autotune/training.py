"""Training, without any logging framework: measure, fit the simulator, let PPO practise in it, check on hardware, repeat.

PPO's episodes are scored by the simulator (imagination), on the exact dynamics and the full action space. From time to
time the policy's own schedules of training kernels are measured, committed, and the simulator is fitted again to all
trials, so that what it believes wrongly of the schedules that the policy likes does not last.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from agents.learner import Diverged
from agents.ppo import PPO, PPOConfig
from agents.rollout import Rollouts
from autotune.collect import collect_kernel, commit_one
from autotune.compiler import Renderer
from autotune.data import Dataset
from autotune.env import REMEMBERED, KernelVectorEnv, Task
from autotune.episodes import Seen, sample_episodes
from autotune.errors import TrainingError
from autotune.guide import Guide
from autotune.kernel import Kernel, Schedule
from autotune.measuring.runner import Measurer, known_of
from autotune.memory import Memory
from autotune.records import Records
from autotune.space import State, root_state
from autotune.world import ROUNDS, World
from sims import EnsembleConfig, SimulatorError, TreesConfig
from sims.heads import HeadsConfig

Log = Callable[[str, float, int], None]  # (metric, value, step)
LEARNING_RATE = 1e-4  # of a policy that has been trained already


class Clock:
    """Decides when phases end, and notes after how many questions; a replay is given those counts in place of time."""

    def __init__(self, recorded: dict[str, int] | None = None):
        self.recorded = recorded
        self.asked: dict[str, int] = {}
        self.ended: dict[str, int] = {}
        self.restart()

    def restart(self) -> None:
        self.started = time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def over(self, phase: str, deadline: float) -> bool:
        """Whether `phase` must end now: `deadline` seconds after the start, or at the recorded count."""
        self.asked[phase] = self.asked.get(phase, 0) + 1
        if self.recorded is not None:
            over = self.asked[phase] == self.recorded.get(phase)
        else:
            over = self.elapsed() >= deadline
        if over:
            self.ended[phase] = self.asked[phase]
        return over


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a training run, with its reason."""

    minutes: float = 20.0  # whole run, the final table included
    seed: int = 0  # of everything random; committee and heads have one of their own where it is named
    measure_share: float = 0.15  # of the time goes to random schedules of training kernels on this device
    measure_share_alone: float = 0.4  # the same where no trials ship for the backend
    train_share: float = 0.66  # of the time is over when PPO ends; the rest is a new world, and the final table
    per_kernel: int = 8  # random trials of each kernel measured here: many kernels with few trials each teach most
    max_kernels: int = 0  # training kernels used at most; 0: all
    use_shipped: bool = True  # start from the trials that ship with the package
    pessimism: float = 0.5  # simulator's spread added to its log-time: PPO must not live off its errors
    validate_every: int = 20  # updates between two validations and checkpoints
    checks: int = 2  # times at most that the policy's schedules are measured and the simulator is fitted again
    check_kernels: int = 12  # training kernels in each check
    check_trials: int = 4  # schedules of each of them
    max_updates: int = 4000  # PPO updates at most
    sim_steps: int = 1500  # of fitting the simulator
    world: str = "linear"  # simulator of paths that the strategy `muzero` plans in, see `world.SIMULATORS`; empty: none
    sequential_updates: int = 0  # PPO updates of a policy that sees what that simulator sees, for `sequential`; 0: none
    keep_world: bool = True  # where the guide that it begins with has such a world already: it stays, and its policy
    draft: bool = False  # a test of the machinery: its checkpoint is used only where it is named
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(entropy=0.02, entropy_end=0.005, lr=5e-4, anneal_updates=600)
    )
    simulator: EnsembleConfig = field(default_factory=EnsembleConfig)
    trees: TreesConfig = field(default_factory=TreesConfig)  # which judge beside the ensemble
    heads: HeadsConfig = field(default_factory=HeadsConfig)  # of the world
    reanalyse: int = ROUNDS  # rounds in which the world's heads learn from their own searches


def gently(config: PPOConfig) -> PPOConfig:
    """To go on from a trained policy: at a rate that does not undo it, and constant, for where a finished training has annealed
    it to nothing, nothing more would be learned."""
    return replace(config, lr=LEARNING_RATE, anneal_updates=0, entropy=config.entropy_end)


class Trainer:
    """One training run over the training and validation splits."""

    # what chooses the schedules that are measured at first, and after how many it hears of them
    strategy, batch = "random", 64

    def __init__(self, config: TrainConfig, kernels: dict[str, list[Kernel]], data: Dataset, records: Records,
                 measurer: Measurer, renderer: Renderer, device: str, out: Path, clock: Clock, log: Log,
                 guide: Guide | None = None, label: str = ""):  # fmt: skip
        self.label = label  # of its trials in the records, before what made them: "finetune/"
        self.config, self.data, self.records, self.measurer = config, data, records, measurer
        self.renderer, self.device, self.out, self.clock, self.log = renderer, device, out, clock, log
        order = np.random.default_rng(config.seed).permutation(len(kernels["train"]))
        self.train_kernels = [kernels["train"][i] for i in order][: config.max_kernels or None]
        self.validation = [root_state(k, renderer) for k in kernels["validation"]]
        self.guide = guide or Guide.new(
            self.train_kernels[0], renderer, config.ppo, config.simulator, config.trees, config.seed
        )
        self.rng = np.random.default_rng([config.seed, 1])
        self.seen: Seen = {}
        self.best = float("-inf")
        self.earlier: Guide | None = None  # the best of the run that is resumed
        self.trials = 0
        self.fitting = 0.0  # seconds that the last fit took, or what else must be kept back for a check
        self.finished = False  # whether checkpoints have all their parts
        self.serves = True  # whether `find_checkpoint` may take them; no longer where they are slower than what ships

    @property
    def left(self) -> str:
        """What is said of a training that broke off."""
        return f"; {self.out / 'best'} is the best until then"

    @property
    def seconds(self) -> float:
        return 60.0 * self.config.minutes

    def run(self) -> dict[str, Any]:
        """All phases; returns figures that depend on nothing but the measurements and the seed. Raises TrainingError."""
        self.bar = tqdm(total=round(self.config.train_share * self.seconds), desc="training", unit="s")
        with self.bar:
            self.measure()
            fitted = self.fit()
            try:
                updates = self.practise()
                self.learn_world()
            except (Diverged, SimulatorError) as error:
                raise TrainingError(f"the training came to nothing: {error}{self.left}") from None
            self.remember()
        self.save("last")
        return {"rows": len(self.data), "trials": self.trials, "updates": updates, "validation": self.best, **fitted}

    def _tick(self, note: str) -> None:
        """Move the bar to the time that has passed."""
        self.bar.n = min(self.bar.total, round(self.clock.elapsed()))
        self.bar.set_postfix_str(note)

    def measure(self) -> None:
        """Schedules of training kernels on this device."""
        for kernel in self.train_kernels:
            if self.clock.over("measure", self.config.measure_share * self.seconds):
                break
            self.trials += collect_kernel(
                kernel,
                self.records,
                self.measurer,
                self.device,
                self.config.per_kernel,
                self.config.seed,
                self.strategy,
                self.batch,
                self.guide,
                label=f"{self.label}{self.strategy}",
            )
            self._learn_of(kernel)
            self._tick(f"{self.trials} trials measured")

    def _learn_of(self, kernel: Kernel) -> None:
        history = self.records.history(kernel.key, self.measurer.fingerprint)
        self.data.add(kernel, history.good, self.measurer.fingerprint)  # what was refuted is no example

    def fit(self) -> dict[str, float]:
        """Learn from all trials so far what a schedule's time is; figures of that. Raises TrainingError."""
        log_times, groups = self.data.arrays()
        began = self.clock.elapsed()
        self._tick(f"fitting the simulator to {len(self.data)} trials")
        try:
            metrics = self.guide.fit(self.data.states, log_times, groups, steps=self.config.sim_steps)
        except SimulatorError as error:
            raise TrainingError(
                f"the simulator could not be fitted ({error}); where trials are too few, give it more minutes"
            ) from None
        self.fitting = self.clock.elapsed() - began
        for name in ("oob_pairwise", "value_loss", "rank_loss"):
            self.log(f"simulator.{name}", metrics[name], self.guide.agent.updates)
        return {"oob_pairwise": metrics["oob_pairwise"]}

    def potential(self, states: Sequence[State]) -> np.ndarray:
        """Pessimistic log2 time [N], relative to the un-optimized kernel."""
        members = self.believed(states)
        return members.mean(0) + self.config.pessimism * members.std(0)

    def believed(self, states: Sequence[State]) -> np.ndarray:
        """Each member's log2 time [M, N], relative to the un-optimized kernel."""
        return self.guide.members(states)

    def practise(self) -> int:
        """PPO in the simulator, with hardware checks at even distances, but none that would end late; returns the number of updates."""
        config, agent = self.config, self.guide.agent
        task = Task(self.train_kernels, self.renderer, potential=self.potential, masked=agent.config.masked)
        env = KernelVectorEnv(task, agent.config.n_envs)
        rollouts = Rollouts(env, agent, config.seed)
        begin, end = self.clock.elapsed(), config.train_share * self.seconds
        checks = 0
        if self.earlier is not None:
            self.save("best", self.earlier)
            self.judge_again()
        self.validate()
        while agent.updates < config.max_updates and not self.clock.over("train", end):
            rollout, episodes = rollouts.collect(agent.config.steps)
            metrics = agent.update(rollout)
            if episodes:
                self.log("return", float(np.mean([e.total for e in episodes])), agent.updates)
                self.log("length", float(np.mean([e.length for e in episodes])), agent.updates)
            for name, value in metrics.items():
                self.log(f"ppo.{name}", value, agent.updates)
            if agent.updates % config.validate_every == 0:
                self.validate()
            self._tick(f"update {agent.updates}, validation {self.best:.2f}")
            due = begin + (end - begin) * (checks + 1) / (config.checks + 1)
            if checks < config.checks and self.clock.over(f"check{checks}", due):
                checks += 1
                if not self.clock.over(f"late{checks}", end - self.fitting):
                    self.check()
                    rollouts = Rollouts(env, agent, config.seed + checks)
        self.validate()
        return agent.updates

    def validate(self) -> None:
        """Greedy imagined return on validation kernels decides which checkpoint is the best one."""
        score = self._score(self.guide.agent)
        self.log("validation", score, self.guide.agent.updates)
        self.save("last")
        if score > self.best:
            self.best = score
            self.save("best")

    def _score(self, agent: PPO) -> float:
        n = agent.config.n_envs
        rng = np.random.default_rng(self.config.seed)
        if len(self.seen) > REMEMBERED:
            self.seen.clear()
        ends: list[State] = []
        for i in range(0, len(self.validation), n):
            chunk = self.validation[i : i + n]  # of a short one the episodes begin again: each kernel counts once
            ends += [p[-1] for p in sample_episodes(agent, chunk, rng, 0.0, self.seen)[: len(chunk)]]
        return float(-self.potential(ends).mean())

    def judge_again(self) -> None:
        """Scores of two simulators cannot be compared: the best policy so far gets the one that was just fitted, and its score."""
        best = Guide.load(self.out / "best")
        best.simulator = self.guide.simulator
        self.best = self._score(best.agent)
        self.save("best", best)

    def check(self) -> None:
        """Measure what the policy would do with some training kernels, and fit the simulator to all trials again."""
        picked = self.rng.choice(
            len(self.train_kernels), min(self.config.check_kernels, len(self.train_kernels)), replace=False
        )
        errors = []
        for kernel in (self.train_kernels[i] for i in picked):
            history = known_of(self.records, self.measurer, kernel)
            if not history.runs:
                continue
            root = root_state(kernel, self.renderer)
            known = {t.schedule for t in history.trials} | {()}
            ends: dict[Schedule, State] = {}
            for temperature in (0.0, 1.0):
                for path in sample_episodes(self.guide.agent, [root], self.rng, temperature, {}):
                    if path[-1].schedule not in known:
                        ends.setdefault(path[-1].schedule, path[-1])
            chosen = list(ends)[: self.config.check_trials]
            if chosen:
                label, seed = f"{self.label}policy", self.config.seed
                done = functools.partial(commit_one, self.records, self.measurer, kernel, label, seed)
                trials = self.measurer.measure(kernel, chosen, None, done)
                self.trials += len(trials)
                errors += [t.verdict != "ok" for t in trials]
            self._learn_of(kernel)
        self.log("check.failed", float(np.mean(errors)) if errors else 0.0, self.guide.agent.updates)
        self.fit()
        self.judge_again()

    def learn_world(self) -> None:
        """A world of all trials, and its own policy, into the guide and into the best checkpoint."""
        config = self.config
        kept = config.keep_world and not config.sequential_updates
        if not config.world or (kept and self.guide.world is not None and self.guide.world.kind == config.world):
            return
        self._tick(f"learning a world ({config.world})")
        world = self.guide.world = World.learn(
            config.world, self.data, config.seed, config.reanalyse, heads=config.heads
        )
        if config.sequential_updates:
            self._practise_in(world)
        best = Guide.load(self.out / "best")
        best.world = world
        self.save("best", best)

    def remember(self) -> None:
        """The fastest schedules of all trials, into the guide and into the best checkpoint, which is served from now on."""
        best = Guide.load(self.out / "best")
        self.finished = True
        best.memory = self.guide.memory = Memory.learn(self.data)
        self.save("best", best)

    def _practise_in(self, world: World) -> None:
        """PPO for the policy that sees what the world's simulator sees, rewarded as the other one."""
        own = self.guide.agent.config  # a checkpoint holds one shape for both policies
        agent = world.new_agent(replace(self.config.ppo, hidden=own.hidden, memory=own.memory, masked=own.masked))
        task = Task(
            self.train_kernels, self.renderer, potential=self.potential, sees=world.view, masked=agent.config.masked
        )
        rollouts = Rollouts(KernelVectorEnv(task, agent.config.n_envs), agent, self.config.seed)
        for _ in range(self.config.sequential_updates):
            rollout, episodes = rollouts.collect(agent.config.steps)
            agent.update(rollout)
            if episodes:
                self.log("sequential.return", float(np.mean([e.total for e in episodes])), agent.updates)
            self._tick(f"sequential update {agent.updates}")

    def save(self, name: str, guide: Guide | None = None) -> None:
        guide = guide or self.guide
        about = {"backend": self.device, "draft": self.config.draft, "finished": self.finished, "serves": self.serves,
                 "updates": guide.agent.updates, "validation": self.best}  # fmt: skip
        guide.save(self.out / name, about, moments=name == "last")
