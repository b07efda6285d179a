"""Experiments under sacred: the only place that imports it. Each run leaves a directory that can be replayed.

A run directory (`runs/N`) holds what sacred writes (config.json, run.json, metrics.json, cout.txt) and, as artifacts,
`result.json` (figures, and the counts at which the clock said stop), `records*.db` (every trial) and checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sacred import SETTINGS, Experiment
from sacred.observers import FileStorageObserver
from sacred.run import Run
from sacred.utils import SacredError

from agents.checkpoint import replacing
from autotune.compiler import default_device, renderer_of, without_beam
from autotune.errors import UsageError, status_of
from autotune.measuring.runner import Measurer, Runner
from autotune.records import Records
from autotune.strict import shown
from autotune.training import Clock, Log

SETTINGS.CAPTURE_MODE = "sys"  # capturing file descriptors stalls with tqdm and child processes
SETTINGS.HOST_INFO.INCLUDE_GPU_INFO = False  # it costs seconds, and the fingerprint says what matters
SETTINGS.HOST_INFO.INCLUDE_CPU_INFO = False
SETTINGS.CONFIG.READ_ONLY_CONFIG = False
RUNS = Path("runs")
MANY_SEEDS = ("agents", "curves", "imagination")  # experiments that repeat everything with the seeds 0, 1, ...


def make_experiment(name: str) -> Experiment:
    """An experiment that stores its runs in `runs/`."""
    experiment = Experiment(name, save_git_info=False, interactive=True)
    experiment.observers.append(FileStorageObserver(str(RUNS)))
    return experiment


def command_line(experiment: Experiment, arguments: list[str]) -> int:
    """Run an experiment as `python -m` does: exit status 0, or one line on stderr and 1 (failure) or 2 (usage)."""
    name = str(experiment.path)

    def run() -> None:
        if name in MANY_SEEDS and any(argument.partition("=")[0].strip() == "seed" for argument in arguments):
            raise UsageError("it has no `seed`, for all is repeated with the seeds from 0 on; `seeds` is their number")
        try:
            experiment.run_commandline([name, "--debug", *arguments])  # debug: hand errors on, print no trace
        except SacredError as error:
            raise UsageError(str(error)) from None

    return status_of(name, run, f"finished trials and checkpoints are in `{RUNS}`")


def check_types(defaults: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises UsageError for a setting of another type than its default's, or a negative number."""
    for name, value in settings.items():
        default = defaults.get(name)
        if default is None:
            continue
        kind = (int, float) if isinstance(default, float) else type(default)
        good = isinstance(value, kind) and isinstance(value, bool) == isinstance(default, bool)
        if not good or (isinstance(value, int | float) and not value >= 0):
            raise UsageError(f"bad setting {name}: {shown(value)} stands where something like {shown(default)} should")


def check_counts(settings: Mapping[str, Any], *names: str) -> None:
    """Raises UsageError for a setting that is no whole number above 0."""
    for name in names:
        if type(settings[name]) is not int or settings[name] < 1:
            raise UsageError(f"bad setting {name}: {shown(settings[name])} is no whole number above 0")


def check_limit(settings: Mapping[str, Any], name: str) -> None:
    """Raises UsageError for a setting that is neither None nor a number of at least 0."""
    limit = settings[name]
    if limit is not None and not (type(limit) in (int, float) and limit >= 0):
        raise UsageError(f"bad setting {name}: {shown(limit)} is neither None nor a number of at least 0")


def check_names(what: str, names: Collection[Any], known: Collection[str]) -> None:
    """Raises UsageError where there are none, or one that is not known."""
    if unknown := [name for name in names if name not in list(known)]:
        raise UsageError(f"unknown {what} {shown(unknown[0])}; choose of {', '.join(known)}")
    if not names:
        raise UsageError(f"no {what} is named; choose of {', '.join(known)}")


def without(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """All but these."""
    return {name: value for name, value in settings.items() if name not in names}


class Session:
    """What an experiment works with: a place for files, a device to measure on (or its recording), a clock."""

    def __init__(self, out: Path, measurer: Measurer | None = None, clock: Clock | None = None, log: Log | None = None):
        self.out, self.device = out, default_device()
        self.renderer = renderer_of(self.device)
        self.measurer: Measurer = measurer or Runner(self.device)
        self.clock = clock or Clock()
        self.log: Log = log or (lambda name, value, step: None)
        self.files: dict[str, Records] = {}

    def records(self, name: str = "") -> Records:
        """The records file of this run for one purpose; every trial of the run is in one of them."""
        label = f"records-{name}.db" if name else "records.db"
        if label not in self.files:
            self.files[label] = Records(self.out / label)
            if isinstance(self.measurer, Runner):
                self.files[label].add_fingerprint(self.measurer.fields)
        return self.files[label]

    def finish(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Write result.json: the figures, which a replay must repeat, and what it needs to do so."""
        result = {"figures": figures, "clock": self.clock.ended, "fingerprint": self.measurer.fingerprint, "device": self.device,
                  "seconds": self.clock.elapsed()}  # fmt: skip
        self.measurer.close()
        for file in self.files.values():
            file.close()
        with replacing(self.out / "result.json") as draft:
            draft.write_text(json.dumps(result, indent=1))
        return result


Body = Callable[[Session, dict[str, Any]], dict[str, Any]]  # of an experiment: its figures, from its settings


@contextmanager
def session_of(run: Run) -> Iterator[Session]:
    """A session that writes straight into the run's directory, so that a killed run keeps its records and checkpoints.

    At the end its files are listed in run.json as the run's artifacts. Unobserved runs write to a temporary folder.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_beam())
        observers = [o for o in run.observers if isinstance(o, FileStorageObserver)]
        folder = observers[0].dir if observers else stack.enter_context(tempfile.TemporaryDirectory())
        out = Path(str(folder))
        before = set(out.iterdir())
        session = Session(out, log=lambda name, value, step: run.log_scalar(name, value, step))
        try:
            yield session
        finally:
            session.measurer.close()
            for observer in observers:
                entry: dict[str, Any] = observer.run_entry or {}
                entry["artifacts"] = sorted(p.name for p in set(out.iterdir()) - before if _is_artifact(p))
                observer.save_json(entry, "run.json")


def finished(run: Run, config: Mapping[str, Any], body: Body) -> dict[str, Any]:
    """The figures that `body` finds in a session of this run; they end it."""
    with session_of(run) as session:
        return session.finish(body(session, dict(config)))["figures"]


def _is_artifact(path: Path) -> bool:
    """Not what sacred itself writes while the run goes on."""
    return path.suffix in (".db", ".json", ".safetensors") and path.name not in (
        "metrics.json",
        "info.json",
        "run.json",
    )
