"""Whole-program latency: the same program in several fresh processes, timed in turn, so that a drifting machine is fair."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from autotune.compiler import default_device
from autotune.errors import ScriptError
from autotune.measuring.runner import device_lock

PEAK = """
import time, numpy as np
a, b = (np.random.default_rng(i).standard_normal((1024, 1024), dtype=np.float32) for i in range(2))
times = []
for _ in range(30):
    started = time.perf_counter(); a @ b; times.append(time.perf_counter() - started)
print(2 * 1024**3 / min(times))
"""
WARM_UP = 3  # calls before timing: a TinyJit runs plainly, then captures, then replays


@dataclass(frozen=True)
class Variant:
    """One way to run the program: a command, and what to add to its environment."""

    command: Sequence[str]
    env: Mapping[str, str]


@dataclass(frozen=True)
class Latency:
    samples: list[float]  # seconds
    output: np.ndarray  # of the last call, flattened
    started: float  # seconds until it had warmed up: with BEAM the search is in there

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples)


def core_peak() -> float:
    """Floating-point operations a second of one core, as numpy's matmul of float32 reaches them in a fresh process: on one
    thread, whatever BLAS kernel the environment had asked for."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS")} | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PEAK], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def serve(call: Callable[[], np.ndarray]) -> None:
    """In the child: answer each line on standard input with the seconds of one call and its output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for _ in range(WARM_UP):
        call()
    answers.write("ready\n")
    answers.flush()
    for _ in sys.stdin:
        started = time.perf_counter()
        output = call()
        seconds = time.perf_counter() - started
        answers.write(json.dumps([seconds, output.astype(np.float64).ravel().tolist()]) + "\n")
        answers.flush()


def compare(variants: Mapping[str, Variant], rounds: int = 15) -> dict[str, Latency]:
    """Start every variant, let each warm up alone, then time them in turn. Raises ScriptError when one of them ends."""
    children: dict[str, subprocess.Popen[str]] = {}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    outputs: dict[str, list[float]] = {}
    started: dict[str, float] = {}
    try:
        for name, variant in tqdm(variants.items(), desc="starting"):
            began = time.perf_counter()
            children[name] = subprocess.Popen(variant.command, env={**os.environ, **variant.env}, stdin=subprocess.PIPE,
                                              stdout=subprocess.PIPE, text=True)  # fmt: skip
            while _line(children[name], name) != "ready\n":  # what else it prints as it starts is its own
                pass
            started[name] = time.perf_counter() - began
        with device_lock(default_device(), exclusive=True):
            for _ in tqdm(range(rounds), desc="whole program"):
                for name, child in children.items():
                    assert child.stdin is not None
                    with contextlib.suppress(BrokenPipeError):  # it is gone, which its silence will tell
                        child.stdin.write("\n")
                        child.stdin.flush()
                    seconds, outputs[name] = json.loads(_line(child, name))
                    samples[name].append(seconds)
    finally:
        for child in children.values():
            _end(child)
    return {name: Latency(samples[name], np.array(outputs[name]), started[name]) for name in variants}


def _end(child: subprocess.Popen[str]) -> None:
    """Let a child leave by itself at the end of its input, so that tinygrad can put its worker pool away; else kill it."""
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it is gone already
        child.stdin.close()
    try:
        child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _line(child: subprocess.Popen[str], name: str) -> str:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise ScriptError(f"the process that runs {name} ended with status {child.wait()}; its error stands above")
    return line
