"""The parent's side of measuring: deadlines, what a failing child means, and one lock per device.

Two children compile side by side; then a third one, which is sent the binaries, verifies and times them while nothing else
of ours runs. A child that crashes or hangs becomes a verdict, and a fresh child takes its place.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from autotune.compiler import fingerprint
from autotune.errors import AutotuneError, DeviceError
from autotune.kernel import Kernel, Schedule, kernel_to_json, schedule_from_json, schedule_to_json
from autotune.measuring.bench import DUEL_SECONDS, PROTOCOL
from autotune.measuring.child import Child, ChildFailed
from autotune.records import BASELINES, Final, History, Records, Trial, fingerprint_id

START_SECONDS, COMPILE_SECONDS, PREPARE_SECONDS = 60.0, 30.0, 120.0  # deadlines of a child's answers
RUN_SECONDS, RUN_FACTOR = 20.0, 40.0  # a candidate's: so long, and so many times the un-optimized kernel's time
ACCIDENTS = ("crashed", "timeout")  # verdicts that come by bad luck, too
RETRIED = (
    *ACCIDENTS,
    "compile_failed",
)  # of a baseline, or a winner: it is measured again; a compiler may have been killed
UNPREPARED = "the un-optimized kernel itself"  # so a detail begins where that was at fault, and no candidate
MAX_DEVICE_FAILURES = 3  # probes in a row: then it is the device that is at fault, and not a kernel
NOISE_FLOOR = 0.02  # a win must be larger than this and than the run's own A/A difference
SETTLE_SECONDS = 0.06  # of each of the fastest few, compared on the bench
KEPT_BINARIES = 256  # of late, so that a duel compiles nothing again
CUTOFF = 4.0  # candidates slower than this many times the incumbent get two samples only
COMPILERS = 2  # candidates compiled side by side
PATIENCE, LOOK = 30.0, 0.02  # seconds of waiting for a device before that is said, and between two looks until then


Done = Callable[[Trial], None]  # called with each trial as soon as it is finished


class Refuted(AutotuneError):
    """A schedule that had passed before failed in a duel. `trial` says how."""

    def __init__(self, trial: Trial):
        super().__init__(f"schedule {schedule_to_json(trial.schedule)} passed its trial, then failed: {trial.detail}")
        self.trial = trial


class Unprepared(AutotuneError):
    """The kernel itself could not be prepared this time, so nothing was learned of any of its schedules."""


class Measurer(Protocol):
    """Where timings come from: hardware (`Runner`) or a recording (`recording.Recording`). Times in seconds.

    What goes wrong with a candidate is its verdict. All may raise DeviceError where the device itself fails, and a recording
    ReplayError for what it does not hold.
    """

    fingerprint: str
    compiled: int  # candidates so far

    def baselines(self, kernel: Kernel) -> list[Trial]:
        """A trial of each kind in BASELINES, in that order."""
        ...

    def measure(
        self, kernel: Kernel, schedules: Sequence[Schedule], cutoff: float | None, done: Done | None = None
    ) -> list[Trial]:
        """A trial of each schedule, in their order; `done` hears of each at once. What is slower than `cutoff` gets two samples."""
        ...

    def duel(self, kernel: Kernel, schedules: Sequence[Schedule], fresh: bool = True) -> list[tuple[float, ...]]:
        """Interleaved samples of each schedule, in their order; `fresh`: in a new process. Raises Refuted for a schedule that fails,
        Unprepared where the kernel itself does."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


@contextlib.contextmanager
def device_lock(device: str, exclusive: bool) -> Iterator[None]:
    """Machine-wide: many may compile (shared), only one may time (exclusive), and never both at once."""
    path = Path(tempfile.gettempdir()) / f"tinygrad-autotune-{os.getuid()}-{device.replace(':', '-')}.lock"
    kind, began, told = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, time.monotonic(), False
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, kind | (0 if told else fcntl.LOCK_NB))
                break
            except BlockingIOError:
                if time.monotonic() > began + PATIENCE:
                    tqdm.write(f"autotune: waits for another process that times on {device} ({path})", file=sys.stderr)
                    told = True
                time.sleep(LOOK)
        yield


