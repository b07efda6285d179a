"""Paths of real kernels: what stands where, and that an action's row is told from the root alone."""

import numpy as np
import pytest
from tiny import U2, U4, add_one, kernel_of
from tinygrad import Tensor

from autotune import corpus
from autotune.compiler import Opt, OptOps, renderer_of
from autotune.data import Dataset, add_shipped
from autotune.features import OPS, log2, summary
from autotune.paths import ROOFLINE, ROW_WIDTH, TOKENS, action_row, action_rows, context, paths_from, paths_of
from autotune.space import ACTIONS, STOP_INDEX, legal_mask, root_state, state_after, step
from sims import SimulatorError

RENDERER = renderer_of("CPU")


def test_prefixes_hold_their_summaries_and_known_times() -> None:
    kernel = add_one(288)
    states = [state_after(kernel, s, RENDERER) for s in ((), (U2,), (U2, U4))]
    paths = paths_of(states, np.array([-10.0, -11.0, -12.0]))
    assert paths.length.tolist() == [0, 1, 2] and paths.kernel.tolist() == [0, 0, 0]
    for n in range(3):
        for t in range(n + 1):
            np.testing.assert_array_equal(paths.states[n, t], summary(states[t]))
        assert paths.log_time[n, : n + 1].tolist() == [-10.0, -11.0, -12.0][: n + 1]
        assert np.isnan(paths.log_time[n, n + 1 :]).all() and not paths.actions[n, n:].any()
    np.testing.assert_array_equal(paths.actions[2, :2], [action_row(states[0], U2), action_row(states[0], U4)])


def test_groups_keep_the_times_of_two_machines_apart() -> None:
    state = root_state(add_one(288), RENDERER)
    paths = paths_of([state, state], np.array([-10.0, -11.0]), np.array([7, 3]))
    assert paths.kernel.tolist() == [0, 1] and paths.log_time[:, 0].tolist() == [-10.0, -11.0]
    np.testing.assert_array_equal(paths.context[0], paths.context[1])


def test_action_rows_tell_legal_actions_apart() -> None:
    root = root_state(kernel_of(Tensor.empty(32, 64) @ Tensor.empty(64, 48)), RENDERER)
    rows = action_rows(root)
    assert rows.shape == (len(ACTIONS), ROW_WIDTH) and not rows[STOP_INDEX].any()
    legal = np.flatnonzero(legal_mask(root))
    assert len(np.unique(rows[legal], axis=0)) == len(legal) > 8
    assert (rows[:-1, : len(OPS)].sum(axis=1) == 1).all()
    after = step(root, int(legal[0]))
    assert after.root is root  # a row never needs the state after: it is made from the root
    np.testing.assert_array_equal(paths_of([after]).actions[0, 0], rows[legal[0]])


def test_context_tokens_stand_for_device_kernel_axes_and_accesses() -> None:
    root = root_state(kernel_of(Tensor.empty(32, 64) @ Tensor.empty(64, 48)), RENDERER)
    tokens, present = context(root)
    assert len(tokens) == TOKENS and present.sum() == 2 + len(root.axes) + len(root.accesses)
    kinds = tokens[present][:, :4]
    assert kinds.sum(axis=0).tolist() == [1, 1, len(root.axes), len(root.accesses)]
    assert not tokens[~present].any()


def test_the_rooflines_columns_are_what_they_say() -> None:
    kernel = kernel_of(Tensor.empty(32, 64) @ Tensor.empty(64, 48))
    root, tiled = root_state(kernel, RENDERER), state_after(kernel, (U4,), RENDERER)
    flops, size = kernel.work
    turns = 32 * 64 * 48
    # a tile of one element touches each of its three buffers once; four rows of it two of them four times, far apart
    for state, part, vectors in ((root, 1, 3), (tiled, 4, 4 + 4 + 1)):
        wanted = [log2(flops), log2(size), log2(turns / part), log2(turns / part) + log2(vectors)]
        found = summary(state)
        np.testing.assert_allclose([sum(found[list(term)]) for term in ROOFLINE], wanted, rtol=1e-6)


def test_what_does_not_fit_is_a_typed_error() -> None:
    with pytest.raises(SimulatorError, match="no schedules"):
        paths_of([])
    state = state_after(add_one(288), (U2, U4, Opt(OptOps.UPCAST, 0, 3)), RENDERER)
    with pytest.raises(SimulatorError, match="3 actions does not fit a path of 2"):
        paths_of([state], steps=2)


def test_shipped_trials_become_paths() -> None:
    data = Dataset(RENDERER)
    kernels = corpus.load("train")[:3]
    assert add_shipped(data, "CPU", kernels) > 0
    paths = paths_from(data)
    assert len(paths) == len(data) and np.isfinite(paths.log_time[np.arange(len(paths)), paths.length]).all()
