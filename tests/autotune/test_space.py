"""The state on plain numbers against tinygrad's own Scheduler: seeded walks, every action of the vocabulary at every step."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from tiny import U2, U4, add_one, by_op, kernel_of, kernels_of, symbolic
from tinygrad import Context, Tensor, Variable
from tinygrad.codegen.opt.search import get_kernel_actions
from tinygrad.helpers import Target
from tinygrad.renderer.cstyle import CUDARenderer, HIPRenderer, MetalRenderer, OpenCLRenderer
from tinygrad.runtime.ops_python import PythonRenderer

from autotune import corpus, space
from autotune.compiler import AxisType, Opt, OptOps, apply_opt, hand_coded, launches_freely, renderer_of, root_scheduler
from autotune.errors import IllegalAction
from autotune.space import (
    ACTION_INDEX,
    ACTIONS,
    MAX_LOWERED,
    MAX_STEPS,
    N_ACTIONS,
    STOP_INDEX,
    legal_mask,
    may_take,
    root_state,
    step,
)

BEAM = 193
IN_REGISTERS = (AxisType.UPCAST, AxisType.UNROLL)


def accepts(scheduler, opt) -> bool:
    try:
        apply_opt(scheduler, opt)
    except IllegalAction:
        return False
    return True


def too_large(state, opt, limit: float) -> bool:
    """Our size rules, again: the register tile, and the operations expected of it after lowering."""
    if opt.op not in (OptOps.UPCAST, OptOps.UNROLL):
        return False
    axis = state.axes[space.resolve_axis(state, opt)]
    amount = opt.arg or axis.size
    if state.sizes(*IN_REGISTERS) * amount > limit:
        return True
    more = (amount, 1) if opt.op is OptOps.UPCAST else (1, amount)
    return (
        state.kernel.lowered(state.sizes(AxisType.UPCAST) * more[0], state.sizes(AxisType.UNROLL) * more[1])
        > MAX_LOWERED
    )


def outgrown(state) -> bool:
    """Whether a tile or a group of threads is larger than BEAM allows."""
    locals_ = state.sizes(AxisType.WARP, AxisType.LOCAL, AxisType.GROUP_REDUCE)
    return state.sizes(*IN_REGISTERS) > space.MAX_UPCAST or locals_ > space.MAX_LOCAL


def check_mask(state, scheduler, counts: Counter) -> np.ndarray:
    """Equal to tinygrad's own list, but for what we refuse on purpose."""
    mask = legal_mask(state)
    assert [may_take(state, a) for a in range(N_ACTIONS)] == mask.tolist()
    theirs = {i - 1 for i in get_kernel_actions(scheduler, include_0=False)}
    ours = set(np.flatnonzero(mask[:BEAM]).tolist())
    if not theirs and outgrown(state):
        # by padding, which BEAM does not do: it lists nothing then, we what makes nothing larger
        assert all(ACTIONS[i].op in (OptOps.SWAP, OptOps.THREAD) for i in ours), state.schedule
        assert all(accepts(scheduler, ACTIONS[i]) for i in ours)
    else:
        assert ours <= theirs, [ACTIONS[i] for i in ours - theirs]
    tiles = 256  # BEAM counts a tensor core's own tile apart, we do not
    refused = [ACTIONS[i] for i in theirs - ours]
    assert all(too_large(state, opt, tiles) for opt in refused), (state.schedule, refused)
    counts["too large"] += len(refused)
    check_own_actions(state, scheduler, mask, counts)
    assert mask[STOP_INDEX] and mask.shape == (N_ACTIONS,) and mask.dtype == bool
    return mask


def check_own_actions(state, scheduler, mask: np.ndarray, counts: Counter) -> None:
    """PADTO and NOLOCALS, which stand outside of BEAM's list."""
    for opt in by_op(ACTIONS, OptOps.PADTO) + by_op(ACTIONS, OptOps.NOLOCALS):
        offered, possible = bool(mask[ACTION_INDEX[opt]]), accepts(scheduler, opt)
        wanted = possible and opt.op is OptOps.NOLOCALS and state.target.free_launch and not state.no_locals
        if possible and opt.op is OptOps.PADTO:
            axis = state.axes[opt.axis]
            wanted = axis.kind not in (AxisType.REDUCE, AxisType.GROUP_REDUCE) and axis.size % 32 != 0
        assert offered == wanted, (opt, state.schedule)
        counts[opt.op.name, offered] += 1


