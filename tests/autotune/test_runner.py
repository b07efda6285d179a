"""The parent's side: children that crash, hang or answer nonsense."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time

import pytest
from tiny import U2, U4, add_one, kernel_of
from tinygrad import Context, Tensor

from autotune.compiler import Opt, OptOps, compile_schedule, renderer_of
from autotune.errors import DeviceError
from autotune.kernel import kernel_to_json
from autotune.measuring import child as child_module
from autotune.measuring import runner as runner_module
from autotune.measuring.bench import MAX_SAMPLES, MIN_SAMPLES
from autotune.measuring.child import Child, ChildFailed
from autotune.measuring.runner import UNPREPARED, Refuted, Runner, Unprepared
from autotune.records import BASELINES, Records, Trial

U3, U5 = Opt(OptOps.UPCAST, 0, 3), Opt(OptOps.UPCAST, 0, 5)
BAD = Opt(OptOps.UPCAST, 0, 7)


def strike(monkeypatch, what: str, number: int, times: int = 1) -> None:
    """Send a signal to a child just before it is asked the first requests of a kind."""
    send, struck = Child.send, []

    def send_and_strike(self, request):
        if request["do"] == what and len(struck) < times:
            struck.append(self)
            os.kill(self.pipe.pid, number)
        send(self, request)

    monkeypatch.setattr(Child, "send", send_and_strike)


def test_trials_come_in_order_with_typed_verdicts(runner):
    kernel, before = add_one(), runner.compiled
    trials = runner.measure(kernel, [(U4,), (BAD,), (), (U2, U2)], None)
    assert [t.schedule for t in trials] == [(U4,), (BAD,), (), (U2, U2)]
    assert [t.verdict for t in trials] == ["ok", "illegal", "ok", "ok"]
    assert all(t.kernel == kernel.key and t.kind == "trial" for t in trials) and runner.compiled == before + 4
    assert all(MIN_SAMPLES <= len(t.samples) <= MAX_SAMPLES and min(t.samples) > 0 for t in trials if t.verdict == "ok")
    assert trials[1].seconds is None and trials[1].samples == () and "UPCAST" in trials[1].detail
    assert trials[0].seconds == statistics.median(trials[0].samples) and trials[0].code_hash != trials[2].code_hash


def test_baselines_are_plain_and_hand_coded_and_not_counted(runner):
    kernel, before = kernel_of(Tensor.empty(16, 24) @ Tensor.empty(24, 32)), runner.compiled
    plain, hand = runner.baselines(kernel)
    assert (plain.kind, hand.kind) == ("unoptimized", "hand_coded") and (plain.verdict, hand.verdict) == ("ok", "ok")
    assert plain.schedule == () and len(hand.schedule) > 0 and runner.compiled == before


def test_a_binary_is_known_by_its_hash(runner):
    one, two = runner.measure(add_one(), [(U2, U3), (U3, U2)], None)
    again, _ = runner.measure(add_one(), [(U2, U3), (U4,)], None)
    assert one.code_hash == again.code_hash and len(one.code_hash) == 16 and two.verdict == "ok"


@pytest.mark.parametrize("what, number, verdict", [
    ("measure", signal.SIGKILL, "crashed"), ("measure", signal.SIGSTOP, "timeout"),
    ("compile", signal.SIGKILL, "compile_failed"), ("compile", signal.SIGSTOP, "timeout"),
])  # fmt: skip
def test_a_child_that_fails_is_a_verdict_and_the_next_trial_works(runner, monkeypatch, what, number, verdict):
    kernel = add_one()
    runner.measure(kernel, [(U4,)], None)
    if number == signal.SIGSTOP:
        monkeypatch.setattr(runner_module, "RUN_SECONDS" if what == "measure" else "COMPILE_SECONDS", 1.0)
    strike(monkeypatch, what, number)
    first, second = runner.measure(kernel, [(U2,), (U3,)], None)
    assert (first.verdict, first.samples, second.verdict) == (verdict, (), "ok")
    assert ("no answer within" if verdict == "timeout" else "status -9") in first.detail
    spent = first.verify_seconds if what == "measure" else first.compile_seconds
    assert 3.0 > spent > (1.0 if verdict == "timeout" else 0.0)  # a hang is no bargain
    assert len(second.samples) >= MIN_SAMPLES


def test_a_kernel_that_runs_too_long_is_a_timeout(runner, monkeypatch):
    slow = kernel_of(Tensor.empty(1 << 19).exp().sin())  # a real one, nobody stops it but the deadline
    runner.measure(slow, [()], None)
    monkeypatch.setattr(runner_module, "RUN_SECONDS", 0.005)
    monkeypatch.setattr(runner_module, "RUN_FACTOR", 0.0)
    (trial,) = runner.measure(slow, [()], None)
    assert (trial.verdict, trial.samples) == ("timeout", ())
    monkeypatch.undo()
    assert runner.measure(add_one(), [(U4,)], None)[0].verdict == "ok"


def spoil(monkeypatch, what: str) -> None:
    """From the next request of a kind on, its child does nothing but load kernels, and lives: so does a GPU's context after an
    illegal access."""
    send, sick = Child.send, []

    def send_what_it_cannot(self, request):
        if request["do"] == what and not sick:
            sick.append(self.pipe)
        failing = self.pipe in sick and request["do"] in ("prepare", "measure", "duel")
        send(self, {"do": "launch"} if failing else request)

    monkeypatch.setattr(Child, "send", send_what_it_cannot)


def test_a_bench_that_one_candidate_has_spoilt_is_replaced(runner, monkeypatch):
    kernel = add_one()
    runner.measure(kernel, [(U4,)], None)
    spoil(monkeypatch, "measure")
    first, second = runner.measure(kernel, [(U2,), (U3,)], None)
    assert (first.verdict, first.detail, second.verdict) == ("crashed", "KeyError: 'launch'", "ok")


def test_a_bench_that_one_duel_has_spoilt_is_replaced(runner, monkeypatch):
    kernel = add_one()
    runner.measure(kernel, [(U4,), ()], None)
    spoil(monkeypatch, "duel")
    assert len(runner.duel(kernel, [(U4,), ()], fresh=False)) == 2


def test_a_child_that_takes_too_much_memory_is_killed(monkeypatch):
    monkeypatch.setattr(child_module, "MEMORY_LIMIT", 1 << 20)
    child = Child("CPU")
    with pytest.raises(ChildFailed, match="MiB of memory, more than 1") as caught:
        child.ask({"do": "probe"}, 60.0)
    assert caught.value.verdict == "crashed" and child.pipe is None


def test_a_request_that_fails_inside_the_child_is_told():
    child = Child("CPU")
    try:
        with pytest.raises(ChildFailed, match="no kernel was sent"):
            child.ask({"do": "prepare"}, 60.0)
        with pytest.raises(ChildFailed, match="CodecError"):
            child.ask({"do": "kernel", "kernel": {"key": "x"}, "seed": 0}, 60.0)
        with pytest.raises(ChildFailed) as caught:
            child.ask({"do": "nothing"}, 60.0)
        assert caught.value.verdict == "crashed" and child.ask({"do": "probe"}, 60.0) == {"works": True}
    finally:
        child.kill()


def test_a_machine_that_cannot_compile_is_an_error_and_no_verdict(monkeypatch):
    """No candidate is to blame for a compiler that is gone, or for a broken disk cache."""
    runner = Runner("CPU", workers=1)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CACHELEVEL", "0")
    try:
        with pytest.raises(DeviceError, match=r"CPU cannot compile: FileNotFoundError.*all finished trials are kept"):
            runner.measure(add_one(), [(U4,)], None)
    finally:
        runner.close()


def test_a_child_ends_with_its_parent(tmp_path):
    """Also in the middle of a kernel that never ends: this one sleeps in the child's place of a compiler."""
    code = ("import sys, time; from autotune.measuring.child import Child; c = Child('CPU'); c.ask({'do': 'probe'}, 60.0);"
            "print(c.pipe.pid, flush=True); time.sleep(60)")  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)  # it lives
        parent.kill()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and os.path.exists(f"/proc/{pid}") and _state(pid) != "Z":
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}") or _state(pid) == "Z"


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def broken(monkeypatch) -> None:
    """Every child dies as soon as it is asked anything: no driver could do worse."""
    send = Child.send

    def send_and_die(self, request):
        send(self, request)
        os.kill(self.pipe.pid, signal.SIGKILL)

    monkeypatch.setattr(Child, "send", send_and_die)
    monkeypatch.setattr(runner_module.time, "sleep", lambda seconds: None)


