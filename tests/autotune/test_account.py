"""Where a tuned program's time goes: the figures of an example run, by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
RUN = {
    "program": "Two kernels", "peak_gflops": 100.0,
    "latency": {"default": {"ms": 40.0}, "tuned": {"ms": 16.0}, "pytorch": {"ms": 8.0}},
    "tune": {"device": "CPU", "kernels": [
        {"name": "sum", "calls": 1, "tuned_ms": 4.0, "gflop": 0.004, "schedule": None},
        {"name": "matmul", "calls": 3, "tuned_ms": 2.0, "gflop": 0.1, "schedule": [["THREAD", 0, 2], ["UPCAST", 0, 4]]},
    ]},
}  # fmt: skip


@pytest.fixture
def accounts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import account_figures

    yield account_figures
    sys.modules.pop("account_figures")


def test_time_and_rates_of_kernels_and_of_the_whole(tmp_path: Path, accounts):
    """The matmul takes 6 of 10 ms at 50 GFLOP/s, the sum 4 at 1; 0.304 GFLOP in all."""
    refused = {"name": "odd", "calls": 1, "tuned_ms": 0.0, "gflop": 0.1, "schedule": None, "refused": "it has no time"}
    kernels = [refused, *RUN["tune"]["kernels"]]
    (tmp_path / "run.json").write_text(json.dumps({**RUN, "tune": {"device": "CPU", "kernels": kernels}}))
    (tmp_path / "other.json").write_text("{}")
    text = accounts.accounts(tmp_path)
    assert "| matmul | 3 | 6.00 | 60.0% | 50.0 | 50.0% |\n| sum | 1 | 4.00 | 40.0% | 1.0 | 1.0% |" in text
    assert "| all | 4 | 10.00 | 100.0% | 30.4 | 30.4% |" in text
    assert "(THREAD): 1 of 2 kernels;" in text
    assert "default 40.0 ms (1.00), tuned 16.0 ms (0.40), PyTorch, eager, one thread 8.0 ms (0.20)" in text


def test_what_is_not_shown_is_summed(tmp_path: Path, accounts, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(accounts, "SHOWN", 1)
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    text = accounts.accounts(tmp_path)
    assert "| 1 more | 1 | 4.00 | 40.0% | 1.0 | 1.0% |" in text and "| sum |" not in text
