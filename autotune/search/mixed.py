"""Policy and simulator together (`mixed`; `auto`, the default, spends the trials of all kernels where they pay).

Of each batch a part is what the policies would do themselves, without asking the simulator: the one of `policy` and, where the
guide has one, that of `sequential`, in turn. What one of these models gets wrong the others seldom do. For the rest the
simulator ranks everything that the policy's episodes passed through, corrected by the trials of this kernel so far, with
episodes continued from the best schedules found, children bred from them, and schedules drawn evenly: what the policies would
never do may still be the fastest here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autotune.compiler import Renderer
from autotune.errors import IllegalAction
from autotune.features import summary
from autotune.guide import Guide
from autotune.kernel import Kernel, Schedule
from autotune.records import BASELINES, History, Trial
from autotune.search.acquisition import AWAY, BATCH, CROWDING, choose
from autotune.search.breeding import POPULATION, Breeder
from autotune.search.policy import PolicySearch
from autotune.search.random import random_path
from autotune.search.recall import RecallSearch
from autotune.search.relatives import Relatives
from autotune.search.sequential import SequentialSearch
from autotune.space import State, apply_to_state
from sims.correction import Correction

ROOT_TEMPERATURES = (
    1.0,
    3.0,
    10.0,
)  # of the episodes that `mixed` draws from the root: a confident policy repeats itself
PREFIX_TEMPERATURES = (2.0, 5.0)  # and of those that continue prefixes of the best schedules measured so far
CONTINUED = 3  # fastest schedules whose prefixes are gone on from
EVEN = 128  # schedules drawn evenly that the simulator may choose from, whatever the policies think of them
DIRECT = 0.25  # share of a batch that the policies choose by themselves
CHILDREN = 64  # of the fastest measured, bred for each batch: the policy knows kernels, but not what this one has shown
STALE = 0.03  # log2 units: a batch that gained less gained nothing
DOUBT = 0.125  # share of the rest that is bred blindly, for each batch in a row that gained nothing ...
MOST_DOUBT = 0.5  # ... up to this: where the simulator has nothing more to say, evolution without it has
TAUGHT_BY = ("trial", "answer", *BASELINES)  # kinds of measurements that correct the simulator
FAILURE = 2.0  # log2 units by which a failed schedule pushes back its like
NEAR = 0.5  # scale of the distance, in standardised features, over which schedules count as alike


class MixedSearch(PolicySearch):
    """Policy and simulator together: the policy proposes, the simulator chooses, trials correct it."""

    directs = True  # whether the policies have a share of each batch
    acquisition = "thompson"  # one of `acquisition.KINDS`
    crowding = CROWDING  # how far the choices of a batch keep from each other
    away: float | None = AWAY  # how far its last choice keeps from what was measured

    def __init__(self, kernel: Kernel, renderer: Renderer, seed: int, guide: Guide):
        super().__init__(kernel, renderer, seed, guide)
        self.pool: dict[Schedule, State] = {(): self.root}
        self.origins: dict[Schedule, str] = {}  # which part of the search proposed it first
        self.told: list[Trial] = []
        self.measured: list[tuple[State, float]] = []
        self.failed: list[State] = []
        self.asked: set[Schedule] = set()
        self.tried: set[Schedule] = set()  # whoever asked for them; not the baselines
        self.breeder = Breeder(self.root, self.rng)
        self.stale = 0  # batches in a row that gained nothing
        self.grown = -1  # how much had been measured when the pool last grew; at first it has not
        self.advisors = {"policy": PolicySearch(kernel, renderer, seed, guide, self.root)}
        if guide.world is not None and guide.world.agent is not None:
            self.advisors = {"sequential": SequentialSearch(kernel, renderer, seed, guide, self.root), **self.advisors}
        self.recall = RecallSearch(kernel, renderer, seed, guide, self.root)
        self.relatives = Relatives(self.root, guide.memory)
        self.turns = sorted(self.advisors, key=lambda name: guide.policy_first and name != "policy")

    def ask(self, count: int) -> list[Schedule]:
        """Up to `count` new schedules, which are chosen at least BATCH at a time. The rest waits until it is asked for: what
        one or two trials teach misleads more than it helps, and four that are chosen at once are unlike each other."""
        known = len(self.tried | self.asked)
        least = BATCH - known if known < BATCH else BATCH  # one trial of an earlier run is completed by three
        while (missing := count - len(self.waiting)) > 0 and (chosen := self._batch(max(missing, least))):
            self.waiting += chosen
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        self.asked.update(taken)
        return taken

    def _batch(self, count: int) -> list[Schedule]:
        """Up to `count` schedules: the most promising of the pool, as the acquisition chooses them, and a share that the
        policies choose. The longer nothing was gained, the more are bred blindly."""
        direct = self._direct(int(count * DIRECT)) if self.directs else []
        self._refresh()
        self._breed(CHILDREN)
        blind = self._blind(int((count - len(direct)) * min(MOST_DOUBT, DOUBT * self.stale)))
        chosen = self._chosen(count - len(direct) - len(blind))
        return [*direct, *chosen, *blind] if self._comes_first(direct) else [*chosen, *direct, *blind]

    def _comes_first(self, direct: Sequence[Schedule]) -> bool:
        """Whether these begin with what the policy thinks best, and that is to be tried before what the trees think best."""
        return self.guide.policy_first and list(direct[:1]) == [self.advisors["policy"].greedy]

    def _direct(self, count: int) -> list[Schedule]:
        """What the policies would do by themselves, in turn."""
        asked: list[Schedule] = []
        for _ in range(count):
            self.turns.append(name := self.turns.pop(0))
            while (found := self.advisors[name].ask(1)) and found[0] in self.seen:
                pass  # measured before, whoever proposed it
            if found:
                asked += found
                self.seen.update(found)
                self._state_of(found[0])
                self.origins[found[0]] = name
        return asked

    def _chosen(self, count: int) -> list[Schedule]:
        candidates = self._candidates()
        if not candidates or not count:
            return []
        known = [s for s, _ in self.measured] + self.failed
        chosen = choose(
            self._corrected(candidates),
            lambda i: self._similarity(candidates, [candidates[i]])[:, 0],
            self.rng,
            count,
            self.acquisition,
            known=self._similarity(candidates, known).max(1) if known else None,
            crowding=self.crowding,
            away=self.away,
        )
        schedules = [candidates[i].schedule for i in chosen]
        self.seen.update(schedules)
        return schedules

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take in measured times, the baselines' among them: they correct the simulator for this kernel. Where another search has
        made trials, what waits was chosen without them, and is chosen anew."""
        super().tell(trials)
        self.tried.update(t.schedule for t in trials if t.kind == "trial")
        if self.tried - self.asked:
            self.asked |= self.tried
            self.seen.difference_update(set(self.waiting) - self.tried)
            self.waiting = []
        before = self.fastest
        for trial in trials:
            state = self._state_of(trial.schedule)
            refuted = trial.kind == "recheck" and trial.verdict != "ok"
            if state is None or not (trial.kind in TAUGHT_BY or refuted):
                continue
            if trial.seconds is None:
                self.failed.append(state)
            else:
                self.measured.append((state, math.log2(trial.seconds)))
        self._withdraw(trials)
        if any(trial.kind == "trial" for trial in trials):
            self.stale = 0 if self.fastest < before - STALE else self.stale + 1

    def _withdraw(self, trials: Sequence[Trial]) -> None:
        """What was refuted counts among the failed, and so does all that gives the same binary: its time was that of another program."""
        self.told += trials
        refuted, failed = History(self.told).refuted, {s.schedule for s in self.failed}
        gone = [s for s, _ in self.measured if s.schedule in refuted]
        self.measured = [(s, time) for s, time in self.measured if s.schedule not in refuted]
        self.failed += [s for s in gone if s.schedule not in failed]

    @property
    def fastest(self) -> float:
        """Log2 seconds; infinite where nothing was measured."""
        return min((time for _, time in self.measured), default=math.inf)

    def _state_of(self, schedule: Schedule) -> State | None:
        """From the pool, which is given it with all of its prefixes where it is missing: an earlier run's, or hand-coded.
        None where it is not legal here."""
        state = self.root
        for i, opt in enumerate(schedule):
            known = self.pool.get(schedule[: i + 1])
            try:
                state = known or apply_to_state(state, opt)
            except IllegalAction:
                return None
            self._propose(state, "known")
        return state

    def promise(self, count: int) -> float | None:
        """How many log2 units `count` schedules are believed to gain together, those that wait and the most promising of the
        others: mean over the members of max(0, best measured - fastest of them). None where nothing was measured yet."""
        if not self.measured:
            return None
        if self.grown < 0:
            self._refresh()  # what hand-coded passes through is in the pool already, and is no pool to judge by
        waiting = [self.pool[s] for s in self.waiting[:count]]
        candidates = [*waiting, *self._candidates()]
        if not candidates:
            return 0.0
        members = self._corrected(candidates)  # [M, C]
        others = len(waiting) + np.argsort(members[:, len(waiting) :].mean(0), kind="stable")
        chosen = [*range(len(waiting)), *others][:count]
        return float(np.maximum(self.fastest - members[:, chosen].min(1), 0.0).mean())

    def _candidates(self) -> list[State]:
        return [s for s in self.pool.values() if s.schedule not in self.seen]

    def _breed(self, count: int) -> list[State]:
        """Children of the fastest measured, which join the pool."""
        fastest = [s.schedule for s, _ in sorted(self.measured, key=lambda pair: pair[1])[:POPULATION]]
        children = [self.breeder.child(fastest) for _ in range(count)] if fastest else []
        for child in children:
            self._propose(child, "evolution")
        return children

    def _blind(self, count: int) -> list[Schedule]:
        """Children that no simulator has chosen."""
        new = [c.schedule for c in self._breed(2 * count) if c.schedule not in self.seen]
        taken = list(dict.fromkeys(new))[:count]
        self.seen.update(taken)
        return taken

    def _refresh(self) -> None:
        """Let the pool grow, unless it has done so and nothing was measured since."""
        known = len(self.measured) + len(self.failed)
        if known != self.grown:
            self._grow()
            self.grown = known
            self.looked.clear()  # observations are large, and every kernel of a program has a search

    def _grow(self) -> None:
        """Draw episodes from the root, and from the prefixes of the best schedules measured so far; keep every state, and what is
        recalled. At first as many at each temperature, and evenly, too; later as many at all of them together."""
        for state in self.recall.states():
            self._propose(state, "recall")
        draws: list[tuple[list[State], float | np.ndarray]] = []
        for starts, temperatures in (([self.root], ROOT_TEMPERATURES), (self._continued(), PREFIX_TEMPERATURES)):
            if starts and self.grown >= 0:
                draws.append((starts, np.resize(temperatures, self.guide.agent.config.n_envs)))
            elif starts:
                draws += [(starts, t) for t in temperatures]
        if self.grown < 0:
            self._draw_evenly(EVEN)
        for begin, temperature in draws:
            for path in self.episodes(begin, temperature):
                for state in path:
                    self._propose(state, "policy")

    def _draw_evenly(self, count: int) -> None:
        for _ in range(count):
            for state in random_path(self.root, self.rng):
                self._propose(state, "even")

    def _propose(self, state: State, origin: str) -> None:
        """Into the pool, unless it is there."""
        if state.schedule not in self.pool:
            self.pool[state.schedule], self.origins[state.schedule] = state, origin

    def _continued(self) -> list[State]:
        """All prefixes of the fastest schedules measured so far, as far as they are in the pool; none where nothing was measured."""
        best = sorted(self.measured, key=lambda pair: pair[1])[:CONTINUED]
        prefixes = [state.schedule[:n] for state, _ in best for n in range(len(state.schedule) + 1)]
        return [self.pool[p] for p in prefixes if p in self.pool]

    def _members(self, states: Sequence[State]) -> np.ndarray:
        """What each of several beliefs says of the log2 times of these states [M, N]."""
        return self.guide.believed(states)

    def _corrected(self, candidates: list[State]) -> np.ndarray:
        """Each member's log2 time [M, C], moved by what it got wrong so far; failures push their neighbours back."""
        members = self._members(candidates) + self._errors(candidates)
        if self.failed:
            members = members + FAILURE * self._similarity(candidates, self.failed).max(1)
        return members

    def _errors(self, candidates: list[State]) -> np.ndarray:
        """What each member is expected to get wrong [M, C], from what it got wrong so far, of this kernel and of those like it."""
        return self._moved(self._correction(), candidates)

    def _moved(self, corrected: Correction | None, candidates: Sequence[State]) -> np.ndarray:
        """What a correction says of them [M, C]."""
        return np.zeros((1, len(candidates))) if corrected is None else corrected(self.guide.leaves(candidates)).T

    def _correction(self) -> Correction | None:
        """All trials that are heard; None where there are none."""
        told = self.relatives.told()
        trials = [([s for s, _ in self.measured], [t for _, t in self.measured]), *map(self.relatives.trials, told)]
        known = [s for states, _ in trials for s in states]
        if not known:
            return None
        kernel = np.repeat(np.arange(len(trials)), [len(states) for states, _ in trials])
        residual = np.array([t for _, times in trials for t in times]) - self._members(known)  # [M, K]
        return Correction(self.guide.leaves(known), kernel, residual.T, self.relatives.distance(told))

    def _similarity(self, left: list[State], right: list[State]) -> np.ndarray:
        """exp(-squared distance / NEAR^2) of standardised features [L, R]."""
        a, b = (np.stack([summary(s) for s in states]).astype(np.float64) for states in (left, right))
        spread = np.concatenate([a, b]).std(0) + 1e-3
        a, b = a / spread, b / spread
        squares = (
            (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
        )  # the pool is too large for all differences at once
        return np.exp(-np.maximum(squares, 0.0) / a.shape[1] / NEAR**2)
