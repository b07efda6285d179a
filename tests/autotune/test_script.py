"""A script runs as `python SCRIPT` would run it, whatever it does to its process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import U4
from tinygrad import Context, Tensor

import autotune
from autotune.compiler import default_device, substitute_schedules
from autotune.script import capture_script, left_out

CAPTURE = """
import sys
from pathlib import Path
from autotune.script import capture_script
print("kernels", sum(capture_script(Path(sys.argv[1]), [], 30.0).calls.values()), flush=True)
"""


def captured(folder: Path, script: str, **env: str) -> subprocess.CompletedProcess[str]:
    """What a process prints that captures a script."""
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-c", CAPTURE, str(folder / "script.py")]
    return subprocess.run(command, env={**os.environ, "DEV": "CPU", **env}, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("ends", "status"), [("sys.exit(0)", 0), ("sys.exit(3)", 3), ("sys.exit('why')", 1), ("1 / 0", 1), ("pass", 0)]
)
def test_a_fork_of_the_script_ends_where_the_script_ends(tmp_path: Path, ends: str, status: int):
    """Else it would go on as a second tuner."""
    done = captured(tmp_path, f"""
import os, sys
from tinygrad import Tensor
if (child := os.fork()) == 0:
    {ends}
else:
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    (Tensor.ones(30).contiguous() + 1).realize()
""")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["child", str(status), "kernels", "2"]
    assert ("ZeroDivisionError" in done.stderr) == (ends == "1 / 0")


def test_what_a_thread_of_the_script_runs_counts(tmp_path: Path):
    done = captured(tmp_path, """
import threading, time
from tinygrad import Tensor
def work():
    time.sleep(0.3)
    (Tensor.ones(30).contiguous() + 1).realize()
threading.Thread(target=work).start()
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
""")  # fmt: skip
    assert done.returncode == 0 and done.stdout.split() == ["kernels", "2"], done.stderr


@pytest.mark.parametrize("kind", ["ThreadPoolExecutor", "ProcessPoolExecutor"])
@pytest.mark.parametrize("ends", ["pass", "sys.exit()"])
def test_an_executor_that_is_left_open_ends_with_the_script(tmp_path: Path, kind: str, ends: str):
    """What it has been given to do counts. It is not collected by itself: what it runs refers to the script's names."""
    done = captured(tmp_path, f"""
import concurrent.futures, sys, time
from tinygrad import Tensor
def work(n):
    time.sleep(0.3)
    if {kind == "ThreadPoolExecutor"}:
        (Tensor.ones(30).contiguous() + n).realize()
    return n
pool = concurrent.futures.{kind}(1)
future = pool.submit(work, 1)
{ends}
""")  # fmt: skip
    assert done.returncode == 0 and "stopped by" not in done.stderr, done.stderr
    assert done.stdout.split() == ["kernels", "2" if kind == "ThreadPoolExecutor" else "0"]


def test_settings_that_come_too_late_are_told(tmp_path: Path):
    """By itself the script would have them: tinygrad reads each once, when it is imported."""
    script = "import os\nos.environ['DEFAULT_FLOAT'], os.environ['OTHER'] = 'HALF', '1'\nfrom tinygrad import Tensor\n(Tensor.ones(30).contiguous() + 1).realize()"
    done = captured(tmp_path, script)
    assert "has set DEFAULT_FLOAT, which tinygrad had read before" in done.stderr and "OTHER" not in done.stderr
    assert "has set" not in captured(tmp_path, script, DEFAULT_FLOAT="HALF").stderr


def test_kernels_under_settings_of_the_scripts_own_are_told(tmp_path: Path):
    (tmp_path / "script.py").write_text(
        "from tinygrad import Context, Tensor\nx = Tensor.ones(37).contiguous().realize()\n(x + 1).realize()\n"
        "with Context(NOLOCALS=1, DISABLE_FAST_IDIV=0): (x * 3).realize()"
    )
    program = capture_script(tmp_path / "script.py", [], 30.0)
    told = left_out(program, default_device())
    assert (
        "kernels that ran under settings of the script's own (DISABLE_FAST_IDIV=0, NOLOCALS=1), for which nothing is tuned: 1"
        in told
    )
    with Context(NOLOCALS=1, DISABLE_FAST_IDIV=0):
        assert "nothing is tuned: 2;" in left_out(program, default_device())  # now they are the other ones
    x = Tensor.ones(38).contiguous().realize()
    with autotune.capture() as plain:
        (x + 1).realize()
    assert left_out(plain, default_device()) == ""


@pytest.mark.skipif(default_device() != "CPU", reason="memory of the host")
@pytest.mark.parametrize(("offset", "asked"), [(0, True), (16, True), (1, False), (8, False)])
def test_memory_of_others_is_left_alone_where_it_is_not_aligned(offset: int, asked: bool):
    memory, told = np.arange(2000, dtype=np.float32), []
    start = -(memory.ctypes.data // -64) * 64 - memory.ctypes.data  # bytes to the next line of the cache
    assert start % 4 == 0
    view = memory[start // 4 + offset :][:1024]
    x = Tensor.from_blob(view.ctypes.data, (1024,), dtype="float32", device="CPU")
    with substitute_schedules(lambda raw, *_: told.append(raw) or (U4,)):
        found = (x + 1).realize()
    assert bool(told) == asked and (found.numpy() == view + 1).all()


def test_an_interrupt_waits_for_a_finalizer_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Python prints what is raised in one, and forgets it: the script would go on for ten seconds more."""
    (tmp_path / "script.py").write_text(
        "import time\nfrom tinygrad import Tensor\n(Tensor.ones(30).contiguous() + 1).realize()\nclass Slow:\n"
        "    def __del__(self): time.sleep(1.0)\nbegan = time.monotonic()\nwhile time.monotonic() < began + 8:\n    Slow()\n    time.sleep(0.05)\nprint('ended')"
    )
    capture_script(tmp_path / "script.py", [], 2.0)
    said = capsys.readouterr()
    assert "stopped by --capture-seconds after" in said.err and "ended" not in said.out and "Traceback" not in said.err
