"""Many schedule states at once: the dynamics of `space.py` and the summary of `features.py` as numpy over a batch.

A `Batch` holds B states as arrays, of different kernels and depths if need be; `step` gives the next ones, and nothing
is changed in place. It agrees with the scalar version state by state (tests/autotune/test_batch.py, tests/proofs/
dynamics.py). Only of tensor-core actions tinygrad is asked: `of` asks for all of them, once for each un-optimized state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from autotune.access import Access
from autotune.batch_features import summary
from autotune.compiler import AxisType, OptOps, axis_to_pos
from autotune.errors import IllegalAction
from autotune.features import kernel_part
from autotune.kernel import Schedule
from autotune.space import (
    ACTION_INDEX,
    ACTIONS,
    FROM_TOP,
    MAX_LOCAL,
    MAX_LOWERED,
    MAX_STEPS,
    MAX_UPCAST,
    MOST_UNROLL,
    MOST_UPCAST,
    N_ACTIONS,
    REDUCE_KINDS,
    SPLIT_TO,
    STOP_INDEX,
    State,
    Target,
    step,
)

KINDS = tuple(axis_to_pos)
CODE = {kind: i for i, kind in enumerate(KINDS)}
NONE = len(KINDS)  # the kind of an empty place
MIN_PLACES = 8  # places for axes that there always are: no action but TC names an axis beyond 7
_POSITION = np.array([*axis_to_pos.values(), max(axis_to_pos.values()) + 1])  # [kinds + 1]
_LOCALS = (AxisType.WARP, AxisType.LOCAL, AxisType.GROUP_REDUCE)

# **** the vocabulary as arrays: numbers of actions, then what each of them is [A] ****

_OPS = [None if a is None else a.op for a in ACTIONS]
SPLITS = list(SPLIT_TO)
_TC, _PAD, _SWAP, _UPCAST, _UNROLL = (
    np.array([i for i, own in enumerate(_OPS) if own is op])
    for op in (OptOps.TC, OptOps.PADTO, OptOps.SWAP, OptOps.UPCAST, OptOps.UNROLL)
)
_SPLIT = np.array([i for i, op in enumerate(_OPS) if op in SPLITS])
_GROUPED = np.array([i for i, op in enumerate(_OPS) if op in (OptOps.LOCAL, OptOps.GROUP, OptOps.GROUPTOP)])
_NOLOCALS = _OPS.index(OptOps.NOLOCALS)
_IS_TC, _IS_PAD, _IS_SWAP = (np.isin(np.arange(N_ACTIONS), columns) for columns in (_TC, _PAD, _SWAP))
_TC_COLUMN = np.cumsum(_IS_TC) - 1
_WHICH = np.array([SPLITS.index(op) if op in SPLITS else -1 for op in _OPS])  # kind of split; -1: it is none
_NEW_KIND = np.array([CODE[kind] for kind in SPLIT_TO.values()])  # [SPLITS]
_FROM_TOP = np.array([op in FROM_TOP for op in _OPS])
_AXIS = np.array([0 if a is None or a.op is OptOps.TC else a.axis or 0 for a in ACTIONS])
_LIST: dict[OptOps | None, int] = {OptOps.UNROLL: 1, OptOps.GROUP: 2, OptOps.GROUPTOP: 2}  # in `Batch.position`
_COUNTS = np.array([_LIST.get(op, 0) for op in _OPS])  # among which axes
_ARG = np.array([a.arg if a is not None and isinstance(a.arg, int) else 1 for a in ACTIONS])  # 0: the whole axis
_SAID_BY_0 = np.array([a is not None and a.op in SPLITS and replace(a, arg=0) in ACTION_INDEX for a in ACTIONS])
(PAD_TO,) = set(_ARG[_PAD].tolist())


class Axes(NamedTuple):
    """The loops of all states in tinygrad's order. Places behind the last loop are empty: kind NONE, size 1, no stride."""

    kind: np.ndarray  # [B, X] int, a CODE
    size: np.ndarray  # [B, X] int
    factor: np.ndarray  # [B, X] int, as in `space.Axis`
    rank: np.ndarray  # [B, X] int, the order of the ids
    threadable: np.ndarray  # [B, X] bool
    groupable: np.ndarray  # [B, X] bool
    masked: np.ndarray  # [B, X] bool
    strides: np.ndarray  # [B, X, K] float: exact up to 2^53, and no overflow beyond

    def at(self, *index: np.ndarray) -> Axes:
        return Axes(*(values[index] for values in self))

    def widened(self, places: int) -> Axes:
        """A copy with empty places added."""
        rows, there, accesses = self.strides.shape
        shape = (rows, places - there)
        new = [
            np.full((*shape, accesses) if a.ndim == 3 else shape, n, a.dtype) for a, n in zip(self, EMPTY, strict=True)
        ]
        return Axes(*(np.concatenate(pair, 1) for pair in zip(self, new, strict=True)))

    def put(self, rows: np.ndarray, places: np.ndarray | int | slice, new: Axes) -> None:
        for own, values in zip(self, new, strict=True):
            own[rows, places] = values

    def ordered(self) -> Axes:
        """Sorted as tinygrad sorts them, without loops of one turn and without places that no state needs."""
        kind = np.where(self.size == 1, NONE, self.kind)
        order = np.argsort((_POSITION[kind] << 32) + self.rank, axis=1, kind="stable")
        places = max(MIN_PLACES, int((kind != NONE).sum(1).max(initial=0)))
        found = self._replace(kind=kind).at(np.arange(len(kind))[:, None], order[:, :places])
        there = found.kind != NONE
        return found._replace(masked=found.masked & there, strides=found.strides * there[:, :, None])


