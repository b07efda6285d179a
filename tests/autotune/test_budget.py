"""`--seconds` is for a whole program: what the final timing of winners will take is kept back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from test_never_worse import KERNELS, Adversary

from autotune import cli
from autotune.budget import Budget
from autotune.capture import Program
from autotune.compiler import renderer_of
from autotune.kernel import Kernel, Schedule
from autotune.records import Records, Trial
from autotune.report import Report
from autotune.tuner import FRESH, Tuner

PREPARED, TRIAL, DUEL = 3.0, 1.0, 2.0  # seconds of the clock below


class Slow(Adversary):
    """An honest device on a clock of its own, which only it moves: preparing a kernel, if it is not the one that it holds, takes
    3 s, a trial 1 s, a duel 2 s."""

    def __init__(self) -> None:
        super().__init__(0, 0.0, 0.0)
        self.now, self.holds = 0.0, ""

    def hold(self, kernel: Kernel) -> None:
        self.now += PREPARED * (self.holds != kernel.key)
        self.holds = kernel.key

    def baselines(self, kernel: Kernel) -> list[Trial]:
        self.hold(kernel)
        return super().baselines(kernel)

    def measure(self, kernel: Kernel, schedules: Sequence[Schedule], cutoff: float | None,
                done: Callable | None = None) -> list[Trial]:  # fmt: skip
        self.hold(kernel)
        self.now += TRIAL * len(schedules)
        return super().measure(kernel, schedules, cutoff, done)

    def _trial(self, kernel: Kernel, schedule: Schedule) -> Trial:
        return replace(super()._trial(kernel, schedule), timing_seconds=TRIAL)

    def duel(self, kernel: Kernel, schedules: Sequence[Schedule], fresh: bool = True) -> list[tuple[float, ...]]:
        if fresh:
            self.now += PREPARED
        else:
            self.hold(kernel)
        self.now += DUEL
        return super().duel(kernel, schedules, fresh)


def late(folder: Path, seconds: float, kept: bool, resumed: bool) -> float:
    """Seconds by which five kernels are done too late."""
    device, kernels = Slow(), KERNELS[:5]
    with closing(Records(folder / f"{kept}.db")) as records:
        tuner = Tuner(records, device, renderer_of("CPU"), trials=50, strategy="random", progress=False)
        if not kept:
            tuner._reserve = lambda *_: None  # type: ignore[method-assign]
        for kernel in kernels if resumed else ():
            tuner.baselines(kernel)
        device.now = 0.0
        results, done = tuner.run(kernels, {k.key: 1 for k in kernels}, Budget(250, seconds, lambda: device.now))
    assert not done and sum(r.trials for r in results) >= 4
    return device.now - seconds


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("seconds", [60.0, 120.0])
def test_a_program_is_done_in_time(tmp_path: Path, seconds: float, resumed: bool) -> None:
    """Within a batch of four trials and one comparison; the control, which keeps nothing back, is late by its finals."""
    bound = 4 * TRIAL + DUEL
    assert late(tmp_path, seconds, True, resumed) <= bound < late(tmp_path, seconds, False, resumed)


@pytest.mark.parametrize(("left", "beam", "says"), [(3, 2, "with 3 trials left"), (0, 2, "before the beam had ended"),
                                                    (0, 0, "before every kernel had its answer")])  # fmt: skip
def test_what_time_left_out_is_told(tmp_path: Path, monkeypatch, capsys, left: int, beam: int, says: str) -> None:
    script = tmp_path / "script.py"
    script.touch()
    monkeypatch.setattr(cli, "capture_script", lambda *_: Program())
    monkeypatch.setattr(cli, "check_captured", lambda *_: None)
    monkeypatch.setattr(cli, "tune", lambda *_, **__: Report("CPU", 1.0, 0, [], "seconds", left))
    command = ["tune", "--records", tmp_path / "r.db", "--strategy", "random", "--beam", beam, script]
    assert cli.main([str(part) for part in command]) == 0
    assert f"stopped by --seconds {says}; the same command" in capsys.readouterr().err


def test_what_is_kept_back_by_hand() -> None:
    now = [0.0]
    budget = Budget(100, 10.0, lambda: now[0])
    budget.reserved = 4.0
    now[0] = 5.9
    assert budget.left(8) == 8
    now[0] = 6.0
    assert budget.left(8) == 0
    budget.reserved = (
        0.0  # the kernel has no winner after all: a replay, which knows the count alone, could not tell when that was
    )
    assert budget.left(8) == 0 and budget.in_time()
    assert FRESH > 0 and Budget(100, None, lambda: now[0]).left(3) == 3
