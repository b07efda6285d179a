"""The parent's side: children that crash, hang or answer nonsense, the lock of a device, and the final judgement."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import U2, U4, add_one, kernel_of
from tinygrad import Tensor

from autotune import runner as runner_module
from autotune.compiler import Opt, OptOps
from autotune.errors import DeviceError
from autotune.measure import MAX_SAMPLES, MIN_SAMPLES
from autotune.runner import NOISE_FLOOR, Child, ChildFailed, Runner, device_lock, judge

U3, U5 = Opt(OptOps.UPCAST, 0, 3), Opt(OptOps.UPCAST, 0, 5)
BAD = Opt(OptOps.UPCAST, 0, 7)


def strike(monkeypatch, what: str, number: int) -> None:
    """Send a signal to a child just before it is asked the first request of a kind."""
    send, struck = Child.send, []

    def send_and_strike(self, request):
        if request["do"] == what and not struck:
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
        monkeypatch.setattr(runner_module, "RUN_SECONDS" if what == "measure" else "COMPILE_SECONDS", 3.0)
    strike(monkeypatch, what, number)
    first, second = runner.measure(kernel, [(U2,), (U3,)], None)
    assert (first.verdict, first.samples, second.verdict) == (verdict, (), "ok")
    assert ("no answer within" if verdict == "timeout" else "status -9") in first.detail
    assert len(second.samples) >= MIN_SAMPLES


def test_a_kernel_that_runs_too_long_is_a_timeout(runner, monkeypatch):
    slow = kernel_of(Tensor.empty(1 << 24).exp().sin())  # a real one, nobody stops it but the deadline
    monkeypatch.setattr(runner_module, "RUN_SECONDS", 0.05)
    (trial,) = runner.measure(slow, [()], None)
    assert (trial.verdict, trial.samples) == ("timeout", ())
    monkeypatch.undo()
    assert runner.measure(add_one(), [(U4,)], None)[0].verdict == "ok"


def test_a_request_that_fails_inside_the_child_is_told(runner):
    child = Child("CPU")
    try:
        with pytest.raises(ChildFailed, match="no kernel was sent"):
            child.ask({"do": "measure", "schedule": [], "cutoff": None}, 60.0)
        with pytest.raises(ChildFailed, match="CodecError"):
            child.ask({"do": "kernel", "kernel": {"key": "x"}}, 60.0)
        with pytest.raises(ChildFailed) as caught:
            child.ask({"do": "nothing"}, 60.0)
        assert caught.value.verdict == "crashed" and child.pipe is not None  # it lives on
    finally:
        child.kill()


def test_a_device_that_keeps_failing_is_an_error_not_an_endless_loop(monkeypatch):
    class Broken(Child):
        def send(self, request):
            super().send(request)
            os.kill(self.pipe.pid, signal.SIGKILL)

    runner = Runner("CPU", workers=1)
    runner.children = [Broken("CPU")]
    with pytest.raises(DeviceError, match="5 times in a row"):
        runner.measure(add_one(), [(U4,)], None)
    runner.close()


def test_a_duel_is_held_in_a_fresh_process(runner, monkeypatch):
    pids, ask = [], Child.ask

    def asked(self, request, timeout):
        answer = ask(self, request, timeout)
        pids.append((request["do"], self.pipe.pid))
        return answer

    runner.measure(add_one(), [(U4,)], None)
    monkeypatch.setattr(Child, "ask", asked)
    monkeypatch.setenv("CHECKED", "1")
    samples = runner.duel(add_one(), [(U4,), (), ()])
    assert len({len(s) for s in samples}) == 1 and len(samples) == 3 and all(min(s) > 0 for s in samples)
    assert [do for do, _ in pids] == ["kernel", "duel"]
    assert runner.children[0].pipe.pid not in {pid for _, pid in pids}


HOLDS = """
import sys
from autotune.runner import device_lock
with device_lock("TEST:1", exclusive={exclusive}):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize(
    "theirs, ours, waits", [(True, True, True), (True, False, True), (False, True, True), (False, False, False)]
)
def test_the_lock_of_a_device_holds_between_processes(theirs, ours, waits, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    entered = threading.Event()

    def enter():
        with device_lock("TEST:1", exclusive=ours):
            entered.set()

    with subprocess.Popen([sys.executable, "-c", HOLDS.format(exclusive=theirs)], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}) as other:  # fmt: skip
        assert other.stdout.readline() == "held\n"
        thread = threading.Thread(target=enter, daemon=True)
        thread.start()
        assert entered.wait(0.3 if waits else 10.0) != waits
        with device_lock("TEST:2", exclusive=True):  # another device is free
            pass
        other.stdin.write("\n")
        other.stdin.flush()
        assert entered.wait(10.0)
        thread.join(10.0)


def test_a_killed_holder_frees_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", HOLDS.format(exclusive=True)], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}) as other:  # fmt: skip
        assert other.stdout.readline() == "held\n"
        other.kill()
    with device_lock("TEST:1", exclusive=True):
        pass


# **** never worse ****

times = st.lists(st.floats(1e-7, 10.0), min_size=1, max_size=9).map(tuple)
near = st.tuples(times, st.floats(0.5, 1.5), st.floats(0.9, 1.1)).map(
    lambda t: (t[0], tuple(x * t[1] for x in t[0]), tuple(x * t[1] * t[2] for x in t[0]))
)


@settings(max_examples=400, deadline=None, database=None)
@given(st.one_of(st.tuples(times, times, times), near))
def test_what_is_accepted_is_faster_than_both(samples):
    tuned, hand, control = samples
    final = judge(add_one_key, (U4,), samples)
    medians = [statistics.median(s) for s in samples]
    noise = max(NOISE_FLOOR, abs(medians[1] / medians[2] - 1))
    assert final.accepted == (medians[0] < min(medians[1:]) * (1 - noise))
    if final.accepted:
        assert medians[0] < medians[1] and medians[0] < medians[2] and final.ratio <= 1 - NOISE_FLOOR + 1e-9
    assert (final.tuned, final.hand_coded, final.control) == samples


add_one_key = add_one()


@pytest.mark.parametrize("tuned, hand, control, accepted", [
    (0.97, 1.0, 1.0, True), (0.985, 1.0, 1.0, False), (1.0, 1.0, 1.0, False), (1.5, 1.0, 1.0, False),
    (0.905, 1.0, 1.1, True), (0.905, 1.1, 1.0, False), (0.85, 1.1, 1.0, True), (0.5, 2.0, 1.0, False),
])  # fmt: skip
def test_judge_by_hand(tuned, hand, control, accepted):
    """Against 1.0 and 1.1 the A/A run differs by 9.1 % (of 1.1) or by 10 % (of 1.0), and a win must be larger than that."""
    assert judge(add_one_key, (U4,), [(tuned,) * 3, (hand,) * 3, (control,) * 3]).accepted is accepted
