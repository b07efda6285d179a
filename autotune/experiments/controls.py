"""Strategies that exist only to be held against ours: `ranker`, `recipe` and `mixed` led by other simulators, learned from the trials
that ship, and ours with one part taken away (`ablations.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from autotune.compiler import Renderer
from autotune.data import Dataset, shipped_trials
from autotune.errors import UsageError
from autotune.experiments.ablations import ABLATIONS, OtherSimulator, ablated, needed
from autotune.features import summary
from autotune.guide import Guide
from autotune.kernel import Kernel, Schedule
from autotune.paths import ROOFLINE, paths_from
from autotune.records import Trial
from autotune.search import Strategy, make_strategy
from autotune.search.random import RandomSearch
from autotune.space import ACTIONS, MAX_STEPS, STOP_INDEX, after, legal_mask, root_state, step
from autotune.world import SIMULATORS
from sims import Flat, NearestNeighbour, PathSimulator, Roofline, RooflineConfig, Widths

MADE: dict[str, Callable[[Widths, int], PathSimulator]] = {
    "roofline": lambda widths, seed: Flat(widths, Roofline(widths.state, RooflineConfig(ROOFLINE))),
    "nearest": lambda widths, seed: Flat(widths, NearestNeighbour(widths.state)),
    **SIMULATORS,
}
SIMULATED = {f"simulator-{kind}": kind for kind in MADE}  # `mixed`, in which that one is asked in place of the trees
LEARNED = ("ranker", "recipe", *SIMULATED)
CANDIDATES = 256  # random schedules that the ranker puts in order
GRADES = 31  # of relevance: the share of the speed of a kernel's fastest, rounded
ATTEMPTS = 50  # draws from the table without anything new before it counts as exhausted
LIGHTGBM: dict[str, Any] = {"objective": "lambdarank", "n_estimators": 300, "num_leaves": 31, "learning_rate": 0.05, "min_child_samples": 20,
            "lambdarank_truncation_level": 20, "label_gain": list(range(GRADES + 1)), "n_jobs": 2, "random_state": 0,
            "deterministic": True, "force_row_wise": True, "verbose": -1}  # fmt: skip


class Controls:
    """What the controls have learned, each when it is first asked for."""

    def __init__(self, device: str, renderer: Renderer):
        self.device, self.renderer = device, renderer
        self.simulators: dict[str, PathSimulator] = {}  # by kind

    def make(self, name: str, kernel: Kernel, renderer: Renderer, seed: int, guide: Guide | None) -> Strategy:
        """As `make_strategy`, which is asked for all other names."""
        if name == "ranker":
            return RankerSearch(kernel, renderer, seed, self.ranker)
        if name == "recipe":
            return RecipeSearch(kernel, renderer, seed, self.recipe)
        if name in SIMULATED:
            return OtherSimulator(kernel, renderer, seed, needed(name, guide), self.simulator(SIMULATED[name]))
        if name in ABLATIONS:
            return ablated(name, kernel, renderer, seed, guide)
        return make_strategy(name, kernel, renderer, seed, guide)

    def learn(self, names: Sequence[str]) -> None:
        """Now, whatever of these has to: no search is charged for it."""
        for name in sorted(set(LEARNED) & set(names)):
            if name in SIMULATED:
                self.simulator(SIMULATED[name])
            else:
                getattr(self, name)

    @cached_property
    def trials(self) -> Dataset:
        """All that our own guide has learned from."""
        return shipped_trials(self.device, self.renderer)

    def simulator(self, kind: str) -> PathSimulator:
        """Fitted to all trials, at most once; of seed 0."""
        if kind not in self.simulators:
            paths = paths_from(self.trials)
            simulator = MADE[kind](paths.widths, 0)
            simulator.fit(paths)
            self.simulators[kind] = simulator
        return self.simulators[kind]

    @cached_property
    def ranker(self) -> Any:
        """LambdaRank (Burges 2010) in LightGBM on the summaries of all trials, a query a kernel."""
        try:
            from lightgbm import LGBMRanker
        except ImportError:
            raise UsageError("the ranker needs LightGBM: pip install 'tinygrad-autotune[dev]'") from None
        log_times, groups = self.trials.arrays()
        order = np.argsort(groups, kind="stable")
        features = np.stack([summary(self.trials.states[i]) for i in order])
        sizes = np.unique(groups, return_counts=True)[1]
        return LGBMRanker(**LIGHTGBM).fit(features, grades(log_times[order], groups[order]), group=sizes)

    @cached_property
    def recipe(self) -> np.ndarray:
        """The frequency table [steps, A]: what the fastest schedule of each kernel does at each of its steps, STOP at the end."""
        log_times, groups = self.trials.arrays()
        table = np.zeros((MAX_STEPS + 1, len(ACTIONS)))
        for group in np.unique(groups):
            rows = np.flatnonzero(groups == group)
            schedule = self.trials.states[rows[log_times[rows].argmin()]].schedule
            actions = [ACTIONS.index(opt) for opt in schedule if opt in ACTIONS]
            for at, action in enumerate([*actions, STOP_INDEX][: len(table)]):
                table[at, action] += 1
        return table


def grades(log_times: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Relevance [N] int from log2 seconds [N]: the share of the speed of its kernel's fastest, in GRADES steps."""
    best = np.full(groups.max() + 1, np.inf)
    np.minimum.at(best, groups, log_times)
    return np.rint(GRADES * 2.0 ** (best[groups] - log_times)).astype(int)


class RankerSearch:
    """Random schedules, in the order in which a model puts them (it hears of no trial)."""

    def __init__(self, kernel: Kernel, renderer: Renderer, seed: int, model: Any):
        self.random, self.model, self.root = RandomSearch(kernel, renderer, seed), model, root_state(kernel, renderer)
        self.waiting: list[Schedule] = []

    def ask(self, count: int) -> list[Schedule]:
        """Up to `count` new schedules; fewer, or none, where the space is exhausted."""
        if len(self.waiting) < count and (drawn := self.random.ask(CANDIDATES)):
            scores = self.model.predict(np.stack([summary(after(self.root, s)) for s in drawn]))
            self.waiting += [drawn[i] for i in np.argsort(-scores, kind="stable")]
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken

    def tell(self, trials: Sequence[Trial]) -> None:
        self.random.tell(trials)


class RecipeSearch:
    """The best fixed recipe: at each step the most frequent of the legal actions, whatever the kernel; then samples."""

    def __init__(self, kernel: Kernel, renderer: Renderer, seed: int, table: np.ndarray):
        self.root, self.table = root_state(kernel, renderer), table
        self.rng = kernel.rng(seed)
        self.seen: set[Schedule] = {()}
        self.greedy = True

    def ask(self, count: int) -> list[Schedule]:
        """Up to `count` new schedules; fewer, or none, where many draws bring nothing new."""
        found: list[Schedule] = []
        for _ in range(ATTEMPTS * count):
            schedule = self._draw()
            self.greedy = False
            if schedule not in self.seen:
                self.seen.add(schedule)
                found.append(schedule)
            if len(found) == count:
                break
        return found

    def tell(self, trials: Sequence[Trial]) -> None:
        self.seen.update(t.schedule for t in trials)

    def _draw(self) -> Schedule:
        state = self.root
        for row in self.table:
            weight = np.where(legal_mask(state), row, 0.0)
            if not weight.any():
                break
            action = int(weight.argmax() if self.greedy else self.rng.choice(len(row), p=weight / weight.sum()))
            if action == STOP_INDEX:
                break
            state = step(state, action)
        return state.schedule
