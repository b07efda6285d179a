"""The batched dynamics against the scalar ones: seeded walks over the corpus, every action of the vocabulary at every step."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from tiny import U2, U4, add_one, kernel_of, symbolic
from tinygrad import Context, Tensor, Variable
from tinygrad.helpers import Target
from tinygrad.runtime.ops_python import PythonRenderer

from autotune import corpus
from autotune.batch import KINDS, NONE, Batch
from autotune.compiler import AxisType, Opt, OptOps, hand_coded, renderer_of
from autotune.errors import IllegalAction
from autotune.features import summary
from autotune.kernel import Kernel
from autotune.space import (
    ACTION_INDEX,
    ACTIONS,
    MAX_STEPS,
    N_ACTIONS,
    STOP_INDEX,
    State,
    legal_mask,
    root_state,
    state_after,
    step,
)

GPU = PythonRenderer(Target.parse("PYTHON::sm_80"))  # locals, groups, shared memory, tensor cores
CPU = renderer_of("CPU")
EXACT = Opt(OptOps.TC, 0, (-1, 0, 1))
SWAP = ACTION_INDEX[Opt(OptOps.SWAP, 0, 1)]


def half_matmul(m: int, n: int, k: int) -> Kernel:
    return kernel_of(Tensor.empty(m, k, dtype="half").matmul(Tensor.empty(k, n, dtype="half"), dtype="float"))


def half_convolution() -> Kernel:
    """Has more loops after a tensor-core action than any other kernel here."""
    image, weight = Tensor.empty(2, 64, 34, 34, dtype="half"), Tensor.empty(64, 64, 3, 3, dtype="half")
    return kernel_of(image.conv2d(weight, dtype="float"))


def multiples_of_four(least: int = 1, most: int = 64) -> Kernel:
    """Sums over the first 4n of the rows: a symbolic axis that can be split."""
    return kernel_of(Tensor.empty(4 * most, 32)[: Variable("n", least, most).bind(most) * 4].sum(0))


def check(batch: Batch, states: Sequence[State]) -> np.ndarray:
    """Each row is what the scalar version says; returns the mask [B, A]."""
    assert batch.schedules == [s.schedule for s in states] and len(batch) == len(states)
    mask, expected = batch.legal_mask(), np.array([legal_mask(s) for s in states])
    assert mask.dtype == bool and mask.shape == (len(states), N_ACTIONS)
    wrong = [(states[b].schedule, ACTIONS[a], mask[b, a]) for b, a in np.argwhere(mask != expected)]
    assert not wrong, wrong
    numbers = batch.summary()
    assert numbers.dtype == np.float32
    np.testing.assert_allclose(numbers, np.array([summary(s) for s in states]), rtol=1e-6, atol=1e-6)
    for row, state in enumerate(states):
        assert axes_of(batch, row, len(state.accesses)) == expected_axes(state), state.schedule
    return mask


def axes_of(batch: Batch, row: int, accesses: int) -> list[tuple]:
    """The loops of a row as plain numbers, with the place of their id among all ids."""
    axes = [values[row].tolist() for values in batch.axes]
    there = [i for i, kind in enumerate(axes[0]) if kind != NONE]
    ranks = sorted(axes[3][i] for i in there)
    return [(KINDS[axes[0][i]], axes[1][i], axes[2][i], ranks.index(axes[3][i]), *(values[i] for values in axes[4:7]),
             axes[7][i][:accesses]) for i in there]  # fmt: skip


def expected_axes(state: State) -> list[tuple]:
    ids = sorted(a.id for a in state.axes)
    return [(a.kind, a.size, a.factor, ids.index(a.id), a.threadable, a.groupable, a.masked, list(a.strides))
            for a in state.axes]  # fmt: skip


def pick(mask: np.ndarray, rng: random.Random, first: bool) -> int | None:
    """An action of a random kind, so that the rare kinds are met; at first a tensor core, where there is one."""
    kinds: dict[str, list[int]] = {}
    for i in np.flatnonzero(mask[:-1]):
        kinds.setdefault(ACTIONS[i].op.name, []).append(int(i))
    if not kinds:
        return None
    return rng.choice(kinds["TC" if first and "TC" in kinds else rng.choice(sorted(kinds))])


def walk(states: list[State], rng: random.Random) -> Counter:
    """All states together to their ends, each step checked; counts the steps by kind."""
    batch, counts = Batch.of(states), Counter()
    mask = check(batch, states)
    for depth in range(MAX_STEPS):
        chosen = [pick(row, rng, depth == 0) for row in mask]
        alive = np.array([action is not None for action in chosen])
        if not alive.any():
            break
        actions = [action for action in chosen if action is not None]
        states = [step(s, a) for s, a in zip(np.array(states, object)[alive], actions, strict=True)]
        batch = batch.take(alive).step(np.array(actions))
        mask = check(batch, states)
        counts.update(ACTIONS[a].op for a in actions)
    return counts


def test_walks_agree_on_cpu():
    with Context(NUM_CPU_THREADS=8):  # so that THREAD is legal on a machine with any number of cores
        kernels = [*random.Random(0).sample(corpus.load(), 280), symbolic(), multiples_of_four()]
        counts = walk([root_state(k, CPU) for k in kernels], random.Random(1))
    assert counts.total() > 1500
    assert all(counts[op] > 100 for op in (OptOps.UPCAST, OptOps.UNROLL, OptOps.THREAD, OptOps.PADTO)), counts


def test_walks_agree_on_a_gpu():
    half = [half_matmul(*size) for size in ((64, 48, 96), (16, 40, 32), (33, 32, 32))]
    kernels = [*random.Random(2).sample(corpus.load(), 280), symbolic(), multiples_of_four(), *half, half_convolution()]
    counts = walk([root_state(k, GPU) for k in kernels], random.Random(3))
    with Context(ALLOW_TF32=1):  # so that the corpus too has kernels for tensor cores
        counts += walk([root_state(k, GPU) for k in kernels[:12]], random.Random(4))
    assert counts.total() > 1500 and counts[OptOps.TC] >= 5
    assert all(counts[op] > 40 for op in OptOps if op not in (OptOps.THREAD, OptOps.TC, OptOps.NOLOCALS)), counts
    assert not counts[OptOps.NOLOCALS]  # the code is compiled for groups of one thread


def test_step_takes_what_the_scalar_step_takes():
    """Those actions included that the mask leaves out for their size, and after an Opt outside of the vocabulary."""
    kernel, odd = half_matmul(64, 48, 96), Opt(OptOps.UPCAST, 1, 6)
    states = [root_state(kernel, GPU), state_after(kernel, (odd,), GPU), state_after(kernel, (EXACT, U2), GPU),
              state_after(kernel, (Opt(OptOps.GROUP, 0, 16),), GPU), *(root_state(k, GPU) for k in (multiples_of_four(), multiples_of_four(0, 1)))]  # fmt: skip
    states += [root_state(k, CPU) for k in random.Random(4).sample(corpus.load(), 6)]
    batch, actions = Batch.of(states), np.arange(N_ACTIONS)
    check(batch, states)
    for row, state in enumerate(states):
        after = {}
        for action in actions:
            try:
                after[action] = step(state, action)
            except IllegalAction:
                continue
        legal = np.flatnonzero(batch.legal[row]).tolist()
        assert legal == list(after), (state.schedule, [ACTIONS[i] for i in set(legal) ^ set(after)])
        check(batch.take(np.full(len(legal), row)).step(np.array(legal)), list(after.values()))


def test_a_batch_begins_anywhere():
    """Also after schedules of tinygrad's heuristic, each of its own length."""
    kernels = random.Random(5).sample(corpus.load(), 40)
    states = [state_after(k, hand_coded(k.ast, GPU), GPU) for k in kernels]
    assert len({len(s.schedule) for s in states}) > 3
    walk(states, random.Random(6))