class Runner:
    """Measures on the hardware. `compiled` counts every compilation of a candidate."""

    def __init__(self, device: str, workers: int = COMPILERS):
        self.device = device
        self.fields = fingerprint(device)
        self.fingerprint = fingerprint_id(self.fields)
        self.seed = secrets.randbits(31)  # of the inputs: nothing can know them beforehand, each trial records them
        self.compilers = [Child(device) for _ in range(workers)]
        self.bench = Child(device, runs_candidates=True)
        self.binaries: OrderedDict[tuple[str, Schedule], dict[str, Any]] = OrderedDict()
        self.compiled = 0

    def close(self) -> None:
        for child in (*self.compilers, self.bench):
            # one may hang in its driver, while all that was measured is on record
            with contextlib.suppress(ChildFailed):
                child.kill()

    # **** children that hold a kernel ****

    def _hold(self, child: Child, kernel: Kernel, seed: int) -> list[Schedule]:
        """Give a kernel to a child; returns its baseline schedules. Raises ChildFailed (the kernel's fault) or DeviceError."""
        try:
            answer = child.ask({"do": "kernel", "kernel": kernel_to_json(kernel), "seed": seed}, START_SECONDS)
        except ChildFailed:
            self.check_device()
            answer = child.ask({"do": "kernel", "kernel": kernel_to_json(kernel), "seed": seed}, START_SECONDS)
        child.kernel, child.prepared = kernel.key, False
        return [schedule_from_json(s) for s in answer["baselines"]]

    def _prepare(self, child: Child, kernel: Kernel, seed: int) -> None:
        """Let a child compute what is expected of a kernel. Raises ChildFailed or DeviceError."""
        try:
            if child.pipe is None or child.kernel != kernel.key:
                self._hold(child, kernel, seed)
            if not child.prepared:
                child.plain_seconds = child.ask({"do": "prepare"}, PREPARE_SECONDS)["seconds"]
        except ChildFailed as failed:
            with contextlib.suppress(ChildFailed):
                child.kill()
            self.check_device()
            raise ChildFailed(failed.verdict, f"{UNPREPARED}: {failed.detail}") from None
        child.prepared = True

    def check_device(self) -> None:
        """Run something trivial in a fresh process. Raises DeviceError when that fails again and again."""
        detail = "it computes wrongly"
        for pause in range(MAX_DEVICE_FAILURES):
            child = Child(self.device)
            time.sleep(pause)
            try:
                if child.ask({"do": "probe"}, START_SECONDS)["works"]:
                    return
            except ChildFailed as failed:
                detail = failed.detail
            finally:
                with contextlib.suppress(ChildFailed):  # what does not even die has given no answer either
                    child.kill()
        raise DeviceError(f"{self.device} failed {MAX_DEVICE_FAILURES} times in a row, last: {detail}; "
                          "all finished trials are kept: see to the device, then run the same command again")  # fmt: skip

    # **** trials ****

    def baselines(self, kernel: Kernel) -> list[Trial]:
        """The un-optimized and the hand-coded kernel, measured like any candidate; hand-coded last.

        What meets an accident is measured once more. Where the kernel itself cannot be prepared, both get the verdict of the
        un-optimized one: at once where time is up, since each try would take as long, and else after a second try.
        """
        kinds, compiled = BASELINES, self.compiled
        with device_lock(self.device, exclusive=False):
            try:
                schedules = self._hold(self.compilers[0], kernel, self.seed)
            except ChildFailed as failed:
                return [Trial(kernel.key, (), failed.verdict, detail=failed.detail, kind=kind) for kind in kinds]
            answers = self._compile_all(kernel, schedules)
        (plain,) = self._time_all(kernel, schedules[:1], answers[:1], None)
        if plain.detail.startswith(UNPREPARED) and plain.verdict != "timeout":
            (plain,) = self.measure(kernel, schedules[:1], None)
        if plain.detail.startswith(UNPREPARED):
            trials = [plain, replace(plain, schedule=schedules[1], code_hash="")]
        else:
            trials = [plain, *self._time_all(kernel, schedules[1:], answers[1:], None)]
            trials = [t if t.verdict not in RETRIED else self.measure(kernel, [t.schedule], None)[0] for t in trials]
        self.compiled = compiled
        return [replace(trial, kind=kind) for trial, kind in zip(trials, kinds, strict=True)]

    def measure(
        self, kernel: Kernel, schedules: Sequence[Schedule], cutoff: float | None, done: Done | None = None
    ) -> list[Trial]:
        """One trial for each schedule: compile all in parallel, then verify and time one by one, telling `done` of each."""
        with device_lock(self.device, exclusive=False):
            answers = self._compile_all(kernel, schedules)
        return self._time_all(kernel, schedules, answers, cutoff, done)

    def _time_all(
        self, kernel: Kernel, schedules: Sequence[Schedule], answers: Sequence[dict[str, Any]], cutoff: float | None,
        done: Done | None = None,
    ) -> list[Trial]:  # fmt: skip
        """A trial for each compiled candidate."""
        trials = []
        with device_lock(self.device, exclusive=True):
            for schedule, answer in zip(schedules, answers, strict=True):
                trials.append(self._time(kernel, schedule, answer, cutoff))
                self.compiled += 1
                if done is not None:
                    done(trials[-1])
        return trials

    def _compile_all(self, kernel: Kernel, schedules: Sequence[Schedule]) -> list[dict[str, Any]]:
        """An answer for each schedule; each compiler takes the next one as soon as it is free."""
        todo, answers = deque(enumerate(schedules)), {}

        def work(child: Child) -> None:
            while todo:
                try:
                    i, schedule = todo.popleft()
                except IndexError:  # the other one took the last
                    return
                answers[i] = self._compile(child, kernel, schedule)

        with ThreadPoolExecutor(len(self.compilers)) as pool:
            try:
                for future in [pool.submit(work, child) for child in self.compilers]:
                    future.result()
            finally:
                todo.clear()
        return [answers[i] for i in range(len(schedules))]

    def _compile(self, child: Child, kernel: Kernel, schedule: Schedule) -> dict[str, Any]:
        """The child's answer, or its failure in the same form, with the seconds that it took."""
        began, fault = time.perf_counter(), f"{UNPREPARED}: "
        try:
            if child.pipe is None or child.kernel != kernel.key:
                self._hold(child, kernel, self.seed)
            fault = ""
            return child.ask({"do": "compile", "schedule": schedule_to_json(schedule)}, COMPILE_SECONDS)
        except ChildFailed as failed:
            verdict = "timeout" if failed.verdict == "timeout" else "compile_failed"
            spent = time.perf_counter() - began
            return {"verdict": verdict, "binary": None, "compile_seconds": spent, "detail": fault + failed.detail}

    def _time(self, kernel: Kernel, schedule: Schedule, answer: dict[str, Any], cutoff: float | None) -> Trial:
        """Let the bench verify and time a compiled candidate."""
        trial = Trial(kernel.key, schedule, answer["verdict"], compile_seconds=answer["compile_seconds"],
                      detail=answer["detail"], input_seed=self.seed)  # fmt: skip
        binary = answer["binary"]
        if binary is None:
            return trial
        trial = replace(trial, code_hash=binary["code_hash"])
        began = time.perf_counter()
        try:
            self._prepare(self.bench, kernel, self.seed)
            began = time.perf_counter()
            limit = RUN_SECONDS + RUN_FACTOR * self.bench.plain_seconds
            found = self.bench.ask({"do": "measure", "binary": binary, "cutoff": cutoff}, limit)
        except ChildFailed as failed:
            spent = time.perf_counter() - began
            return replace(trial, verdict=failed.verdict, detail=failed.detail, verify_seconds=spent)
        self.binaries[kernel.key, schedule] = binary
        while len(self.binaries) > KEPT_BINARIES:
            self.binaries.popitem(last=False)
        return replace(
            trial,
            verdict=found["verdict"],
            samples=tuple(found["samples"]),
            detail=found["detail"],
            compile_seconds=answer["compile_seconds"] + found["load_seconds"],
            verify_seconds=found["verify_seconds"],
            timing_seconds=found["timing_seconds"],
        )

    # **** comparisons ****

    def duel(
        self, kernel: Kernel, schedules: Sequence[Schedule], fresh: bool = True, seconds: float | None = None
    ) -> list[tuple[float, ...]]:
        """Interleaved samples of several schedules, verified before and after.

        `fresh`: in a new process, since one that has searched was seen to time slower, and on inputs that none of them
        has seen; otherwise on the bench. `seconds` are spent on each. Raises Refuted when one of them fails (where a child
        dies or hangs: twice), Unprepared where it is the un-optimized kernel that does, DeviceError when it is the device.
        """
        with device_lock(self.device, exclusive=False):
            binaries = [self._binary(kernel, schedule) for schedule in schedules]
        seed = secrets.randbits(31) if fresh else self.seed
        seconds = seconds or (DUEL_SECONDS if fresh else SETTLE_SECONDS)
        try:
            answer = self._hold_duel(kernel, binaries, fresh, seed, seconds)
        except ChildFailed:
            self.check_device()
            try:  # once more: it may have been an accident, and who is refuted is so for ever
                answer = self._hold_duel(kernel, binaries, fresh, seed, seconds)
            except ChildFailed as failed:  # whose fault it is cannot be seen: the first one is what is on trial
                self.check_device()
                if failed.detail.startswith(UNPREPARED):
                    raise Unprepared(f"{kernel.name}: {failed.detail}; run the same command again later") from None
                raise self._refuted(kernel, schedules[0], failed.verdict, failed.detail, seed) from None
        if "wrong" in answer:
            raise self._refuted(kernel, schedules[answer["index"]], "wrong_output", answer["wrong"], seed)
        return [tuple(samples) for samples in answer["samples"]]

    def _hold_duel(
        self, kernel: Kernel, binaries: Sequence[dict[str, Any]], fresh: bool, seed: int, seconds: float
    ) -> dict[str, Any]:
        """A child's answer. Raises ChildFailed, and DeviceError when the device fails."""
        child = Child(self.device, runs_candidates=True) if fresh else self.bench
        try:
            with device_lock(self.device, exclusive=True):
                self._prepare(child, kernel, seed)
                limit = len(binaries) * (RUN_SECONDS + RUN_FACTOR * child.plain_seconds)
                return child.ask({"do": "duel", "binaries": binaries, "seconds": seconds}, limit)
        finally:
            if fresh:
                child.kill()

    def _binary(self, kernel: Kernel, schedule: Schedule) -> dict[str, Any]:
        if (kernel.key, schedule) in self.binaries:
            return self.binaries[kernel.key, schedule]
        for _ in range(2):  # once more: the compiler may have met an accident, and who is refuted is so for ever
            answer = self._compile(self.compilers[0], kernel, schedule)
            if answer["binary"] is not None:
                return answer["binary"]
        if answer["detail"].startswith(UNPREPARED):
            raise Unprepared(f"{kernel.name}: {answer['detail']}; run the same command again later")
        raise self._refuted(kernel, schedule, answer["verdict"], answer["detail"], self.seed)

    def _refuted(self, kernel: Kernel, schedule: Schedule, verdict: str, detail: str, seed: int) -> Refuted:
        return Refuted(Trial(kernel.key, schedule, verdict, detail=detail, kind="recheck", input_seed=seed))


