"""How many trials a strategy needs: by hand, and with real trials of a small kernel."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import U2, U4, kernel_of
from tinygrad import Tensor

from autotune.compiler import renderer_of
from autotune.curves import (
    Curve,
    Search,
    Shared,
    best_known,
    makespan,
    needed,
    pooled,
    search,
    summarise,
    table,
    totals,
)
from autotune.experiments import curves as experiment
from autotune.experiments.ablations import ABLATIONS
from autotune.experiments.kept import pack
from autotune.files import DATA
from autotune.guide import Guide
from autotune.kernel import Kernel, Schedule
from autotune.records import Records, Trial
from autotune.search.mixed import MixedSearch
from autotune.search.policy import PolicySearch
from autotune.search.value import ValueSearch
from autotune.space import root_state


def curve(strategy: str, seed: int, times: list[float | None], kernel: str = "a", hand: float = 0.0) -> Curve:
    return Curve(kernel, strategy, seed, hand, times, [0.5 * (i + 1) for i in range(len(times))])


def test_what_is_finished_is_on_record_though_the_batch_is_not(tmp_path: Path):
    kernel = kernel_of(Tensor.empty(48) + 1)

    class Interrupted:
        fingerprint = "here"

        def baselines(self, kernel):
            return [Trial(kernel.key, (), "ok", (1.0,), kind=kind) for kind in ("unoptimized", "hand_coded")]

        def measure(self, kernel, schedules, cutoff, done=None):
            done(Trial(kernel.key, schedules[0], "ok", (1.0,)))
            raise KeyboardInterrupt

    with closing(Records(tmp_path / "r.db")) as records:
        records.add_kernel(kernel)
        shared = Shared(kernel, records, Interrupted())  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):
            shared.trials([(U2,), (U4,)])
        assert [t.schedule for t in records.history(kernel.key, "here").trials if t.kind == "trial"] == [(U2,)]


def test_a_user_keeps_the_best_so_far_or_hand_coded():
    c = curve("x", 0, [1.0, None, -1.0, -0.5])
    assert [c.best_after(n) for n in range(5)] == [0.0, 0.0, 0.0, -1.0, -1.0]


def test_the_unoptimized_kernel_is_had_for_nothing_too_but_figures_are_over_hand_coded():
    c = Curve("k", "x", 0, 1.0, [0.5], [1.0], floor=-1.0)
    assert [c.best_after(n) for n in (0, 1)] == [-1.0, -1.0] and needed(c, -1.0) == (0.0, 0.0)
    assert totals([c], {"k": 1}, 0).tolist() == [0.25]
    assert Curve("k", "x", 0, 1.0, [0.5], [1.0], floor=2.0).best_after(0) == 1.0


def test_compilations_run_side_by_side():
    """Two compilers: 3 and 1, then 1 on the second, then 2 on that as well, since it is free at 2."""
    assert makespan([]) == 0.0 and makespan([1.5]) == 1.5 and makespan([1.0, 1.0]) == 1.0
    assert makespan([3.0, 1.0, 1.0, 2.0]) == 4.0
    assert makespan([6.0, 2.0, 2.0, 4.0]) == 8.0  # metamorphic


def test_a_batch_takes_its_compilations_side_by_side_and_all_else_in_turn():
    asked = [(U2,), (U4,)]
    told: list[Trial] = []
    strategy = SimpleNamespace(ask=lambda count: asked[:count], tell=told.extend)
    costs = {"compile_seconds": 1.0, "verify_seconds": 0.25, "timing_seconds": 0.5}
    shared = SimpleNamespace(
        kernel=None, baselines={}, trials=lambda schedules: [Trial("k", s, "ok", (1.0,), **costs) for s in schedules]
    )
    searching = Search(shared, "x", 0, lambda _: strategy)  # type: ignore[arg-type]
    assert searching.visit(2) == 2 == len(told)
    assert searching.seconds == pytest.approx([1.75, 2.5], abs=0.1)  # the rest is thinking


def test_how_many_trials_it_took():
    close = -2.0 + math.log2(1.04)
    assert needed(curve("x", 0, [None, close, -2.0]), -2.0) == (2.0, 1.0)
    assert needed(curve("x", 0, [-1.9]), -2.0) == (math.inf, math.inf)
    assert needed(curve("x", 0, [5.0], hand=-2.0), -2.0) == (0.0, 0.0)


CURVES = [
    curve("good", 0, [-2.0, 0.0]), curve("good", 1, [-1.0, -2.0]),
    curve("good", 0, [3.0, 0.0], "b", 1.0), curve("good", 1, [0.0, None], "b", 1.0),
    curve("random", 0, [1.0, None]), curve("random", 1, [None, -1.0]),
    curve("random", 0, [1.0, 2.0], "b", 1.0), curve("random", 1, [2.0, 2.0], "b", 1.0),
]  # fmt: skip


def test_a_summary_by_hand():
    """Best known: kernel a -2, kernel b 0. Scores after one trial are 1, 1/2 (a) and 1/2, 1 (b) for `good`, the middle half
    of which has the mean 3/4; for random 1/4, 1/4, 1/2, 1/2 -> 3/8."""
    assert best_known(CURVES) == {"a": -2.0, "b": 0.0}
    found = summarise(CURVES)
    assert found["good"]["score"][1]["value"] == pytest.approx(0.75)
    assert found["random"]["score"][1]["value"] == pytest.approx(0.375)
    assert found["good"]["score"][2]["value"] == pytest.approx(1.0)
    assert found["good"]["over"][1]["value"] == pytest.approx((1.0 + (0.5 + 1 + 0.5 + 1) / 4) / 2)
    assert found["good"]["reached"] == {1: 0.5, 2: 1.0} and found["random"]["reached"] == {1: 0.0, 2: 0.0}
    assert (found["good"]["trials"], found["good"]["seconds"]) == (1.5, 0.75)
    assert found["random"]["trials"] is None and "never" in table(found)
    assert found["good"]["each_trial"] == 0.5 and found["good"]["worst"] == {1: 0.5, 2: 1.0}


def test_totals_by_hand():
    """Seconds over hand-coded after one trial, seed 0: a 1/4 of 1, b 2 of 2; seed 1: a 1/2, b 1. Called 3 and 1 times, of 5."""
    good, calls = [c for c in CURVES if c.strategy == "good"], {"a": 3, "b": 1}
    assert totals(good, calls, 0).tolist() == [1.0, 1.0]
    assert totals(good, calls, 1) == pytest.approx([2.75 / 5, 2.5 / 5])
    assert totals(good, calls) == pytest.approx([1.75 / 5, 1.75 / 5]) and len(totals(good, calls)) == 2
    found = summarise(CURVES, calls=calls)["good"]
    assert found["total"][1] == pytest.approx([0.55, 0.5]) and found["total"][2] == pytest.approx([0.35, 0.35])
    assert found["spent"] == {1: {"seconds": 0.5}, 2: {"seconds": 1.0}}
    assert found["end"] == pytest.approx({"total": 0.35, "trials": 2.0, "seconds": 1.0})
    twice = summarise(CURVES, calls={"a": 6, "b": 2})["good"]
    assert twice == found  # metamorphic


def test_trials_that_are_shared_count_when_the_program_had_them():
    """Two kernels, four trials in all: kernel a has the first and the last, b the two between. After one trial a kernel (two in
    all) each has had one."""
    a = Curve("a", "auto", 0, 0.0, [-1.0, -2.0], [0.5, 1.5], [0.5, 2.0])
    b = Curve("b", "auto", 0, 0.0, [1.0, -3.0], [0.5, 1.0], [1.0, 1.5])
    assert [c.made(1) for c in (a, b)] == [1, 1] and [c.made(1.5) for c in (a, b)] == [1, 2]
    assert [a.best_after(n) for n in (0, 0.5, 1, 2)] == [0.0, -1.0, -1.0, -2.0]
    assert (a.spent_after(0.4), a.spent_after(1), a.spent_after(math.inf)) == (0.0, 0.5, 1.5)
    assert needed(a, -2.0) == (2.0, 1.5) and needed(b, -3.0) == (1.5, 1.0)
    assert Curve("c", "auto", 0, 0.0, [], [], []).best_after(9) == 0.0  # never visited
    assert list(summarise([a, b])["auto"]["total"]) == [1, 2]


def test_strategies_may_have_different_numbers_of_seeds():
    once = [curve("beam", 0, [-2.0]), curve("beam", 0, [0.0], "b", 1.0)]
    found = summarise([*CURVES, *once])
    assert found["beam"]["score"][2]["value"] == 1.0 and found["beam"]["total"][1] == [pytest.approx(1.25 / 3)]
    assert found["good"] == summarise(CURVES)["good"]


def test_slower_clocks_and_other_units_change_no_score():
    """Metamorphic: log times are shifted by a constant in each kernel."""
    moved = [
        Curve(c.kernel, c.strategy, c.seed, c.hand_coded + 3, [t if t is None else t + 3 for t in c.times], c.seconds)
        for c in CURVES
    ]
    assert summarise(moved) == summarise(CURVES)


def test_what_one_search_measured_the_next_one_is_told(tmp_path: Path, runner):
    kernel, cpu = kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 48)), renderer_of("CPU")
    with closing(Records(tmp_path / "shared.db")) as records:
        records.add_fingerprint(runner.fields)
        shared = Shared(kernel, records, runner)
        first = search(shared, "random", cpu, 0, None, 3)
        spent = records.history(kernel.key, runner.fingerprint).spent
        again = search(Shared(kernel, records, runner), "random", cpu, 0, None, 3)
        assert spent == 3 == records.history(kernel.key, runner.fingerprint).spent
        assert again.times == first.times and len(first.seconds) == 3
        assert first.seconds == sorted(first.seconds) and first.hand_coded == shared.hand_coded
        known = shared.trials([(U2,), (U4,), (U2,)])
        assert known[0] == known[2] and records.history(kernel.key, runner.fingerprint).spent <= 5


def test_a_program_spends_where_it_pays_and_never_more_than_it_has(tmp_path: Path, runner):
    """A matrix product that is called a thousand times, and a sum that is called once and is fast already."""
    big, small = kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 48)), kernel_of(Tensor.empty(32).sum())
    guide = Guide.load(DATA / "guide-cpu")
    with closing(Records(tmp_path / "shared.db")) as records:
        records.add_fingerprint(runner.fields)
        kernels = [Shared(k, records, runner) for k in (small, big)]
        found = pooled(kernels, {big.key: 1000, small.key: 1}, "auto", renderer_of("CPU"), 0, guide, 3)
        of = {c.kernel: c for c in found}
    spent = {key: len(c.times) for key, c in of.items()}
    assert spent == {small.key: 0, big.key: 6}  # all there are, in a visit that would take more
    turns = of[big.key].turns
    assert turns == [(i + 1) / 2 for i in range(spent[big.key])] and of[small.key].turns == []
    assert of[big.key].best_after(math.inf) < of[big.key].hand_coded


class Slow(MixedSearch):
    """It asks at once, and takes a tenth of a second to promise."""

    def __init__(self, kernel: Kernel):
        self.left, self.promises = [(U2,), (U4,), (U2, U2), (U4, U2)], 0

    def ask(self, count: int) -> list[Schedule]:
        return [self.left.pop() for _ in range(min(count, len(self.left)))]

    def tell(self, trials: Sequence[Trial]) -> None:
        pass

    def promise(self, count: int) -> float:
        self.promises += 1
        time.sleep(0.1)
        return 1.0


class Instant(Shared):
    """Every trial takes no time at all."""

    def __init__(self, kernel: Kernel):
        self.kernel, self.known = kernel, {}
        self.baselines = {
            kind: Trial(kernel.key, (), "ok", (1.0,), kind=kind) for kind in ("unoptimized", "hand_coded")
        }

    def trials(self, schedules: Sequence[Schedule]) -> list[Trial]:
        return [Trial(self.kernel.key, s, "ok", (0.5,)) for s in schedules]


def test_choosing_where_trials_go_is_charged():
    """To the kernel that is chosen: all promises are among the seconds of the last trials, whosever they are."""
    shared = [Instant(kernel_of(Tensor.empty(64, n).sum(1))) for n in (32, 48)]
    made: list[Slow] = []

    def make(name: str, kernel: Kernel, *_) -> Slow:
        made.append(Slow(kernel))
        return made[-1]

    found = pooled(shared, {s.kernel.key: 1 for s in shared}, "auto", renderer_of("CPU"), 0, None, 2, make)
    assert sum(len(c.times) for c in found) == 4
    spent, promised = sum(c.seconds[-1] for c in found), 0.1 * sum(own.promises for own in made)
    assert (
        promised >= 0.2 and promised <= spent < 1.5 * promised
    )  # twice, if it were charged to both; a busy machine takes a little more


def test_a_checkpoint_searches_as_its_name_begins():
    """One that begins as no strategy that a checkpoint leads searches as `mixed`."""
    guide, own = Guide.load(DATA / "guide-cpu"), object.__new__(experiment.Searches)
    kinds = {
        "policy-mine": PolicySearch,
        "value-mine": ValueSearch,
        "auto-mine": MixedSearch,
        "mine": MixedSearch,
        "random-mine": MixedSearch,
    }
    own.guides = dict.fromkeys(kinds, guide)
    assert {
        name: type(
            own._make(name, kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 48)), renderer_of("CPU"), 0, guide)
        )
        for name in kinds
    } == kinds


def test_each_search_pays_for_its_own_thinking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Those of one kernel and those that share their trials; an ablation of `auto` is of the second kind."""
    kernel, cpu = kernel_of(Tensor.empty(8, 8).sum(1)), renderer_of("CPU")
    guide = Guide.load(DATA / "guide-cpu")
    asked: list[int] = []

    def thinks(*_) -> Curve:
        asked.append(sum(map(len, guide._predicted.values())) + len(guide._leaves))
        guide.members([root_state(kernel, cpu)])
        guide.leaves([root_state(kernel, cpu)])
        return curve("mixed", 0, [1.0], kernel.key)

    monkeypatch.setattr(experiment, "search", thinks)

    def together(*_) -> list[Curve]:
        nonlocal pooling
        pooling += 1
        return [thinks()]

    pooling = 0
    monkeypatch.setattr(experiment, "pooled", together)
    monkeypatch.setattr(experiment, "Shared", lambda *_: None)
    session = SimpleNamespace(out=tmp_path, device="CPU", renderer=cpu, measurer=None, records=lambda: None)
    settings = {
        "strategies": ["mixed", "policy", "auto", "auto-no-relatives"],
        "seeds": 1,
        "fewer": {},
        "guides": {},
        "more": {},
        "trials": 3,
    }
    searches = experiment.Searches(session, settings, [kernel], {kernel.key: 1}, guide)
    assert len(list(searches.all())) == 4 and pooling == 2
    assert asked == [0, 0, 0, 0] and guide._predicted and guide._leaves
    made = searches._make("auto-no-relatives", kernel, cpu, 0, guide)
    assert type(made) is ABLATIONS["no-relatives"]


