"""Every trial ever made, append-only, in one SQLite file that several processes may use at once."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from autotune.errors import CodecError, RecordsError
from autotune.kernel import Kernel, Schedule
from autotune.records import schema
from autotune.records.rows import (
    MAX_DETAIL,
    TABLES,
    Row,
    clean,
    fingerprint_id,
    from_data,
    from_stored,
    to_data,
    to_stored,
)
from autotune.records.schema import SCHEMA, transaction
from autotune.records.trials import BEAM, FINETUNE, Final, History, Trial
from autotune.strict import one_line

Made = TypeVar("Made", Trial, Final)

# Trials that refute a schedule as in `History.refuted`, found by SQLite: trials are many, and so are failures. Of those that
# share a binary with what was wrong only the accepted schedules' are wanted.
_REFUTING = """verdict = 'wrong_output' OR (kind = 'recheck' AND verdict != 'ok') OR
  (kernel, schedule) IN (SELECT kernel, schedule FROM finals {where} AND accepted) AND
  (kernel, nullif(code_hash, '')) IN (SELECT kernel, code_hash FROM trials {where} AND (kernel, schedule) IN
    (SELECT kernel, schedule FROM trials {where} AND verdict = 'wrong_output'))"""


def default_path() -> Path:
    """The records file under the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "tinygrad-autotune" / "records.db"


