"""A closed world of recorded timings: its file, its scores, and that nothing but what is recorded can be done in it."""

from __future__ import annotations

import gzip
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from autotune import corpus, files, recorded
from autotune.compiler import renderer_of
from autotune.env import KernelVectorEnv
from autotune.errors import UsageError
from autotune.kernel import Schedule, schedule_from_json
from autotune.recorded import Recorded, recorded_path, row_of
from autotune.records import History, Trial, fingerprint_id
from autotune.search.tree import TreeSearch
from autotune.space import STOP_INDEX

CPU = renderer_of("CPU")
KERNELS = {split: corpus.load(split)[:2] for split in ("train", "held_out")}


def history(kernel, seed: int = 0) -> tuple[History, dict[Schedule, float | None]]:
    """Twelve schedules of a tree; their seconds halve with each action, the third fails."""
    search = TreeSearch(kernel, CPU, seed)
    asked = search.ask(12)
    seconds = {s: None if i == 2 else 8.0 / 2 ** len(s) for i, s in enumerate(asked)}
    trials = [Trial(kernel.key, s, "ok" if t else "crashed", (t,) if t else ()) for s, t in seconds.items()]
    bases = [Trial(kernel.key, (), "ok", (8.0,), kind=k) for k in ("unoptimized", "hand_coded")]
    return History(bases + trials), {(): 8.0, **seconds}


@pytest.fixture
def world(tmp_path):
    path = tmp_path / "recorded.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for split, kernels in KERNELS.items():
            for kernel in kernels:
                file.write(json.dumps(row_of(kernel, split, history(kernel)[0])) + "\n")
    return Recorded.load(path)


def test_a_row_comes_back_as_it_was_measured(world):
    for split, kernels in KERNELS.items():
        assert [e.kernel.key for e in world.entries[split]] == [k.key for k in kernels]
        for kernel in kernels:
            seconds = history(kernel)[1]
            times = world.by_key[kernel.key].times
            assert times.keys() == seconds.keys()
            assert all(math.isnan(times[s]) if t is None else times[s] == pytest.approx(math.log2(t), abs=1e-3)
                       for s, t in seconds.items())  # fmt: skip


def test_scores_by_hand(world):
    kernel = KERNELS["held_out"][0]
    seconds = history(kernel)[1]
    deepest = max(len(s) for s, t in seconds.items() if t is not None)
    for schedule, t in seconds.items():
        expected = 0.0 if t is None else len(schedule) / deepest  # log2(8 / t) is its length
        assert world.score(kernel, schedule) == pytest.approx(expected, abs=1e-3)


def test_only_what_is_recorded_can_be_done(world):
    """Random play for a while: every episode ends on a recorded schedule, with the recorded return."""
    env = KernelVectorEnv(world.task("train", CPU), 4)
    seen, rng = env.reset(0), np.random.default_rng(0)
    for _ in range(60):
        step = env.step(np.array([rng.choice(np.flatnonzero(m)) for m in seen.mask]))
        seen = step.observation
    assert len(env.finished) > 20
    for kernel, schedule, total in env.finished:
        time = world.by_key[kernel.key].times[schedule]
        assert total == pytest.approx(-3.0 if math.isnan(time) else 3.0 - time, abs=1e-3)
    assert any(schedule for _, schedule, _ in env.finished)


def test_in_order_every_kernel_has_its_turn(world):
    task = world.task("train", CPU)
    env = KernelVectorEnv(task, 3, in_order=True)
    for _ in range(2):  # a reset begins anew
        env.reset(5)
        keys = [e.state.kernel.key for e in env.episodes]
        env.step(np.full(3, STOP_INDEX))
        keys += [e.state.kernel.key for e in env.episodes]
        assert keys == [task.kernels[i % 2].key for i in range(6)] and len(env.finished) == 3


def test_useless_kernels_are_left_out():
    kernel = KERNELS["train"][0]
    whole, _ = history(kernel)
    assert row_of(kernel, "train", whole) is not None
    slow = [t if t.kind != "trial" else Trial(kernel.key, t.schedule, "ok", (7.5,)) for t in whole.trials]
    assert row_of(kernel, "train", History(slow)) is None  # nothing is more than a tenth faster
    assert row_of(kernel, "train", History(whole.trials[1:])) is None  # a baseline is missing


