"""Experiments under sacred: a run leaves everything that it takes to repeat it, and a replay repeats it bit for bit."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from shell import members, start
from tiny import add_one
from tinygrad.helpers import BEAM

from autotune import cli, guide
from autotune.compiler import renderer_of
from autotune.curves import Curve
from autotune.errors import UsageError
from autotune.experiments import agents, check_limit, command_line, curves, evaluate, imagination, replay, train, tuning
from autotune.experiments import jobs as jobs_of
from autotune.experiments.inputs import keep
from autotune.experiments.jobs import run_jobs
from autotune.experiments.kept import pack, unpack
from autotune.experiments.replay import compare
from autotune.guide import SHIPPED, Guide, find_checkpoint
from autotune.training import LEARNING_RATE, Clock

ROOT = Path(__file__).resolve().parents[2]


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "DEV": "CPU", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiments")
    done = python(folder, "autotune.experiments.train", "with", "fast")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "held-out kernels" in done.stdout and "geometric mean" in done.stdout
    return folder


@pytest.mark.slow  # a whole training; CI runs one by way of the README
def test_training_leaves_checkpoints_records_metrics_and_a_result(trained: Path):
    run = trained / "runs" / "1"
    names = {p.name for p in run.iterdir()}
    assert {"best.safetensors", "best.json", "last.safetensors", "records.db", "result.json", "metrics.json"} <= names
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"return", "ppo.entropy", "simulator.value_loss", "validation"} <= set(metrics)
    figures = json.loads((run / "result.json").read_text())["figures"]
    assert figures["updates"] == 2 and figures["trials"] == 18  # six kernels of three
    assert figures["summary"]["mixed"]["trials"] == figures["summary"]["random"]["trials"] == 4


@pytest.mark.slow
def test_a_test_run_is_no_checkpoint_to_use(trained: Path, monkeypatch: pytest.MonkeyPatch):
    runs = trained / "runs"
    for backend in ("CPU", "CL"):
        assert find_checkpoint(None, backend, runs) == guide.SHIPPED / f"guide-{backend.lower()}"
    assert find_checkpoint(runs / "1" / "best", "CPU", runs) == runs / "1" / "best"  # unless it is named
    monkeypatch.setattr(guide, "SHIPPED", trained)
    with pytest.raises(UsageError, match="DEV=CL python -m autotune.experiments.train"):
        find_checkpoint(None, "CL", runs)


@pytest.mark.slow  # a whole training; CI runs one by way of the README
def test_training_replays_bit_for_bit_and_a_changed_figure_is_named(trained: Path):
    done = python(trained, "autotune", "replay", "runs/1")
    assert done.returncode == 0 and "bit for bit" in done.stdout, done.stdout[-1500:] + done.stderr[-1500:]
    shutil.copytree(trained / "runs" / "1", trained / "forged")
    result = json.loads((trained / "forged" / "result.json").read_text())
    result["figures"]["kernels"][0]["ms"]["mixed"] += 1.0
    result["figures"]["updates"] = 3
    (trained / "forged" / "result.json").write_text(json.dumps(result))
    done = python(trained, "autotune", "replay", "forged")
    assert done.returncode == 1
    assert "kernels[0].ms.mixed" in done.stdout and "updates: recorded 3, now 2" in done.stdout


@pytest.mark.slow
def test_tuning_replays_at_the_recorded_count_and_live_reports_differences(trained: Path):
    done = python(trained, "autotune.experiments.tuning", "with", "fast")
    assert done.returncode == 0, done.stderr[-2000:]
    run = max((trained / "runs").glob("[0-9]*"), key=lambda p: int(p.name))
    recorded = json.loads((run / "result.json").read_text())
    assert recorded["clock"]["trials"] == sum(k["trials"] for k in recorded["figures"]["kernels"]) > 0
    assert "bit for bit" in python(trained, "autotune", "replay", str(run)).stdout
    live = python(trained, "autotune", "replay", str(run), "--live")
    assert live.returncode == 0 and "recorded" in live.stdout  # no machine gives the same microseconds twice


@pytest.mark.slow
def test_searches_of_a_program_are_kept_and_repeated_without_a_device(tmp_path: Path):
    """Then forged: a time that no search has seen is named, and a file that is no run is one line."""
    settings = [
        "program=matmul",
        "trials=3",
        "seeds=2",
        "fewer=[['evolution', 1]]",
        "strategies=['random', 'evolution']",
    ]
    kept = tmp_path / "kept.tar.xz"
    # the later ones take all from the first, its directory or the file in which it was kept: each is whole by itself
    for run, part in (("runs/1", ""), ("runs/2", "runs/1"), ("runs/3", str(kept))):
        done = python(tmp_path, "autotune.experiments.curves", "with", *settings, f"part={part}")
        assert done.returncode == 0, done.stderr[-2000:]
        subprocess.run([sys.executable, str(ROOT / "tools" / "keep_run.py"), run, str(kept)], cwd=tmp_path, check=True)
        with tarfile.open(kept) as file:
            assert json.load(file.extractfile("config.json"))["part"] == ""
        done = python(tmp_path, "autotune", "replay", str(kept))
        assert done.returncode == 0 and "bit for bit" in done.stdout, done.stdout[-1500:] + done.stderr[-1500:]
    result = json.loads((tmp_path / "runs" / "1" / "result.json").read_text())
    again = json.loads((tmp_path / "runs" / "3" / "result.json").read_text())
    assert again["figures"]["curves"] == result["figures"]["curves"]  # wall-clock, too: nothing was searched again
    assert [len(c["times"]) for c in result["figures"]["curves"]] == [3, 3, 3]
    result["figures"]["curves"][0]["times"][0] = 1.0
    result["figures"]["curves"][1]["seconds"][0] = 99.0  # wall-clock is no figure to repeat
    (tmp_path / "runs" / "1" / "result.json").write_text(json.dumps(result))
    done = python(tmp_path, "autotune", "replay", "runs/1")
    assert done.returncode == 1 and done.stdout.count("recorded") == 1 and "curves[0].times[0]" in done.stdout
    kept.write_bytes(b"nothing")
    done = python(tmp_path, "autotune", "replay", str(kept))
    assert done.returncode == 2 and "no run that was kept" in done.stderr


@pytest.mark.slow
def test_checkpoints_and_ablations_are_compared_as_strategies(tmp_path: Path):
    """The same checkpoint under another name finds the same, in a replay, too, when the original is gone."""
    twin = [
        Path(shutil.copy(SHIPPED / f"guide-cpu{kind}", tmp_path / f"twin{kind}")) for kind in (".json", ".safetensors")
    ]
    settings = ["program=matmul", "trials=3", "seeds=1", "strategies=['mixed', 'twin', 'no-simulator']",
                "checkpoint=shipped", "guides=[['twin', 'twin']]"]  # fmt: skip
    done = python(tmp_path, "autotune.experiments.curves", "with", *settings)
    assert done.returncode == 0, done.stderr[-2000:]
    curves = json.loads((tmp_path / "runs" / "1" / "result.json").read_text())["figures"]["curves"]
    times = {c["strategy"]: c["times"] for c in curves}
    assert times["twin"] == times["mixed"] != times["no-simulator"] and len(times["no-simulator"]) == 3
    for file in twin:
        file.unlink()
    assert "bit for bit" in python(tmp_path, "autotune", "replay", "runs/1").stdout


@pytest.mark.slow
def test_the_kernels_of_a_script_are_searched_together_by_two_checkpoints(tmp_path: Path):
    """The same checkpoint under another name finds the same with the same trials, in the same turns; another one something else."""
    shipped = SHIPPED / "guide-cpu"
    (tmp_path / "two.py").write_text(
        "from tinygrad import Tensor\n"
        "a = Tensor.ones(64, 48).contiguous().realize()\n"
        "(a @ a.T).relu().realize(), a.exp().sum(0).realize()\n"
    )
    guides = f"guides=[['auto-twin', '{shipped}'], ['auto-other', '{SHIPPED / 'guide-cl'}']]"
    settings = ["program=two.py", "least=0", "trials=3", "seeds=1", "strategies=['auto', 'auto-twin', 'auto-other']",
                f"checkpoint={shipped}", guides]  # fmt: skip
    done = python(tmp_path, "autotune.experiments.curves", "with", *settings)
    assert done.returncode == 0, done.stderr[-2000:]
    curves = json.loads((tmp_path / "runs" / "1" / "result.json").read_text())["figures"]["curves"]
    found = {(c["strategy"], c["kernel"]): (c["times"], c["turns"]) for c in curves}
    kernels = {kernel for _, kernel in found}
    assert len(kernels) >= 2 and all(found["auto", k] == found["auto-twin", k] for k in kernels)
    assert any(found["auto", k] != found["auto-other", k] for k in kernels)
    assert sum(len(times) for (name, _), (times, _) in found.items() if name == "auto") == 3 * len(kernels)
    (tmp_path / "two.py").unlink()
    assert "bit for bit" in python(tmp_path, "autotune", "replay", "runs/1").stdout


@pytest.mark.slow
@pytest.mark.parametrize("anew", [False, True])
def test_a_guide_practises_on_a_program_and_the_practice_replays(tmp_path: Path, anew: bool):
    done = python(tmp_path, "autotune.experiments.finetune", "with", "fast", "checkpoint=shipped", f"anew={anew}")
    assert done.returncode == 0, done.stderr[-2000:]
    run, shipped = tmp_path / "runs" / "1", Guide.load(SHIPPED / "guide-cpu")
    figures = json.loads((run / "result.json").read_text())["figures"]
    assert figures["trials"] >= 8 and figures["rows"] > 4
    assert find_checkpoint(None, "CPU", tmp_path / "runs") == SHIPPED / "guide-cpu"  # it is used only where it is named
    tuned = Guide.load(run / "finetuned" / "last")
    assert tuned.agent.updates == figures["updates"] > (0 if anew else shipped.agent.updates)
    assert shipped.world is not None and tuned.world is not None
    assert (tuned.world.agent is None) == anew  # a specialist asks nobody else
    for name, array in shipped.simulator.state().items():
        np.testing.assert_array_equal(tuned.simulator.state()[name], array)
    assert "bit for bit" in python(tmp_path, "autotune", "replay", "runs/1").stdout


@pytest.mark.slow
def test_agents_are_compared_on_recordings_and_the_comparison_replays(tmp_path: Path):
    done = python(tmp_path, "autotune.experiments.agents", "with", "fast")
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs" / "1"
    figures = json.loads((run / "result.json").read_text())["figures"]
    assert set(figures["summary"]) == {"random", "frequency", "ppo-lstm"} and len(figures["rows"]) == 6
    for row in figures["rows"]:
        assert all(drawn >= -20 for drawn in row["drawn"]) and len(row["greedy"]) == len(row["drawn"]) >= 30
    assert figures["summary"]["random"]["over random"]["value"] == 0.5
    assert (run / "job-ppo-lstm-1.json").exists()
    assert "bit for bit" in python(tmp_path, "autotune", "replay", "runs/1").stdout


@pytest.mark.slow
def test_a_comparison_that_is_killed_leaves_no_process_and_keeps_its_jobs(tmp_path: Path):
    more = ["agents=['random', 'frequency', 'ppo-lstm']", "processes=2", "env_steps=100000"]
    run = start(tmp_path, "-m", "autotune.experiments.agents", "with", "fast", *more)
    job = tmp_path / "runs" / "1" / "job-random-0.json"
    while not job.exists():  # the random agent is done at once, ppo-lstm takes minutes
        assert run.poll() is None
        time.sleep(0.5)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    time.sleep(3.0)
    assert members(run.pid) == [] and job.exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["autotune.experiments.agents", "with", "agents=['nobody']"], "unknown agent 'nobody'"),
    (["autotune.experiments.train", "with", "nonsense=3"], "nonsense"),
    (["autotune.experiments.train", "with", "fast", "resume=nowhere/best"], "no checkpoint nowhere/best"),
    (["autotune.experiments.curves", "with", "fast", "part=runs/99"], "no run runs/99"),
    (["autotune.experiments.tuning", "with", "program=nothing"], "unknown program"),
    (["autotune.experiments.tuning", "with", "program=nothing.py"], "no script nothing.py"),
    (["autotune.experiments.curves", "with", "fast", "fewer=[['beam', 1]]"], "settings for beam"),
    (["autotune.experiments.curves", "with", "fast", "strategies=['x']", "guides=[['x', 'nowhere/best']]"], "no checkpoint nowhere/best"),
    (["autotune.experiments.evaluate", "with", "fast", "split=heldout"], "no split 'heldout'"),
    (["autotune.experiments.curves", "with", "fast", "strategies=['random']", "kernels=0"], "no kernel is left to search"),
    (["autotune.experiments.agents", "with", "fast", "part=runs/99"], "no run runs/99"),
    (["autotune.experiments.train", "with", "fast", "ppo.minibatches=3"], "a multiple of ppo.minibatches (3)"),
    (["autotune.experiments.train", "with", "fast", "strategies=['mixd']"], "unknown strategy 'mixd'"),
    (["autotune.experiments.train", "with", "fast", "world=transfomer"], "unknown simulator 'transfomer'"),
    (["autotune.experiments.train", "with", "fast", "simulator.fast_bias=-1"], "-1 stands where something like"),
    (["autotune.experiments.train", "with", "fast", "minutes=20m"], "bad setting minutes: '20m' stands where"),
    (["autotune.experiments.curves", "with", "fast", "more=[['random']]"], "bad setting more: it is a list of pairs"),
    (["autotune.experiments.curves", "with", "fast", "seed=3"], "it has no `seed`"),
    (["autotune", "replay", "nowhere"], "no directory of a recorded run"),
])  # fmt: skip
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(arguments[0])
    status = (
        command_line(module.experiment, arguments[1:]) if hasattr(module, "experiment") else cli.main(arguments[1:])
    )
    told = capsys.readouterr().err
    assert status == 2 and message in told and "Traceback" not in told
    assert len([line for line in told.splitlines() if message in line]) == 1


def test_bad_input_ends_a_process_with_status_2(tmp_path: Path):
    done = python(tmp_path, "autotune.experiments.agents", "with", "agents=['nobody']")
    assert done.returncode == 2 and "unknown agent 'nobody'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("experiment", "changed", "message"), [
    (curves, {"seeds": 0}, "bad setting seeds: 0 is no whole number above 0"),
    (curves, {"seeds": "x"}, "bad setting seeds: 'x' stands where something like 5"),
    (curves, {"trials": True}, "bad setting trials: True"),
    (curves, {"kernels": -3}, "bad setting kernels: -3"),
    (curves, {"strategies": []}, "no strategy is named; choose of auto"),
    (curves, {"strategies": "mixed"}, "bad setting strategies: 'mixed'"),
    (curves, {"strategies": ["random", "mixd"]}, "unknown strategy 'mixd'; choose of .*no-policy.*ranker"),
    (curves, {"strategies": [["random"]]}, "unknown strategy a list of 1"),
    (curves, {"more": [["random"]]}, "bad setting more: it is a list of pairs, each of a strategy and int"),
    (curves, {"more": [["random", "x"]]}, "bad setting more"),
    (curves, {"more": [["random", 0]]}, "bad setting random: 0 is no whole number"),
    (curves, {"fewer": "random"}, "bad setting fewer: 'random'"),
    (curves, {"guides": [["random", 3]]}, "bad setting guides: it is a list of pairs, each of a strategy and str"),
    (agents, {"agents": []}, "no agent is named; choose of "),
    (agents, {"processes": 0}, "bad setting processes: 0 is no whole number"),
    (agents, {"seeds": 0}, "bad setting seeds"),
    (imagination, {"processes": 0}, "bad setting processes: 0 is no whole number"),
    (imagination, {"arms": []}, "no arm is named; choose of replay"),
    (imagination, {"trials": []}, "bad setting trials: it is a list of whole numbers"),
    (imagination, {"trials": ["x"]}, "bad setting trials: it is a list of whole numbers"),
    (evaluate, {"strategies": ["mixd"]}, "unknown strategy 'mixd'"),
    (evaluate, {"trials": "x"}, "bad setting trials: 'x'"),
    (tuning, {"strategy": "mixd"}, "unknown strategy 'mixd'"),
    (tuning, {"trials": "x"}, "bad setting trials: 'x'"),
    (tuning, {"seconds": "5m"}, "bad setting seconds: '5m' is neither None nor a number of at least 0"),
    (tuning, {"seconds": -1}, "bad setting seconds: -1 is neither"),
    (tuning, {"seconds": float("nan")}, "bad setting seconds: nan is neither"),
    (tuning, {"seconds": True}, "bad setting seconds: True is neither"),
])  # fmt: skip
def test_bad_settings_are_found_before_anything_is_done(experiment: ModuleType, changed: dict, message: str):
    """No session is there yet to measure with."""
    with pytest.raises(UsageError, match=message) as caught:
        replay.EXPERIMENTS[experiment.experiment.path](None, {**experiment.DEFAULTS, **changed})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), sqlite3.OperationalError("disk I/O error")]
)
def test_what_the_machine_refuses_is_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def refuse(*_) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tuning, "tune_program", refuse)
    assert command_line(tuning.experiment, ["with", "seconds=3"]) == 1
    told = capsys.readouterr().err
    assert told.splitlines()[-1] == f"tuning: {type(error).__name__}: {error}" and "Traceback" not in told


@pytest.mark.parametrize("seconds", [None, 0, 0.5, 60])
def test_a_limit_may_be_none(seconds: float | None):
    check_limit({"seconds": seconds}, "seconds")


@pytest.mark.parametrize(("changed", "message"), [
    ({"minutes": "20m"}, "bad setting minutes: '20m' stands where something like 20.0"),
    ({"minutes": "x"}, "bad setting minutes: 'x'"),
    ({"minutes": -1}, "bad setting minutes: -1"),
    ({"per_kernel": "a"}, "bad setting per_kernel: 'a' stands where something like 8"),
    ({"per_kernel": 1.5}, "bad setting per_kernel: 1.5"),
    ({"draft": 1}, "bad setting draft: 1 stands where something like False"),
    ({"checks": True}, "bad setting checks: True"),
    ({"ppo": 3}, "bad setting ppo: 3"),
    ({"heads": {"steps": "x"}}, "bad setting steps: 'x'"),
    ({"validate_every": 0}, "bad setting validate_every: 0"),
    ({"eval_trials": "x"}, "bad setting eval_trials: 'x'"),
])  # fmt: skip
def test_bad_settings_of_a_training_are_named(changed: dict, message: str):
    assert train.config_of({**train.SETTINGS, "minutes": 20}).minutes == 20  # a whole number is a number, too
    with pytest.raises(UsageError, match=message):
        train.config_of({**train.SETTINGS, **changed})


def test_the_seed_is_of_everything_random():
    """A part that was given one keeps it."""
    parts = ("simulator", "trees", "heads")
    seeds = lambda **changed: [getattr(train.config_of({**train.SETTINGS, **changed}), part).seed for part in parts]  # noqa: E731
    assert seeds() == [0, 0, 0] and seeds(seed=5) == seeds(seed=3_000_005) == [5, 5, 5]
    assert seeds(seed=5, trees={**train.SETTINGS["trees"], "seed": 2}) == [5, 2, 5]


def test_a_training_goes_on_where_it_began(tmp_path: Path):
    session = SimpleNamespace(out=tmp_path, device="CL")
    with pytest.raises(UsageError, match="was trained on CPU, and this is CL: set DEV=CPU"):
        train.first(session, {"resume": str(guide.SHIPPED / "guide-cpu")}, train.DEFAULTS, kernel=None)  # type: ignore[arg-type]


# **** settings of a training that the command line names ****


def begins(out: Path, settings: dict, names: dict[str, list[str]] | None) -> guide.Guide:
    """What a training begins with; `names` is what its command line named, None: a run of a version that did not keep it."""
    out.mkdir()
    if names is not None:
        (out / "named.json").write_text(json.dumps(names))
    session, settings = (
        SimpleNamespace(out=out, device="CPU", renderer=renderer_of("CPU")),
        {**train.SETTINGS, **settings},
    )
    begun = train.first(session, settings, train.config_of(settings), add_one())  # type: ignore[arg-type]
    assert begun is not None
    return begun


@pytest.mark.parametrize(("names", "lr", "anneal", "entropy"), [
    ({"ppo": ["lr"]}, 5e-4, 0, 0.005),  # as by default, and asked for
    ({"ppo": ["lr", "anneal_updates", "entropy"]}, 5e-4, 600, 0.02),
    ({"trees": ["members"]}, LEARNING_RATE, 0, 0.005), ({}, LEARNING_RATE, 0, 0.005), (None, LEARNING_RATE, 0, 0.005),
])  # fmt: skip
def test_a_setting_is_heard_though_it_is_the_default(names, lr: float, anneal: int, entropy: float, tmp_path: Path):
    own = begins(tmp_path / "run", {}, names).agent.config
    assert (own.lr, own.anneal_updates, own.entropy) == (lr, anneal, entropy)


def test_a_setting_of_a_named_configuration_is_heard(tmp_path: Path):
    """And so it was of runs that did not keep what was named."""
    changed = {"ppo": {**train.SETTINGS["ppo"], "lr": 3e-4}}
    for i, names in enumerate(({}, None)):
        assert begins(tmp_path / str(i), changed, names).agent.config.lr == 3e-4


@pytest.mark.parametrize(("updates", "names", "refused"), [
    (300, {"ppo": ["lr"]}, "ppo.lr=0.0005: a checkpoint that is resumed goes on with its own \\(0.0003\\)"),
    (300, {"ppo": ["entropy"]}, ""),  # its own is the same
    (300, {"trees": ["members"]}, ""),
    (600, {"ppo": ["anneal_updates"]}, "ppo.anneal_updates=600: .* goes on with its own \\(0\\)"),  # all that is over
    (300, {"ppo": ["anneal_updates"]}, ""), (600, {}, ""), (600, None, ""),
])  # fmt: skip
def test_what_is_asked_of_a_resumed_checkpoint_is_refused_though_it_is_the_default(updates: int, names, refused: str,
                                                                                   tmp_path: Path):  # fmt: skip
    known = Guide.load(SHIPPED / "guide-cpu")
    known.agent.config = replace(known.agent.config, lr=3e-4, lr_end=0.0, anneal_updates=600, entropy=0.02)
    known.agent.updates = updates
    known.save(tmp_path / "known", {"backend": "CPU"})
    settings = {"resume": str(tmp_path / "known")}
    if not refused:
        assert begins(tmp_path / "run", settings, names).agent.updates == updates
        return
    with pytest.raises(UsageError, match=refused):
        begins(tmp_path / "run", settings, names)


def test_a_run_keeps_what_its_command_line_named_and_its_result_what_it_went_by(tmp_path: Path, monkeypatch):
    """And so does its replay; that of a run which kept neither goes as it went then. Nothing is trained or measured."""

    class Idle(train.Trainer):
        def run(self) -> dict:
            keep(self.out / "start", self.out / "best")
            return {}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "Trainer", Idle)
    monkeypatch.setattr(train, "Evaluator", lambda *_: SimpleNamespace(compare_all=lambda *_, **__: []))
    for name in ("summarise", "to_json", "table"):
        monkeypatch.setattr(train, name, lambda compared: [])
    arguments = ["with", "ppo.lr=5e-4", "trees={'members': 4}", "minutes=1", "use_shipped=False"]
    assert command_line(train.experiment, arguments) == 0
    run = tmp_path / "runs" / "1"
    assert json.loads((run / "named.json").read_text()) == {"ppo": ["lr"], "trees": ["members"]}
    result, wanted = (json.loads((run / f"{name}.json").read_text()) for name in ("result", "config"))
    went = result["figures"]["settings"]
    assert went["ppo"] == {**wanted["ppo"], "anneal_updates": 0, "entropy": 0.005} and went["ppo"]["lr"] == 5e-4
    assert went["trees"]["members"] == 4 and set(went) == {"ppo", "simulator", "trees"}
    monkeypatch.setattr(replay, "WITHOUT_DEVICE", ("train",))
    assert replay.main(run, live=False) == 0
    (run / "named.json").unlink()
    del result["figures"]["settings"]
    (run / "result.json").write_text(json.dumps(result))
    assert replay.main(run, live=False) == 0


def test_the_settings_of_all_kept_runs_are_good(tmp_path: Path):
    """And what preparing each of their kernels costs is known: the tables charge it."""
    kept = sorted((ROOT / "benchmarks").glob("bench-*.tar.xz"))
    for file in kept:
        unpack(file, tmp_path / file.stem)
        name, settings, result = replay.read_run(tmp_path / file.stem)
        assert name == "curves" and curves.checked(settings).items() >= result["figures"]["settings"].items()
        costs = json.loads((ROOT / "benchmarks" / f"preparing-{result['device'].lower()}.json").read_text())
        assert costs["device"] == result["device"] and set(result["figures"]["calls"]) <= set(costs["seconds"])
        assert set(costs["again"]) == set(costs["seconds"])
    assert kept


@pytest.mark.parametrize("experiment", [agents, curves, imagination])
def test_a_seed_that_would_do_nothing_is_refused(experiment: ModuleType, capsys):
    assert command_line(experiment.experiment, ["with", "seed=3", "nonsense=3"]) == 2  # else that would be told
    assert "it has no `seed`" in capsys.readouterr().err


def test_a_damaged_file_is_no_run(tmp_path: Path):
    run, file = tmp_path / "run", tmp_path / "kept.tar.xz"
    run.mkdir()
    (run / "run.json").write_text('{"experiment": {"name": "curves"}}')
    (run / "config.json").write_text(json.dumps({str(i): hash(str(i)) for i in range(2000)}))
    pack(run, file)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(UsageError, match="no run that was kept"):
        unpack(file, tmp_path / "again")


def test_where_a_job_fails_the_rest_is_given_up(tmp_path: Path):
    """One process: the second job fails, and of the others at most what it had begun by then is done."""
    settings = {"part": "", "processes": 1, "folder": str(tmp_path)}
    with pytest.raises(ZeroDivisionError):
        run_jobs(divide, [(1,), (0,), *((n,) for n in range(2, 12))], settings, tmp_path, "dividing")
    assert (tmp_path / "job-1.json").exists() and len(list(tmp_path.glob("done-*"))) < 6


def test_jobs_are_not_searched_by_tinygrad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A worker has BEAM from the environment."""
    monkeypatch.setenv("BEAM", "2")
    assert run_jobs(told_of_beam, [(1,)], {"part": "", "processes": 1}, tmp_path, "asking") == [{"beam": 0}]


