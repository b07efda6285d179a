"""Each ablation lacks its part, and no other."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from tiny import kernel_of
from tinygrad import Tensor

from autotune.compiler import renderer_of
from autotune.errors import UsageError
from autotune.experiments.ablations import ABLATIONS, SIMULATIONS, ablated
from autotune.experiments.controls import Controls
from autotune.features import summary
from autotune.files import DATA
from autotune.guide import Guide
from autotune.records import Trial
from autotune.search import origin_of
from autotune.search.mixed import MixedSearch
from autotune.search.planner import PlannerSearch
from autotune.search.random import MAX_ACTIONS, random_path
from autotune.space import MAX_STEPS, legal_mask, root_state, step

CPU = renderer_of("CPU")
KERNEL = kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 48))


@pytest.fixture(scope="module")
def guide() -> Guide:
    return Guide.load(DATA / "guide-cpu")


def grown(name: str, guide: Guide) -> MixedSearch:
    """After a batch that was measured: the longer the faster."""
    search = MixedSearch(KERNEL, CPU, 0, guide) if name == "mixed" else ablated(name, KERNEL, CPU, 0, guide)
    search.tell([Trial(KERNEL.key, (), "ok", (1.0,), kind="unoptimized")])
    search.tell([Trial(KERNEL.key, s, "ok", (2.0 ** -len(s),)) for s in search.ask(8)])
    search.ask(8)
    return search


PARTS = {"policy", "sequential", "evolution", "recall", "even"}


def parts_of(search: MixedSearch) -> set[str]:
    return set(search.origins.values()) & PARTS


def test_the_whole_has_all_of_its_parts(guide: Guide):
    assert parts_of(grown("mixed", guide)) == PARTS


@pytest.mark.parametrize(("name", "missing"), [
    ("no-policy", {"sequential"}),  # chance proposes in the policy's place, under its name
    ("no-direct", {"sequential"}), ("no-breeding", {"evolution"}), ("no-memory", {"recall"}), ("no-simulator", set()),
    ("no-even", {"even"}), ("no-away", set()), ("no-crowding", set()), ("acquisition-ucb", set()),
    ("acquisition-greedy", set()),
])  # fmt: skip
def test_what_is_taken_away_proposes_nothing(guide: Guide, name: str, missing: set[str]):
    assert parts_of(grown(name, guide)) == PARTS - missing


def test_without_a_policy_episodes_are_drawn_evenly(guide: Guide, monkeypatch: pytest.MonkeyPatch):
    """No answer of the policy is asked for, and many first actions are met, each about as often."""
    search = ablated("no-policy", KERNEL, CPU, 0, guide)
    monkeypatch.setattr(guide.agent, "evaluate", lambda *_: pytest.fail("the policy was asked"))
    assert len(search.ask(8)) == 8
    paths = [p for _ in range(40) for p in search.episodes([search.root], 0.0)]
    legal = int(legal_mask(search.root)[:-1].sum())
    counts = np.array([sum(p[1].schedule[0] == opt for p in paths) for opt in {p[1].schedule[0] for p in paths}])
    assert len(counts) == legal and counts.max() < 3 * len(paths) / legal


def test_without_a_simulator_nothing_is_predicted(guide: Guide, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guide, "members", lambda *_: pytest.fail("the simulator was asked"))
    search = ablated("no-simulator", KERNEL, CPU, 0, guide)
    first = search.ask(8)
    assert len(set(first)) == 8 and not set(first) & set(search.ask(8))
    search.tell([Trial(KERNEL.key, (), "ok", (1.0,), kind="unoptimized")])
    assert search.promise(4) is None  # so `auto` spends its trials by what trials bring on average


@pytest.mark.parametrize(("name", "asked"), [("mixed", "trees"), ("only-nets", "nets"), ("with-nets", "")])
def test_who_of_the_committee_is_asked(guide: Guide, name: str, asked: str):
    """Members' answers, each relative to the un-optimized kernel."""
    search = grown(name, guide)
    states = [search.root, *search._candidates()[:5]]
    simulator = getattr(guide.simulator, asked) if asked else guide.simulator
    said = simulator.predict_members(np.stack([summary(s) for s in states]))
    np.testing.assert_allclose(search._members(states), said - said[:, :1], atol=1e-5)
    assert len(said) == {"trees": 5, "nets": 5, "": 10}[asked]


def test_without_a_correction_trials_only_shift_what_is_believed(guide: Guide):
    search = grown("no-correction", guide)
    candidates = search._candidates()[:50]
    shift = search._corrected(candidates) - search._members(candidates)
    assert np.ptp(shift, axis=1).max() < 1e-4 < np.abs(shift).min()
    assert np.ptp(MixedSearch._errors(search, candidates), axis=1).min() > 0.01


def test_simulations_of_the_planner(guide: Guide):
    looked = {}
    for count in SIMULATIONS[:2]:
        search = ablated(f"planner-{count}", KERNEL, CPU, 0, guide)
        assert isinstance(search, PlannerSearch) and search.simulations == count
        assert len(set(search.ask(8))) == 8
        looked[count] = search.pool
    assert len({s[:1] for s in looked[0] if s}) <= guide.agent.config.n_envs  # nothing is looked at but what is taken
    assert len(looked[4]) > 1.25 * len(looked[0])


def test_a_random_path_goes_by_single_legal_steps():
    rng, root = np.random.default_rng(0), root_state(KERNEL, CPU)
    lengths = set()
    for _ in range(100):
        path = random_path(root, rng)
        lengths.add(len(path) - 1)
        for a, b in pairwise(path):
            assert b.schedule in {step(a, int(i)).schedule for i in np.flatnonzero(legal_mask(a)[:-1])}
    assert lengths == set(range(1, MAX_ACTIONS + 1))
    end = root
    while legal_mask(end)[:-1].any():
        end = random_path(end, rng)[-1]
    assert len(end.schedule) <= MAX_STEPS and random_path(end, rng) == [end]


def test_the_benchmark_knows_them_and_says_what_is_missing(guide: Guide):
    made = Controls("CPU", CPU).make("no-memory", KERNEL, CPU, 0, guide)
    assert isinstance(made, MixedSearch) and origin_of(made, ()) == ""
    for name in ABLATIONS:
        with pytest.raises(UsageError, match=f"{name} needs a checkpoint"):
            Controls("CPU", CPU).make(name, KERNEL, CPU, 0, None)
