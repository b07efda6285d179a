"""What a schedule makes of a kernel's loops, however it came about: many schedules are one program.

A tile in registers is unrolled whole, so the order of the splits into it does not matter; and a loop that was split twice by two
was split by four.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from autotune.compiler import OptOps
from autotune.features import IN_REGISTERS
from autotune.space import Axis, State


def nest(state: State) -> Hashable:
    """Equal for two schedules of a kernel that are, but for rare cases, one binary: the loops in order, each with the part of the
    kernel's own loop that it runs over, then the tile."""
    loops = _joined(a for a in reversed(state.axes) if a.kind not in IN_REGISTERS)
    tile = sorted((a for a in state.axes if a.kind in IN_REGISTERS), key=lambda a: (a.kind.value, a.origin, a.step))
    tensor_core = state.schedule[:1] if any(o.op is OptOps.TC for o in state.schedule[:1]) else ()
    return loops, _joined(tile), state.no_locals, tensor_core


def _joined(axes: Iterable[Axis]) -> tuple[tuple[Hashable, ...], ...]:
    """The innermost first; where one goes on where the one before ends, they are one."""
    found: list[tuple[Hashable, ...]] = []
    last: Axis | None = None
    size = 1
    for axis in axes:
        whole = last is not None and (last.kind, last.origin, last.step * size) == (axis.kind, axis.origin, axis.step)
        if whole and not (last.factor or axis.factor):  # type: ignore[union-attr]
            *same, _, masked = found.pop()
            size *= axis.size
            found.append((*same, size, masked or axis.masked))
        else:
            last, size = axis, axis.size
            found.append((axis.kind, axis.origin, axis.step, axis.factor, size, axis.masked))
    return tuple(found)