def test_rows_are_independent():
    """One state alone gives the same numbers as among others that have more loops and accesses; order does not matter."""
    rng = np.random.default_rng(7)
    states = [root_state(k, GPU) for k in random.Random(8).sample(corpus.load(), 30)]
    batch, order = Batch.of(states), rng.permutation(len(states))
    mask, numbers = batch.legal_mask(), batch.summary()
    actions = (mask * rng.random(mask.shape))[:, :-1].argmax(1)
    after = batch.step(actions)
    shuffled = batch.take(order).step(actions[order])
    assert (shuffled.legal_mask() == after.legal_mask()[order]).all()
    assert (shuffled.summary() == after.summary()[order]).all()
    assert shuffled.schedules == [after.schedules[i] for i in order]
    for i, state in enumerate(states):
        one = Batch.of([state])
        assert (one.legal_mask()[0] == mask[i]).all() and (one.summary()[0] == numbers[i]).all()
        assert (one.step(actions[i : i + 1]).summary()[0] == after.summary()[i]).all()


def test_a_step_leaves_the_batch_as_it_was():
    state = root_state(kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 48)), GPU)
    batch = Batch.of([state, state])
    for action in np.flatnonzero(batch.legal_mask()[0])[:-1]:
        batch.step(np.array([action, action]))
    check(batch, [state, state])


