"""The child process in which candidates are compiled and run: `python -m autotune.worker DEVICE`.

It reads one JSON request a line and answers one JSON line each, so that whatever a candidate does to it (a crash, an
endless loop) is seen by its parent as silence. It never reads pickles and never imports the user's script.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

from autotune.errors import AutotuneError
from autotune.kernel import kernel_from_json, schedule_from_json, schedule_to_json
from autotune.measure import Bench, compile_outcome


class Worker:
    """Holds the kernel at hand; forgets it when the next one comes."""

    def __init__(self, device: str):
        self.device = device
        self.bench: Bench | None = None
        self.key = ""

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request. The `do` field names one of the methods below."""
        actions: dict[str, Callable[..., dict[str, Any]]] = {
            "kernel": self.kernel, "compile": self.compile, "measure": self.measure, "duel": self.duel,
        }  # fmt: skip
        return actions[request.pop("do")](**request)

    def kernel(self, kernel: dict[str, Any]) -> dict[str, Any]:
        if kernel["key"] != self.key or self.bench is None:
            self.bench = Bench(kernel_from_json(kernel), self.device)
            self.key = kernel["key"]
        return {"baselines": [schedule_to_json(s) for s in self.bench.baseline_schedules()]}

    def compile(self, schedule: list[Any]) -> dict[str, Any]:
        verdict, code_hash, seconds, detail = compile_outcome(self._bench(), schedule_from_json(schedule))
        return {"verdict": verdict, "code_hash": code_hash, "compile_seconds": seconds, "detail": detail}

    def measure(self, schedule: list[Any], cutoff: float | None) -> dict[str, Any]:
        outcome = self._bench().measure(schedule_from_json(schedule), cutoff)
        return {"verdict": outcome.verdict, "samples": outcome.samples, "detail": outcome.detail}

    def duel(self, schedules: list[Any]) -> dict[str, Any]:
        return {"samples": self._bench().duel([schedule_from_json(s) for s in schedules])}

    def _bench(self) -> Bench:
        if self.bench is None:
            raise AutotuneError("no kernel was sent")
        return self.bench


def serve(requests: TextIO, answers: TextIO, device: str) -> None:
    """Answer requests until the parent closes the pipe."""
    worker = Worker(device)
    for line in requests:
        try:
            answer = worker.handle(json.loads(line))
        except MemoryError:
            answer = {"error": "MemoryError: the candidate does not fit into memory"}
        except Exception as error:  # told to the parent, which decides whose fault it is
            answer = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        try:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        except BrokenPipeError:  # the parent is gone
            return


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it finishes the trial under way
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a compiler or kernel prints must not look like an answer
    serve(sys.stdin, answers, sys.argv[1])


if __name__ == "__main__":
    main()