def check_axes(state, scheduler, counts: Counter) -> None:
    assert [(a.kind, a.size) for a in state.axes] == [(r.arg[-1], int(r.vmax) + 1) for r in scheduler.rngs], (
        state.schedule
    )
    again = space._state_of(state.kernel, state.schedule, scheduler)
    tensor_cores = state.schedule[0].op is OptOps.TC  # nothing may be grouped then
    known = ("id", "factor", "threadable") if tensor_cores else ("id", "factor", "threadable", "groupable")
    for ours, theirs in zip(state.axes, again.axes, strict=True):
        assert [getattr(ours, n) for n in known] == [getattr(theirs, n) for n in known], state.schedule
    if all(a.is_linear for a in again.accesses):
        assert [a.strides for a in state.axes] == [a.strides for a in again.axes], state.schedule
        counts["strides"] += 1
    counts["steps"] += 1


def pick(mask: np.ndarray, rng: random.Random, first: OptOps | None) -> int | None:
    """An action of a random kind, so that the rare kinds are met as often as the others."""
    legal = [int(i) for i in np.flatnonzero(mask[:-1])]
    kinds = sorted({ACTIONS[i].op.name for i in legal})
    if not kinds:
        return None
    kind = first.name if first is not None and first.name in kinds else rng.choice(kinds)
    return rng.choice([i for i in legal if ACTIONS[i].op.name == kind])


def walk(kernel, renderer, rng: random.Random, counts: Counter, first: OptOps | None = None) -> None:
    scheduler, state = root_scheduler(kernel.ast, renderer), root_state(kernel, renderer)
    for depth in range(MAX_STEPS):
        action = pick(check_mask(state, scheduler, counts), rng, first if depth == 0 else None)
        if action is None:
            return
        counts[ACTIONS[action].op] += 1
        scheduler, state = apply_opt(scheduler, ACTIONS[action]), step(state, action)
        check_axes(state, scheduler, counts)


def test_walks_agree_with_tinygrad_on_cpu():
    counts, rng = Counter(), random.Random(1)
    with Context(NUM_CPU_THREADS=8):  # so that THREAD is legal on a machine with any number of cores
        for kernel in [*random.Random(0).sample(corpus.load(), 36), symbolic()]:
            walk(kernel, renderer_of("CPU"), rng, counts)
    assert counts["strides"] > 0.8 * counts["steps"] > 150
    assert all(counts[op] > 15 for op in (OptOps.UPCAST, OptOps.UNROLL, OptOps.THREAD, OptOps.PADTO))
    assert counts["too large"] and counts["PADTO", True] and not counts["NOLOCALS", True]


@pytest.mark.cl
def test_walks_agree_with_tinygrad_on_cl(cl):
    counts, rng = Counter(), random.Random(2)
    for kernel in [*random.Random(3).sample(corpus.load(), 16), symbolic()]:
        walk(kernel, cl, rng, counts)
    assert counts["strides"] > 0.8 * counts["steps"] > 80
    assert all(
        counts[op] for op in (OptOps.LOCAL, OptOps.GROUP, OptOps.GROUPTOP, OptOps.SWAP, OptOps.NOLOCALS, OptOps.UNROLL)
    )


def half_matmul(m: int, n: int, k: int):
    return kernel_of(Tensor.empty(m, k, dtype="half").matmul(Tensor.empty(k, n, dtype="half"), dtype="float"))


def test_walks_agree_with_tinygrad_on_tensor_cores():
    renderer, counts, rng = PythonRenderer(Target.parse("PYTHON::sm_80")), Counter(), random.Random(4)
    image = Tensor.empty(1, 16, 18, 18, dtype="half").conv2d(Tensor.empty(16, 16, 3, 3, dtype="half"), dtype="float")
    for kernel in [half_matmul(64, 48, 96), half_matmul(16, 40, 32), half_matmul(33, 32, 32), kernel_of(image)]:
        for first in (OptOps.TC, OptOps.TC, None):
            walk(kernel, renderer, rng, counts, first)
        scheduler, state = root_scheduler(kernel.ast, renderer), root_state(kernel, renderer)
        for opt in by_op([ACTIONS[i] for i in np.flatnonzero(legal_mask(state)[:-1])], OptOps.TC):
            one, other = step(state, ACTION_INDEX[opt]), apply_opt(scheduler, opt)
            check_axes(one, other, counts)
            check_mask(one, other, counts)
    assert counts[OptOps.TC] >= 8 and counts["steps"] > 40


