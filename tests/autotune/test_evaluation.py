"""Strategies held against each other: a winner that fails in the last comparison gives its place to the next."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from test_never_worse import CPU, Adversary
from tiny import kernel_of
from tinygrad import Tensor

from autotune.collect import collect_kernel
from autotune.evaluation import Evaluator
from autotune.files import DATA
from autotune.guide import Guide
from autotune.measuring.runner import Refuted
from autotune.records import Records, Trial

KERNELS = [kernel_of(Tensor.empty(24, 32) @ Tensor.empty(32, 16)), kernel_of(Tensor.empty(48, 64).sum(1))]


class Refuting(Adversary):
    """An honest device, but for what it refutes: so many winners of a kernel, hand-coded among them where it says so."""

    def __init__(self, failures: int, hand: bool = False):
        super().__init__(0, failing=0.0, lying=0.0)
        self.left, self.hand = failures, hand

    def duel(self, kernel, schedules, fresh=True):
        if self.left and kernel is KERNELS[0]:
            self.left -= 1
            failed = schedules[0] if self.hand else schedules[-1]
            self.refuted.add(failed)
            raise Refuted(Trial(kernel.key, failed, "wrong_output", kind="recheck"))
        return super().duel(kernel, schedules, fresh)


def compared(folder: Path, measurer: Adversary):
    with ExitStack() as stack:
        records = lambda name: stack.enter_context(closing(Records(folder / f"{name}.db")))  # noqa: E731
        return Evaluator(records, measurer, CPU, None, ["random"], 4, 0).compare_all(KERNELS)


def test_a_refuted_winner_gives_its_place_to_the_next_and_stays_refuted(tmp_path: Path):
    honest = compared(tmp_path / "honest", Refuting(0))
    measurer = Refuting(2)
    found = compared(tmp_path / "found", measurer)
    assert [c.kernel for c in found] == KERNELS and len(measurer.refuted) == 2
    assert honest[0].schedules["random"] in measurer.refuted
    assert found[0].schedules["random"] not in measurer.refuted
    again = compared(tmp_path / "found", Refuting(0))  # from what was committed
    assert again[0].schedules == found[0].schedules


def test_who_crashed_in_a_duel_is_found_out(tmp_path: Path):
    """The device cannot know, and names the first of them: hand-coded."""
    honest = compared(tmp_path / "honest", Refuting(0))
    measurer = Refuting(0)
    bad, inner = honest[0].schedules["random"], measurer.duel

    def duel(kernel, schedules, fresh=True):
        if kernel is KERNELS[0] and bad in schedules:
            raise Refuted(Trial(kernel.key, schedules[0], "crashed", kind="recheck"))
        return inner(kernel, schedules, fresh)

    measurer.duel = duel  # type: ignore[method-assign]
    found = compared(tmp_path / "found", measurer)
    assert [c.kernel for c in found] == KERNELS and found[0].schedules["random"] != bad
    assert found[1].schedules == honest[1].schedules


@pytest.mark.parametrize("verdict", ["wrong_output", "timeout"])
def test_no_trial_is_made_of_a_kernel_whose_hand_coded_schedule_has_no_time(tmp_path: Path, capsys, verdict: str):
    """Un-optimized it runs; but there is nothing to hold a winner against."""
    measurer, asked, honest = Refuting(0), [], Refuting(0)
    measurer.measure = lambda kernel, *rest: asked.append(kernel) or honest.measure(kernel, *rest)  # type: ignore[method-assign]
    measurer.baselines = lambda kernel: (  # type: ignore[method-assign]
        honest.baselines(kernel)
        if kernel is KERNELS[1]
        else [
            Trial(kernel.key, (), "ok", (1.0,), kind="unoptimized"),
            Trial(kernel.key, (), verdict, kind="hand_coded"),
        ]
    )
    assert [c.kernel for c in compared(tmp_path, measurer)] == asked[:1] == KERNELS[1:] and len(asked) == 1
    assert "hand-coded schedule could not be timed" in capsys.readouterr().out


def test_a_kernel_that_cannot_be_prepared_is_left_out_without_a_trial(tmp_path: Path, capsys):
    measurer, asked = Refuting(0), []
    inner = measurer.measure
    measurer.measure = lambda kernel, *rest: asked.append(kernel) or inner(kernel, *rest)  # type: ignore[method-assign]
    measurer.baselines = lambda kernel: [  # type: ignore[method-assign]
        Trial(kernel.key, (), "timeout", kind=kind) for kind in ("unoptimized", "hand_coded")
    ]
    assert compared(tmp_path, measurer) == [] and asked == [] and "is left out" in capsys.readouterr().out
    with closing(Records(tmp_path / "collected.db")) as records:
        assert collect_kernel(KERNELS[0], records, measurer, "CPU", 4, 0) == 0 and asked == []


def test_where_hand_coded_itself_fails_the_kernel_is_left_out(tmp_path: Path, capsys):
    assert [c.kernel for c in compared(tmp_path, Refuting(1, hand=True))] == KERNELS[1:]
    assert "is left out" in capsys.readouterr().out


def test_all_trials_of_a_kernel_count_where_they_are_collected(tmp_path: Path):
    """Those to fine-tune, too, which no budget counts: a second time there is nothing to do."""
    with closing(Records(tmp_path / "collected.db")) as records:
        made = [
            collect_kernel(KERNELS[0], records, Refuting(0), "CPU", count, 0, label="finetune/random")
            for count in (4, 4, 6)
        ]
        assert made == [4, 0, 2]
        assert records.history(KERNELS[0].key, Adversary.fingerprint).spent == 0


def test_a_guide_beside_searches_by_itself_and_by_its_own_lights(tmp_path: Path):
    """The same guide under another name finds the same with trials of its own; one with other trees finds something else."""
    guide, other = (Guide.load(DATA / "guide-cpu") for _ in range(2))
    forest = other.simulator.trees.state()
    other.simulator.trees.load_state(forest | {"value": -forest["value"]})
    with ExitStack() as stack:
        records = lambda name: stack.enter_context(closing(Records(tmp_path / f"{name}.db")))  # noqa: E731
        others = {"same": guide, "contrary": other}
        evaluator = Evaluator(records, Adversary(0, failing=0.0, lying=0.0), CPU, guide, ["mixed"], 4, 0, others)
        (found,) = evaluator.compare_all(KERNELS[:1])
        made = {name: {t.schedule for t in file.history(KERNELS[0].key, Adversary.fingerprint).trials if t.kind == "trial"}
                for name, file in evaluator.files.items()}  # fmt: skip
    assert list(found.seconds) == ["mixed", "same", "contrary"] and set(found.trials.values()) == {4}
    assert made["mixed"] == made["same"] != made["contrary"]
