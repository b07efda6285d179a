"""A world learned from the trials that ship: what its heads are taught, its two strategies, and how it is kept."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from tiny import U2, U4, kernel_of
from tinygrad import Context, Tensor

from autotune import corpus
from autotune.compiler import Opt, OptOps, renderer_of
from autotune.data import Dataset, add_shipped
from autotune.errors import UsageError
from autotune.files import DATA
from autotune.guide import Guide
from autotune.paths import paths_of
from autotune.records import Trial
from autotune.search import make_strategy
from autotune.search.latent import beliefs_of
from autotune.space import ACTION_INDEX, MAX_STEPS, STOP_INDEX, legal_mask, root_state, state_after
from autotune.world import SOFTNESS, World, positions_of
from sims import SimulatorError
from sims.heads import HeadsConfig

CPU = renderer_of("CPU")
KERNEL = kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 48))
HEADS = HeadsConfig(hidden=16, steps=30)


def trial(schedule: tuple, seconds: float) -> Trial:
    return Trial(KERNEL.key, schedule, "ok", (seconds,), code_hash=str(schedule))


def test_heads_are_taught_by_the_fastest_schedule_below_each_action():
    """Recorded: () 8 s, U2 4 s, U2 U4 1 s, U4 2 s. From the root U2 leads to 1 s, U4 to 2 s, STOP to 8 s."""
    data = Dataset(CPU)
    data.add(KERNEL, [trial((), 8.0), trial((U2,), 4.0), trial((U2, U4), 1.0), trial((U4,), 2.0)], "here")
    positions = positions_of(data)
    assert len(positions.mask) == 4 and positions.rows.shape[0] == 1
    at = {tuple(positions.paths.actions[i, : positions.paths.length[i]].sum(1)): i for i in range(4)}
    root = at[()]
    assert (positions.mask[root] == legal_mask(root_state(KERNEL, CPU))).all()
    u2, u4 = ACTION_INDEX[U2], ACTION_INDEX[U4]
    expected = np.exp(-np.array([0.0, 1.0, 3.0]) / SOFTNESS)
    np.testing.assert_allclose(positions.target[root, [u2, u4, STOP_INDEX]], expected / expected.sum(), rtol=1e-5)
    ends = [i for i in range(4) if positions.target[i, STOP_INDEX] == 1]
    assert len(ends) == 2 and sorted(positions.paths.length[ends]) == [1, 2]
    np.testing.assert_allclose(positions.target.sum(1), 1, rtol=1e-5)


def test_a_faster_clock_teaches_the_same():
    """Metamorphic: all times of a kernel times a constant."""
    taught = []
    for factor in (1.0, 16.0):
        data = Dataset(CPU)
        data.add(KERNEL, [trial((), 8.0 * factor), trial((U2,), 4.0 * factor), trial((U4,), 2.0 * factor)], "here")
        taught.append(positions_of(data).target)
    np.testing.assert_allclose(*taught, rtol=1e-5)


@pytest.fixture(scope="module")
def guide() -> Guide:
    """The shipped one, with a linear world of few kernels and an untrained policy on it."""
    data = Dataset(CPU)
    add_shipped(data, "CPU", corpus.load("train")[:12])
    found = Guide.load(DATA / "guide-cpu")
    with Context(NOOPT=1):  # thirty steps are sooner made than a fast program for them
        found.world = World.learn("linear", data, 0, rounds=0, heads=HEADS)
    found.world.new_agent(found.agent.config)
    return found


@pytest.mark.parametrize("name", ["muzero", "sequential"])
def test_what_it_asks_for_is_new_and_legal(guide: Guide, name: str):
    search, asked = make_strategy(name, KERNEL, CPU, 0, guide), []
    for round in range(2):
        new = search.ask(4)
        assert new and len(new) == len(set(new)) and not set(new) & {(), *asked}
        search.tell([Trial(KERNEL.key, s, "ok", (1.0 + round,)) for s in new])
        asked += new
    for schedule in asked:
        assert state_after(KERNEL, schedule, CPU).schedule == schedule


def test_plans_are_read_up_to_their_first_illegal_action(guide: Guide):
    search = make_strategy("muzero", KERNEL, CPU, 0, guide)
    after = state_after(KERNEL, (U2,), CPU)
    illegal = int(np.flatnonzero(~legal_mask(after))[0])
    legal = ACTION_INDEX[U4]
    assert legal_mask(after)[legal]
    search._walk(search.root, [ACTION_INDEX[U2], illegal, legal])
    assert set(search.pool) == {(), (U2,)}
    search._walk(search.root, [ACTION_INDEX[U2], legal, STOP_INDEX, legal])
    assert set(search.pool) == {(), (U2,), (U2, U4)}


def test_a_schedule_that_was_measured_fast_lends_its_time_to_its_like(guide: Guide):
    search = make_strategy("muzero", KERNEL, CPU, 0, guide)
    first = search.ask(4)
    states = [search.pool[s] for s in first]
    before = search._corrected(states).mean(0)
    search.tell([Trial(KERNEL.key, first[0], "ok", (2.0**-20,)), Trial(KERNEL.key, first[1], "ok", (2.0**-10,))])
    after = search._corrected(states).mean(0)
    assert (after - before)[0] < (after - before)[1]


def test_a_schedule_that_no_path_holds_is_judged_by_its_beginning(guide: Guide):
    """Hand-coded may have more actions than a path: it is told, and stands among the fastest."""
    small = [Opt(OptOps.UPCAST, axis, 2) for axis in (0, 1)] * 3 + [Opt(OptOps.UNROLL, 0, 2)] * 3
    assert len(small) > MAX_STEPS and state_after(KERNEL, tuple(small), CPU)
    search = make_strategy("muzero", KERNEL, CPU, 0, guide)
    hand = Trial(KERNEL.key, tuple(small), "ok", (2.0**-12,), kind="hand_coded")
    search.tell([Trial(KERNEL.key, (), "ok", (2.0**-6,), kind="unoptimized"), hand])
    assert search.ask(4) and search.fastest == -12
    data = Dataset(CPU)
    data.add(KERNEL, [hand, Trial(KERNEL.key, (U2,), "ok", (2.0**-7,), code_hash="b")], "here")
    assert [s.schedule for s in data.states] == [(U2,)]


def test_any_simulator_judges_hand_coded_that_no_path_holds(guide: Guide):
    """Also where it is asked in the trees' place."""
    small = [Opt(OptOps.UPCAST, axis, 2) for axis in (0, 1)] * 3 + [Opt(OptOps.UNROLL, 0, 2)] * 3
    assert guide.world is not None
    states = [state_after(KERNEL, tuple(small[:n]), CPU) for n in (MAX_STEPS, MAX_STEPS + 1)]
    drawn = [beliefs_of(guide.world.simulator, [s], np.random.default_rng(0)) for s in states]
    np.testing.assert_array_equal(*drawn)


