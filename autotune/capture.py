"""Seeing what a program runs: every kernel, how often, and on which device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from autotune.compiler import UOp, canonical, is_tunable, observe_kernels, renderer_of
from autotune.errors import CodecError, IllegalAction
from autotune.kernel import Kernel, kernel_to_json


@dataclass
class Program:
    """The kernels of a captured program. `calls[key]` counts launches, replays of a TinyJit included."""

    kernels: dict[str, Kernel] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    devices: dict[str, str] = field(default_factory=dict)
    skipped: int = 0  # launches of kernels that cannot be tuned: their schedule is fixed, or an op is not supported

    def for_device(self, device: str) -> list[Kernel]:
        return [k for key, k in self.kernels.items() if self.devices[key] == device]


@contextlib.contextmanager
def capture() -> Iterator[Program]:
    """Record every kernel that tinygrad code inside the `with` block launches.

    Kernels of a TinyJit that was captured before the block are not seen: let its first calls happen inside.
    """
    program = Program()
    known: dict[UOp, Kernel | None] = {}

    def on_launch(raw: UOp, device: str, var_vals: dict[str, int]) -> None:
        if raw not in known:
            known[raw] = _kernel_of(raw, device)
        kernel = known[raw]
        if kernel is None:
            program.skipped += 1
            return
        program.kernels.setdefault(kernel.key, kernel)
        program.devices.setdefault(kernel.key, device)
        program.calls[kernel.key] = program.calls.get(kernel.key, 0) + 1

    with observe_kernels(on_launch):
        yield program


def _kernel_of(raw: UOp, device: str) -> Kernel | None:
    if not is_tunable(raw):
        return None
    try:
        kernel = Kernel.from_ast(canonical(raw, renderer_of(device)))
        kernel_to_json(kernel)  # what cannot be stored cannot be measured in a child either
    except (CodecError, IllegalAction):
        return None
    return kernel
