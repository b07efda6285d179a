"""What was fastest on similar kernels: learned from trials, recalled by likeness, replayed as far as it is legal."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tiny import U2, U4, add_one, kernel_of
from tinygrad import Tensor

from autotune import corpus
from autotune.budget import Budget
from autotune.compiler import Opt, OptOps, renderer_of
from autotune.data import Dataset
from autotune.errors import UsageError
from autotune.files import DATA
from autotune.guide import Guide
from autotune.kernel import Kernel
from autotune.memory import Memory, traits
from autotune.records import Records, Trial
from autotune.search.mixed import MixedSearch
from autotune.search.recall import RecallSearch
from autotune.space import apply_to_state, root_state
from autotune.tuner import Tuner

CPU = renderer_of("CPU")
MATMUL = kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 48))
ALIKE = kernel_of(Tensor.empty(64, 64) @ Tensor.empty(64, 64))
UNROLL = Opt(OptOps.UNROLL, 0, 4)


def timed(kernel: Kernel, times: dict[tuple, float]) -> list[Trial]:
    return [Trial(kernel.key, s, "ok", (t,), code_hash=str(i)) for i, (s, t) in enumerate(times.items())]


def learned(*kernels: tuple[Kernel, dict[tuple, float]]) -> Memory:
    data = Dataset(CPU)
    for kernel, times in kernels:
        data.add(kernel, timed(kernel, times), "here")
    memory = Memory.learn(data)
    assert memory is not None
    return memory


OF_MATMUL = {(): 8.0, (U4,): 1.0, (U4, UNROLL): 1.05, (U2,): 2.0}
OF_ADD = {(): 2.0, (U2,): 1.0}


def test_the_fastest_are_remembered_and_what_is_much_slower_is_not():
    memory = learned((MATMUL, OF_MATMUL))
    assert memory.schedules == [[(U4,), (U4, UNROLL)]]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_several_sources_the_one_that_gained_most_is_remembered(order: tuple[int, int]):
    """A slower machine on which U4 made it 8 times as fast, and a faster one on which someone tried U2 alone."""
    sources = {(): 8.0, (U4,): 1.0}, {(): 1.0, (U2,): 0.5}
    data = Dataset(CPU)
    for i in order:
        data.add(MATMUL, timed(MATMUL, sources[i]), f"machine {i}")
    assert Memory.learn(data).schedules == [[(U4,)]]  # type: ignore[union-attr]


def test_where_nothing_was_gained_there_is_nothing_to_remember():
    data = Dataset(CPU)
    data.add(MATMUL, timed(MATMUL, {(): 1.0, (U2,): 2.0, (U4,): 1.05}), "here")  # the last within WORTH
    assert Memory.learn(data) is None


def test_the_most_alike_comes_first_and_of_each_the_fastest():
    memory = learned((add_one(), OF_ADD), (MATMUL, OF_MATMUL))
    assert memory.recall(root_state(ALIKE, CPU), 2) == [(U4,), (U2,), (U4, UNROLL)]
    assert memory.recall(root_state(ALIKE, CPU), 1) == [(U4,), (U4, UNROLL)]
    assert memory.recall(root_state(add_one(320), CPU), 1) == [(U2,)]


def test_the_order_of_trials_and_faster_machines_change_nothing():
    """Metamorphic."""
    turned = dict(reversed(OF_MATMUL.items()))
    other = learned((MATMUL, {s: t / 3 for s, t in turned.items()}))
    assert other.schedules == learned((MATMUL, OF_MATMUL)).schedules


def test_a_memory_is_kept_with_its_guide(tmp_path: Path):
    guide, memory = Guide.load(DATA / "guide-cpu"), learned((add_one(), OF_ADD), (MATMUL, OF_MATMUL))
    guide.memory = memory
    guide.save(tmp_path / "kept", {})
    again = Guide.load(tmp_path / "kept").memory
    assert again is not None and again.schedules == memory.schedules
    np.testing.assert_array_equal(again.features, memory.features)


@pytest.mark.parametrize("damage", [
    lambda f, a: (f[:, :-1], a), lambda f, a: (f, a[:-1]), lambda f, a: (f * np.nan, a), lambda f, a: (f, a + 1000),
    lambda f, a: (f, a - 2), lambda f, a: (f, a[:, :2]), lambda f, a: (f, a.astype(np.float32)),
    lambda f, a: (f.astype(np.int32), a), lambda f, a: (f, a[0]), lambda f, a: (f[:0], a[:0]),
])  # fmt: skip
def test_a_damaged_memory_is_refused(damage):
    arrays = learned((add_one(), OF_ADD), (MATMUL, OF_MATMUL)).state()
    features, actions = damage(arrays["features"], arrays["actions"])
    with pytest.raises(ValueError, match="damaged"):
        Memory.load({"features": features, "actions": actions}, len(traits(root_state(MATMUL, CPU))))


def test_what_is_recalled_is_legal_here_new_and_never_asked_twice():
    guide = Guide.load(DATA / "guide-cpu")
    search = RecallSearch(MATMUL, CPU, 0, guide)
    first = search.states()[0].schedule
    search.tell([Trial(MATMUL.key, first, "ok", (1.0,))])
    asked = [s for _ in range(20) for s in search.ask(8)]
    assert len(asked) == len(set(asked)) >= 8 and () not in asked and first not in asked
    for schedule in asked:
        state = root_state(MATMUL, CPU)
        for opt in schedule:
            state = apply_to_state(state, opt)  # raises where it is not legal
    assert not search.ask(8)


def test_what_was_just_found_of_a_twin_is_recalled_first_but_nothing_of_the_kernel_itself():
    memory = learned((add_one(), OF_ADD), (MATMUL, OF_MATMUL))
    own = memory.copy()
    own.add(root_state(ALIKE, CPU), [((U2,), 1.0), ((U4, UNROLL), 1.01), ((U4,), 2.0), ((), 0.5)])
    twin = kernel_of(Tensor.empty(64, 64) @ Tensor.empty(64, 72))
    assert own.recall(root_state(twin, CPU), 1) == [(U2,), (U4, UNROLL)]
    assert own.recall(root_state(ALIKE, CPU), 1) == memory.recall(root_state(ALIKE, CPU), 1) == [(U4,), (U4, UNROLL)]
    own.add(root_state(ALIKE, CPU), [((U4,), 1.0)])
    assert own.recall(root_state(twin, CPU), 1) == [(U4,)] and not memory.added


def test_of_what_has_no_time_any_more_nothing_is_told():
    """Its schedules were refuted: what was added of it before goes."""
    own, twin = learned((add_one(), OF_ADD)).copy(), kernel_of(Tensor.empty(64, 64) @ Tensor.empty(64, 72))
    own.add(root_state(ALIKE, CPU), [((), 2.0), ((U2,), 1.0)])
    assert own.relatives(root_state(twin, CPU), 1)
    own.add(root_state(ALIKE, CPU), [((), 2.0)])
    assert not own.relatives(root_state(twin, CPU), 1)


def test_a_search_hears_of_what_is_added_while_it_goes_on():
    guide = Guide.load(DATA / "guide-cpu")
    guide.memory = learned((add_one(), OF_ADD), (ALIKE, OF_MATMUL))
    search = RecallSearch(MATMUL, CPU, 0, guide)
    strange = (Opt(OptOps.UPCAST, 1, 3),) * 2
    assert strange not in {s.schedule for s in search.states()}
    guide.memory.add(root_state(kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 45)), CPU), [(strange, 1.0)])
    assert search.ask(1)[0][:1] == strange[:1]


def test_without_a_memory_there_is_nothing_to_recall_and_mixed_does_without():
    guide = Guide.load(DATA / "guide-cpu")
    guide.memory = None
    assert RecallSearch(MATMUL, CPU, 0, guide).ask(4) == []
    search = MixedSearch(MATMUL, CPU, 0, guide)
    assert len(search.ask(4)) == 4 and "recall" not in search.origins.values()
    told = MixedSearch(MATMUL, CPU, 0, Guide.load(DATA / "guide-cpu"))
    told.ask(4)
    assert "recall" in told.origins.values()


def test_the_memory_that_ships_knows_training_kernels_only():
    memory = Guide.load(DATA / "guide-cpu").memory
    assert memory is not None and len(memory.schedules) >= 500
    known = {traits(root_state(k, CPU)).astype(np.float16).tobytes() for k in corpus.load("train")}
    assert all(row.tobytes() in known for row in memory.features)
    strangers = [traits(root_state(k, CPU)).astype(np.float16).tobytes() for k in corpus.load("held_out")]
    assert sum(row in known for row in strangers) < 0.1 * len(strangers)  # so the first half can fail


def test_a_guide_with_a_damaged_memory_is_one_line(tmp_path: Path):
    guide = Guide.load(DATA / "guide-cpu")
    guide.memory = learned((MATMUL, OF_MATMUL))
    guide.memory.features = guide.memory.features[:, 1:]
    guide.save(tmp_path / "bad", {})
    with pytest.raises(UsageError, match="does not fit"):
        Guide.load(tmp_path / "bad")


def test_the_tuner_remembers_what_it_found_and_what_is_on_record(tmp_path: Path, runner):
    with closing(Records(tmp_path / "records.db")) as records:
        records.add_fingerprint(runner.fields)
        for kernels in ([MATMUL], [add_one()]):
            guide = Guide.load(DATA / "guide-cpu")
            guide.memory = learned((add_one(512), OF_ADD))
            tuner = Tuner(records, runner, CPU, trials=2, strategy="mixed", guide=guide, progress=False)
            tuner.run(kernels, {k.key: 1 for k in kernels}, Budget(2))
    assert guide.memory is not None and set(guide.memory.added) == {MATMUL.key, add_one().key}
    root = root_state(kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 45)), CPU)
    assert guide.memory.recall(root, 1)[0] == guide.memory.added[MATMUL.key].fastest[0]
