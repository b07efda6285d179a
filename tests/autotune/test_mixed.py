"""`mixed`: what it is told corrects it, whoever measured it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tiny import kernel_of
from tinygrad import Tensor

from agents.ppo import PPOConfig
from autotune.compiler import Opt, OptOps, renderer_of
from autotune.episodes import sample_episodes
from autotune.files import DATA
from autotune.guide import Guide
from autotune.records import Trial
from autotune.search.breeding import Breeder
from autotune.search.mixed import CHILDREN, MixedSearch
from autotune.search.policy import PolicySearch
from autotune.search.sequential import SequentialSearch
from autotune.space import MAX_STEPS, legal_mask, root_state, step
from sims import EnsembleConfig, TreesConfig

CPU = renderer_of("CPU")
KERNEL = kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 48))


@pytest.fixture(scope="module")
def guide() -> Guide:
    return Guide.load(DATA / "guide-cpu")


def test_a_search_that_goes_on_knows_what_the_first_one_learned(guide: Guide):
    first = MixedSearch(KERNEL, CPU, 0, guide)
    trials = [Trial(KERNEL.key, s, "ok", (2.0**-i,)) for i, s in enumerate(first.ask(4))]
    trials.append(Trial(KERNEL.key, first.ask(1)[0], "timeout"))
    first.tell(trials)
    again = MixedSearch(KERNEL, CPU, 0, guide)
    again.tell(trials)
    assert [(s.schedule, t) for s, t in again.measured] == [(s.schedule, t) for s, t in first.measured]
    assert [s.schedule for s in again.failed] == [s.schedule for s in first.failed] == [trials[-1].schedule]
    candidates = list(first.pool.values())[:50]
    np.testing.assert_allclose(again._corrected(candidates), first._corrected(candidates), atol=1e-5)
    for trial in trials[:4]:
        assert {trial.schedule[:n] for n in range(len(trial.schedule) + 1)} <= set(again.pool)
    assert not set(again.ask(8)) & {t.schedule for t in trials}


def test_hand_coded_is_a_place_to_go_on_from(guide: Guide):
    """It begins as no schedule does that an untold search would ask for. Told that it is fast, the search goes on from it."""
    untold = {s[:1] for s in MixedSearch(KERNEL, CPU, 0, guide).ask(16)}
    root = root_state(KERNEL, CPU)
    strange = next(step(root, int(a)) for a in np.flatnonzero(legal_mask(root)[:-1])[::-1]
                   if step(root, int(a)).schedule not in untold)  # fmt: skip
    asked = []
    for seconds in (2.0**-20, 1.0):
        search = MixedSearch(KERNEL, CPU, 0, guide)
        search.tell([Trial(KERNEL.key, (), "ok", (2.0**-10,), kind="unoptimized"),
                     Trial(KERNEL.key, strange.schedule, "ok", (seconds,), kind="hand_coded")])  # fmt: skip
        assert len(search.measured) == 2
        asked.append(sum(s[:1] == strange.schedule for s in search.ask(16)))
    assert asked[0] > asked[1]


@pytest.mark.parametrize("known", [False, True])
def test_a_guide_may_have_its_policys_answer_tried_first(guide: Guide, known: bool):
    """Where it is known already (as hand-coded) its place is not taken by a sample; and without such a guide the trees' come first."""
    greedy = PolicySearch(KERNEL, CPU, 0, guide).ask(1)[0]
    told = [Trial(KERNEL.key, greedy, "ok", (2.0**-11,), kind="hand_coded")] if known else []
    asked = {}
    for first in (False, True):
        guide.policy_first = first
        search = MixedSearch(KERNEL, CPU, 0, guide)
        search.tell(told)
        asked[first] = [schedule for _ in range(4) for schedule in search.ask(1)]
        assert (asked[first][0] == greedy) == (first and not known)
        assert search.turns == (["sequential", "policy"] if first else ["policy", "sequential"])  # after one turn
    guide.policy_first = False
    assert asked[True][int(not known) :][:3] == asked[False][:3]  # what the trees choose is the same


