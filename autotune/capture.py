"""Seeing what a program runs: every kernel, how often, and on which device."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from autotune.compiler import UOp, backend_of, canonical, is_tunable, observe_kernels, renderer_of, settings
from autotune.errors import CodecError, IllegalAction
from autotune.kernel import Kernel, kernel_from_json, kernel_to_json


@dataclass
class Program:
    """The kernels of a captured program. `calls[key]` counts launches, replays of a TinyJit included."""

    kernels: dict[str, Kernel] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    devices: dict[str, set[str]] = field(default_factory=dict)  # on which each ran; its calls are of all of them
    settings: dict[str, dict[str, str]] = field(default_factory=dict)  # under which each was first launched
    skipped: int = 0  # launches of kernels that cannot be tuned: their schedule is fixed, or an op is not supported

    def for_device(self, device: str) -> list[Kernel]:
        """What ran on this device, or on another one of its backend: schedules serve all of them."""
        return [k for key, k in self.kernels.items() if backend_of(device) in map(backend_of, self.devices[key])]


@contextlib.contextmanager
def capture() -> Iterator[Program]:
    """Record every kernel that tinygrad code inside the `with` block launches.

    Kernels of a TinyJit that was captured before the block are not seen: let its first calls happen inside.
    """
    program = Program()
    known: dict[tuple[UOp, str], Kernel | None] = {}  # by device, too: each has rewrites of its own

    def on_launch(raw: UOp, device: str, var_vals: dict[str, int]) -> None:
        if (raw, device) not in known:
            known[raw, device] = _kernel_of(raw, device)
        kernel = known[raw, device]
        if kernel is None:
            program.skipped += 1
            return
        if kernel.key not in program.kernels:
            program.kernels[kernel.key], program.settings[kernel.key] = kernel, settings()
        program.devices.setdefault(kernel.key, set()).add(device)
        program.calls[kernel.key] = program.calls.get(kernel.key, 0) + 1

    with observe_kernels(on_launch):
        yield program


def _kernel_of(raw: UOp, device: str) -> Kernel | None:
    if not is_tunable(raw):
        return None
    try:
        kernel = Kernel.from_ast(canonical(raw, renderer_of(device)))
        # what cannot be stored and read back cannot be measured in a child either
        kernel_from_json(json.loads(json.dumps(kernel_to_json(kernel))))
    except (CodecError, IllegalAction):
        return None
    return kernel
