"""How a kernel's loops walk its memory: one `Access` for each indexing of a buffer, with a stride per loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autotune.compiler import Ops, UOp


@dataclass(frozen=True)
class Access:
    """One load or store. `strides` maps a range to the elements that the address moves when it advances by one."""

    slot: int  # which buffer of the kernel
    itemsize: int  # bytes of an element
    elements: int  # size of the whole buffer
    is_store: bool
    is_gated: bool  # reads or writes only where a condition holds (padding)
    is_linear: bool  # False: a division or a table look-up stands in the index, and strides are only partly known
    strides: Mapping[UOp, int]


def accesses_of(ast: UOp) -> tuple[Access, ...]:
    """All accesses of an AST, stores first, in an order that depends on the AST alone."""
    stores = {u.src[0] for u in ast.toposort() if u.op is Ops.STORE}
    found = [_access(u, u in stores) for u in ast.toposort() if u.op is Ops.INDEX and u.src[0].op is Ops.PARAM]
    return tuple(sorted(found, key=lambda a: not a.is_store))


def _access(index: UOp, is_store: bool) -> Access:
    buffer, address = index.src[0], index.src[1]
    strides: dict[UOp, int] = {}
    is_linear = _add_strides(address.get_idx(), 1, strides)
    gated = address.get_valid().op is not Ops.CONST
    return Access(buffer.arg.slot, buffer.dtype.itemsize, buffer.max_numel(), is_store, gated, is_linear, strides)


def _add_strides(expression: UOp, scale: int, strides: dict[UOp, int]) -> bool:
    """Add the coefficient of each range in an index expression to `strides`; False where it is no linear expression."""
    if expression.op is Ops.RANGE:
        strides[expression] = strides.get(expression, 0) + scale
        return True
    if expression.op is Ops.CONST:
        return True
    if expression.op is Ops.ADD:
        return all([_add_strides(s, scale, strides) for s in expression.src])
    if expression.op is Ops.MUL and expression.src[1].op is Ops.CONST:
        return _add_strides(expression.src[0], scale * int(expression.src[1].val), strides)
    if expression.op is Ops.CAST:
        return _add_strides(expression.src[0], scale, strides)
    for r in expression.ranges:  # unknown: count it as moving, so that it never looks like a free broadcast
        strides.setdefault(r, scale)
    return False
