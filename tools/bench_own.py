"""The tuner's own nets, tuned by it: how long a training step of each simulator takes, before and after.

    DEV=CPU python tools/bench_own.py --json benchmarks/own-nets-cpu.json

Run it on a machine that does nothing else. Each simulator is trained for some steps in fresh processes, with tinygrad's own
schedules and with tuned ones, in turn. The records are kept with --records, to train with the tuned kernels from then on:

    XDG_CACHE_HOME=/tmp/tuned python -m autotune run --records FILE tools/bench_sims.py ...

where the other cache directory keeps apart what was captured with other schedules.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench_sims import as_trials, simulators

from autotune import corpus
from autotune.compiler import default_device, renderer_of
from autotune.data import Dataset, add_shipped

NETS = ("ensemble", "diffusion", "transformer")
KERNELS = 150  # of the corpus: enough for a batch, and soon read
REPEATS = 5  # fresh processes of each kind


def train(name: str, steps: int) -> float:
    """Median seconds of a training step, the first one left out: it may capture."""
    device = default_device()
    data = Dataset(renderer_of(device))
    add_shipped(data, device, corpus.load("train")[:KERNELS])
    paths = as_trials(data, "trials that ship").paths
    ends: list[float] = []

    def note() -> bool:
        ends.append(time.perf_counter())
        return False

    simulators(paths.widths, 0, steps)[name]().fit(paths, deadline=note)
    return statistics.median(b - a for a, b in pairwise(ends[1:]))


def process(cache: Path, *arguments: str) -> str:
    """What a fresh Python prints whose captures lie in a directory of their own."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def measure(name: str, args: argparse.Namespace, folder: Path, records: Path) -> dict[str, Any]:
    """Seconds of a step by kind of schedules, and what the tuning said."""
    script = [__file__, "--train", name, "--steps", str(args.steps)]
    report = folder / f"{name}.json"
    process(folder / "seen", "-m", "autotune", "tune", "--records", str(records), "--trials", str(args.trials), "--strategy",
            args.strategy, "--capture-seconds", "600", "--json", str(report), __file__, "--train", name, "--steps", "3")  # fmt: skip
    ways = {"default": script, "tuned": ["-m", "autotune", "run", "--records", str(records), *script]}
    for way, command in ways.items():
        process(folder / way, *command)  # capture
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(REPEATS):
        for way, command in ways.items():
            seconds[way].append(float(process(folder / way, *command).split()[-1]))
    ratios = [b / a for a, b in zip(seconds["default"], seconds["tuned"], strict=True)]
    return {"seconds": seconds, "ratio": statistics.median(ratios), "kernels": json.loads(report.read_text())}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=NETS)
    parser.add_argument("--trials", type=int, default=10, help="a kernel, on average")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--steps", type=int, default=20, help="of training in each process")
    parser.add_argument("--records", type=Path, help="keep them there")
    parser.add_argument("--json", type=Path, metavar="OUT", help="keep the results there")
    parser.add_argument("--train", choices=NETS, help=argparse.SUPPRESS)  # the script that is tuned
    args = parser.parse_args()
    if args.train:
        print(train(args.train, args.steps))
        return
    found: dict[str, Any] = {"device": default_device(), "trials": args.trials, "strategy": args.strategy, "nets": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for net in args.nets:
            own = found["nets"][net] = measure(net, args, folder, args.records or folder / "records.db")
            middle = {way: statistics.median(values) * 1e3 for way, values in own["seconds"].items()}
            print(
                f"{net}: a step takes {middle['default']:.1f} ms, tuned {middle['tuned']:.1f} ms ({own['ratio']:.2f})"
            )
            if args.json:
                args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