EMPTY = (NONE, 1, 0, 0, False, False, False, 0.0)  # a place
DTYPES = (np.int64, np.int64, np.int64, np.int64, bool, bool, bool, np.float64)


def _axes_of(states: Sequence[State], places: int, accesses: int) -> Axes:
    rows = [_places_of(s, places, accesses) for s in states]
    return Axes(*(np.array([[place[i] for place in row] for row in rows], dtype) for i, dtype in enumerate(DTYPES)))


def _places_of(state: State, places: int, accesses: int) -> list[tuple]:
    rank = {name: i for i, name in enumerate(sorted(a.id for a in state.axes))}
    more = [0] * (accesses - len(state.accesses))
    found = [(CODE[a.kind], a.size, a.factor, rank[a.id], a.threadable, a.groupable, a.masked, [*a.strides, *more])
             for a in state.axes]  # fmt: skip
    return found + [(*EMPTY[:-1], [0] * accesses)] * (places - len(found))


@dataclass(frozen=True, eq=False)
class Starts:
    """The states that a batch was made of, then all that lie one tensor-core action behind; and what no step changes."""

    states: tuple[State, ...]  # R of them
    axes: Axes  # [R, X]
    behind: np.ndarray  # [R, TC actions] int, the start that each leads to; -1: it is illegal
    has_tc: np.ndarray  # [R] bool
    target: dict[str, np.ndarray]  # [R] each, by the fields of `space.Target`
    weights: np.ndarray  # [R, 2] `Kernel.weights`
    iterations: np.ndarray  # [R]
    kernel_part: np.ndarray  # [R, ..] of the summary
    accesses: np.ndarray  # [R, K, 6] is there, is_store, is_gated, is_linear, itemsize, elements

    @staticmethod
    def of(given: Sequence[State]) -> Starts:
        asked = {i: _tensor_cores(s) for i, s in {id(s): s for s in given}.items()}  # a state that is given twice, once
        states = [*given, *(after for found in asked.values() for after in found.values())]
        number = {id(s): i for i, s in enumerate(states)}
        behind = np.array([[number[id(found[a])] if a in found else -1 for a in _TC.tolist()]
                           for found in (asked.get(id(s), {}) for s in states)])  # fmt: skip
        places, K = max(len(s.axes) for s in states), max(len(s.accesses) for s in states)
        return Starts(
            tuple(states), _axes_of(states, max(MIN_PLACES, places), K), behind,
            np.array([bool(s.schedule) and s.schedule[0].op is OptOps.TC for s in states]),
            {f.name: np.array([getattr(s.target, f.name) for s in states]) for f in fields(Target)},
            np.array([s.kernel.weights for s in states]), np.array([s.kernel.iterations for s in states]),
            np.array([kernel_part(s.kernel) for s in states]),
            np.array([[_facts(a) for a in s.accesses] + [(0.0,) * 6] * (K - len(s.accesses)) for s in states]),
        )  # fmt: skip


