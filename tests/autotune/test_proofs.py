"""The proofs of tests/proofs in small: what they count is what happens, and what is promised holds."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rows import FIELDS, OTHER
from shell import ROOT
from tiny import U2, U4, add_one, total

from autotune.compiler import renderer_of
from autotune.errors import DeviceError
from autotune.records import BASELINES, Trial, fingerprint_id
from autotune.search import POOLED

sys.path.insert(0, str(ROOT / "tests" / "proofs"))
import concurrently
import dynamics
import fuzz
import protocol

RECORDED = json.loads((ROOT / "benchmarks" / "measuring-protocol-cpu.json").read_text())


def prove(name: str, out: Path, *options: str) -> dict:
    """Run a proof; returns its figures."""
    command = [sys.executable, ROOT / "tests" / "proofs" / f"{name}.py", "--json", out, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return json.loads(out.read_text())


def ends(monkeypatch, proof, *options: object) -> int | str | None:
    """How main() of a proof in this very process ends: its exit status, or the line that it ends with."""
    monkeypatch.setattr(sys, "argv", [proof.__name__, *map(str, options)])
    with pytest.raises(SystemExit) as end:
        proof.main()
    return end.value.code


def test_killed_runs_lose_nothing_and_spend_nothing_twice(tmp_path):
    figures = prove("killed", tmp_path / "out.json", "--count", "2", "--trials", "2", "--usual", "5")
    assert figures["kills of tuner"] + figures["kills of worker"] == 2


@pytest.mark.slow
def test_cold_searches_come_to_their_end(tmp_path):
    figures = prove("cold", tmp_path / "out.json", "--count", "3")
    assert figures["searches"] == figures["kernels"] == 3 and figures["verdicts"]["ok"] > 0
    assert not (tmp_path / "out.part").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["random", "auto"])
def test_tuners_at_the_same_time_share_one_budget(tmp_path, strategy):
    options = ("--count", "1", "--trials", "3", "--seed", "1", "--strategy", strategy)
    figures = prove("concurrently", tmp_path / "out.json", *options)
    assert figures["rounds in which all ran at once"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("target", ["CPU", pytest.param("CL", marks=pytest.mark.cl), "CUDA"])
def test_the_batched_dynamics_agree_with_tinygrad(tmp_path, target, request):
    if target == "CL":
        request.getfixturevalue("cl")
    figures = prove("dynamics", tmp_path / "out.json", "--steps", "1000", "--targets", target)
    assert figures[f"{target}: steps"] >= 1000


@pytest.mark.parametrize("strategy", ["random", POOLED])
def test_a_round_without_any_trial_is_judged(tmp_path, strategy):
    rounds = concurrently.Rounds(2, 8, strategy, random.Random(0))
    rounds.judge(tmp_path / "records.db", [])
    assert rounds.again == rounds.beyond == 0 and rounds.notes == []


# **** dynamics: targets that cannot be opened ****


def test_a_named_target_that_cannot_be_opened_ends_it_before_the_first_walk(monkeypatch):
    monkeypatch.setattr(dynamics, "walk", lambda *_: pytest.fail("it walked"))
    line = ends(monkeypatch, dynamics, "--targets", "CPU", "NOSUCH", "--steps", 200)
    assert "device 'NOSUCH' cannot be opened" in line and "\n" not in line


def test_a_usual_target_that_cannot_be_opened_is_left_out(monkeypatch, tmp_path):
    def renderer(target: str) -> str:
        if target == "CL":
            raise DeviceError("device 'CL' cannot be opened")
        return target

    def walked(target: str, own: str, steps: int, *_: object) -> dynamics.Comparison:
        assert own == target
        found = dynamics.Comparison()
        found.counts["steps"] = steps
        return found

    monkeypatch.setattr(dynamics, "renderer", renderer)
    monkeypatch.setattr(dynamics, "prove", walked)
    assert ends(monkeypatch, dynamics, "--steps", 7, "--json", tmp_path / "out.json") == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    assert {n: v for n, v in figures.items() if n.endswith(": steps")} == {"CPU: steps": 7, "CUDA: steps": 7}
    assert figures["notes"] == ["CL left out: device 'CL' cannot be opened"]


# **** fuzz: what is done, and what is known ****


class Told:
    """A runner that needs no device: every schedule gets the verdict that the test wants."""

    device, fields, fingerprint = "CPU", FIELDS, fingerprint_id(FIELDS)
    verdict = "ok"
    measured: list = []

    def __init__(self, *_: object):
        pass

    def close(self) -> None:
        pass

    def baselines(self, kernel):
        return [Trial(kernel.key, (), "ok", (1e-6,) * 3, kind=kind) for kind in BASELINES]

    def measure(self, kernel, schedules, cutoff, done):
        for schedule in schedules:
            self.measured.append(schedule)
            done(Trial(kernel.key, schedule, self.verdict, (1e-6,) * 3 if self.verdict == "ok" else ()))


@pytest.fixture
def fuzzed(monkeypatch, tmp_path):
    """fuzzed(verdict, count) -> (exit status, schedules measured by this run, figures), on one records file and one kernel; the
    measuring sources are the file `verify.py`."""
    (tmp_path / "verify.py").write_text("old")
    monkeypatch.setattr(fuzz, "SOURCES", (tmp_path / "verify.py",))
    monkeypatch.setattr(fuzz, "Runner", Told)
    monkeypatch.setattr(fuzz.corpus, "load", lambda split: [total(96)] if split == "train" else [])

    def run(verdict: str, count: int) -> tuple[int | str | None, list, dict]:
        monkeypatch.setattr(Told, "verdict", verdict)
        monkeypatch.setattr(Told, "measured", [])
        options = ("--records", tmp_path / "fuzz.db", "--count", count, "--json", tmp_path / "out.json")
        status = ends(monkeypatch, fuzz, *options)
        return status, Told.measured, json.loads((tmp_path / "out.json").read_text())

    return run


def test_a_fuzz_goes_on_with_the_same_sources_and_begins_again_with_others(fuzzed, tmp_path):
    status, first, _ = fuzzed("ok", 2)
    assert status == 0 and len(first) == 2
    status, more, figures = fuzzed("ok", 6)
    assert len(more) == 4 and not set(more) & set(first) and figures["schedules"] == 6
    (tmp_path / "verify.py").write_text("new")
    status, again, figures = fuzzed("wrong_output", 6)
    assert set(again) == {*first, *more} and len(figures["wrong"]) == 6
    assert status == 1


def test_the_sources_of_a_fuzz_are_those_that_measure():
    names = {path.name for path in fuzz.SOURCES}
    assert names >= {"bench.py", "verify.py", "reference.py", "inputs.py", "runner.py", "compiler.py", "space.py"}


@pytest.mark.parametrize(
    ("drawn", "schedule", "is_known"),
    [("any", [["UNROLL", 0, 4], ["PADTO", 0, 32]], True), ("any", [["UNROLL", 0, 4]], False),
     ("offered", [["PADTO", 0, 32]], False), ("hand_coded", [["PADTO", 0, 32]], False)],
)  # fmt: skip
def test_a_wrong_answer_is_known_only_where_the_mask_did_not_offer_it(drawn, schedule, is_known):
    row = {"drawn": drawn, "verdict": "wrong_output", "schedule": schedule}
    assert fuzz.unknown([row]) == ([] if is_known else [row])


def test_what_is_drawn_both_ways_is_an_offered_schedule(monkeypatch):
    """The fourth draw is of any; the fifth, an offered one, is the same."""
    turns = iter([(U2,), (U2,), (U2,), (U4,), (U4,), ()])
    monkeypatch.setattr(fuzz, "MAX_ACTIONS", 1)
    monkeypatch.setattr(fuzz, "_step", lambda *_: SimpleNamespace(schedule=next(turns)))
    assert fuzz.draw(add_one(), renderer_of("CPU"), 3, 0) == [("offered", (U2,)), ("offered", (U4,)), ("offered", ())]


def test_a_fuzz_counts_the_kernels_of_its_own_device_only(records):
    for fields, kernel in ((FIELDS, add_one()), (OTHER, total(96))):
        records.add_kernel(kernel)
        own = records.add_fingerprint(fields)
        records.add_trial(own, Trial(kernel.key, (U4,), "ok", (1e-6,) * 3), 1)
    assert fuzz.summary(records, fingerprint_id(FIELDS), "CPU")["kernels"] == 1


# **** protocol: the bars ****


class Timer(Told):
    """Kernels take the same time within 0.2%, but with U4 a tenth more."""

    def duel(self, kernel, schedules):
        return [(random.uniform(0.999, 1.001) * (1.1 if U4 in schedule else 1.0),) * 3 for schedule in schedules]


@pytest.mark.parametrize("accepts_everything", [False, True])
def test_a_judge_that_accepts_everything_misses_a_bar(monkeypatch, accepts_everything):
    shares = {"shares": dict.fromkeys(protocol.PARTS, 0.1)}
    monkeypatch.setattr(protocol, "Runner", Timer)
    monkeypatch.setattr(protocol, "shares", lambda *_: shares)
    monkeypatch.setattr(protocol, "pairs_of", lambda *_: [(1.1, (), (U4,))])
    if accepts_everything:
        monkeypatch.setattr(protocol, "judge", lambda *_: SimpleNamespace(accepted=True))
    assert ends(monkeypatch, protocol, "--count", 4, "--itself", 4, "--kernels", 1) == int(accepts_everything)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("itself", "said to differ", 9), ("pairs", "same verdict", 0.88), ("trial", "shares", {"overhead": 0.2})],
)
def test_each_bar_of_the_protocol_can_be_missed(part, name, value):
    """The figures on record meet all of them."""
    figures = copy.deepcopy(RECORDED)
    assert protocol.missed(figures) == []
    (figures[part] if part == "trial" else figures[part][0])[name] = value
    assert len(protocol.missed(figures)) == 1
