"""Tuning runs are killed at random moments, the tuner itself or one of its workers: nothing is lost or spent twice.

`python tests/proofs/killed.py [--count 200] [--seed 0] [--json OUT]`. A series has one records file; the same command is
run on it, and killed, again and again, until a run comes to its end. After each run a copy of the file is looked at,
so that the next run finds what the kill left. A run whose worker was killed must come to its end by itself.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common import (
    KERNELS,
    Process,
    Rows,
    command_of,
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

from autotune.errors import AutotuneError
from autotune.records import Records

KILLS_OF_A_SERIES = 8  # after them a run is let be
END_SECONDS = 180.0  # a run that takes longer is stuck
SHORTEST = 0.2  # of the usual duration is what a run takes that has little left to do
COUNTED = (
    "runs",
    "kills of tuner",
    "kills of worker",
    "kills before searching",
    "kills while searching",
    "kills after searching",
    "trials",
)
FAULTS = ("corrupt files", "lost rows", "trials spent twice", "wrong totals", "orphans", "runs that did not go on")


@dataclass
class Series:
    """One records file. What is counted is added to `seen`, what is wrong is told in `notes`."""

    folder: Path
    trials: int
    rng: random.Random
    seen: Counter[str]
    notes: list[str]
    committed: Rows = field(default_factory=dict)

    @property
    def records(self) -> Path:
        return self.folder / "records.db"

    @property
    def left(self) -> float:
        """The share of the trials that is still to be made."""
        return 1 - spent(self.committed).total() / (KERNELS * self.trials)

    def run(self, usual: float | None) -> bool:
        """One run, struck at a random moment of about `usual` seconds, or let be (None). Did it end well?"""
        process = tune(self.folder, self.records, self.trials)
        known: set[Process] = set()
        victim = moment = ""
        if usual is not None and not ended(process, self.rng.uniform(0, usual * max(self.left, SHORTEST))):
            known = family(process.pid)
            victim, moment = self.strike(process, known)
        if stuck := not ended(process, END_SECONDS):
            process.kill()
        status = process.wait()
        self.seen["runs"] += 1
        if victim and not (victim == "tuner" and status == 0):  # else it had just come to its end
            self.seen.update([f"kills of {victim}", f"kills {moment} searching"])
        killed = victim == "tuner" and status == -signal.SIGKILL
        if stuck or not (killed or status == 0):
            self.fault("runs that did not go on", "stuck" if stuck else f"status {status}: {last_words(self.folder)}")
        for command in orphans(process.pid, known):
            self.fault("orphans", command)
        self.look()
        return status == 0

    def strike(self, process: subprocess.Popen[bytes], known: set[Process]) -> tuple[str, str]:
        """Kill the tuner or one of its workers with equal chances, the tuner where it has none. (victim, moment)"""
        self.committed |= rows(self.records)
        workers = [p for p in sorted(known) if p[0] != process.pid and "autotune" in command_of(p)]
        moment = "after" if self.left <= 0 else "while" if workers else "before"
        if not workers or self.rng.random() < 0.5:
            process.kill()
            return "tuner", moment
        with contextlib.suppress(ProcessLookupError):  # it was just done
            os.kill(self.rng.choice(workers)[0], signal.SIGKILL)
            return "worker", moment
        return "", moment

    def look(self) -> None:
        """Is the file whole, can all of it be read, and is all there that was ever seen committed?"""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        for file in self.folder.glob(f"{self.records.name}*"):
            shutil.copy(file, place)
        try:
            found = read(place / self.records.name)
        except (AutotuneError, sqlite3.Error, ValueError) as error:
            self.fault("corrupt files", f"{type(error).__name__}: {error}")
            return
        for name in [name for name, row in self.committed.items() if found.get(name) != row]:
            self.fault("lost rows", f"{name} is gone or changed")
        self.committed = found

    def judge(self) -> None:
        """After the last run: no schedule twice, and the budget exactly."""
        self.seen["trials"] += spent(self.committed).total()
        for trial, count in spent(self.committed).items():
            for _ in range(count - 1):
                self.fault("trials spent twice", " ".join(trial))
        totals = sorted(spent_of_kernels(self.committed).values())
        if totals != [self.trials] * KERNELS:
            self.fault("wrong totals", f"{totals}, should be {self.trials} of each of {KERNELS} kernels")

    def fault(self, kind: str, text: str) -> None:
        self.seen[kind] += 1
        self.notes.append(f"{kind}: {text}")


def read(path: Path) -> Rows:
    """All rows of a file that nobody uses, each read through Records too. Raises where something is wrong with it."""
    with contextlib.closing(Records(path)) as records:
        found = rows(path)
        trials = [row for (table, _), row in found.items() if table == "trials"]
        owners = {(row["kernel"], row["fingerprint"]) for row in trials}
        if (count := sum(len(records.history(*owner).trials) for owner in owners)) != len(trials):
            raise ValueError(f"{count} trials can be read of {len(trials)}")
        records.kernels()
        for device in records.fingerprints():
            records.winners(device)
            records.all_duels(device)
    if not intact(path):
        raise ValueError("the integrity check failed")
    return found


def kill_all(count: int, new: Callable[[], Series], usual: float) -> None:
    """Series after series, until `count` kills or a run that ends badly though nobody struck it."""
    well = True
    with tqdm(total=count, desc="kills") as bar:
        while well and bar.n < count:
            own = new()
            for _ in range(min(KILLS_OF_A_SERIES, count - bar.n)):
                well = own.run(usual)
                bar.update(own.seen["kills of tuner"] + own.seen["kills of worker"] - bar.n)
                if well or own.left <= 0:
                    break
            if (
                not well or own.left > 0
            ):  # a worker may have been killed at a baseline, which the next run measures again
                well = own.run(None)
            own.judge()


def main() -> int:
    options = parser(__doc__.splitlines()[0], count=200)
    options.add_argument("--trials", type=int, default=6, metavar="N", help="of each kernel (default: %(default)s)")
    options.add_argument("--usual", type=float, metavar="S", help="seconds of a run let be (default: one is timed)")
    args = options.parse_args()
    rng, seen, notes, started = random.Random(args.seed), Counter[str](), list[str](), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="killed-") as folder:

        def new() -> Series:
            return Series(Path(tempfile.mkdtemp(dir=folder)), args.trials, rng, seen, notes)

        if args.usual is None:
            first = new()
            first.run(None)
            first.judge()
            args.usual = time.monotonic() - started
        kill_all(args.count, new, args.usual)
    figures = {name: seen[name] for name in COUNTED} | {"seconds of a run": round(args.usual, 1)}
    figures["seconds"] = round(time.monotonic() - started, 1)
    return conclude(args.json, figures, {name: (seen[name], 0) for name in FAULTS}, notes)


if __name__ == "__main__":
    sys.exit(main())
