"""Whole programs timed in turn: what becomes of a child that dies, or that talks."""

from __future__ import annotations

import sys

import pytest

from autotune.errors import ScriptError
from autotune.latency import Variant, compare


def test_a_child_that_is_gone_is_one_line():
    """It has said that it is ready; by the time it is asked, the other one has started, and nobody reads any more."""
    gone = Variant([sys.executable, "-c", "print('ready', flush=True)"], {})
    slow = Variant([sys.executable, "-c", "import time; time.sleep(0.5); print('ready', flush=True); input()"], {})
    with pytest.raises(ScriptError, match="the process that runs gone ended with status 0"):
        compare({"gone": gone, "slow": slow}, rounds=2)


def test_what_a_child_prints_before_it_is_ready_is_passed_over():
    talks = "print('*** CPU 1 copy', 'ready or not', sep='\\n'); print('ready', flush=True); input(); print('[0.5, [1, 2]]')"
    found = compare({"talks": Variant([sys.executable, "-c", talks], {})}, rounds=1)["talks"]
    assert found.samples == [0.5] and found.output.tolist() == [1.0, 2.0]
