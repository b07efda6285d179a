"""Gather trials of the corpus on this device: `python -m autotune.collect --records FILE --per-kernel 12 --minutes 60`.

Resumes where it stopped. Kernels are visited in a seeded order, so that a run cut short still covers all families.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from autotune import corpus
from autotune.compiler import default_device, renderer_of
from autotune.kernel import Kernel
from autotune.records import Records
from autotune.runner import Measurer, Runner, commit
from autotune.search.random import RandomSearch


def collect_kernel(kernel: Kernel, records: Records, measurer: Measurer, device: str, count: int, seed: int) -> int:
    """Measure baselines and random schedules until `count` trials of this kernel are committed; returns how many were new."""
    history = records.history(kernel.key, measurer.fingerprint)
    if not history.baselines:
        commit(records, measurer, kernel, measurer.baselines(kernel))
    if (missing := count - history.spent) <= 0:
        return 0
    search = RandomSearch(kernel, renderer_of(device), seed)
    search.tell(history.trials)
    trials = measurer.measure(kernel, search.ask(missing), cutoff=None)
    commit(records, measurer, kernel, trials)
    return len(trials)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m autotune.collect", description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--split", default="train", choices=corpus.SPLITS)
    parser.add_argument("--per-kernel", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device, deadline = default_device(), time.monotonic() + 60 * args.minutes
    records, runner = Records(args.records), Runner(device)
    records.add_fingerprint(runner.fields)
    kernels = corpus.load(args.split)
    order = np.random.default_rng(args.seed).permutation(len(kernels))
    new = 0
    for i in tqdm(order, desc=f"{device} {args.split}", smoothing=0.05):
        if time.monotonic() > deadline:
            break
        new += collect_kernel(kernels[i], records, runner, device, args.per_kernel, args.seed)
    runner.close()
    print(f"{new} new trials in {args.records}")


if __name__ == "__main__":
    main()