JOBS = {"part": "", "processes": 1, "seeds": 1, "seed": 5, "hidden": 8}


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """Two jobs that are done, and say so by other results than those which they would have again."""
    folder = tmp_path / "part"
    folder.mkdir()
    run_jobs(told_of_beam, [(1,), (2,)], JOBS, folder, "asking")
    for path in folder.iterdir():
        path.write_text(path.read_text().replace('{"beam": 0}', '{"beam": 7}'))
    return folder


def went_on(part: Path, **changed) -> list[int]:
    out = part.parent / "out"
    out.mkdir()
    found = run_jobs(told_of_beam, [(1,), (2,)], {**JOBS, "part": str(part), **changed}, out, "asking")
    assert sorted(path.name for path in out.iterdir()) == ["job-1.json", "job-2.json"]
    return [row["beam"] for row in found]


def test_jobs_are_taken_over_from_a_run_of_the_same_settings(part: Path, capsys):
    """How many there are, by how many processes, and what sacred has drawn is nothing to a job."""
    assert went_on(part, seeds=3, processes=2, seed=6) == [7, 7] and "not of these" not in capsys.readouterr().err


def test_jobs_of_other_settings_are_done_again(part: Path, capsys):
    assert went_on(part, hidden=16) == [0, 0]
    assert f"2 jobs of {part} are not of these settings" in capsys.readouterr().err


