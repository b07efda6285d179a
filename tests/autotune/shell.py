"""What the tests of the command line share: a folder of scripts, and `python -m autotune` in processes of its own."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from autotune import cli

ROOT = Path(__file__).resolve().parents[2]
RANDOM = ["--strategy", "random"]
SMALL = """
import sys
import numpy as np
from tinygrad import Tensor
a, b = Tensor(np.ones((32, 32), np.float32)).realize(), Tensor(np.ones((32, 32), np.float32)).realize()
for _ in range(3): print("sum", (a @ b).numpy().sum(), sys.argv[1:], sys.path[0], __name__)
"""
ENDLESS = """
import numpy as np
from tinygrad import Tensor
a = Tensor(np.ones(8, np.float32)).realize()
while True:
    try:
        (a + 1).realize()
        print("running", flush=True)
    except Exception:
        pass
"""
RAISES = """
from tinygrad import Tensor
def inner():
    raise ValueError("no\\nluck")
Tensor([1.0, 2.0]).realize()
inner()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    scripts = {"small": SMALL, "endless": ENDLESS, "raises": RAISES, "syntax": "x = = 1\n", "idle": "print(1)\n",
               "leaves": "import sys\nsys.exit(3)\n"}  # fmt: skip
    for name, text in scripts.items():
        (path / f"{name}.py").write_text(text)
    return path


def heed_interrupts() -> None:
    """A suite in the background of a shell ignores Ctrl-C, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(folder: Path, *command: str | Path, **env: str) -> subprocess.Popen[str]:
    """Like a shell with an empty cache directory and the project on its path; a process group of its own."""
    own = {"DEV": "CPU", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache"), **env}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=folder, env={**os.environ, **own}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            preexec_fn=heed_interrupts)  # fmt: skip


def run(folder: Path, *command: str | Path, timeout: float = 120.0, **env: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr)"""
    with start(folder, *command, **env) as process:
        out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def autotune(folder: Path, *arguments: str | Path, timeout: float = 120.0, **env: str) -> tuple[int, str, str]:
    return run(folder, "-m", "autotune", *arguments, timeout=timeout, **env)


def fails(capsys: pytest.CaptureFixture[str], status: int, *arguments: str | Path) -> str:
    """Call main(), which must end with `status` and one line on stderr; returns that line."""
    try:
        found = cli.main([str(a) for a in arguments])
    except SystemExit as end:  # argparse
        found = end.code
    lines = capsys.readouterr().err.splitlines()
    assert found == status and len(lines) == 1, lines
    return lines[0]


def count(records: Path, kind: str = "trial") -> int:
    try:
        with closing(sqlite3.connect(f"file:{records}?mode=ro", uri=True)) as db:
            return db.execute("SELECT count(*) FROM trials WHERE kind = ?", (kind,)).fetchone()[0]
    except sqlite3.OperationalError:  # not there yet
        return 0


def members(session: int) -> list[int]:
    """Processes of a session that are alive: what `start` began, and its children, whatever group they are in."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = path.read_text().rpartition(")")[2].split()[:4]  # state, parent, group, session
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(own) == session and state != "Z":
            found.append(int(path.parent.name))
    return found
