"""Records files of older programs, and files that are none: read, brought up to date, or refused in one line."""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
from pathlib import Path

import pytest
from rows import FIELDS, fill, final, trial
from tiny import U4, add_one

from autotune.errors import RecordsError
from autotune.kernel import kernel_to_json
from autotune.records import SCHEMA, Final, Records, Trial, fingerprint_id, schema
from autotune.records.rows import MAX_DETAIL, MAX_SAMPLES
from autotune.records.schema import STEPS

# **** files of an older program ****


@pytest.fixture
def old(tmp_path) -> Path:
    """A file of schema 1, with a row in each of its tables."""
    path = tmp_path / "old.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(STEPS[0])
        db.execute(
            "INSERT INTO fingerprints VALUES (?, ?)", (fingerprint_id(FIELDS), json.dumps(FIELDS, sort_keys=True))
        )
        kernel = add_one()
        db.execute(
            "INSERT INTO kernels VALUES (?, ?, '', ?)", (kernel.key, kernel.name, json.dumps(kernel_to_json(kernel)))
        )
        place = (kernel.key, fingerprint_id(FIELDS))
        db.execute("INSERT INTO trials VALUES (NULL, ?, ?, 'trial', '[[\"UPCAST\", 0, 4]]', 'ok', '[1.0]', 0.5, 'c', 'd', 's', 3, 1, 7.0)",
                   place)  # fmt: skip
        db.execute("INSERT INTO duels VALUES (NULL, ?, ?, '[[]]', '[[2.0]]', 8.0)", place)
        db.execute("INSERT INTO finals VALUES (NULL, ?, ?, '[]', '[1.0]', '[2.0]', '[3.0]', 1, 9.0)", place)
        db.commit()
    return path


def check_old(records: Records) -> None:
    key, own = add_one().key, fingerprint_id(FIELDS)
    kept = Trial(key, (U4,), "ok", (1.0,), 0.5, "c", "d", "trial", "s", 3, 0.0, 0.0, 0)
    assert records.all_trials(own) == [(7.0, kept)] and records.all_duels(own) == [(8.0, key, ((),), [(2.0,)])]
    assert records.final(key, own) == Final(key, (), (1.0,), (2.0,), (3.0,), True, 1)
    assert records.winners(own) == {key: ()} and records.winners(own, 2) == {} and records.noise(own) is None
    assert records.kernels() == [add_one()] and records.fingerprints() == {own: FIELDS}


def test_an_older_file_is_read_as_it_is(old):
    before = old.read_bytes()
    records = Records(old, read_only=True)
    check_old(records)
    records.close()
    assert old.read_bytes() == before


def test_an_older_file_is_brought_up_to_date_when_it_is_written(old):
    records = Records(old)
    check_old(records)
    own = fingerprint_id(FIELDS)
    fill(records, trial(input_seed=5))
    records.add_noise(own, [(1.0, 0.5)])
    records.close()
    again = Records(old, read_only=True)
    assert again.schema == SCHEMA and again.noise(own) == ((1.0, 0.5),)
    assert [t.input_seed for t in again.history(add_one().key, own).trials] == [0, 5]


def test_an_interrupted_update_changes_nothing(old, monkeypatch):
    monkeypatch.setattr(schema, "STEPS", (STEPS[0], STEPS[1] + "CREATE TABLE trials (twice TEXT);"))
    with pytest.raises(RecordsError, match="already exists"):
        Records(old)
    monkeypatch.undo()
    check_old(Records(old))


# **** files that are none ****


def message(path: Path, read_only: bool = False) -> str:
    with pytest.raises(RecordsError) as caught:
        Records(path, read_only)
    assert str(path.name) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_records_file_is_told(tmp_path):
    text, foreign, empty = tmp_path / "notes.txt", tmp_path / "foreign.db", tmp_path / "empty.db"
    text.write_text("these are not records " * 100)
    assert "no SQLite file" in message(text) and "no SQLite file" in message(text, read_only=True)
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE customers (name TEXT)")
    assert "no records file" in message(foreign)
    with sqlite3.connect(foreign) as db:
        assert [r[0] for r in db.execute("SELECT name FROM sqlite_master")] == ["customers"]  # untouched
    empty.touch()
    assert "no records file" in message(empty, read_only=True)
    assert message(tmp_path)  # a directory


def test_a_missing_file_is_told_only_where_nothing_may_be_made(tmp_path):
    assert "tune SCRIPT" in message(tmp_path / "none.db", read_only=True)
    assert not (tmp_path / "none.db").exists()
    Records(tmp_path / "none.db").close()
    assert (tmp_path / "none.db").exists()


def test_a_newer_schema_is_told(records):
    records.db.execute("UPDATE meta SET schema = ?", (SCHEMA + 1,))
    records.close()
    assert f"schema {SCHEMA + 1}" in message(records.path) and "upgrade" in message(records.path, read_only=True)


def test_a_file_opened_for_reading_cannot_be_written(records):
    own = fill(records, trial())
    reader = Records(records.path, read_only=True)
    with pytest.raises(RecordsError, match="read-only"):
        reader.add_trial(own, trial(), 1)
    assert reader.history(add_one().key, own).spent == 1
    reader.close()


