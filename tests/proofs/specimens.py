"""What tests/proofs/malformed.py tries: valid inputs of each kind, and one function a kind that makes the n-th malformed one.

Such a function prepares its input and returns an attempt: a function without arguments that reads the input as this
program would, and checks what it was given if it was not refused.
"""

from __future__ import annotations

import base64
import json
import random
import shutil
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "autotune"))

from mutations import CODE, PICKLES, POOL, RAW, damaged, mutate, mutated, mutated_text, to_text
from tiny import U2, U4, add_one, kernel_of, symbolic, total
from tinygrad import Tensor

from agents import checkpoint
from agents.ppo import PPOConfig
from autotune.compiler import Ops, Opt, OptOps, UOp, uop_identity
from autotune.guide import Guide, find_checkpoint
from autotune.kernel import Kernel, kernel_from_json, kernel_of_nodes, kernel_to_json
from autotune.records import Final, Records, Trial, exchange
from autotune.records.rows import TABLES
from autotune.records.schema import STEPS
from autotune.strict import parse
from sims import EnsembleConfig, TreesConfig

Attempt = Callable[[], object]


class Specimens:
    """Valid inputs, made once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.kernels = [add_one(), symbolic(), total(300), kernel_of(Tensor.empty(8, 16) @ Tensor.empty(16, 4))]
        self.stored = [kernel_to_json(k) for k in self.kernels]
        self.hostile = hostile_kernels(symbolic())
        self.records = folder / "records.db"
        self.own = fill(self.records, self.kernels)
        self.old = folder / "old.db"  # schema 1, as older programs left it
        with closing(sqlite3.connect(self.old)) as db:
            db.executescript(STEPS[0])
        with closing(Records(self.records, read_only=True)) as records:
            exchange.export(records, folder / "export.jsonl")
        self.lines = (folder / "export.jsonl").read_text().splitlines()
        self.guide = small_guide()
        self.guide.save(folder / "guide", {"backend": "CPU", "draft": False})
        self.arrays, self.meta = checkpoint.load(folder / "guide")
        self.checkpoint = (folder / "guide.safetensors").read_bytes()


def fill(path: Path, kernels: list[Kernel]) -> str:
    """A records file as tuning leaves it; returns the device's fingerprint."""
    with closing(Records(path)) as records:
        own = records.add_fingerprint({"backend": "CPU", "model": "some machine", "tinygrad": "0.14.0"})
        records.add_noise(own, [(1e-6, 0.05), (1e-3, 0.02)])
        for i, kernel in enumerate(kernels):
            records.add_kernel(kernel)
            for kind in ("unoptimized", "hand_coded"):
                records.add_trial(own, Trial(kernel.key, (), "ok", (3e-6, 2e-6), kind=kind), 1)
            for n in range(4):
                records.add_trial(own, Trial(kernel.key, (U4,) * n, "ok", (1e-6 * (n + 1),) * 3, 0.1, "abc"), 1)
            records.add_trial(own, Trial(kernel.key, (Opt(OptOps.TC, 0, (-1, 2, 1)),), "timeout", detail="é"), 1)
            records.add_duel(kernel.key, own, [(U2,), ()], [(1e-6, 2e-6), (2e-6,)])
            records.add_final(own, Final(kernel.key, (U2,), (1e-6,), (2e-6,), (2e-6,), bool(i % 2), 2))
    return own


def small_guide() -> Guide:
    """An agent and a simulator of a few thousand numbers, as they would be after training."""
    ppo, sim = PPOConfig(hidden=4, n_envs=2), EnsembleConfig(members=2, hidden=4, layers=1)
    trees = TreesConfig(members=2, depth=2)
    guide = Guide(8, 6, ppo, sim, trees, 0)
    rng = np.random.default_rng(0)
    shapes = {"nets.p0": (2, 16, 4), "nets.p1": (2, 1, 4), "nets.p2": (2, 4, 1), "nets.p3": (2, 1, 1), "nets.mean": (6,),
              "nets.inverse": (6,), "nets.spread": (2,), "trees.feature": (2, 3, 3), "trees.threshold": (2, 3, 3),
              "trees.value": (2, 3, 4), "trees.spread": (2,), "spread": (2,)}  # fmt: skip
    guide.simulator.load_state({name: rng.random(shape) for name, shape in shapes.items()})
    return guide


