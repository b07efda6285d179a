"""`python -m autotune` where all is well, and where it is interrupted: in processes of its own where the process matters."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import sys
import time
import types
from contextlib import closing
from pathlib import Path

import pytest
from shell import RANDOM, SMALL, autotune, count, fails, folder, members, run, start

from autotune import cli, cli_devices
from autotune.compiler import Opt, OptOps
from autotune.measuring.bench import PROTOCOL
from autotune.records import Final, Records
from autotune.script import capture_script, run_script

WINNER = (Opt(OptOps.UPCAST, 0, 2),)  # legal for the kernel of small.py, and not what the hand-coded heuristic chooses
__all__ = ["folder"]  # the fixture


# **** what works ****


@pytest.fixture(scope="module")
def tuned(folder: Path) -> tuple[Path, str, str, dict]:
    """(records, stdout, stderr, JSON) of tuning SMALL with two trials."""
    records, out = folder / "small.db", folder / "small.json"
    command = ["tune", "--records", records, *RANDOM, "--trials", "2", "--json", out, "small.py", "a", "--json", "--"]
    status, printed, err = autotune(folder, *command)
    assert status == 0, err
    return records, printed, err, json.loads(out.read_text())


@pytest.fixture(scope="module")
def winner(folder: Path, tuned: tuple[Path, str, str, dict]) -> Path:
    """Records in which WINNER was accepted for the kernel of SMALL, half as slow as hand-coded."""
    path = folder / "winner.db"
    shutil.copy(tuned[0], path)
    with closing(Records(path)) as records:
        (own,) = records.fingerprints()
        key = tuned[3]["kernels"][0]["key"]
        records.add_final(own, Final(key, WINNER, (1e-6,) * 3, (2e-6,) * 3, (2e-6,) * 3, True, PROTOCOL))
    return path


def test_tune_keeps_the_contract_of_its_json(tuned):
    records, _, _, result = tuned
    assert set(result) == {"device", "seconds", "compiled", "kernels", "hand_coded_ms", "tuned_ms", "gains", "stopped",
                           "left"}  # fmt: skip
    assert result["stopped"] == "" and result["left"] == 0
    assert result["device"] == "CPU" and result["compiled"] == 2 and result["seconds"] > 0
    (kernel,) = result["kernels"]
    fields = {"key", "name", "calls", "gflop", "hand_coded_ms", "tuned_ms", "trials", "schedule", "verdicts", "refused"}
    assert set(kernel) == fields
    assert kernel["calls"] == 3 and kernel["trials"] == 2 == sum(kernel["verdicts"].values()) == count(records)
    assert result["hand_coded_ms"] == pytest.approx(3 * kernel["hand_coded_ms"])
    assert result["tuned_ms"] == pytest.approx(3 * kernel["tuned_ms"])
    assert 0 < result["tuned_ms"] <= result["hand_coded_ms"]
    assert kernel["schedule"] is None or all(len(opt) == 3 for opt in kernel["schedule"])


def test_tune_runs_the_script_as_python_would(folder, tuned):
    _, printed, err, _ = tuned
    assert printed.splitlines()[:3] == [f"sum 32768.0 ['a', '--json', '--'] {folder} __main__"] * 3
    assert "sum over calls" in printed and "Traceback" not in err


def test_tune_again_spends_nothing_again(folder, tuned):
    records = folder / "again.db"
    shutil.copy(tuned[0], records)
    status, _, err = autotune(
        folder, "tune", "--records", records, *RANDOM, "--trials", "2", "--json", "2.json", "small.py"
    )
    assert status == 0, err
    again = json.loads((folder / "2.json").read_text())
    assert again["compiled"] == 0 and again["kernels"][0]["trials"] == 2 == count(records)


def test_run_uses_the_tuned_schedules(folder, winner):
    status, printed, err = autotune(folder, "run", "--records", winner, "small.py", "x", DEBUG="3")
    assert status == 0 and "1 kernels ran tuned, 0 as tinygrad" in err
    assert "(Opt(op=OptOps.UPCAST, axis=0, arg=2),)" in printed and "sum 32768.0 ['x']" in printed


def test_run_passes_on_what_the_script_says(folder, winner, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "--records", str(winner), str(folder / "leaves.py")])
    assert end.value.code == 3
    capsys.readouterr()
    assert "raises.py:4: ValueError: no;" in fails(capsys, 1, "run", "--records", winner, folder / "raises.py")


def test_report_shows_what_is_on_record(folder, winner):
    status, printed, err = autotune(folder, "report", "--records", winner, "--json", "report.json")
    assert status == 0 and "UPCAST:0:2" in printed and err == ""
    result = json.loads((folder / "report.json").read_text())
    (kernel,) = result["kernels"]
    assert result["device"] == "CPU" and kernel["schedule"] == [["UPCAST", 0, 2]] and kernel["trials"] == 2
    assert (kernel["hand_coded_ms"], kernel["tuned_ms"], kernel["ratio"]) == pytest.approx((2e-3, 1e-3, 0.5))


def test_exported_schedules_are_used_without_a_search(folder, winner):
    cache = {"CACHEDB": str(folder / "beam.db")}

    def searched() -> int:
        with closing(sqlite3.connect(cache["CACHEDB"])) as db:
            (table,) = db.execute("SELECT name FROM sqlite_master WHERE name LIKE 'beam_search%'").fetchone()
            return db.execute(f"SELECT count(*) FROM '{table}'").fetchone()[0]

    status, printed, _ = autotune(folder, "export-beam", "--beam", "2", "--records", winner, **cache)
    before = searched()
    assert status == 0 and "1 schedules exported" in printed and before > 0
    status, printed, _ = run(folder, "small.py", BEAM="2", DEBUG="3", **cache)
    assert status == 0 and searched() == before
    assert "(Opt(op=OptOps.UPCAST, axis=0, arg=2),)" in printed and "sum 32768.0" in printed


def test_devices_are_listed_with_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(cli_devices, "DEVICES", ("CPU", "NOPE"))
    assert cli.main(["devices"]) == 0
    printed = capsys.readouterr().out
    assert "CPU" in printed and ": fingerprint " in printed and "tinygrad 0.14.0" in printed
    assert "NOPE: not usable here: ModuleNotFoundError" in printed


def test_replay_is_handed_on(monkeypatch, tmp_path, capsys):
    asked = []
    fake = types.ModuleType("autotune.experiments")
    fake.replay = types.SimpleNamespace(main=lambda run, live: asked.append((run, live)) or 7)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "autotune.experiments", fake)
    assert cli.main(["replay", str(tmp_path), "--live"]) == 7 and asked == [(tmp_path, True)]
    assert "no directory of a recorded run" in fails(capsys, 2, "replay", tmp_path / "nothing")


def test_a_script_may_have_modules_with_the_names_of_ours(tmp_path):
    """Beside the script, which is the working directory, too: before our own on the path of `python -m`."""
    (tmp_path / "agents.py").write_text("MINE = 1\n")
    (tmp_path / "sims.py").write_text("MINE = 2\n")
    (tmp_path / "user.py").write_text(
        "import sims\nfrom agents import MINE\n" + SMALL + "print('mine', MINE, sims.MINE)\n"
    )
    command = ["--records", "r.db", "user.py"]
    status, printed, err = autotune(tmp_path, "tune", *RANDOM, "--trials", "1", *command)
    assert status == 0 and "mine 1 2" in printed and count(tmp_path / "r.db") == 1, err
    status, printed, err = autotune(tmp_path, "run", *command)
    assert status == 0 and "mine 1 2" in printed, err
    status, _, err = run(tmp_path, "-c", "import autotune")
    assert status == 1 and "UsageError: " in err.splitlines()[-1] and "agents.py hides the package agents" in err


def test_what_only_tunes_is_loaded_when_it_is_asked_for(tmp_path):
    """From wherever the program stands by then, and never anything else that came to be called so."""
    (tmp_path / "theirs" / "agents").mkdir(parents=True)
    (tmp_path / "theirs" / "agents" / "__init__.py").write_text("MINE = 1\n")
    begin = "import autotune, os, sys; assert not {'agents', 'sims'} & set(sys.modules); "
    own, foreign = (
        "os.chdir('/'); autotune.tune; import agents.ppo",
        "sys.path.insert(0, 'theirs'); import agents; autotune.tune",
    )
    status, _, err = run(tmp_path, "-c", begin + own)
    assert status == 0, err
    status, _, err = run(tmp_path, "-c", begin + foreign)
    assert status == 1 and "hides the package agents" in err.splitlines()[-1], err
    with pytest.raises(AttributeError, match="'autotune' has no attribute 'tuned'"):
        sys.modules["autotune"].tuned  # noqa: B018


def test_what_a_script_hides_of_ours_is_there_again(tmp_path):
    (tmp_path / "agents.py").write_text("MINE = 1\n")
    (tmp_path / "user.py").write_text(
        "import sys\nassert 'agents' not in sys.modules\nimport agents\nassert agents.MINE\n"
    )
    before = {name: m for name, m in sys.modules.items() if name.partition(".")[0] in ("agents", "sims")}
    run_script(tmp_path / "user.py", [])
    after = {name: m for name, m in sys.modules.items() if name.partition(".")[0] in ("agents", "sims")}
    assert before == after and "agents" in after and "sims.base" in after


# **** scripts that do not end, Ctrl-C ****


def test_an_endless_script_is_bounded(folder, capsys):
    program = capture_script(folder / "endless.py", [], seconds=1.0)
    assert max(program.calls.values()) > 1
    assert "stopped by --capture-seconds after 1 s" in capsys.readouterr().err


def test_ctrl_c_during_capture_goes_on_with_what_was_seen(folder):
    with start(
        folder, "-m", "autotune", "tune", "--records", "c.db", *RANDOM, "--trials", "1", "endless.py"
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "running\n"
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped by Ctrl-C" in err and "Traceback" not in err
    assert "sum over calls" in out and count(folder / "c.db") == 1


def test_ctrl_c_ends_a_script_that_runs_tuned_as_any_other(folder, winner):
    waits = folder / "waits.py"
    waits.write_text("import time\nprint('waiting', flush=True)\ntime.sleep(60)\n")
    with start(folder, "-m", "autotune", "run", "--records", winner, waits) as process:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "was interrupted" in err and "trial" not in err and "Traceback" not in err


def test_ctrl_c_while_tuning_keeps_every_finished_trial(folder):
    records = folder / "interrupted.db"
    with start(
        folder, "-m", "autotune", "tune", "--records", records, *RANDOM, "--trials", "500", "small.py"
    ) as process:
        deadline = time.monotonic() + 60
        while not count(records) and time.monotonic() < deadline:
            time.sleep(0.05)
        seen = count(records)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("autotune: interrupted; every finished trial is on record")
    assert 0 < seen <= count(records) < 500
    assert members(process.pid) == []  # no child is left
