"""`merge`, `export`, `import`, `verify`, and what `report` says of other devices."""

from __future__ import annotations

import json
import os
import threading
from contextlib import closing
from pathlib import Path

import pytest
from shell import autotune, fails, folder
from test_exchange import PAD_UNROLL
from tiny import U2, U4, add_one, total

from autotune import cli
from autotune.compiler import default_device, fingerprint
from autotune.errors import DeviceError
from autotune.measuring.bench import PROTOCOL
from autotune.measuring.runner import UNPREPARED, Refuted, Runner
from autotune.records import Final, Records, Trial, fingerprint_id

__all__ = ["folder"]  # the fixture


def fill(path: Path, device: str) -> Path:
    """A file with a winner and a trial for this device, and a trial of a machine that is not this one."""
    with closing(Records(path)) as records:
        own = records.add_fingerprint(fingerprint(device))
        other = records.add_fingerprint({**fingerprint(device), "model": "another", "setting.NOOPT": "7"})
        records.add_kernel(add_one())
        records.add_trial(own, Trial(add_one().key, (), "ok", (1e3,), kind="hand_coded"), 1)
        records.add_trial(other, Trial(add_one().key, (), "ok", (1e-3,)), 1)
        records.add_final(own, Final(add_one().key, (U2,), (1e3,), (2e3,), (2e3,), True, 9))
    return path


@pytest.fixture
def filled(tmp_path):
    return fill(tmp_path / "filled.db", default_device())


