"""Every trial ever made, append-only, in one SQLite file that several processes may use at once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from autotune.errors import CodecError, RecordsError
from autotune.kernel import Kernel, Schedule, kernel_from_json, kernel_to_json, schedule_from_json, schedule_to_json

SCHEMA = 1
VERDICTS = ("ok", "illegal", "compile_failed", "too_big", "wrong_output", "timeout", "crashed")
TABLES = """
CREATE TABLE meta (schema INTEGER NOT NULL);
CREATE TABLE kernels (key TEXT PRIMARY KEY, name TEXT NOT NULL, family TEXT NOT NULL, ast TEXT NOT NULL);
CREATE TABLE fingerprints (id TEXT PRIMARY KEY, fields TEXT NOT NULL);
CREATE TABLE trials (id INTEGER PRIMARY KEY, kernel TEXT NOT NULL, fingerprint TEXT NOT NULL, kind TEXT NOT NULL,
  schedule TEXT NOT NULL, verdict TEXT NOT NULL, samples TEXT NOT NULL, compile_seconds REAL NOT NULL,
  code_hash TEXT NOT NULL, detail TEXT NOT NULL, strategy TEXT NOT NULL, seed INTEGER NOT NULL,
  protocol INTEGER NOT NULL, created REAL NOT NULL);
