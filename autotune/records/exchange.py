"""Records in and out: an export is JSON lines (a header, then one row a line), a merge takes rows from another SQLite file.

Both take all rows or none, add nothing twice, and may run beside a tuner. All that is wrong is found before the first
row is written.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.checkpoint import replacing
from autotune.errors import CodecError, RecordsError
from autotune.records.rows import TABLES, Row, from_data, to_data
from autotune.records.store import Records
from autotune.strict import MAX_TEXT, parse, shown

FORMAT, VERSION = "tinygrad-autotune records", 1
SQLITE = b"SQLite format 3\0"  # how such a file begins
Placed = tuple[str, str, Row]  # (where it was read, table, row)


@dataclass(frozen=True)
class Taken:
    """What became of the rows of another file."""

    added: Counter[str]  # by table
    known: int  # rows that were there already

    def __str__(self) -> str:
        return f"added {describe(self.added)}; {self.known} rows were there already"


def describe(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[table]} {table}" for table in TABLES)


def export(records: Records, path: Path) -> Counter[str]:
    """Write everything to `path`, finished or not at all (but into a pipe or a device); returns how many rows by table. Raises
    RecordsError where a records file, this one or another, would be lost."""
    tables = records.everything()
    with _typed_errors(path):
        _keep_records(path)
        if path.exists() and not path.is_file():
            _write(path, tables)
        else:
            with replacing(Path(os.path.realpath(path))) as draft:  # a link goes on to be one
                _write(draft, tables)
    return Counter({table: len(rows) for table, rows in tables.items()})


def _keep_records(path: Path) -> None:
    if not path.is_file():
        return
    with open(path, "rb") as file:
        if file.read(len(SQLITE)) == SQLITE:
            raise RecordsError(f"{path} is a records file, which the export would replace; name another file")


def _write(path: Path, tables: Mapping[str, Mapping[Any, Row]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        header = {"format": FORMAT, "version": VERSION, "rows": sum(map(len, tables.values()))}
        file.write(json.dumps(header) + "\n")
        for table, rows in tables.items():
            for row in rows.values():
                file.write(json.dumps({"table": table, **to_data(table, row)}, separators=(",", ":")) + "\n")


def import_(records: Records, path: Path) -> Taken:
    """Take over an export. Raises RecordsError naming the line that is wrong; nothing was added then."""
    with _typed_errors(path):
        lines = list(_lines(path))
    if not lines:
        raise RecordsError(f"{path} is empty; an export begins with a header")
    expected = _rows_of_header(path, lines[0])
    rows = [_row_of_line(path, number, line) for number, line in enumerate(lines[1:], 2)]
    if len(rows) != expected:
        raise RecordsError(f"{path} has {len(rows)} rows, its header says {expected}: it was cut; export it again")
    return _take(records, path, rows)


def merge(records: Records, path: Path) -> Taken:
    """Take over another records file. Raises RecordsError naming the row that is wrong; nothing was added then."""
    with contextlib.closing(Records(path, read_only=True)) as other:
        tables = other.everything()
    rows = [(f"{table} row {number}", table, row) for table, found in tables.items() for number, row in found.items()]
    return _take(records, path, rows)


def _take(records: Records, path: Path, rows: Sequence[Placed]) -> Taken:
    _check_references(records, path, rows)
    added = records.add_missing([(table, row) for _, table, row in rows])
    return Taken(added, len(rows) - added.total())


def _check_references(records: Records, path: Path, rows: Sequence[Placed]) -> None:
    """Every kernel and fingerprint that a row names must be among the rows, or known already."""
    known = {
        "kernel": {row["key"] for _, table, row in rows if table == "kernels"} | {k.key for k in records.kernels()},
        "fingerprint": {row["id"] for _, table, row in rows if table == "fingerprints"} | set(records.fingerprints()),
    }
    for place, _, row in rows:
        for name, values in known.items():
            if name in row and row[name] not in values:
                raise RecordsError(
                    f"{path}: {place} names a {name} that is nowhere: {shown(row[name])}; export it anew"
                )


def _lines(path: Path) -> Iterator[str]:
    """Each line without its end. Raises RecordsError for one that is too long, or no UTF-8."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_TEXT + 1):
            number += 1
            if len(line) > MAX_TEXT:
                raise RecordsError(f"{path}, line {number}: longer than {MAX_TEXT} bytes")
            try:
                yield line.decode().rstrip("\n")
            except UnicodeDecodeError:
                raise RecordsError(f"{path}, line {number}: no UTF-8 text; is this an export?") from None


def _rows_of_header(path: Path, line: str) -> int:
    try:
        header = parse(line)
    except CodecError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise RecordsError(f"{path} is no export of tinygrad-autotune; make one with `python -m autotune export OUT`")
    if type(header.get("version")) is not int or header["version"] != VERSION:
        raise RecordsError(
            f"{path} has version {shown(header.get('version'))}, this program reads {VERSION}; upgrade it"
        )
    if set(header) != {"format", "version", "rows"} or type(header["rows"]) is not int:
        raise RecordsError(f"{path}, line 1: the fields of the header are format, version, rows")
    return int(header["rows"])


def _row_of_line(path: Path, number: int, line: str) -> Placed:
    place = f"line {number}"
    try:
        data: Any = parse(line)
        table = data.pop("table", None) if isinstance(data, dict) else None
        if not isinstance(table, str) or table not in TABLES:
            raise CodecError(f"the table is one of {', '.join(TABLES)}")
        return place, table, from_data(table, data)
    except CodecError as error:
        raise RecordsError(f"{path}, {place}: {error}") from None


@contextlib.contextmanager
def _typed_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecordsError(f"{path}: {error.strerror or error}; name another file") from None
