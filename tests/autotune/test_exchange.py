"""Export, import, merge: all of it or nothing, nothing twice, and beside a running tuner; then whether it still holds."""

from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from tiny import U2, U4, add_one, symbolic, total

from autotune.compiler import Opt, OptOps
from autotune.errors import RecordsError
from autotune.measuring.bench import PROTOCOL
from autotune.measuring.recheck import SLOWER, Checked, Claim, choose, recheck
from autotune.records import Final, Records, Trial, fingerprint_id, foreign
from autotune.records.exchange import export, import_, merge
from autotune.records.schema import STEPS
from autotune.strict import MAX_TEXT

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {"backend": "CPU", "model": "some machine", "compiler": "clang 18", "setting.X": "0"}
ROWS = {"kernels": 2, "fingerprints": 1, "trials": 3, "duels": 1, "finals": 1, "noise": 1}
NOTHING: dict[str, list] = {table: [] for table in ROWS}


@pytest.fixture
def full(tmp_path) -> Records:
    """One row or more in each table."""
    records = Records(tmp_path / "full.db")
    own = records.add_fingerprint(FIELDS)
    for kernel in (add_one(), symbolic()):
        records.add_kernel(kernel)
    key = add_one().key
    records.add_trial(own, Trial(key, (), "ok", (1 / 3, 5e-324), 0.25, "c", kind="unoptimized", input_seed=3), 2)
    records.add_trial(own, Trial(key, (U4, Opt(OptOps.NOLOCALS)), "ok", (1e-6,), seed=7, strategy="ppo"), 1)
    records.add_trial(own, Trial(symbolic().key, (U2,), "crashed", detail='é\n"quoted"\x00'), 1)
    records.add_duel(key, own, [(U4,), ()], [(1.0, 2.0), (3.0,)])
    records.add_final(own, Final(key, (U4,), (1.0,), (2.0,), (2.5,), True, 2))
    records.add_noise(own, [(1e-6, 0.5), (1e-3, 0.125)])
    return records


def content(records: Records) -> dict:
    return {table: list(rows.values()) for table, rows in records.everything().items()}