def _facts(a: Access) -> tuple[float, ...]:
    return 1.0, a.is_store, a.is_gated, a.is_linear, a.itemsize, a.elements


def _tensor_cores(state: State) -> dict[int, State]:
    """The states behind the legal tensor-core actions of one, by action; tinygrad itself is asked."""
    found: dict[int, State] = {}
    if state.scheduler is not None and state.scheduler.ren.tensor_cores:
        for action in _TC.tolist():
            with contextlib.suppress(IllegalAction):
                found[action] = step(state, action)
    return found


@dataclass(frozen=True, eq=False)
class Batch:
    """B states. Immutable; rows are independent of each other."""

    starts: Starts
    start: np.ndarray  # [B] int, where each row began
    taken: np.ndarray  # [B, T] int, the actions since; -1: none
    axes: Axes  # [B, X]
    next_rank: np.ndarray  # [B] int, of the next new axis
    depth: np.ndarray  # [B] int, length of the schedule
    no_locals: np.ndarray  # [B] bool

    @staticmethod
    def of(states: Sequence[State]) -> Batch:
        """The batch of some states, one a row; at least one."""
        if not states:
            raise ValueError("a batch needs at least one state")
        starts, rows = Starts.of(states), np.arange(len(states))
        return Batch(starts, rows, np.zeros((len(states), 0), np.int64), starts.axes.at(rows).ordered(),
                     np.array([len(s.axes) for s in states]), np.array([len(s.schedule) for s in states]),
                     np.array([s.no_locals for s in states]))  # fmt: skip

    def __len__(self) -> int:
        return len(self.start)

    def take(self, rows: np.ndarray) -> Batch:
        """Some of the rows, given by numbers [N] (repeated if wished) or as a mask [B] bool."""
        return Batch(self.starts, self.start[rows], self.taken[rows], self.axes.at(rows), self.next_rank[rows],
                     self.depth[rows], self.no_locals[rows])  # fmt: skip

    @property
    def schedules(self) -> list[Schedule]:
        return [(*self.starts.states[s].schedule, *(ACTIONS[a] for a in taken if a >= 0))
                for s, taken in zip(self.start, self.taken, strict=True)]  # fmt: skip

    # **** what the rules ask for ****

    def of_kind(self, *kinds: AxisType) -> np.ndarray:
        """Which axes are of these kinds [B, X] bool."""
        table = np.zeros(NONE + 1, bool)
        table[[CODE[kind] for kind in kinds]] = True
        return table[self.axes.kind]

    def sizes(self, *kinds: AxisType) -> np.ndarray:
        """Product of the sizes of all axes of these kinds [B] float."""
        return np.where(self.of_kind(*kinds), self.axes.size, 1.0).prod(1)

    def target(self, name: str) -> np.ndarray:
        """A field of `space.Target` [B]."""
        return self.starts.target[name][self.start]

    @cached_property
    def locals_allowed(self) -> np.ndarray:
        """[B] bool."""
        return self.target("has_local") & ~self.no_locals

    @cached_property
    def position(self) -> np.ndarray:
        """Which place each action speaks of [B, A] int; -1: there is no such axis. As `space.resolve_axis`."""
        constant = self.of_kind(*REDUCE_KINDS) & (self.axes.factor == 0)
        found = np.stack([self.axes.kind != NONE, constant, self.of_kind(AxisType.REDUCE)], 1)  # [B, 3, X]
        places = np.argsort(~found, axis=2, kind="stable")
        places[np.arange(found.shape[2]) >= found.sum(2, keepdims=True)] = -1
        return places[:, _COUNTS, _AXIS]

    @cached_property
    def size(self) -> np.ndarray:
        """Of the axis that each action speaks of [B, A] int."""
        return np.take_along_axis(self.axes.size, self.position, 1)

    @cached_property
    def factor(self) -> np.ndarray:
        """Of the axis that each action speaks of [B, A] int."""
        return np.take_along_axis(self.axes.factor, self.position, 1)

    @cached_property
    def amount(self) -> np.ndarray:
        """Size of the axis that each split makes [B, A] int; of other actions their argument."""
        return np.where(_ARG == 0, self.size, _ARG)

    # **** legality ****

    @cached_property
    def legal(self) -> np.ndarray:
        """Which actions `step` takes [B, A] bool: all that tinygrad takes, as `space.apply_to_state`."""
        axes, legal = self.axes, np.zeros((len(self), N_ACTIONS), bool)
        legal[:, _SPLIT] = self._legal_splits()
        legal[:, _TC] = (self.starts.behind[self.start] >= 0) & (self.depth == 0)[:, None]
        fixed = (
            self.of_kind(AxisType.UPCAST, AxisType.UNROLL, AxisType.THREAD) | (axes.kind == NONE) | (axes.factor > 0)
        )
        legal[:, _PAD] = (~fixed & (axes.size > _padded(axes.size) // 4))[:, _AXIS[_PAD]]
        grid = self.of_kind(AxisType.GLOBAL)
        legal[:, _SWAP] = grid[:, _AXIS[_SWAP]] & grid[:, _ARG[_SWAP]]
        legal[:, _NOLOCALS] = ~self.of_kind(*_LOCALS).any(1)
        return legal

    def _legal_splits(self) -> np.ndarray:
        """[B, splits]"""
        position, factor, amount = (a[:, _SPLIT] for a in (self.position, self.factor, self.amount))
        which = _WHICH[_SPLIT]
        divides = np.where(factor > 0, factor, self.size[:, _SPLIT]) % amount == 0
        divides &= (_ARG[_SPLIT] > 0) | (factor == 0)  # a symbolic axis is never taken whole
        allowed = self._splittable()[np.arange(len(self))[:, None], which, position]
        return (position >= 0) & allowed & divides & (amount <= self._largest()[:, which])

    def _splittable(self) -> np.ndarray:
        """Which axes each kind of split may take, of those that it can name [B, SPLITS, X] bool."""
        free, plain = self.locals_allowed[:, None], self.of_kind(AxisType.GLOBAL, AxisType.WEAK)
        group = free & self.axes.groupable & ~self.starts.has_tc[self.start][:, None]
        threads = self.target("has_threads") & ~self.of_kind(AxisType.THREAD).any(1)
        by_op = {
            OptOps.UPCAST: plain | self.of_kind(AxisType.LOCAL),
            OptOps.UNROLL: np.ones_like(plain),
            OptOps.LOCAL: free & plain,
            OptOps.GROUP: group,
            OptOps.GROUPTOP: group,
            OptOps.THREAD: threads[:, None] & self.axes.threadable & self.of_kind(AxisType.WEAK),
        }
        return np.stack([by_op[op] for op in SPLIT_TO], 1)

    def _largest(self) -> np.ndarray:
        """The largest amount of each kind of split [B, SPLITS]; grouped kernels keep a tile in shared memory."""
        itemsize = self.target("reduce_itemsize")
        tile = self.sizes(AxisType.UPCAST, *_LOCALS) * np.maximum(itemsize, 1)
        room = np.where(itemsize > 0, self.target("shared_max") // tile, np.inf)
        other = np.where(self.of_kind(AxisType.GROUP_REDUCE).any(1), room, np.inf)
        by_op = {
            OptOps.UPCAST: np.minimum(other, MOST_UPCAST),
            OptOps.UNROLL: np.minimum(other, MOST_UNROLL),
            OptOps.LOCAL: other,
            OptOps.GROUP: room,
            OptOps.GROUPTOP: room,
            OptOps.THREAD: np.minimum(other, self.target("max_threads")),
        }
        return np.stack([by_op[op] for op in SPLIT_TO], 1)

    def legal_mask(self) -> np.ndarray:
        """Which actions may be taken [B, A] bool: legal, within BEAM's size limits, changing something, not said twice.

        STOP always. As `space.legal_mask`.
        """
        mask = self.legal & ~(_SAID_BY_0 & (self.size == _ARG) & (self.factor == 0))
        mask[:, _NOLOCALS] &= self.locals_allowed & self.target("free_launch")
        useful = (self.axes.size < _padded(self.axes.size)) & ~self.of_kind(*REDUCE_KINDS)
        mask[:, _PAD] &= useful[:, _AXIS[_PAD]]
        mask[:, _GROUPED] &= self.sizes(*_LOCALS)[:, None] * self.amount[:, _GROUPED] <= MAX_LOCAL
        upcast, unroll = self.sizes(AxisType.UPCAST)[:, None], self.sizes(AxisType.UNROLL)[:, None]
        mask[:, _UPCAST] &= self._fits(upcast * self.amount[:, _UPCAST], unroll)
        mask[:, _UNROLL] &= self._fits(upcast, unroll * self.amount[:, _UNROLL])
        mask &= (self.depth < MAX_STEPS)[:, None]
        mask[:, STOP_INDEX] = True
        return mask

    def _fits(self, upcast: np.ndarray, unroll: np.ndarray) -> np.ndarray:
        """Whether a register tile [B, ..] is small enough, and what it is expected to become after lowering."""
        inside, outside = self.starts.weights[self.start].T[:, :, None]  # [B, 1] each
        return (upcast * unroll <= MAX_UPCAST) & (upcast * (unroll * inside + outside) <= MAX_LOWERED)

    # **** what comes next ****

    def step(self, actions: np.ndarray) -> Batch:
        """The states after one action each, actions [B] int. Raises IllegalAction, which names the first such row."""
        actions, rows = np.asarray(actions), np.arange(len(self))
        if actions.shape != rows.shape or actions.dtype.kind not in "iu":
            raise ValueError(f"{len(self)} states need as many actions, by number, not {actions.dtype} {actions.shape}")
        known = (actions >= 0) & (actions < N_ACTIONS)
        wrong = np.flatnonzero(~(known & self.legal[rows, np.where(known, actions, STOP_INDEX)]))
        if len(wrong):
            row, action = int(wrong[0]), int(actions[wrong[0]])
            name = ACTIONS[action] or "STOP" if known[row] else "no action of the vocabulary"
            raise IllegalAction(f"row {row}: action {action} ({name}) is not legal after {self.depth[row]} actions")
        tensor_cores, split = _IS_TC[actions], _WHICH[actions] >= 0
        jump = np.where(tensor_cores, self.starts.behind[self.start, _TC_COLUMN[actions]], self.start)
        axes = self._changed(actions)
        if tensor_cores.any():
            axes.put(tensor_cores, slice(None), self.starts.axes.at(jump[tensor_cores]).widened(axes.kind.shape[1]))
        next_rank = np.where(tensor_cores, (axes.kind != NONE).sum(1), self.next_rank + split)
        taken = np.where(tensor_cores, -1, actions)[:, None]
        return Batch(self.starts, jump, np.concatenate([self.taken, taken], 1), axes.ordered(), next_rank, self.depth + 1,
                     self.no_locals | (actions == _NOLOCALS))  # fmt: skip

    def _changed(self, actions: np.ndarray) -> Axes:
        """The axes after one action each, not in order yet; as `space.apply_to_state`."""
        rows, places = np.arange(len(self)), self.axes.kind.shape[1]
        axes = self.axes.widened(max(places + 1, self.starts.axes.kind.shape[1]))
        which, place = _WHICH[actions], self.position[rows, actions]
        axis = axes.at(rows, place)
        amount = np.where(which >= 0, self.amount[rows, actions], 1)  # 1: the new axis has one turn, and is dropped
        left = axis.size // amount
        top = _FROM_TOP[actions]
        inner, outer = np.where(top, left, 1)[:, None], np.where(top, 1, amount)[:, None]
        padded, swapped = _IS_PAD[actions], np.where(_IS_SWAP[actions], _ARG[actions], place)
        no = np.zeros(len(self), bool)
        new = Axes(
            _NEW_KIND[which], amount, 0 * left, self.next_rank, no, axis.groupable, axis.masked, axis.strides * inner
        )
        old = axis._replace(size=np.where(padded, _padded(left), left), factor=axis.factor // amount,
                            rank=axes.rank[rows, swapped], masked=axis.masked | padded, strides=axis.strides * outer)  # fmt: skip
        axes.rank[rows, swapped] = axis.rank
        axes.put(rows, place, old)
        axes.put(rows, places, new)
        return axes

    def summary(self) -> np.ndarray:
        """`features.summary` of each state [B, S] float32."""
        return summary(self)


def _padded(size: np.ndarray) -> np.ndarray:
    return -(-size // PAD_TO) * PAD_TO
