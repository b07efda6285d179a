"""`mixed` with one part taken away, another acquisition or another simulator, and `planner` with more or fewer simulations: what is
each part worth?

A part that is taken away is replaced by chance where the search cannot do without: schedules drawn evenly in place of the
policies' and choices drawn evenly in place of the simulator's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from autotune.compiler import Renderer
from autotune.errors import UsageError
from autotune.guide import Guide, relative
from autotune.kernel import Kernel, Schedule
from autotune.search.latent import beliefs_of
from autotune.search.mixed import MixedSearch
from autotune.search.planner import PlannerSearch
from autotune.search.random import random_path
from autotune.space import State
from sims import PathSimulator

SIMULATIONS = (0, 4, 16, 50)  # of each action of the planner; with 0 it draws from the policy


class WithoutPolicy(MixedSearch):
    """Episodes drawn evenly, as many as the policy draws; none of the policies' own choices."""

    directs = False

    def episodes(self, starts: Sequence[State], temperature: float | np.ndarray) -> list[list[State]]:
        count = self.guide.agent.config.n_envs
        return [random_path(starts[i % len(starts)], self.rng) for i in range(count)]


class WithoutSimulator(MixedSearch):
    """Of the pool any, as it comes."""

    def _chosen(self, count: int) -> list[Schedule]:
        candidates = self._candidates()
        drawn = self.rng.permutation(len(candidates))[:count]
        schedules = [candidates[i].schedule for i in drawn]
        self.seen.update(schedules)
        return schedules

    def promise(self, count: int) -> None:
        """Nor does it say where trials pay."""
        return None


class WithNets(MixedSearch):
    """All of the committee is asked: nets and trees."""

    def _members(self, states: Sequence[State]) -> np.ndarray:
        return self.guide.members(states)


class OnlyNets(MixedSearch):
    """Of the committee the nets are asked, not the trees."""

    def _members(self, states: Sequence[State]) -> np.ndarray:
        return self.guide.members(states, self.guide.simulator.nets)


class WithoutCorrection(MixedSearch):
    """Trials tell how fast the kernel is as a whole, and nothing of one schedule from another."""

    def _errors(self, candidates: list[State]) -> np.ndarray:
        if not self.measured:
            return np.zeros((1, len(candidates)))
        residual = np.array([t for _, t in self.measured]) - self._members([s for s, _ in self.measured])  # [M, K]
        return residual.mean(1, keepdims=True)


class WithoutDirect(MixedSearch):
    """Everything that is measured was chosen by the simulator, or bred blindly."""

    directs = False


class WithoutBreeding(MixedSearch):
    """No children, neither chosen nor blind."""

    def _breed(self, count: int) -> list[State]:
        return []


class WithoutEven(MixedSearch):
    """The simulator chooses only among what policies, breeding and memory propose."""

    def _draw_evenly(self, count: int) -> None:
        pass


class WithoutAway(MixedSearch):
    """The last choice of a batch is believed like any other, however much it resembles what was measured."""

    away = None


class WithoutCrowding(MixedSearch):
    """The choices of a batch may be as like each other as they will."""

    crowding = 0.0


class ByBound(MixedSearch):
    """Of candidates those of the least lower confidence bounds are chosen, in place of Thompson sampling."""

    acquisition = "ucb"


class ByMean(MixedSearch):
    """Of candidates those of the least means are chosen."""

    acquisition = "greedy"


class WithoutRelatives(MixedSearch):
    """Trials of other kernels do not correct the simulator; their fastest schedules are recalled all the same."""

    def __init__(self, kernel: Kernel, renderer: Renderer, seed: int, guide: Guide):
        super().__init__(kernel, renderer, seed, guide)
        self.relatives.memory = None


class WithoutMemory(MixedSearch):
    """Nothing is recalled of other kernels; their trials correct the simulator all the same."""

    def __init__(self, kernel: Kernel, renderer: Renderer, seed: int, guide: Guide):
        super().__init__(kernel, renderer, seed, guide)
        self.recall.memory = None


class OtherSimulator(MixedSearch):
    """Another simulator is asked in place of the trees. How alike two schedules are, for the correction, the trees still say."""

    def __init__(self, kernel: Kernel, renderer: Renderer, seed: int, guide: Guide, simulator: PathSimulator):
        super().__init__(kernel, renderer, seed, guide)
        self.simulator = simulator
        self.predicted: dict[tuple[str, Schedule], np.ndarray] = {}

    def _members(self, states: Sequence[State]) -> np.ndarray:
        """As `muzero` has it: draws from the simulator's belief about each schedule, for one that has members tells no more of them."""
        return relative(states, self.predicted, lambda missing: beliefs_of(self.simulator, missing, self.rng))


Make = Callable[[Kernel, Renderer, int, Guide], MixedSearch]
ABLATIONS: dict[str, Make] = {
    "no-policy": WithoutPolicy,
    "no-simulator": WithoutSimulator,
    "with-nets": WithNets,
    "only-nets": OnlyNets,
    "no-correction": WithoutCorrection,
    "no-direct": WithoutDirect,
    "no-breeding": WithoutBreeding,
    "no-memory": WithoutMemory,
    "no-relatives": WithoutRelatives,
    "no-even": WithoutEven,
    "no-away": WithoutAway,
    "no-crowding": WithoutCrowding,
    "acquisition-ucb": ByBound,
    "acquisition-greedy": ByMean,
    **{f"planner-{n}": partial(PlannerSearch, simulations=n) for n in SIMULATIONS},
}


def ablated(name: str, kernel: Kernel, renderer: Renderer, seed: int, guide: Guide | None) -> MixedSearch:
    """Raises UsageError where there is no checkpoint to take a part from."""
    return ABLATIONS[name](kernel, renderer, seed, needed(name, guide))


def needed(name: str, guide: Guide | None) -> Guide:
    """The guide. Raises UsageError where there is none."""
    if guide is None:
        raise UsageError(f"{name} needs a checkpoint: name one with `checkpoint=`")
    return guide
