"""Faster tinygrad programs: kernel schedules chosen by reinforcement learning, each one verified, no kernel slower than before.

import autotune
with autotune.capture() as program:      # which kernels does it run, and how often?
    model(x).realize()
report = autotune.tune(program)          # search, verify, time
with autotune.apply():                   # run it again, faster
    model(x).realize()
"""

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.errors import UsageError

_AS_COMMAND = sys.argv[:1] == ["-m"]  # so it reads while `python -m` looks for the module that it is to run
TINYGRAD = "0.14.0"  # its compiler has no stable interface: autotune/compiler.py is written for this release

try:
    _found = version("tinygrad")
except PackageNotFoundError:
    _found = "none"
if _found != TINYGRAD:
    _needed = f"tinygrad-autotune needs tinygrad=={TINYGRAD}, found {_found}: pip install tinygrad=={TINYGRAD}"
    raise SystemExit(_needed) if _AS_COMMAND else ImportError(_needed)

_ROOT = Path(__file__).resolve().parent.parent


def _foreign() -> dict[str, str]:
    """Where something else than what lies beside this package would be imported as `agents` or `sims`."""
    found = {name: spec.origin for name in ("agents", "sims") if (spec := find_spec(name)) is not None and spec.origin}
    return {name: at for name, at in found.items() if Path(at).resolve().parent.parent != _ROOT}


def _take_ours() -> None:
    """Load our own `agents` and `sims`, though modules of these names lie in the folder in which `python -m autotune` runs.

    Raises UsageError in any other program, which could not have both: what is loaded first is everybody's.
    """
    if not (foreign := _foreign()):
        return
    if not _AS_COMMAND:
        name, at = next(iter(foreign.items()))
        raise UsageError(
            f"{at} hides the package {name} of tinygrad-autotune: rename it, or use `python -m autotune tune`"
        )
    sys.path.insert(0, str(_ROOT))
    try:
        for name in foreign:
            importlib.import_module(name)
    finally:
        sys.path.remove(str(_ROOT))


_take_ours()

from autotune.capture import Program, capture  # noqa: E402  (after the check of the version)
from autotune.install import apply  # noqa: E402
from autotune.report import Report  # noqa: E402

if TYPE_CHECKING:
    from autotune.api import tune

__all__ = ["Program", "Report", "apply", "capture", "tune"]


def __getattr__(name: str) -> Any:
    """`tune` comes with all agents and simulators, which programs that only apply schedules, and processes that measure, need not load."""
    if name == "tune":
        _take_ours()  # something else may have come to be called `agents` since
        sys.path.insert(0, str(_ROOT))  # and a relative path may lead elsewhere by now
        try:
            return importlib.import_module("autotune.api").tune
        finally:
            sys.path.remove(str(_ROOT))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
