"""The tables of docs/simulators.md, from `benchmarks/sims-*.json` (tools/bench_sims.py) and `dynamics-speed-*.json`
(tools/bench_dynamics.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sims_results import GATES, gate_text, passed
from tables import interval, line, table

BATCHES = ("1", "256")
DEPTHS = ("1", "2", "3", "4", "5", "6", "7", "8")
NULL = {"real action": ("null", "real"), "row of zeros": ("null", "zero"), "split by one, never seen": ("null", "idle"),
        "split by one, learned": ("idle", "idle"), "real action then": ("idle", "real")}  # fmt: skip
NOISY = {"pairwise with them": ("noisy", "pairwise"), "without them": ("noisy", "pairwise_without"),
         "spread on them over spread on others": ("noisy", "spread_ratio")}  # fmt: skip
PAIR = ("pairwise", "top1")  # of a learning curve


def simulators(folder: Path) -> str:
    """Every benchmark of simulators, then the speed of the exact dynamics."""
    parts = [_benchmark(path) for path in sorted(folder.glob("sims-*.json"))]
    speeds = [json.loads(path.read_text()) for path in sorted(folder.glob("dynamics-speed-*.json"))]
    return "\n\n".join(parts + ([_dynamics(speeds)] if speeds else []))


def _benchmark(path: Path) -> str:
    """Scores with their gates, roll-outs, learning curve, cost, checks: what there is of them."""
    found = json.loads(path.read_text())
    summary = {name: own for name, own in found["summary"].items() if "scores" in own}
    seeds = max((own["seeds"]["all"] for own in summary.values()), default=0)
    held = f"{found['held_out']} held out" + (f" ({found['held_kernels']} kernels)" if found["held_kernels"] else "")
    short = f", {found['steps']} steps of training" if found["steps"] else ""
    gated = [line([name, *(_gated(own, gate) for gate in GATES), passed(own)])
             for name, own in summary.items()]  # fmt: skip
    cost = {"fit, s": ("cost", "train_seconds")}
    cost |= {f"{what}, batch {b}, us": ("cost", f"{key}_us_{b}")
             for what, key in (("predict", "predict"), ("latent step", "step")) for b in BATCHES}  # fmt: skip
    same, tried = (max((own[g][n]["value"] for own in summary.values() if g in own), default=0)
                   for g, n in (("null", "same_count"), ("idle", "trials")))  # fmt: skip
    parts = [
        f"DEV={found['device']}, `{path.name}`: {found['paths']} timings (baselines among them) in {found['kernels']} groups of one "
        f"kernel on one machine, {held}; seeds: {seeds}"
        f"{short}. In brackets 95% intervals, of scores over held-out kernels (those of the same loops together, of all seeds), else over seeds; bold: the gate is passed.",
        table(("simulator", *(f"{gate} ({gate_text(gate)})" for gate in GATES), "gates"), gated),
        "Spearman lost where the last actions are imagined, by how many they are:",
        _table(summary, {depth: ("roll_out", depth) for depth in DEPTHS}),
        *_curve(summary),
        "Cost: seconds to fit; microseconds a schedule to predict all its prefixes, and for a latent step (one more action "
        "imagined, and judged), alone and in batches.",
        _table(summary, cost, "{:.4g}"),
        "The null action: log2 units by which an imagined action moves the time. A split by one would change nothing; it is in no "
        f"recorded schedule, and was put into some of {tried:.0f} trials to be learned. Recorded steps that change nothing: {same:.0f}.",
        _table(summary, NULL),
        "The noisy television, a tenth of the kernels learned from with random times: accuracy on the held-out kernels, and "
        "whether a curious search would be drawn to the random ones.",
        _table(summary, NOISY),
    ]  # fmt: skip
    return "\n\n".join(parts)


def _table(summary: Mapping[str, Any], columns: Mapping[str, tuple[str, str]], form: str = "") -> str:
    """A line for each simulator; with `form` the value alone, in place of the interval."""
    rows = [[_cell(own.get(group, {}).get(name), form) for group, name in columns.values()] for own in summary.values()]
    return table(("simulator", *columns), [line([name, *row]) for name, row in zip(summary, rows, strict=True)])


def _cell(found: Mapping[str, float] | None, form: str = "") -> str:
    if found is None:
        return ""
    alone = form or ("{:.3f}" if found["low"] == found["high"] else "")  # one seed has no interval
    return alone.format(found["value"]) if alone else interval(found)


def _gated(own: Mapping[str, Any], gate: str) -> str:
    text = _cell(own["scores"][gate])
    return f"**{text}**" if own["passes"][gate] else text


def _curve(summary: Mapping[str, Any]) -> Sequence[str]:
    """The last point is what was learned from everything."""
    points = sorted({int(point) for own in summary.values() for point in own["curve"]})
    rows = [[own["curve"].get(str(point)) for point in points] + [own["scores"]] for own in summary.values()]
    cells = [
        ["" if at is None else " / ".join(_cell(at[name], "{:.3f}") for name in PAIR) for at in row] for row in rows
    ]
    lines = [line([name, *row]) for name, row in zip(summary, cells, strict=True)]
    told = (
        "Pairwise accuracy / top-1 on the kernels that each seed holds out, by how many trials were learned from (of fewer seeds "
        "than where all were):"
    )
    return (told, table(("simulator", *map(str, points), "all"), lines)) if points else ()


def _dynamics(found: Sequence[Mapping[str, Any]]) -> str:
    rows = [line([own["device"], batch, f"{row['states_per_second']:.0f}",
                  *(f"{row[f'{part}_us']:.1f}" for part in ("step", "mask", "summary"))])
            for own in found for batch, row in own["batches"].items()]  # fmt: skip
    return (
        "Exact dynamics, one core: distinct states a second, and where the time goes, microseconds a state.\n\n"
        + table(("DEV", "batch", "states/s", "step", "legality mask", "summary"), rows)
    )  # fmt: skip
