"""The tables of docs/benchmarks.md, by hand."""

from __future__ import annotations

import json
import math
import sqlite3
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from autotune.curves import Curve, profile, summarise
from autotune.experiments.kept import pack

CALLS = {"a": 3, "b": 1}
FREE = {"CPU": {"a": (0.0, 0.0), "b": (0.0, 0.0)}}  # preparing a kernel costs nothing


def curve(strategy: str, kernel: str, times: list[float | None]) -> Curve:
    """Hand-coded takes a second in kernel a and two in b; each trial takes half a second."""
    return Curve(kernel, strategy, 0, float(kernel == "b"), times, [0.5 * (i + 1) for i in range(len(times))])


CURVES = [
    curve("beam", "a", [0.0] * 39 + [-2.0]), curve("beam", "b", [1.0] * 39 + [0.0]),
    curve("auto", "a", [None] + [-1.0] * 8 + [-2.0] * 7), curve("auto", "b", [0.0] * 16),
    curve("random", "a", [-1.0] * 128), curve("random", "b", [None] * 128),
]  # fmt: skip


@pytest.fixture
def figures(tool):
    return tool("bench_figures")


def test_a_strategy_is_held_against_beam_and_random_schedules(figures):
    """Beam search ends after 40 trials, a tenth of which is 4. After these `auto` is at .5 and 1 s, beam ended at .25 and 1,
    random at .5 and 2: calls counted 2.5 s beside 1.75 and 3.5. After 10 it is at .25 and 1."""
    budgets = {"beam": 1000, "auto": 16, "random": 128}
    rows = figures._held_against("auto", CURVES, CALLS, budgets)
    assert rows == [
        "| auto | 4 | beam | all | 1.429 | 1.00 | 1.414 | 2.00 | 0 | 1 | 1 | 0.10 |",
        "| auto | 10 | beam | all | 1.000 |  | 1.000 | 1.00 | 0 | 2 | 0 | 0.25 |",
        "| auto | 4 | random | 128 | 0.714 | 1.00 | 0.707 | 1.00 | 1 | 1 | 0 | 0.03 |",
        "| auto | 10 | random | 128 | 0.500 |  | 0.500 | 0.50 | 2 | 0 | 0 | 0.08 |",
    ]
    assert figures._held_against("auto", CURVES, CALLS, {**budgets, "random": 100}) == rows[:2]  # not searched so far
    assert figures._held_against("beam", CURVES, CALLS, budgets) == []
    longer = [Curve(c.kernel, c.strategy, 0, c.hand_coded, c.times * 3, c.seconds * 3) for c in CURVES]
    bars = [row.split(" | ")[1] for row in figures._held_against("auto", longer, CALLS, budgets)]
    assert bars == ["10", "10"]  # a tenth of 120 is more


def test_of_several_seeds_the_median_run_counts_and_the_worst_kernel_of_all(figures):
    """Calls counted, three runs take 1, 2 and 3 s for a, 4, 1 and 1 s for b, the other 1 s for each: 7, 7 and 10 s beside 4 s. The medians
    of the kernels, 2 and 1 s, would make 7 of no run's; so here they are 1.75, 1.75 and 2.5."""
    times = {0: (0.0, 2.0), 1: (1.0, 0.0), 2: (math.log2(3), 0.0)}
    own = [
        replace(curve("auto", k, [t]), seed=seed, hand_coded=9.0)
        for seed, of in times.items()
        for k, t in zip("ab", of, strict=True)
    ]
    other = [replace(curve("beam", k, [0.0]), hand_coded=9.0) for k in "ab"]
    held = figures._held("auto", own + other, CALLS, 1, "beam", math.inf)
    assert held.totals == pytest.approx([1.75, 1.75, 2.5]) and held.total() == "1.75 (1.75 to 2.50)"
    assert held.geometric == pytest.approx(3**0.5) and held.worst == pytest.approx(4.0)  # of 2, 1.41 and 1.73
    assert held.counts == (0, 1, 1)  # by medians a takes twice the time, b the same
    assert figures._held("auto", own[:2] + other, CALLS, 1, "beam", math.inf).total(3) == "1.750"