def searches_of(out: Path, calls: dict[str, int]) -> experiment.Searches:
    """Of nothing, to see in which files they would keep what they find."""
    session = SimpleNamespace(out=out, device="CPU", renderer=renderer_of("CPU"))
    settings = {"strategies": ["auto", "mixed"], "seeds": 1, "fewer": {}, "guides": {}, "more": {}, "trials": 3}
    return experiment.Searches(session, settings, [], calls, None)  # type: ignore[arg-type]


def test_a_search_beside_other_baselines_is_made_again(tmp_path: Path):
    """A part of another device: its times are no match for ours."""
    own = curve("random", 0, [1.0])
    path = experiment.curve_file(tmp_path, "random", 0, 3, "a", None)
    here = SimpleNamespace(hand_coded=own.hand_coded)
    assert not experiment._made_here(path, here)  # type: ignore[arg-type]
    path.write_text(json.dumps(asdict(own)))
    assert experiment._made_here(path, here)  # type: ignore[arg-type]
    assert not experiment._made_here(path, SimpleNamespace(hand_coded=own.hand_coded + 1e-9))  # type: ignore[arg-type]


def test_where_kernels_share_their_trials_another_program_is_another_search(tmp_path: Path):
    own, turned, other, called = (
        searches_of(tmp_path, calls) for calls in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1}, {"a": 1, "b": 3})
    )
    assert own._file("auto", 0, "a") == turned._file("auto", 0, "a")
    assert len({s._file("auto", 0, "a") for s in (own, other, called)}) == 3
    assert len({s._file("mixed", 0, "a") for s in (own, other, called)}) == 1


