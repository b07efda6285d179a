"""Simulations a second of each planner, and where the time goes: exact dynamics with a learned cost, and each latent world.

    DEV=CPU python tools/bench_planning.py --json benchmarks/planning-speed-cpu.json

A simulation is one more node of one row's tree. What the simulators have learned does not matter here: they are fitted for
a few steps only. Rates come from one round, shares from another one under Python's profiler, which makes everything that is
not compiled slower than it is.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
from pathlib import Path
from typing import Any

from autotune import corpus
from autotune.compiler import default_device, renderer_of
from autotune.data import Dataset, add_shipped
from autotune.experiments.inputs import sample
from autotune.guide import Guide, find_checkpoint
from autotune.kernel import Kernel
from autotune.search import latent, planner
from autotune.world import SIMULATORS, World
from sims.heads import HeadsConfig

TRAINING, HELD_OUT, FIT_STEPS = 40, 6, 20  # kernels of each kind, and steps of each fit
PARTS = {  # what is timed: (file, function), each with all that it calls
    "policy": [("learner.py", "evaluate")],
    "features and mask": [("episodes.py", "look"), ("latent.py", "_walk"), ("paths.py", "paths_of")],
    "simulator": [("mixed.py", "_members"), ("mixed.py", "_moved")]
    + [(file, name) for file in ("flat.py", "transformer.py") for name in ("judge", "advance", "embed")]
    + [("diffusion.py", "advance")],
    "heads": [("heads.py", "__call__")],
}
Search = planner.PlannerSearch | latent.LatentSearch


def simulations(search: Search) -> int:
    """In one round from the root."""
    if isinstance(search, planner.PlannerSearch):
        return search.rows * planner.STEPS * search.simulations
    return latent.ROWS * search.simulations


def round_of(kind: type[Search], kernel: Kernel, guide: Guide, seed: int) -> tuple[float, int]:
    """(seconds, simulations) of one round of a search that has seen nothing yet."""
    search = kind(kernel, renderer_of(default_device()), seed, guide)
    guide.forget()
    began = time.perf_counter()
    search._plan([search.root])
    return time.perf_counter() - began, simulations(search)


def shares(profile: cProfile.Profile) -> dict[str, float]:
    """The part of the time that each of PARTS took."""
    found = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    total = sum(own for _, _, own, _, _ in found.values())
    return {
        part: sum(cumulative for (file, _, name), (_, _, _, cumulative, _) in found.items()
                  if (Path(file).name, name) in wanted) / total
        for part, wanted in PARTS.items()
    }  # fmt: skip


def figures(kind: type[Search], kernels: list[Kernel], guide: Guide) -> dict[str, Any]:
    """The first kernel warms up: it captures."""
    round_of(kind, kernels[0], guide, 0)
    rounds = [round_of(kind, k, guide, 1) for k in kernels]
    profile = cProfile.Profile()
    profile.enable()
    for kernel in kernels:
        round_of(kind, kernel, guide, 2)
    profile.disable()
    rates = [count / seconds for seconds, count in rounds]
    return {"simulations_per_second": statistics.median(rates), "slowest": min(rates), "fastest": max(rates),
            "seconds_per_round": statistics.median(s for s, _ in rounds), "simulations": rounds[0][1],
            "shares": shares(profile)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", help="worlds, by name")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = default_device()
    guide = Guide.load(find_checkpoint(None, device))
    kernels = sample(corpus.load("held_out"), HELD_OUT, 0)
    data = Dataset(renderer_of(device))
    add_shipped(data, device, corpus.load("train")[:TRAINING])
    found = {"exact": figures(planner.PlannerSearch, kernels, guide)}
    for name in args.only or SIMULATORS:
        guide.world = World.learn(name, data, 0, 0, FIT_STEPS, HeadsConfig(steps=FIT_STEPS))
        found[name] = figures(latent.LatentSearch, kernels, guide)
    for name, row in found.items():
        parts = ", ".join(f"{part} {share:.0%}" for part, share in row["shares"].items())
        print(f"{name:12} {row['simulations_per_second']:8.0f} simulations a second; {parts}")
    if args.json:
        args.json.write_text(json.dumps({"device": device, "planners": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
