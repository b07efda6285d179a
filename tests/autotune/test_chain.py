"""The chain: guided trials, then a beam where it is allowed, then hand-coded; and what each part of it is said to have won."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from tiny import U2, U4, kernel_of
from tinygrad import Tensor

from autotune.budget import Budget
from autotune.compiler import renderer_of
from autotune.guide import SHIPPED, Guide
from autotune.records import History, Records, Trial
from autotune.report import Gain, KernelResult, Report, gains
from autotune.search import origin_of
from autotune.search.policy import MixedSearch
from autotune.search.random import RandomSearch
from autotune.tuner import Tuner

CPU = renderer_of("CPU")
KERNEL = kernel_of(Tensor.empty(24, 32) @ Tensor.empty(32, 16))


def trial(strategy: str, seconds: float | None, kind: str = "trial") -> Trial:
    verdict, times = ("ok", (seconds,)) if seconds else ("crashed", ())
    return Trial(KERNEL.key, (U2,), verdict, times, kind=kind, strategy=strategy)


BASELINES = [trial("", 9.0, "unoptimized"), trial("", 8.0, "hand_coded")]
HISTORY = [*BASELINES, trial("auto/answer", 7.0, "answer"), trial("auto/policy", 7.5), trial("auto/policy", 5.0),
           trial("auto/evolution", None), trial("auto/beam", 4.5), trial("auto/policy", 4.0)]  # fmt: skip


def test_what_each_part_won_by_hand():
    found = gains(History(HISTORY))
    assert found == {
        "auto/answer": Gain(1, 1.0),
        "auto/policy": Gain(3, 2.5),
        "auto/evolution": Gain(1, 0.0),
        "auto/beam": Gain(1, 0.5),
    }
    assert sum(g.seconds for g in found.values()) == 8.0 - 4.0  # from hand-coded to the best
    assert gains(History(BASELINES)) == {}


def test_a_report_counts_calls():
    results = [KernelResult(KERNEL, calls, 8.0, 4.0, 6, (U4,), {}, gains(History(HISTORY))) for calls in (1, 3)]
    report = Report("CPU", 1.0, 1, results)
    assert report.gains["auto/policy"] == Gain(6, 10.0) and report.gains["auto/answer"] == Gain(2, 4.0)
    assert report.to_json()["gains"]["auto/beam"] == {"trials": 2, "ms": pytest.approx(2000.0)}
    assert "auto/evolution                2 trials won     0.000 ms" in report.table()
    assert "0 of 2 kernels stay as tinygrad runs them" in report.table()


def test_mixed_knows_who_proposed_a_schedule():
    search = MixedSearch(KERNEL, CPU, 0, Guide.load(SHIPPED / "guide-cpu"))
    search.tell([Trial(KERNEL.key, (), "ok", (1.0,), kind="unoptimized")])
    search.tell([Trial(KERNEL.key, s, "ok", (0.5,)) for s in search.ask(4)])
    asked = search.ask(4)
    assert {origin_of(search, s) for s in asked} <= {"policy", "evolution"}
    assert origin_of(search, asked[0]) == search.origins[asked[0]] and set(search.origins.values()) == {
        "policy",
        "evolution",
    }
    assert origin_of(RandomSearch(KERNEL, CPU, 0), asked[0]) == ""


def test_a_beam_goes_on_where_the_trials_end_and_is_not_searched_twice(tmp_path: Path, runner):
    def tuned(beam: int, seconds: float | None = None) -> list[Trial]:
        tuner = Tuner(records, runner, CPU, trials=2, strategy="random", progress=False, beam=beam)
        (result,), done = tuner.run([KERNEL], {KERNEL.key: 1}, Budget(2, seconds))
        assert done and set(result.gains) <= {"random", "random/beam"}
        return [t for t in records.history(KERNEL.key, runner.fingerprint).trials if t.kind == "trial"]

    with closing(Records(tmp_path / "chain.db")) as records:
        records.add_fingerprint(runner.fields)
        assert [t.strategy for t in tuned(0)] == ["random"] * 2
        trials = tuned(1)
        assert {t.strategy for t in trials[2:]} == {"random/beam"} and len(trials) > 10
        level = {t.schedule for t in trials if len(t.schedule) == 1}
        best = min((t.seconds, t.schedule) for t in trials if t.seconds and t.schedule in level)[1]
        deeper = [t.schedule for t in trials[2:] if len(t.schedule) == 2]
        assert deeper and all(s[:1] == best for s in deeper)  # a beam of one goes on from the fastest of a level
        assert tuned(1) == trials