def test_jobs_of_another_device_or_recording_are_done_again(
    part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sources, recording = [jobs_of.source_of(JOBS)], tmp_path / "recorded.jsonl.gz"
    monkeypatch.setattr(jobs_of, "recorded_path", lambda device: recording)
    for content in (b"1", b"2"):
        recording.write_bytes(content)
        sources.append(jobs_of.source_of(JOBS))
    with monkeypatch.context() as patch:
        patch.setattr(jobs_of, "default_device", lambda: "CL")
        sources.append(jobs_of.source_of(JOBS))
    assert len(set(sources)) == 4
    assert went_on(part) == [0, 0]


@pytest.mark.parametrize("text", ["", '{"beam": 7}', '{"source": "x"}', "[]", '{"source": "x", "result": {"be'])
def test_a_job_that_cannot_be_read_or_does_not_say_of_what_it_is_is_done_again(text: str, part: Path):
    (part / "job-2.json").write_text(text)
    assert went_on(part) == [7, 0]


def test_a_job_that_is_cut_off_while_it_is_kept_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(self: Path, text: str) -> None:
        self.write_bytes(text[:9].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        run_jobs(told_of_beam, [(1,)], JOBS, tmp_path, "asking")
    assert list(tmp_path.iterdir()) == []
    path = curves.curve_file(tmp_path, "random", 0, 3, "a", None)
    with pytest.raises(OSError):
        curves._keep(path, Curve("a", "random", 0, 0.0, [1.0], [1.0]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", '{"strategy": "random"}', '{"strategy": "ran'])
def test_a_search_that_cannot_be_read_is_made_again(text: str, tmp_path: Path):
    out, part = tmp_path / "out", tmp_path / "part"
    out.mkdir(), part.mkdir()
    whole, broken = (curves.curve_file(part, "random", seed, 3, "a", None) for seed in (0, 1))
    whole.write_text(json.dumps(asdict(Curve("a", "random", 0, 0.0, [1.0], [1.0]))))
    broken.write_text(text)
    shared = SimpleNamespace(hand_coded=0.0)
    assert curves._made_here(whole, shared) and not curves._made_here(broken, shared)  # type: ignore[arg-type]
    curves.take_over(part, out)
    assert [path.name for path in out.iterdir()] == [whole.name]


def test_checkpoints_may_have_dots_in_their_names(tmp_path: Path):
    """Beside one whose name is all before the dot."""
    for name in ("guide-v1", "guide-v1.2"):
        for kind in ("safetensors", "json"):
            (tmp_path / f"{name}.{kind}").write_text(f"{name} {kind}")
    out = tmp_path / "out"
    out.mkdir()
    for named in ("guide-v1.2", "guide-v1.2.safetensors", "guide-v1.2.json"):
        keep(tmp_path / named, out / f"guide-{named}")
    for target in ("guide-guide-v1.2.safetensors", "guide-guide-v1.2.json"):
        assert (out / target).read_text() == f"guide-v1.2 {target.rpartition('.')[2]}"
    assert curves.guide_of(tmp_path, "v1.2") == tmp_path / "guide-v1.2.safetensors"
    assert curves.guide_of(tmp_path, "v1.3") is None


def told_of_beam(n: int, settings: dict) -> dict:
    return {"beam": BEAM.value}


def divide(n: int, settings: dict) -> dict:
    """A job."""
    result = {"of": 1 / n}
    time.sleep(0.2)
    (Path(settings["folder"]) / f"done-{n}").touch()
    return result


def test_compare_names_places_and_takes_nan_for_itself():
    nan = float("nan")
    assert compare({"a": [1, {"b": nan}]}, {"a": [1, {"b": nan}]}) == []
    assert compare({"a": [1, 2]}, {"a": [1, 3]}) == ["a[1]: recorded 2, now 3"]
    assert compare({"a": 1}, {"a": 1, "c": 2}) == ["c: recorded None, now 2"]


def test_a_clock_repeats_its_counts():
    live = Clock()
    while not live.over("phase", live.elapsed() if live.asked.get("phase", 0) == 3 else 1e9):
        pass
    assert live.ended == {"phase": 4}
    again = Clock(live.ended)
    assert [again.over("phase", 0.0) for _ in range(4)] == [False, False, False, True]
    assert not again.over("other", 0.0)  # never ended by the clock: ends by itself
