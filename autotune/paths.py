"""Schedules as paths of prefixes, for the simulators that see them so (`sims.paths.Paths`).

Everything about an action, and the context, comes from the un-optimized state alone: an action's row is what it is
(op, axis, amount) and how the axis that it names looks in the root. That is exact for the first action, and for later
ones a hint (a split shortens an axis, a full one removes it): where a simulator goes on in its own latent space there is
no state to ask. Each prefix's `summary` holds the exact truth beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autotune.compiler import Opt, OptOps
from autotune.data import Dataset
from autotune.features import (
    AXIS_WIDTH,
    MAX_ACCESSES,
    MAX_AXES,
    OPS,
    axis_slot,
    kernel_part,
    log2,
    summary,
)
from autotune.kernel import Schedule
from autotune.space import ACTIONS, MAX_STEPS, SPLIT_TO, State, apply_to_state, resolve_axis, root_of
from sims import SimulatorError
from sims.paths import Paths

TOKEN_KINDS = 4  # device, kernel, axis, access
TOKENS = 2 + MAX_AXES + MAX_ACCESSES
NAMED_AXES = 9  # the vocabulary names axes 0 to 8
ROW_WIDTH = len(OPS) + NAMED_AXES + 5 + AXIS_WIDTH  # of an action's row
# columns of a summary whose sums are the logs of flops, of bytes, of turns of the loops that are left, and of vector loads
# in all of these turns: the limits of `sims.roofline` (tests/autotune/test_paths.py holds them to what they mean)
_FLOPS, _BYTES, _TURNS, _VECTORS = 0, 1, 40, 152
ROOFLINE = ((_FLOPS,), (_BYTES,), (_TURNS,), (_TURNS, _VECTORS))


def context(root: State) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [C, W] float32 of an un-optimized state, and which of them there are [C] bool."""
    axes = [axis_slot(a, i, len(root.accesses)) for i, a in enumerate(root.axes[:MAX_AXES])]
    accesses = [_access_token(root, i) for i in range(min(len(root.accesses), MAX_ACCESSES))]
    values = [_device_token(root), kernel_part(root.kernel), *axes, *accesses]
    places = [0, 1, *range(2, 2 + len(axes)), *range(2 + MAX_AXES, 2 + MAX_AXES + len(accesses))]
    kinds = [0, 1, *[2] * len(axes), *[3] * len(accesses)]
    tokens, present = np.zeros((TOKENS, TOKEN_KINDS + AXIS_WIDTH), np.float32), np.zeros(TOKENS, bool)
    for place, kind, row in zip(places, kinds, values, strict=True):
        tokens[place, kind], present[place] = 1.0, True
        tokens[place, TOKEN_KINDS : TOKEN_KINDS + len(row)] = row
    return tokens, present


def _device_token(root: State) -> list[float]:
    target = root.target
    return [float(target.has_local), float(target.has_threads), log2(target.shared_max), log2(target.max_threads)]


def _access_token(root: State, i: int) -> list[float]:
    """One buffer as it is walked: its size, and along how many axes, the shortest of them by one element."""
    access = root.accesses[i]
    moving = [a for a in root.axes if a.strides[i]]
    place = [float(i == k) for k in range(MAX_ACCESSES)]
    return [*place, float(access.is_store), float(access.is_gated), float(access.is_linear), access.itemsize / 8.0,
            log2(access.elements), log2(access.elements * access.itemsize), len(moving) / MAX_AXES,
            float(any(abs(a.strides[i]) == 1 for a in moving)), float(access.slot == 0)]  # fmt: skip