def test_preparing_a_kernel_is_charged_when_a_search_comes_to_it_and_comes_back(figures, tmp_path: Path):
    """Of two kernels `auto` tries a, b, b, a, a: it comes to a twice, to b once; beam once to each. Kernel a costs 10 s and then 1 s, b
    3 s; on another device other ones do."""
    turns = {"a": [0.5, 2.0, 2.5], "b": [1.0, 1.5]}
    auto = [replace(curve("auto", k, [0.0] * len(t)), turns=t) for k, t in turns.items()]
    beam = [curve("beam", k, [0.0] * 2) for k in CALLS]
    assert [c.visits(2) for c in [*auto, *beam]] == [[1, 2, 2], [1, 1], [1, 1], [1, 1]]
    cpu = {"seconds": {"a": 10.0, "b": 3.0}, "again": {"a": 1.0, "b": 7.0}}
    cl = {"seconds": {"a": 1.0, "b": 0.0}, "again": {"a": 1.0, "b": 0.0}}
    for device, costs in (("CPU", cpu), ("CL", cl)):
        (tmp_path / f"preparing-{device}.json").write_text(json.dumps({"device": device, **costs}))
    known = figures.preparing_of(tmp_path)
    result = {"device": "CPU", "figures": {"calls": CALLS, "curves": [asdict(c) for c in [*auto, *beam]]}}
    found = figures.curves_of(result, known)
    assert [c.seconds for c in found] == [[10.5, 12.0, 12.5], [3.5, 4.0], [10.5, 11.0], [3.5, 4.0]]
    found = figures.curves_of({**result, "device": "CL"}, known)
    assert [c.seconds for c in found] == [[1.5, 3.0, 3.5], [0.5, 1.0], [1.5, 2.0], [0.5, 1.0]]
    with pytest.raises(
        SystemExit, match="not known of 2 kernels of a run with DEV=METAL: measure it with tools/bench_preparing"
    ):
        figures.curves_of({**result, "device": "METAL"}, known)
    assert figures._seconds("auto", found, 1.0) == 1.0  # a after its first trial, b after its own: 1.5 and 0.5


def test_a_first_answer_that_fails_is_counted_by_itself(figures):
    """`auto` answers kernel a with a schedule that fails, b with one of twice hand-coded's speed."""
    assert "| auto | 2.000 | 2.00 | 1 of 2 |" in figures._answers(CURVES)
    assert figures._answers([c for c in CURVES if c.strategy != "auto"]) == ""


def test_the_overview_has_a_row_for_each_program_that_was_searched_with_all_three(figures):
    settings = {"program": "two", "trials": 16, "strategies": ["beam", "auto", "random"], "more": [["random", 128]]}
    summary = {name: {"end": {"trials": 40.0}} for name in settings["strategies"]}
    result = {"device": "CPU", "machine": "here", "figures": {"settings": settings, "summary": summary, "calls": CALLS,
                                           "curves": [asdict(c) for c in CURVES]}}  # fmt: skip
    (row,) = figures._overview([result], FREE).splitlines()[2:]
    assert row == "| two, DEV=CPU on here | 2 | 40 | 4 | 1.43 | 0.71 | 0.10 | 2.00 | 1.00 | 2.00 |  |"
    for missing in (
        {"strategies": ["auto", "random"]},
        {"more": []},
    ):  # no beam search; fewer random schedules than 128
        without = {**result["figures"], "settings": {**settings, **missing}}
        assert len(figures._overview([{**result, "figures": without}], FREE).splitlines()) == 2


