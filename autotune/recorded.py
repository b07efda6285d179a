"""A closed world of recorded timings: kernels of all splits, the schedules measured of each, their times. Needs no device.

`python -m autotune.recorded collect` measures it, resumes where it stopped, and writes `recorded-BACKEND.jsonl.gz` when every
split has its kernels. The tree that `ucb` grows (search/tree.py) is recorded with all of its prefixes, so an episode may stop
wherever it stands. It serves to compare agents: nothing in it is ever trained on but the split `train`, and no schedule is
applied from it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from autotune import corpus, files
from autotune.collect import collect_kernel
from autotune.compiler import Renderer, default_device
from autotune.env import Task
from autotune.errors import AutotuneError, UsageError, status_of
from autotune.kernel import Kernel, Schedule, schedule_from_json, schedule_to_json
from autotune.measuring.runner import Runner
from autotune.records import History, Records
from autotune.space import State
from autotune.strict import at_least

KERNELS = {"train": 72, "validation": 16, "held_out": 40}  # of each split
PER_KERNEL = 32  # schedules of each kernel
BATCH = 8  # of them are measured before the tree grows on


def recorded_path(backend: str) -> Path:
    """Where the recording of a backend ships."""
    return files.DATA / f"recorded-{backend.lower()}.jsonl.gz"


@dataclass(frozen=True)
class Entry:
    """What is on record of one kernel. Times are log2 seconds; NaN where the trial failed, or its schedule was refuted later."""

    kernel: Kernel
    hand_coded: float
    times: dict[Schedule, float]  # the un-optimized kernel () among them

    @property
    def best(self) -> float:
        """The fastest recorded schedule's, hand-coded not counted in."""
        return float(np.nanmin(list(self.times.values())))


class Recorded:
    """The kernels of a recording by split, and their times."""

    def __init__(self, entries: dict[str, list[Entry]]):
        self.entries = entries
        self.by_key = {e.kernel.key: e for split in entries.values() for e in split}

    @classmethod
    def load(cls, path: Path) -> Recorded:
        """Raises UsageError where there is none, or where it is not of this corpus."""
        if not path.exists():
            raise UsageError(f"no recording {path}: make one with `python -m autotune.recorded collect`")
        known = {split: {k.key: k for k in corpus.load(split)} for split in corpus.SPLITS}
        entries: dict[str, list[Entry]] = {split: [] for split in corpus.SPLITS}
        for row in files.read_lines(path):
            kernel = known[row["split"]].get(row["kernel"])
            if kernel is None:
                raise UsageError(f"{path} holds kernel {row['kernel']}, which is not in the split {row['split']}")
            times = {schedule_from_json(s): _log_seconds(micros) for s, micros in row["trials"]}
            entries[row["split"]].append(Entry(kernel, _log_seconds(row["hand_coded"]), times))
        return cls(entries)

    def task(self, split: str, renderer: Renderer) -> Task:
        """The kernels of a split as an environment in which only what is recorded can be done."""
        kernels = [e.kernel for e in self.entries[split]]
        return Task(kernels, renderer, measured=self.measured, allowed=lambda k: self.by_key[k.key].times)

    def draw(self, split: str, trials: int, seed: int) -> Recorded:
        """A smaller recording: so many schedules, spread evenly over a split's kernels, each with all of its prefixes.

        Baselines are no trials: every kernel keeps its own. With one seed, more trials hold all of fewer ones. Raises
        UsageError where there are not so many on record.
        """
        rng = np.random.default_rng([seed, 5])
        entries = [self.entries[split][i] for i in rng.permutation(len(self.entries[split]))]
        orders = [_prefixes_first(e.times, rng) for e in entries]
        turns = sorted((turn, i) for i, order in enumerate(orders) for turn in range(len(order)))
        if not 0 < trials <= len(turns):
            raise UsageError(f"{trials} trials cannot be drawn: of the split {split} {len(turns)} are on record")
        counts = np.bincount([i for _, i in turns[:trials]], minlength=len(entries))
        drawn = [
            replace(entry, times={s: entry.times[s] for s in ((), *order[:count])})
            for entry, order, count in zip(entries, orders, counts, strict=True)
        ]
        return Recorded({split: drawn})

    def measured(self, states: Sequence[State]) -> np.ndarray:
        """log2 seconds of each state [N]."""
        return np.array([self.by_key[s.kernel.key].times[s.schedule] for s in states])

    def score(self, kernel: Kernel, schedule: Schedule) -> float:
        """0: as slow as the un-optimized kernel; 1: the fastest recorded schedule. A failed trial counts as un-optimized:
        the tuner would fall back. Log-speedups, so negative where it is slower."""
        entry = self.by_key[kernel.key]
        plain, reached = entry.times[()], entry.times[schedule]
        return 0.0 if math.isnan(reached) else (plain - reached) / max(plain - entry.best, 1e-9)


