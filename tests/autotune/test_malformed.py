"""A small helping of tests/proofs/malformed.py, which tries tens of thousands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_malformed_files_are_refused(tmp_path):
    command = [
        sys.executable,
        "tests/proofs/malformed.py",
        "--count",
        "450",
        "--seed",
        "7",
        "--json",
        tmp_path / "m.json",
    ]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "m.json").read_text())
    assert result["escaped"] == 0 and result["tried"] == 450
    for kind, tally in result["kinds"].items():
        assert tally["tried"] == 50 and (tally["refused"] >= 25 or kind == "guide JSON"), kind