def test_what_64_trials_come_to_stands_beside_what_anyone_found(figures, tmp_path: Path):
    """Kernel b is twice as fast after sixteen trials: 3 times .25 and .5 s beside beam's 1.75 and random's 3.5. Someone has found .125 for a."""
    curves = [c for c in CURVES if (c.strategy, c.kernel) != ("auto", "b")]
    curves += [curve("auto", "b", [0.0] * 16 + [-1.0] * 48), curve("evolution", "a", [-3.0])]
    found = {"settings": {"program": "two"}, "calls": CALLS, "curves": [asdict(c) for c in curves]}
    (tmp_path / "curves-two-64-cpu.json").write_text(json.dumps({"device": "CPU", "figures": found}))
    (tmp_path / "curves-two-cpu.json").write_text("not asked for")
    (row,) = figures._far(tmp_path, FREE)[1].splitlines()[2:]
    assert row == "| two | 2 | 1 | 1.00 | 0.71 | 0.36 | 0.50 | 1.00 | 1.00 | `curves-two-64-cpu.json` |"
    assert figures._far(tmp_path / "nothing", {}) == []


def test_a_strategy_has_no_figures_beyond_its_trials(figures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`policy` had one trial, `auto` ten; what they came to is not shown as that of 4, or of 16."""
    settings = {"program": "two", "trials": 10, "strategies": ["auto", "policy"], "more": [["policy", 1]], "least": 0.0}
    curves = [curve("auto", k, [0.0] * 10) for k in CALLS] + [curve("policy", k, [0.0]) for k in CALLS]
    summary = json.loads(json.dumps(summarise(curves, calls=CALLS)))
    result = {"device": "CPU", "machine": "here", "figures": {"settings": settings, "summary": summary, "calls": CALLS,
              "curves": [asdict(c) for c in curves]}}  # fmt: skip
    monkeypatch.setattr(figures, "result_of", lambda _: result)
    rows = [
        line.split(" | ") for line in figures._program(tmp_path / "two.tar.xz", FREE).splitlines() if "policy" in line
    ]
    (totals, scores, first) = rows  # no row of the profile, none against others
    assert totals[2] and totals[3:5] == ["", ""] and scores[1] and scores[2:] == ["", " |"] and len(first) == 4


def test_a_kept_run_tells_on_which_processor_it_was_measured(figures, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    found = {"fingerprint": "second", "device": "CPU", "figures": {"settings": {"program": "two"}}}
    for name, data in (("run", {"experiment": {"name": "curves"}}), ("config", {"part": "runs/1"}), ("result", found)):
        (run / f"{name}.json").write_text(json.dumps(data))
    with closing(sqlite3.connect(run / "records.db")) as records, records:
        records.execute("CREATE TABLE fingerprints (id TEXT PRIMARY KEY, fields TEXT NOT NULL)")
        rows = [(name, json.dumps({"model": f"the {name}"})) for name in ("first", "second")]
        records.executemany("INSERT INTO fingerprints VALUES (?, ?)", rows)
    pack(run, tmp_path / "kept.tar.xz")
    result = figures.result_of(tmp_path / "kept.tar.xz")
    assert result == {**found, "machine": "the second"}
    assert figures.title(result) == "two, DEV=CPU on the second"


def test_a_performance_profile_by_hand():
    """After 4 trials `auto` takes twice the best known of kernel a, and the best of b; after 10 the best of both."""
    assert [profile(CURVES, "auto", 4, r) for r in (1.0, 1.99, 2.0)] == [0.5, 0.5, 1.0]
    assert profile(CURVES, "auto", 10, 1.0) == 1.0 and profile(CURVES, "random", 128, 1.9) == 0.0
    slower = [
        curve(c.strategy, c.kernel, [t if t is None else t + 3 for t in c.times])
        for c in CURVES
        if c.strategy == "auto"
    ]
    assert profile([*CURVES, *slower], "auto", 10, 1.0) == 0.5  # as if two more searches had found nothing
