"""Schedule state -> numbers: what the simulator and the policy see.

`summary(state)` [S]: hand-made numbers of the kernel and of the schedule as a whole (work, tiles, loads per vector).
`observe(state)` -> (state vector [D], action features [A, F]): the summary, then a slot for each loop; and for each
action what it would do to which loop. Sizes are log2, clipped and scaled to about [-1, 3]; nothing is learned here.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np

from autotune.compiler import AxisType, Ops, Opt, OptOps
from autotune.kernel import ARITHMETIC, FLOATS, Kernel
from autotune.space import ACTIONS, MAX_STEPS, N_ACTIONS, SPLIT_TO, Axis, State, resolve_axis

KINDS = (AxisType.GLOBAL, AxisType.THREAD, AxisType.LOCAL, AxisType.WARP, AxisType.WEAK, AxisType.UPCAST,
         AxisType.GROUP_REDUCE, AxisType.REDUCE, AxisType.UNROLL)  # fmt: skip
IN_REGISTERS = (AxisType.UPCAST, AxisType.UNROLL)
REDUCES = (AxisType.GROUP_REDUCE, AxisType.REDUCE, AxisType.UNROLL)
OPS = tuple(OptOps)
COUNTED = (
    "ADD",
    "MUL",
    "MAX",
    "CMPLT",
    "WHERE",
    "EXP2",
    "LOG2",
    "SIN",
    "SQRT",
    "RECIPROCAL",
    "FLOORDIV",
    "FLOORMOD",
    "CAST",
)
MAX_AXES, MAX_ACCESSES = 10, 4
VECTOR = 16  # float32 lanes of the widest vectors that a CPU of today has; only a scale for features


@functools.lru_cache(1 << 16)  # sizes come again and again
def log2(value: float) -> float:
    """log2(1 + value) / 8: about 0 to 3 for any size that occurs."""
    return math.log2(1.0 + value) / 8.0


def _twos(size: int) -> list[float]:
    """log2 of the largest power of two in a size, scaled, and of the odd rest: compilers fill vectors by powers of two."""
    power = size & -size
    return [math.log2(power) / 4.0, math.log2(size // power) / 2.0]


def summary(state: State) -> np.ndarray:
    """Hand-made numbers of a scheduled kernel [S] float32, read-only. Only schedules of one kernel need to be told apart by them."""
    key = "summary", state.schedule
    if key not in state.known:
        state.known[key] = _summary(state)
        state.known[key].flags.writeable = False
    return state.known[key]


def _summary(state: State) -> np.ndarray:
    values = [*kernel_part(state.kernel), *_tile_part(state)]
    accesses = [_access_part(state, i) for i in range(min(len(state.accesses), MAX_ACCESSES))]
    width = len(_access_part(state, 0)) if state.accesses else 0
    padded = accesses + [[0.0] * width] * (MAX_ACCESSES - len(accesses))
    return np.array(values + [v for row in padded for v in row] + _traffic_part(state), dtype=np.float32)


def kernel_part(kernel: Kernel) -> list[float]:
    """What no schedule changes: work, bytes, arithmetic, types. Computed once for each kernel."""
    found = _KERNEL_PARTS.get(kernel.key)
    if found is None:
        nodes = kernel.ast.toposort()
        counts = Counter(u.op.name for u in nodes if u.op.name in ARITHMETIC or u.op is Ops.CAST)
        reduces = [u for u in nodes if u.op is Ops.REDUCE]
        flops, size = kernel.work
        types = [u.dtype for u in nodes if u.op is Ops.PARAM and u.arg.slot >= 0]
        found = [log2(flops), log2(size), math.log2((flops + 1) / (size + 1)) / 8, len(reduces) / 2.0]
        found += [float(any(u.arg[0] is op for u in reduces)) for op in (Ops.ADD, Ops.MAX)]
        found += [log2(counts[name]) for name in COUNTED]
        found += [
            sum(t in FLOATS for t in types) / max(1, len(types)),
            max((t.itemsize for t in types), default=0) / 8.0,
        ]
        found += [float(bool(kernel.variables))]
        _KERNEL_PARTS[kernel.key] = found
    return found


_KERNEL_PARTS: dict[str, list[float]] = {}


def _tile_part(state: State) -> list[float]:
    """Sizes of the loop nest by kind, and of the innermost tile."""
    target = state.target
    values = [log2(state.sizes(kind)) for kind in KINDS]
    values += [sum(a.kind is kind for a in state.axes) / 4.0 for kind in KINDS]
    serial = state.sizes(AxisType.WEAK, AxisType.GLOBAL, AxisType.REDUCE, AxisType.THREAD)
    upcast, unroll = state.sizes(AxisType.UPCAST), state.sizes(AxisType.UNROLL)
    reduce_left = state.sizes(AxisType.REDUCE)
    padded = math.prod(a.size for a in state.axes) / state.kernel.iterations
    values += [
        log2(serial),
        log2(upcast * unroll),
        math.log2(padded + 1),
        float(state.no_locals),
        len(state.schedule) / MAX_STEPS,
    ]
    values += [float(target.has_local), float(reduce_left == 1), min(upcast, 64) / 64.0, min(unroll, 32) / 32.0]
    inner = [a for a in state.axes if a.kind is AxisType.REDUCE]
    values += [log2(inner[-1].size) if inner else 0.0, log2(inner[0].size) if inner else 0.0]
    values += [
        sum(a.masked and a.kind in IN_REGISTERS for a in state.axes) / 2.0,
        sum(a.masked for a in state.axes) / 4.0,
    ]
    registers = [a for a in state.axes if a.kind in IN_REGISTERS]
    return values + _twos(upcast) + _twos(unroll) + _twos(registers[-1].size if registers else 1)


def _access_part(state: State, i: int) -> list[float]:
    """One load or store inside the register tile: how many addresses, in how long contiguous runs, along which of its loops."""
    access = state.accesses[i]
    registers = [a for a in state.axes if a.kind in IN_REGISTERS]
    moving = [a for a in registers if a.strides[i]]
    touched = math.prod(a.size for a in moving)
    free = math.prod(a.size for a in registers) / touched  # how often each loaded value is used
    run = _contiguous_run(moving, i)
    loops = [a for a in state.axes if a.kind not in IN_REGISTERS]
    innermost = _innermost(state)
    step = abs(innermost.strides[i]) if innermost else 0
    unit = [a for a in loops if abs(a.strides[i]) == 1]
    lanes = [(place, a.size) for place, a in enumerate(registers, 1) if abs(a.strides[i]) == 1]
    place, lane = lanes[0] if lanes else (0, 1)
    return [
        1.0, float(access.is_store), float(access.is_gated), float(access.is_linear), access.itemsize / 8.0,
        log2(access.elements), log2(touched), log2(free), log2(run), min(run, VECTOR) / VECTOR, log2(touched / run),
        log2(step), float(step == 0), float(step == 1), log2(math.prod(a.size for a in loops if a.strides[i])),
        log2(math.prod(a.size for a in loops if not a.strides[i])), log2(unit[0].size) if unit else 0.0,
        log2(min((abs(a.strides[i]) for a in moving), default=0)), *_twos(run), *_twos(lane), place / 4.0,
    ]  # fmt: skip


def _contiguous_run(moving: list[Axis], i: int) -> int:
    """Elements of the tile that lie side by side in memory, so that one vector instruction can take them."""
    run = 1
    for axis in sorted(moving, key=lambda a: abs(a.strides[i])):
        if abs(axis.strides[i]) != run:
            break
        run *= axis.size
    return run


def _innermost(state: State) -> Axis | None:
    """The loop that turns fastest: the last reduce loop, else the last plain one."""
    loops = [a for a in state.axes if a.kind in (AxisType.REDUCE, AxisType.WEAK, AxisType.GLOBAL, AxisType.LOCAL)]
    return loops[-1] if loops else None


def _traffic_part(state: State) -> list[float]:
    """Totals over all accesses: loads per arithmetic tile, vectorisable share, footprint in the inner tile and its rows;
    `even_vectors` are those that are needed where only a run's power of two fills one."""
    tile = state.sizes(*IN_REGISTERS)
    loads = vectors = even_vectors = stored = footprint = row = 0.0
    inner = [a for a in state.axes if a.kind in (AxisType.REDUCE, *IN_REGISTERS)]
    for i, access in enumerate(state.accesses):
        moving = [a for a in state.axes if a.kind in IN_REGISTERS and a.strides[i]]
        touched, run = math.prod(a.size for a in moving), _contiguous_run(moving, i)
        vectors += touched / min(run, VECTOR)
        even_vectors += touched / min(run & -run, VECTOR)
        loads += 0 if access.is_store else touched
        stored += touched if access.is_store else 0
        footprint += access.itemsize * math.prod(a.size for a in inner if a.strides[i])
        row += access.itemsize * min(access.elements, math.prod(a.size for a in state.axes if a.strides[i]))
    accumulators = state.sizes(AxisType.UPCAST) if any(a.kind in REDUCES for a in state.axes) else 0
    return [log2(loads), log2(vectors), log2(stored), log2(tile / max(vectors, 1e-9)), log2(footprint), log2(row),
            log2(accumulators), float(accumulators > 32), float(accumulators > 128), len(state.accesses) / 4.0,
            log2(even_vectors), log2(tile / max(even_vectors, 1e-9))]  # fmt: skip