def test_a_device_that_keeps_failing_is_an_error_not_an_endless_loop(monkeypatch):
    broken(monkeypatch)
    runner = Runner("CPU", workers=1)
    with pytest.raises(DeviceError, match="3 times in a row.*all finished trials are kept"):
        runner.measure(add_one(), [(U4,)], None)
    runner.close()


@pytest.mark.parametrize("patient", [False, True])
def test_baselines_of_a_kernel_that_cannot_be_prepared_are_tried_once(runner, monkeypatch, patient):
    """The control, whose deadline is met: both are measured, and prepared for once."""
    slow, asked, ask = kernel_of(Tensor.empty(1 << 20).sin().exp()), [], Child.ask
    if not patient:
        monkeypatch.setattr(runner_module, "PREPARE_SECONDS", 0.01)
    monkeypatch.setattr(Child, "ask", lambda self, *request: asked.append(request[0]["do"]) or ask(self, *request))
    compiled = runner.compiled
    plain, hand = runner.baselines(slow)
    assert (plain.kind, hand.kind) == ("unoptimized", "hand_coded") and hand.schedule != () == plain.schedule
    assert {plain.verdict, hand.verdict} == ({"ok"} if patient else {"timeout"}) and runner.compiled == compiled
    assert asked.count("prepare") == 1 and asked.count("measure") == 2 * patient


