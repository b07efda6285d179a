"""What trials of similar kernels teach a search: where the simulator is wrong on them it is corrected here."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import U2, U4, kernel_of
from tinygrad import Tensor

from autotune.compiler import Opt, OptOps, renderer_of
from autotune.experiments.ablations import ABLATIONS
from autotune.files import DATA
from autotune.guide import Guide
from autotune.kernel import Kernel, Schedule
from autotune.memory import Memory, traits
from autotune.records import Trial
from autotune.search.mixed import MixedSearch
from autotune.search.relatives import SIMILAR, Relatives
from autotune.space import State, root_state, state_after
from sims.correction import Correction

CPU = renderer_of("CPU")


def matmul(m: int, k: int, n: int) -> Kernel:
    return kernel_of(Tensor.empty(m, k) @ Tensor.empty(k, n))


KERNEL, TWIN, COUSIN = matmul(64, 96, 48), matmul(64, 96, 56), matmul(32, 128, 64)
UNROLL = Opt(OptOps.UNROLL, 0, 4)
SCHEDULES: list[Schedule] = [(), (U2,), (U4,), (UNROLL,), (U2, UNROLL), (U4, UNROLL), (U4, U2), (U4, U2, UNROLL)]
UNROLLED = np.array([UNROLL in s for s in SCHEDULES])


@pytest.fixture(scope="module")
def guide() -> Guide:
    return Guide.load(DATA / "guide-cpu")


def states_of(kernel: Kernel) -> list[State]:
    return [state_after(kernel, schedule, CPU) for schedule in SCHEDULES]


def wrong_about_unrolling(guide: Guide, kernel: Kernel, by: float = 2.0) -> np.ndarray:
    """Log2 times as the simulator expects them, but that whatever unrolls takes 2^`by` times as long."""
    return guide.members(states_of(kernel), guide.simulator.trees).mean(0) + by * UNROLLED


def taught(*told: tuple[Kernel, np.ndarray]) -> Guide:
    """The guide that ships, with a memory of these kernels' log2 times of all SCHEDULES."""
    guide = Guide.load(DATA / "guide-cpu")
    assert guide.memory is not None
    for kernel, times in told:
        guide.memory.add(root_state(kernel, CPU), list(zip(SCHEDULES, (2.0**times).tolist(), strict=True)))
    return guide


def moved(search: MixedSearch) -> np.ndarray:
    """By how much all that was told moves what is believed of SCHEDULES, mean over members [N]."""
    return np.broadcast_to(search._errors(states_of(KERNEL)).mean(0), len(SCHEDULES))


def test_what_is_slow_on_its_relatives_is_expected_to_be_slow_here(guide: Guide):
    """The simulator believes in unrolling, and the device does not. Without relatives nothing moves: 0 log2 units."""
    own = taught(*((k, wrong_about_unrolling(guide, k)) for k in (TWIN, COUSIN)))
    shift = moved(MixedSearch(KERNEL, CPU, 0, own))
    assert shift[UNROLLED].mean() - shift[~UNROLLED].mean() > 1.0
    assert not moved(MixedSearch(KERNEL, CPU, 0, guide)).any()
    assert not moved(ABLATIONS["no-relatives"](KERNEL, CPU, 0, own)).any()
    own.memory = None
    assert not moved(MixedSearch(KERNEL, CPU, 0, own)).any()


def test_how_fast_relatives_are_as_a_whole_changes_nothing(guide: Guide):
    """Metamorphic: another level of each; and times that are what the simulator expects, up to a level, move nothing."""
    shifts = [
        moved(MixedSearch(KERNEL, CPU, 0, taught(
            (TWIN, wrong_about_unrolling(guide, TWIN) + a), (COUSIN, wrong_about_unrolling(guide, COUSIN) + b))))
        for a, b in ((0.0, 0.0), (5.0, -3.0))
    ]  # fmt: skip
    np.testing.assert_allclose(*shifts, atol=1e-4)
    assert (
        np.abs(moved(MixedSearch(KERNEL, CPU, 0, taught((TWIN, wrong_about_unrolling(guide, TWIN, 0.0)))))).max() < 1e-3
    )