def test_a_symbolic_axis_of_one_turn_is_gone():
    """Rows 4 n, n at most 1, split into fours: the loop over n has one turn at most, and tinygrad drops it."""
    kernel = kernel_of(Tensor.empty(4, 32)[: Variable("n", 0, 1).bind(1) * 4].sum(1))
    root = root_state(kernel, renderer_of("CPU"))
    ours, theirs = step(root, ACTION_INDEX[U4]), apply_opt(root_scheduler(kernel.ast, renderer_of("CPU")), U4)
    assert root.axes[0].factor == 4 and [a.size for a in ours.axes] == [4, 32]
    assert [(a.kind, a.size) for a in ours.axes] == [(r.arg[-1], int(r.vmax) + 1) for r in theirs.rngs]


def test_what_tinygrad_puts_around_a_tensor_core_is_within_reach():
    """A thread has 4 by 2 of the core's tile; around it hand-coded has four by four of them."""
    kernel, renderer = half_matmul(1024, 1024, 1024), PythonRenderer(Target.parse("PYTHON::sm_80"))
    schedule, state = hand_coded(kernel.ast, renderer), root_state(kernel, renderer)
    assert schedule[0].op is OptOps.TC
    for opt in schedule:
        assert may_take(state, ACTION_INDEX[opt]), (opt, state.schedule)
        state = step(state, ACTION_INDEX[opt])
    assert state.sizes(*IN_REGISTERS) == 4 * 2 * 4 * 4


def test_a_launch_without_locals_is_offered_where_its_groups_are_free():
    """Of renderers whose compilers are not here the class tells."""
    free = [
        launches_freely(object.__new__(kind)) for kind in (OpenCLRenderer, MetalRenderer, CUDARenderer, HIPRenderer)
    ]
    assert free == [True, True, False, False] and not launches_freely(renderer_of("CPU"))


def test_tensor_core_actions_by_hand():
    renderer = PythonRenderer(Target.parse("PYTHON::sm_80"))

    def offered(kernel):
        return [opt for opt in by_op(ACTIONS, OptOps.TC) if legal_mask(root_state(kernel, renderer))[ACTION_INDEX[opt]]]

    exact, padded = Opt(OptOps.TC, 0, (-1, 0, 1)), Opt(OptOps.TC, 0, (-1, 2, 1))
    assert offered(half_matmul(32, 32, 32)) == [exact, padded]
    assert offered(half_matmul(30, 32, 32)) == [padded]  # 30 is no multiple of the core's size
    assert offered(add_one()) == [] and offered(kernel_of(Tensor.empty(32, 32).sum(1))) == []
    assert not by_op(
        [ACTIONS[i] for i in np.flatnonzero(legal_mask(root_state(half_matmul(32, 32, 32), renderer_of("CPU")))[:-1])],
        OptOps.TC,
    )
    after = step(root_state(half_matmul(32, 32, 32), renderer), ACTION_INDEX[exact])
    rest = [ACTIONS[i] for i in np.flatnonzero(legal_mask(after)[:-1])]
    assert rest and not [opt for opt in rest if opt.op in (OptOps.TC, OptOps.GROUP, OptOps.GROUPTOP)]
    with pytest.raises(IllegalAction):
        step(after, ACTION_INDEX[exact])


def test_a_split_by_hand():
    state = root_state(add_one(300), renderer_of("CPU"))
    assert [(a.kind, a.size, a.strides) for a in state.axes] == [(AxisType.WEAK, 300, (1, 1))]
    state = step(state, ACTION_INDEX[U4])
    assert [(a.kind, a.size, a.strides) for a in state.axes] == [
        (AxisType.WEAK, 75, (4, 4)),
        (AxisType.UPCAST, 4, (1, 1)),
    ]
    assert state.schedule == (U4,) and state.sizes(AxisType.UPCAST) == 4


