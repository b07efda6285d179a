"""What preparing a kernel costs when a search comes to it first (three processes take its AST, the un-optimized kernel is compiled,
inputs are drawn and what is expected of them is computed), and what coming back to it costs after all others of its program.
Searches do not charge it (`autotune/curves.py`); the tables of docs/benchmarks.md do, by these figures.

    DEV=CPU python tools/bench_preparing.py benchmarks/bench-*-cpu.tar.xz --json benchmarks/preparing-cpu.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from autotune.compiler import default_device, hand_coded, renderer_of
from autotune.experiments.kept import unpack
from autotune.kernel import Kernel
from autotune.measuring.runner import START_SECONDS, Runner
from autotune.records import Records

ROUNDS = 3
Seconds = dict[str, float]  # by kernel key


def kernels_of(kept: Path) -> list[Kernel]:
    """Those that a kept run has searched."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(kept, Path(folder))
        searched = json.loads((Path(folder) / "result.json").read_text())["figures"]["calls"]
        with closing(Records(Path(folder) / "records.db", read_only=True)) as records:
            return [kernel for kernel in records.kernels() if kernel.key in searched]


def preparing(kernels: Sequence[Kernel], device: str, rounds: int = ROUNDS) -> tuple[Seconds, Seconds]:
    """Medians, when the kernels of a program are tried one after the other, and all of them once more."""
    first: dict[str, list[float]] = {k.key: [] for k in kernels}
    again: dict[str, list[float]] = {k.key: [] for k in kernels}
    for _ in tqdm(range(rounds), "preparing"):
        with closing(Runner(device)) as runner:
            for child in (*runner.compilers, runner.bench):
                child.ask({"do": "probe"}, START_SECONDS)  # no kernel is charged for its start
            for seconds in (first, again):
                for kernel in kernels:
                    seconds[kernel.key].append(_uncharged(runner, kernel))
    return _medians(first), _medians(again)


def _uncharged(runner: Runner, kernel: Kernel) -> float:
    """Seconds of a trial that no search is charged."""
    began = time.perf_counter()
    (trial,) = runner.measure(kernel, [hand_coded(kernel.ast, renderer_of(runner.device))], None)
    return time.perf_counter() - began - trial.compile_seconds - trial.verify_seconds - trial.timing_seconds


def _medians(found: dict[str, list[float]]) -> Seconds:
    return {key: statistics.median(seconds) for key, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="kept by tools/keep_run.py")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    device = default_device()
    first: Seconds = {}
    again: Seconds = {}
    for run in args.runs:
        for known, found in zip((first, again), preparing(kernels_of(run), device), strict=True):
            known.update(found)
    with closing(Runner(device)) as runner:
        about = {"device": device, "machine": runner.fields["model"], "rounds": ROUNDS}
    args.json.write_text(json.dumps({**about, "seconds": first, "again": again}, indent=1))
    for name, seconds in (("first", first), ("again", again)):
        print(f"{name}: {len(seconds)} kernels, {min(seconds.values()):.3f} to {max(seconds.values()):.3f} s, "
              f"median {statistics.median(seconds.values()):.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
