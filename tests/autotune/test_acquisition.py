"""What each kind of acquisition chooses, by hand; and that `mixed` chooses by it."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
from tiny import kernel_of
from tinygrad import Tensor

from autotune.compiler import renderer_of
from autotune.errors import UsageError
from autotune.experiments.ablations import ABLATIONS
from autotune.files import DATA
from autotune.guide import Guide
from autotune.records import Trial
from autotune.search.acquisition import BATCH, KINDS, choose
from autotune.search.mixed import MixedSearch
from autotune.search.random import MAX_ACTIONS
from autotune.space import State

CPU = renderer_of("CPU")
KERNEL = kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 48))
MEMBERS = np.array([[1.0, 4.5, 2.25, 4.0], [3.0, 0.5, 2.25, 4.0]])  # means 2, 2.5, 2.25, 4; std 1, 2, 0, 0
ALONE = np.eye(4).__getitem__  # nothing is like anything else
LINE = np.array([[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9, 5.0]])  # one member's times of ten places on a line
APART = np.exp(-np.abs(np.arange(10)[:, None] - np.arange(10))).__getitem__


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def guide():
    return Guide.load(DATA / "guide-cpu")


def test_greedy_takes_the_least_means_and_ucb_the_least_bounds():
    assert choose(MEMBERS, ALONE, rng(), 4, "greedy") == [0, 2, 1, 3]
    assert choose(MEMBERS, ALONE, rng(), 4, "ucb") == [1, 0, 2, 3]  # bounds 1, 0.5, 2.25, 4
    assert choose(MEMBERS, ALONE, rng(), 2, "ucb") == [1, 0]


def test_thompson_takes_the_surest_first_and_then_a_random_members_least():
    """Bounds 3, 4.5, 2.25, 4: candidate 2. Of what is left member 0 prefers candidate 0, member 1 candidate 1."""
    batches = [choose(MEMBERS, ALONE, rng(seed), 3) for seed in range(200)]
    assert {tuple(b) for b in batches} == {(2, 0, 1), (2, 1, 0)}  # the last: least mean
    assert 0.35 < np.mean([b[1] == 1 for b in batches]) < 0.65
    members = [int(np.random.default_rng(seed).integers(2)) for seed in range(200)]
    assert [b[1] for b in batches] == members


@pytest.mark.parametrize("kind, expected", [("greedy", [0, 1, 2, 3]), ("ucb", [1, 0, 2, 3])])
def test_a_choice_pushes_back_its_like(kind, expected):
    """Candidate 2 is like candidate 0: half a log2 unit behind, it comes after the mean 2.5 of candidate 1."""
    like = np.eye(4)
    like[0, 2] = like[2, 0] = 1.0
    assert choose(MEMBERS, like.__getitem__, rng(), 4, kind) == expected
    assert choose(MEMBERS, like.__getitem__, rng(), 4, "greedy", crowding=0.0) == [0, 2, 1, 3]


def test_the_last_slot_goes_where_nothing_was_measured():
    """Greedy would take place 3 of the line; at e^-1 from place 2 it is believed to take .3 + .368, place 4 .4 + .135, place 5
    .5 + .050, place 6 .6 + .018. Where places 3 and 4 are known, it is place 6."""
    greedy = partial(choose, LINE, APART, rng(), kind="greedy", crowding=0.0)
    assert greedy(4) == [0, 1, 2, 4]
    assert greedy(4, away=None) == [0, 1, 2, 3]
    assert greedy(4, known=np.maximum(APART(3), APART(4))) == [0, 1, 2, 6]
    assert greedy(4, away=9.0) == [0, 1, 2, 7]  # .7 + .061; 9 is hopeless, and stays so
    assert greedy(1, known=APART(0), away=9.0) == [0]  # a single answer is the best believed


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_there_is_none_and_nothing_twice(kind):
    assert sorted(choose(MEMBERS, ALONE, rng(), 9, kind)) == [0, 1, 2, 3]
    assert choose(MEMBERS, ALONE, rng(), 0, kind) == []
    assert choose(MEMBERS[:, :0], ALONE, rng(), 8, kind) == []


def test_an_unknown_kind_is_a_usage_error():
    with pytest.raises(UsageError, match="unknown acquisition 'magic'; choose one of thompson, ucb, greedy"):
        choose(MEMBERS, ALONE, rng(), kind="magic")


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(members [5, 40] of multiples of 2^-10, so that sums with whole numbers are exact; similarity [40, 40])."""
    draws = rng(seed)
    places = draws.normal(size=(40, 2))
    return draws.integers(0, 4096, (5, 40)) / 1024, np.exp(-((places[:, None] - places[None]) ** 2).sum(-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_slower_device_changes_no_choice(kind, seed):
    members, like = drawn(seed)
    before, after = (choose(m, like.__getitem__, rng(seed), 16, kind) for m in (members, members + 7.0))
    assert before == after


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_candidates_does_not_matter(kind, seed):
    members, like = drawn(seed)
    order = rng(seed + 10).permutation(40)
    before = choose(members, like.__getitem__, rng(seed), 16, kind, known=like[5])
    after = choose(members[:, order], like[order][:, order].__getitem__, rng(seed), 16, kind, known=like[5][order])
    assert [order[i] for i in after] == before


@pytest.fixture(scope="module")
def grown(guide):
    """Makes a `mixed` that has measured one batch and failed once, and whose pool stays as it then is."""
    search = MixedSearch(KERNEL, CPU, 3, guide)
    search.directs = False  # no choice without the acquisition
    first = search.ask(BATCH)
    times = [(), *((1.0 + i,) for i in range(BATCH - 1))]
    search.tell([Trial(KERNEL.key, s, "ok" if t else "crashed", t) for s, t in zip(first, times, strict=True)])
    search._grow()

    def make(name: str = "mixed") -> tuple[MixedSearch, list[State], np.ndarray]:
        """(the search or its ablation, its candidates, what its members believe of them)"""
        again = {"mixed": MixedSearch, **ABLATIONS}[name](KERNEL, CPU, 3, guide)
        for name in ("pool", "measured", "failed", "seen"):
            setattr(again, name, copy.copy(getattr(search, name)))
        again._grow = lambda: None  # it would draw from the generator that choices are compared on, and so would this
        again._breed = lambda count: []
        again.directs = False
        candidates = [s for s in again.pool.values() if s.schedule not in again.seen]
        return again, candidates, again._corrected(candidates)

    return make


@pytest.mark.parametrize(("name", "kind"), [("mixed", "thompson"), ("no-away", "thompson"), ("no-crowding", "thompson"),
                                            ("acquisition-ucb", "ucb"), ("acquisition-greedy", "greedy")])  # fmt: skip
def test_mixed_chooses_a_batch_of_four_by_its_acquisition_and_crowding(grown, name, kind):
    """Held against the rule written out again; the last is unlike what was measured, unless that is taken away."""
    search, candidates, members = grown(name)
    mean, std = members.mean(0), members.std(0)
    draws, expected = copy.deepcopy(search.rng), []
    known = search._similarity(candidates, [s for s, _ in search.measured] + search.failed).max(1)
    for slot in range(BATCH):
        score = {"ucb": mean - std, "greedy": mean, "thompson": mean + std}[kind]
        if kind == "thompson" and slot:
            score = members[int(draws.integers(len(members)))]
        likes = [search._similarity(candidates, [candidates[j]])[:, 0] for j in expected]
        score = score + 0.5 * (name != "no-crowding") * np.max([np.zeros(len(candidates)), *likes], axis=0)
        if slot == BATCH - 1 and name != "no-away":
            score = mean + np.max([known, *likes], axis=0)
        expected.append(min((i for i in range(len(candidates)) if i not in expected), key=lambda i: score[i]))
    assert len(candidates) > 50 and search.ask(BATCH) == [candidates[i].schedule for i in expected]


def test_the_acquisitions_choose_otherwise(grown):
    names = ("mixed", "acquisition-ucb", "acquisition-greedy", "no-crowding", "no-away")
    assert len({tuple(grown(name)[0].ask(32)) for name in names}) == len(names)


@pytest.mark.parametrize("known", ["measured", "failed"])
def test_what_was_measured_or_failed_is_not_looked_at_again(grown, known):
    """The last of eight is told to be known: now another is believed best of what is unlike all."""
    search, candidates, members = grown("acquisition-greedy")
    eighth = grown("acquisition-greedy")[0].ask(8)[7]
    twin = next(s for s in candidates if s.schedule == eighth)
    getattr(search, known).append((twin, 0.0) if known == "measured" else twin)
    search._corrected = lambda _: members  # whatever that teaches the simulator
    asked = search.ask(8)
    assert asked[7] != eighth and len({*asked}) == 8


def test_schedules_that_the_policies_would_never_do_are_in_the_pool(guide):
    """Drawn evenly, once: of 128 draws nearly all are new; the ablation has none."""
    search, without = MixedSearch(KERNEL, CPU, 3, guide), ABLATIONS["no-even"](KERNEL, CPU, 3, guide)
    for each in (search, without):
        each.ask(4)
    even = [s for s, origin in search.origins.items() if origin == "even"]
    assert len(even) > 128 and max(len(s) for s in even) <= MAX_ACTIONS
    assert "even" not in without.origins.values()
    search.ask(4)
    assert [s for s, origin in search.origins.items() if origin == "even"] == even
