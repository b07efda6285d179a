"""Whole programs timed in turn: what becomes of a child that dies."""

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
