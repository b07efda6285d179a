"""Where the time of a tuned program goes, and how far it is from PyTorch: for docs/benchmarks.md, from the `--json` output of
example runs that timed the core's peak beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tables import line, table

SHOWN = 10  # kernels of a program, most time first


def accounts(folder: Path) -> str:
    """Every example run, one after another."""
    found = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return "\n\n".join(_account(name, run) for name, run in found.items() if "peak_gflops" in run)


def _account(name: str, run: dict[str, Any]) -> str:
    peak, whole = run["peak_gflops"], {way: row["ms"] for way, row in run["latency"].items()}
    timed = [k for k in run["tune"]["kernels"] if k["tuned_ms"]]  # the others were refused
    kernels = sorted(timed, key=lambda k: -k["calls"] * k["tuned_ms"])
    total = sum(k["calls"] * k["tuned_ms"] for k in kernels)
    rows = [_row(k["name"], k["calls"], [k], total, peak) for k in kernels[:SHOWN]]
    if rest := kernels[SHOWN:]:
        rows.append(_row(f"{len(rest)} more", sum(k["calls"] for k in rest), rest, total, peak))
    rows.append(_row("all", sum(k["calls"] for k in kernels), kernels, total, peak))
    names = {
        "default": "tinygrad's default",
        "tuned": "tuned",
        "beam": "tinygrad's own BEAM",
        "pytorch": "PyTorch, eager, one thread",
    }
    threaded = sum(any(opt[0] == "THREAD" for opt in k["schedule"] or ()) for k in kernels)
    times = ", ".join(f"{names[way]} {ms:.1f} ms ({ms / whole['default']:.2f})" for way, ms in whole.items())
    again = ""
    if "control" in run:
        again = (
            f" (timed again for README.md, beside random schedules and hand-coded, {run['control']['tuned_ms']:.2f} ms)"
        )
    return "\n\n".join([
        f"{run['program']}, DEV={run['tune']['device']}, `{name}`: the whole program takes {times}, interleaved in one run. Its kernels "
        f"after tuning, each by its final timing alone, {total:.2f} ms together{again}; the measured matmul peak "
        f"of one core is {peak:.0f} GFLOP/s. Tuned schedules that run on more than one core (THREAD): {threaded} of {len(kernels)} kernels; "
        "tinygrad's own may, PyTorch runs on one.",
        table(("kernel", "calls", "ms", "share", "GFLOP/s", "of peak"), rows),
    ])  # fmt: skip


def _row(name: str, calls: int, kernels: list[dict[str, Any]], total: float, peak: float) -> str:
    ms = sum(k["calls"] * k["tuned_ms"] for k in kernels)
    rate = sum(k["calls"] * k["gflop"] for k in kernels) / ms * 1e3
    return line([name, str(calls), f"{ms:.2f}", f"{ms / total:.1%}", f"{rate:.1f}", f"{rate / peak:.1%}"])