def action_row(root: State, opt: Opt) -> np.ndarray:
    """What an action does [F] float32, told from the un-optimized state alone."""
    position = None if opt.op is OptOps.TC else resolve_axis(root, opt)  # TC's axis counts choices, not loops
    axis = root.axes[position] if position is not None and position >= 0 else None
    number = opt.arg if isinstance(opt.arg, int) else 0
    full = opt.op in SPLIT_TO and number == 0
    amount = (axis.size if axis is not None else 1) if full else max(number, 1)
    named = [float(opt.axis == i) for i in range(NAMED_AXES)]
    slot = [0.0] * AXIS_WIDTH if axis is None or position is None else axis_slot(axis, position, len(root.accesses))
    size = axis.size if axis is not None else 1
    effect = [log2(amount), min(amount, 16) / 16.0, float(full), log2(number), log2(max(1.0, size / amount))]
    return np.array([*(float(opt.op is op) for op in OPS), *named, *effect, *slot], np.float32)


def action_rows(root: State) -> np.ndarray:
    """A row for each action of the vocabulary [A, F]; STOP, which changes nothing, is all zero."""
    rows = [np.zeros(ROW_WIDTH, np.float32) if a is None else action_row(root, a) for a in ACTIONS]
    return np.stack(rows)


class Prefixes:
    """One kernel's prefixes: states, summaries and action rows, each computed once."""

    def __init__(self, root: State):
        self.root = root
        self.states: dict[Schedule, State] = {(): root}
        self.summaries: dict[Schedule, np.ndarray] = {}
        self.rows: dict[Opt, np.ndarray] = {}

    def state(self, schedule: Schedule) -> State:
        """Raises IllegalAction."""
        if schedule not in self.states:
            self.states[schedule] = apply_to_state(self.state(schedule[:-1]), schedule[-1])
        return self.states[schedule]

    def summary(self, schedule: Schedule) -> np.ndarray:
        if schedule not in self.summaries:
            self.summaries[schedule] = summary(self.state(schedule))
        return self.summaries[schedule]

    def row(self, opt: Opt) -> np.ndarray:
        if opt not in self.rows:
            self.rows[opt] = action_row(self.root, opt)
        return self.rows[opt]


def paths_of(
    states: Sequence[State],
    log_times: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    steps: int = MAX_STEPS,
) -> Paths:
    """The paths to some states. log_times [N]: log2 seconds of each (None: none was measured); groups [N]: whose times
    are comparable (None: those of a kernel). A prefix that is itself among the states has its time on every path.
    """
    if not states:
        raise SimulatorError("no schedules: there is no path to make")
    keys = [s.kernel.key for s in states] if groups is None else [int(g) for g in groups]
    index = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    seen: dict[str, Prefixes] = {}
    contexts: dict[object, tuple[np.ndarray, np.ndarray]] = {}
    times: dict[tuple[object, Schedule], float] = {}
    if log_times is not None:
        times = {(k, s.schedule): float(t) for k, s, t in zip(keys, states, log_times, strict=True)}
    N, S = len(states), len(summary(states[0]))
    actions = np.zeros((N, steps, ROW_WIDTH), np.float32)
    prefixes = np.zeros((N, steps + 1, S), np.float32)
    log_time = np.full((N, steps + 1), np.nan)
    for n, (key, state) in enumerate(zip(keys, states, strict=True)):
        own = seen.setdefault(state.kernel.key, Prefixes(root_of(state)))
        contexts.setdefault(key, context(own.root))
        if len(state.schedule) > steps:
            raise SimulatorError(f"a schedule of {len(state.schedule)} actions does not fit a path of {steps}")
        for t in range(len(state.schedule) + 1):
            prefixes[n, t] = own.summary(state.schedule[:t])
            log_time[n, t] = times.get((key, state.schedule[:t]), np.nan)
            if t:
                actions[n, t - 1] = own.row(state.schedule[t - 1])
    tokens, present = (np.stack([contexts[key][i] for key in index]) for i in range(2))
    length = np.array([len(s.schedule) for s in states])
    return Paths(tokens, present, np.array([index[k] for k in keys]), actions, prefixes, length, log_time)


def paths_from(data: Dataset, steps: int = MAX_STEPS) -> Paths:
    """Every measured state of a data set as a path; a kernel's times from different sources are kept apart."""
    return paths_of(data.states, *data.arrays(), steps)
