"""Planning on the exact dynamics with the cost that the shipped simulator has learned."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import kernel_of
from tinygrad import Tensor

from autotune import corpus
from autotune.compiler import renderer_of
from autotune.files import DATA
from autotune.guide import Guide
from autotune.records import Trial
from autotune.search.planner import PlannerSearch
from autotune.space import ACTIONS, STOP_INDEX, legal_mask, root_state, state_after, step

CPU = renderer_of("CPU")
LARGE = next(k for k in corpus.load("held_out") if k.family == "residual")
KERNEL = kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 48))
SIMULATIONS = 2


@pytest.fixture(scope="module")
def guide():
    return Guide.load(DATA / "guide-cpu")


def planner(guide: Guide, seed: int = 0, simulations: int = SIMULATIONS) -> PlannerSearch:
    return PlannerSearch(KERNEL, CPU, seed, guide, simulations)


def test_what_it_looks_at_is_legal_and_what_it_asks_for_is_new(guide):
    search, asked = planner(guide), []
    for round in range(3):
        new = search.ask(4)
        assert len(new) == len(set(new)) == 4 and not set(new) & {(), *asked}
        search.tell([Trial(KERNEL.key, s, "ok", (1.0 + round,)) for s in new])
        asked += new
    for schedule, state in search.pool.items():
        assert state.schedule == schedule and state.axes == state_after(KERNEL, schedule, CPU).axes


def test_rewards_add_up_to_what_a_row_believes_and_stop_pays_nothing(guide):
    search = planner(guide)
    n = search.rows
    root = search._look([search.root] * n, guide.agent.initial_hidden(n), np.ones(n, np.float32))
    believed = search._members([search.root])[:, 0]
    assert [node.log_time for node in root.embedding] == [pytest.approx(believed[i % len(believed)]) for i in range(n)]
    assert (root.value >= 0).all() and (root.mask == legal_mask(search.root)).all()
    action = int(np.flatnonzero(legal_mask(search.root))[0])
    once = search._follow(root.embedding, np.array([action, STOP_INDEX] * (n // 2)))
    again = search._follow(once.embedding, np.full(n, STOP_INDEX))
    assert (once.reward[1::2] == 0).all() and (once.discount[1::2] == 0).all() and (once.discount[::2] == 1).all()
    assert (again.reward == 0).all() and (again.discount == 0).all()
    assert [e.state.schedule for e in once.embedding][:2] == [(ACTIONS[action],), ()]
    times = search._members([e.state for e in once.embedding])
    for i in range(0, n, 2):
        member = i % len(times)
        assert root.embedding[i].log_time - once.reward[i] == pytest.approx(times[member, i], abs=1e-5)


def test_a_leaf_from_which_nothing_can_be_done_is_worth_nothing(guide, monkeypatch: pytest.MonkeyPatch):
    search, full = planner(guide), root_state(KERNEL, CPU)
    while legal_mask(full)[:-1].any():
        full = step(full, int(np.flatnonzero(legal_mask(full)[:-1])[-1]))
    n, evaluate = search.rows, guide.agent.evaluate
    monkeypatch.setattr(guide.agent, "evaluate", lambda *a: (evaluate(*a)[0], np.full(n, 2.5), evaluate(*a)[2]))
    found = search._look([search.root, full] * (n // 2), guide.agent.initial_hidden(n), np.ones(n, np.float32))
    assert found.value.tolist() == [2.5, 0.0] * (n // 2)


def test_plans_are_made_with_what_trials_have_taught(guide, monkeypatch: pytest.MonkeyPatch):
    """All that a plan looks at costs what the search believes of it by now, and that is not what it believed before."""
    search, looked = planner(guide), []
    first = search.ask(4)
    search.tell([Trial(KERNEL.key, s, "ok", (2.0 ** (i - 12),)) for i, s in enumerate(((), *first))])
    look = PlannerSearch._look
    monkeypatch.setattr(PlannerSearch, "_look", lambda *a: looked.append(look(*a)) or looked[-1])
    search._plan([search.root])
    for found in looked:
        states = [node.state for node in found.embedding]
        members = search._members(states) + search._errors(states)
        for i, node in enumerate(found.embedding):
            assert node.log_time == pytest.approx(members[i % len(members), i], abs=1e-4)
    assert len(looked) > 8 and np.abs(search._errors([search.root])).min() > 1.0


def test_a_reward_is_of_its_state_whoever_stands_beside_it(guide):
    """Though a trial has failed: how alike states are depends on those that are compared."""
    search = planner(guide)
    n = search.rows
    failing = search.ask(1)[0]
    search.tell([Trial(KERNEL.key, failing, "crashed")])
    hidden, reset = guide.agent.initial_hidden(n), np.ones(n, np.float32)
    others = [s for s in search.pool.values() if s is not search.root][: n - 1]
    alone = search._look([search.root] * n, hidden, reset).embedding[0].log_time
    assert search._look([search.root, *others], hidden, reset).embedding[0].log_time == pytest.approx(alone, abs=1e-6)
    assert len(search.failed) == 1 and len(others) == n - 1


def test_search_improves_on_a_policy_that_knows_nothing(guide):
    """Mean log2 time believed of all that was looked at. The control: episodes of the same untrained policy, as many."""
    nets, trees = guide.simulator.nets.config, guide.simulator.trees.config
    blind = Guide(guide.state_dim, guide.summary_dim, guide.agent.config, nets, trees, 1)
    blind.simulator = guide.simulator
    search = PlannerSearch(LARGE, CPU, 0, blind, 4)
    search._plan([search.root])
    drawn = [s for _ in range(4) for path in search.episodes([search.root], 1.0) for s in path]
    planned, control = (float(guide.predict(list(states))[0].mean()) for states in (search.pool.values(), drawn))
    print(
        f"planner with a policy that knows nothing: bar below {control - 0.2:.2f}, {planned:.2f}, control {control:.2f} (no search)"
    )
    assert planned < control - 0.2
