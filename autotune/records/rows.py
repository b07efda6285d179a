"""What may stand in the tables of records: each column with its check, for the SQLite file and for an export alike.

A row has three forms. Stored: SQL values, lists and objects as JSON text. Data: a JSON object, as in an export. Row: a
dict of checked Python values (a Kernel, a Schedule, samples as a tuple). Files may come from strangers: whatever is not
exactly what this program writes is a CodecError.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.errors import CodecError
from autotune.kernel import kernel_from_json, kernel_to_json, schedule_from_json, schedule_to_json
from autotune.strict import MAX_INT, parse, shown

Row = dict[str, Any]
VERDICTS = ("ok", "illegal", "compile_failed", "too_big", "wrong_output", "timeout", "crashed")
KINDS = ("trial", "unoptimized", "hand_coded", "answer", "recheck")
MAX_SAMPLES = 10_000  # of one trial; a measurement takes tens
MAX_RIVALS = 16  # of one interleaved comparison
MAX_DETAIL = 1000  # characters of a trial's detail
MAX_FIELDS = 100  # of a fingerprint
MAX_CURVE = 1000  # points of a noise curve
MAX_SECONDS = 1e9  # of anything that was timed
MAX_STAMP = 4_102_444_800.0  # the year 2100: a row from the future would stay the latest for ever


def fingerprint_id(fields: dict[str, str]) -> str:
    """By which a device is known: 16 hexadecimal digits, the same for the same fields in any order."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


# **** the values of a column: each of these checks a JSON value and returns it as Python holds it ****

Load = Callable[[Any], Any]


def _text(limit: int, printable: bool = True) -> Load:
    def load(value: Any) -> str:
        if not isinstance(value, str) or len(value) > limit or (printable and not value.isprintable()):
            raise CodecError(f"{shown(value)} is no {'printable ' * printable}text of at most {limit} characters")
        if value != clean(value):
            raise CodecError("half a character")
        return value

    return load


def clean(text: str) -> str:
    """A text that can be stored: lone surrogates, which have no UTF-8, become question marks."""
    return text.encode(errors="replace").decode()


def _one_of(names: Sequence[str]) -> Load:
    def load(value: Any) -> str:
        if value not in names:
            raise CodecError(f"{shown(value)} is none of {', '.join(names)}")
        return value

    return load


def _whole(low: int) -> Load:
    def load(value: Any) -> int:
        if type(value) is not int or not low <= value < MAX_INT:
            raise CodecError(f"{shown(value)} is no whole number from {low} to 2^63")
        return value

    return load


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(limit: float) -> Load:
    def load(value: Any) -> float:
        if not _is_number(value) or not 0 <= value < limit:
            raise CodecError(f"{shown(value)} is no number from 0 to {limit:g}")
        return float(value)

    return load


def _flag(value: Any) -> bool:
    if not isinstance(value, int) or value not in (0, 1):
        raise CodecError(f"{shown(value)} is neither 0 nor 1")
    return bool(value)


