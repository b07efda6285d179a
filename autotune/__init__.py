"""Faster tinygrad programs: kernel schedules chosen by reinforcement learning, each one verified, never slower.

import autotune
with autotune.capture() as program:      # which kernels does it run, and how often?
    model(x).realize()
report = autotune.tune(program)          # search, verify, time
with autotune.apply():                   # run it again, faster
    model(x).realize()
"""

from importlib.metadata import PackageNotFoundError, version

TINYGRAD = "0.14.0"  # its compiler has no stable interface: autotune/compiler.py is written for this release

try:
    _found = version("tinygrad")
except PackageNotFoundError:
    _found = "none"
if _found != TINYGRAD:
    raise ImportError(f"tinygrad-autotune needs tinygrad=={TINYGRAD}, found {_found}: pip install tinygrad=={TINYGRAD}")

from autotune.capture import Program, capture  # noqa: E402  (after the check of the version)
from autotune.install import apply  # noqa: E402
from autotune.report import Report  # noqa: E402
from autotune.tuner import tune  # noqa: E402

__all__ = ["Program", "Report", "apply", "capture", "tune"]
