"""Files from strangers: `python tests/proofs/malformed.py --count 10000 --seed 0 --json OUT`.

Valid kernels, exports, records files, rows and checkpoints are mutated, and hostile ones are added that no accident would
make. Each must be refused with this program's own error, or turn out to be harmless: still valid, and checked as such.
Anything else has escaped: another exception, a crash, a hang, gigabytes of memory, or a file called `pwned`.
Inputs are tried in forked processes, so that a crash is seen. Exit status 1 if any input escaped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ["CACHELEVEL"] = "0"  # tinygrad's cache is an SQLite file, and a connection must not pass through a fork

from specimens import KINDS, Specimens

from agents.checkpoint import CheckpointError
from autotune.errors import AutotuneError

BATCH = 500  # inputs of one process
INPUT_SECONDS = 10.0  # what takes longer hangs
BATCH_SECONDS = 300.0  # where a hang cannot even be interrupted
MAX_MEMORY = 16 * 2**30  # address space of a process: beyond it, allocations fail
MAX_RESIDENT = 2 * 2**30  # bytes really used, by any input


class Hangs(BaseException):
    """Raised by the alarm; no `except Exception` can swallow it."""


@dataclass
class Tally:
    """What became of the inputs of one kind."""

    tried: int = 0
    refused: int = 0  # with this program's own error
    harmless: int = 0  # still valid
    escaped: int = 0
    peak_mb: int = 0
    messages: list[str] = field(default_factory=list)  # of the escaped

    def add(self, outcome: str, message: str = "") -> None:
        self.tried += 1
        setattr(self, outcome, getattr(self, outcome) + 1)
        if message:
            self.messages.append(message)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="inputs in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result there")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        specimens = Specimens(Path(name))
        tallies = {kind: tried(kind, -(-args.count // len(KINDS)), args.seed, specimens) for kind in KINDS}
    print(table(tallies))
    escaped = sum(t.escaped for t in tallies.values())
    if args.json is not None:
        kinds = {kind: asdict(t) for kind, t in tallies.items()}
        result = {"seed": args.seed, "seconds": round(time.monotonic() - started, 1), "escaped": escaped,
                  "tried": sum(t.tried for t in tallies.values()), "kinds": kinds}  # fmt: skip
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if escaped else 0


def tried(kind: str, count: int, seed: int, specimens: Specimens) -> Tally:
    """Try `count` inputs of a kind, a batch in each process; one that dies is replaced behind the input that killed it."""
    tally, at = Tally(), 0
    fork = multiprocessing.get_context("fork")
    while at < count:
        results = specimens.folder / "results"
        results.unlink(missing_ok=True)
        until = min(count, at + BATCH)
        process = fork.Process(target=batch, args=(kind, range(at, until), seed, specimens, results))
        process.start()
        process.join(BATCH_SECONDS)
        process.kill()
        process.join()
        lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        for outcome, message, peak in lines:
            tally.add(outcome, message)
            tally.peak_mb = max(tally.peak_mb, peak)
        at += len(lines)
        if at < until:
            tally.add("escaped", f"input {at}: the process died or hung ({process.exitcode})")
            at += 1
    return tally


def batch(kind: str, indices: range, seed: int, specimens: Specimens, results: Path) -> None:
    """In a process of its own: one line of JSON for each input, written before the next is tried."""
    folder = specimens.folder / kind.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.chdir(folder)  # whatever is executed would write its `pwned` here
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    signal.signal(signal.SIGALRM, _alarm)
    with open(results, "w") as file:
        for index in indices:
            outcome, message = one(kind, index, seed, specimens, folder)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            if list(folder.rglob("pwned*")):
                outcome, message = "escaped", f"input {index} was executed"
            elif peak > MAX_RESIDENT:
                outcome, message = "escaped", f"input {index} used {peak >> 20} MiB"
            file.write(json.dumps([outcome, message, peak >> 20]) + "\n")
            file.flush()


def _alarm(number: int, frame: object) -> None:
    raise Hangs


def one(kind: str, index: int, seed: int, specimens: Specimens, folder: Path) -> tuple[str, str]:
    """(outcome, message) of one input."""
    attempt = KINDS[kind](specimens, random.Random(f"{seed} {kind} {index}"), index, folder)
    signal.setitimer(signal.ITIMER_REAL, INPUT_SECONDS)
    try:
        attempt()
        return "harmless", ""
    except (AutotuneError, CheckpointError) as error:
        bad = "\n" in str(error) or not str(error).isprintable()
        return ("escaped", f"input {index}: its message is no line of text") if bad else ("refused", "")
    except Hangs:
        return "escaped", f"input {index}: no answer within {INPUT_SECONDS:.0f} s"
    except BaseException as error:
        return "escaped", f"input {index}: {type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def table(tallies: dict[str, Tally]) -> str:
    head = f"{'kind':22} {'tried':>6} {'refused':>8} {'harmless':>9} {'escaped':>8} {'peak MiB':>9}"
    lines = [head, "-" * len(head)]
    for kind, t in tallies.items():
        lines.append(f"{kind:22} {t.tried:6d} {t.refused:8d} {t.harmless:9d} {t.escaped:8d} {t.peak_mb:9d}")
    total = [sum(getattr(t, name) for t in tallies.values()) for name in ("tried", "refused", "harmless", "escaped")]
    lines.append("{:22} {:6d} {:8d} {:9d} {:8d}".format("all", *total))
    lines += [f"{kind}: {message}" for kind, t in tallies.items() for message in t.messages[:20]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
