"""The child process in which candidates are compiled or run: `python -m autotune.measuring.worker DEVICE`.

It reads one JSON request a line and answers one JSON line each, so that whatever a candidate does to it (a crash, an
endless loop) is seen by its parent as silence. It never reads pickles and never imports the user's script.
"""

from __future__ import annotations

import base64
import gc
import json
import os
import queue
import signal
import sqlite3
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from tinygrad import Tensor

from autotune.compiler import Binary
from autotune.errors import AutotuneError
from autotune.kernel import kernel_from_json, schedule_from_json, schedule_to_json
from autotune.measuring.bench import Bench, WrongOutput, compile_outcome
from autotune.measuring.child import MEMORY_LIMIT

# of all buffers of the kernels that are held, of the latest alone it may be more: prepared, a kernel takes six times as much, and twelve while that
# is done; none may fail for want of memory that others keep
HELD_BYTES = min(MEMORY_LIMIT // 32, 512 << 20)


def binary_to_json(binary: Binary) -> dict[str, Any]:
    """Its fields and its `code_hash`."""
    library = base64.b64encode(binary.library).decode()
    return {**binary.__dict__, "library": library, "code_hash": binary.code_hash}


def binary_from_json(data: dict[str, Any]) -> Binary:
    """The counterpart of `binary_to_json`: between our own processes only, no file holds one."""
    signature = tuple((name, slot, dtype, tuple(shape)) for name, slot, dtype, shape in data["signature"])
    launches = tuple((tuple(g), None if local is None else tuple(local), tuple(v)) for g, local, v in data["launches"])
    return Binary(base64.b64decode(data["library"]), signature, tuple(data["slots"]), tuple(data["outputs"]),
                   tuple(data["inputs"]), launches)  # fmt: skip


class Worker:
    """Holds the kernel at hand, and those before it as long as there is room: a search goes from kernel to kernel and comes back,
    and preparing one costs as much as some trials."""

    def __init__(self, device: str):
        self.device = device
        self.benches: OrderedDict[tuple[str, int], Bench] = (
            OrderedDict()
        )  # by kernel and seed; the one at hand is the last

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request. The `do` field names one of the methods below."""
        actions: dict[str, Callable[..., dict[str, Any]]] = {
            "probe": self.probe, "kernel": self.kernel, "prepare": self.prepare, "compile": self.compile,
            "measure": self.measure, "duel": self.duel,
        }  # fmt: skip
        return actions[request.pop("do")](**request)

    def probe(self) -> dict[str, Any]:
        """Does the device work at all?"""
        return {"works": (Tensor([1.0, 2.0], device=self.device) + 1).tolist() == [2.0, 3.0]}

    def kernel(self, kernel: dict[str, Any], seed: int) -> dict[str, Any]:
        parsed = kernel_from_json(kernel)
        key = parsed.key, seed
        bench = self.benches.pop(key, None) or Bench(parsed, self.device, seed)
        room = HELD_BYTES - bench.nbytes
        while self.benches and sum(b.nbytes for b in self.benches.values()) > room:
            self.benches.popitem(last=False)[1].close()  # its buffers go before those of the next kernel come
        self.benches[key] = bench
        return {"baselines": [schedule_to_json(s) for s in bench.baseline_schedules]}

    def prepare(self) -> dict[str, Any]:
        return {"seconds": self._bench().prepare()}

    def compile(self, schedule: list[Any]) -> dict[str, Any]:
        verdict, binary, seconds, detail = compile_outcome(self._bench(), schedule_from_json(schedule))
        data = None if binary is None else binary_to_json(binary)
        return {"verdict": verdict, "binary": data, "compile_seconds": seconds, "detail": detail}

    def measure(self, binary: dict[str, Any], cutoff: float | None) -> dict[str, Any]:
        return self._bench().measure(binary_from_json(binary), cutoff).__dict__

    def duel(self, binaries: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
        try:
            return {"samples": self._bench().duel([binary_from_json(b) for b in binaries], seconds)}
        except WrongOutput as wrong:
            return {"wrong": str(wrong), "index": wrong.index}

    def _bench(self) -> Bench:
        if not self.benches:
            raise AutotuneError("no kernel was sent")
        return next(reversed(self.benches.values()))


def serve(requests: Iterator[str], answers: TextIO, device: str) -> None:
    """Answer requests as long as there are any."""
    worker = Worker(device)
    for line in requests:
        try:
            answer = worker.handle(json.loads(line))
        except Exception as error:  # told to the parent, which decides whose fault it is
            outside = isinstance(error, OSError | sqlite3.Error)  # no compiler, a full disk: no candidate's fault
            answer = {"error": f"{type(error).__name__}: {str(error)[:300]}", "environment": outside}
        try:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        except BrokenPipeError:  # the parent is gone
            return


def lines_until_the_parent_dies(requests: TextIO) -> Iterator[str]:
    """Lines of a pipe. Its end is seen even while a candidate runs, and ends this process with what it started."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in requests:
            lines.put(line)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield lines.get()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it finishes the trial under way
    if sys.platform == "linux":
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # where memory runs out, it is this process that goes
    gc.freeze()  # tinygrad makes and drops millions of small objects: looking for cycles among them all the time
    gc.set_threshold(100_000, 20, 20)  # costs a fifth of a compilation
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a compiler or kernel prints must not look like an answer
    serve(lines_until_the_parent_dies(sys.stdin), answers, sys.argv[1])


if __name__ == "__main__":
    main()
