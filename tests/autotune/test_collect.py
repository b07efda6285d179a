"""`collect` and its data card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from shell import autotune, count, fails, folder, start
from test_never_worse import CPU, Adversary
from tiny import U2, U4, add_one, total
from tinygrad import Context
from tinygrad.helpers import BEAM

from autotune import cli, corpus, script
from autotune.card import card_of
from autotune.cli_collect import SPLIT, _some
from autotune.collect import collect
from autotune.compiler import hand_coded
from autotune.data import shipped_kernels
from autotune.errors import UsageError
from autotune.kernel import Kernel, Schedule
from autotune.measuring.bench import PROTOCOL
from autotune.records import Records, Trial

__all__ = ["folder"]  # the fixture


def test_a_scripts_kernels_are_collected_once(folder: Path):
    records = folder / "collected.db"
    command = ("collect", "--records", records, "--script", "small.py", "--per-kernel", "10", "--minutes", "2")
    status, out, err = autotune(folder, *command)
    assert status == 0, err
    assert count(records) == 10 and "10 new trials of 1 kernels" in err
    assert "random 8" in out and "ucb 2" in out  # a visit of eight trials each
    status, again, err = autotune(folder, *command)
    assert status == 0 and "0 new trials" in err and count(records) == 10 and again == out


def test_two_collectors_on_one_file_make_no_trial_twice(folder: Path):
    records = folder / "two.db"
    command = ("collect", "--records", records, "--script", "small.py", "--per-kernel", "10", "--minutes", "2")
    with start(folder, "-m", "autotune", *command) as one, start(folder, "-m", "autotune", *command) as other:
        for process in (one, other):
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
    assert (count(records), count(records, "hand_coded")) == (10, 1)


class Shared(Adversary):
    """An honest device beside another collector, which has a kernel for the first `looks` looks at it; when it lets go, it has
    made four of its trials. `log` holds who was measured, `held` the kernel that is claimed."""

    device = "CPU"

    def __init__(self, records: Records, taken: Kernel, looks: float):
        super().__init__(0, 0.0, 0.0)
        self.records, self.taken, self.looks, self.held = records, taken, looks, ""
        self.log: list[str] = []

    @contextmanager
    def claim(self, path: Path, kernel: Kernel, fingerprint: str):
        assert path == self.records.path and fingerprint == self.fingerprint and not self.held
        if kernel.key == self.taken.key and self.looks:
            self.looks -= 1
            if not self.looks:
                self.others()
            yield False
        else:
            self.held = kernel.key
            yield True
            self.held = ""

    def others(self) -> None:
        key = self.taken.key
        self.records.add_kernel(self.taken)
        for kind, schedule in (("unoptimized", ()), ("hand_coded", hand_coded(self.taken.ast, CPU))):
            self.records.add_trial(self.fingerprint, Trial(key, schedule, "ok", (1.0,), kind=kind), PROTOCOL)
        for schedule in ((U2,), (U4,), (U2, U2), (U4, U2)):
            self.records.add_trial(self.fingerprint, Trial(key, schedule, "ok", (1.0,)), PROTOCOL)

    def baselines(self, kernel: Kernel) -> list[Trial]:
        assert kernel.key == self.held
        return super().baselines(kernel)

    def measure(self, kernel: Kernel, schedules: Sequence[Schedule], *more) -> list[Trial]:
        assert kernel.key == self.held
        self.log += [kernel.name] * len(schedules)
        return super().measure(kernel, schedules, *more)


@pytest.fixture
def sharing(records: Records, monkeypatch):
    """sharing(looks) -> a device where another collector has the first of two kernels, and both kernels."""

    def make(looks: float) -> tuple[Shared, list[Kernel]]:
        kernels = [add_one(), add_one(768)]
        device = Shared(records, kernels[0], looks)
        monkeypatch.setattr("autotune.records.claims.claim", device.claim)
        monkeypatch.setattr("autotune.records.claims.PAUSE", 0.0)
        return device, kernels

    return make


def test_a_kernel_that_another_collector_has_is_visited_later(records: Records, sharing):
    """By then it has four trials of six: there are two to make."""
    device, (taken, free) = sharing(3)
    assert collect([taken, free], records, device, 6, ["random"], 0, 60.0) == 8
    assert device.log == [free.name] * 6 + [taken.name] * 2
    made = [t for _, t in records.all_trials(device.fingerprint) if t.kernel == taken.key and t.kind == "trial"]
    assert len(made) == 6 == len({t.schedule for t in made})


def test_nobody_waits_for_another_collector_beyond_the_time(records: Records, sharing):
    device, (taken, free) = sharing(math.inf)
    assert collect([taken, free], records, device, 6, ["random"], 0, 0.02) <= 6
    assert taken.name not in device.log


def test_a_guide_can_say_where_to_look(folder: Path):
    records = folder / "guided.db"
    command = ("collect", "--records", records, "--script", "small.py", "--per-kernel", "4", "--strategies", "mixed")
    status, out, err = autotune(folder, *command)
    assert status == 0 and count(records) == 4 and "mixed 4" in out, err


def test_the_time_ends_it(folder: Path):
    records = folder / "short.db"
    status, out, err = autotune(folder, "collect", "--records", records, "--minutes", "0")
    assert status == 0 and f"0 new trials of {len(corpus.load('train'))} kernels" in err and count(records) == 0
    assert "no trials on record" in out


def test_so_many_kernels_as_the_seed_draws_them():
    """The first of those drawn stay among them where more are wanted; another seed draws others."""
    kernels = corpus.load("train")[:40]
    few, more, other = _some(kernels, 5, 0), _some(kernels, 9, 0), _some(kernels, 5, 1)
    assert len(few) == 5 and len(more) == 9
    assert {k.key for k in few} < {k.key for k in more} and {k.key for k in few} != {k.key for k in other}
    assert few == [k for k in kernels if k in few] and _some(kernels, None, 0) == kernels


def test_a_card_by_hand(tmp_path: Path):
    """Two kernels. One has binaries of 1, 4 and 16 s, the first of them measured again at 2 s, and a failure."""
    with closing(Records(tmp_path / "card.db")) as records:
        own = records.add_fingerprint({"backend": "CPU"})
        for kernel, rows in (
            (add_one(), [(1.0, "a"), (4.0, "b"), (16.0, "c"), (2.0, "a"), (None, "d")]),
            (total(64), [(8.0, "a")]),
        ):
            records.add_kernel(kernel)
            records.add_trial(own, Trial(kernel.key, (), "ok", (9.0,), kind="hand_coded"), 1)
            for i, (seconds, code) in enumerate(rows):
                schedule, verdict = ((U2,), (U4,), (U2, U2), (U2, U4), (U4, U2))[i], "ok" if seconds else "timeout"
                samples = (seconds,) if seconds else ()
                records.add_trial(
                    own, Trial(kernel.key, schedule, verdict, samples, code_hash=code, strategy="random"), 1
                )
        card = card_of(records, own)
        assert card_of(records, "0" * 16).trials == {}
    assert (
        sum(card.trials.values()) == 6 and card.strategies == {"random": 6} and card.verdicts == {"ok": 5, "timeout": 1}
    )
    assert card.binaries == 4 and card.repeated == 1 and card.censored == pytest.approx(1 / 6)
    assert card.sigma == pytest.approx(2.0)  # log2 times 0, 2, 4
    assert card.sigma_noise == pytest.approx(1 / (0.6745 * math.sqrt(2)))
    true = math.sqrt(4.0 - 1 / (2 * 0.6745**2))  # the noise is a part of what was seen to spread
    assert card.ceiling == pytest.approx(0.5 + math.atan(true / card.sigma_noise) / math.pi)
    assert math.isclose(replace(card, sigma=0.1).ceiling, 0.5)  # all of it
    assert "no simulator can order more than" in card.table()


def test_only_kernels_without_shipped_trials_are_visited(folder: Path):
    """On the CPU trials of all training kernels ship, on an unknown device of none."""
    held = {k.key for k in corpus.load("train")}
    assert held <= shipped_kernels("CPU") and not shipped_kernels("NONE")
    status, out, err = autotune(folder, "collect", "--unseen", "--records", folder / "unseen.db")
    assert status == 0 and "0 new trials of 0 kernels" in err and "no trials on record" in out


@pytest.mark.parametrize("where", ["--script", "--program"])
def test_beam_in_force_searches_nothing_of_what_is_captured(monkeypatch, tmp_path: Path, where: str):
    found = []

    def capture(*_):
        found.append(BEAM.value)
        raise UsageError("that is enough")

    for name in ("kernels_of_script", "captured"):
        monkeypatch.setattr(f"autotune.cli_collect.{name}", capture)
    (tmp_path / "matmul").touch()
    monkeypatch.chdir(tmp_path)
    with Context(BEAM=2):
        assert cli.main(["collect", "--records", "r.db", where, "matmul"]) == 2
        assert BEAM.value == 2
    assert found == [0]


def test_a_script_is_captured_without_beam_whoever_asks(monkeypatch, tmp_path: Path):
    def capture(*_):
        raise UsageError(f"BEAM={BEAM.value}")

    monkeypatch.setattr(script, "capture_script", capture)
    (tmp_path / "net.py").touch()
    with Context(BEAM=2), pytest.raises(UsageError, match="BEAM=0"):
        script.kernels_of_script(tmp_path / "net.py", "CPU")


def test_bad_input_is_one_line(capsys, tmp_path: Path):
    assert "for the corpus" in fails(capsys, 2, "collect", "--unseen", "--script", "small.py")
    assert "for the corpus" in fails(capsys, 2, "collect", "--unseen", "--program", "matmul")
    for other in (("--program", "matmul"), ("--script", "small.py")):
        assert "--split is of the corpus" in fails(capsys, 2, "collect", "--split", SPLIT, *other)
    unled = ("collect", "--strategies", "random", "ucb", "--checkpoint", "nowhere")
    assert "random ucb: none of these strategies uses a checkpoint" in fails(capsys, 2, *unled)
    assert "not both" in fails(capsys, 2, "collect", "--program", "matmul", "--script", "small.py")
    assert "no script nowhere.py" in fails(capsys, 2, "collect", "--script", "nowhere.py")
    assert "invalid choice: 'policy'" in fails(capsys, 2, "collect", "--strategies", "policy")
    missing = ("collect", "--strategies", "mixed", "--checkpoint", "nowhere", "--records", tmp_path / "none.db")
    assert "nowhere" in fails(capsys, 2, *missing)
    assert "--per-kernel" in fails(capsys, 2, "collect", "--per-kernel", "0")