def hostile_kernels(kernel: Kernel) -> list[dict[str, Any]]:
    """Kernels with C code where an op or a name should stand, and the very key that such a kernel would have."""
    rows = kernel_to_json(kernel)["nodes"]
    made = []
    for code in CODE[:-2]:
        made.append(
            _rebuilt(
                kernel, rows, lambda u, c=code: replace(u.arg, name=c) if u.op is Ops.PARAM and u.arg.name else u.arg
            )
        )
    for op in (Ops.CUSTOM, Ops.CUSTOMI):
        made += [
            _rebuilt(kernel, rows, lambda u, c=code: c if u.op in (Ops.CUSTOM, Ops.CUSTOMI) else u.arg, op)
            for code in CODE[:3]
        ]
    return made


def _rebuilt(kernel: Kernel, rows: list[Any], arg_of: Callable[[UOp], Any], op: Ops = Ops.ADD) -> dict[str, Any]:
    nodes: list[UOp] = []
    stored = json.loads(json.dumps(rows))
    for old, row in zip(kernel.ast.toposort(), stored, strict=True):
        sources = tuple(nodes[i] for i in row[2])
        new = UOp(op if old.op is Ops.ADD else old.op, old.dtype, sources, old.arg)
        nodes.append(new.replace(arg=arg_of(new)))
        row[0] = new.op.name
        if new.op is Ops.PARAM:
            row[3][4] = nodes[-1].arg.name
        elif new.op in (Ops.CUSTOM, Ops.CUSTOMI):
            row[3] = nodes[-1].arg
    return {**kernel_to_json(kernel), "key": uop_identity(nodes[-1])[:32], "nodes": stored}


# **** kernels ****


def use_kernel(kernel: Kernel) -> None:
    """What the tuner asks of any kernel, short of compiling it; and it must come back from its own text."""
    assert kernel_from_json(parse(json.dumps(kernel_to_json(kernel)))).key == kernel.key
    _ = kernel.signature, kernel.variables, kernel.work, kernel.iterations, kernel.weights


def kernel_text(s: Specimens, rng: random.Random, index: int, folder: Path) -> Attempt:
    """The JSON of a kernel."""
    texts = [*RAW.values(), *map(json.dumps, s.hostile), *(base64.b64encode(p).decode() for p in PICKLES)]
    good = rng.choice(s.stored)
    text = texts[index] if index < len(texts) else to_text(mutated(good, rng))
    if index % 8 == 7:
        text = damaged(json.dumps(good).encode(), rng).decode(errors="replace")
    return lambda: use_kernel(kernel_from_json(parse(text)))


def kernel_with_its_key(s: Specimens, rng: random.Random, index: int, folder: Path) -> Attempt:
    """Whoever writes a file can also compute the key of what is in it."""
    nodes = mutated(rng.choice(s.stored)["nodes"], rng)

    def attempt() -> None:
        key = kernel_of_nodes(nodes).key
        use_kernel(kernel_from_json({**s.stored[0], "name": "", "nodes": nodes, "key": key}))

    return attempt


# **** records ****


def read_all(path: Path, folder: Path, write: bool) -> None:
    """Everything that any command does with a records file that it was given."""
    with closing(Records(path, read_only=True)) as records:
        for own in records.fingerprints():
            records.all_trials(own), records.all_duels(own), records.noise(own)
            for key in records.winners(own):
                records.history(key, own), records.final(key, own), records.duel(key, own, [(U2,), ()])
        records.counts()
        exchange.export(records, folder / "again.jsonl")
    with closing(Records(folder / "target.db")) as target:
        exchange.merge(target, path)
        assert exchange.import_(target, folder / "again.jsonl").added.total() == 0
    if write:
        with closing(Records(path)) as records:
            records.add_kernel(add_one())
            records.add_trial("own", Trial(add_one().key, (U2,), "ok", (1e-6,)), 1)


def records_bytes(s: Specimens, rng: random.Random, index: int, folder: Path) -> Attempt:
    """The bytes of a records file."""
    path, good = _fresh(folder), rng.choice([s.records, s.records, s.old]).read_bytes()
    path.write_bytes(PICKLES[index] if index < len(PICKLES) else damaged(good, rng))
    return lambda: read_all(path, folder, write=index % 4 == 0)


def _fresh(folder: Path) -> Path:
    for old in folder.glob("input.db*"):
        old.unlink()
    return folder / "input.db"