def test_own_trials_and_those_of_relatives_are_put_together(guide: Guide):
    """Against the correction itself, all that it is given written out."""
    own = taught((TWIN, wrong_about_unrolling(guide, TWIN)), (COUSIN, wrong_about_unrolling(guide, COUSIN)))
    search = MixedSearch(KERNEL, CPU, 0, own)
    search.tell(
        [Trial(KERNEL.key, (), "ok", (2.0**-8,), kind="unoptimized"), Trial(KERNEL.key, (U4,), "ok", (2.0**-10,))]
    )
    known = [search.root, state_after(KERNEL, (U4,), CPU), *states_of(TWIN), *states_of(COUSIN)]
    times = [-8.0, -10.0, *wrong_about_unrolling(guide, TWIN), *wrong_about_unrolling(guide, COUSIN)]
    kernel = np.array([0, 0] + [1] * len(SCHEDULES) + [2] * len(SCHEDULES))
    trees, features = own.simulator.trees, [own.memory.features.astype(np.float32).std(0) + 1e-3]  # type: ignore[union-attr]
    seen = np.stack([traits(root_state(k, CPU)) for k in (KERNEL, TWIN, COUSIN)]) / features[0]
    distance = np.array([[np.mean((a - b) ** 2) for b in seen] for a in seen])
    asked = states_of(KERNEL)
    expected = Correction(own.leaves(known), kernel, (np.array(times) - own.members(known, trees)).T, distance)(
        own.leaves(asked)
    )
    np.testing.assert_allclose(search._errors(asked), expected.T, atol=1e-4)


def test_a_kernel_is_no_relative_of_its_own(guide: Guide):
    assert not moved(MixedSearch(KERNEL, CPU, 0, taught((KERNEL, wrong_about_unrolling(guide, KERNEL))))).any()


def test_what_is_told_later_is_heard(guide: Guide):
    own = taught()
    search = MixedSearch(KERNEL, CPU, 0, own)
    assert not moved(search).any() and own.memory is not None
    times = wrong_about_unrolling(guide, TWIN)
    own.memory.add(root_state(TWIN, CPU), list(zip(SCHEDULES[:4], (2.0 ** times[:4]).tolist(), strict=True)))
    few = moved(search)
    own.memory.add(root_state(TWIN, CPU), list(zip(SCHEDULES, (2.0**times).tolist(), strict=True)))
    assert few.any() and np.abs(few - moved(search)).max() > 1e-3
    np.testing.assert_allclose(moved(search), moved(MixedSearch(KERNEL, CPU, 0, own)), atol=1e-9)


def test_only_the_most_alike_are_heard(guide: Guide):
    """A hundred times as much of everything is less alike than what differs in one size; a schedule that is not legal on the
    machine that recalls it is passed over."""
    near = [matmul(64, 96, 4 * n) for n in range(13, 13 + SIMILAR)]
    far = matmul(2048, 2048, 1024)
    memory = taught(*((k, wrong_about_unrolling(guide, k)) for k in (far, *near))).memory
    assert isinstance(memory, Memory)
    relatives = Relatives(root_state(KERNEL, CPU), memory)
    told = relatives.told()
    assert {own.root.kernel.key for own in told} == {k.key for k in near} and relatives.distance(told).shape == (9, 9)
    assert (np.diff(relatives.distance(told)[0]) >= 0).all()
    memory.add(root_state(TWIN, CPU), [((U4,), 1.0), ((Opt(OptOps.UPCAST, 9, 4),), 0.5)])
    (twin,) = (own for own in relatives.told() if own.root.kernel.key == TWIN.key)
    states, times = relatives.trials(twin)
    assert [s.schedule for s in states] == [(U4,)] and times == [0.0]


def test_a_search_asks_for_what_its_relatives_have_shown(guide: Guide):
    """Told that unrolling is slow on two relatives, `mixed` measures less of it; the ablation does not hear of it."""
    own = taught(*((k, wrong_about_unrolling(guide, k, by=4.0)) for k in (TWIN, COUSIN)))

    def unrolled(search: MixedSearch) -> int:
        search.recall.memory = None  # a warm start is another matter
        return sum(any(opt.op is OptOps.UNROLL for opt in schedule) for schedule in search.ask(16))

    heard, deaf = MixedSearch(KERNEL, CPU, 0, own), ABLATIONS["no-relatives"](KERNEL, CPU, 0, own)
    assert unrolled(heard) < unrolled(deaf) == unrolled(MixedSearch(KERNEL, CPU, 0, guide))