class Records:
    """An open records file. Each commit is one transaction: a process killed at any moment loses at most that one.

    Every row is checked when it is read and before it is written; a malformed one is a RecordsError that names the file,
    the table and the row.
    """

    def __init__(self, path: str | os.PathLike[str], read_only: bool = False):
        self.path = Path(path)
        # scripts change their folder; and what lies beside the file is not beside a link to it
        self.absolute = Path(os.path.realpath(self.path))
        self._checked_kernels: set[str] = set()
        if read_only and not self.path.exists():
            raise RecordsError(f"no records file {self.path}; run `python -m autotune tune SCRIPT` first")
        with self._typed_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.db = self._to_read() if read_only else self._connect(str(self.path))
            self._open(read_only)

    def _to_read(self) -> sqlite3.Connection:
        """Even a reader makes files beside the database. Where it may not, and no writer has left its own, it reads a copy."""
        uri = f"file:{quote(str(self.absolute))}?mode=ro"
        if os.access(self.absolute.parent, os.W_OK) or Path(f"{self.absolute}-wal").exists():
            return self._connect(uri, uri=True, check_same_thread=False)
        copy = self._connect(":memory:", check_same_thread=False)
        with contextlib.closing(self._connect(f"{uri}&immutable=1", uri=True)) as file:
            file.backup(copy)
        return copy

    @staticmethod
    def _connect(where: str, uri: bool = False, check_same_thread: bool = True) -> sqlite3.Connection:
        """A program under `apply` may do its work in another thread: what only reads is for any."""
        return sqlite3.connect(where, uri=uri, timeout=60.0, isolation_level=None, check_same_thread=check_same_thread)

    def _open(self, read_only: bool) -> None:
        try:
            schema.harden(self.db)
            if not read_only and not schema.layout(self.db):
                self.db.execute("PRAGMA journal_mode = WAL")
                schema.upgrade(self.db)
            self.schema = schema.schema_of(self.db)
            if not read_only and self.schema < SCHEMA:
                schema.upgrade(self.db)
                self.schema = SCHEMA
        except RecordsError as error:
            raise RecordsError(f"{self.path} {error}") from None

    @contextlib.contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter where even SQLite's message quotes damage
            raise RecordsError(self._told(str(error))) from None
        except OSError as error:
            raise RecordsError(f"records file {self.path}: {error.strerror or error}") from None

    def _told(self, text: str) -> str:
        if "readonly" in text:
            return f"{self.path} is read-only; name another file with --records"
        if "full" in text:
            return f"the disk of {self.path} is full; what was committed is kept"
        if "unable to open" in text:
            return f"{self.path} cannot be opened: it is a directory or not writable; name another file"
        if "not a database" in text:
            return f"{self.path} is no SQLite file; name another with --records"
        return f"records file {self.path}: {one_line(text)}"

    def close(self) -> None:
        self.db.close()

    # **** any row ****

    def rows(self, table: str, where: str = "", arguments: Sequence[Any] = ()) -> dict[int, Row]:
        """Checked rows by their number in the file, the oldest first. Raises RecordsError for a malformed one."""
        columns = TABLES[table]
        if all(c.since > self.schema for c in columns):
            return {}
        wanted = ", ".join(c.name if c.since <= self.schema else str(c.default) for c in columns)
        order = "created, rowid" if any(c.name == "created" for c in columns) else "rowid"
        with self._typed_errors():
            found = self.db.execute(
                f"SELECT rowid, {wanted} FROM {table} {where} ORDER BY {order}", arguments
            ).fetchall()
        return {number: self._checked(table, number, values) for number, *values in found}

    def _checked(self, table: str, number: int, values: Sequence[Any]) -> Row:
        try:
            return from_stored(table, values)
        except CodecError as error:
            raise RecordsError(f"{self.path}: {table} row {number} is malformed: {error}") from None

    def everything(self) -> dict[str, dict[int, Row]]:
        """All rows by table and number, as of one moment."""
        with self._typed_errors(), transaction(self.db, "DEFERRED"):
            return {table: self.rows(table) for table in TABLES}

    def add_missing(self, rows: Sequence[tuple[str, Row]]) -> Counter[str]:
        """Add those (table, row) that are not there yet, all or none; returns how many by table.

        A row is there when all its columns are equal, a kernel or a fingerprint when its key is.
        """
        added: Counter[str] = Counter()
        with self._typed_errors(), transaction(self.db, "IMMEDIATE"):
            for table, row in rows:
                same = [c.name for c in TABLES[table]][: 1 if table in ("kernels", "fingerprints") else None]
                equal = " AND ".join(f"{name} = ?{i}" for i, name in enumerate(same, 1))
                guard = f"WHERE NOT EXISTS (SELECT 1 FROM {table} WHERE {equal})"
                added[table] += self.db.execute(_insertion(table, guard), to_stored(table, row)).rowcount
        return added

    def _add(self, table: str, row: Row) -> None:
        checked = from_data(table, to_data(table, row))  # what could not be read again is not written
        with self._typed_errors():
            self.db.execute(_insertion(table), to_stored(table, checked))

    # **** the tables ****

    def add_kernel(self, kernel: Kernel) -> None:
        """Store a kernel, once. Raises CodecError for one that could not be read again."""
        row = _kernel_row(kernel)
        if kernel.key not in self._checked_kernels:  # the check takes milliseconds, and each trial brings its kernel
            from_stored("kernels", to_stored("kernels", row))
            self._checked_kernels.add(kernel.key)
        self.add_missing([("kernels", row)])

    def add_fingerprint(self, fields: dict[str, str]) -> str:
        """Store the description of a device; returns its id."""
        row = from_data("fingerprints", {"id": fingerprint_id(fields), "fields": fields})
        self.add_missing([("fingerprints", row)])
        return row["id"]

    def add_trial(self, fingerprint: str, trial: Trial, protocol: int) -> None:
        """Commit one trial at once: it is spent from now on. Raises CodecError for a trial that is none."""
        own = {**_fields_of(trial), "detail": clean(trial.detail[:MAX_DETAIL])}
        self._add("trials", {**own, "fingerprint": fingerprint, "protocol": protocol, "created": time.time()})

    def add_final(self, fingerprint: str, final: Final) -> None:
        """Store a verdict as the newest of its kernel, though another machine's clock be ahead."""
        before = self.rows("finals", "WHERE fingerprint = ? AND kernel = ?", [fingerprint, final.kernel]).values()
        created = max([time.time(), *(row["created"] for row in before)])
        self._add("finals", {**_fields_of(final), "fingerprint": fingerprint, "created": created})

    def add_duel(
        self, kernel: str, fingerprint: str, schedules: Sequence[Schedule], samples: Sequence[Sequence[float]]
    ) -> None:
        """Keep all samples of an interleaved comparison."""
        self._add("duels", {"kernel": kernel, "fingerprint": fingerprint, "schedules": schedules, "samples": samples,
                            "created": time.time()})  # fmt: skip

    def add_noise(self, fingerprint: str, curve: Sequence[tuple[float, float]]) -> None:
        """Keep a device's noise: (kernel seconds, relative difference that is still noise), seconds growing."""
        self._add("noise", {"fingerprint": fingerprint, "curve": curve, "created": time.time()})

    def noise(self, fingerprint: str) -> tuple[tuple[float, float], ...] | None:
        """The latest noise curve of a device."""
        found = list(self.rows("noise", "WHERE fingerprint = ?", (fingerprint,)).values())
        return found[-1]["curve"] if found else None

    def duel(self, kernel: str, fingerprint: str, schedules: Sequence[Schedule]) -> list[tuple[float, ...]] | None:
        """The latest recorded comparison of exactly these schedules."""
        found = self._of("duels", kernel, fingerprint)
        same = [list(row["samples"]) for row in found if row["schedules"] == tuple(schedules)]
        return same[-1] if same else None

    def history(self, kernel: str, fingerprint: str) -> History:
        """All trials of a kernel on a device, in the order in which they were committed."""
        return History([_made(Trial, row) for row in self._of("trials", kernel, fingerprint)])

    def spent(self, fingerprint: str) -> Counter[str]:
        """By kernel key the trials on a device that a budget counts (`Trial.counted`), without reading them."""
        with self._typed_errors():
            found = self.db.execute(
                f"SELECT kernel, count(*) FROM trials WHERE fingerprint = ? AND kind = 'trial' AND strategy NOT GLOB '*/{BEAM}' "
                f"AND strategy NOT GLOB '{FINETUNE}/*' GROUP BY 1", (fingerprint,)
            ).fetchall()  # fmt: skip
            return Counter(dict(found))

    def _of(self, table: str, kernel: str, fingerprint: str) -> list[Row]:
        return list(self.rows(table, "WHERE kernel = ? AND fingerprint = ?", (kernel, fingerprint)).values())

    def all_trials(self, fingerprint: str) -> list[tuple[float, Trial]]:
        """(time of the commit, trial) of every trial on a device, in order."""
        found = self.rows("trials", "WHERE fingerprint = ?", (fingerprint,))
        return [(row["created"], _made(Trial, row)) for row in found.values()]

    def all_duels(self, fingerprint: str) -> list[tuple[float, str, tuple[Schedule, ...], list[tuple[float, ...]]]]:
        """(time of the commit, kernel, schedules, samples) of every comparison on a device, in order."""
        found = self.rows("duels", "WHERE fingerprint = ?", (fingerprint,))
        return [(r["created"], r["kernel"], r["schedules"], list(r["samples"])) for r in found.values()]

    def final(self, kernel: str, fingerprint: str, schedule: Schedule | None = None) -> Final | None:
        """The latest verdict on a schedule of a kernel, or on any of them."""
        found = [r for r in self._of("finals", kernel, fingerprint) if schedule is None or r["schedule"] == schedule]
        return _made(Final, found[-1]) if found else None

    def accepted(self, kernel: str, fingerprint: str) -> set[Schedule]:
        """All schedules of a kernel that were ever accepted on a device, whatever became of them since."""
        return {row["schedule"] for row in self._of("finals", kernel, fingerprint) if row["accepted"]}

    def winners(self, fingerprint: str, protocol: int = 1) -> dict[str, Schedule]:
        """Schedules by kernel key: what may be applied on this device. See `served`."""
        return {key: final.schedule for key, final in self.served(fingerprint, protocol).items()}

    def served(self, fingerprint: str, protocol: int = 1, kernel: str | None = None) -> dict[str, Final]:
        """By kernel key (or of one kernel alone) the verdict on the schedule that may be applied on this device.

        Of each schedule the latest verdict counts, and of those that were accepted the newest: a schedule that was refused
        withdraws no other. Verdicts of an older protocol do not count, nor schedules that are refuted (`History.refuted`).
        """
        where, arguments = "WHERE fingerprint = ?1", [fingerprint]
        if kernel is not None:
            where, arguments = f"{where} AND kernel = ?2", [fingerprint, kernel]
        refuting = self.rows("trials", f"{where} AND ({_REFUTING.format(where=where)})", arguments).values()
        refuted = {(row["kernel"], row["schedule"]) for row in refuting}
        latest: dict[tuple[str, Schedule], Final] = {}
        for row in self.rows("finals", where, arguments).values():
            if row["protocol"] >= protocol:
                latest.pop((row["kernel"], row["schedule"]), None)  # so that the newest verdict stands last
                latest[row["kernel"], row["schedule"]] = _made(Final, row)
        return {name[0]: final for name, final in latest.items() if final.accepted and name not in refuted}

    def kernels(self) -> list[Kernel]:
        """All stored kernels."""
        return [row["ast"] for row in self.rows("kernels").values()]

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """The fields of each device on record, by id."""
        return {row["id"]: row["fields"] for row in self.rows("fingerprints").values()}

    def counts(self) -> dict[str, tuple[int, int]]:
        """(kernels, trials) by fingerprint; baselines are no trials."""
        with self._typed_errors():
            found = self.db.execute(
                "SELECT fingerprint, count(DISTINCT kernel), sum(kind = 'trial') FROM trials GROUP BY 1"
            )
            return {str(own): (kernels, trials) for own, kernels, trials in found.fetchall()}


def copy_records(source: Path, target: Path) -> None:
    """All that a records file holds, even what a killed run has left in the log beside it. Raises RecordsError."""
    try:
        with contextlib.closing(sqlite3.connect(source)) as old, contextlib.closing(sqlite3.connect(target)) as new:
            old.backup(new)
    except sqlite3.Error as error:
        raise RecordsError(f"records file {source} cannot be copied: {one_line(str(error))}") from None


def _insertion(table: str, guard: str = "") -> str:
    names = [c.name for c in TABLES[table]]
    values = ", ".join(f"?{i}" for i in range(1, len(names) + 1))
    return f"INSERT INTO {table} ({', '.join(names)}) SELECT {values} {guard}"


def _kernel_row(kernel: Kernel) -> Row:
    return {"key": kernel.key, "name": kernel.name, "family": kernel.family, "ast": kernel}


def _fields_of(made: Trial | Final) -> Row:
    return {f.name: getattr(made, f.name) for f in fields(made)}


def _made(kind: type[Made], row: Row) -> Made:
    return kind(**{f.name: row[f.name] for f in fields(kind)})