ATTACKS = [
    "CREATE VIEW secrets AS SELECT * FROM trials",
    "ALTER TABLE trials RENAME TO hidden; CREATE VIEW trials AS SELECT * FROM hidden",
    "ALTER TABLE trials RENAME TO hidden; CREATE VIEW trials AS WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"
    " SELECT x id, 'k' kernel, 'f' fingerprint FROM c",
    "CREATE TRIGGER t AFTER INSERT ON trials BEGIN UPDATE finals SET accepted = 1; END",
    "CREATE TRIGGER t INSTEAD OF INSERT ON trials BEGIN SELECT 1; END",
    "CREATE TRIGGER t AFTER INSERT ON kernels BEGIN DELETE FROM trials; END",
    "CREATE TABLE extra (x TEXT)", "CREATE VIRTUAL TABLE extra USING fts5(x)", "CREATE INDEX extra ON trials (length(detail))",
    "DROP INDEX trials_by_kernel; CREATE INDEX trials_by_kernel ON trials (kernel, length(samples))",
    "ALTER TABLE trials ADD COLUMN evil TEXT DEFAULT 'x'", "ALTER TABLE finals ADD COLUMN evil TEXT AS (upper(kernel)) VIRTUAL",
    "ALTER TABLE trials DROP COLUMN input_seed", "DROP TABLE noise", "DROP TABLE meta", "DELETE FROM meta",
    "INSERT INTO meta VALUES (2)", "INSERT INTO meta VALUES (1)", "UPDATE meta SET schema = 'two'", "UPDATE meta SET schema = 1",
    "UPDATE meta SET schema = x'80'", "UPDATE meta SET schema = -1", "UPDATE meta SET schema = 9223372036854775807",
    "UPDATE trials SET detail = zeroblob(40000000) WHERE id = 1", "UPDATE trials SET samples = CAST(zeroblob(20000000) AS TEXT) WHERE id = 2",
    "UPDATE kernels SET ast = printf('%.*c', 9000000, '[') WHERE rowid = 1", "UPDATE trials SET detail = CAST(x'ff00fe' AS TEXT)",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM sqlite_master WHERE name = 'kernels')"
    " WHERE name = 'trials'",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET rootpage = 0 WHERE name = 'trials'",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET rootpage = 999999 WHERE name = 'finals'",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = 'CREATE TABLE trials (id)' WHERE name = 'trials'",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = 'not SQL' WHERE name = 'trials'",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = CAST(x'ff' AS TEXT) WHERE name = 'trials'",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET type = 'view', sql = 'CREATE VIEW trials AS SELECT 1' WHERE name = 'trials'",
    "PRAGMA writable_schema = ON; INSERT INTO sqlite_master VALUES ('table', 'x', 'x', 2, 'CREATE TABLE x (y)')",
    "PRAGMA application_id = 7; PRAGMA user_version = 9", "PRAGMA encoding = 'UTF-16'", "VACUUM",
]  # fmt: skip


def records_rows(s: Specimens, rng: random.Random, index: int, folder: Path) -> Attempt:
    """SQL: hostile statements first, then one to three values that no tuner would store."""
    path = _fresh(folder)
    shutil.copy(s.records, path)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = OFF")
        if index < len(ATTACKS):
            _attack(db, ATTACKS[index])
        else:
            for _ in range(rng.choice((1, 1, 2, 3))):
                _spoil(db, rng)
    return lambda: read_all(path, folder, write=index % 4 == 0)


def _attack(db: sqlite3.Connection, statements: str) -> None:
    try:
        db.executescript(statements)
    except sqlite3.Error:  # this SQLite refuses even to make it
        db.execute("DELETE FROM meta")


def _spoil(db: sqlite3.Connection, rng: random.Random) -> None:
    table = rng.choice(list(TABLES))
    column = rng.choice(TABLES[table])
    number, value = rng.choice(db.execute(f"SELECT rowid, {column.name} FROM {table}").fetchall())
    if column.dump is not None and rng.random() < 0.7:
        value = mutated_text(value, rng) if isinstance(value, str) else "["
    else:
        value = rng.choice([mutate(value, rng), *_sql_values(rng)])
    try:
        db.execute(f"UPDATE {table} SET {column.name} = ? WHERE rowid = ?", (value, number))
    except (sqlite3.Error, OverflowError, UnicodeEncodeError):  # SQLite itself refuses it
        db.execute(f"UPDATE {table} SET {column.name} = ? WHERE rowid = ?", (f"\n{number}", number))


def _sql_values(rng: random.Random) -> list[Any]:
    plain = [v for v in POOL if isinstance(v, int | float | str)]
    return [*rng.sample(plain, 4), rng.randbytes(9), float("inf"), rng.choice(PICKLES), json.dumps(rng.choice(POOL))]


def export_lines(s: Specimens, rng: random.Random, index: int, folder: Path) -> Attempt:
    """An export."""
    path, lines = folder / "input.jsonl", list(s.lines)
    raw = [*RAW.values(), *CODE, "", "{}", "[]", "null"]
    if index < len(raw):
        lines[index % len(lines)] = raw[index]
    else:
        for _ in range(rng.choice((1, 1, 2))):
            _spoil_line(lines, rng)
    data = "\n".join([*lines, ""]).encode(errors="replace")
    path.write_bytes(damaged(data, rng) if index % 5 == 4 else data)

    def attempt() -> None:
        with closing(Records(folder / "target.db")) as target:
            exchange.import_(target, path)
            assert exchange.import_(target, path).added.total() == 0

    return attempt