def axis_slot(axis: Axis, position: int, accesses: int) -> list[float]:
    """A loop as the policy sees it."""
    values = [float(axis.kind is kind) for kind in KINDS]
    values += [
        log2(axis.size),
        min(axis.size, 16) / 16.0,
        float(bool(axis.factor)),
        float(axis.masked),
        position / MAX_AXES,
    ]
    values += [float(axis.size % n == 0) for n in (2, 3, 4, 5, 7, 8, 16)]
    for i in range(MAX_ACCESSES):
        stride = abs(axis.strides[i]) if i < accesses else 0
        values += [log2(stride), float(stride == 0), float(stride == 1)]
    return values


AXIS_WIDTH = len(KINDS) + 5 + 7 + 3 * MAX_ACCESSES
_EMPTY_AXIS = [0.0] * AXIS_WIDTH
_OP_ROWS = np.array(
    [[float(a is not None and a.op is op) for op in OPS] + [float(a is None)] for a in ACTIONS], dtype=np.float32
)  # [A, ops + 1]
EFFECT_WIDTH = 6
_NO_EFFECT = [0.0] * EFFECT_WIDTH
ACTION_WIDTH = _OP_ROWS.shape[1] + EFFECT_WIDTH + AXIS_WIDTH


View = Callable[[State, np.ndarray], tuple[np.ndarray, np.ndarray]]  # (state, mask) -> (vector [D], actions [A, F])


