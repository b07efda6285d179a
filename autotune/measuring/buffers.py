"""Buffers that tell when a kernel leaves them: guards in front and behind, and on the CPU pages behind those that trap."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np

from autotune.compiler import (
    Buffer,
    BufferSpec,
    DType,
    Ops,
    UOp,
    backend_of,
    dtypes,
    has_offsets,
    read_buffer,
    write_buffer,
)

GUARD = 4096  # bytes in front and behind; a whole page, so that the data keeps the alignment of a fresh buffer
FENCE = 16 << 20  # bytes of address space on both sides that cannot be touched, on the CPU: far strays crash the child
GUARD_BYTES = range(
    0x7E, 0x6E, -1
)  # large numbers in every float format: what reads them goes wrong visibly. Each buffer
#                                      has its own, so that a copy which goes too far changes what it copies to
PROT_NONE = 0


class GuardedBuffer:
    """`buffer` is what the kernel gets; front guards need a backend that can address the middle of a buffer."""

    def __init__(self, device: str, dtype: DType, elements: int, slot: int = 0):
        self.guard = GUARD_BYTES[slot % len(GUARD_BYTES)]
        self.front = GUARD if has_offsets(device) else 0
        self.nbytes = elements * dtype.itemsize
        fenced = backend_of(device) == "CPU" and sys.platform == "linux"
        # where a fence stands it is right behind the last page of the data, as far as a program can be sure to own
        total = -(-(self.front + self.nbytes + (0 if fenced else GUARD)) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.fence = _Fence(total) if fenced else None
        options = None if self.fence is None else BufferSpec(external_ptr=self.fence.address)
        self.base = Buffer(device, total, dtypes.uint8, options=options).allocate()
        inside = Buffer(device, elements, dtype, base=self.base, offset=self.front).allocate() if self.front else None
        self.buffer = self.base if inside is None else inside
        self._contents = np.full(total, self.guard, np.uint8)

    def write(self, data: np.ndarray | int) -> None:
        """Fill with an array's bytes, or with one byte over and over; the guards are made whole again."""
        end = self.front + self.nbytes
        self._contents[: self.front] = self._contents[end:] = self.guard
        inside = self._contents[self.front : end]
        inside[:] = data if isinstance(data, int) else data.view(np.uint8)
        write_buffer(self.base, self._contents.data)

    def read(self) -> tuple[np.ndarray, str]:
        """(contents as bytes, "" or which guard was touched); the contents are overwritten by the next call."""
        read_buffer(self.base, self._contents.data)
        end = self.front + self.nbytes
        if not (self._contents[: self.front] == self.guard).all():
            return self._contents[self.front : end], "in front of the start"
        return self._contents[self.front : end], "" if (self._contents[end:] == self.guard).all() else "behind the end"


def buffers_of(ast: UOp) -> dict[int, UOp]:
    """The buffers of a kernel by slot, as the PARAMs that stand for them."""
    return {u.arg.slot: u for u in ast.toposort() if u.op is Ops.PARAM and u.arg.slot >= 0}


class _Fence:
    """Pages between two stretches of address space that trap."""

    def __init__(self, size: int):
        # shared, as tinygrad's own: private memory may get huge pages, which programs do not have
        self.map = mmap.mmap(-1, FENCE + size + FENCE, mmap.MAP_ANON | mmap.MAP_SHARED)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.address = start + FENCE
        libc = ctypes.CDLL(None, use_errno=True)
        for edge in (start, self.address + size):
            if libc.mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(FENCE), PROT_NONE):
                raise MemoryError(f"mprotect failed with errno {ctypes.get_errno()}")
