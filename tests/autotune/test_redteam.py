"""Some attacks of tests/proofs/redteam.py: those that are over in a moment. `make prove` runs them all."""

from __future__ import annotations

import sys

import pytest
from shell import ROOT

sys.path.insert(0, str(ROOT / "tests" / "proofs"))
import redteam

QUICK = {"changes its input", "writes behind its input", "writes in front", "reads far behind", "adds what lies in front",
         "remembers outputs by the first element", "returns its first output again", "right until long after",
         "follows a null pointer", "exits", "writes junk to all files", "right while verified, wrong when timed"}  # fmt: skip


@pytest.fixture(scope="module")
def runner():
    with redteam.undermined("CPU") as runner:
        yield runner


@pytest.mark.parametrize("attack", [a for a in redteam.ATTACKS if a.name in QUICK], ids=lambda a: a.name)
def test_an_attack_is_caught_and_the_tuner_lives_on(runner, attack):
    trial, after = redteam.attack_trial(runner, redteam.victim("CPU"), attack)
    assert redteam.judge(attack, trial) == "" and trial.samples == () and after.verdict == "ok"


def test_an_honest_program_put_in_the_same_way_passes(runner):
    """The control: it is not the putting in that is caught."""
    honest = redteam.Attack("honest", redteam.RIGHT, "ok")
    trial, _ = redteam.attack_trial(runner, redteam.victim("CPU"), honest)
    assert (trial.verdict, trial.detail) == ("ok", "") and redteam.judge(honest, trial) == "escaped"


def test_all_quick_attacks_are_there():
    assert {a.name for a in redteam.ATTACKS} >= QUICK
