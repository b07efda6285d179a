"""One child process that can be killed: requests out, answers in, a deadline and a limit of memory on each."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tinygrad

from autotune.compiler import settings, targets
from autotune.errors import DeviceError

PAGE = os.sysconf("SC_PAGE_SIZE")
MEMORY_LIMIT = os.sysconf("SC_PHYS_PAGES") * PAGE // 2  # bytes for a child and what it starts
TICK = 0.2  # seconds between two looks at a busy child's memory
DEATH_SECONDS = 10.0  # after SIGKILL; a process that lives on hangs in its driver
MAX_ANSWER = 1 << 28  # bytes
# where this package and tinygrad lie, if it is no place in which Python looks by itself
CHECKOUTS = [str(root) for root in (Path(__file__).resolve().parents[2], Path(str(tinygrad.__file__)).resolve().parents[1])
             if root.name not in ("site-packages", "dist-packages")]  # fmt: skip


class ChildFailed(Exception):
    """The child gave no answer. `verdict` says what that means for a candidate."""

    def __init__(self, verdict: str, detail: str):
        super().__init__(detail)
        self.verdict, self.detail = verdict, detail


class Child:
    """One `python -m autotune.measuring.worker` process, started when it is first asked."""

    def __init__(self, device: str, runs_candidates: bool = False):
        self.device = device
        self.runs_candidates = runs_candidates
        self.kernel = ""  # key of the one that it holds
        self.prepared = False
        self.plain_seconds = 0.0  # of one un-optimized run of that kernel, once it is prepared
        self.pipe: subprocess.Popen[bytes] | None = None
        self.buffer = b""

    def send(self, request: dict[str, Any]) -> None:
        """Raises ChildFailed when the child is dead."""
        if self.pipe is None:
            # PoCL would fill the user's terminal with a line for each candidate that its compiler warns of
            env = {"POCL_EXTRA_BUILD_FLAGS": "-w", **os.environ}
            # what is in force here may differ from what the environment says: a Context, or a script that changed it
            env |= {
                **settings(),
                "BEAM": "0",
                "DEBUG": "0",
                "PARALLEL": "0",
                "VIZ": "0",
                "PROFILE": "0",
                "TRACK_MATCH_STATS": "0",
            }
            if named := targets():
                env["DEV"] = named
            env["PYTHONPATH"] = os.pathsep.join([*CHECKOUTS, env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
            if self.runs_candidates:  # one was seen to write into every open file: tinygrad's disk cache must be none
                env["CACHELEVEL"] = "0"
            # -P: whatever lies in the user's folder is not taken for tinygrad, or for a module of Python's own
            command = [sys.executable, "-P", "-m", "autotune.measuring.worker", self.device]
            self.pipe = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, bufsize=0,
                                         process_group=0)  # fmt: skip  # Ctrl-C is for the parent alone
            self.kernel, self.prepared, self.buffer = "", False, b""
        assert self.pipe.stdin is not None
        data = memoryview((json.dumps(request) + "\n").encode())
        try:
            while data:  # an unbuffered pipe takes what it has room for
                data = data[self.pipe.stdin.write(data) :]
        except BrokenPipeError:
            self._died()

    def receive(self, timeout: float) -> dict[str, Any]:
        """The next answer. Raises ChildFailed when the child died, hung, took too much memory, or met an error; one that runs
        candidates does not outlive it: on a GPU an illegal access spoils all that its process does from then on.

        Raises DeviceError where a compiler cannot work at all: it is missing, the disk is full, the cache is broken.
        """
        assert self.pipe is not None and self.pipe.stdout is not None
        deadline = time.monotonic() + timeout
        chunks = [self.buffer]
        while b"\n" not in chunks[-1]:
            ready, _, _ = select.select([self.pipe.stdout], [], [], min(TICK, max(0.0, deadline - time.monotonic())))
            if not ready:
                self._check(deadline, timeout)
                continue
            chunks.append(os.read(self.pipe.stdout.fileno(), 1 << 20))
            if not chunks[-1]:
                self._died()
            if sum(map(len, chunks)) > MAX_ANSWER:
                self.kill()
                raise ChildFailed("crashed", "the child flooded its pipe")
        line, self.buffer = b"".join(chunks).split(b"\n", 1)
        try:
            answer = json.loads(line)
        except ValueError:
            self.kill()
            raise ChildFailed("crashed", "the child answered with something else than JSON") from None
        if "error" in answer:
            if answer["environment"] and not self.runs_candidates:
                raise DeviceError(f"{self.device} cannot compile: {answer['error']}; all finished trials are kept")
            if self.runs_candidates:
                self.kill()
            raise ChildFailed("crashed", answer["error"])
        return answer

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        self.send(request)
        return self.receive(timeout)

    def _check(self, deadline: float, timeout: float) -> None:
        assert self.pipe is not None
        if (used := memory_of(self.pipe.pid)) > MEMORY_LIMIT:
            self.kill()
            raise ChildFailed("crashed", f"took {used >> 20} MiB of memory, more than {MEMORY_LIMIT >> 20}")
        if time.monotonic() >= deadline:
            self.kill()
            raise ChildFailed("timeout", f"no answer within {timeout:.3g} s")

    def _died(self) -> None:
        assert self.pipe is not None
        try:
            status: int | str = self.pipe.wait(DEATH_SECONDS)
        except subprocess.TimeoutExpired:  # it closed its pipe and lives on
            status = "unknown"
        self.kill()
        raise ChildFailed("crashed", f"the child ended with status {status}")

    def kill(self) -> None:
        """Kill the child with the compiler that it may be running. Raises ChildFailed when even that has no effect."""
        if self.pipe is None:
            return
        pipe, self.pipe = self.pipe, None
        for stream in (pipe.stdin, pipe.stdout):
            if stream is not None:
                stream.close()
        try:
            os.killpg(pipe.pid, signal.SIGKILL)
        except ProcessLookupError:  # it is dead, and so is its group
            pipe.kill()
        try:
            pipe.wait(DEATH_SECONDS)
        except subprocess.TimeoutExpired:
            raise ChildFailed("timeout", f"process {pipe.pid} does not even die: {self.device} hangs") from None


def memory_of(pid: int) -> int:
    """Resident bytes of a process and its children; 0 where the system does not tell."""
    total = 0
    try:
        total = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += memory_of(int(child))
    except (OSError, IndexError):  # gone, or no such system
        return total
    return total