@pytest.mark.parametrize("times, verdict, prepared", [(9, "crashed", 2), (1, "ok", 2)])
def test_baselines_of_a_kernel_that_memory_cannot_hold_are_tried_twice(runner, monkeypatch, times, verdict, prepared):
    """The control meets one accident: the second try is the last, and both are measured."""
    asked, ask = [], Child.ask
    strike(monkeypatch, "prepare", signal.SIGKILL, times)
    monkeypatch.setattr(Child, "ask", lambda self, *request: asked.append(request[0]["do"]) or ask(self, *request))
    compiled = runner.compiled
    plain, hand = runner.baselines(add_one(80))
    assert (plain.kind, hand.kind) == ("unoptimized", "hand_coded") and hand.schedule != () == plain.schedule
    assert [t.verdict for t in (plain, hand)] == [verdict] * 2 and runner.compiled == compiled
    assert asked.count("prepare") == prepared
    assert all(t.detail.startswith(UNPREPARED) == (verdict == "crashed") for t in (plain, hand))


def test_a_duel_of_another_kernel_moves_no_deadline(runner, monkeypatch):
    """The bench still holds the slow one when the quick one is timed in a process of its own."""
    slow, limits, ask = kernel_of(Tensor.empty(1 << 19).exp().sin()), [], Child.ask

    def asked(self, request, seconds):
        if request["do"] == "measure":
            limits.append(seconds)
        return ask(self, request, seconds)

    monkeypatch.setattr(Child, "ask", asked)
    runner.measure(slow, [()], None)
    runner.duel(add_one(), [(U4,), ()])
    runner.measure(slow, [()], None)
    assert limits[0] == limits[1] > runner_module.RUN_SECONDS


@pytest.mark.parametrize(("verdicts", "again"), [
    (["timeout", "timeout"], True), (["ok", "timeout"], True), (["timeout", "timeout", "timeout", "timeout"], False),
    (["ok", "wrong_output"], False), (["ok", "ok"], False), ([], True),
])  # fmt: skip
def test_an_accident_of_a_baseline_is_tried_once_more_whoever_asks(tmp_path, verdicts, again):
    asked = []

    class Honest:
        fingerprint = "here"

        def baselines(self, kernel):
            asked.append(kernel)
            return [Trial(kernel.key, (), "ok", (1.0,), kind=kind) for kind in BASELINES]

    with contextlib.closing(Records(tmp_path / "r.db")) as records:
        records.add_kernel(add_one())
        for verdict, kind in zip(verdicts, BASELINES * 2, strict=False):
            samples = (1.0,) if verdict == "ok" else ()
            records.add_trial("here", Trial(add_one().key, (), verdict, samples, kind=kind), 1)
        history = runner_module.known_of(records, Honest(), add_one())  # type: ignore[arg-type]
        assert bool(asked) == again
        assert not again or all(history.baselines[kind].verdict == "ok" for kind in BASELINES)


