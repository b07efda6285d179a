"""Running a program with other schedules."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from running import DEVICE, WINNER, array, launched, records_with
from tinygrad import Context, Tensor, TinyJit
from tinygrad.engine import realize
from tinygrad.helpers import DISABLE_FAST_IDIV

import autotune
from autotune.compiler import KernelInfo, Opt, OptOps, UOp, fingerprint, hand_coded, renderer_of
from autotune.measuring.bench import PROTOCOL
from autotune.records import Records


def test_accepted_schedules_run_and_give_the_same_output(tmp_path):
    x, y = array(30, 20), array(30, 20, seed=1)
    with autotune.capture() as program, launched() as before:
        wanted = (x - y * 2).numpy()
    with (
        records_with(tmp_path / "r.db", program).db,
        autotune.apply(tmp_path / "r.db") as applied,
        launched() as during,
    ):
        got, unknown = (x - y * 2).numpy(), (x * y / 3 + 1).numpy()
    with launched() as after:
        (x - y * 2).realize()
    own, renderer = next(iter(program.kernels.values())), renderer_of(DEVICE)
    assert before[0] == after[0] == hand_coded(own.ast, renderer) != WINNER
    assert during[0] == WINNER and during[1] != WINNER and len(during) == 2
    assert (got == wanted).all() and np.allclose(unknown, x.numpy() * y.numpy() / 3 + 1, atol=1e-5)
    assert (applied.tuned, applied.plain) == (1, 1)


@pytest.mark.parametrize("case", ["not accepted", "another machine", "an older protocol"])
def test_what_is_not_accepted_here_runs_as_tinygrad_would(tmp_path, case):
    x = array(36, 10 + len(case))
    with autotune.capture() as program:
        (x * 4 - 1).realize()
    device = {**fingerprint(DEVICE), "model": "elsewhere"} if case == "another machine" else None
    protocol = PROTOCOL - (case == "an older protocol")
    records_with(tmp_path / "r.db", program, case != "not accepted", device, protocol).close()
    with autotune.apply(tmp_path / "r.db") as applied, launched() as during:
        (x * 4 - 1).realize()
    assert during == [hand_coded(next(iter(program.kernels.values())).ast, renderer_of(DEVICE))] and applied.tuned == 0


def test_a_damaged_row_ends_no_program(tmp_path, capsys):
    x = array(36, 17)
    with autotune.capture() as program:
        (x * 4 - 5).realize()
    with contextlib.closing(records_with(tmp_path / "r.db", program)) as records:
        records.db.execute("UPDATE finals SET accepted = 2")
    with autotune.apply(tmp_path / "r.db") as applied:
        (x * 4 - 5).realize()
        (x * 4 - 6).realize()
    assert (applied.tuned, applied.plain) == (0, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "finals row 1 is malformed" in line and "runs as tinygrad would run it" in line


def test_other_settings_within_the_block_have_winners_of_their_own(tmp_path):
    x = array(36, 15)
    with autotune.capture() as program:
        (x * 4 - 3).realize()
    records_with(tmp_path / "r.db", program).close()
    for first in (0, 1):  # whichever are looked at first
        with autotune.apply(tmp_path / "r.db") as applied, launched() as during:
            for other in (first, 1 - first):
                with Context(DISABLE_FAST_IDIV=other):
                    (x * 4 - 3).realize()
        wanted = [other == DISABLE_FAST_IDIV.value for other in (first, 1 - first)]
        assert [found == WINNER for found in during] == wanted and (applied.tuned, applied.plain) == (1, 1)


@pytest.mark.skipif(DEVICE != "CPU" or platform.machine() != "x86_64", reason="needs a second renderer")
def test_another_renderer_within_the_block_is_given_nothing(tmp_path):
    """tinygrad's own assembler, say: a schedule was timed with the compiler that was in force."""
    x = array(36, 27)
    with autotune.capture() as program:
        (x * 4 - 3).realize()
    records_with(tmp_path / "r.db", program).close()
    for order in ("CPU", "CPU:X86"), ("CPU:X86", "CPU"):  # whichever is looked at first
        with autotune.apply(tmp_path / "r.db") as applied, launched() as during:
            for target in order:
                with Context(DEV=target):
                    (x * 4 - 3).realize()
        assert [found == WINNER for found in during] == [target == "CPU" for target in order]
        assert (applied.tuned, applied.plain) == (1, 1)


