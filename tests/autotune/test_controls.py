"""The controls of the benchmark: a ranker that has learned, other simulators in place of the trees, and the best fixed recipe."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import kernel_of
from tinygrad import Tensor

from autotune.compiler import renderer_of
from autotune.data import Dataset
from autotune.errors import UsageError
from autotune.experiments.ablations import OtherSimulator
from autotune.experiments.controls import (
    CANDIDATES,
    SIMULATED,
    Controls,
    RankerSearch,
    RecipeSearch,
    grades,
)
from autotune.features import summary
from autotune.files import DATA
from autotune.guide import Guide
from autotune.paths import paths_of
from autotune.records import Trial
from autotune.search.latent import beliefs_of
from autotune.search.random import RandomSearch
from autotune.space import ACTION_INDEX, ACTIONS, MAX_STEPS, STOP_INDEX, apply_to_state, legal_mask, root_state, step

CPU = renderer_of("CPU")
KERNEL = kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 48))
ROOT = root_state(KERNEL, CPU)


def test_relevance_is_the_share_of_the_speed_of_the_fastest():
    found = grades(np.array([-3.0, -2.0, 5.0, 6.0, 7.0]), np.array([0, 0, 1, 1, 1]))
    assert found.tolist() == [31, 16, 31, 16, 8]  # 31, 15.5 to even, 7.75


def controls_of(kernels, trials_each: int) -> Controls:
    """Controls that have learned from random schedules on a made-up device, on which each action halves the time."""
    controls, data = Controls("CPU", CPU), Dataset(CPU)
    for kernel in kernels:
        drawn = RandomSearch(kernel, CPU, 0).ask(trials_each)
        data.add(
            kernel, [Trial(kernel.key, s, "ok", (2.0 ** -len(s),), code_hash=str(i)) for i, s in enumerate(drawn)], "x"
        )
    controls.__dict__["trials"] = data
    return controls


def test_the_ranker_puts_the_faster_first():
    """Longer schedules are faster on the made-up device; of a kernel that it never saw it asks for long ones first. The broken
    ranker, random schedules as they come, does not."""
    others = [kernel_of(Tensor.empty(n, 96) @ Tensor.empty(96, 2 * n)) for n in (16, 32, 64, 96, 128, 160, 192, 224)]
    controls = controls_of(others, 60)
    search = controls.make("ranker", KERNEL, CPU, 0, None)
    assert isinstance(search, RankerSearch)
    asked = search.ask(CANDIDATES)
    assert sorted(asked, key=str) == sorted(RandomSearch(KERNEL, CPU, 0).ask(CANDIDATES), key=str)
    first, last = np.mean([len(s) for s in asked[:32]]), np.mean([len(s) for s in asked[-32:]])
    assert first > last + 2.0
    plain = RandomSearch(KERNEL, CPU, 0).ask(CANDIDATES)
    assert abs(np.mean([len(s) for s in plain[:32]]) - np.mean([len(s) for s in plain[-32:]])) < 2.0
    state = ROOT
    for opt in asked[0]:
        state = apply_to_state(state, opt)
    best = search.model.predict(np.stack([summary(state)]))[0]
    assert best >= search.model.predict(np.stack([summary(ROOT)]))[0]


def test_what_has_to_learn_does_so_before_any_search(monkeypatch: pytest.MonkeyPatch):
    learned = []
    for name in ("ranker", "recipe"):
        monkeypatch.setattr(Controls, name, property(lambda _, name=name: learned.append(name)))
    Controls("CPU", CPU).learn(["auto", "ranker", "random"])
    assert learned == ["ranker"]


def test_another_simulator_is_asked_in_place_of_the_trees(monkeypatch: pytest.MonkeyPatch):
    """On the made-up device the longer is the faster. Members are draws of what the linear simulator believes, relative to the
    un-optimized kernel; the search asks for longer schedules than one whose simulator has learned the opposite."""
    guide = Guide.load(DATA / "guide-cpu")
    monkeypatch.setattr(guide, "members", lambda *_: pytest.fail("the trees were asked"))
    others = [kernel_of(Tensor.empty(n, 96) @ Tensor.empty(96, 2 * n)) for n in (16, 32, 64, 96, 128, 160)]
    lengths = {}
    for sign in (1, -1):
        controls = controls_of(others, 40)
        controls.trials.log_times[:] = [sign * t for t in controls.trials.log_times]
        search = controls.make("simulator-linear", KERNEL, CPU, 0, guide)
        assert isinstance(search, OtherSimulator)
        states = [ROOT, *(step(ROOT, int(a)) for a in np.flatnonzero(legal_mask(ROOT)[:-1])[:5])]
        members, paths = search._members(states), paths_of(states)
        at = np.arange(len(states)), paths.length
        found = controls.simulator("linear").predict(paths)
        relative = found.relative[at] - found.relative[0, 0]
        np.testing.assert_allclose(members.mean(0), relative, atol=1e-5)
        drawn = beliefs_of(controls.simulator("linear"), states, search.rng)
        np.testing.assert_allclose(drawn.mean(0), found.relative[at], atol=1e-5)
        np.testing.assert_allclose(drawn.std(0), found.spread[at], atol=1e-5)
        assert len(members) == len(drawn) and members.std(0)[1:].min() > 0.1 * found.spread[at].min()
        lengths[sign] = np.mean([len(s) for s in search.ask(8)])
    assert lengths[1] > lengths[-1] + 1
    assert set(SIMULATED) == {
        f"simulator-{k}" for k in ("roofline", "nearest", "linear", "ensemble", "diffusion", "transformer")
    }
    with pytest.raises(UsageError, match="simulator-linear needs a checkpoint"):
        controls.make("simulator-linear", KERNEL, CPU, 0, None)


def test_what_is_known_is_not_ranked():
    controls = controls_of([kernel_of(Tensor.empty(n, 96) @ Tensor.empty(96, 64)) for n in (16, 32, 64)], 40)
    search = controls.make("ranker", KERNEL, CPU, 0, None)
    known = RandomSearch(KERNEL, CPU, 0).ask(5)
    search.tell([Trial(KERNEL.key, s, "ok", (1.0,)) for s in known])
    assert not set(known) & set(search.ask(CANDIDATES))


def test_the_recipe_takes_the_most_frequent_of_the_legal_actions():
    legal = [int(a) for a in np.flatnonzero(legal_mask(ROOT)[:-1])]
    illegal = next(a for a in range(len(ACTIONS)) if not legal_mask(ROOT)[a])
    table = np.zeros((MAX_STEPS + 1, len(ACTIONS)))
    table[0, [illegal, legal[0], legal[1]]] = 9, 3, 5
    table[1, STOP_INDEX] = 1
    search = RecipeSearch(KERNEL, CPU, 0, table)
    assert search.ask(1) == [step(ROOT, legal[1]).schedule]
    assert search.ask(4) == [step(ROOT, legal[0]).schedule]  # all else that the table can say
    assert search.ask(4) == []


def test_the_recipe_counts_the_fastest_of_each_kernel():
    controls = controls_of([KERNEL], 40)
    longest = max((s.schedule for s in controls.trials.states), key=len)
    fastest = controls.trials.states[int(np.argmin(controls.trials.log_times))].schedule
    assert len(fastest) == len(longest)
    for i, opt in enumerate(fastest):
        assert controls.recipe[i, ACTION_INDEX[opt]] == 1 == controls.recipe[i].sum()
    assert controls.recipe[len(fastest), STOP_INDEX] == 1


def test_where_no_trials_ship_there_is_nothing_to_learn():
    with pytest.raises(UsageError, match="no trials ship"):
        Controls("NOTHING", CPU).make("recipe", KERNEL, CPU, 0, None)
