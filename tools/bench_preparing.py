"""What preparing a kernel costs each time that a search comes to it: three processes take its AST, the un-optimized kernel is compiled,
inputs are drawn and what is expected of them is computed. Searches do not charge it (`autotune/curves.py`); the tables of
docs/benchmarks.md do, by these figures.

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
from autotune.measuring.runner import Runner
from autotune.records import Records

ROUNDS = 3


def kernels_of(kept: Path) -> list[Kernel]:
    """Those that a kept run has searched."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(kept, Path(folder))
        searched = json.loads((Path(folder) / "result.json").read_text())["figures"]["calls"]
        with closing(Records(Path(folder) / "records.db", read_only=True)) as records:
            return [kernel for kernel in records.kernels() if kernel.key in searched]


def preparing(kernels: Sequence[Kernel], device: str, rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds by kernel key, medians: of the first trial after another kernel's all that no search is charged."""
    renderer, found = renderer_of(device), {k.key: list[float]() for k in kernels}
    with closing(Runner(device)) as runner:
        for kernel in tqdm([k for _ in range(rounds) for k in kernels], "preparing"):
            began = time.perf_counter()
            (trial,) = runner.measure(kernel, [hand_coded(kernel.ast, renderer)], None)
            charged = trial.compile_seconds + trial.verify_seconds + trial.timing_seconds
            found[kernel.key].append(time.perf_counter() - began - charged)
    return {key: statistics.median(seconds) for key, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="kept by tools/keep_run.py")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    device = default_device()
    kernels = {k.key: k for run in args.runs for k in kernels_of(run)}
    seconds = preparing(list(kernels.values()), device)
    with closing(Runner(device)) as runner:
        about = {"device": device, "machine": runner.fields["model"], "rounds": ROUNDS}
    args.json.write_text(json.dumps({**about, "seconds": seconds}, indent=1))
    print(f"{len(seconds)} kernels: {min(seconds.values()):.2f} to {max(seconds.values()):.2f} s, "
          f"median {statistics.median(seconds.values()):.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
