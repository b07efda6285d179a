"""Seeing what a program runs, and running it with other schedules."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Context, Tensor, TinyJit, Variable
from tinygrad.engine import realize
from tinygrad.helpers import DISABLE_FAST_IDIV

import autotune
from autotune.compiler import (
    KernelInfo,
    Ops,
    Opt,
    OptOps,
    UOp,
    default_device,
    fingerprint,
    hand_coded,
    read_beam_cache,
    renderer_of,
    write_beam_cache,
)
from autotune.errors import UsageError
from autotune.install import export_beam
from autotune.measuring.bench import PROTOCOL
from autotune.records import Final, Records, Trial, fingerprint_id
from autotune.script import left_out

ROOT = Path(__file__).resolve().parents[2]
DEVICE = default_device()
WINNER = (Opt(OptOps.UPCAST, 0, 2), Opt(OptOps.UPCAST, 0, 3))  # not what the heuristic would do


@contextlib.contextmanager
def launched() -> Iterator[list[tuple[Opt, ...]]]:
    """The schedules that the launched programs were really compiled with, in order."""
    found: list[tuple[Opt, ...]] = []
    original = realize.track_stats

    def track(ctx, call, *rest):
        for _, kernel in realize.get_call_kernels(call):
            for program in (u for u in kernel.src[0].toposort() if u.op is Ops.PROGRAM):
                found.append(tuple(program.src[0].arg.applied_opts))
        original(ctx, call, *rest)

    realize.track_stats = track
    try:
        yield found
    finally:
        realize.track_stats = original


def array(*shape: int, seed: int = 0) -> Tensor:
    return Tensor(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).realize()


def records_with(
    path: Path, program: autotune.Program, accepted: bool = True, device: dict | None = None, protocol: int = PROTOCOL
) -> Records:
    """A records file as tuning leaves it, written by hand: baselines, and a winner for every kernel."""
    records, renderer = Records(path), renderer_of(DEVICE)
    own = records.add_fingerprint(device or fingerprint(DEVICE))
    for kernel in program.kernels.values():
        records.add_kernel(kernel)
        for kind, schedule in (("unoptimized", ()), ("hand_coded", hand_coded(kernel.ast, renderer))):
            records.add_trial(own, Trial(kernel.key, schedule, "ok", (1e-6,), kind=kind), 1)
        records.add_final(own, Final(kernel.key, WINNER, (1.0,), (2.0,), (2.0,), accepted, protocol))
    return records


# **** capture ****


def test_every_launch_counts():
    x, y = array(12, 34), array(12, 34, seed=1)
    with autotune.capture() as program:
        for _ in range(5):
            (x + y).realize()
        (x * 7.5).sum(1).realize()
    names = {program.kernels[key].name: n for key, n in program.calls.items()}
    assert names == {"e 408": 5, "r 12 / 34": 1} and set().union(*program.devices.values()) == {DEVICE}
    assert program.for_device(DEVICE) == list(program.kernels.values()) and program.for_device("GPU:7") == []


def test_nothing_is_seen_outside():
    x = array(12, 35)
    with autotune.capture() as program:
        pass
    (x + 1).realize()
    assert program.calls == {} == program.kernels
    with pytest.raises(ZeroDivisionError), autotune.capture() as program:
        (x + 2).realize()
        raise ZeroDivisionError
    (x + 3).realize()
    assert sum(program.calls.values()) == 1


@pytest.mark.parametrize("calls", [1, 2, 3, 6])
def test_replays_of_a_jit_count(calls):
    """One call runs, the second is captured, all others are replays: each launches both kernels once."""
    step = TinyJit(lambda x: (x.sin().sum(0) + 1.5).contiguous().cos().sum().realize())
    inputs = [array(24, 24 + calls, seed=i) for i in range(calls)]
    with autotune.capture() as program:
        for x in inputs:
            step(x)
    assert len(program.calls) >= 2 and set(program.calls.values()) == {calls} and program.skipped == 0


def test_kernels_compiled_before_are_found():
    x, y = array(9, 41), array(9, 41, seed=1)
    (x * y - 3).realize()
    with autotune.capture() as program:
        (y * x - 3).realize()
    assert list(program.calls.values()) == [1]


def test_symbolic_shapes_are_kept():
    x = array(40, 6)
    with autotune.capture() as program:
        for n in (3, 17, 40):
            x[: Variable("rows", 2, 40).bind(n)].sum(0).realize()
    ((key, kernel),) = program.kernels.items()
    assert kernel.variables == {"rows": (2, 40)} and program.calls[key] == 3


def test_kernels_with_a_schedule_of_their_own_are_skipped():
    def twice(out: UOp, source: UOp) -> UOp:
        i = UOp.range(48, 0)
        return out[i].store(source[i] * 2).end(i).sink(arg=KernelInfo(name="twice", opts_to_apply=()))

    x = array(48)
    with autotune.capture() as program:
        assert (Tensor.empty(48).custom_kernel(x, fxn=twice)[0].numpy() == 2 * x.numpy()).all()
        (x + 1).realize()
    assert (sum(program.calls.values()), program.skipped) == (1, 1)


@pytest.mark.parametrize("make", [lambda: array(7).cast("int32").realize() << array(7).abs().cast("int32").realize(),
                                  lambda: ~array(9).cast("uint64").realize()])  # fmt: skip
def test_kernels_that_cannot_be_read_back_are_skipped(make):
    unrealized = make()
    with autotune.capture() as program:
        unrealized.realize()
    assert program.kernels == {} and program.skipped == 1


@pytest.mark.skipif(DEVICE != "CPU", reason="needs a second device of the backend")
def test_a_kernel_that_ran_on_two_devices_of_a_backend_belongs_to_both():
    there = f"{DEVICE}:1"
    x, y, z = array(5, 13), array(5, 13).to(there).realize(), array(5, 14).to(there).realize()
    with autotune.capture() as program:
        for t in (x, y, z):
            (t + 1).realize()
    both, one = program.kernels.values()
    assert program.devices == {both.key: {DEVICE, there}, one.key: {there}} and program.calls[both.key] == 2
    assert program.for_device(DEVICE) == program.for_device(there) == [both, one] and left_out(program, DEVICE) == ""
    program.devices[one.key] = {"GPU:1"}
    assert program.for_device(DEVICE) == [both] and program.for_device("GPU") == [one]
    assert left_out(program, DEVICE) == ", kernels on other devices (GPU:1): 1"
    program.devices[one.key] = {there}
    program.skipped = 3
    assert left_out(program, there) == ", launches of kernels that cannot be tuned: 3"


def test_captures_may_be_nested():
    x = array(7, 49)
    with autotune.capture() as outer:
        (x + 1).realize()
        with autotune.capture() as inner:
            (x + 1).realize()
    assert (sum(outer.calls.values()), sum(inner.calls.values())) == (2, 1) and list(outer.kernels) == list(
        inner.kernels
    )


# **** apply ****


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
    code = ("import sys, threading\nfrom test_capture_apply import Records, array, autotune\n"
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


def test_a_schedule_that_tinygrad_refuses_breaks_no_program(tmp_path, monkeypatch):
    x = array(6, 54)
    with autotune.capture() as program:
        (x + 0.625).realize()
    monkeypatch.setitem(globals(), "WINNER", (Opt(OptOps.UPCAST, 0, 7),))  # 324 elements are no multiple of 7
    with autotune.apply(records_with(tmp_path / "r.db", program)) as applied, launched() as during:
        (x + 0.625).realize()
    assert during == [hand_coded(next(iter(program.kernels.values())).ast, renderer_of(DEVICE))]
    assert (applied.tuned, applied.plain) == (0, 1)


def test_beam_in_the_environment_does_not_overrule_a_winner(tmp_path):
    x = array(6, 51)
    with autotune.capture() as program:
        (x + 0.25).realize()
    with Context(BEAM=2), autotune.apply(records_with(tmp_path / "r.db", program)), launched() as during:
        (x + 0.25).realize()
    assert during == [WINNER]


# **** tinygrad's own BEAM cache ****

SCRIPT = """
import json, numpy as np
from tinygrad import Tensor
from tinygrad.codegen.opt import search
from test_capture_apply import launched
searches = []
original = search._try_compile
search._try_compile = lambda x: searches.append(x[0]) or original(x)
x = Tensor(np.arange(600, dtype=np.float32).reshape(30, 20)).realize()
with launched() as found:
    total = float((x * 3 - 1).numpy().sum())
