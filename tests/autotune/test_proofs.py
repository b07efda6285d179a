"""The proofs of tests/proofs in small: what they count is what happens, and what is promised holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from shell import ROOT


def prove(name: str, out: Path, *options: str) -> dict:
    """Run a proof; returns its figures."""
    command = [sys.executable, ROOT / "tests" / "proofs" / f"{name}.py", "--json", out, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return json.loads(out.read_text())


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
def test_the_batched_dynamics_agree_with_tinygrad(tmp_path):
    figures = prove("dynamics", tmp_path / "out.json", "--steps", "200")
    assert all(figures[f"{target}: steps"] >= 200 for target in ("CPU", "CL", "CUDA"))
