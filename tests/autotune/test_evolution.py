"""Evolution of schedules: who its parents are, what its children are, and that it finds more than drawing at random."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
from tiny import add_one, kernel_of
from tinygrad import Tensor

from autotune.compiler import Opt, OptOps, renderer_of
from autotune.kernel import Schedule
from autotune.records import Trial
from autotune.search import NEEDS_GUIDE, make_strategy
from autotune.search.breeding import MUTATIONS, POPULATION, Breeder
from autotune.search.evolution import EvolutionSearch
from autotune.search.random import RandomSearch
from autotune.space import ACTION_INDEX, ACTIONS, State, legal_mask, root_state, step

CPU = renderer_of("CPU")
KERNEL = kernel_of(Tensor.empty(64, 48) @ Tensor.empty(48, 96))
WIDE = kernel_of(Tensor.empty(6, 64, 48) @ Tensor.empty(6, 48, 80))  # more can be done to it
ROOT = root_state(KERNEL, CPU)
A, B, C = Opt(OptOps.UPCAST, 0, 2), Opt(OptOps.UNROLL, 0, 4), Opt(OptOps.UPCAST, 1, 2)
WHOLE = Opt(OptOps.UNROLL, 0, 0)  # legal where at most 32 are left of the sum: after B, but not before


def trial(schedule: Schedule, seconds: float | None, kernel=KERNEL) -> Trial:
    return Trial(kernel.key, schedule, "ok" if seconds else "crashed", (seconds,) if seconds else ())


def play(search: RandomSearch, cost, count: int, batch: int = 4) -> list[Schedule]:
    """What is asked for, in order, when the seconds of a schedule are cost(schedule)."""
    asked: list[Schedule] = []
    while len(asked) < count and (new := search.ask(batch)):
        search.tell([trial(s, cost(s)) for s in new])
        asked += new
    return asked


def legal(state: State) -> list[Opt]:
    return [ACTIONS[a] for a in np.flatnonzero(legal_mask(state)[:-1])]


def replayed(opts: Iterable[Opt]) -> Schedule:
    """What is left of a schedule when each action that is not offered in its turn is left out."""
    state = ROOT
    for opt in opts:
        if opt in legal(state):
            state = step(state, ACTION_INDEX[opt])
    return state.schedule


def rank(schedule: Schedule) -> float:
    return 1 + sum((i + 1) * ACTION_INDEX[o] for i, o in enumerate(schedule)) % 997 / 997


class Watching(Breeder):
    """Remembers who the parents were, and the fastest that they were drawn from."""

    def __init__(self, *args):
        super().__init__(*args)
        self.parents: list[tuple[Schedule, tuple[Schedule, ...]]] = []

    def parent(self, fastest):
        self.parents.append((super().parent(fastest), tuple(fastest)))
        return self.parents[-1][0]


def watched() -> tuple[EvolutionSearch, list[tuple[Schedule, tuple[Schedule, ...]]]]:
    """A search, and the list that its parents will be in."""
    search = EvolutionSearch(KERNEL, CPU, 0)
    search.breeder = watching = Watching(search.root, search.rng)
    return search, watching.parents


def breeder() -> Breeder:
    return Breeder(ROOT, np.random.default_rng(0))


class Blind(EvolutionSearch):
    """The control: hears that every schedule takes as long as every other."""

    def tell(self, trials):
        super().tell([trial(t.schedule, 1.0) for t in trials])


def hidden(seed: int) -> Callable[[Schedule], float]:
    """Seconds of a schedule: every action that it shares with a hidden one halves them, any other costs a quarter unit."""
    target = next(set(s) for s in RandomSearch(WIDE, CPU, 1000 + seed).ask(100) if len(set(s)) == 6)
    return lambda s: 2.0 ** (0.25 * len(set(s) - target) - len(set(s) & target))


def test_it_finds_faster_schedules_than_random_at_equal_trials():
    """Bar: a mean gain of one log2 unit over seeds. Blind to the times, its children are worse than random schedules."""
    best: dict[type, list[float]] = {EvolutionSearch: [], Blind: [], RandomSearch: []}
    for seed in range(6):
        cost = hidden(seed)
        for kind, found in best.items():
            asked = play(kind(WIDE, CPU, seed), cost, 64)
            assert len(asked) == 64
            found.append(float(np.log2(min(map(cost, asked)))))
    gain, blind = (np.array(best[RandomSearch]) - best[kind] for kind in (EvolutionSearch, Blind))
    print(f"evolution against random, 64 trials: bar 1 log2 unit, {gain.mean():.2f} ({(gain > 0).sum()} of 6 seeds), control "
          f"{blind.mean():.2f} (blind to times)")  # fmt: skip
    assert gain.mean() > 1.0 and blind.mean() < 0.3 and (gain > 0).sum() >= 5


def test_what_it_asks_for_is_legal_and_nothing_twice():
    asked = play(EvolutionSearch(KERNEL, CPU, 0), rank, 120)
    assert len(asked) == len(set(asked)) == 120 and () not in asked
    assert all(replayed(s) == s for s in asked)


def test_it_begins_as_random_does_and_goes_on_so_while_everything_fails():
    control = play(RandomSearch(KERNEL, CPU, 5), rank, 40)
    assert play(EvolutionSearch(KERNEL, CPU, 5), rank, 40)[:POPULATION] == control[:POPULATION]
    assert play(EvolutionSearch(KERNEL, CPU, 5), rank, 40) != control
    assert play(EvolutionSearch(KERNEL, CPU, 5), lambda s: None, 40) == control


def test_parents_are_the_fastest_that_ran():
    (search, parents), cost = watched(), lambda s: None if ACTION_INDEX[s[0]] % 2 else rank(s)
    asked = play(search, cost, 80)
    ran = [s for s in asked if cost(s)]
    assert len(parents) > 30 and POPULATION < len(ran) < len(asked)
    assert all(parent in fastest and cost(parent) for parent, fastest in parents)
    play(search, cost, 1)
    assert set(parents[-1][1]) == set(sorted(ran, key=rank)[:POPULATION])


def test_a_schedule_that_is_refuted_later_is_a_parent_no_more():
    search, parents = watched()
    asked = play(search, rank, 40)
    best = min(asked, key=rank)
    search.tell([trial(best, None)])
    parents.clear()
    play(search, rank, 20)
    assert parents and all(best not in fastest for _, fastest in parents)


def test_the_tournament_by_hand():
    """Of two drawn from eight the better is taken: rank r, counted from 0, with probability (2 (8 - r) - 1) / 64."""
    search, fastest = breeder(), [(a,) for a in ACTIONS[:8]]
    drawn = [fastest.index(search.parent(fastest)) for _ in range(8000)]
    expected = np.array([15, 13, 11, 9, 7, 5, 3, 1]) / 64
    assert np.abs(np.bincount(drawn, minlength=8) / 8000 - expected).max() < 0.02  # four standard errors


def edits(kind: str, parent: Schedule) -> set[Schedule]:
    """All that one mutation can make of a schedule, action by action and place by place."""
    places = {"append": [len(parent)]}.get(kind, range(len(parent)))
    found = set()
    for at in places:
        state = ROOT
        for opt in parent[:at]:
            state = step(state, ACTION_INDEX[opt])
        new = [()] if kind == "delete" else [(opt,) for opt in legal(state)]
        rest = parent[at + 1 :] if kind in ("delete", "replace") else parent[at:]
        found |= {replayed((*parent[:at], *opts, *rest)) for opts in new}
    return found


@pytest.mark.parametrize("kind", MUTATIONS)
def test_a_mutation_is_one_of_all_that_are_possible(kind):
    search, parent = breeder(), (B, WHOLE, A)
    possible = edits(kind, parent)
    found = {search.mutation(parent, kind).schedule for _ in range(300)}
    assert found <= possible and len(found) > 0.7 * len(possible)
    if kind == "delete":  # without B the sum is too long to be unrolled whole: two actions go
        assert found == {(A,), (B, A), (B, WHOLE)}
    if kind == "append":
        assert all(s[:3] == parent and len(s) == 4 for s in found)


@pytest.mark.parametrize("kind", MUTATIONS)
def test_of_nothing_a_mutation_makes_one_action(kind):
    search = breeder()
    assert {search.mutation((), kind).schedule for _ in range(300)} <= {(opt,) for opt in legal(ROOT)}
    assert len(search.mutation((), kind).schedule) == 1


def test_a_crossover_by_hand():
    search = breeder()
    found = {search.crossover((B, A), (C, B, WHOLE)).schedule for _ in range(100)}
    assert found == {(C, B, WHOLE), (B, C, WHOLE), (B, A, C, WHOLE)}  # prefixes of 0, 1, 2 actions
    assert {search.crossover((A,), (WHOLE, C)).schedule for _ in range(50)} == {
        (C,),
        (A, C),
    }  # WHOLE is legal in neither
    assert search.crossover((A, B), (A, B)).schedule == (A, B)


def test_actions_of_another_vocabulary_are_dropped():
    foreign = Opt(OptOps.UPCAST, 0, 6)
    assert foreign not in ACTION_INDEX
    search = breeder()
    assert {search.crossover((foreign,), (B, A)).schedule for _ in range(20)} == {(B, A)}


def test_only_the_order_of_times_counts():
    asked = play(EvolutionSearch(KERNEL, CPU, 1), rank, 60)
    assert asked == play(EvolutionSearch(KERNEL, CPU, 1), lambda s: 1e-6 * rank(s) ** 3, 60)
    assert asked != play(EvolutionSearch(KERNEL, CPU, 1), lambda s: 1 / rank(s), 60)
    assert asked != play(EvolutionSearch(KERNEL, CPU, 2), rank, 60)


def test_what_was_told_is_not_asked_for_again_and_has_children():
    told = play(EvolutionSearch(KERNEL, CPU, 0), rank, 24)
    search, parents = watched()
    search.tell([trial(s, rank(s)) for s in [(), *told]])
    asked = play(search, rank, 24)
    assert len(asked) == 24 and not set(asked) & {(), *told}
    assert parents and set(parents[0][1]) == set(sorted([(), *told], key=rank)[:POPULATION])


def test_a_small_space_is_walked_to_its_end():
    kernel, space = add_one(8), set()
    level = [root_state(kernel, CPU)]
    while level:
        level = [step(s, ACTION_INDEX[o]) for s in level for o in legal(s)]
        space.update(s.schedule for s in level)
    search = make_strategy("evolution", kernel, CPU, 0, None)
    asked = play(search, rank, 100)
    assert len(asked) == len(set(asked)) > POPULATION and set(asked) == space
    assert search.ask(1) == []


def test_where_all_children_are_known_random_schedules_take_their_place():
    """Or the search would end with the neighbours of the fastest."""

    class Barren(Breeder):
        def child(self, fastest):
            return self.replay(self.root, fastest[0])

    search = EvolutionSearch(KERNEL, CPU, 5)
    search.breeder = Barren(search.root, search.rng)
    assert play(search, rank, 40) == play(RandomSearch(KERNEL, CPU, 5), rank, 40)


def test_it_needs_no_guide():
    assert "evolution" not in NEEDS_GUIDE
    assert type(make_strategy("evolution", KERNEL, CPU, 0, None)) is EvolutionSearch