def commit(records: Records, measurer: Measurer, kernel: Kernel, trials: Sequence[Trial]) -> None:
    """Store trials of a kernel."""
    records.add_kernel(kernel)
    for trial in trials:
        records.add_trial(measurer.fingerprint, trial, PROTOCOL)


def wants_baselines(history: History) -> bool:
    """Whether they are to be measured: they are not on record, or one was an accident, which is tried once more."""
    known, tries = history.baselines, Counter(t.kind for t in history.trials)
    accidents = (kind for kind, trial in known.items() if trial.verdict in RETRIED and tries[kind] < 2)
    return "hand_coded" not in known or any(accidents)


def known_of(records: Records, measurer: Measurer, kernel: Kernel) -> History:
    """What is on record of a kernel; its baselines are measured first, where they are wanted."""
    history = records.history(kernel.key, measurer.fingerprint)
    if wants_baselines(history):
        commit(records, measurer, kernel, measurer.baselines(kernel))
        history = records.history(kernel.key, measurer.fingerprint)
    return history


def cutoff_of(history: History) -> float | None:
    """Seconds beyond which a candidate gets two samples only; None where nothing has a time."""
    best = history.best
    return CUTOFF * best.seconds if best is not None and best.seconds is not None else None


def judge(kernel: Kernel, schedule: Schedule, times: Sequence[tuple[float, ...]], floor: float = NOISE_FLOOR) -> Final:
    """Accept a winner only if it beats hand-coded by more than the noise floor and than the run's own A/A difference.

    `times` are samples in seconds of the winner, of hand-coded, and of hand-coded once more.
    """
    tuned, hand, control = times
    medians = [statistics.median(t) for t in (tuned, hand, control)]
    final = Final(kernel.key, schedule, tuned, hand, control, False, PROTOCOL)
    return replace(final, accepted=medians[0] < min(medians[1:]) * (1.0 - max(floor, final.noise)))