def test_what_was_refuted_later_has_failed():
    """The fastest schedule, which was wrong when it was looked at again; its time would be the best of the kernel."""
    kernel = KERNELS["train"][0]
    whole, seconds = history(kernel)
    fastest = min((s for s, t in seconds.items() if t is not None), key=lambda s: seconds[s])
    recheck = Trial(kernel.key, fastest, "wrong_output", kind="recheck")
    before, after = (
        {
            schedule_from_json(schedule): micros
            for schedule, micros in row_of(kernel, "train", History(trials))["trials"]
        }
        for trials in (whole.trials, [*whole.trials, recheck])
    )
    assert before[fastest] is not None and after == {**before, fastest: None}


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"recorded collect"):
        Recorded.load(tmp_path / "none.jsonl.gz")
    row = row_of(KERNELS["train"][0], "train", history(KERNELS["train"][0])[0])
    path = tmp_path / "moved.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps({**row, "split": "held_out"}) + "\n")
    with pytest.raises(UsageError, match="held_out"):
        Recorded.load(path)


FIELDS = {"model": "x"}


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """recorder(minutes) -> exit status of the command. One kernel of training is wanted and two are held out; of each "collecting"
    puts the twelve schedules of `history` on record, which count[0] of the calls do before the time is over."""
    clock, count = [0.0], [99]
    monkeypatch.setattr(recorded, "KERNELS", {"train": 1, "held_out": 2})
    monkeypatch.setattr(files, "DATA", tmp_path)
    monkeypatch.setattr(recorded, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(recorded, "default_device", lambda: "CPU")

    def runner(device: str) -> SimpleNamespace:
        return SimpleNamespace(device=device, fields=FIELDS, fingerprint=fingerprint_id(FIELDS), close=lambda: None)

    def collect_kernel(kernel, records, runner, *_, **__) -> None:
        if not records.history(kernel.key, runner.fingerprint).trials:
            records.add_kernel(kernel)
            for trial in history(kernel)[0].trials:
                records.add_trial(runner.fingerprint, trial, 1)
        count[0] -= 1
        clock[0] += 0.0 if count[0] else 1e9

    monkeypatch.setattr(recorded, "Runner", runner)
    monkeypatch.setattr(recorded, "collect_kernel", collect_kernel)

    def record(calls: int = 99) -> int:
        count[0] = calls
        return recorded.main(["collect", "--records", str(tmp_path / "r.db")])

    return record


def test_a_recording_is_written_when_it_is_whole(recorder, tmp_path, capsys):
    """Two of three kernels when the time is over: what is there already stays, and the same command goes on."""
    path = tmp_path / "recorded-cpu.jsonl.gz"
    path.write_bytes(b"what shipped")
    assert recorder(calls=2) == 1 and path.read_bytes() == b"what shipped"
    told = [line for line in capsys.readouterr().err.splitlines() if "recorded:" in line]
    assert told == ["python -m autotune.recorded: 2 of 3 kernels are on record; recorded-cpu.jsonl.gz is written when all are: "
                    "the same command goes on from there"]  # fmt: skip
    assert recorder() == 0 and "39 schedules in recorded-cpu.jsonl.gz" in capsys.readouterr().out  # three of 1 + 12
    assert {split: len(e) for split, e in Recorded.load(path).entries.items()} == {
        "train": 1,
        "validation": 0,
        "held_out": 2,
    }
    assert sorted(p.name for p in tmp_path.iterdir() if "recorded" in p.name) == [path.name]


def test_a_split_that_cannot_be_filled_is_named(recorder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(recorded, "row_of", lambda *_: None)
    monkeypatch.setattr(recorded, "chosen", lambda split, seed: KERNELS[split])
    assert recorder() == 1 and not (tmp_path / "recorded-cpu.jsonl.gz").exists()
    assert "the split train has 0 kernels of use on CPU, not 1" in capsys.readouterr().err


def test_a_recording_that_cannot_be_written_leaves_the_former(recorder, monkeypatch, tmp_path, capsys):
    path = tmp_path / "recorded-cpu.jsonl.gz"
    path.write_bytes(b"what shipped")

    def full(*_, **__) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.json, "dumps", full)
    assert recorder() == 1 and path.read_bytes() == b"what shipped"
    assert "OSError: [Errno 28] No space left on device" in capsys.readouterr().err


def test_the_recording_that_ships_is_large_and_closed():
    """At least 100 kernels of 30 schedules, every prefix of a schedule on record, no kernel in two splits."""
    shipped = Recorded.load(recorded_path("CPU"))
    entries = [e for split in shipped.entries.values() for e in split]
    assert len(entries) == len(shipped.by_key) and {len(e) for e in shipped.entries.values()} >= {16, 40}
    assert sum(len(e.times) - 1 >= 30 for e in entries) >= 100  # the un-optimized kernel is no schedule
    for entry in entries:
        assert all(s[:-1] in entry.times for s in entry.times if s)
        assert math.isfinite(entry.hand_coded) and math.isfinite(entry.times[()])
