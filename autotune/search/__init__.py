"""Strategies, one small file each: `ask(count)` gives new schedules to measure, `tell(trials)` hears what became of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from autotune.compiler import Renderer
from autotune.errors import TRAIN, UsageError
from autotune.guide import Guide
from autotune.kernel import Kernel, Schedule
from autotune.records import Trial
from autotune.search.beam import BeamSearch
from autotune.search.evolution import EvolutionSearch
from autotune.search.latent import LatentSearch
from autotune.search.mixed import MixedSearch
from autotune.search.planner import PlannerSearch
from autotune.search.policy import PolicySearch
from autotune.search.random import RandomSearch
from autotune.search.recall import RecallSearch
from autotune.search.sequential import SequentialSearch
from autotune.search.tree import TreeSearch
from autotune.search.value import FilterSearch, ValueSearch


class Strategy(Protocol):
    def ask(self, count: int) -> list[Schedule]:
        """Up to `count` schedules to measure, none twice; fewer, or none, where it has no more for now."""
        ...

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take in what became of schedules: baselines, whose schedule may be empty, trials, and what others had measured."""
        ...


Factory = Callable[[Kernel, Renderer, int, Guide | None], Strategy]


def _guided(search: type[PolicySearch] | type[RecallSearch]) -> Factory:
    def make(kernel: Kernel, renderer: Renderer, seed: int, guide: Guide | None) -> Strategy:
        if guide is None:
            raise UsageError(f"this strategy needs a checkpoint: run `{TRAIN}`, or name one")
        return search(kernel, renderer, seed, guide)

    return make


POOLED = "auto"  # as `mixed`, but that the tuner spends the trials of all kernels where they pay most
LED: dict[str, type[PolicySearch] | type[RecallSearch]] = {
    POOLED: MixedSearch,
    "mixed": MixedSearch,
    "planner": PlannerSearch,
    "policy": PolicySearch,
    "value": ValueSearch,
    "filter": FilterSearch,
    "muzero": LatentSearch,
    "sequential": SequentialSearch,
    "recall": RecallSearch,
}
STRATEGIES: dict[str, Factory] = {
    **{name: _guided(search) for name, search in LED.items()},
    "random": lambda kernel, renderer, seed, guide: RandomSearch(kernel, renderer, seed),
    "ucb": lambda kernel, renderer, seed, guide: TreeSearch(kernel, renderer, seed),
    "beam": lambda kernel, renderer, seed, guide: BeamSearch(kernel, renderer, seed),
    "evolution": lambda kernel, renderer, seed, guide: EvolutionSearch(kernel, renderer, seed),
    "greedy": lambda kernel, renderer, seed, guide: TreeSearch(kernel, renderer, seed, exploration=0.0),
}
NEEDS_GUIDE = set(LED)
DEFAULT = POOLED


def origin_of(strategy: Strategy, schedule: Schedule) -> str:
    """Which part of a strategy proposed a schedule; empty where it has but one."""
    return strategy.origins.get(schedule, "") if isinstance(strategy, MixedSearch) else ""


def promise_of(strategy: Strategy, count: int) -> float | None:
    """How many log2 units `count` more trials are believed to gain; None where a strategy cannot say."""
    return strategy.promise(count) if isinstance(strategy, MixedSearch) else None


def make_strategy(name: str, kernel: Kernel, renderer: Renderer, seed: int, guide: Guide | None) -> Strategy:
    """Raises UsageError for an unknown name, or where a checkpoint is needed and there is none."""
    if name not in STRATEGIES:
        raise UsageError(f"unknown strategy {name!r}; choose one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name](kernel, renderer, seed, guide)