@pytest.mark.parametrize("name", ["what?.db", "50%20.db", "a#b.db", "with space.db", "mode=rw&x.db"])
def test_any_file_name_will_do(tmp_path, name):
    own = fill(Records(tmp_path / name), trial())
    assert Records(tmp_path / name, read_only=True).history(add_one().key, own).spent == 1
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith("db")] == [name]


def test_a_stored_kernel_that_was_tampered_with_is_named(records):
    records.add_kernel(add_one())
    (text,) = records.db.execute("SELECT ast FROM kernels").fetchone()
    evil = json.loads(text)
    evil["nodes"][-4][0] = "CUSTOM"
    for bad in (json.dumps(evil), "{", text.replace("300", "301")):
        records.db.execute("UPDATE kernels SET ast = ?", (bad,))
        with pytest.raises(RecordsError, match="records.db: kernels row 1 is malformed: ast: "):
            records.kernels()


@pytest.mark.parametrize(("table", "column", "value"), [
    ("trials", "verdict", "fine"), ("trials", "samples", "[1e-6"), ("trials", "samples", "[0]"), ("trials", "samples", "[NaN]"),
    ("trials", "samples", "[1e999]"), ("trials", "samples", "[]"), ("trials", "samples", "[true]"), ("trials", "samples", "[" * 100_000),
    ("trials", "samples", "[" + "9" * 5000 + "]"), ("trials", "samples", json.dumps([1.0] * (MAX_SAMPLES + 1))), ("trials", "samples", b"[1.0]"),
    ("trials", "schedule", '[["EXEC", 0, 4]]'), ("trials", "schedule", '{"a": 1, "a": 2}'), ("trials", "kernel", "a\nb"),
    ("trials", "detail", "x" * (MAX_DETAIL + 1)), ("trials", "seed", "seven"), ("trials", "created", -1.0), ("trials", "created", 1e11),
    ("trials", "protocol", 0), ("trials", "kind", b"trial"), ("fingerprints", "fields", '{"model": "another"}'), ("fingerprints", "fields", "[]"),
    ("duels", "samples", "[[1.0]]"), ("duels", "samples", "[[1.0], []]"), ("finals", "accepted", 2), ("finals", "tuned", "[]"),
    ("noise", "curve", "[[2.0, 0.1], [1.0, 0.1]]"), ("noise", "curve", "[]"), ("noise", "curve", "[[1.0]]"), ("kernels", "family", "other"),
])  # fmt: skip
def test_a_malformed_row_is_named(records, table, column, value):
    own = fill(records, trial())
    records.add_kernel(add_one())
    records.add_duel(add_one().key, own, [(U4,), ()], [(1.0,), (2.0,)])
    records.add_final(own, final(True))
    records.add_noise(own, [(1.0, 0.5)])
    records.db.execute(f"UPDATE {table} SET {column} = ?", (value,))
    with pytest.raises(RecordsError, match=rf"records\.db: {table} row 1 is malformed: ") as caught:
        records.everything()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("statement", [
    "CREATE VIEW v AS SELECT 1", "CREATE TABLE more (x)", "CREATE INDEX i ON trials (length(detail))", "DROP TABLE noise",
    "CREATE TRIGGER t AFTER INSERT ON trials BEGIN UPDATE finals SET accepted = 1; END",
    "ALTER TABLE trials RENAME TO t; CREATE VIEW trials AS SELECT * FROM t",
])  # fmt: skip
def test_a_file_that_holds_more_than_rows_is_refused(records, statement):
    fill(records, trial())
    records.db.executescript(statement)
    records.close()
    for read_only in (True, False):
        assert "not as this program makes it" in message(records.path, read_only)


@pytest.mark.parametrize(
    "statement", ["DELETE FROM meta", "INSERT INTO meta VALUES (2)", "UPDATE meta SET schema = 'two'"]
)
def test_a_file_without_one_schema_is_refused(records, statement):
    records.db.execute(statement)
    records.close()
    assert "does not say which schema" in message(records.path)


def test_a_huge_value_is_never_handed_out(records):
    fill(records, trial())
    with contextlib.closing(sqlite3.connect(records.path, isolation_level=None)) as db:
        db.execute("UPDATE trials SET detail = zeroblob(50000000)")
    with pytest.raises(RecordsError, match="too big"):
        records.all_trials(fingerprint_id(FIELDS))


def test_a_damaged_page_is_an_error_wherever_it_is_met(records):
    own = fill(records, *[trial(samples=(1e-6,) * 60)] * 200)
    records.close()
    data = bytearray(records.path.read_bytes())
    middle = len(data) // 2 // 4096 * 4096
    data[middle : middle + 4096] = b"\xff" * 4096
    records.path.write_bytes(data)
    with pytest.raises(RecordsError, match="malformed"):
        Records(records.path, read_only=True).all_trials(own)


def test_nothing_rounds_a_sample(records):
    samples = (1 / 3, math.pi * 1e-6, 5e-324)
    own = fill(records, trial(samples=samples))
    assert records.history(add_one().key, own).trials[0].samples == samples