def observe(state: State, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(state vector [D] float32, action features [A, F] float32); rows of actions outside `mask` [A] are zero."""
    slots = [axis_slot(a, i, len(state.accesses)) for i, a in enumerate(state.axes[:MAX_AXES])]
    padded = np.array(slots + [_EMPTY_AXIS] * (MAX_AXES + 1 - len(slots)), dtype=np.float32)  # the last one stays empty
    vector = np.concatenate([summary(state), padded[:MAX_AXES].reshape(-1)])
    legal, unrolled = np.flatnonzero(mask), state.sizes(*IN_REGISTERS)
    found = [_effect(state, ACTIONS[i], unrolled) for i in legal]  # (effect, position), an action each
    ops = _OP_ROWS.shape[1]
    actions = np.zeros((N_ACTIONS, ACTION_WIDTH), dtype=np.float32)
    actions[legal, :ops] = _OP_ROWS[legal]
    actions[legal, ops : ops + EFFECT_WIDTH] = np.array([effect for effect, _ in found], dtype=np.float32).reshape(
        -1, EFFECT_WIDTH
    )
    actions[legal, ops + EFFECT_WIDTH :] = padded[np.array([position for _, position in found], dtype=int)]
    return vector, actions


def _effect(state: State, opt: Opt | None, unrolled: int) -> tuple[list[float], int]:
    """What an action does, and the slot of the loop to which it does it; MAX_AXES: of none."""
    # the `axis` of a tensor-core action counts ways to use it, not loops
    position = None if opt is None or opt.op is OptOps.TC else resolve_axis(state, opt)
    if opt is None or position is None or position < 0:
        return _NO_EFFECT, MAX_AXES
    axis = state.axes[position]
    number = opt.arg if isinstance(opt.arg, int) else 0
    amount = axis.size if number == 0 or opt.op not in SPLIT_TO else number
    effect = [log2(amount), min(amount, 16) / 16.0, float(amount == axis.size), log2(axis.size / amount),
              log2(unrolled * amount), log2(number)]  # fmt: skip
    return effect, min(position, MAX_AXES)
