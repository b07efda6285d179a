"""Gather trials of the corpus on this device: `python -m autotune.collect --records FILE --per-kernel 12 --minutes 60`.

Resumes where it stopped. Kernels are visited in a seeded order, so that a run cut short still covers all families.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from autotune import corpus
from autotune.compiler import default_device, renderer_of
from autotune.guide import Guide
from autotune.kernel import Kernel
from autotune.measuring.runner import Measurer, Runner, commit
from autotune.records import Records, Trial
from autotune.search import STRATEGIES, make_strategy


def collect_kernel(kernel: Kernel, records: Records, measurer: Measurer, device: str, count: int, seed: int,
                   strategy: str = "random", guide: Guide | None = None, batch: int = 64) -> int:  # fmt: skip
    """Measure baselines and schedules of a strategy until `count` trials of this kernel are committed; returns how many were new.

    A strategy hears of its trials after each `batch`.
    """
    history = records.history(kernel.key, measurer.fingerprint)
    if "hand_coded" not in history.baselines:
        commit(records, measurer, kernel, measurer.baselines(kernel))
    search = make_strategy(strategy, kernel, renderer_of(device), seed, guide)
    search.tell(history.trials)
    done, missing, new = functools.partial(_commit_one, records, measurer, kernel), count - history.spent, 0
    while new < missing and (asked := search.ask(min(batch, missing - new))):
        search.tell(measurer.measure(kernel, asked, None, done))
        new += len(asked)
    return new


def _commit_one(records: Records, measurer: Measurer, kernel: Kernel, trial: Trial) -> None:
    commit(records, measurer, kernel, [trial])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m autotune.collect", description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--split", default="train", choices=corpus.SPLITS)
    parser.add_argument("--per-kernel", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", default="random", choices=list(STRATEGIES), help="what proposes the schedules")
    parser.add_argument("--checkpoint", type=Path, help="for a strategy that was trained")
    parser.add_argument("--newest-first", action="store_true", help="begin with the last kernels of the corpus")
    args = parser.parse_args()
    device, deadline = default_device(), time.monotonic() + 60 * args.minutes
    records, runner = Records(args.records), Runner(device)
    records.add_fingerprint(runner.fields)
    kernels = corpus.load(args.split)
    guide = Guide.load(args.checkpoint) if args.checkpoint else None
    order = np.random.default_rng(args.seed).permutation(len(kernels))
    order = np.arange(len(kernels))[::-1] if args.newest_first else order
    new = 0
    for i in tqdm(order, desc=f"{device} {args.split}", smoothing=0.05):
        if time.monotonic() > deadline:
            break
        new += collect_kernel(kernels[i], records, runner, device, args.per_kernel, args.seed,
                              args.strategy, guide)  # fmt: skip
    runner.close()
    print(f"{new} new trials in {args.records}")


if __name__ == "__main__":
    main()