def main(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


def test_out_and_in_again(filled, tmp_path, capsys):
    out, new = tmp_path / "out.jsonl", tmp_path / "new.db"
    assert main("export", "--records", filled, out) == 0
    assert capsys.readouterr().out == f"{out}: wrote 1 kernels, 2 fingerprints, 2 trials, 0 duels, 1 finals, 0 noise\n"
    foreign = ("other devices on record: 1, with 1 trials and 0 winners that are not served here; "
               "the nearest differs in model, NOOPT\n")  # fmt: skip
    counts = "added 1 kernels, 2 fingerprints, 2 trials, 0 duels, 1 finals, 0 noise; 0 rows were there already\n"
    assert main("import", "--records", new, out) == 0
    assert capsys.readouterr().out == f"{out}: {counts}{foreign}"
    assert main("merge", "--records", new, filled, filled) == 0
    none = (
        counts.replace("added 1", "added 0")
        .replace("2 f", "0 f")
        .replace("2 t", "0 t")
        .replace("1 f", "0 f")
        .replace("; 0", "; 6")
    )
    assert capsys.readouterr().out == f"{filled}: {none}{foreign}" * 2


def test_report_shows_other_devices_and_serves_none_of_them(filled, tmp_path, capsys):
    assert main("report", "--records", filled, "--json", tmp_path / "r.json") == 0
    printed = capsys.readouterr().out
    assert "on record for other devices, and not served here:" in printed and "model, NOOPT" in printed
    result = json.loads((tmp_path / "r.json").read_text())
    (other,) = result["foreign"]
    assert (other["kernels"], other["trials"], other["winners"], other["differs"]) == (
        1,
        1,
        0,
        ["model", "setting.NOOPT"],
    )
    assert [k["schedule"] for k in result["kernels"]] == [[["UPCAST", 0, 2]]]


def test_report_shows_what_is_served_without_a_trial(filled, tmp_path, capsys):
    """A file that was imported may hold verdicts alone."""
    with closing(Records(filled)) as records:
        records.db.execute("DELETE FROM trials")
    assert main("report", "--records", filled, "--json", tmp_path / "r.json") == 0
    (kernel,) = json.loads((tmp_path / "r.json").read_text())["kernels"]
    assert (kernel["schedule"], kernel["ratio"]) == ([["UPCAST", 0, 2]], 0.5)
    assert "holds nothing" not in capsys.readouterr().out


def test_verify_tells_what_holds(folder, tmp_path):
    """Once with a winner that is right, and once with a lie beside it."""
    filled = fill(tmp_path / "filled.db", "CPU")
    status, printed, err = autotune(folder, "verify", "--records", filled)
    assert status == 0, err
    first, second, last = printed.splitlines()
    assert first.startswith("winner e 300") and " ok " in first and second.startswith("trial  e 300")
    assert (
        last == "2 checked, of them winners: 1; no longer right: 0; right, but slower than recorded by more than 10%: 0"
    )
    with closing(Records(filled)) as records:
        records.add_kernel(total(930))
        own = records.rows("trials")[1]["fingerprint"]
        records.add_trial(own, Trial(total(930).key, PAD_UNROLL, "ok", (1e-9,)), PROTOCOL)
        records.add_final(own, Final(total(930).key, PAD_UNROLL, (1e-9,), (1.0,), (1.0,), True, PROTOCOL))
    status, printed, err = autotune(folder, "verify", "-n", "2", "--records", filled)
    assert status == 1, err
    assert "wrong_output" in printed and "1 of 1 elements differ" in printed
    assert printed.splitlines()[-1].startswith("2 checked, of them winners: 2; no longer right: 1;")
    status, printed, err = autotune(folder, "verify", "--records", filled)
    assert status == 0 and "2 checked, of them winners: 1; no longer right: 0;" in printed, err  # it is served no more


@pytest.mark.parametrize(("ratio", "told"), [(0.8, "stays"), (1.2, "and is served no more")])
def test_verify_holds_a_winner_that_has_become_slower_against_hand_coded(filled, capsys, monkeypatch, ratio, told):
    """Recorded at 1000 s; now at 3000, and hand-coded at as much or more. What is no winner is held against nothing."""
    monkeypatch.setattr(Runner, "measure", lambda self, kernel, schedules, cutoff, done: [
        done(Trial(kernel.key, s, "ok", (3e3,), input_seed=1)) for s in schedules])  # fmt: skip
    asked = []

    def duel(self, kernel, schedules, fresh=True):
        asked.append((tuple(schedules), fresh))
        return [(3e3,), (3e3 / ratio,), (3e3 / ratio,)]

    monkeypatch.setattr(Runner, "duel", duel)
    assert main("verify", "--records", filled) == 0
    assert f"{add_one().name}: {ratio:.2f} of hand-coded's time now, {told}" in capsys.readouterr().out
    assert asked == [(((U2,), (), ()), True)]
    with closing(Records(filled)) as records:
        own = fingerprint_id(fingerprint(default_device()))
        assert bool(records.served(own, PROTOCOL)) == (ratio < 1)


@pytest.mark.parametrize(("failing", "status"), [((U2,), 1), ((), 0)])
def test_verify_names_a_winner_that_its_own_comparison_refutes(filled, capsys, monkeypatch, failing, status):
    """It was right, and slower; then wrong on the inputs of the comparison. Where hand-coded was, nothing is known of the winner."""
    monkeypatch.setattr(Runner, "measure", lambda self, kernel, schedules, cutoff, done: [
        done(Trial(kernel.key, s, "ok", (3e3,), input_seed=1)) for s in schedules])  # fmt: skip

    def duel(self, kernel, schedules):
        raise Refuted(Trial(kernel.key, failing, "wrong_output", detail="1 of 1 elements differ", kind="recheck"))

    monkeypatch.setattr(Runner, "duel", duel)
    assert main("verify", "--records", filled, "-n", "1") == status
    out, err = capsys.readouterr()
    _, beside, last = out.splitlines()
    assert last == (f"1 checked, of them winners: 1; no longer right: {status}; "
                    f"right, but slower than recorded by more than 10%: {1 - status}")  # fmt: skip
    assert ("`export-beam`" in err) == bool(status)
    if status:
        assert beside.startswith("winner e 300") and "wrong_output" in beside and "1 of 1 elements differ" in beside
    else:
        assert beside == "e 300: could not be timed beside hand-coded"
    with closing(Records(filled)) as records:
        own = fingerprint_id(fingerprint(default_device()))
        (found,) = [t for _, t in records.all_trials(own) if t.kind == "recheck"]
        assert found.schedule == failing and bool(records.served(own, PROTOCOL)) == (not status)


@pytest.mark.parametrize("ratio", [None, 1.2])
def test_verify_looks_at_what_is_served_in_a_refuted_winners_place(filled, capsys, monkeypatch, ratio):
    """Both winners are wrong, or right and slower than hand-coded; the newer one was served."""
    with closing(Records(filled)) as records:
        own = fingerprint_id(fingerprint(default_device()))
        records.add_final(own, Final(add_one().key, (U4,), (1e3,), (2e3,), (2e3,), True, PROTOCOL))
    now = {"seconds": (3e3,), "verdict": "ok"} if ratio else {"seconds": (), "verdict": "wrong_output"}
    monkeypatch.setattr(Runner, "measure", lambda self, kernel, schedules, cutoff, done: [
        done(Trial(kernel.key, s, now["verdict"], now["seconds"], input_seed=1)) for s in schedules])  # fmt: skip
    monkeypatch.setattr(Runner, "duel", lambda self, kernel, schedules: [(3e3,), *[(3e3 / (ratio or 1),)] * 2])
    assert main("verify", "--records", filled, "-n", "1") == (0 if ratio else 1)
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 checked, of them winners: 2;")
    with closing(Records(filled)) as records:
        assert records.served(own, PROTOCOL) == {}


def test_what_verify_has_found_is_on_record_though_the_device_fails_then(filled, capsys, monkeypatch):
    def fail(self, kernel, schedules, cutoff, done=None):
        assert len(schedules) == 2
        done(Trial(kernel.key, schedules[0], "wrong_output", input_seed=1))
        raise DeviceError("it is gone")

    monkeypatch.setattr(Runner, "measure", fail)
    assert main("verify", "--records", filled) == 1
    assert "it is gone" in capsys.readouterr().err
    with closing(Records(filled)) as records:
        own = fingerprint_id(fingerprint(default_device()))
        (found,) = [t for _, t in records.all_trials(own) if t.kind == "recheck"]
        assert (found.schedule, found.verdict) == ((U2,), "wrong_output") and not records.served(own, PROTOCOL)


def test_verify_of_what_cannot_be_prepared_says_so_and_refutes_nothing(filled, capsys, monkeypatch):
    fails_to = Trial(add_one().key, (U2,), "timeout", detail=f"{UNPREPARED}: no answer within 120 s", input_seed=1)
    monkeypatch.setattr(Runner, "measure", lambda *_: [fails_to])
    assert main("verify", "--records", filled, "-n", "1") == 0
    assert "no longer right: 0;" in (printed := capsys.readouterr().out) and "could not be looked at: 1" in printed
    with closing(Records(filled)) as records:
        assert not [t for _, t in records.all_trials(Runner(default_device()).fingerprint) if t.kind == "recheck"]


def test_an_export_leaves_links_and_pipes_what_they_are(filled, tmp_path):
    link, pipe, real = tmp_path / "link", tmp_path / "pipe", tmp_path / "real.jsonl"
    link.symlink_to(real)
    assert main("export", "--records", filled, link) == 0 and link.is_symlink() and real.is_file()
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    assert main("export", "--records", filled, pipe) == 0
    reader.join(10.0)
    assert pipe.is_fifo() and read == [real.read_text()]


def test_an_export_replaces_no_records(filled, tmp_path, capsys):
    other = fill(tmp_path / "other.db", default_device())
    for target in (other, filled):
        before = target.read_bytes()
        assert "is a records file" in fails(capsys, 1, "export", "--records", filled, target)
        assert target.read_bytes() == before
    for _ in range(2):  # an export is replaced by another
        assert main("export", "--records", filled, tmp_path / "out") == 0


def test_records_come_together_where_nothing_can_be_compiled(filled, tmp_path, capsys, monkeypatch):
    others = [fill(tmp_path / f"{name}.db", default_device()) for name in "ab"]
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    if default_device() != "CPU":
        pytest.skip("only CPU needs a compiler of its own")
    assert main("merge", "--records", tmp_path / "new.db", *others) == 0
    said = capsys.readouterr().out
    assert all(f"{path}: added" in said for path in others) and said.count("serve here is not known") == 2


def test_verify_without_anything_to_verify(tmp_path, capsys):
    Records(tmp_path / "empty.db").close()
    assert main("verify", "--records", tmp_path / "empty.db") == 0 and "holds nothing for" in capsys.readouterr().out


def test_what_is_wrong_is_one_line(filled, tmp_path, capsys):
    records, text = tmp_path / "mine.db", tmp_path / "text.txt"
    text.write_text("certainly neither an export nor a database\n" * 200)
    assert "no records file" in fails(capsys, 1, "merge", "--records", records, tmp_path / "none.db")
    assert "no SQLite file" in fails(capsys, 1, "merge", "--records", records, text)
    assert "no export of tinygrad-autotune" in fails(capsys, 1, "import", "--records", records, text)
    assert "No such file" in fails(capsys, 1, "import", "--records", records, tmp_path / "none.jsonl")
    assert "no records file" in fails(capsys, 1, "export", "--records", tmp_path / "none.db", tmp_path / "x")
    for where in (tmp_path, "."):
        assert "Is a directory" in fails(capsys, 1, "export", "--records", filled, where)
    assert "no whole number from 1 to" in fails(capsys, 2, "verify", "--records", filled, "-n", "0")
    assert "FILE" in fails(capsys, 2, "merge", "--records", records)
