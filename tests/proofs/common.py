"""What the proofs share: tuning processes in sessions of their own, a records file seen from outside, and the figures."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEVICE = os.environ.get("DEV", "CPU")
SCRIPT = """
from tinygrad import Tensor
(Tensor.empty(300).realize() + 1).realize()
(Tensor.empty(16, 24) @ Tensor.empty(24, 32)).realize()
"""
KERNELS = 2  # that SCRIPT runs
KEPT = ("kernels", "fingerprints", "trials", "duels", "finals")  # tables of which no row may ever change or go
ORPHAN_SECONDS = 5.0  # that anything may outlive its tuner

Process = tuple[int, int]  # (number, time of its start): a number alone may be given to another process later
Rows = dict[tuple[str, int], dict[str, Any]]  # {(table, row id): columns}


# **** processes ****


def environment(folder: Path) -> dict[str, str]:
    """Of a process that imports this very tree. Its caches and the lock of its device (under TMPDIR) are its own.

    Nobody reads the times that are measured here, and a wait for another tuner on the machine must not pass for a wedge.
    """
    own = {"DEV": DEVICE, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache"), "TMPDIR": str(folder)}
    return {**os.environ, **own}


def tune(folder: Path, records: Path, trials: int, *options: str | Path) -> subprocess.Popen[bytes]:
    """`python -m autotune tune` on SCRIPT, in a session of its own; what it says is added to `said.txt`."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "autotune", "tune", "--records", records, "--strategy", "random", "--trials", str(trials),
               *options, script]  # fmt: skip
    with open(folder / "said.txt", "ab") as said:
        return subprocess.Popen(
            command, cwd=folder, env=environment(folder), stdout=said, stderr=said, start_new_session=True
        )


def ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Did it end within that time?"""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def last_words(folder: Path) -> str:
    """The last line that the tuning processes of a folder had to say."""
    lines = (folder / "said.txt").read_text(errors="replace").split("\n")
    return next((line.rpartition("\r")[2].strip()[:200] for line in reversed(lines) if line.strip()), "nothing")


def living() -> dict[Process, tuple[int, int]]:
    """{process: (its parent, its session)} of all that are alive."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # ended while we looked
            continue
        if fields[0] not in "ZX":
            found[int(path.parent.name), int(fields[19])] = int(fields[1]), int(fields[3])
    return found


def family(session: int) -> set[Process]:
    """The living processes of a session, and what descends from them into other sessions."""
    alive = living()
    found = {process for process, (_, own) in alive.items() if own == session}
    while more := {p for p, (parent, _) in alive.items() if parent in {pid for pid, _ in found}} - found:
        found |= more
    return found


def command_of(process: Process) -> str:
    """Its command line; empty once it has ended."""
    try:
        return Path(f"/proc/{process[0]}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def orphans(session: int, known: set[Process]) -> list[str]:
    """The commands of what still lives a while after its tuner ended; none of them lives after this call."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while (left := family(session) | (known & living().keys())) and time.monotonic() < deadline:
        time.sleep(0.05)
    commands = [command_of(process) for process in left]
    for pid, _ in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return commands


# **** records, seen from outside ****


def rows(path: Path) -> Rows:
    """Every committed row of the tables that only grow; nothing where there is no file yet."""
    if not path.exists():
        return {}
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=60.0)) as db:
        db.row_factory = sqlite3.Row
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'") if name in KEPT]
        return {(name, row[0]): dict(row) for name in tables for row in db.execute(f"SELECT rowid, * FROM {name}")}


def intact(path: Path) -> bool:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def spent(found: Rows) -> Counter[tuple[str, str, str]]:
    """How often each (kernel, fingerprint, schedule) was spent as a trial."""
    trials = (row for (table, _), row in found.items() if table == "trials" and row["kind"] == "trial")
    return Counter((row["kernel"], row["fingerprint"], row["schedule"]) for row in trials)


def spent_of_kernels(found: Rows) -> Counter[tuple[str, str]]:
    """How many trials were spent on each (kernel, fingerprint)."""
    totals: Counter[tuple[str, str]] = Counter()
    for (kernel, device, _), count in spent(found).items():
        totals[kernel, device] += count
    return totals


# **** figures ****


def parser(text: str, count: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--count", type=int, default=count, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures there")
    return parser


def conclude(
    out: Path | None, figures: Mapping[str, Any], bars: Mapping[str, tuple[int, int]], notes: list[str]
) -> int:
    """Print and write all; the exit status is 1 where a bar, (what was seen, what is allowed), is missed."""
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):44} {value}")
    for name, (seen, allowed) in bars.items():
        print(f"{name.replace('_', ' '):44} {seen:<6} at most {allowed}: {'met' if seen <= allowed else 'MISSED'}")
    for note in notes:
        print(f"  {note}")
    if out is not None:
        judged = {name: {"seen": seen, "at_most": allowed} for name, (seen, allowed) in bars.items()}
        text = json.dumps({"device": DEVICE, **figures, "bars": judged, "notes": notes}, indent=1)
        out.write_text(text + "\n")
    return int(any(seen > allowed for seen, allowed in bars.values()))
