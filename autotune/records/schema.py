"""The layout of a records file: how it is made, brought up to date, and told from files that only look like one."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
from collections.abc import Iterator

from autotune.errors import RecordsError

STEPS = (
    """
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
INSERT INTO meta VALUES (1);
""",
    """
ALTER TABLE trials ADD COLUMN verify_seconds REAL NOT NULL DEFAULT 0.0;
ALTER TABLE trials ADD COLUMN timing_seconds REAL NOT NULL DEFAULT 0.0;
ALTER TABLE trials ADD COLUMN input_seed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE finals ADD COLUMN protocol INTEGER NOT NULL DEFAULT 1;
CREATE INDEX duels_by_kernel ON duels (kernel, fingerprint);
CREATE INDEX finals_by_kernel ON finals (kernel, fingerprint);
CREATE TABLE noise (id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL, curve TEXT NOT NULL, created REAL NOT NULL);
UPDATE meta SET schema = 2;
""",
)  # step n makes schema n of schema n - 1; a new file takes them all, so that files of one schema are all alike
SCHEMA = len(STEPS)
MAX_BYTES = 32_000_000  # of one value or row that SQLite may hand out
Layout = frozenset[tuple[str, str, str]]


def harden(db: sqlite3.Connection) -> None:
    """Before anything of a stranger's file is read."""
    db.execute("PRAGMA trusted_schema = OFF")
    db.execute("PRAGMA cell_size_check = ON")
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_BYTES)


def upgrade(db: sqlite3.Connection) -> None:
    """Make a new file, or bring an older one up to date, in one transaction; nothing to do where another process did."""
    with transaction(db, "IMMEDIATE"):
        old = schema_of(db) if layout(db) else 0
        for step in STEPS[old:]:
            for statement in step.strip().split(";")[:-1]:
                db.execute(statement)


@contextlib.contextmanager
def transaction(db: sqlite3.Connection, kind: str) -> Iterator[None]:
    """All or nothing. DEFERRED sees the file as it was at one moment; IMMEDIATE also keeps other writers out."""
    db.execute(f"BEGIN {kind}")
    try:
        yield
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def schema_of(db: sqlite3.Connection) -> int:
    """The schema of an open file. Raises RecordsError, without the file's name, unless it is exactly what we make."""
    found = layout(db)
    if ("table", "meta") not in {entry[:2] for entry in found}:
        raise RecordsError("is no records file of tinygrad-autotune; name another with --records")
    rows = db.execute("SELECT schema FROM meta LIMIT 2").fetchall()
    if len(rows) != 1 or type(rows[0][0]) is not int or rows[0][0] < 1:
        raise RecordsError("is damaged: it does not say which schema it has; name another with --records")
    schema: int = rows[0][0]
    if schema > SCHEMA:
        raise RecordsError(f"has schema {schema}, this program knows {SCHEMA}; upgrade tinygrad-autotune")
    if strange := sorted(found ^ _expected(schema)):
        kind, name, _ = strange[0]
        raise RecordsError(f"is not as this program makes it ({kind} {name[:60]!r}); name another with --records")
    return schema


def layout(db: sqlite3.Connection) -> Layout:
    """(type, name, SQL) of all that the file holds."""
    rows = db.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
    return frozenset((str(kind), str(name), " ".join(str(sql).split())) for kind, name, sql in rows)


@functools.cache
def _expected(schema: int) -> Layout:
    db = sqlite3.connect(":memory:")
    try:
        for step in STEPS[:schema]:
            db.executescript(step)
        return layout(db)
    finally:
        db.close()