def test_swapping_twice_gives_back():
    batch = Batch.of([root_state(half_matmul(64, 48, 96), GPU)])
    once = batch.step(np.array([SWAP]))
    twice = once.step(np.array([SWAP]))
    assert (once.axes.size[0, :2].tolist(), twice.axes.size[0, :2].tolist()) == ([48, 64], [64, 48])
    assert all((a == b).all() for a, b in zip(batch.axes, twice.axes, strict=True))


def test_a_split_by_hand():
    batch = Batch.of([root_state(add_one(300), CPU)] * 2).step(np.array([ACTION_INDEX[U4], ACTION_INDEX[U2]]))
    there = batch.axes.kind != NONE
    assert there.sum(1).tolist() == [2, 2] and [KINDS[k] for k in batch.axes.kind[0, :2]] == [
        AxisType.WEAK,
        AxisType.UPCAST,
    ]
    assert batch.axes.size[:, :2].tolist() == [[75, 4], [150, 2]]
    assert batch.axes.strides[:, :2].tolist() == [[[4, 4], [1, 1]], [[2, 2], [1, 1]]]
    assert batch.schedules == [(U4,), (U2,)] and batch.sizes(AxisType.UPCAST).tolist() == [4, 2]


def test_symbolic_axes_are_split_only_by_what_divides_them():
    batch = Batch.of([root_state(symbolic(), GPU), root_state(multiples_of_four(), GPU)])
    groups = [
        [ACTIONS[i].arg for i in np.flatnonzero(row) if ACTIONS[i] and ACTIONS[i].op is OptOps.GROUP]
        for row in batch.legal
    ]
    assert groups == [[], [4]] and not batch.legal[:, ACTION_INDEX[Opt(OptOps.UNROLL, 0, 4)]].any()
    after = batch.take(np.array([1])).step(np.array([ACTION_INDEX[Opt(OptOps.GROUP, 0, 4)]]))
    free = after.of_kind(AxisType.REDUCE)
    assert after.axes.size[free].tolist() == [64] and after.axes.factor[free].tolist() == [1]


def test_only_stop_is_left_after_the_last_step():
    state = root_state(add_one(2**12), CPU)
    batch = Batch.of([state, state])
    for n in range(MAX_STEPS):
        assert batch.legal_mask()[0].sum() > 1, n
        batch = batch.step(np.full(2, ACTION_INDEX[U2]) if n < 4 else np.flatnonzero(batch.legal_mask()[0])[[0, 0]])
    assert [len(s) for s in batch.schedules] == [MAX_STEPS] * 2
    assert np.argwhere(batch.legal_mask()).tolist() == [[0, STOP_INDEX], [1, STOP_INDEX]]


def test_numbers_beyond_an_integer_do_not_overflow():
    kernel = kernel_of(Tensor.empty(2**24, 2**24) @ Tensor.empty(2**24, 2**24))
    assert kernel.iterations == 2.0**72
    walk([root_state(kernel, GPU)] * 8, random.Random(9))


@pytest.mark.parametrize(
    "action, message",
    [
        (ACTION_INDEX[Opt(OptOps.UPCAST, 0, 7)], "row 1: action .*UPCAST.* is not legal after 1 actions"),
        (ACTION_INDEX[EXACT], "row 1: action .*TC.* is not legal after 1 actions"),
        (STOP_INDEX, "row 1: action .*STOP"),
        (N_ACTIONS, "row 1: action .*vocabulary"),
        (-2, "row 1: action -2 .*vocabulary"),
    ],
)
def test_an_illegal_action_is_named_with_its_row(action, message):
    batch = Batch.of([root_state(half_matmul(64, 48, 96), GPU)] * 2).step(np.full(2, ACTION_INDEX[U2]))
    with pytest.raises(IllegalAction, match=message):
        batch.step(np.array([ACTION_INDEX[U2], action]))


def test_a_batch_may_run_empty():
    none = Batch.of([root_state(add_one(), CPU)]).take(np.array([False])).step(np.array([], int))
    assert len(none) == 0 and none.legal_mask().shape == (0, N_ACTIONS) and none.summary().shape[0] == 0


def test_a_batch_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="at least one state"):
        Batch.of([])
    batch = Batch.of([root_state(add_one(), CPU)] * 2)
    for actions in (np.zeros(3, int), np.zeros((2, 1), int), np.zeros(2)):
        with pytest.raises(ValueError, match="as many actions"):
            batch.step(actions)