def test_threads_take_the_high_part_of_an_index():
    with Context(NUM_CPU_THREADS=4):
        state = step(root_state(add_one(300), renderer_of("CPU")), ACTION_INDEX[Opt(OptOps.THREAD, 0, 4)])
    assert {(a.kind, a.size, a.strides) for a in state.axes} == {
        (AxisType.THREAD, 4, (75, 75)),
        (AxisType.WEAK, 75, (1, 1)),
    }


def test_illegal_actions_are_refused():
    state = root_state(add_one(300), renderer_of("CPU"))
    for opt in (Opt(OptOps.UPCAST, 0, 7), Opt(OptOps.UPCAST, 3, 2), Opt(OptOps.UNROLL, 0, 4), Opt(OptOps.LOCAL, 0, 4),
                Opt(OptOps.SWAP, 0, 1), Opt(OptOps.TC, 0, (-1, 0, 1))):  # fmt: skip
        assert not legal_mask(state)[ACTION_INDEX[opt]]
        with pytest.raises(IllegalAction):
            step(state, ACTION_INDEX[opt])
    with pytest.raises(IllegalAction):
        step(state, STOP_INDEX)


def test_what_the_mask_refuses_as_an_action_is_never_legal_for_tinygrad():
    """step() and tinygrad refuse the same actions, those included that the mask leaves out for their size."""
    rng = random.Random(5)
    for kernel in rng.sample(corpus.load(), 6):
        scheduler, state = root_scheduler(kernel.ast, renderer_of("CPU")), root_state(kernel, renderer_of("CPU"))
        for i, opt in enumerate(ACTIONS[:-1]):
            try:
                step(state, i)
                legal = True
            except IllegalAction:
                legal = False
            assert legal == accepts(scheduler, opt), (kernel.name, opt)


def test_only_stop_is_left_after_the_last_step():
    state = root_state(add_one(2**12), renderer_of("CPU"))
    for n in range(MAX_STEPS):
        assert legal_mask(state).sum() > 1, n
        state = (
            step(state, int(np.flatnonzero(legal_mask(state))[0]))
            if n < 3
            else replace(state, schedule=(*state.schedule, U2))
        )
    assert len(state.schedule) == MAX_STEPS and np.flatnonzero(legal_mask(state)).tolist() == [STOP_INDEX]
    assert [a for a in range(N_ACTIONS) if may_take(state, a)] == [STOP_INDEX]


def test_a_mask_is_worked_out_once_and_nobody_can_change_it():
    root, other = (space.root_state(half_matmul(64, 48, 96), renderer_of("CPU")) for _ in range(2))
    again = [space.apply_to_state(space.apply_to_state(root, U4), U2) for _ in range(2)]
    assert space.legal_mask(again[0]) is space.legal_mask(again[1]) is not space.legal_mask(root)
    fresh = space.legal_mask(space.apply_to_state(space.apply_to_state(other, U4), U2))
    assert fresh is not space.legal_mask(again[0]) and (fresh == space.legal_mask(again[0])).all()
    with pytest.raises(ValueError, match="read-only"):
        space.legal_mask(root)[0] = True


def test_symbolic_axes_are_split_only_by_what_divides_them():
    state = root_state(symbolic(), renderer_of("CPU"))
    (free,) = [a for a in state.axes if a.factor]
    assert free.kind is AxisType.REDUCE and not free.divides(2)
    offered = [ACTIONS[i] for i in np.flatnonzero(legal_mask(state)[:-1])]
    assert offered and not [o for o in offered if o.op in (OptOps.UNROLL, OptOps.PADTO)]


def test_the_order_of_independent_splits_does_not_matter():
    kernel = kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 48))
    rows, columns = Opt(OptOps.UPCAST, 0, 4), Opt(OptOps.UPCAST, 1, 2)
    one = space.state_after(kernel, (rows, columns), renderer_of("CPU"))
    two = space.state_after(kernel, (columns, rows), renderer_of("CPU"))
    plain = [sorted((a.kind.name, a.size, a.strides) for a in s.axes) for s in (one, two)]
    assert plain[0] == plain[1] and space.root_of(one).schedule == ()


def test_kernels_of_one_program_are_told_apart():
    names = [k.key for k in kernels_of(Tensor.empty(40, 50).softmax(-1))]
    assert len(names) == len(set(names)) >= 2