def of_two_actions(kind: str = "hand_coded", seconds: float = 2.0**-11) -> list[Trial]:
    """Baselines, the second of which leaves a prefix that nobody has measured."""
    two = (Opt(OptOps.UPCAST, 1, 4), Opt(OptOps.UNROLL, 0, 4))
    return [Trial(KERNEL.key, (), "ok", (2.0**-10,), kind="unoptimized"), Trial(KERNEL.key, two, "ok", (seconds,), kind=kind)]  # fmt: skip


def test_a_promise_is_that_of_a_whole_pool_and_the_pool_grows_when_something_was_measured(guide: Guide):
    """Hand-coded's own prefixes are no pool to promise by; what grew for the promise serves the first batch, too."""
    search, grown = MixedSearch(KERNEL, CPU, 0, guide), []
    grow = search._grow
    search._grow = lambda: grown.append(len(search.measured)) or grow()  # type: ignore[method-assign]
    search.tell(of_two_actions())
    assert len(search._candidates()) == 1
    assert search.promise(2) > 0 and len(search._candidates()) > 100 and grown == [2]
    asked = search.ask(4)
    assert len(asked) == 4 and grown == [2]
    search.tell([Trial(KERNEL.key, asked[0], "ok", (2.0**-9,))])
    search.promise(2)
    search.ask(4)
    assert grown == [2, 3]


def test_the_single_answer_of_an_earlier_run_teaches_like_a_trial(guide: Guide):
    search = MixedSearch(KERNEL, CPU, 0, guide)
    search.tell(of_two_actions("answer", 2.0**-20))
    assert search.fastest == -20 and len(search.measured) == 2


def test_what_is_not_legal_here_is_passed_over(guide: Guide):
    search = MixedSearch(KERNEL, CPU, 0, guide)
    search.tell([Trial(KERNEL.key, (Opt(OptOps.UPCAST, 9, 4),), "ok", (1.0,))])
    assert not search.measured and search.ask(2)


class Watching(Breeder):
    """Remembers how many children were asked for at a time, by counting those of each batch."""

    born: list[tuple]

    def child(self, fastest):
        state = super().child(fastest)
        self.born.append(state.schedule)
        return state


