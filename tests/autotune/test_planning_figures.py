"""The tables of docs/simulators.md, by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from autotune.curves import Curve, summarise


def figures_of(**trials: int) -> dict:
    """The result.json of a comparison: each strategy had so many trials of one kernel."""
    curves = [Curve("a", name, 0, 0.0, [-1.0] * n, [0.5 * (i + 1) for i in range(n)]) for name, n in trials.items()]
    settings = {"split": "held_out", "trials": 4, "seeds": 1, "strategies": list(trials), "more": list(trials.items())}
    figures = {"settings": settings, "summary": summarise(curves), "curves": [asdict(c) for c in curves]}
    return json.loads(json.dumps({"device": "CPU", "figures": figures}))


@pytest.mark.parametrize(("trials", "control"), [({"mixed": 4, "random": 2}, 2), ({"mixed": 4, "random": 8}, 4)])
def test_a_strategy_has_no_figures_beyond_its_trials_nor_beside_a_control_without_any(tool, trials: dict, control: int):
    """Budgets 1, 2, 4 and perhaps 8; the tables are of scores, over random schedules, within 5%, and of totals."""
    text = tool("planning_figures")._curves(figures_of(**trials), "two.json")
    for name, n in trials.items():
        rows = [line.split("|")[2:-1] for line in text.splitlines() if line.startswith(f"| {name} |")]
        had, shown = n.bit_length(), max(trials.values()).bit_length()
        filled = [[bool(cell.strip()) for cell in row[:shown]] for row in rows]
        beside = min(had, control)
        assert filled == [[i < most for i in range(shown)] for most in (had, beside, had, had)]


def test_every_part_that_is_timed_is_a_function_of_this_project(tool):
    """Else it would be shown with no share of the time."""
    root = Path(__file__).resolve().parents[2]
    for wanted in tool("bench_planning").PARTS.values():
        for file, name in wanted:
            found = [p for p in root.glob(f"*/**/{file}") if ".venv" not in p.parts]
            assert any(f"def {name}(" in p.read_text() for p in found), (file, name)


def test_never_is_told_as_what_it_is(tool):
    """Of two searches one is within 5%: the median is halfway to never."""
    found = figures_of(mixed=2, random=2)
    text = tool("planning_figures")._curves(found, "two.json")
    assert "never: at most half ever were" in text
    curves = [Curve("a", "x", 0, 0.0, [-1.0], [1.0]), Curve("a", "x", 1, 0.0, [0.0], [1.0])]
    assert summarise(curves)["x"]["trials"] is None


def test_what_simulators_learned_from_is_told_as_what_it_is(tool):
    """A kernel that several machines have measured is as many groups."""
    path = Path(__file__).parents[2] / "benchmarks" / "sims-cpu.json"
    found = json.loads(path.read_text())
    told = f"{found['paths']} timings (baselines among them) in {found['kernels']} groups of one kernel on one machine"
    assert told in tool("sims_figures")._benchmark(path)
