"""Programs that really run: with which schedules they were compiled, and records that hold a winner for each of their kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tinygrad import Tensor
from tinygrad.engine import realize

import autotune
from autotune.compiler import Ops, Opt, OptOps, default_device, fingerprint, hand_coded, renderer_of
from autotune.kernel import Schedule
from autotune.measuring.bench import PROTOCOL
from autotune.records import Final, Records, Trial

DEVICE = default_device()
WINNER = (Opt(OptOps.UPCAST, 0, 2), Opt(OptOps.UPCAST, 0, 3))  # not what the heuristic would do


@contextlib.contextmanager
def launched() -> Iterator[list[tuple[Opt, ...]]]:
    """The schedules that the launched programs were really compiled with, in order."""
    found: list[tuple[Opt, ...]] = []
    original = realize.track_stats

    def track(ctx, call, *rest):
        for _, kernel in realize.get_call_kernels(call):
            for program in (u for u in kernel.src[0].toposort() if u.op is Ops.PROGRAM):
                found.append(tuple(program.src[0].arg.applied_opts))
        original(ctx, call, *rest)

    realize.track_stats = track
    try:
        yield found
    finally:
        realize.track_stats = original


def array(*shape: int, seed: int = 0) -> Tensor:
    return Tensor(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).realize()


def records_with(
    path: Path, program: autotune.Program, accepted: bool = True, device: dict | None = None, protocol: int = PROTOCOL,
    winner: Schedule = WINNER,
) -> Records:  # fmt: skip
    """A records file as tuning leaves it, written by hand: baselines, and a winner for every kernel."""
    records, renderer = Records(path), renderer_of(DEVICE)
    own = records.add_fingerprint(device or fingerprint(DEVICE))
    for kernel in program.kernels.values():
        records.add_kernel(kernel)
        for kind, schedule in (("unoptimized", ()), ("hand_coded", hand_coded(kernel.ast, renderer))):
            records.add_trial(own, Trial(kernel.key, schedule, "ok", (1e-6,), kind=kind), 1)
        records.add_final(own, Final(kernel.key, winner, (1.0,), (2.0,), (2.0,), accepted, protocol))
    return records