def play(search: MixedSearch, seconds: Callable[[int], float], batches: int) -> list[int]:
    """For each batch of eight, how many of its schedules were bred after those that join the pool: blindly."""
    search.breeder = breeder = Watching(search.root, search.rng)
    search.tell([Trial(KERNEL.key, (), "ok", (1.0,), kind="unoptimized")])
    blind = []
    for i in range(batches):
        breeder.born, before = [], set(search.seen)
        asked = search.ask(8)
        assert len(asked) == len(set(asked)) == 8
        late = breeder.born[CHILDREN:]
        blind.append(len(late) // 2)
        new = [s for s in dict.fromkeys(late) if s not in before][: blind[-1]]
        assert not new or asked[-len(new) :] == new
        search.tell([Trial(KERNEL.key, s, "ok", (seconds(i),)) for s in asked])
    return blind


def test_the_longer_nothing_is_gained_the_less_the_simulator_is_asked(guide: Guide):
    """Of the six that the policies leave of eight: an eighth more with each batch in vain, at most half. While batches gain, none."""
    assert play(MixedSearch(KERNEL, CPU, 0, guide), lambda i: 1.0, 7) == [0, 0, 1, 2, 3, 3, 3]
    assert play(MixedSearch(KERNEL, CPU, 0, guide), lambda i: 2.0**-i, 5) == [0, 0, 0, 0, 0]
    assert play(MixedSearch(KERNEL, CPU, 0, guide), lambda i: 0.999**i, 5) == [
        0,
        0,
        1,
        2,
        3,
    ]  # that is luck of the timer


def test_a_part_of_a_batch_is_what_the_policies_would_do_themselves(guide: Guide):
    """One of four, in turn, the policy of the simulator's view first; what is known already is passed over, and so in a search
    that goes on."""
    own = {
        "sequential": SequentialSearch(KERNEL, CPU, 0, guide).ask(6),
        "policy": PolicySearch(KERNEL, CPU, 0, guide).ask(6),
    }
    search = MixedSearch(KERNEL, CPU, 0, guide)
    batches = [search.ask(4) for _ in range(4)]
    direct = [batch[3] for batch in batches]
    assert [search.origins[s] for s in direct] == ["sequential", "policy"] * 2
    for i, name in enumerate(own):
        assert direct[i::2] == [s for s in own[name] if s in direct[i::2]]  # in its own order, greedy first
    assert len({s for batch in batches for s in batch}) == 16
    again = MixedSearch(KERNEL, CPU, 0, guide)
    again.tell([Trial(KERNEL.key, s, "ok", (1.0,)) for s in batches[0]])
    assert again.ask(4)[3] not in batches[0] and search.origins[direct[0]] == "sequential"


def test_without_a_world_one_policy_gives_all_of_it():
    bare = Guide.load(DATA / "guide-cpu")
    bare.world = None
    search = MixedSearch(KERNEL, CPU, 0, bare)
    assert [search.origins[search.ask(4)[3]] for _ in range(2)] == ["policy"] * 2


def test_one_trial_and_then_three_are_the_four_that_are_chosen_at_once(guide: Guide):
    """Whatever the first one was; only the next four are chosen knowing it."""
    four = MixedSearch(KERNEL, CPU, 0, guide).ask(4)
    search = MixedSearch(KERNEL, CPU, 0, guide)
    first = search.ask(1)
    search.tell([Trial(KERNEL.key, first[0], "ok", (1e6,))])
    rest = search.ask(3)
    assert [*first, *rest] == four and not set(search.ask(4)) & set(four)


def test_where_another_made_trials_the_rest_is_chosen_anew(guide: Guide):
    """Another tuner's, or an earlier run's: one trial is completed by three, none of which waits for long."""
    four = MixedSearch(KERNEL, CPU, 0, guide).ask(4)
    search = MixedSearch(KERNEL, CPU, 0, guide)
    search.ask(1)
    search.tell([Trial(KERNEL.key, four[2], "ok", (1.0,))])
    assert not search.waiting and {four[0], four[2]} <= search.seen and four[1] not in search.seen
    asked = search.ask(3)
    assert len(set(asked) - {four[0], four[2]}) == 3 and not search.waiting
    later = MixedSearch(KERNEL, CPU, 0, guide)
    later.tell([Trial(KERNEL.key, four[0], "ok", (1.0,))])
    assert len(later.ask(3)) == 3 and not later.waiting
    assert len(later.ask(1)) == 1 and len(later.waiting) == 3  # the next four


def test_what_waits_is_what_the_next_visit_promises(guide: Guide):
    """Three that wait are promised as they are, however promising others be; a fourth is the most promising of the others."""
    search = MixedSearch(KERNEL, CPU, 0, guide)
    search.tell([Trial(KERNEL.key, (), "ok", (2.0**-10,), kind="unoptimized")])
    search.ask(1)
    waiting = [search.pool[s] for s in search.waiting]
    candidates = search._candidates()
    own, others = search._corrected(waiting), search._corrected(candidates)
    best = others[:, [int(others.mean(0).argmin())]]
    for count, members in ((3, own), (4, np.concatenate([own, best], 1))):
        assert search.promise(count) == pytest.approx(np.maximum(-10.0 - members.min(1), 0.0).mean())
    assert len(waiting) == 3 and search.promise(1) == pytest.approx(np.maximum(-10.0 - own[:, 0], 0.0).mean())


def test_children_of_the_fastest_can_be_chosen(guide: Guide):
    """They are no schedules that the policy proposes; without them the pool ends where the policy ends."""
    search = MixedSearch(KERNEL, CPU, 0, guide)
    search.tell([Trial(KERNEL.key, (), "ok", (1.0,), kind="unoptimized")])
    asked = search.ask(8)
    proposed = set(search.pool)
    search.tell([Trial(KERNEL.key, s, "ok", (2.0**-i,)) for i, s in enumerate(asked)])
    search._grow = lambda: None  # type: ignore[method-assign]
    more = search.ask(12)
    assert len(more) == 12 and set(search.pool) > proposed and not set(more) & set(asked)
    assert any(s not in proposed for s in more)


def test_the_tuners_small_batches_doubt_too(guide: Guide):
    """Of the three that the policies leave of four: at most one."""
    search, doubted = MixedSearch(KERNEL, CPU, 0, guide), []
    search.tell([Trial(KERNEL.key, (), "ok", (1.0,), kind="unoptimized")])
    blind = search._blind
    search._blind = lambda count: (doubted.append(count), blind(count))[1]  # type: ignore[method-assign]
    for _ in range(6):
        search.tell([Trial(KERNEL.key, s, "ok", (1.0,)) for s in search.ask(4)])
    assert doubted == [0, 0, 0, 1, 1, 1]


def told(guide: Guide, shift: float = 0.0) -> MixedSearch:
    """After eight trials that go up and down, without any regard to what the simulator believes."""
    search = MixedSearch(KERNEL, CPU, 0, guide)
    search.tell([Trial(KERNEL.key, (), "ok", (2.0**shift,), kind="unoptimized")])
    search.tell([Trial(KERNEL.key, s, "ok", (2.0 ** (shift + i % 3),)) for i, s in enumerate(search.ask(8))])
    return search


def test_what_was_measured_is_believed_and_a_slower_clock_changes_nothing_else(guide: Guide):
    """Up to what like schedules that were given unlike times leave: a quarter of what the members are off before."""
    search, slow = told(guide), told(guide, shift=5.0)
    known, times = [s for s, _ in search.measured], np.array([t for _, t in search.measured])
    off = [
        np.abs(m - times - (m - times).mean(1, keepdims=True)).mean()
        for m in (search._members(known), search._corrected(known))
    ]
    assert off[0] > 1.0 and off[1] < 0.25 * off[0]
    candidates = search._candidates()[:50]
    np.testing.assert_allclose(slow._corrected(candidates), search._corrected(candidates) + 5.0, atol=1e-4)


def test_where_nothing_is_left_to_decide_the_policy_is_not_asked(guide: Guide, monkeypatch: pytest.MonkeyPatch):
    """From a state with as many actions as there may be."""
    state = root_state(kernel_of(Tensor.empty(256, 256, 256).sum(2)), CPU)
    for _ in range(MAX_STEPS):
        state = step(state, int(np.flatnonzero(legal_mask(state))[0]))
    monkeypatch.setattr(type(guide.agent), "evaluate", lambda *_: pytest.fail("asked"))
    paths = sample_episodes(guide.agent, [state], np.random.default_rng(0), 1.0, {})
    assert paths == [[state]] * guide.agent.config.n_envs


@pytest.mark.parametrize("masked", [True, False])
def test_a_policy_without_mask_ends_an_episode_by_what_is_illegal(masked: bool, monkeypatch: pytest.MonkeyPatch):
    """It has two legal actions in mind, then one that is not legal. Under a mask that one is not offered, and the episode goes on."""
    root = root_state(KERNEL, CPU)
    first = int(np.flatnonzero(legal_mask(root))[0])
    second = int(np.flatnonzero(legal_mask(step(root, first)))[0])
    end = step(step(root, first), second)
    plan, offered = [first, second, int(np.flatnonzero(~legal_mask(end))[0])], []
    config = PPOConfig(n_envs=2, hidden=8, masked=masked)
    agent = Guide.new(KERNEL, CPU, config, EnsembleConfig(), TreesConfig(), 0).agent

    def answer(observation, hidden, reset):
        offered.append(observation.mask)
        log_probs = np.full(observation.mask.shape, -1e9)
        log_probs[:, plan[min(len(offered), 3) - 1]] = 0.0
        return np.where(observation.mask, log_probs, -2e9), np.zeros(2), hidden

    monkeypatch.setattr(agent, "evaluate", answer)
    paths = sample_episodes(agent, [root], np.random.default_rng(0), 0.0, {})
    assert all(p[2].schedule == end.schedule for p in paths)
    assert all(row.all() != masked for row in offered)
    assert all((len(p) == 3) != masked for p in paths)


def test_each_episode_may_have_a_temperature_of_its_own(guide: Guide):
    """Of the cold half each is the greedy one, whatever the others do. A search draws at one temperature after the other at
    first, later at all of them at once, from the root and from prefixes of the fastest."""
    search = MixedSearch(KERNEL, CPU, 0, guide)
    n = guide.agent.config.n_envs
    greedy = search.episodes([search.root], 0.0)[0][-1].schedule
    ends = [p[-1].schedule for p in search.episodes([search.root], np.repeat([0.0, 10.0], n // 2))]
    assert set(ends[: n // 2]) == {greedy} and len(set(ends[n // 2 :])) > n // 4
    drawn: list[tuple[set, int]] = []
    inner = search.episodes

    def watching(starts, temperature):
        drawn.append(({s.schedule for s in starts}, np.size(temperature)))
        return inner(starts, temperature)

    search.episodes = watching  # type: ignore[method-assign]
    fastest = search.ask(4)[0]
    search.tell([Trial(KERNEL.key, fastest, "ok", (1e-6,))])
    search.ask(4)
    prefixes = {fastest[:i] for i in range(len(fastest) + 1)}
    assert drawn == [({()}, 1)] * 3 + [({()}, n), (prefixes, n)]


def test_what_is_refuted_is_no_parent_and_no_incumbent(guide: Guide):
    search = MixedSearch(KERNEL, CPU, 0, guide)
    search.tell([Trial(KERNEL.key, (), "ok", (1.0,), kind="unoptimized")])
    first, second = search.ask(2)
    search.tell([Trial(KERNEL.key, first, "ok", (0.001,)), Trial(KERNEL.key, second, "ok", (0.5,))])
    search.tell([Trial(KERNEL.key, first, "ok", (0.001,), kind="recheck")])
    assert search.fastest == np.log2(0.001)  # it held
    search.tell([Trial(KERNEL.key, first, "wrong_output", kind="recheck")])
    assert search.fastest == -1.0 and [s.schedule for s in search.failed] == [first]
    assert {s.schedule for s, _ in search.measured} == {(), second}


def test_what_gives_a_refuted_binary_is_refuted_with_it(guide: Guide):
    """As records have it: of three names of two binaries one was wrong on other inputs, and two of the names are withdrawn."""
    search = MixedSearch(KERNEL, CPU, 0, guide)
    search.tell([Trial(KERNEL.key, (), "ok", (1.0,), kind="unoptimized", code_hash="plain")])
    first, second, third = search.ask(3)
    times = zip((first, second, third), (0.001, 0.0011, 0.25), ("same", "same", "other"), strict=True)
    search.tell([Trial(KERNEL.key, s, "ok", (t,), code_hash=name) for s, t, name in times])
    search.tell([Trial(KERNEL.key, first, "wrong_output", kind="recheck")])
    assert search.fastest == -2.0 and [s.schedule for s in search.failed] == [first, second]
    assert {s.schedule for s, _ in search.measured} == {(), third}


def test_what_was_seen_of_a_kernel_does_not_pile_up(guide: Guide):
    search = MixedSearch(KERNEL, CPU, 0, guide)
    search.promise(1), search.ask(8)
    assert not search.looked and not any(advisor.looked for advisor in search.advisors.values())
