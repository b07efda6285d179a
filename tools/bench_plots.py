"""Plots of the kept benchmarks: `benchmarks/bench-NAME.svg` beside each `bench-NAME.tar.xz`.

    python tools/bench_plots.py

Left, what a whole program's kernels take after so many trials of each, over hand-coded (mean over seeds, and their range).
Right, the performance profile after ten trials (Dolan & More, 2002): the share of searches that have come to at most so many
times the best schedule that anyone found.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from bench_figures import PROFILED, budgets_of, curves_of, preparing_of, result_of, title
from figures import ROOT
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from autotune.curves import Curve, profile, totals

mpl.rcParams["svg.hashsalt"] = "bench"  # the same data, the same file
RATIOS = np.geomspace(1.0, 4.0, 61)


def main() -> None:
    for path in sorted((ROOT / "benchmarks").glob("bench-*.tar.xz")):
        target = path.with_name(path.name.replace(".tar.xz", ".svg"))
        plot(path).savefig(target, metadata={"Date": None})
        print(target)


def plot(path: Path) -> Figure:
    """Both panels of one kept run."""
    result = result_of(path)
    figures, curves = result["figures"], curves_of(result, preparing_of(path.parent))
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(f"{title(result)}, {len(figures['calls'])} kernels")
    budgets = budgets_of(figures["settings"])
    for i, name in enumerate(figures["summary"]):
        own = [c for c in curves if c.strategy == name]
        style = {"color": f"C{i}", "linewidth": 2.5 if name == "auto" else 1.2, "label": name}
        _total(left, own, figures["calls"], style)
        if budgets[name] >= PROFILED:
            right.step(RATIOS, [profile(curves, name, PROFILED, r) for r in RATIOS], where="post", **style)
    left.set(xscale="log", xlabel="trials a kernel", ylabel="seconds of the program, over hand-coded")
    right.set(xscale="log", xlabel=f"time after {PROFILED} trials, over the best found", ylabel="share of searches")
    for axes, ticks in ((left, (1, 4, 10, 32, 100)), (right, (1, 1.25, 1.5, 2, 3, 4))):
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
    left.legend()
    return figure


def _total(axes: Axes, own: Sequence[Curve], calls: dict[str, int], style: dict) -> None:
    """To the end of the longest search: those that ended before keep what they have."""
    longest = max((c.turns or [len(c.times)])[-1] for c in own)
    budgets = np.unique(np.geomspace(1, max(longest, 2), 40).round())
    seconds = np.array([totals(own, calls, int(b)) for b in budgets])  # [B, S]
    axes.plot(budgets, seconds.mean(1), **style)
    axes.fill_between(budgets, seconds.min(1), seconds.max(1), color=style["color"], alpha=0.15)


if __name__ == "__main__":
    main()
