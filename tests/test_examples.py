"""The examples, as a user runs them, on a network of seconds."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from autotune.latency import Latency
from autotune.records import History, Trial

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "transformer.py"
SMALL = ["--layers", "1", "--width", "64", "--heads", "2", "--tokens", "16"]


def example(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), *SMALL, "--records", "r.db", *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "DEV": "CPU"}, capture_output=True, text=True, timeout=900
    )


@pytest.mark.parametrize("arguments, says", [
    (("--infer", "--json", "missing/x.json"), "cannot be written"),
    (("--infer", "--heads", "3"), "--width 64 is no multiple of --heads 3"),
    (("--infer", "--tokens", "0"), "'0' is no whole number from 1"),
    (("--train", "--strategy", "random"), "nothing to train"),
    (("--train", "--json", "x.json"), "--json is of --infer"),
    (("--train", "--trials", "8"), "--trials is of --infer"),
    (("--infer", "--minutes", "9"), "--minutes is of --train"),
    (("--infer", "--strategy", "random", "--checkpoint", "nowhere"), "uses no checkpoint"),
])  # fmt: skip
def test_what_would_be_lost_in_the_end_is_refused_at_once(tmp_path, arguments, says):
    done = example(tmp_path, *arguments)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists() and done.stdout == ""  # the network was not even built


def test_only_beam_is_searched_and_nobody_prints_whatever_the_environment_says(monkeypatch):
    # by path: the proofs, which pytest has imported, have a module of the same name
    common = runpy.run_path(str(EXAMPLE.parent / "common.py"))
    asked = {}

    def compare(variants):
        asked.update({name: dict(variant.env) for name, variant in variants.items()})
        return {name: Latency([1.0], np.zeros(1), 1.0) for name in variants}

    monkeypatch.setattr(common["latency"], "compare", compare)
    common["whole_program"](argparse.Namespace(beam=4, pytorch=True), "a network")
    plain = {"DEBUG": "0", "BEAM": "0", "JITBEAM": "0"}
    beam = {"DEBUG": "0", "BEAM": "4", "JITBEAM": "4", "IGNORE_BEAM_CACHE": "1"}
    assert asked == {"default": plain, "tuned": plain, "beam": beam, "pytorch": plain}


def test_a_control_gets_as_many_trials_as_tuning_has_heard_of():
    """Those of fine-tuning and of beam searches, which no budget counts, and answers; baselines and second looks are none."""
    made_of = runpy.run_path(str(EXAMPLE.parent / "common.py"))["made_of"]
    made = [
        ("trial", "auto"),
        ("trial", "finetune/mixed"),
        ("trial", "auto/beam"),
        ("answer", "policy"),
        ("hand_coded", ""),
        ("recheck", ""),
    ]
    history = History([Trial("k", (), "ok", (1.0,), kind=kind, strategy=by) for kind, by in made])
    assert made_of(history) == 4 and history.spent == 1


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_tuned_beside_random_schedules_and_beam(tmp_path, phase):
    options = (
        "--phase",
        phase,
        "--trials",
        "2",
        "--strategy",
        "random",
        "--control",
        "--beam",
        "1",
        "--json",
        "out.json",
    )
    done = example(tmp_path, "--infer", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "out.json").read_text())
    control, latency = figures["control"], figures["latency"]
    assert control["trials"] == sum(k["trials"] for k in figures["tune"]["kernels"]) <= control["random_trials"]
    assert control["tuned_ms"] > 0 and control["worst"] < 1.5 and set(latency) == {"default", "tuned", "beam"}
    assert latency["tuned"]["largest_difference"] < 1e-2 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_policy_trained_on_the_network_is_found_when_it_is_tuned(tmp_path):
    trained = example(tmp_path, "--train", "--minutes", "0.5")
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert (tmp_path / "runs" / "finetuned-gpt-prefill-cpu" / "best.safetensors").exists()
    tuned = example(tmp_path, "--infer", "--trials", "1")
    assert tuned.returncode == 0 and "finetuned-gpt-prefill-cpu" in tuned.stdout, tuned.stderr[-2000:]
