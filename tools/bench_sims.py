"""How good the simulators are on kernels that they never saw: the trials that ship, split by kernel, each fitted afresh.

    python tools/bench_sims.py --curve 500 2000 8000 --json benchmarks/sims-cpu.json
    python tools/bench_sims.py --held-out-model RECORDS --json benchmarks/sims-model-cpu.json

With --held-out-model all kernels of a records file are held out, and the simulators are fitted on every trial that ships.
Each result is in the JSON file as soon as it exists, and the same command goes on from there; remove the file to measure
anew. `--parts cost` means something only on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sims_results import Measure, Results, table
from sims_scores import Make, cost, idled, learned, noisy, whole
from sklearn.ensemble import HistGradientBoostingRegressor

from autotune import corpus
from autotune.compiler import Opt, OptOps, default_device, renderer_of
from autotune.data import Dataset, add_shipped
from autotune.errors import RecordsError
from autotune.experiments.controls import MADE
from autotune.guide import FEATURES
from autotune.paths import action_row, paths_from
from autotune.records import Records
from autotune.space import root_of
from sims import (
    Committee,
    Diffusion,
    DiffusionConfig,
    Ensemble,
    EnsembleConfig,
    Flat,
    Linear,
    Paths,
    SimulatorError,
    Transformer,
    TransformerConfig,
    Trees,
    TreesConfig,
    Widths,
)
from sims.base import TrainingRows, per_group
from sims.paths import Points

PARTS = ("all", "cost", "curve", "idle", "noisy")  # scores, seconds, learning curve, null action, noisy television
HELD_OUT = 0.25  # of the kernels
IDLE = Opt(OptOps.UPCAST, 0, 1)  # a split by one: it would change nothing


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


def simulators(widths: Widths, seed: int, steps: int | None) -> dict[str, Make]:
    """By name; `steps` shortens the training of those that are trained by steps."""
    short: dict[str, Any] = {"seed": seed} if steps is None else {"seed": seed, "steps": steps}
    forest = TreesConfig(seed=seed) if steps is None else TreesConfig(seed=seed, rounds=steps)
    return {
        "roofline": lambda: MADE["roofline"](widths, seed),
        "nearest": lambda: MADE["nearest"](widths, seed),
        "boosting": lambda: Flat(widths, Boosting(seed)),  # type: ignore[arg-type]
        "linear": lambda: Linear(widths),
        "ensemble": lambda: Flat(widths, Ensemble(widths.state, EnsembleConfig(**short))),
        "trees": lambda: Flat(widths, Trees(widths.state, forest)),
        "committee": lambda: Flat(widths, Committee(widths.state, EnsembleConfig(**short), forest)),
        "diffusion": lambda: Diffusion(widths, DiffusionConfig(**short)),
        "transformer": lambda: Transformer(widths, TransformerConfig(**short)),
    }


class Trials(NamedTuple):
    """Of many kernels."""

    paths: Paths
    idle: np.ndarray  # [K, F]: for each kernel an action that would change nothing
    signatures: np.ndarray  # [K] of each kernel's loops

    def split(self, seed: int) -> tuple[Paths, Paths]:
        """(rest, held out). By signature: one kernel measured by several machines is several kernels of `paths`."""
        loops = self.signatures[self.paths.kernel]
        names = np.random.default_rng(seed).permutation(np.unique(loops))
        out = np.isin(loops, names[: max(1, round(HELD_OUT * len(names)))])
        return self.paths.take(~out), self.paths.take(out)

    def units(self, seed: int) -> list[int]:
        """Which loops each score of a seed's held-out kernels is of, numbered."""
        held = self.split(seed)[1]
        points = Points.build(held, held.widths)
        numbers = np.unique(self.signatures, return_inverse=True)[1]
        return [int(numbers[held.kernel[points.path[rows[0]]]]) for rows in per_group(points.rows.kernel)]


