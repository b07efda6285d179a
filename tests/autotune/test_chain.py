"""The chain: guided trials, then a beam where it is allowed, then hand-coded; and what each part of it is said to have won."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from tiny import U2, U4, kernel_of
from tinygrad import Tensor

from autotune.budget import Budget
from autotune.compiler import renderer_of
from autotune.errors import UsageError
from autotune.files import DATA
from autotune.guide import Guide
from autotune.records import History, Records, Trial
from autotune.report import Gain, KernelResult, Report, gains, refusal
from autotune.search import origin_of
from autotune.search.mixed import MixedSearch
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


def test_what_was_refuted_has_won_nothing_and_the_incumbent_is_the_better_baseline():
    """Un-optimized is at 6. The 5 was another program's, so all that was won is from 6 to 4."""
    wrong = Trial(KERNEL.key, (U4,), "ok", (5.0,), strategy="auto/policy")
    history = [trial("", 6.0, "unoptimized"), trial("", 8.0, "hand_coded"), trial("auto/policy", 7.0), wrong,
               Trial(KERNEL.key, (U4,), "wrong_output", kind="recheck"), trial("auto/evolution", 4.0)]  # fmt: skip
    assert gains(History(history)) == {"auto/policy": Gain(2, 0.0), "auto/evolution": Gain(1, 2.0)}


def test_what_was_made_beyond_a_budget_is_not_spent():
    kinds = ["random", "mixed/policy", "beam", "mixed/beam", "finetune/random", "finetune/policy"]
    assert History([trial(k, 1.0) for k in kinds]).spent == 3


def test_a_report_counts_calls():
    results = [KernelResult(KERNEL, calls, 8.0, 4.0, 6, (U4,), {}, gains(History(HISTORY))) for calls in (1, 3)]
    report = Report("CPU", 1.0, 1, results)
    assert report.gains["auto/policy"] == Gain(6, 10.0) and report.gains["auto/answer"] == Gain(2, 4.0)
    assert report.to_json()["gains"]["auto/beam"] == {"trials": 2, "ms": pytest.approx(2000.0)}
    assert "auto/evolution                2 trials won     0.000 ms" in report.table()
    assert "0 of 2 kernels stay as tinygrad runs them" in report.table()


def test_a_report_says_which_kernels_could_not_be_measured_and_why():
    failed = [Trial(KERNEL.key, (), "compile_failed", detail="no such thing\nline 2", kind="hand_coded")]
    assert refusal(History(failed)) == "compile_failed: no such thing"
    plain = trial("", 9.0, "unoptimized")
    assert refusal(History([*failed, plain])) == refusal(History([plain, *failed])) == refusal(History(failed))
    assert "run the same command again" in refusal(History()) and refusal(History()) == refusal(History([plain]))
    assert refusal(History(HISTORY)) == ""
    results = [KernelResult(KERNEL, 1, 0.0, 0.0, 0, None, {}, refused=refusal(History(h))) for h in (failed, HISTORY)]
    lines = Report("CPU", 1.0, 1, results).table().splitlines()
    told = [line for line in lines if "could not be measured" in line]
    assert told == [f"  {KERNEL.name} could not be measured (compile_failed: no such thing)"]


def test_mixed_knows_who_proposed_a_schedule():
    search = MixedSearch(KERNEL, CPU, 0, Guide.load(DATA / "guide-cpu"))
    search.tell([Trial(KERNEL.key, (), "ok", (1.0,), kind="unoptimized")])
    search.tell([Trial(KERNEL.key, s, "ok", (0.5,)) for s in search.ask(4)])
    asked = search.ask(4)
    assert all(origin_of(search, s) == search.origins[s] for s in asked)
    assert (
        {"policy", "evolution", "sequential", "recall", "even"}
        <= set(search.origins.values())
        <= {"policy", "evolution", "sequential", "recall", "even", "known"}
    )
    assert origin_of(RandomSearch(KERNEL, CPU, 0), asked[0]) == ""


def test_a_beam_goes_on_where_the_trials_end_and_is_not_searched_twice(tmp_path: Path, runner):
    def tuned(beam: int, trials: int = 2, ended: bool = True) -> list[Trial]:
        tuner = Tuner(records, runner, CPU, trials=trials, strategy="random", progress=False, beam=beam)
        budget = Budget(trials, None if ended else 1e9)
        if not ended:
            budget.in_time = lambda: len(records.history(KERNEL.key, runner.fingerprint).trials) < 12  # type: ignore[method-assign]
        (result,), done = tuner.run([KERNEL], {KERNEL.key: 1}, budget)
        assert done is ended and set(result.gains) <= {"random", "random/beam"}
        return [t for t in records.history(KERNEL.key, runner.fingerprint).trials if t.kind == "trial"]

    with closing(Records(tmp_path / "chain.db")) as records:
        records.add_fingerprint(runner.fields)
        assert [t.strategy for t in tuned(0)] == ["random"] * 2
        cut = tuned(1, ended=False)
        assert 8 < len(cut) < 14
        trials = tuned(1)
        assert trials[: len(cut)] == cut
        assert {t.strategy for t in trials[2:]} == {"random/beam"} and len(trials) > 10
        known = {
            t.schedule: t.seconds for t in records.history(KERNEL.key, runner.fingerprint).trials
        }  # hand-coded, too
        best = min((s for s in known if len(s) == 1 and known[s]), key=lambda s: known[s])
        deeper = [t.schedule for t in trials[2:] if len(t.schedule) == 2]
        assert {s[:1] for s in deeper} == {best}  # a beam of one goes on from the fastest of a level
        assert tuned(1) == trials
        assert [t.strategy for t in tuned(0, trials=4)[len(trials) :]] == ["random"] * 2  # the beam took none of them


def test_a_beam_has_a_width(tmp_path: Path, runner):
    with closing(Records(tmp_path / "r.db")) as records, pytest.raises(UsageError, match="-1 wide"):
        Tuner(records, runner, CPU, trials=1, strategy="random", beam=-1)