CREATE INDEX trials_by_kernel ON trials (kernel, fingerprint);
CREATE TABLE duels (id INTEGER PRIMARY KEY, kernel TEXT NOT NULL, fingerprint TEXT NOT NULL, schedules TEXT NOT NULL,
  samples TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE finals (id INTEGER PRIMARY KEY, kernel TEXT NOT NULL, fingerprint TEXT NOT NULL, schedule TEXT NOT NULL,
  tuned TEXT NOT NULL, hand_coded TEXT NOT NULL, control TEXT NOT NULL, accepted INTEGER NOT NULL, created REAL NOT NULL);
"""


@dataclass(frozen=True)
class Trial:
    """One candidate schedule, compiled and, if that worked, verified and timed on one device."""

    kernel: str  # key
    schedule: Schedule
    verdict: str
    samples: tuple[float, ...] = ()  # seconds, all of them
    compile_seconds: float = 0.0
    code_hash: str = ""
    detail: str = ""
    kind: str = "trial"  # or "unoptimized", "hand_coded", "answer" (the policy's, at zero trials): not counted
    strategy: str = ""
    seed: int = 0

    @property
    def seconds(self) -> float | None:
        """Median run time; None where there is none."""
        return statistics.median(self.samples) if self.verdict == "ok" else None


@dataclass(frozen=True)
class Final:
    """The winner timed again, interleaved with hand-coded and a second hand-coded (the A/A control), in a fresh process."""

    kernel: str
    schedule: Schedule
    tuned: tuple[float, ...]
    hand_coded: tuple[float, ...]
    control: tuple[float, ...]
    accepted: bool

    @property
    def ratio(self) -> float:
        """Median tuned time over median hand-coded time of the same interleaved run."""
        return statistics.median(self.tuned) / statistics.median(self.hand_coded)


@dataclass
class History:
    """What is known of one kernel on one device."""

    trials: list[Trial] = field(default_factory=list)

    @property
    def spent(self) -> int:
        return sum(t.kind == "trial" for t in self.trials)

    @property
    def baselines(self) -> dict[str, Trial]:
        return {t.kind: t for t in self.trials if t.kind != "trial"}

    @property
    def best(self) -> Trial | None:
        """The fastest verified schedule, baselines included: the incumbent."""
        good = [t for t in self.trials if t.seconds is not None]
        return min(good, key=lambda t: t.seconds or 0.0, default=None)


def fingerprint_id(fields: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def default_path() -> Path:
    """The records file under the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "tinygrad-autotune" / "records.db"


class Records:
    """An open records file. Each commit is one transaction: a process killed at any moment loses at most that one."""

    def __init__(self, path: str | os.PathLike[str], read_only: bool = False):
        self.path = Path(path)
        if read_only and not self.path.exists():
            raise RecordsError(f"no records file {self.path}; run `python -m autotune tune SCRIPT` first")
        with self._typed_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            where = f"file:{quote(str(self.path))}?mode=ro" if read_only else str(self.path)
            self.db = sqlite3.connect(where, uri=read_only, timeout=60.0, isolation_level=None)
            self._open(read_only)

    def _open(self, read_only: bool) -> None:
        tables = {row[0] for row in self.db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables and not read_only:
            self.db.execute("PRAGMA journal_mode = WAL")
            self._create()
        elif "meta" not in tables:
            raise RecordsError(f"{self.path} is no records file of tinygrad-autotune; name another with --records")
        schema = self.db.execute("SELECT schema FROM meta").fetchone()[0]
        if schema != SCHEMA:
            raise RecordsError(
                f"{self.path} has schema {schema}, this program knows {SCHEMA}; upgrade tinygrad-autotune"
            )

    def _create(self) -> None:
        self.db.execute("BEGIN IMMEDIATE")  # another process may be creating the same file
        if not self.db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
            for statement in TABLES.strip().split(";")[:-1]:
                self.db.execute(statement)
            self.db.execute("INSERT INTO meta VALUES (?)", (SCHEMA,))
        self.db.execute("COMMIT")

    @contextlib.contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            text = str(error)
            if "readonly" in text:
                raise RecordsError(f"{self.path} is read-only; name another file with --records") from None
            if "full" in text:
                raise RecordsError(f"the disk of {self.path} is full; what was committed is kept") from None
            if "unable to open" in text:
                raise RecordsError(
                    f"{self.path} cannot be opened: it is a directory or not writable; name another file"
                ) from None
            if "not a database" in text:
                raise RecordsError(f"{self.path} is no SQLite file; name another with --records") from None
            raise RecordsError(f"records file {self.path}: {text}") from None
        except OSError as error:
            raise RecordsError(f"records file {self.path}: {error.strerror or error}") from None

    def close(self) -> None:
        self.db.close()

    def add_kernel(self, kernel: Kernel) -> None:
        row = (kernel.key, kernel.name, kernel.family, json.dumps(kernel_to_json(kernel)))
        with self._typed_errors():
            self.db.execute("INSERT OR IGNORE INTO kernels VALUES (?, ?, ?, ?)", row)

    def add_fingerprint(self, fields: dict[str, str]) -> str:
        """Store the description of a device; returns its id."""
        digest = fingerprint_id(fields)
        with self._typed_errors():
            self.db.execute(
                "INSERT OR IGNORE INTO fingerprints VALUES (?, ?)", (digest, json.dumps(fields, sort_keys=True))
            )
        return digest

    def add_trial(self, fingerprint: str, trial: Trial, protocol: int) -> None:
        """Commit one trial at once: it is spent from now on."""
        if trial.verdict not in VERDICTS:
            raise ValueError(f"no verdict is called {trial.verdict!r}")
        row = (trial.kernel, fingerprint, trial.kind, json.dumps(schedule_to_json(trial.schedule)), trial.verdict,
               json.dumps(trial.samples), trial.compile_seconds, trial.code_hash, trial.detail, trial.strategy, trial.seed,
               protocol, time.time())  # fmt: skip
        with self._typed_errors():
            self.db.execute(
                "INSERT INTO trials (kernel, fingerprint, kind, schedule, verdict, samples, compile_seconds, code_hash, detail,"
                " strategy, seed, protocol, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)  # fmt: skip

    def add_final(self, fingerprint: str, final: Final) -> None:
        row = (final.kernel, fingerprint, json.dumps(schedule_to_json(final.schedule)), json.dumps(final.tuned),
               json.dumps(final.hand_coded), json.dumps(final.control), int(final.accepted), time.time())  # fmt: skip
        with self._typed_errors():
            self.db.execute("INSERT INTO finals (kernel, fingerprint, schedule, tuned, hand_coded, control, accepted, created)"
                            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)  # fmt: skip

    def add_duel(
        self, kernel: str, fingerprint: str, schedules: Sequence[Schedule], samples: Sequence[Sequence[float]]
    ) -> None:
        """Keep all samples of an interleaved comparison."""
        names = json.dumps([schedule_to_json(s) for s in schedules])
        row = (kernel, fingerprint, names, json.dumps(samples), time.time())
        with self._typed_errors():
            self.db.execute(
                "INSERT INTO duels (kernel, fingerprint, schedules, samples, created) VALUES (?, ?, ?, ?, ?)", row
            )

    def duel(self, kernel: str, fingerprint: str, schedules: Sequence[Schedule]) -> list[tuple[float, ...]] | None:
        """The latest recorded comparison of exactly these schedules."""
        names = json.dumps([schedule_to_json(s) for s in schedules])
        with self._typed_errors():
            row = self.db.execute("SELECT samples FROM duels WHERE kernel = ? AND fingerprint = ? AND schedules = ?"
                                  " ORDER BY id DESC LIMIT 1", (kernel, fingerprint, names)).fetchone()  # fmt: skip
        return None if row is None else [tuple(samples) for samples in json.loads(row[0])]

    def history(self, kernel: str, fingerprint: str) -> History:
        """All trials of a kernel on a device, in the order in which they were committed."""
        with self._typed_errors():
            rows = self.db.execute(
                "SELECT kernel, schedule, verdict, samples, compile_seconds, code_hash, detail, kind, strategy, seed FROM trials"
                " WHERE kernel = ? AND fingerprint = ? ORDER BY id", (kernel, fingerprint)).fetchall()  # fmt: skip
        return History([_trial_of(row) for row in rows])

    def all_trials(self, fingerprint: str) -> list[tuple[float, Trial]]:
        """(time of the commit, trial) of every trial on a device, in order."""
        with self._typed_errors():
            rows = self.db.execute(
                "SELECT created, kernel, schedule, verdict, samples, compile_seconds, code_hash, detail, kind, strategy, seed"
                " FROM trials WHERE fingerprint = ? ORDER BY id", (fingerprint,)).fetchall()  # fmt: skip
        return [(row[0], _trial_of(row[1:])) for row in rows]

    def all_duels(self, fingerprint: str) -> list[tuple[float, str, tuple[Schedule, ...], list[tuple[float, ...]]]]:
        """(time of the commit, kernel, schedules, samples) of every comparison on a device, in order."""
        with self._typed_errors():
            rows = self.db.execute("SELECT created, kernel, schedules, samples FROM duels WHERE fingerprint = ? ORDER BY id",
                                   (fingerprint,)).fetchall()  # fmt: skip
        return [(created, key, tuple(schedule_from_json(s) for s in json.loads(schedules)), [tuple(x) for x in json.loads(samples)])
                for created, key, schedules, samples in rows]  # fmt: skip

    def final(self, kernel: str, fingerprint: str) -> Final | None:
        """The latest verdict on a kernel's winner."""
        with self._typed_errors():
            row = self.db.execute(
                "SELECT kernel, schedule, tuned, hand_coded, control, accepted FROM finals WHERE kernel = ? AND fingerprint = ?"
                " ORDER BY id DESC LIMIT 1", (kernel, fingerprint)).fetchone()  # fmt: skip
        if row is None:
            return None
        times = [tuple(json.loads(text)) for text in row[2:5]]
        return Final(row[0], schedule_from_json(json.loads(row[1])), times[0], times[1], times[2], bool(row[5]))

    def winners(self, fingerprint: str) -> dict[str, Schedule]:
        """Accepted schedules by kernel key: what may be applied on this device."""
        with self._typed_errors():
            keys = [
                r[0]
                for r in self.db.execute("SELECT DISTINCT kernel FROM finals WHERE fingerprint = ?", (fingerprint,))
            ]
        finals = [self.final(key, fingerprint) for key in keys]
        return {f.kernel: f.schedule for f in finals if f is not None and f.accepted}

    def kernels(self) -> list[Kernel]:
        """All stored kernels. Raises RecordsError naming the one that is malformed."""
        with self._typed_errors():
            rows = self.db.execute("SELECT key, ast FROM kernels ORDER BY rowid").fetchall()
        found = []
        for key, text in rows:
            try:
                found.append(kernel_from_json(json.loads(text)))
            except (CodecError, ValueError) as error:
                raise RecordsError(f"kernel {key} in {self.path} is malformed: {error}") from None
        return found

    def fingerprints(self) -> dict[str, dict[str, str]]:
        with self._typed_errors():
            return {row[0]: json.loads(row[1]) for row in self.db.execute("SELECT id, fields FROM fingerprints")}


def _trial_of(row: tuple) -> Trial:
    key, schedule, verdict, samples, seconds, code_hash, detail, kind, strategy, seed = row
    return Trial(key, schedule_from_json(json.loads(schedule)), verdict, tuple(json.loads(samples)), seconds, code_hash, detail,
                 kind, strategy, seed)  # fmt: skip