def test_what_is_exported_comes_back_whole(full, tmp_path):
    assert export(full, tmp_path / "out.jsonl") == ROWS
    with closing(Records(tmp_path / "new.db")) as new:
        taken = import_(new, tmp_path / "out.jsonl")
        assert taken.added == ROWS and taken.known == 0 and content(new) == content(full)
        again = import_(new, tmp_path / "out.jsonl")
        assert again.added.total() == 0 and again.known == 9 and content(new) == content(full)
        assert (
            str(again)
            == "added 0 kernels, 0 fingerprints, 0 trials, 0 duels, 0 finals, 0 noise; 9 rows were there already"
        )
        export(new, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    assert {p.name for p in tmp_path.glob("*jsonl*")} == {"out.jsonl", "again.jsonl"}  # nothing half-written


def test_a_merge_adds_what_is_missing_and_nothing_twice(full, tmp_path):
    with closing(Records(tmp_path / "mine.db")) as mine:
        own = mine.add_fingerprint(FIELDS)
        mine.add_kernel(add_one())
        mine.add_trial(own, Trial(add_one().key, (U2,), "ok", (2e-6,)), 1)
        for added in (ROWS | {"kernels": 1, "fingerprints": 0}, dict.fromkeys(ROWS, 0)):
            assert merge(mine, full.path).added == added
        assert [t.schedule for t in mine.history(add_one().key, own).trials].count((U2,)) == 1
        assert len(mine.all_trials(own)) == 4
        assert merge(full, mine.path).added == {**dict.fromkeys(ROWS, 0), "trials": 1}  # and back
        assert merge(full, full.path).added.total() == 0
    (winner,) = full.winners(own).values()
    assert winner == (U4,)


def test_a_merge_takes_what_an_older_program_left(full, tmp_path):
    path = tmp_path / "old.db"
    with closing(sqlite3.connect(path)) as db:
        db.executescript(STEPS[0])
        fields = json.dumps(FIELDS, sort_keys=True)
        db.execute("INSERT INTO fingerprints VALUES (?, ?)", (fingerprint_id(FIELDS), fields))
        db.execute("INSERT INTO trials VALUES (NULL, ?, ?, 'trial', '[]', 'ok', '[1]', 0, '', '', '', 0, 1, 5.0)",
                   (add_one().key, fingerprint_id(FIELDS)))  # fmt: skip
        db.commit()
    before = path.read_bytes()
    assert merge(full, path).added["trials"] == 1 and merge(full, path).added.total() == 0
    assert full.all_trials(fingerprint_id(FIELDS))[0] == (5.0, Trial(add_one().key, (), "ok", (1.0,)))
    assert path.read_bytes() == before


# **** what is wrong with an export ****


def changed(line: str, **more) -> str:
    return json.dumps({**json.loads(line), **more})


def without(line: str, name: str) -> str:
    return json.dumps({k: v for k, v in json.loads(line).items() if k != name})


# lines of the export: 1 header, 2-3 kernels, 4 fingerprint, 5-7 trials, 8 duel, 9 final, 10 noise
WRONG = {
    "unknown field": (5, lambda x: changed(x, more=1), "line 5: the fields of trials are"),
    "missing field": (5, lambda x: without(x, "detail"), "line 5: the fields of trials are"),
    "unknown table": (6, lambda x: changed(x, table="meta"), "line 6: the table is one of"),
    "no table": (6, lambda x: without(x, "table"), "line 6: the table is one of"),
    "no object": (6, lambda x: "[]", "line 6: the table is one of"),
    "no JSON": (7, lambda x: x[:-1], "line 7: not the JSON of this program"),
    "empty line": (7, lambda x: "", "line 7: not the JSON of this program"),
    "NaN": (5, lambda x: x.replace("5e-324", "NaN"), "line 5: not the JSON of this program: NaN"),
    "a name twice": (5, lambda x: x.replace("{", '{"seed":1,', 1), "line 5: .*a name stands twice"),
    "deep": (5, lambda x: "[" * 100_000, "line 5: not the JSON of this program"),
    "verdict": (5, lambda x: changed(x, verdict="fine"), "line 5: verdict: 'fine' is none of"),
    "other op": (2, lambda x: x.replace('"ADD"', '"CUSTOM"'), "line 2: ast: not a node"),
    "other key": (2, lambda x: changed(x, key="0" * 32), "line 2: key, name or family differ"),
    "other fields": (4, lambda x: changed(x, fields={"model": "y"}), "line 4: the id is not the digest"),
    "kernel from nowhere": (5, lambda x: changed(x, kernel="f" * 32), "line 5 names a kernel that is nowhere: 'f"),
    "device from nowhere": (10, lambda x: changed(x, fingerprint="f"), "line 10 names a fingerprint that is nowhere: 'f'"),
    "long line": (5, lambda x: x + " " * MAX_TEXT, f"line 5: longer than {MAX_TEXT} bytes"),
    "no header": (1, lambda x: "{}", "is no export of tinygrad-autotune"),
    "newer version": (1, lambda x: changed(x, version=2), "has version 2, this program reads 1"),
    "bool version": (1, lambda x: changed(x, version=True), "has version True, this program reads 1"),
    "header with more": (1, lambda x: changed(x, more=1), "line 1: the fields of the header"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_line_is_named_and_nothing_is_taken(full, tmp_path, case):
    number, change, says = WRONG[case]
    path = tmp_path / "out.jsonl"
    export(full, path)
    lines = path.read_text().splitlines()
    lines[number - 1] = change(lines[number - 1])
    path.write_text("\n".join([*lines, ""]))
    with closing(Records(tmp_path / "new.db")) as new:
        with pytest.raises(RecordsError, match=f"out.jsonl.*{says}") as caught:
            import_(new, path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
        assert content(new) == NOTHING


def test_an_export_that_was_cut_is_noticed(full, tmp_path):
    path = tmp_path / "out.jsonl"
    export(full, path)
    lines = path.read_text().splitlines(keepends=True)
    with closing(Records(tmp_path / "new.db")) as new:
        for rest, says in (
            ("".join(lines[:-1]), "has 8 rows, its header says 9"),
            ("", "is empty"),
            ("\x80", "is no export"),
        ):
            path.write_text(rest)
            with pytest.raises(RecordsError, match=says):
                import_(new, path)
        path.write_bytes("".join(lines).encode("utf-16"))
        with pytest.raises(RecordsError, match="line 1: no UTF-8"):
            import_(new, path)
        with pytest.raises(RecordsError, match=r"none\.jsonl: No such file"):
            import_(new, tmp_path / "none.jsonl")
        with pytest.raises(RecordsError, match="Is a directory"):
            import_(new, tmp_path)
        assert content(new) == NOTHING


def test_a_merge_of_a_file_with_a_wrong_row_takes_nothing(full, tmp_path):
    full.db.execute("UPDATE trials SET samples = '[-1]' WHERE id = 2")
    with closing(Records(tmp_path / "new.db")) as new:
        with pytest.raises(RecordsError, match=r"full\.db: trials row 2 is malformed: samples"):
            merge(new, full.path)
        full.db.execute("UPDATE trials SET samples = '[1.0]' WHERE id = 2")
        full.db.execute("DELETE FROM kernels")
        with pytest.raises(RecordsError, match=r"full\.db: trials row 1 names a kernel that is nowhere"):
            merge(new, full.path)
        assert content(new) == NOTHING


def test_an_export_where_nothing_can_be_written(full, tmp_path):
    with pytest.raises(RecordsError, match="No such file or directory; name another"):
        export(full, tmp_path / "no" / "out.jsonl")
    with pytest.raises(RecordsError, match="Is a directory"):
        export(full, tmp_path)


# **** beside a running tuner ****

TUNING = """
import sys
sys.path.insert(0, "tests/autotune")
from tiny import add_one, U4
from autotune.records import Records, Trial
records = Records(sys.argv[1])
own = records.add_fingerprint({"model": "another"})
records.add_kernel(add_one())
print("ready", flush=True)
i = 0
while i < 2000:
    records.add_trial(own, Trial(add_one().key, (U4,), "ok", (i + 1.0,)), 1)
    i += 1
    print(i, flush=True)
"""


def test_merging_and_exporting_while_a_tuner_writes(full, tmp_path):
    path = tmp_path / "busy.db"
    own = fingerprint_id({"model": "another"})
    with subprocess.Popen([sys.executable, "-c", TUNING, path], cwd=ROOT, stdout=subprocess.PIPE, text=True) as tuner:
        assert tuner.stdout is not None and tuner.stdout.readline() == "ready\n"
        with closing(Records(path)) as busy, closing(Records(tmp_path / "copy.db")) as copy:
            assert merge(busy, full.path).added["trials"] == 3
            export(busy, tmp_path / "out.jsonl")
            import_(copy, tmp_path / "out.jsonl")
            seen = len(copy.all_trials(own))
            merge(copy, path)
            later = len(copy.all_trials(own))
            written = tuner.poll() is None
        tuner.kill()
        done = int(tuner.stdout.read().split()[-1])
    assert written and 0 <= seen <= later <= 2000
    with closing(Records(path, read_only=True)) as busy:
        samples = [t.samples[0] for _, t in busy.all_trials(own)]
    assert len(samples) >= done and samples == [i + 1.0 for i in range(len(samples))]  # the tuner lost nothing


# **** records of other devices ****


def test_other_devices_are_told_apart_nearest_first(full):
    key = add_one().key
    far = full.add_fingerprint({**FIELDS, "model": "y", "compiler": "z", "setting.X": "1"})
    near = full.add_fingerprint({**FIELDS, "compiler": "clang 19", "setting.new": "1"})
    for _ in range(2):
        full.add_trial(near, Trial(key, (), "ok", (1.0,)), 1)
    full.add_trial(near, Trial(key, (), "ok", (1.0,), kind="hand_coded"), 1)  # which is no trial
    full.add_trial("nobody", Trial(key, (), "ok", (1.0,)), 1)
    full.add_final(far, Final(key, (U4,), (1.0,), (2.0,), (2.0,), True))
    found = foreign.others(full, FIELDS)
    assert [(f.fingerprint, f.kernels, f.trials, f.winners) for f in found] == [
        (near, 1, 2, 0), (far, 0, 0, 1), ("nobody", 1, 1, 0),
    ]  # fmt: skip
    assert [f.differs for f in found] == [("compiler", "setting.new"), ("model", "compiler", "setting.X"), ()]
    assert foreign.table(found).splitlines()[3].endswith("  compiler, new")
    assert foreign.summary(found) == ("other devices on record: 3, with 3 trials and 1 winners that are not served here; "
                                      "the nearest differs in compiler, new")  # fmt: skip
    assert foreign.others(full, {**FIELDS, "model": "y"})[0].differs == ("model",)
    assert foreign.summary([]) == "all records are of this device"


# **** does it still hold? ****

PAD_UNROLL = (Opt(OptOps.PADTO, 0, 32), Opt(OptOps.UNROLL, 0, 4))  # wrong sums on tinygrad 0.14.0: test_known_bugs.py


@pytest.fixture
def claimed(tmp_path) -> Records:
    """Two winners, one of them a lie, and trials of which one was never as fast."""
    records = Records(tmp_path / "claimed.db")
    own = records.add_fingerprint(FIELDS)
    for kernel in (add_one(), total(930)):
        records.add_kernel(kernel)
    records.add_final(own, Final(add_one().key, (U2,), (1e3,), (2e3,), (2e3,), True, PROTOCOL))
    records.add_final(own, Final(total(930).key, PAD_UNROLL, (1e-3,), (2.0,), (2.0,), True, PROTOCOL))
    records.add_final(
        own, Final(add_one().key, (U4,), (1.0,), (2.0,), (2.0,), True, PROTOCOL - 1)
    )  # too old to be served
    records.add_final(
        own, Final(symbolic().key, (), (1.0,), (2.0,), (2.0,), True, PROTOCOL)
    )  # its kernel is not stored
    records.add_trial(own, Trial(add_one().key, (U4,), "ok", (1e-12,)), 1)
    records.add_trial(own, Trial(add_one().key, (U2,), "ok", (5.0,)), 1)  # the winner's own
    records.add_trial(own, Trial(add_one().key, (U2, U2), "crashed"), 1)
    return records


def test_winners_are_chosen_first_and_each_schedule_once(claimed, monkeypatch: pytest.MonkeyPatch):
    own = fingerprint_id(FIELDS)
    claims = choose(claimed, own, 10, seed=0)
    assert [c.winner for c in claims] == [True, True, False]
    assert {(c.kernel.key, c.schedule, c.seconds) for c in claims} == {
        (add_one().key, (U2,), 1e3), (total(930).key, PAD_UNROLL, 1e-3), (add_one().key, (U4,), 1e-12),
    }  # fmt: skip
    assert {choose(claimed, own, 1, seed)[0].kernel.key for seed in range(20)} == {add_one().key, total(930).key}
    assert choose(claimed, own, None, 0) == claims  # fewer than enough
    monkeypatch.setattr("autotune.measuring.recheck.ENOUGH", 1)
    assert choose(claimed, own, None, 0) == claims[:2]  # all that are served
    assert choose(claimed, own, 10, 0) == claims and choose(claimed, "elsewhere", 10, 0) == []


def test_claims_are_put_to_the_device(claimed, runner):
    before = content(claimed)
    told: list[Checked] = []
    recheck(choose(claimed, fingerprint_id(FIELDS), 9, 0), runner, told.append)
    checked = {(c.claim.kernel.key, c.claim.schedule): c for c in told}
    assert len(checked) == len(told) == 3
    fast, lie, slow = (
        checked[name] for name in ((add_one().key, (U2,)), (total(930).key, PAD_UNROLL), (add_one().key, (U4,)))
    )
    assert fast.holds and not fast.slower and fast.ratio < 1e-3
    assert not lie.holds and lie.now.verdict == "wrong_output" and math.isnan(lie.ratio) and not lie.slower
    assert slow.holds and slow.slower and slow.ratio > 1e3
    assert content(claimed) == before


def test_slower_by_hand():
    claim = Claim(add_one(), (), 1.0, True)
    now = [Checked(claim, Trial("k", (), "ok", (seconds,))) for seconds in (SLOWER * 0.999, SLOWER * 1.001)]
    assert [c.slower for c in now] == [False, True] and all(c.holds for c in now)