def test_a_kept_run_is_taken_over_but_for_what_another_checkpoint_has_led(tmp_path: Path):
    """Nor for what the trials that shipped then have taught: a file keeps neither."""
    calls, names = {"a": 1, "b": 2}, ["auto", "beam", "mixed", "random", "auto-twin", "ranker"]
    settings = {"checkpoint": "shipped", "guides": {"auto-twin": "x"}, "more": {"random": 2}, "trials": 3}
    curves = [asdict(curve(name, 0, [1.0])) for name in names]
    figures = {"settings": settings, "calls": calls, "curves": curves}
    (tmp_path / "run.json").write_text('{"experiment": {"name": "curves"}}')
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "result.json").write_text(json.dumps({"figures": figures}))
    pack(tmp_path, tmp_path / "kept.tar.xz")

    (tmp_path / "new").mkdir()
    experiment.take_over(tmp_path / "kept.tar.xz", tmp_path / "new")
    found = {json.loads(path.read_text())["strategy"]: path for path in (tmp_path / "new").iterdir()}
    assert sorted(found) == ["beam", "random"] and "-2-" in found["random"].name
    assert searches_of(tmp_path / "new", calls)._file("beam", 0, "a")[0] == found["beam"]


def test_a_run_goes_on_with_what_its_own_checkpoints_have_led(tmp_path: Path):
    part, strategies = tmp_path / "part", ["random", "mixed", "auto", "twin"]
    part.mkdir()
    for name in strategies:
        experiment.curve_file(part, name, 0, 3, "a", None).write_text(json.dumps(asdict(curve(name, 0, [1.0]))))
    learned = experiment.curve_file(part, "ranker", 0, 3, "a", None)  # from the trials that shipped then
    learned.write_text(json.dumps(asdict(curve("ranker", 0, [1.0]))))

    def taken(label: str, **guides: bytes) -> list[str]:
        (tmp_path / label).mkdir()
        for name, data in guides.items():
            (tmp_path / label / f"{name.replace('_', '-')}.safetensors").write_bytes(data)
        experiment.take_over(part, tmp_path / label)
        return sorted(json.loads(path.read_text())["strategy"] for path in (tmp_path / label).glob("curve-*"))

    assert taken("of a part without checkpoints", guide=b"1", guide_twin=b"2") == sorted(strategies)
    (part / "guide.safetensors").write_bytes(b"1"), (part / "guide-twin.safetensors").write_bytes(b"2")
    assert taken("the same", guide=b"1", guide_twin=b"2") == sorted(strategies)
    assert taken("another twin", guide=b"1", guide_twin=b"1") == ["auto", "mixed", "random"]
    assert taken("another", guide=b"2", guide_twin=b"2") == ["random", "twin"]
    assert taken("led by none") == ["random"]  # else the next run would take them for its own


def test_kernels_that_could_not_be_measured_are_named(monkeypatch: pytest.MonkeyPatch, capsys):
    good, bad = kernel_of(Tensor.empty(8, 8).sum(1)), kernel_of(Tensor.empty(9, 7).max(1))
    times = {good.key: -3.0, bad.key: math.nan}
    program = SimpleNamespace(kernels={k.key: k for k in (good, bad)}, calls={good.key: 2, bad.key: 1})
    session = SimpleNamespace(records=lambda: None, measurer=None)
    monkeypatch.setattr(experiment, "program_of", lambda *_: program)
    monkeypatch.setattr(experiment, "Shared", lambda kernel, *_: SimpleNamespace(hand_coded=times[kernel.key]))
    assert experiment.kernels_of(session, {"program": "two", "least": 0.0}) == ([good], {good.key: 2})
    assert capsys.readouterr().err.splitlines()[-1] == f"left out, since they could not be measured: {bad.name}"
    times[bad.key] = -4.0
    experiment.kernels_of(session, {"program": "two", "least": 0.0})
    assert "left out" not in capsys.readouterr().err
