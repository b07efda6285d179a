"""The lock of a device: many compile, one times, whatever becomes of its holder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading

import pytest

from autotune.measuring import runner as runner_module
from autotune.measuring.runner import device_lock

HOLDS = """
import sys
from autotune.measuring.runner import device_lock
with device_lock("TEST:1", exclusive={exclusive}):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize(
    "theirs, ours, waits", [(True, True, True), (True, False, True), (False, True, True), (False, False, False)]
)
def test_the_lock_of_a_device_holds_between_processes(theirs, ours, waits, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    entered = threading.Event()

    def enter():
        with device_lock("TEST:1", exclusive=ours):
            entered.set()

    with subprocess.Popen([sys.executable, "-c", HOLDS.format(exclusive=theirs)], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}) as other:  # fmt: skip
        assert other.stdout.readline() == "held\n"
        thread = threading.Thread(target=enter, daemon=True)
        thread.start()
        assert entered.wait(0.3 if waits else 10.0) != waits
        with device_lock("TEST:2", exclusive=True):  # another device is free
            pass
        other.stdin.write("\n")
        other.stdin.flush()
        assert entered.wait(10.0)
        thread.join(10.0)


def test_who_waits_long_for_a_device_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(runner_module, "PATIENCE", 0.1)
    with device_lock("TEST:1", exclusive=True):
        thread = threading.Thread(target=lambda: device_lock("TEST:1", exclusive=False).__enter__(), daemon=True)
        thread.start()
        thread.join(0.6)
        assert thread.is_alive()
    thread.join(10.0)
    assert not thread.is_alive()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("autotune: waits for another process that times on TEST:1")


def test_a_killed_holder_frees_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", HOLDS.format(exclusive=True)], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}) as other:  # fmt: skip
        assert other.stdout.readline() == "held\n"
        other.kill()
    with device_lock("TEST:1", exclusive=True):
        pass