def _prefixes_first(schedules: Iterable[Schedule], rng: np.random.Generator) -> list[Schedule]:
    """All but the un-optimized kernel (), in a random order in which none stands before a prefix of it."""
    luck = {schedule: rng.random() for schedule in schedules if schedule}

    def place(schedule: Schedule) -> tuple[float, int]:
        return max(luck.get(schedule[:n], 0.0) for n in range(1, len(schedule) + 1)), len(schedule)

    return sorted(luck, key=place)


def _log_seconds(micros: float | None) -> float:
    return math.nan if micros is None else math.log2(micros * 1e-6)


def row_of(kernel: Kernel, split: str, history: History) -> dict | None:
    """One line of the file; None where a baseline failed, or where no schedule is faster than the un-optimized kernel."""
    baselines = {kind: t.seconds for kind, t in history.baselines.items()}
    plain, hand = baselines.get("unoptimized"), baselines.get("hand_coded")
    good = {t.schedule for t in history.good}
    trials = {t.schedule: t.seconds if t.schedule in good else None for t in history.trials if t.kind == "trial"}
    if plain is None or hand is None or min((s for s in trials.values() if s), default=plain) > 0.9 * plain:
        return None
    rows = [[schedule_to_json(s), _micros(seconds)] for s, seconds in {(): plain, **trials}.items()]
    return {"kernel": kernel.key, "split": split, "hand_coded": _micros(hand), "trials": rows}


def _micros(seconds: float | None) -> float | None:
    return None if seconds is None else float(f"{seconds * 1e6:.4g}")


def chosen(split: str, seed: int) -> list[Kernel]:
    """A seeded order of a split's kernels; the first KERNELS that are of use are recorded."""
    kernels = corpus.load(split)
    return [kernels[i] for i in np.random.default_rng([seed, 3]).permutation(len(kernels))]


def collect(records: Records, runner: Runner, seed: int, deadline: float) -> None:
    """Measure until every split has its kernels, or until `deadline` (monotonic seconds). Raises AutotuneError for a split that has
    fewer of use."""
    for split, wanted in KERNELS.items():
        useful = 0
        for kernel in tqdm(chosen(split, seed), desc=split):
            if useful == wanted or time.monotonic() > deadline:
                break
            collect_kernel(kernel, records, runner, runner.device, PER_KERNEL, seed, "ucb", batch=BATCH)
            useful += row_of(kernel, split, records.history(kernel.key, runner.fingerprint)) is not None
        else:
            if useful < wanted:
                raise AutotuneError(f"the split {split} has {useful} kernels of use on {runner.device}, not {wanted}")


def write(records: Records, fingerprint: str, path: Path, seed: int) -> int:
    """Write the recording, kernels in their seeded order. Returns how many schedules it holds. Raises AutotuneError where kernels
    are missing: what `path` holds stays."""
    rows: list[dict] = []
    for split, wanted in KERNELS.items():
        found = (row_of(k, split, records.history(k.key, fingerprint)) for k in chosen(split, seed))
        rows += itertools.islice((row for row in found if row is not None), wanted)
    if len(rows) < (wanted := sum(KERNELS.values())):
        raise AutotuneError(f"{len(rows)} of {wanted} kernels are on record; {path.name} is written when all are: the same command "
                            "goes on from there")  # fmt: skip
    files.write_lines(rows, path)
    return sum(len(row["trials"]) for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m autotune.recorded", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("do", choices=["collect"])
    parser.add_argument("--records", type=Path, default=Path("runs/recorded.db"))
    parser.add_argument("--minutes", type=at_least(0.0, float), default=60.0)
    parser.add_argument("--seed", type=at_least(0, int), default=0)
    args = parser.parse_args(argv)
    told = "every finished trial is on record, the same command goes on from there"
    return status_of(parser.prog, lambda: _record(args), told)


def _record(args: argparse.Namespace) -> None:
    device = default_device()
    with contextlib.closing(Records(args.records)) as records:
        with contextlib.closing(Runner(device)) as runner:
            records.add_fingerprint(runner.fields)
            collect(records, runner, args.seed, time.monotonic() + 60 * args.minutes)
        path = recorded_path(device)
        print(f"{write(records, runner.fingerprint, path, args.seed)} schedules in {path.name}")


if __name__ == "__main__":
    sys.exit(main())
