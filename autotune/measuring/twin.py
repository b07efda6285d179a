"""The float64 twin of a kernel on a device: what its outputs should be in each case, and how far off they may be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from autotune.compiler import compile_schedule
from autotune.measuring.buffers import GuardedBuffer, buffers_of
from autotune.measuring.inputs import Case
from autotune.measuring.reference import NoReference, reference
from autotune.measuring.verify import unwritten_in, values_of

if TYPE_CHECKING:
    from autotune.measuring.bench import Bench


class Twin:
    """The float64 twin of a kernel with buffers of its own. Raises NoReference, also where the device has no float64."""

    def __init__(self, bench: Bench):
        self.bench, self.reference = bench, reference(bench.kernel.ast)
        try:
            binary = compile_schedule(self.reference.ast, (), bench.renderer, 0, bench.sizes)
            self.run = binary.load(bench.device)
        except Exception as error:  # a compiler without float64 fails in its own way, and so does its runtime
            raise NoReference(str(error)) from None
        self.binary, self.params = binary, buffers_of(self.reference.ast)
        self.buffers = {s: GuardedBuffer(bench.device, p.dtype, p.max_numel(), s) for s, p in self.params.items()}
        self.results: dict[tuple[str, int], dict[int, np.ndarray]] = {}

    def expected(self, case: Case, slot: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """(values in float64, or as they are for other dtypes; error bound or None; where nothing is written or None)"""
        raw, dtype = self._outputs(case, 0xFF)[slot], self.params[slot].dtype
        bound_slot = self.reference.bounds.get(slot)
        bound = None if bound_slot is None else self._outputs(case, 0xFF)[bound_slot].view(np.float64)
        unwritten = None
        if slot not in self.binary.inputs:
            unwritten = unwritten_in(raw, dtype.itemsize, lambda: self._outputs(case, 0x00)[slot], 0xFF)
        return raw.view(np.bool_) if dtype.name == "bool" else values_of(raw, dtype), bound, unwritten

    def _outputs(self, case: Case, poison: int) -> dict[int, np.ndarray]:
        if (case.name, poison) not in self.results:
            self.results = {key: kept for key, kept in self.results.items() if key[0] == case.name}
            for slot, buffer in self.buffers.items():
                bound = slot not in self.bench.params
                buffer.write(poison if bound or slot in self.bench.written_only else self._input(case, slot))
            self.run({slot: b.buffer for slot, b in self.buffers.items()}, case.size)
            self.results[case.name, poison] = {s: self.buffers[s].read()[0].copy() for s in self.binary.outputs}
        return self.results[case.name, poison]

    def _input(self, case: Case, slot: int) -> np.ndarray:
        data, dtype = self.bench.inputs[case.name][slot], self.bench.params[slot].dtype
        is_float = self.params[slot].dtype is not dtype
        return values_of(data.view(np.uint8), dtype).astype(np.float64) if is_float else data
