"""The parent's side of measuring: child processes that can be killed, deadlines, and one lock per device.

Compilations of a batch run in parallel, one share a child; then each candidate is verified and timed while nothing else
of ours runs. A child that crashes or hangs becomes a verdict, and a fresh child takes its place.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from autotune.compiler import fingerprint
from autotune.errors import DeviceError
from autotune.kernel import Kernel, Schedule, kernel_to_json, schedule_from_json, schedule_to_json
from autotune.measure import PROTOCOL
from autotune.records import Final, Records, Trial, fingerprint_id

COMPILE_SECONDS, RUN_SECONDS, START_SECONDS = 30.0, 60.0, 120.0  # deadlines
MAX_DEVICE_FAILURES = 5  # children in a row that do not even set a kernel up: then the device itself is at fault
NOISE_FLOOR = 0.02  # a win must be larger than this and than the run's own A/A difference


Done = Callable[[Trial], None]  # called with each trial as soon as it is finished


class Measurer(Protocol):
    """Where timings come from: hardware (`Runner`) or a recording (`recording.Recording`)."""

    fingerprint: str

    def baselines(self, kernel: Kernel) -> list[Trial]: ...
    def measure(
        self, kernel: Kernel, schedules: Sequence[Schedule], cutoff: float | None, done: Done | None = None
    ) -> list[Trial]: ...
    def duel(self, kernel: Kernel, schedules: Sequence[Schedule]) -> list[tuple[float, ...]]: ...
    def close(self) -> None: ...


class ChildFailed(Exception):
    """The child gave no answer. `verdict` says what that means for a candidate."""

    def __init__(self, verdict: str, detail: str):
        super().__init__(detail)
        self.verdict, self.detail = verdict, detail


class Child:
    """One `python -m autotune.worker` process."""

    def __init__(self, device: str):
        self.device = device
        self.kernel = ""
        self.pipe: subprocess.Popen[bytes] | None = None
        self.buffer = b""

    def send(self, request: dict[str, Any]) -> None:
        if self.pipe is None:
            env = {**os.environ, "BEAM": "0", "DEBUG": "0", "PARALLEL": "0"}
            command = [sys.executable, "-m", "autotune.worker", self.device]
            self.pipe = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, bufsize=0,
                                         process_group=0)  # fmt: skip  # Ctrl-C is for the parent alone
            self.kernel, self.buffer = "", b""
        assert self.pipe.stdin is not None
        try:
            self.pipe.stdin.write((json.dumps(request) + "\n").encode())
        except BrokenPipeError:
            self._died()

    def receive(self, timeout: float) -> dict[str, Any]:
        """The next answer. Raises ChildFailed when the child died, hung, or met an error of its own."""
        assert self.pipe is not None and self.pipe.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([self.pipe.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.kill()
                raise ChildFailed("timeout", f"no answer within {timeout:.0f} s")
            if not (chunk := os.read(self.pipe.stdout.fileno(), 1 << 16)):
                self._died()
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\n", 1)
        answer = json.loads(line)
        if "error" in answer:
            raise ChildFailed("crashed", answer["error"])
        return answer

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        self.send(request)
        return self.receive(timeout)

    def _died(self) -> None:
        assert self.pipe is not None
        status = self.pipe.wait()
        self.kill()
        raise ChildFailed("crashed", f"the child ended with status {status}")

    def kill(self) -> None:
        if self.pipe is not None:
            self.pipe.kill()
            self.pipe.wait()
            for stream in (self.pipe.stdin, self.pipe.stdout):
                if stream is not None:
                    stream.close()
            self.pipe = None


@contextlib.contextmanager
def device_lock(device: str, exclusive: bool) -> Iterator[None]:
    """Machine-wide: many may compile (shared), only one may time (exclusive), and never both at once."""
    path = Path(tempfile.gettempdir()) / f"tinygrad-autotune-{os.getuid()}-{device.replace(':', '-')}.lock"
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield


class Runner:
    """Measures on the hardware. `compiled` counts every compilation of a candidate."""

    def __init__(self, device: str, workers: int = 2):
        self.device = device
        self.fields = fingerprint(device)
        self.fingerprint = fingerprint_id(self.fields)
        self.children = [Child(device) for _ in range(workers)]
        self.compiled = 0
        self.failures = 0

    def close(self) -> None:
        for child in self.children:
            child.kill()

    def _setup(self, child: Child, kernel: Kernel) -> list[Schedule]:
        """Make `kernel` the child's own; returns its baseline schedules. Raises DeviceError after too many failures."""
        while True:
            try:
                answer = child.ask({"do": "kernel", "kernel": kernel_to_json(kernel)}, START_SECONDS)
                child.kernel, self.failures = kernel.key, 0
                return [schedule_from_json(s) for s in answer["baselines"]]
            except ChildFailed as failed:
                self.failures += 1
                if self.failures >= MAX_DEVICE_FAILURES:
                    raise DeviceError(f"{self.device} failed {self.failures} times in a row, last: {failed.detail}; "
                                      "all finished trials are kept") from None  # fmt: skip

    def baselines(self, kernel: Kernel) -> list[Trial]:
        """The un-optimized and the hand-coded kernel, measured like any candidate; hand-coded last."""
        schedules = self._setup(self.children[0], kernel)
        trials = self.measure(kernel, schedules, None)
        self.compiled -= len(schedules)
        return [
            Trial(t.kernel, t.schedule, t.verdict, t.samples, t.compile_seconds, t.code_hash, t.detail, kind)
            for t, kind in zip(trials, ("unoptimized", "hand_coded"), strict=True)
        ]

    def measure(
        self, kernel: Kernel, schedules: Sequence[Schedule], cutoff: float | None, done: Done | None = None
    ) -> list[Trial]:
        """One trial for each schedule: compile all in parallel, then verify and time one by one, telling `done` of each."""
        shares = [list(range(i, len(schedules), len(self.children))) for i in range(len(self.children))]
        compiled: dict[int, dict[str, Any]] = {}
        with device_lock(self.device, exclusive=False):
            self._compile_shares(kernel, schedules, shares, compiled)
        trials: dict[int, Trial] = {}
        with device_lock(self.device, exclusive=True):
            for child, share in zip(self.children, shares, strict=True):
                for i in share:
                    trials[i] = self._time(child, kernel, schedules[i], compiled[i], cutoff)
                    self.compiled += 1
                    if done is not None:
                        done(trials[i])
        return [trials[i] for i in range(len(schedules))]

    def _compile_shares(
        self,
        kernel: Kernel,
        schedules: Sequence[Schedule],
        shares: list[list[int]],
        compiled: dict[int, dict[str, Any]],
    ) -> None:
        """Fill `compiled` with an answer for each schedule; the children work side by side."""
        for turn in range(max(map(len, shares), default=0)):
            asked = [(c, s[turn]) for c, s in zip(self.children, shares, strict=True) if turn < len(s)]
            sent = []
            for child, i in asked:
                if child.pipe is None or child.kernel != kernel.key:
                    self._setup(child, kernel)
                with self._as_verdict(compiled, i):
                    child.send({"do": "compile", "schedule": schedule_to_json(schedules[i])})
                    sent.append((child, i))
            for child, i in sent:
                with self._as_verdict(compiled, i):
                    compiled[i] = child.receive(COMPILE_SECONDS)

    @contextlib.contextmanager
    def _as_verdict(self, compiled: dict[int, dict[str, Any]], i: int) -> Iterator[None]:
        try:
            yield
        except ChildFailed as failed:
            verdict = "timeout" if failed.verdict == "timeout" else "compile_failed"
            compiled[i] = {"verdict": verdict, "code_hash": "", "compile_seconds": 0.0, "detail": failed.detail}

    def _time(
        self, child: Child, kernel: Kernel, schedule: Schedule, answer: dict[str, Any], cutoff: float | None
    ) -> Trial:
        verdict, samples, detail = answer["verdict"], [], answer["detail"]
        if verdict == "ok":
            try:
                if child.pipe is None or child.kernel != kernel.key:
                    self._setup(child, kernel)
                request = {"do": "measure", "schedule": schedule_to_json(schedule), "cutoff": cutoff}
                measured = child.ask(request, RUN_SECONDS)
                verdict, samples, detail = measured["verdict"], measured["samples"], measured["detail"]
            except ChildFailed as failed:
                verdict, detail = failed.verdict, failed.detail
        return Trial(
            kernel.key, schedule, verdict, tuple(samples), answer["compile_seconds"], answer["code_hash"], detail
        )

    def duel(self, kernel: Kernel, schedules: Sequence[Schedule]) -> list[tuple[float, ...]]:
        """Interleaved samples of several schedules in a fresh process: one that has searched was seen to time slower."""
        child = Child(self.device)
        try:
            self._setup(child, kernel)
            with device_lock(self.device, exclusive=True):
                answer = child.ask(
                    {"do": "duel", "schedules": [schedule_to_json(s) for s in schedules]}, 4 * RUN_SECONDS
                )
            return [tuple(samples) for samples in answer["samples"]]
        except ChildFailed as failed:
            raise DeviceError(f"the final timing of {kernel.name} failed: {failed.detail}; run again") from None
        finally:
            child.kill()


def commit(records: Records, measurer: Measurer, kernel: Kernel, trials: Sequence[Trial]) -> None:
    """Store trials of a kernel."""
    records.add_kernel(kernel)
    for trial in trials:
        records.add_trial(measurer.fingerprint, trial, PROTOCOL)


def judge(kernel: Kernel, schedule: Schedule, times: Sequence[tuple[float, ...]]) -> Final:
    """Accept a winner only if it beats hand-coded by more than the noise floor and than the run's own A/A difference."""
    tuned, hand, control = times
    medians = [statistics.median(t) for t in (tuned, hand, control)]
    noise = max(NOISE_FLOOR, abs(medians[1] / medians[2] - 1.0))
    accepted = medians[0] < min(medians[1:]) * (1.0 - noise)
    return Final(kernel.key, schedule, tuned, hand, control, accepted)
