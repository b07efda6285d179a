"""Tuners at the same time on one records file and the same kernels: nothing lost, nothing spent again but what is in flight.

`python tests/proofs/concurrently.py [--count 5] [--processes 2] [--strategy random] [--seed 0] [--json OUT]`. In each round the very same
command is started several times, shortly after one another: with one seed all of them want the same schedules.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from common import (
    KERNELS,
    conclude,
    ended,
    family,
    intact,
    last_words,
    orphans,
    parser,
    rows,
    spent,
    spent_of_kernels,
    tune,
)
from tqdm import tqdm

from autotune.search import POOLED
from autotune.search.acquisition import BATCH

APART = 2.0  # seconds, at most, between two starts
END_SECONDS = 300.0  # a tuner that takes longer is stuck
COUNTED = ("rounds", "rounds in which all ran at once", "trials made", "trials on record")
FAULTS = ("tuners that failed", "orphans", "corrupt files", "lost trials")


@dataclass
class Rounds:
    """What was seen in all rounds."""

    processes: int
    trials: int
    strategy: str
    rng: random.Random
    seen: Counter[str] = field(default_factory=Counter)
    again: int = 0  # trials of a schedule that was spent before, in the worst kernel of the worst round
    beyond: int = 0  # trials above the budget of a kernel, likewise; under `auto` above that of all kernels
    notes: list[str] = field(default_factory=list)

    def fault(self, kind: str, text: str, count: int = 1) -> None:
        self.seen[kind] += count
        self.notes.append(f"{kind}: {text}")

    def round(self, folder: Path) -> None:
        """All tuners on one new file, to their ends."""
        records, reports = folder / "records.db", [folder / f"{number}.json" for number in range(self.processes)]
        tuners: list[subprocess.Popen[bytes]] = []
        for report in reports:
            time.sleep(self.rng.uniform(0, APART) if tuners else 0)
            tuners.append(tune(folder, records, self.trials, "--strategy", self.strategy, "--json", report))
        self.seen["rounds"] += 1
        self.seen["rounds in which all ran at once"] += all(tuner.poll() is None for tuner in tuners)
        for tuner in tuners:
            known = family(tuner.pid)
            if not ended(tuner, END_SECONDS):
                tuner.kill()
            if status := tuner.wait():
                self.fault("tuners that failed", f"status {status}: {last_words(folder)}")
            for command in orphans(tuner.pid, known):
                self.fault("orphans", command)
        self.judge(records, [json.loads(report.read_text()) for report in reports if report.exists()])

    def judge(self, path: Path, reports: list[dict]) -> None:
        """Hold what is on record against what the tuners say they made, and against the budget."""
        if not intact(path):
            self.fault("corrupt files", "the integrity check failed")
        found = rows(path)
        made, kept = sum(report["compiled"] for report in reports), spent(found).total()
        self.seen.update({"trials made": made, "trials on record": kept})
        if made > kept:
            self.fault("lost trials", f"{made} made, {kept} on record", made - kept)
        repeated: Counter[str] = Counter()
        for (kernel, _, _), times in spent(found).items():
            repeated[kernel] += times - 1
        self.again = max([self.again, *repeated.values()])  # none, where all tuners failed before a trial
        totals = spent_of_kernels(found).values()
        if self.strategy == POOLED:
            self.beyond = max(self.beyond, sum(totals) - KERNELS * self.trials)
        else:
            self.beyond = max([self.beyond, *(total - self.trials for total in totals)])


def main() -> int:
    options = parser(__doc__.splitlines()[0], count=5)
    options.add_argument("--processes", type=int, default=2, metavar="N", help="at once (default: %(default)s)")
    options.add_argument("--trials", type=int, default=8, metavar="N", help="of each kernel (default: %(default)s)")
    options.add_argument("--strategy", default="random", metavar="NAME", help="of all tuners (default: %(default)s)")
    args = options.parse_args()
    started, rounds = time.monotonic(), Rounds(args.processes, args.trials, args.strategy, random.Random(args.seed))
    with tempfile.TemporaryDirectory(prefix="concurrently-") as folder:
        for _ in tqdm(range(args.count), desc="rounds"):
            rounds.round(Path(tempfile.mkdtemp(dir=folder)))
    figures = {name: rounds.seen[name] for name in COUNTED}
    figures |= {"processes": args.processes, "strategy": args.strategy, "seconds": round(time.monotonic() - started)}
    bars = {name: (rounds.seen[name], 0) for name in FAULTS}
    # the others may each be at the very trial that one is at; under `auto`, which looks at what others spent between batches, at one
    in_flight = (args.processes - 1) * (BATCH if args.strategy == POOLED else 1)
    bars |= {"again, in one kernel": (rounds.again, in_flight), "beyond its budget": (rounds.beyond, in_flight)}
    return conclude(args.json, figures, bars, rounds.notes)


if __name__ == "__main__":
    sys.exit(main())