def _spoil_line(lines: list[str], rng: random.Random) -> None:
    at, way = rng.randrange(len(lines)), rng.random()
    if way < 0.7:
        lines[at] = mutated_text(lines[at], rng)
    elif way < 0.8:
        del lines[at]
    elif way < 0.9:
        lines.insert(at, rng.choice(lines))
    else:
        lines[at], lines[at - 1] = lines[at - 1], lines[at]


# **** checkpoints ****


def checkpoint_bytes(s: Specimens, rng: random.Random, index: int, folder: Path) -> Attempt:
    """The bytes of a safetensors file, and the length of its header."""
    huge = [n.to_bytes(8, "little") + s.checkpoint[8:] for n in (0, 1, 2**31, 2**40, 2**63, 2**64 - 1)]
    fixed = [*PICKLES, *huge, b"", b"PK\x03\x04" + bytes(100), b"\x1f\x8b" + bytes(100)]
    data = fixed[index] if index < len(fixed) else damaged(s.checkpoint, rng)
    path = folder / "input.safetensors"
    path.write_bytes(data)
    return lambda: use_checkpoint(path)


def use_checkpoint(path: Path) -> None:
    arrays, _ = checkpoint.load(path)
    assert checkpoint.load(path)[0].keys() == arrays.keys()


def checkpoint_header(s: Specimens, rng: random.Random, index: int, folder: Path) -> Attempt:
    """A header that says something else of the same bytes."""
    length = int.from_bytes(s.checkpoint[:8], "little")
    header = to_text(mutated(json.loads(s.checkpoint[8 : 8 + length]), rng)).encode(errors="replace")
    path = folder / "input.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + s.checkpoint[8 + length :])
    return lambda: use_checkpoint(path)


def signed_guide(s: Specimens, rng: random.Random, index: int, folder: Path) -> Attempt:
    """A checkpoint with other arrays or meta data, and the right checksum."""
    arrays, meta = dict(s.arrays), s.meta
    if rng.random() < 0.4:
        name = rng.choice(sorted(arrays))
        arrays[name] = rng.choice([arrays[name] * np.nan, arrays[name][:-1], arrays[name].astype(np.int32), arrays[name].ravel(),
                                   np.zeros((0, 10**6), np.float32), arrays[name].astype(np.float64) * 1e300, arrays[name] > 0])  # fmt: skip
        if rng.random() < 0.3:
            del arrays[name]
    else:
        meta = mutated(meta, rng)
    path = write_signed(folder / "input.safetensors", arrays, to_text(meta))
    return lambda: Guide.load(path)


def write_signed(path: Path, arrays: dict[str, np.ndarray], text: str) -> Path:
    """safetensors by hand: json.dumps would refuse or tame what `text` holds."""
    names, at = {"F": "F", "f": "F", "i": "I", "b": "BOOL"}, 0
    text = text.encode(errors="replace").decode()
    header: dict[str, Any] = {"__metadata__": {"meta": text, "sha256": checkpoint.digest(arrays, text)}}
    for name, array in arrays.items():
        kind = names[array.dtype.kind] + ("" if array.dtype.kind == "b" else str(8 * array.dtype.itemsize))
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    packed = json.dumps(header).encode()
    path.write_bytes(len(packed).to_bytes(8, "little") + packed + b"".join(a.tobytes() for a in arrays.values()))
    return path


def guide_json(s: Specimens, rng: random.Random, index: int, folder: Path) -> Attempt:
    """The JSON beside a checkpoint, which is looked at to find the newest."""
    path = folder / "runs" / "1" / "best.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    good = json.dumps(s.meta)
    text = list(RAW.values())[index] if index < len(RAW) else to_text(mutated({"backend": "CPU", "draft": False}, rng))
    path.write_bytes(damaged(good.encode(), rng) if index % 3 == 2 else text.encode(errors="replace"))
    return lambda: find_checkpoint(None, "CPU", folder / "runs")


KINDS: dict[str, Callable[[Specimens, random.Random, int, Path], Attempt]] = {
    "kernel JSON": kernel_text, "kernel with its key": kernel_with_its_key, "records file": records_bytes,
    "rows of a file": records_rows, "export": export_lines, "checkpoint": checkpoint_bytes,
    "checkpoint header": checkpoint_header, "signed guide": signed_guide, "guide JSON": guide_json,
}  # fmt: skip
