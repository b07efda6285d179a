"""A world learned from trials: a simulator of paths, and heads that say what is legal and likely, to plan in without the
compiler (`sims/latent.py`). The strategy `muzero` searches it; `agents.ppo` can act on what it sees of a schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from agents.ppo import PPO, PPOConfig
from autotune.batch import Batch
from autotune.data import Dataset
from autotune.errors import UsageError
from autotune.features import ACTION_WIDTH, AXIS_WIDTH, observe
from autotune.paths import ROW_WIDTH, TOKEN_KINDS, TOKENS, Prefixes, action_rows, paths_from, paths_of
from autotune.space import ACTION_INDEX, MAX_STEPS, N_ACTIONS, STOP_INDEX, State, root_of
from sims import Ensemble, EnsembleConfig
from sims.base import PathSimulator, SimulatorError
from sims.diffusion import Diffusion, DiffusionConfig
from sims.flat import Flat
from sims.heads import Heads, HeadsConfig
from sims.latent import LatentWorld, reanalyse
from sims.linear import Linear
from sims.paths import Paths, Widths
from sims.transformer import Transformer, TransformerConfig

SIMULATORS: dict[str, Callable[[Widths, int], PathSimulator]] = {
    "linear": lambda widths, seed: Linear(widths),
    "ensemble": lambda widths, seed: Flat(widths, Ensemble(widths.state, EnsembleConfig(seed=seed))),
    "diffusion": lambda widths, seed: Diffusion(widths, DiffusionConfig(seed=seed)),
    "transformer": lambda widths, seed: Transformer(widths, TransformerConfig(seed=seed)),
}
SOFTNESS = 0.25  # log2 units: an action whose best schedule is that much slower is 1/e as likely to be taught
ROUNDS, KERNELS, POSITIONS = 2, 32, 16  # of reanalysis: rounds, kernels of each, positions of each kernel
SIMULATIONS = 16  # of a search from each of them
AFTERWARDS = 200  # steps of the heads after each round


class Positions(NamedTuple):
    """Where heads learn: each distinct prefix of measured schedules."""

    paths: Paths  # [P], each of which ends at its position
    rows: np.ndarray  # [K, A, F] what each action does to each kernel
    mask: np.ndarray  # [P, A] bool, exact
    target: np.ndarray  # [P, A] how likely records would take each action


def positions_of(data: Dataset) -> Positions:
    """An action is taught by the fastest schedule on record that begins with it, STOP by the time where it stops:

        target_a ~ exp(-(t_a - min t) / SOFTNESS),   t in log2 seconds

    Raises SimulatorError where nothing was measured."""
    paths = paths_from(data)
    prefixes = paths.prefixes()
    best = paths.best_below(prefixes)
    known = np.isfinite(best)
    at = np.flatnonzero(known)[np.unique(prefixes[known], return_index=True)[1]]  # each prefix once
    place = np.full(prefixes.max(initial=-1) + 1, -1)
    path, step = at // prefixes.shape[1], at % prefixes.shape[1]
    place[prefixes[path, step]] = np.arange(len(at))
    times = np.full((len(at), N_ACTIONS), np.inf)
    for n, state in enumerate(data.states):
        for t, opt in enumerate(state.schedule):
            parent, action = place[prefixes[n, t]], ACTION_INDEX.get(opt)
            if action is not None and parent >= 0 and known[n, t + 1]:
                times[parent, action] = min(times[parent, action], best[n, t + 1])
        stop = place[prefixes[n, len(state.schedule)]]
        times[stop, STOP_INDEX] = min(times[stop, STOP_INDEX], paths.log_time[n, len(state.schedule)])
    states = _prefix_states(data.states, path, step)
    mask = Batch.of(states).legal_mask()
    times[~mask] = np.inf  # recorded where more was legal, or a hand-coded schedule beyond our limits
    good = np.isfinite(times).any(1)
    times = times[good]
    weight = np.exp(-(times - times.min(1, keepdims=True)) / SOFTNESS)
    roots = {int(k): root_of(data.states[n]) for n, k in enumerate(paths.kernel)}
    rows = np.stack([action_rows(roots[k]) for k in range(len(roots))])
    ends = paths.take(path[good]).cut(step[good])
    return Positions(ends, rows, mask[good], (weight / weight.sum(1, keepdims=True)).astype(np.float32))


def _prefix_states(states: Sequence[State], path: np.ndarray, step: np.ndarray) -> list[State]:
    """The state after `step` actions of the schedule of state `path` [P]; equal ones are one."""
    known = {s.kernel.key: Prefixes(root_of(s)) for s in states}
    return [known[states[n].kernel.key].state(states[n].schedule[:t]) for n, t in zip(path, step, strict=True)]


class World:
    """A simulator of paths with its heads."""

    def __init__(self, kind: str, widths: Widths, seed: int, heads: HeadsConfig | None = None):
        """Raises UsageError for a kind that there is not."""
        if kind not in SIMULATORS:
            raise UsageError(f"unknown simulator {kind!r}; choose one of {', '.join(SIMULATORS)}")
        self.kind, self.widths, self.seed = kind, widths, seed
        self.simulator = SIMULATORS[kind](widths, seed)
        self.heads_config = heads or HeadsConfig(seed=seed)
        self.heads: Heads | None = None
        self.agent: PPO | None = None  # the sequential variant: a policy that sees what the simulator sees

    @staticmethod
    def learn(kind: str, data: Dataset, seed: int, rounds: int = ROUNDS, steps: int | None = None,
              heads: HeadsConfig | None = None) -> World:  # fmt: skip
        """Simulator, then heads, then rounds of reanalysis. `steps` shortens the simulator's training."""
        paths = paths_from(data)
        world = World(kind, paths.widths, seed, heads)
        world.simulator.fit(paths, steps=steps)
        world.teach(positions_of(data), rounds)
        return world

    def teach(self, positions: Positions, rounds: int) -> dict[str, float]:
        """Heads from records, then from their own searches; half of a searched position's target stays what records say,
        since a search knows nothing that the simulator does not."""
        z = self.simulator.embed(positions.paths)
        self.heads = Heads(z.shape[1], N_ACTIONS, ROW_WIDTH, self.heads_config)
        kernel, target = positions.paths.kernel, positions.target.copy()
        metrics = self.heads.fit(z, kernel, positions.rows, positions.mask, target)
        rng = np.random.default_rng([self.seed, 2])
        for _ in range(rounds):
            for k in rng.choice(np.unique(kernel), min(KERNELS, len(np.unique(kernel))), replace=False):
                at = rng.choice(np.flatnonzero(kernel == k), POSITIONS)
                latent = LatentWorld(self.simulator, self.heads, positions.rows[k], MAX_STEPS)
                found = reanalyse(latent, positions.paths.take(at), positions.mask[at], SIMULATIONS, rng)
                target[at] = 0.5 * positions.target[at] + 0.5 * found
            metrics = self.heads.fit(z, kernel, positions.rows, positions.mask, target, AFTERWARDS)
        return metrics

    def of(self, root: State) -> LatentWorld:
        """One kernel's world."""
        if self.heads is None:
            raise SimulatorError("used before it has learned anything")
        return LatentWorld(self.simulator, self.heads, action_rows(root), MAX_STEPS)

    # *** the sequential variant ***

    def view(self, state: State, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `features.observe`, but the vector is the simulator's embedding."""
        return self.simulator.embed(paths_of([state]))[0], observe(state, mask)[1]

    def new_agent(self, config: PPOConfig) -> PPO:
        """An untrained policy on the simulator's embedding; it becomes this world's."""
        size = self.simulator.embed(_nothing(self.widths)).shape[1]
        self.agent = PPO(size, N_ACTIONS, ACTION_WIDTH, config, self.seed)
        return self.agent

    # *** keeping ***

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything learned: named arrays, and meta data that is JSON."""
        if self.heads is None:
            raise SimulatorError("used before it has learned anything")
        arrays = {f"simulator.{k}": a for k, a in self.simulator.state().items()}
        arrays |= {f"heads.{k}": a for k, a in self.heads.state().items()}
        meta: dict[str, Any] = {
            "kind": self.kind,
            "seed": self.seed,
            "heads": [self.heads.config.hidden, self.heads.config.key],
            "heads_clip": self.heads.config.clip,
        }
        if self.agent is not None:
            tensors, own = self.agent.state()
            arrays, meta = arrays | {f"agent.{k}": a for k, a in tensors.items()}, meta | {"agent": own}
        return arrays, meta

    @staticmethod
    def load(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], summary: int, ppo: PPOConfig) -> World:
        """The opposite of `state`; `summary` is the width of one. Raises SimulatorError, UsageError, CheckpointError,
        KeyError or ValueError."""
        hidden, key = map(int, meta["heads"])
        clip = float(meta.get("heads_clip", HeadsConfig.clip))  # older worlds do not say
        sizes = HeadsConfig(hidden=hidden, key=key, clip=clip)
        world = World(str(meta["kind"]), widths_of(summary), int(meta["seed"]), sizes)
        parts = {
            p: {k.removeprefix(p): a for k, a in arrays.items() if k.startswith(p)}
            for p in ("simulator.", "heads.", "agent.")
        }
        world.simulator.load_state(parts["simulator."])
        size = world.simulator.embed(_nothing(world.widths)).shape[1]
        world.heads = Heads(size, N_ACTIONS, ROW_WIDTH, world.heads_config)
        world.heads.load_state(parts["heads."])
        if "agent" in meta:
            # it may have practised otherwise than the other policy; older ones do not say
            own = {"masked": PPOConfig.masked, **dict(meta["agent"]["config"])}
            masked = bool(own["masked"])
            world.new_agent(replace(ppo, masked=masked)).load_state(parts["agent."], meta["agent"])
        return world


def widths_of(summary: int) -> Widths:
    """Those of all paths in this program, whose summaries have so many numbers."""
    return Widths(TOKENS, TOKEN_KINDS + AXIS_WIDTH, MAX_STEPS, ROW_WIDTH, summary)


def _nothing(w: Widths) -> Paths:
    """One path of zeros."""
    return Paths(np.zeros((1, w.tokens, w.token)), np.ones((1, w.tokens), bool), np.zeros(1), np.zeros((1, w.steps, w.action)),
                 np.zeros((1, w.steps + 1, w.state)), np.zeros(1), np.full((1, w.steps + 1), np.nan))  # fmt: skip
