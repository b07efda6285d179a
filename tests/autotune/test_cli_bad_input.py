"""Bad input to `python -m autotune`: one line that says what is wrong and what to do, exit status 2 or 1, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shell import RANDOM, ROOT, autotune, count, fails, folder, run

from agents import checkpoint
from autotune import cli, files
from autotune.api import tune
from autotune.errors import ScriptError, UsageError
from autotune.kernel import Kernel
from autotune.records import SCHEMA, Records
from autotune.report import KernelResult, Report
from autotune.script import capture_script

__all__ = ["folder"]  # the fixture


def test_wrong_commands(folder, capsys):
    small = folder / "small.py"
    assert "no script" in fails(capsys, 2, "tune", folder / "nothing.py")
    assert "no script" in fails(capsys, 2, "run", folder)
    assert "COMMAND" in fails(capsys, 2)
    assert "SCRIPT" in fails(capsys, 2, "tune")
    assert "--beam" in fails(capsys, 2, "export-beam")
    assert "'x' is no whole number from 0 to 1e+09" in fails(capsys, 2, "tune", "--trials", "x", small)
    assert "'1e10' is no number from 0.001 to" in fails(capsys, 2, "tune", "--capture-seconds", "1e10", small)
    assert "'-1' is no number" in fails(capsys, 2, "tune", "--seconds", "-1", small)
    line = fails(capsys, 2, "tune", "--strategy", "magic", small)
    assert "'magic'" in line and "random" in line
    assert "cannot be written" in fails(capsys, 2, "tune", "--json", folder / "no" / "x.json", small)
    assert "cannot be written" in fails(capsys, 2, "tune", "--json", small / "x.json", small)
    unused = "strategy 'random' uses no checkpoint"
    assert unused in fails(capsys, 2, "tune", *RANDOM, "--checkpoint", "nowhere", small)
    assert unused in fails(capsys, 2, "tune", *RANDOM, "--finetune", "1", small)
    with pytest.raises(UsageError, match=unused):
        tune([], strategy="random", checkpoint="nowhere")


@pytest.mark.parametrize(("name", "says"), [
    ("raises.py", "raises.py:4: ValueError: no; run it by itself"), ("syntax.py", "syntax.py:1: SyntaxError: invalid syntax"),
    ("idle.py", "ran no tinygrad kernel"), ("leaves.py", "ended with status 3"),
])  # fmt: skip
def test_scripts_that_cannot_be_tuned(folder, capsys, name, says):
    assert says in fails(capsys, 1, "tune", "--records", folder / "none.db", *RANDOM, folder / name)
    assert count(folder / "none.db") == 0


def test_a_script_that_swallows_the_time_limit_is_stopped_again(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("autotune.script.AGAIN_SECONDS", 0.5)
    script = tmp_path / "stubborn.py"
    script.write_text("import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    time.sleep(60)\n")
    started = time.monotonic()
    program = capture_script(script, [], seconds=0.1)
    assert time.monotonic() - started < 5 and not program.kernels
    with pytest.raises(ScriptError, match="longer with --capture-seconds"):
        cli.check_captured(program, "CPU", script)


def test_a_script_may_write_its_files_when_its_time_is_over(tmp_path):
    script = tmp_path / "saves.py"
    script.write_text("import time\nfrom pathlib import Path\ntry:\n    time.sleep(60)\nfinally:\n    time.sleep(1.5)\n"
                      "    Path(__file__).with_name('saved').touch()\n")  # fmt: skip
    capture_script(script, [], seconds=0.1)
    assert (tmp_path / "saved").exists()


def test_a_script_that_goes_elsewhere_takes_nobody_along(tmp_path, monkeypatch):
    """It finds itself there, though it was named from where the user is, who stays."""
    (tmp_path / "deep").mkdir()
    script = tmp_path / "deep" / "moves.py"
    script.write_text("import os\nos.chdir('/')\nassert os.path.isabs(__file__) and os.path.exists(__file__)\n1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ScriptError, match=r"^deep/moves.py:4: ZeroDivisionError"):
        capture_script(Path("deep/moves.py"), [], seconds=60.0)
    assert Path.cwd() == tmp_path
    script.write_text("import os\nos.rmdir(os.getcwd())\nraise SystemExit(3)\n")
    (tmp_path / "short").mkdir()
    monkeypatch.chdir(tmp_path / "short")
    argv = sys.argv
    with pytest.raises(ScriptError, match="ended with status 3"):
        capture_script(script, [], seconds=60.0)
    assert sys.argv is argv


def test_records_that_cannot_be_used(folder, tmp_path, capsys):
    small, text, newer = folder / "small.py", tmp_path / "text.db", tmp_path / "newer.db"
    text.write_text("certainly no database, and long enough to be looked at as one\n" * 20)
    Records(newer).db.execute("UPDATE meta SET schema = ?", (SCHEMA + 1,))
    for command in (["tune", *RANDOM], ["run"]):
        assert "no SQLite file" in fails(capsys, 1, *command, "--records", text, small)
        assert f"schema {SCHEMA + 1}" in fails(capsys, 1, *command, "--records", newer, small)
    assert "no records file" in fails(capsys, 1, "run", "--records", tmp_path / "nothing.db", small)
    assert "records" in fails(capsys, 1, "report", "--records", tmp_path)


def as_anyone(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python -m autotune` for whom the modes of files hold: root may write everything, unless it gives that up."""
    command = [sys.executable, "-m", "autotune", *map(str, arguments)]
    if os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("needs a user other than root, or setpriv")
        command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]
    env = {**os.environ, "DEV": "CPU", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_records_that_are_read_only(folder, tmp_path):
    path = tmp_path / "fixed.db"
    Records(path).close()
    path.chmod(0o444)
    done = as_anyone("tune", "--records", path, *RANDOM, folder / "small.py", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""  # found before the script was run
    assert done.stderr == f"autotune: {path} is read-only; name another file with --records\n"


def test_records_in_a_folder_that_may_not_be_written_can_be_read(tmp_path):
    """Even a reader makes files beside a database of this kind, unless it is told that nobody writes."""
    folder = tmp_path / "image"
    Records(folder / "r.db").close()
    folder.chmod(0o555)
    done = as_anyone("report", "--records", folder / "r.db", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "holds nothing for" in done.stdout
    assert [path.name for path in folder.iterdir()] == ["r.db"]


def test_a_result_goes_into_what_may_be_written_and_nothing_else(tmp_path):
    """Where no file can be made, one that is there may still be written, as /dev/stdout may; or it may not."""
    Records(tmp_path / "r.db").close()
    folder = tmp_path / "image"
    folder.mkdir()
    for name, mode in (("open.json", 0o644), ("fixed.json", 0o444)):
        (folder / name).touch()
        (folder / name).chmod(mode)
    folder.chmod(0o555)
    for name, status in (("open.json", 0), ("fixed.json", 2), ("new.json", 2)):
        done = as_anyone("report", "--records", tmp_path / "r.db", "--json", folder / name, cwd=tmp_path)
        assert done.returncode == status and ("cannot be written" in done.stderr) == bool(status), done.stderr
    assert json.loads((folder / "open.json").read_text())["kernels"] == []


def test_records_without_anything_for_this_device_are_fine(folder, tmp_path, capsys):
    empty = tmp_path / "empty.db"
    Records(empty).close()
    assert cli.main(["report", "--records", str(empty), "--json", str(tmp_path / "r.json")]) == 0
    assert cli.main(["export-beam", "--beam", "3", "--records", str(empty)]) == 0
    assert capsys.readouterr().out.count("holds nothing for") == 2
    assert json.loads((tmp_path / "r.json").read_text())["kernels"] == []
    assert cli.main(["run", "--records", str(empty), str(folder / "small.py")]) == 0
    assert "0 kernels ran tuned" in (err := capsys.readouterr().err) and "holds nothing for them" in err


def test_a_full_disk(folder, tmp_path, monkeypatch, capsys):
    path, opened = tmp_path / "full.db", Records._open

    def open_small(self: Records, *arguments: bool) -> None:
        opened(self, *arguments)
        pages = self.db.execute("PRAGMA page_count").fetchone()[0]
        self.db.execute(f"PRAGMA max_page_count = {pages + 2}")

    monkeypatch.setattr(Records, "_open", open_small)
    line = ["tune", "--records", str(path), *RANDOM, "--trials", "60", str(folder / "small.py")]
    assert cli.main(line) == 1
    assert (
        capsys.readouterr().err.splitlines()[-1] == f"autotune: the disk of {path} is full; what was committed is kept"
    )
    assert count(path) + count(path, "hand_coded") > 0


def test_no_checkpoint_and_one_of_another_vocabulary(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "DATA", tmp_path)
    line = ["tune", "--records", tmp_path / "x.db", "--strategy", "policy"]
    assert "experiments.train" in fails(capsys, 2, *line, folder / "small.py")
    checkpoint.save(tmp_path / "alien", {}, {"vocabulary": "of another time"})
    assert "vocabulary" in fails(capsys, 2, *line, "--checkpoint", tmp_path / "alien", folder / "small.py")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    assert "torn" in fails(capsys, 2, *line, "--checkpoint", tmp_path / "torn.safetensors", folder / "small.py")


def test_a_device_that_does_not_exist(folder):
    status, printed, err = autotune(folder, "tune", "--records", "n.db", *RANDOM, "small.py", DEV="NOPE")
    assert status == 1 and printed == "" and len(err.splitlines()) == 1 and "'NOPE'" in err and "set DEV" in err


def test_no_clang(folder):
    """Also where tinygrad's cache still holds all that the script compiles."""
    assert run(folder, "small.py")[0] == 0
    for cache in ("cache", "fresh"):
        status, printed, err = autotune(folder, "tune", "--records", "n.db", *RANDOM, "small.py", PATH=str(folder),
                                        XDG_CACHE_HOME=str(folder / cache))  # fmt: skip
        assert status == 1 and printed == "" and len(err.splitlines()) == 1 and "clang" in err


def test_a_kernel_that_could_not_be_measured_does_not_break_the_table():
    kernel = Kernel(None, "k", "name")  # type: ignore[arg-type]
    report = Report("CPU", 1.0, 0, [KernelResult(kernel, 1, 0.0, 0.0, 0, None, {})])
    assert "name" in report.table() and report.kernels[0].ratio == 1.0
