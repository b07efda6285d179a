"""Running a recorded experiment again: from its own measurements (the same result, bit for bit), or live."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from autotune.compiler import without_beam
from autotune.errors import ReplayError, UsageError
from autotune.experiments import Body, Session
from autotune.experiments.agents import compare as compare_agents
from autotune.experiments.curves import compare as compare_curves
from autotune.experiments.evaluate import evaluate
from autotune.experiments.finetune import practise
from autotune.experiments.imagination import compare as compare_imagination
from autotune.experiments.kept import unpack
from autotune.experiments.train import train
from autotune.experiments.tuning import tune_program
from autotune.measuring.recording import Recording
from autotune.records import Records
from autotune.records.store import copy_records
from autotune.training import Clock

EXPERIMENTS: dict[str, Body] = {
    "train": train, "finetune": practise, "evaluate": evaluate, "tuning": tune_program, "agents": compare_agents,
    "imagination": compare_imagination, "curves": compare_curves,
}  # fmt: skip
WITHOUT_DEVICE = ("agents", "imagination")  # experiments on recorded timings: there is nothing of their own to replay
KEPT = (
    "guide*.json",
    "guide*.safetensors",
    "start*.json",
    "start*.safetensors",
    "program.json",
    "named.json",
)  # what a run started from
WALL_CLOCK = ("seconds", "each_trial")  # figures that hold what thinking took: a replay thinks again


def main(run: Path, live: bool) -> int:
    """Replay a run directory, or one that was kept as a file (tools/keep_run.py); 0 when every figure is the same, 1 when one
    differs (or, live, always 0)."""
    with tempfile.TemporaryDirectory(prefix="tinygrad-autotune-replay-") as folder, without_beam():
        if run.is_file():
            unpack(run, Path(folder) / "kept")
        return _replay(run, Path(folder) / "kept" if run.is_file() else run, Path(folder) / "out", live)


def _replay(label: Path, run: Path, out: Path, live: bool) -> int:
    name, settings, recorded = read_run(run)
    out.mkdir()
    for file in (found for kind in KEPT for found in run.glob(kind)):
        shutil.copy(file, out / file.name)
    session = Session(out) if live or name in WITHOUT_DEVICE else _recorded(run, out, recorded)
    figures = json.loads(json.dumps(session.finish(EXPERIMENTS[name](session, settings))["figures"]))
    differences = list(compare(recorded["figures"], figures))
    for line in differences:
        print(line)
    if not differences:
        print(f"{label}: the same result, bit for bit")
    return 1 if differences and not live else 0


def read_run(run: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(experiment, settings, result) of a run directory. Raises UsageError where it is none, or was not finished."""
    try:
        name = json.loads((run / "run.json").read_text())["experiment"]["name"]
        settings = json.loads((run / "config.json").read_text())
        result = json.loads((run / "result.json").read_text())
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise UsageError(f"{run} is no finished run: it has no {missing}; runs are in `runs/`") from None
    except (ValueError, KeyError, TypeError, NotADirectoryError) as error:
        raise UsageError(f"{run} is damaged: {error}") from None
    if absent := [key for key in ("device", "fingerprint", "clock", "figures") if key not in result]:
        raise UsageError(f"{run} is damaged: its result.json has no {absent[0]}")
    if "part" in settings:
        settings["part"] = ""  # what it went on from is part of it now, and done again
    if name not in EXPERIMENTS:
        raise UsageError(f"{run} is a run of {name!r}; replay knows {', '.join(EXPERIMENTS)}")
    return name, settings, result


def _recorded(run: Path, out: Path, result: dict[str, Any]) -> Session:
    """A session whose measurements come from the run's records. They are copied first: a replay changes nothing."""
    files = []
    (out / "recorded").mkdir()
    for path in sorted(run.glob("records*.db")):
        copy_records(path, copy := out / "recorded" / path.name)
        files.append(Records(copy))
    if not files:
        raise ReplayError(f"{run} holds no records; use --live")
    session = Session(out, Recording(files, result["fingerprint"]), Clock(result["clock"]))
    if session.device != result["device"]:
        raise ReplayError(f"{run} was recorded with DEV={result['device']}, this is {session.device}: set DEV")
    return session


def compare(recorded: Any, again: Any, where: str = "") -> list[str]:
    """One line for each figure that differs, with its place."""
    if isinstance(recorded, dict) and isinstance(again, dict):
        keys = sorted((set(recorded) | set(again)) - set(WALL_CLOCK))
        return [line for k in keys for line in compare(recorded.get(k), again.get(k), f"{where}.{k}" if where else k)]
    if isinstance(recorded, list) and isinstance(again, list) and len(recorded) == len(again):
        pairs = enumerate(zip(recorded, again, strict=True))
        return [line for i, (a, b) in pairs for line in compare(a, b, f"{where}[{i}]")]
    same = recorded == again or (recorded != recorded and again != again)  # NaN is itself here
    return [] if same else [f"{where}: recorded {recorded}, now {again}"]
