"""The space of schedules: a fixed vocabulary of actions, which of them are legal, and the state that each leads to.

A `State` is what tinygrad's Scheduler would hold, kept as plain numbers (axes with their kinds, sizes and strides), so
that a step costs microseconds and no AST is rewritten. It agrees with tinygrad action by action (tests/autotune/
test_space.py walks both); only tensor-core actions ask tinygrad itself.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import dataclass, field, replace

import numpy as np

from autotune.access import Access, accesses_of
from autotune.compiler import (
    AxisType,
    Ops,
    Opt,
    OptOps,
    Renderer,
    Scheduler,
    apply_opt,
    axis_to_pos,
    launches_freely,
    root_scheduler,
    threadable,
)
from autotune.errors import IllegalAction
from autotune.kernel import Kernel, Schedule, schedule_to_json

MAX_STEPS = 8  # actions in an episode, STOP included in none of them
MAX_UPCAST, MAX_LOCAL = 256, 1024  # BEAM's own limits
MOST_UPCAST, MOST_UNROLL = 16, 32  # in one split: tinygrad's
MAX_LOWERED = 4000.0  # operations that a kernel may be expected to have after lowering: more compiles for ten seconds
STOP = None  # the action that ends an episode; it is the last of the vocabulary


def _vocabulary() -> tuple[Opt | None, ...]:
    """Version 1: BEAM's 193 actions in BEAM's order, then PADTO, NOLOCALS and STOP."""
    opts = [Opt(OptOps.UPCAST, axis, n) for n in (0, 2, 3, 4, 5, 7) for axis in range(8)]
    opts += [Opt(OptOps.UNROLL, axis, n) for n in (0, 4, 7) for axis in range(5)]
    opts += [Opt(OptOps.LOCAL, axis, n) for n in (2, 3, 4, 8, 13, 16, 29) for axis in range(6)]
    opts += [Opt(OptOps.GROUPTOP, axis, n) for n in (13, 16, 28, 29, 32, 49, 64, 256) for axis in range(3)]
    opts += [Opt(OptOps.GROUP, axis, n) for n in (0, 4, 8, 16) for axis in range(3)]
    opts += [Opt(OptOps.LOCAL, 0, 32), Opt(OptOps.LOCAL, 6, 2), Opt(OptOps.TC, 0, (-1, 0, 1))]
    opts += [Opt(OptOps.TC, axis, (-1, 2, 1)) for axis in range(9)]
    opts += [Opt(OptOps.SWAP, a, b) for a in range(5) for b in range(a + 1, 5)]
    opts += [Opt(OptOps.THREAD, axis, n) for n in (2, 3, 4, 5, 8, 12, 16, 24, 32, 64) for axis in range(3)]
    opts += [Opt(OptOps.PADTO, axis, 32) for axis in range(7)] + [Opt(OptOps.NOLOCALS)]
    return (*opts, STOP)


ACTIONS = _vocabulary()
ACTION_INDEX = {action: i for i, action in enumerate(ACTIONS)}
N_ACTIONS = len(ACTIONS)
STOP_INDEX = N_ACTIONS - 1
VOCABULARY = hashlib.sha256(json.dumps(schedule_to_json(ACTIONS[:-1])).encode()).hexdigest()[:16]  # type: ignore[arg-type]

REDUCE_KINDS = (AxisType.GROUP_REDUCE, AxisType.REDUCE)
SPLIT_TO = {OptOps.UPCAST: AxisType.UPCAST, OptOps.UNROLL: AxisType.UNROLL, OptOps.LOCAL: AxisType.LOCAL,
            OptOps.GROUP: AxisType.GROUP_REDUCE, OptOps.GROUPTOP: AxisType.GROUP_REDUCE,
            OptOps.THREAD: AxisType.THREAD}  # fmt: skip
FROM_TOP = (OptOps.GROUPTOP, OptOps.THREAD)  # the new axis takes the high part of the index


@dataclass(frozen=True, slots=True)
class Axis:
    """One loop. `strides[i]` is how far access i moves (in elements) when the loop advances by one."""

    id: tuple[int, ...]
    kind: AxisType
    size: int  # of a symbolic axis: the largest value that it takes
    strides: tuple[int, ...]
    factor: int = 0  # of a symbolic axis: the largest integer known to divide it; 0: the size is a constant
    threadable: bool = False  # part of tinygrad's "globalizable" axes
    groupable: bool = True  # of a reduce axis: its reduce stands in no other reduce
    masked: bool = False  # some access or value is gated by this axis

    def divides(self, amount: int) -> bool:
        return (self.factor or self.size) % amount == 0


@dataclass(frozen=True, slots=True)
class Target:
    """What the legality of an action asks of a renderer."""

    has_local: bool
    has_threads: bool
    shared_max: int
    max_threads: int
    reduce_itemsize: int  # of the kernel's first reduce; 0: none
    free_launch: bool  # whether a kernel without locals may be launched in groups of any size


@dataclass(frozen=True)
class State:
    """A kernel with a schedule applied. Immutable; `step` gives the next one."""

    kernel: Kernel
    schedule: Schedule
    axes: tuple[Axis, ...]
    accesses: tuple[Access, ...]
    target: Target
    next_id: int
    no_locals: bool = False
    scheduler: Scheduler | None = field(default=None, compare=False, repr=False)  # root: tinygrad's own, to ask of TC
    root: State | None = field(default=None, compare=False, repr=False)  # the un-optimized state; None: this is it
    # what was worked out before of any state below the same root, by its schedule: equal states are made again and again
    known: dict[tuple[str, Schedule], np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def forget(self, schedule: Schedule) -> None:
        """Whatever was worked out of the state after `schedule`, below the same root."""
        for name in ("mask", "summary"):
            self.known.pop((name, schedule), None)

    def sizes(self, *kinds: AxisType) -> int:
        """Product of the sizes of all axes of these kinds."""
        return math.prod(a.size for a in self.axes if a.kind in kinds)


def root_state(kernel: Kernel, renderer: Renderer) -> State:
    """The state of the un-optimized kernel."""
    return _state_of(kernel, (), root_scheduler(kernel.ast, renderer))


def _state_of(kernel: Kernel, schedule: Schedule, scheduler: Scheduler) -> State:
    renderer, nodes = scheduler.ren, scheduler.ast.toposort()
    accesses, threads = accesses_of(scheduler.ast), threadable(scheduler)
    reduces = [u for u in nodes if u.op is Ops.REDUCE]
    nested = [u for u in reduces if any(o.arg[-1] in (*REDUCE_KINDS, AxisType.UNROLL) for o in u.ranges)]
    inner = {
        r for u in nested for s in u.src[1:] for r in s.ranges
    }  # where a range was split, a source is a sum of two
    gates = [u.src[0] for u in nodes if u.op is Ops.WHERE]
    masked = {r for g in gates for r in g.ranges}
    axes = tuple(
        Axis(
            id=tuple(r.arg[:-1]), kind=r.arg[-1], size=int(r.vmax) + 1,
            strides=tuple(a.strides.get(r, 0) for a in accesses),
            factor=0 if r.src[0].op is Ops.CONST else r.src[0].const_factor(),
            threadable=r in threads, groupable=r not in inner, masked=r in masked,
        )
        for r in scheduler.rngs
    )  # fmt: skip
    first = scheduler.reduceop
    limit = renderer.global_max[0] if renderer.global_max else 0
    target = Target(
        renderer.has_local,
        renderer.has_threads,
        renderer.shared_max,
        limit,
        0 if first is None else first.dtype.itemsize,
        launches_freely(renderer),
    )
    next_id = max((u.arg[0] for u in scheduler.rngs), default=0) + 1
    return State(kernel, schedule, axes, accesses, target, next_id, scheduler=scheduler)


def root_of(state: State) -> State:
    """The un-optimized state of the same kernel."""
    return state if state.root is None else state.root


def step(state: State, action: int) -> State:
    """The state after one action of the vocabulary (not STOP). Raises IllegalAction."""
    opt = ACTIONS[action]
    if opt is STOP:
        raise IllegalAction("STOP ends an episode, it changes no state")
    return apply_to_state(state, opt)


def after(root: State, schedule: Schedule) -> State:
    """The state after a whole schedule. Raises IllegalAction."""
    return functools.reduce(apply_to_state, schedule, root)


def state_after(kernel: Kernel, schedule: Schedule, renderer: Renderer) -> State:
    """The state of a kernel under a whole schedule. Raises IllegalAction."""
    return after(root_state(kernel, renderer), schedule)


def apply_to_state(state: State, opt: Opt) -> State:
    """The state after one Opt. Raises IllegalAction where tinygrad would refuse it."""
    schedule = (*state.schedule, opt)
    if opt.op is OptOps.TC:
        if state.scheduler is None or state.schedule:
            raise IllegalAction("a tensor-core action must be the first")
        found = _state_of(state.kernel, schedule, apply_opt(state.scheduler, opt))
        return replace(found, scheduler=None, root=root_of(state), known=state.known)
    position = resolve_axis(state, opt)
    if position is None or not _legal(state, opt, position):
        raise IllegalAction(f"{opt} is not legal after {len(state.schedule)} actions")
    changed = replace(state, schedule=schedule, scheduler=None, root=root_of(state))
    if opt.op is OptOps.NOLOCALS:
        return replace(changed, no_locals=True)
    axis = state.axes[position]
    others = [a for i, a in enumerate(state.axes) if i != position]
    if opt.op is OptOps.PADTO:
        return replace(
            changed, axes=_ordered([*others, replace(axis, size=_padded(axis.size, _amount(opt, axis)), masked=True)])
        )
    if opt.op is OptOps.SWAP:
        other = state.axes[opt.arg]  # type: ignore[index]
        rest = [a for i, a in enumerate(state.axes) if i not in (position, opt.arg)]
        return replace(changed, axes=_ordered([*rest, replace(axis, id=other.id), replace(other, id=axis.id)]))
    return replace(changed, axes=_ordered([*others, *_split(axis, opt, state.next_id)]), next_id=state.next_id + 1)


def _split(axis: Axis, opt: Opt, new_id: int) -> list[Axis]:
    """tinygrad's shift_to: the axis becomes `size / amount` long, and a new axis of `amount` takes the rest."""
    amount = _amount(opt, axis)
    left = axis.size // amount
    inner, outer = 1, amount  # factors on the strides: new axis, replaced axis
    if opt.op in FROM_TOP:
        inner, outer = left, 1
    new = Axis((new_id,), SPLIT_TO[opt.op], amount, tuple(s * inner for s in axis.strides), groupable=axis.groupable,
               masked=axis.masked)  # fmt: skip
    old = replace(axis, size=left, factor=axis.factor // amount, strides=tuple(s * outer for s in axis.strides))
    return [a for a in (old, new) if a.size > 1]


def _ordered(axes: list[Axis]) -> tuple[Axis, ...]:
    return tuple(sorted(axes, key=lambda a: (axis_to_pos[a.kind], *a.id)))


def _amount(opt: Opt, axis: Axis) -> int:
    return axis.size if opt.arg == 0 else opt.arg  # type: ignore[return-value]


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def resolve_axis(state: State, opt: Opt) -> int | None:
    """Position in `state.axes` that an Opt speaks of (tinygrad counts UNROLL and GROUP among reduce axes); None: none."""
    if opt.axis is None:
        return -1
    if opt.op is OptOps.UNROLL:
        found = [i for i, a in enumerate(state.axes) if a.kind in REDUCE_KINDS and not a.factor]
    elif opt.op in (OptOps.GROUP, OptOps.GROUPTOP):
        found = [i for i, a in enumerate(state.axes) if a.kind is AxisType.REDUCE]
    else:
        found = list(range(len(state.axes)))
    return found[opt.axis] if opt.axis < len(found) else None


def _legal(state: State, opt: Opt, position: int) -> bool:
    """tinygrad's checks in `Scheduler.apply_opt`, on numbers."""
    if opt.op is OptOps.NOLOCALS:
        return not any(a.kind in (AxisType.WARP, AxisType.LOCAL, AxisType.GROUP_REDUCE) for a in state.axes)
    axis = state.axes[position]
    return _axis_allows(state, opt.op, axis) and _arg_allows(state, opt, axis)


def _axis_allows(state: State, op: OptOps, axis: Axis) -> bool:
    """What an op asks of its axis, whatever the argument."""
    target = state.target
    if op is OptOps.UPCAST:
        return axis.kind in (AxisType.GLOBAL, AxisType.LOCAL, AxisType.WEAK)
    if op is OptOps.UNROLL:
        return True
    if op is OptOps.PADTO:
        return not axis.factor and axis.kind not in (AxisType.UPCAST, AxisType.UNROLL, AxisType.THREAD)
    if op is OptOps.SWAP:
        return axis.kind is AxisType.GLOBAL
    if op is OptOps.LOCAL:
        return target.has_local and not state.no_locals and axis.kind in (AxisType.GLOBAL, AxisType.WEAK)
    if op is OptOps.THREAD:
        free = target.has_threads and axis.threadable and axis.kind is AxisType.WEAK
        return free and all(a.kind is not AxisType.THREAD for a in state.axes)
    has_tc = bool(state.schedule) and state.schedule[0].op is OptOps.TC
    return target.has_local and not state.no_locals and axis.groupable and not has_tc  # GROUP, GROUPTOP


def _arg_allows(state: State, opt: Opt, axis: Axis) -> bool:
    """What it asks of the argument, on an axis that it may have."""
    if opt.op is OptOps.PADTO:
        return axis.size > _padded(axis.size, _amount(opt, axis)) // 4
    if opt.op is OptOps.SWAP:
        return opt.arg < len(state.axes) and state.axes[opt.arg].kind is AxisType.GLOBAL  # type: ignore[operator,index]
    amount = _amount(opt, axis)
    if not axis.divides(amount) or (opt.arg == 0 and axis.factor):
        return False
    too_many = (
        (opt.op is OptOps.UPCAST and amount > MOST_UPCAST)
        or (opt.op is OptOps.UNROLL and amount > MOST_UNROLL)
        or (opt.op is OptOps.THREAD and amount > state.target.max_threads)
    )
    return not too_many and _fits_shared(state, opt.op, amount)


def _fits_shared(state: State, op: OptOps, amount: int) -> bool:
    """Grouped kernels keep a tile in shared memory; tinygrad bounds it before it compiles."""
    if not state.target.reduce_itemsize:
        return True
    grouping = op in (OptOps.GROUP, OptOps.GROUPTOP)
    if not grouping and all(a.kind is not AxisType.GROUP_REDUCE for a in state.axes):
        return True
    tile = state.sizes(AxisType.UPCAST, AxisType.WARP, AxisType.LOCAL, AxisType.GROUP_REDUCE)
    return amount * tile * state.target.reduce_itemsize <= state.target.shared_max


def legal_mask(state: State) -> np.ndarray:
    """Which actions may be taken [A] bool: legal, within BEAM's size limits, changing something, not said twice. STOP always.
    Read-only: it is handed out again."""
    key = "mask", state.schedule
    if key not in state.known:
        mask = np.zeros(N_ACTIONS, dtype=bool)
        mask[STOP_INDEX] = True
        if len(state.schedule) < MAX_STEPS:
            tiles = _tiles(state)
            for (op, _), members in _BY_AXIS.items():
                if _op_possible(state, op) and (position := _position(state, members[0][1])) is not None:
                    for i, opt in members:
                        mask[i] = _worth_taking(state, opt, position, *tiles)
        mask.flags.writeable = False
        state.known[key] = mask
    return state.known[key]


def may_take(state: State, action: int) -> bool:
    """As `legal_mask(state)[action]`, at the price of one action."""
    opt = ACTIONS[action]
    if opt is None:
        return True
    if len(state.schedule) >= MAX_STEPS or not _op_possible(state, opt.op):
        return False
    position = _position(state, opt)
    return position is not None and _worth_taking(state, opt, position, *_tiles(state))


def _tiles(state: State) -> tuple[tuple[int, int], int]:
    """((upcast, unrolled), local) sizes."""
    unrolled = state.sizes(AxisType.UPCAST), state.sizes(AxisType.UNROLL)
    return unrolled, state.sizes(AxisType.WARP, AxisType.LOCAL, AxisType.GROUP_REDUCE)


_BY_AXIS: dict[tuple[OptOps, int | None], list[tuple[int, Opt]]] = {}
for _i, _action in enumerate(ACTIONS):
    if _action is not None:
        _BY_AXIS.setdefault((_action.op, _action.axis), []).append((_i, _action))


def _op_possible(state: State, op: OptOps) -> bool:
    """False where no action of this op can be legal, so that none of them is looked at."""
    if op in (OptOps.LOCAL, OptOps.GROUP, OptOps.GROUPTOP):
        return state.target.has_local and not state.no_locals
    if op is OptOps.SWAP:
        return any(a.kind is AxisType.GLOBAL for a in state.axes)
    if op is OptOps.THREAD:
        return state.target.has_threads and all(a.kind is not AxisType.THREAD for a in state.axes)
    if op is OptOps.TC:
        return state.scheduler is not None and bool(state.scheduler.ren.tensor_cores)
    return True


def _position(state: State, opt: Opt) -> int | None:
    """Where its axis stands, -1 if it has none; None where no argument could make it legal there."""
    if opt.op in (OptOps.TC, OptOps.NOLOCALS):
        return -1
    position = resolve_axis(state, opt)
    return position if position is not None and _axis_allows(state, opt.op, state.axes[position]) else None


def _worth_taking(state: State, opt: Opt, position: int, unrolled: tuple[int, int], local: int) -> bool:
    """Of an op that is possible at its `_position`."""
    if opt.op is OptOps.TC:
        return _tensor_core_legal(state, opt)
    if opt.op is OptOps.NOLOCALS:
        return state.target.free_launch and not state.no_locals and _legal(state, opt, position)
    axis = state.axes[position]
    if opt.op is OptOps.PADTO and (axis.kind in REDUCE_KINDS or axis.size % _amount(opt, axis) == 0):
        return False  # nothing to pad; and padded reduces give wrong sums in tinygrad 0.14.0 (test_known_bugs.py)
    if opt.arg == axis.size and not axis.factor and Opt(opt.op, opt.axis, 0) in ACTION_INDEX:
        return False  # the same as arg 0
    if not _arg_allows(state, opt, axis):
        return False
    amount = _amount(opt, axis)
    if opt.op in (OptOps.UPCAST, OptOps.UNROLL):
        upcast, unroll = unrolled
        upcast, unroll = (upcast * amount, unroll) if opt.op is OptOps.UPCAST else (upcast, unroll * amount)
        return upcast * unroll <= MAX_UPCAST and state.kernel.lowered(upcast, unroll) <= MAX_LOWERED
    return opt.op not in (OptOps.LOCAL, OptOps.GROUP, OptOps.GROUPTOP) or local * amount <= MAX_LOCAL


def _tensor_core_legal(state: State, opt: Opt) -> bool:
    if state.schedule or state.scheduler is None or not state.scheduler.ren.tensor_cores:
        return False
    try:
        apply_opt(state.scheduler, opt)
    except IllegalAction:
        return False
    return True
