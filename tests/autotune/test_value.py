"""What an action is worth, and the two strategies that go by it, with the guide that ships."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tiny import kernel_of
from tinygrad import Tensor

from agents.networks import ILLEGAL
from autotune.compiler import renderer_of
from autotune.files import DATA
from autotune.guide import Guide
from autotune.records import Trial
from autotune.search import make_strategy
from autotune.search.policy import PolicySearch
from autotune.search.value import LOOKED, MARGIN, FilterSearch, ValueSearch
from autotune.space import STOP_INDEX, State, legal_mask, root_state, state_after, step

CPU = renderer_of("CPU")
KERNEL = kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 48))


@pytest.fixture(scope="module")
def guide() -> Guide:
    return Guide.load(DATA / "guide-cpu")


def test_an_action_is_worth_its_reward_and_what_the_critic_sees_beyond(guide: Guide):
    search, root = ValueSearch(KERNEL, CPU, 0, guide), root_state(KERNEL, CPU)
    worth, mask = search.worth([root])[0], legal_mask(root)
    assert worth[STOP_INDEX] == 0 and (worth[~mask] == ILLEGAL).all() and (worth[mask] > ILLEGAL).all()
    actions = np.flatnonzero(mask[:-1])
    children = [step(root, int(a)) for a in actions]
    falls = -guide.predict(children)[0]  # the root is at 0
    first = np.argsort(-falls, kind="stable")[: LOOKED - 1]  # STOP, worth 0, may be among the LOOKED
    values = np.maximum(search._policy([children[i] for i in first])[1], 0)
    np.testing.assert_allclose(worth[actions[first]], falls[first] + values, rtol=1e-4, atol=1e-4)
    last = int(falls.argmin())
    assert worth[actions[last]] == pytest.approx(falls[last])


def test_nothing_lies_beyond_the_last_action(guide: Guide, monkeypatch: pytest.MonkeyPatch):
    """Of a state in which STOP alone is left the critic may say what it likes."""
    search, full = ValueSearch(KERNEL, CPU, 0, guide), root_state(KERNEL, CPU)
    while legal_mask(full)[:-1].any():
        full = step(full, int(np.flatnonzero(legal_mask(full)[:-1])[-1]))
    monkeypatch.setattr(search, "_policy", lambda states: (None, np.full(len(states), 2.5)))
    assert search._values([search.root, full]).tolist() == [2.5, 0.0]


def test_states_are_judged_alike_alone_and_together(guide: Guide):
    search, root = ValueSearch(KERNEL, CPU, 0, guide), root_state(KERNEL, CPU)
    states = [root, *(step(root, int(a)) for a in np.flatnonzero(legal_mask(root)[:-1])[:3])]
    together = search.worth(states)
    for i, state in enumerate(states):
        np.testing.assert_allclose(search.worth([state])[0], together[i], atol=1e-4)


def test_greedy_takes_the_best_until_stopping_is_best(guide: Guide):
    search = ValueSearch(KERNEL, CPU, 0, guide)
    path = search.episodes([search.root], 0.0)[0]
    for before, after in itertools.pairwise(path):
        assert step(before, int(search.worth([before])[0].argmax())).schedule == after.schedule
    assert search.worth([path[-1]])[0].argmax() == STOP_INDEX
    assert guide.predict([path[-1]])[0][0] < 0  # faster than un-optimized, as far as the simulator knows


def test_filter_never_takes_what_is_worth_much_less(guide: Guide):
    """Drawn hot, where the policy alone would take such actions: it does, with the margin as wide as can be."""
    search = FilterSearch(KERNEL, CPU, 0, guide)

    def lost(paths: list[list[State]]) -> list[float]:
        """How much less each action taken is worth than the best one there."""
        found = []
        for before, after in (pair for path in paths for pair in itertools.pairwise(path)):
            worth = search.worth([before])[0]
            [action] = [
                int(a)
                for a in np.flatnonzero(legal_mask(before)[:-1])
                if step(before, int(a)).schedule == after.schedule
            ]
            found.append(worth.max() - worth[action])
        return found

    assert 0.0 <= max(lost(search.episodes([search.root], 30.0)[:8])) <= MARGIN
    free = PolicySearch.episodes(search, [search.root], 30.0)[:8]
    assert np.mean(np.array(lost(free)) > MARGIN) > 0.1


@pytest.mark.parametrize("name", ["value", "filter"])
def test_what_it_asks_for_is_new_and_legal_and_seeded(guide: Guide, name: str):
    search, asked = make_strategy(name, KERNEL, CPU, 0, guide), []
    for round in range(3):
        new = search.ask(4)
        assert new and not set(new) & {(), *asked} and not search.looked  # observations are large: none is kept
        search.tell([Trial(KERNEL.key, s, "ok", (1.0 + round,)) for s in new])
        asked += new
    assert len(asked) == len(set(asked)) and all(state_after(KERNEL, s, CPU).schedule == s for s in asked)
    assert make_strategy(name, KERNEL, CPU, 0, guide).ask(4) == asked[:4]