@pytest.mark.parametrize("records", ["sys.argv[1]", "Records(sys.argv[1])"])
def test_a_program_may_do_its_work_in_another_thread(tmp_path, records):
    """All of it: tinygrad's own cache belongs to the thread that compiles first. Open records belong to this one."""
    x = array(36, 21)
    with autotune.capture() as program:
        (x - 7).realize()
    records_with(tmp_path / "r.db", program).close()
    code = ("import sys, threading\nfrom running import Records, array, autotune\n"
            f"with autotune.apply({records}) as applied:\n"
            "    thread = threading.Thread(target=lambda: (array(36, 21) - 7).realize())\n"
            "    thread.start(), thread.join()\nprint(applied.tuned)")  # fmt: skip
    command = [sys.executable, "-c", code, str(tmp_path / "r.db")]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=dict(os.environ), capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "1", done.stderr[-2000:]


def test_open_records_are_found_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(Records("r.db")) as records:
        monkeypatch.chdir(tmp_path / "elsewhere")
        with autotune.apply(records) as applied:
            pass
    assert applied.tuned == 0 and list(Path.cwd().iterdir()) == []


def test_a_jit_keeps_its_schedules(tmp_path):
    x = array(60, 12)
    with autotune.capture() as program:
        (x * 2.25).realize()
    step = TinyJit(lambda t: (t * 2.25).realize())
    with autotune.apply(records_with(tmp_path / "r.db", program)), launched() as during:
        step(x), step(array(60, 12, seed=2))
    with launched() as after:
        assert np.allclose(step(array(60, 12, seed=3)).numpy(), array(60, 12, seed=3).numpy() * 2.25)
    assert during == [WINNER] * 2 and after[:1] == [WINNER]


def test_a_tuned_program_can_be_captured(tmp_path):
    """A kernel keeps its key whatever schedule it runs with."""
    x = array(6, 50)
    with autotune.capture() as program:
        (x + 0.125).realize()
    with autotune.apply(records_with(tmp_path / "r.db", program)), autotune.capture() as again:
        (x + 0.125).realize()
    assert again.calls == program.calls and again.skipped == 0


def test_a_program_that_applies_its_own_schedules_can_be_captured(tmp_path):
    """Whichever block is the outer one, it is the program's own kernel that counts."""
    x = array(6, 52)
    with autotune.capture() as program:
        (x + 0.375).realize()
    with autotune.capture() as again, autotune.apply(records_with(tmp_path / "r.db", program)), launched() as during:
        (x + 0.375).realize()
    assert during == [WINNER] and again.calls == program.calls and again.skipped == 0


def test_blocks_may_overlap_and_end_in_any_order(tmp_path):
    """As those of a server's threads do."""
    x, untouched = array(6, 53), (realize.lower_and_compile, realize.track_stats)
    with autotune.capture() as program:
        (x + 0.5).realize()
    records = records_with(tmp_path / "r.db", program)
    first, second, third = autotune.apply(records), autotune.capture(), autotune.apply(records)
    first.__enter__()
    seen = second.__enter__()
    first.__exit__(None, None, None)
    with launched() as during:
        (x + 0.5).realize()
    assert during == [hand_coded(next(iter(program.kernels.values())).ast, renderer_of(DEVICE))]
    third.__enter__()
    second.__exit__(None, None, None)
    with launched() as during:
        (x + 0.5).realize()
    assert during == [WINNER] and seen.calls == program.calls
    third.__exit__(None, None, None)
    assert (realize.lower_and_compile, realize.track_stats) == untouched