def test_a_policy_of_the_worlds_view_stays_as_it_practised(guide: Guide):
    """Whatever the other policy does: with the mask, and without."""
    assert guide.world is not None
    for masked in (True, False):
        world = World.load(*guide.world.state(), guide.summary_dim, replace(guide.agent.config, masked=masked))
        assert world.agent is not None and world.agent.config.masked
    arrays, meta = guide.world.state()
    meta["agent"]["config"]["masked"] = False
    world = World.load(arrays, meta, guide.summary_dim, guide.agent.config)
    assert world.agent is not None and not world.agent.config.masked and guide.agent.config.masked
    meta["agent"]["config"] = [1]
    with pytest.raises(TypeError):  # what a checkpoint is refused by; it was an AttributeError
        World.load(arrays, meta, guide.summary_dim, guide.agent.config)


def test_the_same_schedule_of_another_kernel_is_judged_by_itself(guide: Guide):
    """As it hears of similar kernels' trials, it is asked about their states, too."""
    search = make_strategy("muzero", KERNEL, CPU, 0, guide)
    twin = kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 4))
    states = [state_after(kernel, (U4,), CPU) for kernel in (KERNEL, twin)]
    said = [search._members([state]).mean() for state in states]
    paths = paths_of(states)
    truth = guide.world.simulator.predict(paths).relative[np.arange(2), paths.length]  # type: ignore[union-attr]
    assert abs(truth[0] - truth[1]) > 0.01
    np.testing.assert_allclose(said, truth, atol=1e-5)


def test_draws_have_the_mean_and_the_spread_that_the_world_tells(guide: Guide):
    """Of each schedule, however few they are: else those would count as surest whose draws happen to lie close together."""
    search = make_strategy("muzero", KERNEL, CPU, 0, guide)
    states = [state_after(KERNEL, schedule, CPU) for schedule in ((), (U2,), (U4,))]
    paths = paths_of(states)
    told, at = guide.world.simulator.predict(paths), (np.arange(3), paths.length)  # type: ignore[union-attr]
    members = search._members(states)
    np.testing.assert_allclose(members.mean(0), told.relative[at], atol=1e-5)
    np.testing.assert_allclose(members.std(0), told.spread[at], rtol=1e-4)
    assert len(np.unique(np.round(members - members.mean(0), 5))) > len(members)  # no two schedules are drawn alike


def test_what_is_saved_comes_back(guide: Guide, tmp_path):
    guide.save(tmp_path / "kept", {"backend": "CPU", "draft": True})
    again = Guide.load(tmp_path / "kept")
    for name in ("muzero", "sequential"):
        before, after = (make_strategy(name, KERNEL, CPU, 3, g).ask(4) for g in (guide, again))
        assert before == after and before
    root = root_state(KERNEL, CPU)
    assert again.world is not None and again.world.view(root, legal_mask(root))[0].shape == (64,)


def test_without_a_world_it_says_what_to_do(guide: Guide):
    bare = Guide.load(DATA / "guide-cpu")
    bare.world = None
    for name in ("muzero", "sequential"):
        with pytest.raises(UsageError, match="train one"):
            make_strategy(name, KERNEL, CPU, 0, bare)
    with pytest.raises(UsageError, match="unknown simulator 'magic'"):
        World("magic", guide.world.widths, 0)  # type: ignore[union-attr]
    empty = Dataset(CPU)
    with pytest.raises(SimulatorError, match="no schedules"):
        World.learn("linear", empty, 0)


def test_a_damaged_world_is_refused(guide: Guide):
    arrays, meta = guide.world.state()  # type: ignore[union-attr]
    summary = guide.summary_dim
    for changed in (
        {k: a for k, a in arrays.items() if k != "heads.theta"},
        arrays | {"heads.theta": np.zeros((1, 7), np.float32)},
        arrays | {"simulator.own.weights": np.full_like(arrays["simulator.own.weights"], math.nan)},
    ):
        with pytest.raises(SimulatorError):
            World.load(changed, meta, summary, guide.agent.config)
    with pytest.raises(UsageError, match="unknown simulator"):
        World.load(arrays, meta | {"kind": "magic"}, summary, guide.agent.config)
    with pytest.raises(SimulatorError, match="theta"):  # a size that the file does not hold
        World.load(arrays, meta | {"heads": [10**6, 16]}, summary, guide.agent.config)
    assert World.load(arrays, meta, summary, guide.agent.config).kind == "linear"