@pytest.mark.parametrize("how", ["a Context", "the environment"])
def test_children_work_under_the_settings_in_force(monkeypatch, how):
    """A sine divides whole numbers on its way, by other means where this setting is 0."""
    kernel = kernel_of(Tensor.empty(300).sin())
    usual = compile_schedule(kernel.ast, (), renderer_of("CPU")).code_hash
    child = Child("CPU")
    monkeypatch.setenv("DISABLE_FAST_IDIV", "0")  # changed when tinygrad has long read it
    with Context(DISABLE_FAST_IDIV=0) if how == "a Context" else contextlib.nullcontext():
        wanted = compile_schedule(kernel.ast, (), renderer_of("CPU")).code_hash
        monkeypatch.delenv("DISABLE_FAST_IDIV") if how == "a Context" else None
        child.ask({"do": "kernel", "kernel": kernel_to_json(kernel), "seed": 0}, 60.0)
    found = child.ask({"do": "compile", "schedule": []}, 60.0)["binary"]["code_hash"]
    child.kill()
    assert found == wanted and (wanted == usual) == (how == "the environment")


@pytest.mark.parametrize("own", ["", "-cl-mad-enable"])
def test_pocl_is_told_to_be_quiet_but_what_the_user_tells_it_counts(monkeypatch, own):
    started, popen, child = [], subprocess.Popen, Child("CPU")
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: started.append(more["env"]) or popen(*args, **more))
    monkeypatch.setenv("POCL_EXTRA_BUILD_FLAGS", own) if own else monkeypatch.delenv("POCL_EXTRA_BUILD_FLAGS", False)
    child.ask({"do": "probe"}, 60.0)
    child.kill()
    assert [env["POCL_EXTRA_BUILD_FLAGS"] for env in started] == [own or "-w"]


def test_a_kernel_that_cannot_be_set_up_is_a_verdict_where_the_device_is_well(runner, monkeypatch):
    """Its un-optimized form takes too long: the trials fail, the tuner goes on, and says what was at fault."""
    monkeypatch.setattr(runner_module, "PREPARE_SECONDS", 0.01)
    slow = kernel_of(Tensor.empty(1 << 20).exp().sin())
    trials = runner.measure(slow, [(), (U2,)], None)
    assert [t.verdict for t in trials] == ["timeout"] * 2
    assert all("the un-optimized kernel itself: no answer within" in t.detail for t in trials)
    monkeypatch.undo()
    assert runner.measure(add_one(), [(U4,)], None)[0].verdict == "ok"


def test_inputs_differ_from_run_to_run_and_are_named(runner):
    other = Runner("CPU", workers=1)
    (trial,) = runner.measure(add_one(), [(U4,)], None)
    assert trial.input_seed == runner.seed != other.seed
    assert trial.verify_seconds > 0 and trial.timing_seconds > sum(trial.samples) and trial.compile_seconds > 0
    other.close()


def test_a_duel_is_held_in_a_fresh_process(runner, monkeypatch):
    pids, ask = [], Child.ask

    def asked(self, request, timeout):
        answer = ask(self, request, timeout)
        pids.append((request["do"], self.pipe.pid))
        return answer

    runner.measure(add_one(), [(U4,), ()], None)
    monkeypatch.setattr(Child, "ask", asked)
    samples = runner.duel(add_one(), [(U4,), (), ()])
    assert len({len(s) for s in samples}) == 1 and len(samples) == 3 and all(min(s) > 0 for s in samples)
    assert [do for do, _ in pids] == ["kernel", "prepare", "duel"]  # nothing is compiled again
    assert runner.bench.pipe.pid not in {pid for _, pid in pids}
    quick = runner.duel(add_one(), [(U4,), ()], fresh=False)
    assert pids[-1] == ("duel", runner.bench.pipe.pid) and len(quick) == 2


