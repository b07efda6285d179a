"""The noise floor: measured, kept in the records, printed, and asked of every winner."""

from __future__ import annotations

import math
from contextlib import closing

import pytest
from test_never_worse import CPU, KERNELS, Adversary

from autotune import cli, cli_devices
from autotune.budget import Budget
from autotune.compiler import fingerprint
from autotune.measuring import noise
from autotune.measuring.noise import Length, curve_of, floor_at, measure_noise
from autotune.measuring.runner import NOISE_FLOOR, Runner, Unprepared
from autotune.records import Records, fingerprint_id
from autotune.tuner import Tuner

CURVE = ((1e-6, 0.08), (1e-4, 0.04), (1e-2, 0.01))


def test_floor_at_by_hand():
    assert floor_at(None, 1.0) == floor_at((), 1.0) == floor_at(CURVE, 0.0) == NOISE_FLOOR
    assert [floor_at(CURVE, s) for s, _ in CURVE] == pytest.approx([0.08, 0.04, 0.01])
    assert floor_at(CURVE, 1e-5) == pytest.approx(0.06)  # half way between, by the logarithm
    assert floor_at(CURVE, 1e-9) == pytest.approx(0.08) and floor_at(CURVE, 100.0) == pytest.approx(0.01)


def test_the_floor_is_the_95_percent_quantile():
    length = Length(1e-3, tuple(i / 100 for i in range(101)))
    assert length.floor == pytest.approx(0.95)
    assert curve_of([Length(2.0, (0.5,)), Length(1.0, (0.25,))]) == ((1.0, 0.25), (2.0, 0.5))


def test_lengths_that_took_the_same_count_as_one_with_the_largest_floor(tmp_path):
    curve = curve_of([Length(2.0, (0.5,)), Length(1.0, (0.25,)), Length(1.0, (0.75,)), Length(1.0, (0.5,))])
    assert curve == ((1.0, 0.75), (2.0, 0.5))
    with closing(Records(tmp_path / "r.db")) as records:
        records.add_noise("f", curve)
        assert records.noise("f") == curve


def test_noise_is_measured_on_kernels_of_rising_length(runner, monkeypatch):
    monkeypatch.setattr(noise, "SIZES", (1 << 8, 1 << 16))
    told = []
    short, long = measure_noise(runner, 3, told.append)
    assert told == [short, long] and 0 < short.seconds < long.seconds
    assert all(len(n.differences) == 3 and all(0 <= d < math.inf for d in n.differences) for n in (short, long))


def failing_from(monkeypatch, number: int) -> None:
    """The un-optimized kernel cannot be prepared any more, from the `number`-th size on."""
    duel, seen = Runner.duel, []

    def fail(self, kernel, *more):
        if kernel.key not in seen:
            seen.append(kernel.key)
        if len(seen) >= number:
            raise Unprepared("took too much memory")
        return duel(self, kernel, *more)

    monkeypatch.setattr(Runner, "duel", fail)


def test_a_length_that_cannot_be_measured_ends_it_and_loses_no_other(runner, monkeypatch):
    monkeypatch.setattr(noise, "SIZES", (1 << 8, 1 << 14, 1 << 16))
    failing_from(monkeypatch, 2)
    told = []
    assert measure_noise(runner, 2, told.append) == told and len(told) == 1
    failing_from(monkeypatch, 1)
    with pytest.raises(Unprepared):
        measure_noise(runner, 2)


def test_the_command_keeps_what_could_be_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(noise, "SIZES", (1 << 8, 1 << 14))
    monkeypatch.setattr(cli_devices, "DEVICES", ("CPU",))
    monkeypatch.setenv("DEV", "CPU")
    failing_from(monkeypatch, 2)
    assert cli.main(["devices", "--noise", "--records", str(tmp_path / "r.db")]) == 0
    assert "longer kernels could not be measured" in capsys.readouterr().err
    with closing(Records(tmp_path / "r.db", read_only=True)) as records:
        assert len(records.noise(fingerprint_id(fingerprint("CPU")))) == 1


def test_the_command_prints_and_keeps_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(noise, "SIZES", (1 << 8, 1 << 14))
    monkeypatch.setattr(cli_devices, "DEVICES", ("CPU",))
    monkeypatch.setenv("DEV", "CPU")
    assert cli.main(["devices", "--noise", "--records", str(tmp_path / "r.db")]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert "could not be measured" not in printed.err
    assert "20 comparisons of each kernel with itself" in lines[-4] and all("%" in line for line in lines[-2:])
    with closing(Records(tmp_path / "r.db", read_only=True)) as records:
        curve = records.noise(fingerprint_id(fingerprint("CPU")))
    assert len(curve) == 2 and curve[0][0] < curve[1][0]


@pytest.mark.parametrize("floor, wins", [(0.0, True), (0.999999, False)])
def test_a_winner_must_beat_the_measured_floor(tmp_path, floor, wins):
    served = []
    for seed in range(5):
        kernel, honest = KERNELS[seed], Adversary(seed, 0.0, 0.0)
        with closing(Records(tmp_path / f"{seed}.db")) as records:
            records.add_noise(honest.fingerprint, ((1e-9, floor), (1e3, floor)))
            tuner = Tuner(records, honest, CPU, trials=6, strategy="random", seed=seed, progress=False)
            (result,), _ = tuner.run([kernel], {kernel.key: 1}, Budget(6))
            served.append(result.schedule is not None)
    assert any(served) == wins