# 324 elements are no multiple of 7, nor of 0
@pytest.mark.parametrize("refused", [Opt(OptOps.UPCAST, 0, 7), Opt(OptOps.PADTO, 0, 0)])
def test_a_schedule_that_tinygrad_refuses_breaks_no_program(tmp_path, refused):
    x = array(6, 54)
    with autotune.capture() as program:
        (x + 0.625).realize()
    records = records_with(tmp_path / "r.db", program, winner=(refused,))
    with autotune.apply(records) as applied, launched() as during:
        (x + 0.625).realize()
    assert during == [hand_coded(next(iter(program.kernels.values())).ast, renderer_of(DEVICE))]
    assert (applied.tuned, applied.plain) == (0, 1)


@pytest.mark.skipif(DEVICE != "CPU", reason="needs another backend beside it")
def test_one_device_takes_no_schedule_of_another(tmp_path):
    """The AST of a custom kernel names no device: both launch the very same."""

    def twice(out: UOp, source: UOp) -> UOp:
        i = UOp.range(48, 0)
        return out[i].store(source[i] * 2).end(i).sink(arg=KernelInfo(name="twice"))

    def run(device: str) -> None:
        there = x.to(device).realize()
        assert (Tensor.empty(48, device=device).custom_kernel(there, fxn=twice)[0].numpy() == 2 * x.numpy()).all()

    x = array(48)
    with autotune.capture() as program:
        run(DEVICE)
    with autotune.apply(records_with(tmp_path / "r.db", program)) as applied, launched() as during:
        run(DEVICE)
        run("PYTHON")
    assert during[0] == WINNER and len(during) == 2 and during[1] != WINNER
    assert (applied.tuned, applied.plain) == (1, 1)


def test_beam_in_the_environment_does_not_overrule_a_winner(tmp_path):
    x = array(6, 51)
    with autotune.capture() as program:
        (x + 0.25).realize()
    with Context(BEAM=2), autotune.apply(records_with(tmp_path / "r.db", program)), launched() as during:
        (x + 0.25).realize()
    assert during == [WINNER]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(("offset", "asked"), [(0, True), (16, True), (1, False), (4, False)])
def test_a_kernel_on_a_view_that_begins_anywhere_is_left_alone(offset: int, asked: bool, jit: bool):
    """In a process of its own: without the care of it, the schedule crashes the process at an offset of one float (of four bytes)."""
    code = f"""if True:
        import numpy as np
        from tinygrad import Tensor, TinyJit
        from autotune.compiler import Opt, OptOps, substitute_schedules
        schedule, told = (Opt(OptOps.UPCAST, 1, 4), Opt(OptOps.UPCAST, 0, 4)), []
        numbers = np.arange(5000, dtype=np.float32)
        x, w = Tensor(numbers).realize(), Tensor(np.eye(48, 64, dtype=np.float32)).realize()
        def f(v): return (w @ v.reshape(64, 48)).realize()
        f = TinyJit(f) if {jit} else f
        with substitute_schedules(lambda raw, *_: told.append(raw) or schedule):
            for _ in range(3):
                found = f(x[{offset}:{offset} + 64 * 48].contiguous().realize()).numpy()
                assert (found.reshape(-1) == numbers[{offset}:{offset} + 48 * 48]).all()
        print(bool(told))"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "DEV": "CPU"}, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    assert done.stdout.strip() == str(asked)


@pytest.mark.slow
def test_without_a_strategy_the_learned_one_is_used(tmp_path):
    """As the README says: no strategy and no checkpoint named."""
    with autotune.capture() as program:
        (array(40, 50) + 1).realize()
    autotune.tune(program, records=tmp_path / "r.db", trials=1, progress=False)
    records = Records(tmp_path / "r.db", read_only=True)
    (own,) = records.fingerprints()
    assert [t.strategy.split("/")[0] for _, t in records.all_trials(own) if t.kind == "trial"] == ["auto"]