def test_who_fails_in_a_duel_is_refuted(runner, monkeypatch):
    kernel = add_one()
    runner.measure(kernel, [(U4,)], None)
    runner.measure(add_one(299), [()], None)
    monkeypatch.setitem(runner.binaries, (kernel.key, (U4,)), runner.binaries[add_one(299).key, ()])
    with pytest.raises(Refuted, match="1 of 300 elements differ, element 299") as caught:
        runner.duel(kernel, [(), (U4,), ()])
    trial = caught.value.trial
    assert (trial.kernel, trial.schedule, trial.verdict, trial.kind) == (kernel.key, (U4,), "wrong_output", "recheck")
    strike(monkeypatch, "duel", signal.SIGKILL)
    assert len(runner.duel(kernel, [(U2,), ()])) == 2  # once may be an accident
    strike(monkeypatch, "duel", signal.SIGKILL, times=2)
    with pytest.raises(Refuted, match="status -9") as caught:
        runner.duel(kernel, [(U2,), ()])
    assert (caught.value.trial.schedule, caught.value.trial.verdict) == ((U2,), "crashed")


def test_who_cannot_be_prepared_refutes_nobody(runner, monkeypatch):
    """Twice killed while it prepares: by bad luck, or since the kernel is too large for this minute."""
    kernel = add_one()
    strike(monkeypatch, "prepare", signal.SIGKILL, times=2)
    with pytest.raises(Unprepared, match=UNPREPARED):
        runner.duel(kernel, [(U2,), ()])


def test_who_cannot_even_be_given_to_a_compiler_refutes_nobody(runner, monkeypatch):
    kernel = add_one(77)

    def never(*_) -> None:
        raise ChildFailed("timeout", "no answer within 60 s")

    monkeypatch.setattr(runner, "_hold", never)
    with pytest.raises(Unprepared, match=UNPREPARED):
        runner.duel(kernel, [(U2,), ()])


def test_children_take_tinygrad_from_where_their_parent_has_it(tmp_path, monkeypatch):
    (tmp_path / "tinygrad").mkdir()
    (tmp_path / "tinygrad" / "__init__.py").write_text("raise SystemExit(7)\n")
    monkeypatch.setattr(child_module, "CHECKOUTS", [str(tmp_path)])
    with pytest.raises(ChildFailed, match="status 7"):
        Child("CPU").ask({"do": "probe"}, 60.0)


def test_a_compiler_that_dies_once_costs_no_baseline(runner, monkeypatch):
    strike(monkeypatch, "compile", signal.SIGKILL)
    assert [t.verdict for t in runner.baselines(add_one(78))] == ["ok", "ok"]


def test_a_compiler_that_dies_once_refutes_nobody(runner, monkeypatch):
    kernel = add_one()
    runner.binaries.clear()
    strike(monkeypatch, "compile", signal.SIGKILL)
    assert len(runner.duel(kernel, [(U2,), ()])) == 2


def test_children_take_nothing_from_the_folder_in_which_the_user_is(tmp_path, monkeypatch):
    """A checkout of another tinygrad, say, and a module named as one of Python's own."""
    for name in ("tinygrad/__init__.py", "queue.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise ImportError('not this one')\n")
    monkeypatch.chdir(tmp_path)
    child = Child("CPU")
    assert child.ask({"do": "probe"}, 60.0) == {"works": True}
    child.kill()


def test_children_compile_for_the_renderer_that_is_in_force(monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: started.append(more["env"]) or popen(*args, **more))
    for target in ("CPU", "CPU:CLANG"):
        child = Child("CPU")
        with Context(DEV=target):
            assert child.ask({"do": "probe"}, 60.0) == {"works": True}
        child.kill()
    assert [env["DEV"] for env in started] == ["CPU", "CPU:CLANG"]


def test_a_process_that_does_not_even_die_ends_no_tuning(monkeypatch):
    """It hangs in its driver: the others are closed all the same, and a probe of it is a device that fails."""
    runner, killed = Runner("CPU"), []

    def kill(self):
        killed.append(self)
        raise ChildFailed("timeout", "it does not even die")

    monkeypatch.setattr(Child, "kill", kill)
    runner.close()
    assert killed == [*runner.compilers, runner.bench]
    monkeypatch.setattr(Child, "ask", lambda *_: (_ for _ in ()).throw(ChildFailed("timeout", "no answer")))
    monkeypatch.setattr(runner_module.time, "sleep", lambda _: None)
    with pytest.raises(DeviceError, match="failed 3 times in a row, last: no answer"):
        runner.check_device()