def _list(limit: int, load: Load) -> Load:
    def load_all(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > limit:
            raise CodecError(f"{shown(value)} is no list of at most {limit}")
        return tuple(load(item) for item in value)

    return load_all


def _sample(value: Any) -> float:
    if not _is_number(value) or not 0 < value < MAX_SECONDS:
        raise CodecError(f"{shown(value)} is no sample in seconds: they are above 0")
    return float(value)


def _some_samples(value: Any) -> tuple[float, ...]:
    if value == []:
        raise CodecError("there are no samples")
    return _samples(value)


def _point(value: Any) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise CodecError(f"{shown(value)} is no (seconds, floor)")
    return _sample(value[0]), _number(math.inf)(value[1])


def _curve(value: Any) -> tuple[tuple[float, float], ...]:
    points = _list(MAX_CURVE, _point)(value)
    if not points or [p[0] for p in points] != sorted({p[0] for p in points}):
        raise CodecError("a noise curve has one point or more, with growing seconds")
    return points


def _fields(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not 0 < len(value) <= MAX_FIELDS:
        raise CodecError(f"{shown(value)} is no object of 1 to {MAX_FIELDS} fields")
    return {_text(64)(name): _text(2000, printable=False)(text) for name, text in value.items()}


def _schedules_to_json(schedules: Sequence[Any]) -> list[Any]:
    return [schedule_to_json(s) for s in schedules]


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, list | tuple) else value


_samples = _list(MAX_SAMPLES, _sample)

# **** the tables ****


@dataclass(frozen=True)
class Column:
    name: str
    load: Load  # JSON value -> value. Raises CodecError
    dump: Callable[[Any], Any] | None = None  # value -> JSON value; only of columns that hold JSON text
    since: int = 1  # schema
    default: float | int = 0  # in a file of an older schema


_DEVICE = Column("fingerprint", _text(64))
_OWNER = (Column("kernel", _text(64)), _DEVICE)
_SCHEDULE = Column("schedule", schedule_from_json, schedule_to_json)
_CREATED = Column("created", _number(MAX_STAMP))
TABLES: dict[str, tuple[Column, ...]] = {
    "kernels": (Column("key", _text(64)), Column("name", _text(200)), Column("family", _text(200)),
                Column("ast", kernel_from_json, kernel_to_json)),
    "fingerprints": (Column("id", _text(64)), Column("fields", _fields, dict)),
    "trials": (*_OWNER, Column("kind", _one_of(KINDS)), _SCHEDULE, Column("verdict", _one_of(VERDICTS)),
               Column("samples", _samples, _as_lists), Column("compile_seconds", _number(MAX_SECONDS)),
               Column("code_hash", _text(64)), Column("detail", _text(MAX_DETAIL, printable=False)),
               Column("strategy", _text(64)), Column("seed", _whole(0)), Column("protocol", _whole(1)), _CREATED,
               Column("verify_seconds", _number(MAX_SECONDS), since=2, default=0.0),
               Column("timing_seconds", _number(MAX_SECONDS), since=2, default=0.0),
               Column("input_seed", _whole(0), since=2)),
    "duels": (*_OWNER, Column("schedules", _list(MAX_RIVALS, schedule_from_json), _schedules_to_json),
              Column("samples", _list(MAX_RIVALS, _some_samples), _as_lists), _CREATED),
    "finals": (*_OWNER, _SCHEDULE, Column("tuned", _some_samples, _as_lists),
               Column("hand_coded", _some_samples, _as_lists), Column("control", _some_samples, _as_lists),
               Column("accepted", _flag), _CREATED, Column("protocol", _whole(1), since=2, default=1)),
    "noise": (Column("fingerprint", _text(64), since=2), Column("curve", _curve, _as_lists, since=2),
              Column("created", _number(MAX_STAMP), since=2)),
}  # fmt: skip


def _check_whole(table: str, row: Row) -> None:
    """What the columns of a row must be to each other. Raises CodecError."""
    if table == "kernels" and (row["key"], row["name"], row["family"]) != (
        row["ast"].key, row["ast"].name, row["ast"].family,
    ):  # fmt: skip
        raise CodecError("key, name or family differ from those of its AST")
    if table == "fingerprints" and row["id"] != fingerprint_id(row["fields"]):
        raise CodecError("the id is not the digest of the fields")
    if table == "trials" and bool(row["samples"]) != (row["verdict"] == "ok"):
        raise CodecError(f"{len(row['samples'])} samples with the verdict {row['verdict']}")
    if table == "duels" and (not row["schedules"] or len(row["samples"]) != len(row["schedules"])):
        raise CodecError("not one list of samples for each schedule")


# **** from one form to another ****


def from_data(table: str, data: Any) -> Row:
    """A checked row of a JSON object. Raises CodecError saying which column is wrong, and why."""
    columns = TABLES[table]
    if not isinstance(data, dict) or set(data) != {c.name for c in columns}:
        raise CodecError(f"the fields of {table} are {', '.join(c.name for c in columns)}")
    row = {c.name: _loaded(c, data[c.name]) for c in columns}
    _check_whole(table, row)
    return row


def _loaded(column: Column, value: Any) -> Any:
    try:
        return column.load(value)
    except CodecError as error:
        raise CodecError(f"{column.name}: {error}") from None


def to_data(table: str, row: Row) -> dict[str, Any]:
    """The JSON object of a row."""
    return {c.name: row[c.name] if c.dump is None else c.dump(row[c.name]) for c in TABLES[table]}


def from_stored(table: str, values: Sequence[Any]) -> Row:
    """A checked row of SQL values in the order of the table's columns. Raises CodecError."""
    stored = zip(TABLES[table], values, strict=True)
    return from_data(table, {c.name: value if c.dump is None else _parsed(c, value) for c, value in stored})


def _parsed(column: Column, value: Any) -> Any:
    if not isinstance(value, str):
        raise CodecError(f"{column.name}: {shown(value)} is no JSON text")
    try:
        return parse(value)
    except CodecError as error:
        raise CodecError(f"{column.name}: {error}") from None


def to_stored(table: str, row: Row) -> tuple[Any, ...]:
    """The SQL values of a row. Equal rows give equal values, whatever file they came from."""
    data = to_data(table, row)
    return tuple(data[c.name] if c.dump is None else json.dumps(data[c.name], sort_keys=True) for c in TABLES[table])
