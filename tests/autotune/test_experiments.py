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
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from shell import members, start

from autotune import cli, files
from autotune.errors import UsageError
from autotune.experiments import agents, check_limit, command_line, curves, evaluate, imagination, replay, tuning
from autotune.experiments.replay import compare
from autotune.files import DATA
from autotune.guide import Guide, find_checkpoint
from autotune.training import Clock

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
        assert find_checkpoint(None, backend, runs) == DATA / f"guide-{backend.lower()}"
    assert find_checkpoint(runs / "1" / "best", "CPU", runs) == runs / "1" / "best"  # unless it is named
    monkeypatch.setattr(files, "DATA", trained)
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
def test_a_training_that_goes_on_is_held_against_what_it_began_with(trained: Path):
    """Before the table on held-out kernels; on two kernels nothing is decided. A replay repeats it."""
    settings = ["fast", "start=runs/1/best", "judge_kernels=2"]
    done = python(trained, "autotune.experiments.train", "with", *settings)
    assert done.returncode == 0, done.stderr[-2000:]
    run = max((trained / "runs").glob("[0-9]*"), key=lambda p: int(p.name))
    judged = json.loads((run / "result.json").read_text())["figures"]["judged"]
    assert judged["summary"]["kernels"] == 2 and not judged["slower"] and judged["by_chance"] >= 1 / 4
    assert [k["trials"] for k in judged["kernels"]] == 2 * [{"mixed": 2, "before": 2}]
    assert "bit for bit" in python(trained, "autotune", "replay", str(run)).stdout


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
        Path(shutil.copy(DATA / f"guide-cpu{kind}", tmp_path / f"twin{kind}")) for kind in (".json", ".safetensors")
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
    shipped = DATA / "guide-cpu"
    (tmp_path / "two.py").write_text(
        "from tinygrad import Tensor\n"
        "a = Tensor.ones(64, 48).contiguous().realize()\n"
        "(a @ a.T).relu().realize(), a.exp().sum(0).realize()\n"
    )
    guides = f"guides=[['auto-twin', '{shipped}'], ['auto-other', '{DATA / 'guide-cl'}']]"
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
    run, shipped = tmp_path / "runs" / "1", Guide.load(DATA / "guide-cpu")
    figures = json.loads((run / "result.json").read_text())["figures"]
    assert figures["trials"] >= 8 and figures["rows"] > 4
    assert find_checkpoint(None, "CPU", tmp_path / "runs") == DATA / "guide-cpu"  # it is used only where it is named
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
    (["autotune.experiments.train", "with", "fast", "ppo.minibatches=3"], "a multiple of minibatches (3)"),
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
    (curves, {"strategies": ["auto", "auto-no-memory"], "guides": [["auto-no-memory", "runs/5/best"]]},
     "a checkpoint cannot be called auto-no-memory: that is a strategy; say auto-no-memory-mine"),
    (curves, {"strategies": ["ranker"], "guides": [["ranker", "runs/5/best"]]}, "cannot be called ranker"),
    (agents, {"agents": []}, "no agent is named; choose of "),
    (agents, {"processes": 0}, "bad setting processes: 0 is no whole number"),
    (agents, {"seeds": 0}, "bad setting seeds"),
    (agents, {"env_steps": 255}, "bad setting env_steps: 255 are fewer than the 256 of one update"),
    (imagination, {"env_steps": 255}, "bad setting env_steps: 255 are fewer"),
    (imagination, {"check_share": 1.0}, "bad setting check_share: 1.0 leaves no trials to learn from"),
    (imagination, {"processes": 0}, "bad setting processes: 0 is no whole number"),
    (imagination, {"arms": []}, "no arm is named; choose of replay"),
    (imagination, {"trials": []}, "bad setting trials: it is a list of whole numbers"),
    (imagination, {"trials": ["x"]}, "bad setting trials: it is a list of whole numbers"),
    (evaluate, {"strategies": ["mixd"]}, "unknown strategy 'mixd'"),
    (evaluate, {"strategies": ["auto", "mixed"]}, "unknown strategy 'auto'; choose of"),
    (evaluate, {"trials": "x"}, "bad setting trials: 'x'"),
    (tuning, {"strategy": "mixd"}, "unknown strategy 'mixd'"),
    (tuning, {"strategy": "random", "checkpoint": "nowhere"}, "uses no checkpoint"),
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


@pytest.mark.parametrize("experiment", [agents, curves, imagination])
def test_a_seed_that_would_do_nothing_is_refused(experiment: ModuleType, capsys):
    assert command_line(experiment.experiment, ["with", "seed=3", "nonsense=3"]) == 2  # else that would be told
    assert "it has no `seed`" in capsys.readouterr().err


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