def shipped(device: str, refused: set[str]) -> Trials:
    """The trials that ship, but those of kernels whose loops look like refused ones."""
    data, kernels = Dataset(renderer_of(device)), corpus.load("train")
    add_shipped(data, device, [k for k in kernels if k.signature not in refused])
    return as_trials(data, f"trials that ship for DEV={device}")


def recorded(device: str, file: Path) -> Trials:
    """Everything that a records file holds of this backend."""
    records, data = Records(file, read_only=True), Dataset(renderer_of(device))
    kernels = records.kernels()
    for fingerprint, fields in records.fingerprints().items():
        if fields["backend"] == device:
            for kernel in kernels:
                data.add(kernel, records.history(kernel.key, fingerprint).good, fingerprint)
    return as_trials(data, f"trials for DEV={device} in {file}")


def as_trials(data: Dataset, what: str) -> Trials:
    """Raises SimulatorError where there are too few to learn from or to judge on."""
    try:
        paths = paths_from(data)
        Points.build(paths, paths.widths)
    except SimulatorError as error:
        raise SimulatorError(f"{what}: {error}") from None
    roots = [root_of(data.states[first]) for first in np.unique(paths.kernel, return_index=True)[1]]  # of every kernel
    idle = np.stack([action_row(root, IDLE) for root in roots])
    return Trials(paths, idle, np.array([root.kernel.signature for root in roots]))


def parts(make: Make, pool: Trials, model: Trials | None, curve: list[int], seed: int) -> dict[str, Measure]:
    """What is measured of a simulator, each part by itself; the split is the same for all of a seed."""
    train, held = pool.split(seed) if model is None else (pool.paths, model.paths)
    idle, held_idle = pool.idle, (model or pool).idle
    return {
        "all": partial(whole, make, train, held, held_idle),
        "cost": partial(cost, make, train, held),
        **{str(n): partial(learned, make, train, held, n, seed) for n in curve if n < len(train)},
        "idle": partial(idled, make, train, held, idle, held_idle, seed),
        "noisy": partial(noisy, make, train, held, seed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the split and of each simulator")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="simulators, by name")
    parser.add_argument("--curve", type=int, nargs="+", metavar="TRIALS", default=[], help="learn from so many, too")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured (default: all of it)"
    )
    parser.add_argument("--held-out-model", type=Path, metavar="RECORDS", help="of a program, to be judged on")
    parser.add_argument("--steps", type=int, help="of training, for a quick look")
    parser.add_argument("--json", type=Path, metavar="OUT", help="keep the results there")
    args = parser.parse_args()
    if list(args.parts) == ["curve"] and not args.curve:
        parser.error("a learning curve needs --curve TRIALS")
    device = default_device()
    try:
        model = None if args.held_out_model is None else recorded(device, args.held_out_model)
        pool = shipped(device, set() if model is None else set(model.signatures))
    except (SimulatorError, RecordsError) as error:
        raise SystemExit(str(error)) from None
    known = simulators(pool.paths.widths, 0, None)
    if unknown := set(args.only or ()) - set(known):
        parser.error(f"no simulator {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    held_out = f"{HELD_OUT:.0%} of the kernels" if model is None else args.held_out_model.stem
    held_kernels = None if model is None else len(np.unique(model.paths.kernel))
    about = {"device": device, "held_out": held_out, "held_kernels": held_kernels, "paths": len(pool.paths),
             "kernels": len(np.unique(pool.paths.kernel)), "steps": args.steps, "features": FEATURES}  # fmt: skip
    units = {str(seed): pool.units(seed) for seed in args.seeds} if model is None else None
    results = Results(args.json, about, units)
    for seed in args.seeds:
        for name, make in simulators(pool.paths.widths, seed, args.steps).items():
            if args.only is None or name in args.only:
                for part, measure in parts(make, pool, model, args.curve, seed).items():
                    if ("curve" if part.isdigit() else part) not in args.parts:
                        continue
                    new = results.keep(f"{name} {seed} {part}", measure)
                    print(f"{name}, seed {seed}, {part}: {'measured' if new else 'was there'}", flush=True)
    print(table(results.summary))


if __name__ == "__main__":
    main()
