"""How good the simulators are on kernels that they never saw: the trials that ship, split by kernel, each fitted afresh.

    python tools/bench_sims.py --json benchmarks/sims.json

Seconds of training and microseconds a prediction mean something on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor

from autotune import corpus
from autotune.compiler import default_device, renderer_of
from autotune.data import Dataset, add_shipped
from autotune.paths import ROOFLINE, paths_from
from sims import Ensemble, EnsembleConfig, NearestNeighbour, metrics
from sims.base import PathSimulator, TrainingRows
from sims.diffusion import Diffusion, DiffusionConfig
from sims.flat import Flat
from sims.linear import Linear
from sims.paths import Paths, Points, Widths
from sims.roofline import Roofline, RooflineConfig
from sims.transformer import Transformer, TransformerConfig

HELD_OUT = 0.25  # of the kernels
DEPTHS = range(1, 9)


class Boosting:
    """Gradient boosting on the same summaries, centred per kernel: the pilot's control. It says nothing of its spread."""

    def __init__(self, seed: int):
        self.model = HistGradientBoostingRegressor(random_state=seed)

    def fit(self, features: np.ndarray, log_time: np.ndarray, group: np.ndarray, **_: Any) -> dict[str, float]:
        rows = TrainingRows.build(features, log_time, group, features.shape[1])
        self.model.fit(rows.features, rows.target)
        return {}

    def predict(self, features: np.ndarray, group: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        return self.model.predict(features), np.full(len(features), np.nan)


def simulators(widths: Widths, seed: int, steps: int | None) -> dict[str, Callable[[], PathSimulator]]:
    """By name; `steps` shortens the transformer's training."""
    transformer = TransformerConfig(seed=seed) if steps is None else TransformerConfig(seed=seed, steps=steps)
    return {
        "roofline": lambda: Flat(widths, Roofline(widths.state, RooflineConfig(ROOFLINE))),
        "nearest": lambda: Flat(widths, NearestNeighbour(widths.state)),
        "boosting": lambda: Flat(widths, Boosting(seed)),  # type: ignore[arg-type]
        "linear": lambda: Linear(widths),
        "ensemble": lambda: Flat(widths, Ensemble(widths.state, EnsembleConfig(seed=seed))),
        "diffusion": lambda: Diffusion(widths, DiffusionConfig(seed=seed)),
        "transformer": lambda: Transformer(widths, transformer),
    }


def score(simulator: PathSimulator, train: Paths, held: Paths) -> dict[str, float]:
    """All scores of one simulator, each measured prefix of the held-out kernels counting once."""
    began = time.perf_counter()
    simulator.fit(train)
    fitted = time.perf_counter()
    prediction = simulator.predict(held)
    seconds = time.perf_counter() - fitted
    points = Points.build(held, held.widths)
    at, kernel = (points.path, points.position), points.rows.kernel
    measured = points.rows.target + points.level[kernel]
    found = metrics.evaluate(prediction.relative[at], prediction.spread[at], measured, kernel)
    found["mape"] = metrics.mape(prediction.absolute[at], measured, kernel)
    found |= {f"roll_out_{d}": loss for d, loss in metrics.roll_out_loss(simulator, held, DEPTHS).items()}
    return found | {"train_seconds": fitted - began, "us_per_prefix": 1e6 * seconds / held.reached.sum()}


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Mean over seeds, a line for each simulator."""
    shown = ["pairwise", "spearman_median", "top1", "top5", "mape", "coverage80", "optimism", "roll_out_1", "roll_out_3",
             "roll_out_5", "train_seconds", "us_per_prefix"]  # fmt: skip
    lines = [f"{'':12}" + "".join(f"{name[:12]:>14}" for name in shown)]
    for name, scores in found.items():
        lines.append(f"{name:12}" + "".join(f"{statistics.fmean(scores[key]):14.3f}" for key in shown))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the split and of each simulator")
    parser.add_argument("--only", nargs="+", help="simulators, by name")
    parser.add_argument("--steps", type=int, help="of the transformer")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    data = Dataset(renderer_of(default_device()))
    add_shipped(data, default_device(), corpus.load("train"))
    paths = paths_from(data)
    found: dict[str, dict[str, list[float]]] = {}
    for seed in args.seeds:
        train, held = paths.split(HELD_OUT, np.random.default_rng(seed))
        for name, make in simulators(paths.widths, seed, args.steps).items():
            if args.only is None or name in args.only:
                for key, value in score(make(), train, held).items():
                    found.setdefault(name, {}).setdefault(key, []).append(value)
                print(f"{name}, seed {seed}: pairwise {found[name]['pairwise'][-1]:.3f}", flush=True)
    print(table(found))
    if args.json:
        kernels = len(np.unique(paths.kernel))
        about = {
            "device": default_device(),
            "paths": len(paths),
            "kernels": kernels,
            "held_out": HELD_OUT,
            "seeds": args.seeds,
        }
        args.json.write_text(json.dumps({**about, "simulators": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
