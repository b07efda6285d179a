"""Cold searches of small kernels, each from an empty records file: every one must end within its limit.

`python tests/proofs/cold.py [--count 1000] [--seed 0] [--json OUT]`. The searches are made in a process that is told one
number after the other; when it does not answer in time it is killed, with its workers, and the search was a wedge.
With --json what is done is kept in OUT.part until the end, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import DEVICE, ROOT, conclude, environment, family, orphans, parser
from tqdm import tqdm

sys.path.append(str(ROOT / "tests" / "autotune"))
from tiny import add_one, in_place, symbolic

from autotune.budget import Budget
from autotune.compiler import renderer_of
from autotune.corpus import load
from autotune.kernel import Kernel
from autotune.measuring.runner import Runner
from autotune.records import Records
from autotune.tuner import Tuner

TRIALS = 2
SECONDS = 30.0  # the tuner's own limit, which stops the spending but not the trial under way
LIMIT = 120.0  # after which a search counts as wedged
SMALLEST = 37  # kernels of the corpus, by work
FRESH = 10  # searches after which the workers are started anew


# **** the process that searches ****


def small_kernels() -> list[Kernel]:
    corpus = sorted(load("train"), key=lambda kernel: max(kernel.work))
    return [add_one(), symbolic(), in_place(), *corpus[:SMALLEST]]


def search(kernel: Kernel, runner: Runner, seed: int, path: Path) -> dict[str, Any]:
    """One search from an empty file, final timing included."""
    started = time.perf_counter()
    with contextlib.closing(Records(path)) as records:
        records.add_fingerprint(runner.fields)
        tuner = Tuner(records, runner, renderer_of(DEVICE), trials=TRIALS, strategy="random", seed=seed, progress=False)
        (result,), _ = tuner.run([kernel], {kernel.key: 1}, Budget(TRIALS, SECONDS))
    seconds = time.perf_counter() - started
    return {"kernel": kernel.key, "seconds": round(seconds, 3), "verdicts": result.verdicts}


def serve(seed: int, folder: Path) -> None:
    """Answer each number on stdin with what came of that search, one JSON line each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed must not look like an answer
    kernels, runner = small_kernels(), Runner(DEVICE)
    for done, line in enumerate(sys.stdin):
        if done % FRESH == 0:
            runner.close()
            runner = Runner(DEVICE)
        number = int(line)
        found = search(kernels[number % len(kernels)], runner, seed + number, folder / f"{number}.db")
        answers.write(json.dumps(found) + "\n")
        answers.flush()
    runner.close()


# **** the process that watches ****


class Searcher:
    """The process that searches; a fresh one takes the place of one that died or had to be killed."""

    def __init__(self, seed: int, folder: Path):
        self.command = [sys.executable, __file__, "--seed", str(seed), "--serve", str(folder)]
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def search(self, number: int, limit: float) -> dict[str, Any]:
        """What came of a search; after `limit` seconds it is a wedge."""
        if self.process is None:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                            env=environment(self.folder), start_new_session=True)  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: then no answer comes either
            self.process.stdin.write(f"{number}\n")
            self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], limit)[0]:
            self.close()
            return {"seconds": limit, "wrong": "wedges"}
        if not (line := self.process.stdout.readline()):
            self.close()
            return {"seconds": 0.0, "wrong": "searches that died"}
        return json.loads(line)

    def close(self) -> None:
        """End it and its workers: what it left behind is killed too."""
        if self.process is not None:
            known = family(self.process.pid)
            self.process.kill()
            self.process.communicate()
            orphans(self.process.pid, known)
            self.process = None


def search_all(count: int, seed: int, limit: float, part: Path) -> list[dict[str, Any]]:
    """What came of each search, in order. One line each is kept in `part`, and what stands there is not done again."""
    done = [json.loads(line) for line in part.read_text().splitlines()] if part.exists() else []
    with tempfile.TemporaryDirectory(prefix="cold-") as folder, open(part, "a") as kept:
        searcher = Searcher(seed, Path(folder))
        try:
            for number in tqdm(range(len(done), count), desc="searches", initial=len(done), total=count):
                done.append(searcher.search(number, limit))
                print(json.dumps(done[-1]), file=kept, flush=True)
        finally:
            searcher.close()
    return done[:count]


def main() -> int:
    options = parser(__doc__.splitlines()[0], count=1000)
    options.add_argument("--limit", type=float, default=LIMIT, metavar="S", help="of a search (default: %(default)g)")
    options.add_argument("--serve", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.serve:
        serve(args.seed, args.serve)
        return 0
    with tempfile.TemporaryDirectory(prefix="cold-") as folder:
        part = args.json.with_suffix(".part") if args.json else Path(folder) / "part"
        done = search_all(args.count, args.seed, args.limit, part)
        part.unlink()
    seconds = sorted(each["seconds"] for each in done)
    wrong = Counter(each["wrong"] for each in done if "wrong" in each)
    verdicts = sum((Counter(each["verdicts"]) for each in done if "verdicts" in each), Counter[str]())
    figures = {
        "searches": len(done), "kernels": len({each["kernel"] for each in done if "kernel" in each}), "limit_seconds": args.limit,
        "median_seconds": round(statistics.median(seconds), 3), "p99_seconds": seconds[len(seconds) * 99 // 100],
        "worst_seconds": seconds[-1], "verdicts": dict(verdicts),
    }  # fmt: skip
    notes = [f"{each['wrong']}: number {number}" for number, each in enumerate(done) if "wrong" in each]
    return conclude(args.json, figures, {name: (wrong[name], 0) for name in ("wedges", "searches that died")}, notes)


if __name__ == "__main__":
    sys.exit(main())