print(json.dumps([len(searches), [[[o.op.name, o.axis, o.arg] for o in s] for s in found], total]))
"""


def test_beam_serves_an_exported_schedule_and_searches_nothing(tmp_path, monkeypatch):
    if DEVICE != "CPU":
        pytest.skip("the script below runs on CPU")
    env = {**os.environ, "CACHEDB": str(tmp_path / "cache.db"), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'autotune'}", "DEV": "CPU",
           "PARALLEL": "0", "NUM_CPU_THREADS": "1"}  # fmt: skip

    def python(code: str, **more: str) -> list:
        done = subprocess.run(
            [sys.executable, "-c", code], env={**env, **more}, capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    x = array(30, 20)
    with autotune.capture() as program:
        (x * 3 - 1).realize()
    records_with(tmp_path / "r.db", program).close()
    export = ("from autotune.records import Records\nfrom autotune.install import export_beam\nimport sqlite3\n"
              f"records = Records({str(tmp_path / 'r.db')!r})\n"
              "from autotune.records import fingerprint_id\nfrom autotune.compiler import fingerprint\n"
              "own = fingerprint_id(fingerprint('CPU'))\n"
              "for table in ('trials', 'finals'): records.db.execute(f'UPDATE {table} SET fingerprint = ?', (own,))\n"
              "print(export_beam(records, 3))")  # fmt: skip
    assert python(export) == 1
    tuned = [["UPCAST", 0, 2], ["UPCAST", 0, 3]]
    assert python(SCRIPT, BEAM="3") == [0, [tuned], float((np.arange(600) * 3 - 1).sum())]
    assert python(SCRIPT, BEAM="0")[1] != [tuned]
    assert python(SCRIPT, BEAM="1")[0] > 0  # another width: it searches, so the script would have shown it


def test_an_export_that_tinygrad_would_not_keep_is_refused(tmp_path):
    x = array(31, 21)
    with autotune.capture() as program:
        (x * 3 - 1).realize()
    with Context(CACHELEVEL=0), pytest.raises(UsageError, match="CACHELEVEL"):
        export_beam(records_with(tmp_path / "r.db", program), 2)


def test_a_kernel_without_a_winner_is_exported_hand_coded(tmp_path, monkeypatch):
    x = array(31, 20)
    with autotune.capture() as program:
        (x * 3 - 1).realize()
    written = Counter()
    monkeypatch.setattr(
        "autotune.install.write_beam_cache", lambda ast, schedule, width, ren: written.update([(schedule, width)])
    )
    records = records_with(tmp_path / "r.db", program, accepted=False)
    (kernel,) = program.kernels.values()
    assert export_beam(records, 2) == 1 and written == {(hand_coded(kernel.ast, renderer_of(DEVICE)), 2): 1}
    own = fingerprint_id(fingerprint(DEVICE))
    assert own in records.fingerprints()
    records.db.execute("DELETE FROM trials")  # nothing is left but a hand-coded form that could not be prepared
    records.add_trial(own, Trial(kernel.key, (), "crashed", kind="hand_coded"), PROTOCOL)
    assert export_beam(records, 2) == 0 and written.total() == 1


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
        with substitute_schedules(lambda raw, renderer: told.append(raw) or schedule):
            for _ in range(3):
                found = f(x[{offset}:{offset} + 64 * 48].contiguous().realize()).numpy()
                assert (found.reshape(-1) == numbers[{offset}:{offset} + 48 * 48]).all()
        print(bool(told))"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "DEV": "CPU"}, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    assert done.stdout.strip() == str(asked)


def test_what_beam_has_found_itself_is_not_replaced_by_hand_coded(tmp_path, monkeypatch):
    """But by a winner. What was accepted here once and is served no more was put there by an earlier export."""
    monkeypatch.setattr("tinygrad.helpers.CACHEDB", str(tmp_path / "cache.db"))
    monkeypatch.setattr("tinygrad.helpers._db_connection", None)
    monkeypatch.setattr("tinygrad.helpers._db_tables", set())
    x = array(31, 24)
    with autotune.capture() as program:
        (x * 3 - 1).realize()
    (kernel,) = program.kernels.values()
    renderer, own = renderer_of(DEVICE), fingerprint_id(fingerprint(DEVICE))
    hand, found = hand_coded(kernel.ast, renderer), (Opt(OptOps.UPCAST, 0, 31),)
    assert hand != found and read_beam_cache(kernel.ast, 2, renderer) == set()
    write_beam_cache(kernel.ast, found, 2, renderer)
    records = records_with(tmp_path / "r.db", program, accepted=False)
    assert export_beam(records, 2) == 0 and read_beam_cache(kernel.ast, 2, renderer) == {found}
    assert export_beam(records, 3) == 1 and read_beam_cache(kernel.ast, 3, renderer) == {hand}
    records.add_trial(own, Trial(kernel.key, found, "ok", (1e-6,)), PROTOCOL)  # tried here, and not yet settled
    assert export_beam(records, 2) == 0 and read_beam_cache(kernel.ast, 2, renderer) == {found}
    for still in (True, False):
        records.add_final(own, Final(kernel.key, found, (1.0,), (2.0,), (2.0,), still, PROTOCOL))
    assert export_beam(records, 2) == 1 and read_beam_cache(kernel.ast, 2, renderer) == {hand}
    write_beam_cache(kernel.ast, (Opt(OptOps.UPCAST, 0, 12),), 2, renderer)
    accepted = records_with(tmp_path / "accepted.db", program)
    (winner,) = accepted.winners(own, PROTOCOL).values()
    assert export_beam(accepted, 2) == 1 and read_beam_cache(kernel.ast, 2, renderer) == {winner}


@pytest.mark.parametrize("hand_coded_runs", [True, False])
def test_a_winner_that_tinygrad_refuses_is_not_exported(tmp_path, monkeypatch, hand_coded_runs):
    """A program under BEAM would end in an error. Where hand-coded could not be measured either, nothing is known."""
    x = array(31, 22)
    with autotune.capture() as program:
        (x * 3 - 1).realize()
    written = []
    monkeypatch.setattr("autotune.install.write_beam_cache", lambda ast, schedule, *_: written.append(schedule))
    monkeypatch.setitem(globals(), "WINNER", (Opt(OptOps.UPCAST, 0, 7),))  # 682 elements are no multiple of 7
    records = records_with(tmp_path / "r.db", program)
    (kernel,) = program.kernels.values()
    hand = hand_coded(kernel.ast, renderer_of(DEVICE))
    if not hand_coded_runs:
        own = fingerprint_id(fingerprint(DEVICE))
        records.add_trial(own, Trial(kernel.key, hand, "crashed", kind="hand_coded"), PROTOCOL)
    assert export_beam(records, 2) == len(written) == hand_coded_runs and written == [hand] * hand_coded_runs


@pytest.mark.slow
def test_without_a_strategy_the_learned_one_is_used(tmp_path):
    """As the README says: no strategy and no checkpoint named."""
    with autotune.capture() as program:
        (array(40, 50) + 1).realize()
    autotune.tune(program, records=tmp_path / "r.db", trials=1, progress=False)
    records = Records(tmp_path / "r.db", read_only=True)
    (own,) = records.fingerprints()
    assert [t.strategy.split("/")[0] for _, t in records.all_trials(own) if t.kind == "trial"] == ["auto"]
